// SPDX-License-Identifier: Apache-2.0
//! The worker's connection to the daemon: comes back with back-off, whenever and as often as the
//! daemon does. Nothing is lost with a connection: reads that wait are asked for again.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use sluice_fetcher::steps::StepKind;
use sluice_proto::shim as wire;
use sluice_proto::shim::envelope::Body;

use super::keeper::Keeper;
use super::mounts::Mounts;
use super::protocol::{self, Unframer};
use super::waiting::WaitingReads;
use super::watch::Watches;
use super::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, SOCKET_NAME, stuck};
use crate::mount::{MountSpec, UnmountMode, UnmountOutcome};
use crate::sys::process;

/// First pause between attempts: a daemon that restarts is back within seconds.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause: readers of missing data wait for it.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A shim that serves nothing ends when no daemon has been there for so long: nothing depends on it, and
/// the next daemon starts another. Longer than a restart or an upgrade of the daemon takes.
const ALONE: Duration = Duration::from_secs(60);

/// A mount, an unmount, a look at the mount table. Half of what the daemon gives a call before it names it.
const OPERATION_STEP: StepKind = StepKind::new("shim operation", Duration::from_secs(5));

/// An operation of the daemon, and where its answer goes.
#[derive(Debug)]
struct Operation {
    id: u64,
    body: Body,
    answer: Sender<Vec<u8>>,
}

/// The worker's side of the shim protocol.
#[derive(Debug)]
pub struct Link {
    run_dir: PathBuf,
    keeper: Arc<Keeper>,
    mounts: Arc<Mounts>,
    watches: Arc<Watches>,
    waiting: Arc<WaitingReads>,
    operations: Sender<Operation>,
}

impl Link {
    /// Starts the thread for operations.
    pub fn new(
        run_dir: &Path,
        keeper: Arc<Keeper>,
        mounts: Arc<Mounts>,
        watches: Arc<Watches>,
        waiting: Arc<WaitingReads>,
    ) -> io::Result<Link> {
        let (operations, todo) = channel::<Operation>();
        let parts = Parts {
            keeper: keeper.clone(),
            mounts: mounts.clone(),
            watches: watches.clone(),
        };
        let steps = waiting.steps().clone();
        super::worker::thread("operate", move || {
            while let Ok(operation) = todo.recv() {
                let what = protocol::describe(&operation.body);
                let step = steps.enter(OPERATION_STEP, "sluiced", what);
                let (answer, last) = parts.operate(operation.body);
                drop(step);
                // A broken link: the daemon asks again on the next.
                let _gone = operation.answer.send(protocol::frame(operation.id, answer));
                if last {
                    // The answer is on its way; a holder that was told to ends when we do.
                    std::thread::sleep(Duration::from_millis(100));
                    std::process::exit(0);
                }
            }
        })?;
        let run_dir = run_dir.to_owned();
        Ok(Link {
            run_dir,
            keeper,
            mounts,
            watches,
            waiting,
            operations,
        })
    }

