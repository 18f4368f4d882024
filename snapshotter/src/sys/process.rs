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

/// What a thread that nobody waits for has to say against others: about a tenth of their share. Much less, and it
/// would never be done on a node that is always busy.
const MODEST_NICE: libc::c_int = 10;

/// Has the calling thread leave most of the processor to whoever else wants it, for good.
pub fn yield_to_others() {
    // SAFETY: setpriority takes integers and touches no memory of ours; 0 is the calling thread on Linux.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, MODEST_NICE) };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!("lower the priority of a thread: {error}");
    }
}

/// Whether the process behind a descriptor of [`pidfd`] has ended.
pub fn has_ended(process: BorrowedFd<'_>) -> bool {
    let mut polls = [PollFd::new(process, PollFlags::POLLIN)];
    // One that cannot be asked about is not trusted to live.
    poll(&mut polls, PollTimeout::ZERO) != Ok(0)
}

/// How much memory the allocator keeps that nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocatorLimits {
    /// Whatever is larger is a mapping of its own, which goes back to the kernel when it is freed.
    pub mapped_from_bytes: libc::c_int,
    /// What is free at the end of a heap goes back to the kernel from so much on.
    pub trimmed_from_bytes: libc::c_int,
    /// The most heaps. Threads beyond that share one; each keeps what its busiest moment needed.
    pub heaps: libc::c_int,
}

/// Of the shim's worker, with many threads and few, large, short-lived buffers: fuser takes one of 16 MiB for each
/// thread, of which it touches a page or two. glibc would learn from the first one freed that such sizes belong on
/// the heap, and clear them whole from then on. Two heaps are enough for our rare allocations.
pub const WORKER_ALLOCATOR: AllocatorLimits = AllocatorLimits {
    mapped_from_bytes: 128 << 10,
    trimmed_from_bytes: 128 << 10,
    heaps: 2,
};

/// Of the daemon: it merges trees and decodes chunks, up to a few hundred MB at a time, and then is idle for days.
/// glibc would learn to keep up to 64 MiB at the end of each heap, and has eight heaps per processor. Chunks (256 KiB
/// at most) stay on the heap: they come by the thousand.
pub const DAEMON_ALLOCATOR: AllocatorLimits = AllocatorLimits {
    mapped_from_bytes: 1 << 20,
    trimmed_from_bytes: 2 << 20,
    heaps: 4,
};

/// Keeps the memory of this process to what it uses. To be called before any other thread starts.
pub fn keep_memory_small(limits: AllocatorLimits) {
    // SAFETY: mallopt sets numbers of the allocator; no other thread uses it yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, limits.mapped_from_bytes);
        libc::mallopt(libc::M_TRIM_THRESHOLD, limits.trimmed_from_bytes);
        libc::mallopt(libc::M_ARENA_MAX, limits.heaps);
    }
    // Where the kernel gives huge pages unasked, the first byte of each of those buffers would cost 2 MiB.
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::debug!(%error, "do without huge pages");
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
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    use super::*;

    /// Pages of a buffer that are in memory.
    fn resident(buffer: &[u8]) -> usize {
        const PAGE: usize = 4096;
        let (first, count) = (buffer.as_ptr() as usize / PAGE, buffer.len() / PAGE);
        let mut entries = vec![0; count * 8];
        let offset = u64::try_from(first * 8).unwrap();
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entries, offset).unwrap();
        // The top bit of an entry says it.
        let top = |entry: &[u8]| entry[7] & 0x80 != 0;
        entries.chunks_exact(8).filter(|entry| top(entry)).count()
    }

    #[test]
    fn a_large_buffer_costs_what_is_touched() {
        // The allocator's limits are the process's, and other tests set theirs at the same time.
        const ALONE: &str = "SLUICE_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let me = std::env::current_exe().unwrap();
            let this = "sys::process::tests::a_large_buffer_costs_what_is_touched";
            let mut alone = Command::new(me);
            alone.args(["--exact", this]).env(ALONE, "1");
            assert!(alone.status().unwrap().success());
            return;
        }
        keep_memory_small(WORKER_ALLOCATOR);
        assert!(nix::sys::prctl::get_thp_disable().unwrap());
        // Had glibc learnt from the first, the last would be on the heap, where the second was, and cleared.
        for _ in 0..3 {
            let mut buffer = vec![0u8; 16 << 20];
            assert!(resident(&buffer) < 4, "{} pages", resident(&buffer));
            buffer.fill(1);
            assert!(resident(&buffer) > 4000);
        }
    }

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
