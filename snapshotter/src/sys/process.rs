// SPDX-License-Identifier: Apache-2.0
//! Processes: watching one that is no child of ours, and memory settings of our own.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Tells a program's binary from others, also from one that took its path: device, inode, size, time.
pub fn identity(binary: &Path) -> io::Result<String> {
    let file = std::fs::metadata(binary)?;
    Ok(format!(
        "{:x}:{:x}:{:x}:{:x}.{:x}",
        file.dev(),
        file.ino(),
        file.len(),
        file.mtime(),
        file.mtime_nsec()
    ))
}

/// The binary that this process runs, whatever its path names now.
pub const OWN_BINARY: &str = "/proc/self/exe";

/// A descriptor that polls readable once the process `pid` has ended, every thread of it.
///
/// **Errors** `ESRCH` when there is no such process, `ENOSYS` before Linux 5.3.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just installed this number for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the process behind a descriptor of [`pidfd`] has ended.
pub fn has_ended(process: BorrowedFd<'_>) -> bool {
    let mut polls = [PollFd::new(process, PollFlags::POLLIN)];
    // One that cannot be asked about is not trusted to live.
    poll(&mut polls, PollTimeout::ZERO) != Ok(0)
}

/// Keeps the allocator small in a process with many threads and few, large, short-lived buffers.
///
/// fuser takes a buffer of 16 MiB for each thread, of which it touches a page or two. glibc would
/// learn from the first one freed that such sizes belong on the heap, and clear them whole from then
/// on. A fixed threshold keeps each a mapping of its own; two arenas are enough for our rare
/// allocations.
pub fn keep_allocator_small() {
    // SAFETY: mallopt sets two numbers; it is called before any other thread starts.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Raises the limit of open files to what the hard limit allows.
pub fn raise_open_files() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}

/// Asks the kernel to choose this process last when memory runs out. Says whether it was permitted.
pub fn spare_from_oom() -> bool {
    // -999, not -1000: a node that is really out of memory must still be able to kill it.
    std::fs::write("/proc/self/oom_score_adj", "-999").is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn who_lives_has_not_ended() {
        let me = pidfd(std::process::id()).unwrap();
        assert!(!has_ended(me.as_fd()));
        let mut child = Command::new("true").spawn().unwrap();
        let fd = pidfd(child.id()).unwrap();
        child.wait().unwrap();
        assert!(has_ended(fd.as_fd()));
    }

    #[test]
    fn pidfd_tells_the_end_of_a_process() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let fd = pidfd(child.id()).unwrap();
        let mut polls = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut polls, PollTimeout::ZERO).unwrap(), 0);
        child.kill().unwrap();
        assert_eq!(poll(&mut polls, PollTimeout::from(10_000u16)).unwrap(), 1);
        child.wait().unwrap();
    }
}
