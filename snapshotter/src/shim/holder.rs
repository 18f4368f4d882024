// SPDX-License-Identifier: Apache-2.0
//! The holder: keeps descriptors under names for the next worker, and starts it.
//!
//! It is the worker's parent, or was adopted by a worker whose holder had died. It understands
//! neither the names nor the descriptors, opens no file on any mount, has one thread and no timer
//! besides the back-off. Its whole life is one loop: start a worker, hand everything over, keep what
//! the worker says, wait for its end, start another.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use prost::Message;
use sluice_proto::shim as wire;
use sluice_proto::shim::holder_packet::Body;

use super::{JOURNAL_FLAG, LOCK_NAME, PROTOCOL_VERSION};
use crate::sys::fdpass::PacketSocket;
use crate::sys::privileges::{self, Kept};
use crate::sys::process;

/// Name of the entry that holds the lock: it must live as long as holder or worker.
pub const LOCK_ENTRY: &str = "lock";

/// A worker that lived shorter than this is started again after a pause. One that cannot start dies
/// within milliseconds; one that is killed again and again must not make readers wait longer.
const QUICK_DEATH: Duration = Duration::from_millis(250);
/// Longest pause: reads wait meanwhile, and a deadline is to be reported by a worker.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What the holder keeps.
pub type Entries = BTreeMap<String, Vec<OwnedFd>>;

/// How a worker ended.
enum End {
    /// On purpose: nothing is left to serve.
    Retired,
    /// Any other way.
    Died,
}

/// The worker as the holder sees it.
struct Worker {
    socket: PacketSocket,
    ended: OwnedFd,
    /// To be reaped; none when it was there before us.
    child: Option<Child>,
}

/// Where a holder's entries come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: there are none.
    New,
    /// A living worker, whose holder died: it is at the other end of standard input, and hands them over.
    Worker,
    /// The daemon, which has kept them while worker and holder died: as above, but there is no worker.
    Daemon,
}

/// Runs a holder until its worker retires.
///
/// With `journal`, workers keep their requests also where the kernel could hand them out again.
pub fn run(run_dir: &Path, origin: Origin, journal: bool) -> io::Result<()> {
    // Not to end with the daemon's terminal or process group. Fails only for a group leader, who
    // has a group of his own already.
    let _leader = nix::unistd::setsid();
    std::env::set_current_dir("/")?;
    process::spare_from_oom();
    if let Err(error) = process::raise_open_files() {
        tracing::warn!(%error, "raise the limit of open files");
    }
    // What its workers need, only they know.
    if let Err(error) = privileges::keep_only(Kept::Holder) {
        tracing::warn!(%error, "give up privileges");
    }
    let binary = std::env::current_exe()?;
    let mut entries = Entries::new();
    let mut worker = if origin == Origin::Worker {
        adopt_worker()?
    } else {
        let Some(lock) = take_lock(run_dir)? else {
            tracing::info!("another shim serves this directory");
            return Ok(());
        };
        if origin == Origin::Daemon {
            entries = entries_of_daemon()?;
            tracing::warn!(
                entries = entries.len(),
                "worker and holder died: the daemon kept all"
            );
        }
        entries.insert(LOCK_ENTRY.to_owned(), vec![lock]);
        start_worker_until_it_works(&binary, run_dir, journal)
    };
    let mut handed_over = origin == Origin::Worker;
    let mut quick_deaths = 0u32;
    loop {
        let started = Instant::now();
        if !handed_over && let Err(error) = hand_over(&worker.socket, &entries) {
            tracing::warn!(%error, "hand over to the worker");
        }
        match serve(&mut worker, &mut entries)? {
            End::Retired => return Ok(()),
            End::Died => {}
        }
        handed_over = false;
        quick_deaths = if started.elapsed() < QUICK_DEATH {
            quick_deaths + 1
        } else {
            0
        };
        let pause = pause_after(quick_deaths);
        tracing::warn!(
            entries = entries.len(),
            ?pause,
            "worker died, starting another"
        );
        std::thread::sleep(pause);
        worker = start_worker_until_it_works(&binary, run_dir, journal);
    }
}