    /// Connects again and again. Never returns.
    pub fn run(&self) -> ! {
        let path = self.run_dir.join(SOCKET_NAME);
        let mut pause = FIRST_PAUSE;
        let mut alone_since = Instant::now();
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => {
                    let begun = Instant::now();
                    let served = self.serve(stream);
                    alone_since = Instant::now();
                    self.waiting.disconnected();
                    match served {
                        // One that ends as soon as it begins will do so again.
                        Ok(true) if begun.elapsed() > LONGEST_PAUSE => pause = FIRST_PAUSE,
                        Ok(true) => {}
                        Ok(false) => pause = LONGEST_PAUSE,
                        Err(error) => tracing::info!(%error, "the daemon is gone"),
                    }
                }
                Err(error) => tracing::debug!(%error, "connect to the daemon"),
            }
            if is_idle(alone_since.elapsed(), self.serves_nothing()) {
                alone_since = Instant::now();
                self.shut_down();
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn serves_nothing(&self) -> bool {
        self.mounts.is_empty() && self.watches.is_empty()
    }

    /// Ends the shim unless it has got something to serve; in turn with the daemon's operations.
    fn shut_down(&self) {
        tracing::info!("nothing is served, and the daemon does not come back");
        let (answer, _unread) = channel();
        let body = Body::Shutdown(wire::Shutdown {});
        let _gone = self.operations.send(Operation {
            id: 0,
            body,
            answer,
        });
    }

    /// One connection, to its end. False: the daemon does not want us.
    fn serve(&self, stream: UnixStream) -> io::Result<bool> {
        let daemon = getsockopt(&stream, PeerCredentials)?;
        self.watches.daemon().connected(daemon.pid());
        let (outgoing, queue) = channel::<Vec<u8>>();
        let mut writer = stream.try_clone()?;
        super::worker::thread("link-out", move || {
            while let Ok(bytes) = queue.recv() {
                if writer.write_all(&bytes).is_err() {
                    // The reader sees it too.
                    let _gone = writer.shutdown(Shutdown::Both);
                    return;
                }
            }
        })?;
        let hello = wire::Hello {
            version: PROTOCOL_VERSION,
            oldest_version: OLDEST_PROTOCOL_VERSION,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            worker_pid: std::process::id(),
            holder_pid: self.keeper.holder_pid(),
            mounts: u32::try_from(self.mounts.count()).unwrap_or(u32::MAX),
            program: process::identity(process::OWN_BINARY.as_ref()).unwrap_or_default(),
        };
        let _gone = outgoing.send(protocol::frame(0, Body::Hello(hello)));
        let mut reader = stream;
        let mut unframer = Unframer::default();
        let mut buffer = vec![0u8; 16 * 1024];
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            unframer.push(&buffer[..count]);
            while let Some(envelope) = unframer.take().map_err(io::Error::other)? {
                if !self.take(envelope, &outgoing) {
                    return Ok(false);
                }
            }
        }
    }

    /// False: the daemon speaks no version that we speak.
    fn take(&self, envelope: wire::Envelope, outgoing: &Sender<Vec<u8>>) -> bool {
        let id = envelope.id;
        match envelope.body {
            Some(Body::HelloReply(reply)) if !reply.error.is_empty() => {
                tracing::error!(error = reply.error, "the daemon does not understand us");
                return false;
            }
            Some(Body::HelloReply(_)) => {
                let daemon = self.watches.daemon();
                self.waiting.release(|pid| daemon.is_ours(pid));
                self.waiting.connected(outgoing.clone());
                let keeper = Arc::clone(&self.keeper);
                // Readers do not wait for it.
                if let Err(error) =
                    super::worker::thread("reserve", move || keeper.attach_reserve())
                {
                    tracing::warn!(%error, "have the daemon keep descriptors");
                }
            }
            Some(Body::FillReply(reply)) => self.waiting.answered(id, reply),
            // Here and now: an operation may be what is stuck.
            Some(Body::Steps(_)) => {
                let stuck = self.waiting.steps().stuck(Instant::now());
                let reply = Body::StepsReply(stuck::to_wire(stuck));
                let _gone = outgoing.send(protocol::frame(id, reply));
            }
            Some(
                body @ (Body::Mount(_)
                | Body::Unmount(_)
                | Body::List(_)
                | Body::Check(_)
                | Body::Reads(_)
                | Body::Upgrade(_)
                | Body::Watch(_)
                | Body::Unwatch(_)
                | Body::Watches(_)
                | Body::Shutdown(_)),
            ) => {
                let operation = Operation {
                    id,
                    body,
                    answer: outgoing.clone(),
                };
                // The thread lives as long as the process.
                let _gone = self.operations.send(operation);
            }
            None
            | Some(
                Body::Hello(_)
                | Body::Fill(_)
                | Body::MountReply(_)
                | Body::UnmountReply(_)
                | Body::ListReply(_)
                | Body::CheckReply(_)
                | Body::ReadsReply(_)
                | Body::UpgradeReply(_)
                | Body::WatchReply(_)
                | Body::UnwatchReply(_)
                | Body::WatchesReply(_)
                | Body::StepsReply(_)
                | Body::ShutdownReply(_),
            ) => tracing::debug!(id, "ignore a message that is not for us"),
        }
        true
    }
}

/// Whether a shim without a daemon for `alone` may end.
fn is_idle(alone: Duration, serves_nothing: bool) -> bool {
    serves_nothing && alone >= ALONE
}

/// What operations work on.
struct Parts {
    keeper: Arc<Keeper>,
    mounts: Arc<Mounts>,
    watches: Arc<Watches>,
}

