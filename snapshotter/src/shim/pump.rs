// SPDX-License-Identifier: Apache-2.0
//! Between the kernel and a session, where requests are kept in a [`Journal`].
//!
//! ```text
//! /dev/fuse -- read into a slot --> journal -- packet --> session's threads
//! /dev/fuse <-- write, slot free -------------- packet -- session's threads
//! ```
//!
//! The session has one end of a packet socket in the place of `/dev/fuse`, and notices no difference: a packet
//! is a request. Each byte is copied twice more than without, so this is for kernels that cannot hand a request
//! out again (docs/decisions/030-journal.md).
//!
//! **Lifecycle** two threads. When the kernel has ended the connection, each thread of the session is sent a
//! FUSE_DESTROY, which ends it; the answers' thread ends when the session is gone.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{setsockopt, sockopt};

use super::journal::{Journal, unique_of_answer};
use crate::sys::fdpass::PacketSocket;
use crate::sys::fusefd;

/// The largest answer: a read of as much as the kernel asks for at most, and its header.
const ANSWER_BYTES: usize = (1 << 20) + 4096;
/// Room for some of these in each direction.
const SOCKET_BYTES: usize = 4 << 20;

/// A connection of a session that is not yet pumped.
#[derive(Debug)]
pub struct Pump {
    fuse: File,
    kernel: File,
    journal: Arc<Journal>,
}

impl Pump {
    /// The session's end, and the pump that will feed it from `fuse`.
    pub fn new(fuse: BorrowedFd<'_>, journal: Arc<Journal>) -> io::Result<(OwnedFd, Pump)> {
        let (session, kernel) = PacketSocket::pair()?;
        for end in [session.as_fd(), kernel.as_fd()] {
            // Beyond the system's limit: an answer is one packet, and must fit.
            setsockopt(&end, sockopt::SndBufForce, &SOCKET_BYTES)?;
        }
        let pump = Pump {
            fuse: fuse.try_clone_to_owned()?.into(),
            kernel: kernel.into_owned().into(),
            journal,
        };
        Ok((session.into_owned(), pump))
    }

    /// Gives the session a FUSE_INIT of our own, whose answer goes nowhere: the connection had its own.
    pub fn greet(&self) -> io::Result<()> {
        (&self.kernel).write_all(&fusefd::init_request())
    }

    /// Starts to pump, with what the journal holds. `threads`: how many read the session's end.
    pub fn start(self, threads: usize) -> io::Result<()> {
        let unanswered = self.journal.unanswered();
        if !unanswered.is_empty() {
            tracing::info!(
                requests = unanswered.len(),
                "answer what a dead worker had read"
            );
        }
        let (answers, journal) = (self.kernel.try_clone()?, Arc::clone(&self.journal));
        let fuse = self.fuse.try_clone()?;
        super::worker::thread("answers", move || {
            if let Err(error) = carry_answers(&answers, &fuse, &journal) {
                tracing::error!(%error, "carry answers to the kernel");
            }
        })?;
        super::worker::thread("requests", move || {
            for request in unanswered {
                if (&self.kernel).write_all(&request.bytes).is_err() {
                    return;
                }
            }
            if let Err(error) = self.carry_requests() {
                tracing::error!(%error, "carry requests of the kernel");
            }
            for _ in 0..threads {
                // The session may be gone already.
                let _ended = (&self.kernel).write_all(&fusefd::destroy_request());
            }
        })
    }

    /// Until the kernel ends the connection, or the session is gone.
    fn carry_requests(&self) -> io::Result<()> {
        loop {
            let request = match self.journal.read_from(self.fuse.as_fd()) {
                Ok(Some(request)) => request,
                Ok(None) => continue,
                Err(error) => match error.raw_os_error() {
                    // It was withdrawn while it was being read.
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => continue,
                    Some(libc::ENODEV | libc::ECONNABORTED) => return Ok(()),
                    _ => return Err(error),
                },
            };
            match (&self.kernel).write_all(&request.bytes) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written?,
            }
        }
    }
}

/// Until the session is gone.
fn carry_answers(mut session: &File, mut fuse: &File, journal: &Journal) -> io::Result<()> {
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let length = match session.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECONNRESET) => return Ok(()),
                _ => return Err(error),
            },
        };
        let answer = &buffer[..length];
        // Of what we made up ourselves the kernel knows nothing.
        let Some(unique) = unique_of_answer(answer).filter(|it| journal.holds(*it)) else {
            continue;
        };
        match fuse.write(answer) {
            Ok(_) => {}
            // Withdrawn, answered by a dead worker, or the connection has ended.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::EPERM)
                ) => {}
            Err(error) => tracing::warn!(unique, %error, "give the kernel an answer"),
        }
        journal.answered(unique);
    }
}