/// None after the first death, then doubling from 50 ms.
fn pause_after(quick_deaths: u32) -> Duration {
    match quick_deaths.checked_sub(2) {
        None => Duration::ZERO,
        Some(more) => (Duration::from_millis(50) * (1 << more.min(8))).min(LONGEST_PAUSE),
    }
}

fn take_lock(run_dir: &Path) -> io::Result<Option<OwnedFd>> {
    let path = run_dir.join(LOCK_NAME);
    let file: File = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)?;
    // The lock belongs to what was opened, and ends with the last duplicate of the descriptor.
    match file.try_lock() {
        Ok(()) => Ok(Some(file.into())),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn start_worker(binary: &PathBuf, run_dir: &Path, journal: bool) -> io::Result<Worker> {
    let (ours, theirs) = PacketSocket::pair()?;
    let child = Command::new(binary)
        .arg("worker")
        .arg("--run-dir")
        .arg(run_dir)
        .args(journal.then_some(JOURNAL_FLAG))
        .stdin(theirs.into_owned())
        // fuser's threads take the default size; they need a fraction of it.
        .env("RUST_MIN_STACK", "262144")
        .spawn()?;
    let ended = process::pidfd(child.id())?;
    Ok(Worker {
        socket: ours,
        ended,
        child: Some(child),
    })
}

/// The mounts depend on it: there is no giving up.
fn start_worker_until_it_works(binary: &PathBuf, run_dir: &Path, journal: bool) -> Worker {
    loop {
        match start_worker(binary, run_dir, journal) {
            Ok(worker) => return worker,
            Err(error) => {
                tracing::error!(%error, "start a worker");
                std::thread::sleep(LONGEST_PAUSE);
            }
        }
    }
}

/// What was standard input; from now on that is nothing.
fn take_stdin() -> io::Result<PacketSocket> {
    let socket = PacketSocket::from_owned(io::stdin().as_fd().try_clone_to_owned()?);
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(socket)
}

/// All that the daemon hands over.
fn entries_of_daemon() -> io::Result<Entries> {
    let socket = take_stdin()?;
    let mut entries = Entries::new();
    loop {
        let packet = socket.recv()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let body = wire::HolderPacket::decode(packet.bytes.as_slice()).map_err(io::Error::other)?;
        match body.body {
            Some(Body::Inherit(inherit)) => entries.insert(inherit.name, packet.fds),
            Some(Body::InheritEnd(_)) => return Ok(entries),
            _ => return Err(io::Error::other("a packet that makes no sense here")),
        };
    }
}

/// The worker at the other end of standard input.
fn adopt_worker() -> io::Result<Worker> {
    let socket = take_stdin()?;
    let peer = getsockopt(&socket, PeerCredentials)?;
    let pid = u32::try_from(peer.pid()).map_err(io::Error::other)?;
    Ok(Worker {
        socket,
        ended: process::pidfd(pid)?,
        child: None,
    })
}

/// A packet between a holder, or who stands in for one, and a worker.
pub(super) fn packet(body: Body) -> Vec<u8> {
    wire::HolderPacket { body: Some(body) }.encode_to_vec()
}

/// Sends entries, and that these were all.
pub(super) fn hand_over(socket: &PacketSocket, entries: &Entries) -> io::Result<()> {
    for (name, fds) in entries {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
        socket.send(
            &packet(Body::Inherit(wire::Inherit { name: name.clone() })),
            &fds,
        )?;
    }
    let end = wire::InheritEnd {
        version: PROTOCOL_VERSION,
        holder_pid: std::process::id(),
    };
    socket.send(&packet(Body::InheritEnd(end)), &[])
}

/// Does what the worker says until it ends, every packet that it sent included.
fn serve(worker: &mut Worker, entries: &mut Entries) -> io::Result<End> {
    let mut retired = false;
    loop {
        let mut polls = [
            PollFd::new(worker.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(worker.ended.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polls, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |poll: &PollFd<'_>| poll.revents().is_some_and(|events| !events.is_empty());
        let (spoke, ended) = (ready(&polls[0]), ready(&polls[1]));
        if spoke {
            match worker.socket.recv() {
                Ok(Some(packet)) => {
                    retired |= take(&worker.socket, entries, packet.bytes, packet.fds);
                    continue;
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "read from the worker"),
            }
        }
        if spoke || ended {
            // Nothing more will be said. Wait for the very end: every thread gone, so that no
            // request of the kernel is in its hands any more.
            let mut end = [PollFd::new(worker.ended.as_fd(), PollFlags::POLLIN)];
            while poll(&mut end, PollTimeout::NONE).is_err() {}
            if let Some(child) = &mut worker.child {
                let status = child.wait()?;
                tracing::info!(%status, "worker ended");
            }
            return Ok(if retired { End::Retired } else { End::Died });
        }
    }
}

/// Does what one packet says; true for Retire.
fn take(socket: &PacketSocket, entries: &mut Entries, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> bool {
    let body = wire::HolderPacket::decode(bytes.as_slice())
        .ok()
        .and_then(|packet| packet.body);
    let (name, error) = match body {
        Some(Body::Keep(keep)) if !fds.is_empty() => {
            entries.insert(keep.name.clone(), fds);
            (keep.name, "")
        }
        Some(Body::Keep(keep)) => (keep.name, "nothing to keep"),
        Some(Body::Forget(forget)) => {
            entries.remove(&forget.name);
            (forget.name, "")
        }
        Some(Body::Retire(_)) => return true,
        Some(Body::Inherit(_) | Body::InheritEnd(_) | Body::Done(_)) | None => {
            tracing::warn!("ignore a packet that makes no sense here");
            return false;
        }
    };
    let done = packet(Body::Done(wire::Done {
        name,
        error: error.to_owned(),
    }));
    if let Err(error) = socket.send(&done, &[]) {
        tracing::debug!(%error, "answer the worker");
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stop_growing() {
        let pauses = [0, 1, 2, 3, 4, 30].map(|deaths| pause_after(deaths).as_millis());
        assert_eq!(pauses, [0, 0, 50, 100, 200, 1000]);
    }

    #[test]
    fn entries_are_kept_replaced_and_forgotten() {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        let mut entries = Entries::new();
        let fd = || vec![OwnedFd::from(File::open("/dev/null").unwrap())];
        let keep = |name: &str| packet(Body::Keep(wire::Keep { name: name.into() }));
        let answer = |socket: &PacketSocket| {
            let packet = socket.recv().unwrap().unwrap();
            match wire::HolderPacket::decode(packet.bytes.as_slice())
                .unwrap()
                .body
                .unwrap()
            {
                Body::Done(done) => (done.name, done.error),
                other => panic!("{other:?}"),
            }
        };
        assert!(!take(&ours, &mut entries, keep("a"), fd()));
        assert_eq!(answer(&theirs), ("a".into(), String::new()));
        take(&ours, &mut entries, keep("a"), fd());
        take(&ours, &mut entries, keep("b"), Vec::new());
        assert_eq!(entries.len(), 1);
        answer(&theirs);
        assert_eq!(answer(&theirs), ("b".into(), "nothing to keep".into()));
        hand_over(&ours, &entries).unwrap();
        let inherited = theirs.recv().unwrap().unwrap();
        assert_eq!(inherited.fds.len(), 1);
        theirs.recv().unwrap().unwrap();
        take(
            &ours,
            &mut entries,
            packet(Body::Forget(wire::Forget { name: "a".into() })),
            vec![],
        );
        assert!(entries.is_empty());
        assert!(take(
            &ours,
            &mut entries,
            packet(Body::Retire(wire::Retire {})),
            vec![]
        ));
        assert!(!take(&ours, &mut entries, b"\xff\xff".to_vec(), vec![]));
    }

    #[test]
    fn the_lock_lives_in_any_duplicate() {
        let dir = tempfile::tempdir().unwrap();
        let lock = take_lock(dir.path()).unwrap().unwrap();
        let second = lock.try_clone().unwrap();
        drop(lock);
        assert!(take_lock(dir.path()).unwrap().is_none());
        drop(second);
        assert!(take_lock(dir.path()).unwrap().is_some());
    }
}
