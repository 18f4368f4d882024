// SPDX-License-Identifier: Apache-2.0
//! A stand-in for systemd as a daemon knows it: readiness, and a store for descriptors that outlives it.
//!
//! It speaks the protocols of sd_notify(3) and sd_listen_fds(3): descriptors come beside datagrams with `FDSTORE=1`,
//! go with `FDSTOREREMOVE=1`, and are handed to the daemon's next process from number 3 on.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::root::Root;

/// How long its thread does not notice that it is to end.
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// The first descriptor of a process that is not one of the three usual ones.
const FIRST: i32 = 3;

/// Names and descriptors, in the order in which they came.
type Stored = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// A service manager for one daemon.
#[derive(Debug)]
pub struct ServiceManager {
    socket: PathBuf,
    stored: Stored,
    ready: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ServiceManager {
    /// Listens below `root`.
    pub fn start(root: &Root) -> Result<Self> {
        Self::listen(&root.join("notify.sock")?)
    }

    /// Listens at `socket`.
    pub fn listen(socket: &Path) -> Result<Self> {
        let receiver = UnixDatagram::bind(socket).context("bind the notify socket")?;
        receiver.set_read_timeout(Some(LOOK_AROUND))?;
        let (stored, stop) = (Stored::default(), Arc::new(AtomicBool::new(false)));
        let ready = Arc::new(AtomicBool::new(false));
        let thread = {
            let (stored, stop, ready) = (stored.clone(), stop.clone(), ready.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Some((text, fd)) = receive(&receiver) {
                        if text.lines().any(|line| line == "READY=1") {
                            ready.store(true, Ordering::Relaxed);
                        }
                        apply(&stored, &text, fd);
                    }
                }
            })
        };
        Ok(Self {
            socket: socket.to_owned(),
            stored,
            ready,
            stop,
            thread: Some(thread),
        })
    }

    /// Whether the daemon has said that it is ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// For a daemon's next process, which is not ready yet.
    pub fn forget_ready(&self) {
        self.ready.store(false, Ordering::Relaxed);
    }

    /// How many descriptors stand in the store.
    #[must_use]
    pub fn stored(&self) -> usize {
        lock(&self.stored).len()
    }

    /// A command that runs `program` with what is stored. Its arguments are yet to be added.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let stored = lock(&self.stored);
        let mut names = Vec::new();
        let mut mappings = Vec::new();
        for ((name, fd), child_fd) in stored.iter().zip(FIRST..) {
            names.push(name.clone());
            let parent_fd = fd.try_clone()?;
            mappings.push(FdMapping {
                parent_fd,
                child_fd,
            });
        }
        // Only the process itself knows its number.
        let mut command = Command::new("sh");
        command
            .args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"])
            .arg(program)
            .env("NOTIFY_SOCKET", &self.socket);
        if !names.is_empty() {
            command
                .env("LISTEN_FDS", names.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        }
        command.fd_mappings(mappings)?;
        Ok(command)
    }
}

fn lock(stored: &Stored) -> std::sync::MutexGuard<'_, Vec<(String, OwnedFd)>> {
    stored.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next datagram, and the descriptor beside it.
fn receive(socket: &UnixDatagram) -> Option<(String, Option<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let length = received.ok()?.bytes;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.flatten().next();
    Some((String::from_utf8_lossy(&bytes[..length]).into_owned(), fd))
}

fn apply(stored: &Stored, text: &str, fd: Option<OwnedFd>) {
    let says = |line: &str| text.lines().any(|it| it == line);
    let Some(name) = text.lines().find_map(|line| line.strip_prefix("FDNAME=")) else {
        return;
    };
    let mut stored = lock(stored);
    // The same one again is not stored twice.
    stored.retain(|(known, _)| known != name);
    if let Some(fd) = fd
        && says("FDSTORE=1")
    {
        stored.push((name.to_owned(), fd));
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
