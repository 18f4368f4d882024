// SPDX-License-Identifier: Apache-2.0
//! The worker's side of the holder: hands descriptors over, and finds a new holder when it dies.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout, sockopt::SendTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use prost::Message;
use sluice_fetcher::steps::{StepGuard, StepKind, Steps};
use sluice_proto::shim as wire;
use sluice_proto::shim::holder_packet::Body;

use super::holder::{Entries, LOCK_ENTRY, packet};
use super::{JOURNAL_FLAG, KEEP_SOCKET_NAME, PROTOCOL_VERSION};
use crate::sys::fanotify;
use crate::sys::fdpass::PacketSocket;
use crate::sys::process;

/// How long the holder may take to answer. It does nothing else; only a stopped one is this slow.
const ANSWER_DEADLINE_SECONDS: i64 = 5;
/// Holder and daemon do nothing else: half of what they are given to answer, for one of them.
const KEEP_STEP: StepKind = StepKind::new("descriptor keeping", Duration::from_secs(2));
/// How long a program that is to take over may take to say that it runs.
const PROBE_DEADLINE: Duration = Duration::from_secs(5);

/// Where the numbers of our own long-lived descriptors begin, if so many may be open.
const HIGH_NUMBERS: i32 = 1 << 15;

/// What the holder gave to this worker.
#[derive(Debug)]
pub struct Inheritance {
    /// Descriptors by name.
    pub entries: Entries,
    /// The holder.
    pub holder_pid: u32,
}

/// The connection to the holder, and a duplicate of all that it keeps.
#[derive(Debug)]
pub struct Keeper {
    run_dir: PathBuf,
    /// For the workers of a new holder.
    journal: bool,
    /// As it was when we started: after an upgrade, the path names the new binary.
    binary: PathBuf,
    inner: Mutex<Inner>,
    steps: Steps,
}

#[derive(Debug)]
struct Inner {
    socket: PacketSocket,
    holder_pid: u32,
    /// Duplicates, for a new holder.
    kept: Entries,
    /// A holder that we have started ourselves, to be reaped.
    child: Option<Child>,
    /// The daemon, which keeps all of it too; `None` while there is none.
    reserve: Option<PacketSocket>,
}

fn duplicate(fds: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
    let copies = fds.iter().map(BorrowedFd::try_clone_to_owned);
    copies.map(|copy| move_up(copy?)).collect()
}

/// Moves what lives as long as we do to high numbers: low ones may be those of events that a dead
/// worker left unanswered, see [`super::watch`].
fn move_up(fd: OwnedFd) -> io::Result<OwnedFd> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let lowest = i32::try_from(soft / 2).unwrap_or(HIGH_NUMBERS);
    fanotify::move_up(fd, lowest.min(HIGH_NUMBERS))
}

