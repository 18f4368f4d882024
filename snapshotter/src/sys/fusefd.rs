// SPDX-License-Identifier: Apache-2.0
//! The `/dev/fuse` descriptor: taking over a live connection.
//!
//! fuser begins every session with the kernel's FUSE_INIT request. A connection that is taken over
//! has had its own long ago. So the new session starts on one end of a socket pair on which we have
//! put a FUSE_INIT as the kernel would write it; when fuser has answered, the real descriptor is put
//! in the session's place (`dup3` keeps the number), and the kernel is told to hand out again all
//! requests that the dead server had read but not answered.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::fdpass::PacketSocket;

/// Bytes of a FUSE_INIT request: header (40) and `fuse_init_in` of protocol 7.36 and later (64).
const INIT_REQUEST_BYTES: u32 = 104;
/// Bytes of a request's header.
const HEADER_BYTES: u32 = 40;
/// Opcode of FUSE_DESTROY.
const FUSE_DESTROY: u32 = 38;
/// Opcode of FUSE_INIT (`include/uapi/linux/fuse.h`).
const FUSE_INIT: u32 = 26;
/// Notification that makes the kernel hand out unanswered requests again (Linux 6.9).
const FUSE_NOTIFY_RESEND: u32 = 7;

/// Readahead in the synthetic offer; the kernel has long taken its own.
const READAHEAD_BYTES: u32 = 128 * 1024;

// The protocol is in the byte order of the host; we only build where that is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// Opens `/dev/fuse`, close-on-exec.
pub fn open() -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/fuse")?;
    Ok(file.into())
}

/// A socket on which a FUSE_INIT request waits; a new session starts on it. The second end must live
/// until the session has answered.
pub fn synthetic_connection() -> io::Result<(OwnedFd, PacketSocket)> {
    let (session, kernel) = PacketSocket::pair()?;
    kernel.send(&init_request(), &[])?;
    Ok((session.into_owned(), kernel))
}

/// A FUSE_DESTROY request: a thread of a session that reads it ends.
pub fn destroy_request() -> Vec<u8> {
    let mut words = vec![0u32; HEADER_BYTES as usize / 4];
    words[0] = HEADER_BYTES;
    words[1] = FUSE_DESTROY;
    // The kernel counts from 2 up, and never comes here.
    words[2] = u32::MAX - 1;
    words[3] = u32::MAX;
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A FUSE_INIT request, as the kernel would write it.
pub fn init_request() -> Vec<u8> {
    let mut words = vec![0u32; INIT_REQUEST_BYTES as usize / 4];
    words[0] = INIT_REQUEST_BYTES;
    words[1] = FUSE_INIT;
    words[2] = 2; // unique: any even number, as the kernel gives
    words[10] = 7; // major
    words[11] = 41; // minor: fuser speaks the lower of this and its own
    words[12] = READAHEAD_BYTES;
    // Every capability: the answer goes nowhere, the kernel keeps what it agreed to long ago.
    words[13] = u32::MAX;
    words[14] = u32::MAX;
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Puts `real` where `session` is: the number stays, the file behind it changes.
pub fn replace(session: BorrowedFd<'_>, real: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        // SAFETY: both numbers are open and borrowed for the call; the owner of `session` keeps
        // owning its number.
        let done = unsafe { libc::dup3(real.as_raw_fd(), session.as_raw_fd(), libc::O_CLOEXEC) };
        if done >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) {
            return Err(error);
        }
    }
}

/// Has the kernel hand out again every request that was read and not answered.
///
/// **Errors** `EINVAL` before Linux 6.9.
pub fn resend(real: BorrowedFd<'_>) -> io::Result<()> {
    let mut message = Vec::with_capacity(16);
    for word in [16, FUSE_NOTIFY_RESEND, 0, 0] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    let mut file = File::from(real.try_clone_to_owned()?);
    file.write_all(&message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_request_is_what_the_kernel_would_write() {
        let bytes = init_request();
        assert_eq!(bytes.len(), 104);
        assert_eq!(&bytes[..12], [104, 0, 0, 0, 26, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(&bytes[40..52], [7, 0, 0, 0, 41, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(&bytes[52..60], [0xff; 8]);
        assert!(bytes[60..].iter().all(|&byte| byte == 0));
    }
}
