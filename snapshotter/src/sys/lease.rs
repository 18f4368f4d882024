// SPDX-License-Identifier: Apache-2.0
//! Whether anybody else has a file open: the kernel too, as the image of a file system that may be
//! mounted where no mount table shows it (below an overlay, in another mount namespace).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Chooses the signal of [`libc::F_SETLEASE`]. **Source** include/uapi/asm-generic/fcntl.h.
const F_SETSIG: i32 = 10;

/// Asks for a lease that the kernel gives only if nobody else has the file open, and gives it back.
///
/// **Errors** those of opening it. A file system without leases says that somebody has it open.
pub fn is_open_elsewhere(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let set = |command: i32, value: i32| {
        // SAFETY: takes an open descriptor and integers.
        unsafe { libc::fcntl(file.as_raw_fd(), command, value) }
    };
    // Who opens the file while we have the lease has us told by a signal, by default one that ends
    // the process; this one is ignored.
    if set(F_SETSIG, libc::SIGURG) < 0 {
        return Err(io::Error::last_os_error());
    }
    let alone = set(libc::F_SETLEASE, libc::F_WRLCK) >= 0;
    set(libc::F_SETLEASE, libc::F_UNLCK);
    Ok(!alone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_user_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"x").unwrap();
        assert!(!is_open_elsewhere(&path).unwrap());
        let open = File::open(&path).unwrap();
        assert!(is_open_elsewhere(&path).unwrap());
        drop(open);
        assert!(!is_open_elsewhere(&path).unwrap());
        assert!(is_open_elsewhere(&dir.path().join("none")).is_err());
    }
}