impl Parts {
    /// Does one operation; gives the answer, and whether it was the last.
    fn operate(&self, body: Body) -> (Body, bool) {
        let Parts {
            keeper,
            mounts,
            watches,
        } = self;
        match body {
            Body::Mount(mount) => {
                let key = mount.key.clone();
                let done = MountSpec::try_from(mount)
                    .map_err(io::Error::other)
                    .and_then(|spec| mounts.mount(spec));
                let error = done
                    .err()
                    .map(|error| error.to_string())
                    .unwrap_or_default();
                tracing::info!(key, error, "mount");
                (Body::MountReply(wire::MountReply { error }), false)
            }
            Body::Unmount(unmount) => {
                let mode = match unmount.detach {
                    true => UnmountMode::Detach,
                    false => UnmountMode::IfUnused,
                };
                let (busy, error) = match mounts.unmount(&unmount.key, mode) {
                    Ok(outcome) => (outcome == UnmountOutcome::Busy, String::new()),
                    Err(error) => (false, error.to_string()),
                };
                tracing::info!(key = unmount.key, busy, error, "unmount");
                (
                    Body::UnmountReply(wire::UnmountReply { error, busy }),
                    false,
                )
            }
            Body::Shutdown(_) => {
                let used = !mounts.is_empty() || !watches.is_empty();
                let busy = used || keeper.retire().is_err();
                (Body::ShutdownReply(wire::ShutdownReply { busy }), !busy)
            }
            Body::Upgrade(upgrade) => {
                let upgraded = keeper.upgrade(upgrade.binary.as_ref());
                let error = upgraded.err().map(|error| error.to_string());
                let error = error.unwrap_or_default();
                tracing::warn!(upgrade.binary, error, "go on as another program");
                let done = error.is_empty();
                (Body::UpgradeReply(wire::UpgradeReply { error }), done)
            }
            Body::Check(check) => {
                let serving = mounts.is_serving(&check.key).unwrap_or_else(|error| {
                    tracing::error!(key = check.key, %error, "look for a mount");
                    // Asked to mount, we look again and say what is wrong.
                    false
                });
                (Body::CheckReply(wire::CheckReply { serving }), false)
            }
            Body::Reads(reads) => {
                let (key, from, forget) = (&reads.key, reads.from, reads.forget);
                let mut page = mounts.first_reads(key, from, forget);
                if !page.recorded {
                    page = watches.first_reads(key, from, forget);
                }
                (Body::ReadsReply(page.into()), false)
            }
            Body::Watch(watch) => {
                let spec = MountSpec::try_from(watch.mount.unwrap_or_default());
                let done = spec
                    .map_err(io::Error::other)
                    .and_then(|spec| watches.watch(spec));
                let reply = match done {
                    Ok(watched) => wire::WatchReply {
                        watched: Some(watched),
                        ..Default::default()
                    },
                    Err(error) => {
                        tracing::error!(%error, "watch");
                        wire::WatchReply {
                            error: error.to_string(),
                            watched: None,
                        }
                    }
                };
                (Body::WatchReply(reply), false)
            }
            Body::Unwatch(unwatch) => {
                let busy = watches.unwatch(&unwatch.key) == UnmountOutcome::Busy;
                tracing::info!(key = unwatch.key, busy, "unwatch");
                let error = String::new();
                (
                    Body::UnwatchReply(wire::UnwatchReply { error, busy }),
                    false,
                )
            }
            Body::Watches(_) => {
                let watched = watches.list();
                (Body::WatchesReply(wire::WatchesReply { watched }), false)
            }
            body => {
                let after = match body {
                    Body::List(list) => list.after,
                    _ => String::new(),
                };
                let reply = mounts.page(&after).unwrap_or_else(|error| {
                    tracing::error!(%error, "list mounts");
                    wire::ListReply::default()
                });
                (Body::ListReply(reply), false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_shim_that_serves_nothing_ends_without_its_daemon() {
        let minute = Duration::from_secs(60);
        let cases = [
            (Duration::ZERO, true, false),
            (minute - Duration::from_millis(1), true, false),
            (minute, true, true),
            (minute * 1000, false, false),
        ];
        for (alone, serves_nothing, expected) in cases {
            assert_eq!(is_idle(alone, serves_nothing), expected, "{alone:?}");
        }
    }
}
