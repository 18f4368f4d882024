// SPDX-License-Identifier: Apache-2.0
//! Whether an event is by a process of ours, which asks the presence map by itself.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use crate::sys::process;

/// The daemon that is connected, as the kernel names it in events.
///
/// A number alone could by now be anybody's. While the process that we have a descriptor of lives, the
/// number is its own; and who waits for an answer lives.
#[derive(Debug, Default)]
pub struct DaemonProcess(Mutex<Option<(i32, OwnedFd)>>);

impl DaemonProcess {
    /// A daemon is there. One that cannot be watched is treated as a stranger: it waits for its own fills.
    pub fn connected(&self, pid: i32) {
        let opened = u32::try_from(pid).map_err(std::io::Error::other);
        let known = match opened.and_then(process::pidfd) {
            Ok(fd) => Some((pid, fd)),
            Err(error) => {
                tracing::error!(pid, %error, "watch the daemon's process");
                None
            }
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// Whether a process that waits for an answer at this moment is the daemon or this one.
    pub fn is_ours(&self, pid: i32) -> bool {
        if u32::try_from(pid) == Ok(std::process::id()) {
            return true;
        }
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = known.as_ref().filter(|(daemon, _)| *daemon == pid);
        same.is_some_and(|(_, fd)| !process::has_ended(fd.as_fd()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_number_counts_while_its_process_lives() {
        let daemon = DaemonProcess::default();
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(daemon.is_ours(me) && !daemon.is_ours(1));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        daemon.connected(pid);
        assert!(daemon.is_ours(pid) && !daemon.is_ours(pid + 1));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!daemon.is_ours(pid));
    }
}