impl Keeper {
    /// Takes what the holder hands over on standard input.
    pub fn inherit(run_dir: &Path, journal: bool) -> io::Result<(Keeper, Inheritance)> {
        let socket = move_up(io::stdin().as_fd().try_clone_to_owned()?)?;
        let socket = PacketSocket::from_owned(socket);
        nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
        let mut entries = Entries::new();
        let holder_pid = loop {
            let Some(packet) = socket.recv()? else {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the holder is gone",
                ));
            };
            let body = wire::HolderPacket::decode(packet.bytes.as_slice())
                .map_err(io::Error::other)?
                .body;
            match body {
                Some(Body::Inherit(inherit)) => {
                    let fds = packet.fds.into_iter().map(move_up);
                    entries.insert(inherit.name, fds.collect::<io::Result<_>>()?);
                }
                Some(Body::InheritEnd(end)) => break end.holder_pid,
                // What a newer holder may add.
                _ => tracing::debug!("ignore a packet while inheriting"),
            }
        };
        set_answer_deadline(&socket)?;
        let mut kept = Entries::new();
        for (name, fds) in &entries {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
            kept.insert(name.clone(), duplicate(&fds)?);
        }
        let inner = Inner {
            socket,
            holder_pid,
            kept,
            child: None,
            reserve: None,
        };
        let binary = std::env::current_exe()?;
        let keeper = Keeper {
            run_dir: run_dir.to_owned(),
            journal,
            binary,
            inner: Mutex::new(inner),
            steps: Steps::new(),
        };
        Ok((
            keeper,
            Inheritance {
                entries,
                holder_pid,
            },
        ))
    }

    /// Has conversations with the holder entered into these steps, which somebody watches.
    pub fn watched_by(self, steps: Steps) -> Keeper {
        Keeper { steps, ..self }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The holder now.
    pub fn holder_pid(&self) -> u32 {
        self.inner().holder_pid
    }

    /// Has descriptors kept under a name; when it returns, they outlive this process.
    pub fn keep(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _step = self.enter("keep", name);
        let mut inner = self.inner();
        inner.kept.insert(name.to_owned(), duplicate(fds)?);
        let told = inner.tell(
            Body::Keep(wire::Keep {
                name: name.to_owned(),
            }),
            name,
            fds,
        );
        if told.is_err() {
            inner.kept.remove(name);
            return told;
        }
        inner.tell_reserve(
            Body::Keep(wire::Keep {
                name: name.to_owned(),
            }),
            name,
            fds,
        );
        Ok(())
    }

    fn enter(&self, what: &'static str, name: &str) -> StepGuard {
        let subject = format!("{what} {name}");
        self.steps.enter(KEEP_STEP, "the worker", subject)
    }

    /// Has the daemon keep all of it too. To be called whenever a daemon has come; **blocks** for a moment.
    pub fn attach_reserve(&self) {
        let path = self.run_dir.join(KEEP_SOCKET_NAME);
        let connected = PacketSocket::connect(&path).and_then(|socket| {
            let socket = PacketSocket::from_owned(move_up(socket.into_owned())?);
            set_answer_deadline(&socket)?;
            Ok(socket)
        });
        let socket = match connected {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "the daemon keeps no descriptors: only the holder does");
                return;
            }
        };
        let mut inner = self.inner();
        inner.reserve = Some(socket);
        let kept = std::mem::take(&mut inner.kept);
        // The lock says that a shim lives: the daemon is none.
        for (name, fds) in kept.iter().filter(|(name, _)| *name != LOCK_ENTRY) {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
            inner.tell_reserve(Body::Keep(wire::Keep { name: name.clone() }), name, &fds);
        }
        inner.kept = kept;
        let end = wire::InheritEnd {
            version: PROTOCOL_VERSION,
            holder_pid: inner.holder_pid,
        };
        inner.tell_reserve(Body::InheritEnd(end), "", &[]);
    }

    /// Has a name forgotten. A failure leaves the entry with the holder, which costs descriptors and
    /// is put right when the next worker finds that its connection has ended.
    pub fn forget(&self, name: &str) {
        let _step = self.enter("forget", name);
        let mut inner = self.inner();
        inner.kept.remove(name);
        let forget = Body::Forget(wire::Forget {
            name: name.to_owned(),
        });
        if let Err(error) = inner.tell(forget.clone(), name, &[]) {
            tracing::warn!(%error, name, "have the holder forget an entry");
        }
        inner.tell_reserve(forget, name, &[]);
    }

    /// Says that this worker ends on purpose.
    pub fn retire(&self) -> io::Result<()> {
        retire_with_us(&self.inner().socket)
    }

    /// Waits for the death of holder after holder, and starts a new one each time. Never returns;
    /// the caller gives it a thread.
    pub fn replace_dead_holders(&self) -> ! {
        loop {
            self.wait_for_death();
            tracing::warn!("the holder died, starting another");
            while let Err(error) = self.start_holder(&self.binary) {
                tracing::error!(%error, "start a holder");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }

    fn wait_for_death(&self) {
        let pid = self.holder_pid();
        // No such process: it is dead already.
        let Ok(ended) = process::pidfd(pid) else {
            return;
        };
        let mut polls = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        while poll(&mut polls, PollTimeout::NONE).is_err() {}
        if let Some(mut child) = self.inner().child.take() {
            let _status = child.wait();
        }
    }

    /// Has a holder of another binary keep all, and the present one end with this process. The caller ends it
    /// then: the new holder starts a worker of its own binary.
    ///
    /// **Errors** the binary cannot be run, or does not take over: all stays as it is. **Blocks** for some seconds
    /// at most.
    pub fn upgrade(&self, binary: &Path) -> io::Result<()> {
        probe(binary)?;
        let before = {
            let mut inner = self.inner();
            let socket = inner.socket.try_clone()?;
            (socket, inner.holder_pid, inner.child.take())
        };
        if let Err(error) = self.start_holder(binary) {
            let mut inner = self.inner();
            if let Some(mut child) = inner.child.take() {
                let _gone = child.kill();
                let _status = child.wait();
            }
            (inner.socket, inner.holder_pid, inner.child) = before;
            return Err(error);
        }
        retire_with_us(&before.0)
    }

    fn start_holder(&self, binary: &Path) -> io::Result<()> {
        let (ours, theirs) = PacketSocket::pair()?;
        let mut inner = self.inner();
        let child = Command::new(binary)
            .arg("holder")
            .arg("--adopt")
            .arg("--run-dir")
            .arg(&self.run_dir)
            .args(self.journal.then_some(JOURNAL_FLAG))
            .stdin(theirs.into_owned())
            .spawn()?;
        set_answer_deadline(&ours)?;
        inner.holder_pid = child.id();
        inner.child = Some(child);
        inner.socket = ours;
        let kept = std::mem::take(&mut inner.kept);
        let mut result = Ok(());
        for (name, fds) in &kept {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
            let told = inner.tell(Body::Keep(wire::Keep { name: name.clone() }), name, &fds);
            result = result.and(told);
        }
        tracing::info!(
            holder = inner.holder_pid,
            entries = kept.len(),
            "a new holder keeps all"
        );
        inner.kept = kept;
        result
    }
}

/// Runs a binary that is to take over, to see whether it can be run at all.
fn probe(binary: &Path) -> io::Result<()> {
    let mut child = Command::new(binary)
        .arg("probe")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let begun = Instant::now();
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(io::Error::other(format!("its probe ends with {status}"))),
            None if begun.elapsed() > PROBE_DEADLINE => {
                let _gone = child.kill();
                let _status = child.wait();
                return Err(io::Error::other("its probe does not end"));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

impl Inner {
    fn tell(&mut self, body: Body, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        tell(&self.socket, body, name, fds)
    }

    /// Tells the daemon, if there is one. One that does not answer is told all anew when it comes back.
    fn tell_reserve(&mut self, body: Body, name: &str, fds: &[BorrowedFd<'_>]) {
        let Some(reserve) = &self.reserve else {
            return;
        };
        if let Err(error) = tell(reserve, body, name, fds) {
            tracing::info!(%error, "the daemon keeps no descriptors any more");
            self.reserve = None;
        }
    }
}

/// Has a holder end when this worker is gone.
fn retire_with_us(holder: &PacketSocket) -> io::Result<()> {
    holder.send(&packet(Body::Retire(wire::Retire {})), &[])
}

/// Sends one packet and waits for its Done.
fn tell(socket: &PacketSocket, body: Body, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    socket.send(&packet(body), fds)?;
    loop {
        let Some(packet) = socket.recv()? else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let body = wire::HolderPacket::decode(packet.bytes.as_slice())
            .ok()
            .and_then(|p| p.body);
        match body {
            Some(Body::Done(done)) if done.name == name && done.error.is_empty() => {
                return Ok(());
            }
            Some(Body::Done(done)) if done.name == name => {
                return Err(io::Error::other(done.error));
            }
            // The late answer to something that we gave up.
            _ => {}
        }
    }
}

fn set_answer_deadline(socket: &PacketSocket) -> io::Result<()> {
    let deadline = TimeVal::seconds(ANSWER_DEADLINE_SECONDS);
    // Sending waits too, once what was sent before fills the queue of one that does not read.
    setsockopt(socket, SendTimeout, &deadline)?;
    Ok(setsockopt(socket, ReceiveTimeout, &deadline)?)
}
