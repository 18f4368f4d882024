// SPDX-License-Identifier: Apache-2.0
//! `sluiced`'s side of the shim: starts or finds it, asks it to mount, and serves its fills.
//!
//! The client listens on `shim.sock`; a worker connects and says Hello. There is at most one current
//! connection, the newest. A call that finds none, or whose connection breaks before the answer,
//! waits for the next one until its deadline and is sent again: every request may be repeated. When
//! no connection is there and nobody holds `shim.lock`, the supervisor starts a holder.
//!
//! **Locks** `State` is locked for map operations only, never across an await.

mod connection;
pub mod reserve;
mod start;
mod stuck;
mod watches;

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sluice_blockindex::digest::{DiffId, IndexDigest};
use sluice_blockindex::extent::{DeviceSpace, Extent};
use sluice_fetcher::scheduler::Filled;
use sluice_fetcher::steps::{StepKind, Steps};
use sluice_proto::shim as wire;
use sluice_proto::shim::envelope::Body;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::reserve::{Keeping, Reserve};
use super::protocol::{self, ProtocolError};
use crate::mount::errno::FillErrno;
use crate::mount::{FirstReads, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome};
use crate::sys::process;

/// What the worker does for the daemon is local and short; a third of the deadline.
const CALL_STEP: StepKind = StepKind::new("shim call", Duration::from_secs(10));

/// How the client finds and starts the shim.
#[derive(Debug, Clone)]
pub struct ShimOptions {
    /// Holds socket, lock and log; exists, mode 0700.
    pub run_dir: PathBuf,
    /// The `sluice-shim` binary.
    pub binary: PathBuf,
    /// How long a started or found shim may take to say Hello.
    pub start_deadline: Duration,
    /// How long a call may take.
    pub call_deadline: Duration,
    /// Fills served at the same time; more wait in line.
    pub parallel_fills: usize,
    /// Have a shim that is started keep its requests also where the kernel could hand them out again.
    pub journal: bool,
    /// What is kept here of the shim's descriptors; the same one for as long as the process lives.
    pub reserve: Arc<Reserve>,
    /// Calls are entered here, and what is stuck in the worker is shown here.
    pub steps: Steps,
}

impl ShimOptions {
    /// Defaults around the two paths.
    pub fn new(run_dir: PathBuf, binary: PathBuf) -> ShimOptions {
        ShimOptions {
            run_dir,
            binary,
            // A worker that takes over a hundred mounts maps as many trees first.
            start_deadline: Duration::from_secs(15),
            call_deadline: Duration::from_secs(30),
            // Far above what readers of one node wait for at once; each costs a task.
            parallel_fills: 1024,
            journal: false,
            reserve: Arc::default(),
            steps: Steps::new(),
        }
    }
}

/// A range that a reader waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FillRequest {
    /// The layer.
    pub diff_id: DiffId,
    /// The index whose device it is.
    pub index_digest: IndexDigest,
    /// What must become present.
    pub extent: Extent<DeviceSpace>,
    /// How long the reader goes on waiting; `None`: for ever.
    pub deadline: Option<Duration>,
    /// Whether the reader takes the bytes themselves where the store does not keep them.
    pub takes_bytes: bool,
}

/// Makes missing data present.
///
/// Promises: [`Filled::Present`] only when every chunk that the extent touches has its presence bit set, the
/// bytes written before; [`Filled::Passed`] only to who takes bytes. **Cancel** the future is dropped when the worker's connection breaks; the worker
/// asks again, and the work under way should not be lost. Calls come in parallel, also for the same
/// range.
#[async_trait]
pub trait FillService: Send + Sync + Debug {
    /// Fills one range.
    async fn fill(&self, request: FillRequest) -> Result<Filled, FillErrno>;
}

/// Why there is no shim.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ShimError {
    /// A file or socket of the run directory.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// How it failed.
        source: std::io::Error,
    },
    /// No worker said Hello in time.
    #[error("no shim said hello within {waited:?}; its log is {log}")]
    NoHello {
        /// How long we waited.
        waited: Duration,
        /// Where it says why.
        log: PathBuf,
    },
    /// A worker is there, and no version is common to both.
    #[error("the running shim speaks protocol {theirs:?}, this daemon {ours:?}")]
    Version {
        /// What the worker speaks: oldest, newest.
        theirs: (u32, u32),
        /// What we speak.
        ours: (u32, u32),
    },
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimPeer {
    /// Version of the protocol that both go on with.
    pub version: u32,
    /// Version of the crate that the worker was built from.
    pub build: String,
    /// Tells its binary from others; empty if it does not say.
    pub program: String,
    /// The worker.
    pub worker_pid: u32,
    /// The holder.
    pub holder_pid: u32,
    /// How many mounts it served when it said Hello.
    pub mounts: u32,
}

/// A mount that the worker has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedMount {
    /// What is or was mounted.
    pub spec: MountSpec,
    /// It is not at its mountpoint any more, but somebody still uses it: tree and devices must stay.
    pub leaving: bool,
}

/// The daemon's handle on the shim. Dropping it leaves shim and mounts as they are.
#[derive(Debug)]
pub struct ShimClient {
    shared: Arc<Shared>,
    /// Owns the accept loop and the supervisor: dropped, they end.
    _tasks: JoinSet<()>,
    /// Keeps descriptors for as long as it lives.
    _keeping: Keeping,
}

#[derive(Debug)]
struct Shared {
    options: ShimOptions,
    fills: Arc<dyn FillService>,
    permits: tokio::sync::Semaphore,
    state: Mutex<State>,
    /// What the current connection is, for those who wait for one.
    current: watch::Sender<Presence>,
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    /// Calls that wait for an answer on the current connection.
    waiting: HashMap<u64, oneshot::Sender<Body>>,
    /// Where the current connection takes messages.
    outgoing: Option<mpsc::UnboundedSender<Vec<u8>>>,
}

/// Whether a worker is there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Presence {
    Absent,
    Attached(ShimPeer),
    WrongVersion(u32, u32),
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A holder of this lock does map operations only; what a panic left is still a map.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ShimClient {
    /// Attaches to the shim that serves below the run directory, or starts one.
    ///
    /// Returns when a worker has said Hello. From then on the client keeps itself attached: a dead
    /// worker is awaited, a dead shim is started again.
    pub async fn start_or_attach(
        options: ShimOptions,
        fills: Arc<dyn FillService>,
    ) -> Result<ShimClient, ShimError> {
        // First: a worker looks for it as soon as it is connected.
        let keeping = start::listen_for_descriptors(&options.run_dir)?;
        let keeping = Keeping::start(keeping, Arc::clone(&options.reserve));
        let listener = start::listen(&options.run_dir)?;
        let deadline = Instant::now() + options.start_deadline;
        let log = options.run_dir.join(super::LOG_NAME);
        let waited = options.start_deadline;
        let shared = Arc::new(Shared {
            permits: tokio::sync::Semaphore::new(options.parallel_fills),
            options,
            fills,
            state: Mutex::default(),
            current: watch::Sender::new(Presence::Absent),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(connection::accept(listener, shared.clone()));
        tasks.spawn(start::supervise(shared.clone()));
        let client = ShimClient {
            shared,
            _tasks: tasks,
            _keeping: keeping,
        };
        match client.presence(deadline).await {
            Some(Presence::Attached(_)) => Ok(client),
            Some(Presence::WrongVersion(oldest, newest)) => Err(ShimError::Version {
                theirs: (oldest, newest),
                ours: (super::OLDEST_PROTOCOL_VERSION, super::PROTOCOL_VERSION),
            }),
            Some(Presence::Absent) | None => Err(ShimError::NoHello { waited, log }),
        }
    }

    /// The first presence that is not absent; `None` at the deadline.
    async fn presence(&self, deadline: Instant) -> Option<Presence> {
        let mut current = self.shared.current.subscribe();
        let there = current.wait_for(|presence| *presence != Presence::Absent);
        tokio::time::timeout_at(deadline, there)
            .await
            .ok()?
            .ok()
            .map(|p| p.clone())
    }

    /// Who serves now; `None` while a worker is being replaced.
    pub fn peer(&self) -> Option<ShimPeer> {
        match &*self.shared.current.borrow() {
            Presence::Attached(peer) => Some(peer.clone()),
            Presence::Absent | Presence::WrongVersion(..) => None,
        }
    }

    /// Mounts, and returns when the files are there. Mounting again what is mounted is fine.
    pub async fn mount(&self, spec: &MountSpec) -> Result<(), MountError> {
        spec.check()?;
        match self.call(Body::Mount(spec.into())).await? {
            Body::MountReply(reply) if reply.error.is_empty() => Ok(()),
            Body::MountReply(reply) => Err(MountError::Refused {
                key: spec.key.clone(),
                reason: reply.error,
            }),
            _ => Err(unexpected(&spec.key)),
        }
    }

    /// Unmounts. What is not mounted is [`UnmountOutcome::Done`].
    pub async fn unmount(
        &self,
        key: &str,
        mode: UnmountMode,
    ) -> Result<UnmountOutcome, MountError> {
        let detach = mode == UnmountMode::Detach;
        match self
            .call(Body::Unmount(wire::Unmount {
                key: key.to_owned(),
                detach,
            }))
            .await?
        {
            Body::UnmountReply(reply) if reply.busy => Ok(UnmountOutcome::Busy),
            Body::UnmountReply(reply) if reply.error.is_empty() => Ok(UnmountOutcome::Done),
            Body::UnmountReply(reply) => Err(MountError::Refused {
                key: key.to_owned(),
                reason: reply.error,
            }),
            _ => Err(unexpected(key)),
        }
    }

    /// What the worker serves at this moment, and what is leaving.
    pub async fn mounts(&self) -> Result<Vec<ListedMount>, MountError> {
        let (mut mounts, mut after) = (Vec::new(), String::new());
        loop {
            let list = wire::List {
                after: after.clone(),
            };
            match self.call(Body::List(list)).await? {
                Body::ListReply(reply) => {
                    mounts.extend(connection::listed(reply.mounts));
                    if reply.next <= after {
                        return Ok(mounts);
                    }
                    after = reply.next;
                }
                _ => return Err(unexpected("")),
            }
        }
    }

    /// Whether the worker serves a mount, and it is at its mountpoint.
    pub async fn check(&self, key: &str) -> Result<MountState, MountError> {
        let check = wire::Check {
            key: key.to_owned(),
        };
        match self.call(Body::Check(check)).await? {
            Body::CheckReply(reply) if reply.serving => Ok(MountState::Serving),
            Body::CheckReply(_) => Ok(MountState::Absent),
            _ => Err(unexpected(key)),
        }
    }

    /// The next first reads of a mount, see [`crate::mount::ImageMount::first_reads`]. A worker of before
    /// [`super::READS_VERSION`] records nothing.
    pub async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        if self
            .peer()
            .is_some_and(|peer| peer.version < super::READS_VERSION)
        {
            return Ok(FirstReads::default());
        }
        let reads = wire::Reads {
            key: key.to_owned(),
            from,
            forget,
        };
        match self.call(Body::Reads(reads)).await? {
            Body::ReadsReply(reply) => {
                reply
                    .try_into()
                    .map_err(|error: ProtocolError| MountError::Refused {
                        key: key.to_owned(),
                        reason: error.to_string(),
                    })
            }
            _ => Err(unexpected(key)),
        }
    }

    /// Has worker and holder go on as the binary of the options, if they run another: says whether they do so.
    ///
    /// Readers wait for a moment, as after a death. A shim of before [`super::UPGRADE_VERSION`] goes on as it is.
    pub async fn upgrade(&self) -> Result<bool, MountError> {
        let binary = &self.shared.options.binary;
        let refused = |reason: String| MountError::Refused {
            key: binary.display().to_string(),
            reason,
        };
        let ours = process::identity(binary).map_err(|error| refused(error.to_string()))?;
        let Some(peer) = self.peer() else {
            return Ok(false);
        };
        if peer.version < super::UPGRADE_VERSION || peer.program == ours {
            return Ok(false);
        }
        let upgrade = wire::Upgrade {
            binary: binary.display().to_string(),
        };
        match self.call(Body::Upgrade(upgrade)).await? {
            Body::UpgradeReply(reply) if reply.error.is_empty() => Ok(true),
            Body::UpgradeReply(reply) => Err(refused(reply.error)),
            _ => Err(unexpected("")),
        }
    }

    /// Stops worker and holder if no mount is left; says whether they stop.
    pub async fn shutdown(&self) -> Result<UnmountOutcome, MountError> {
        match self.call(Body::Shutdown(wire::Shutdown {})).await? {
            Body::ShutdownReply(reply) if reply.busy => Ok(UnmountOutcome::Busy),
            Body::ShutdownReply(_) => Ok(UnmountOutcome::Done),
            _ => Err(unexpected("")),
        }
    }

    /// Sends a request and waits for its answer, over as many connections as it takes.
    async fn call(&self, body: Body) -> Result<Body, MountError> {
        let options = &self.shared.options;
        let _step = options
            .steps
            .enter(CALL_STEP, "sluiced", protocol::describe(&body));
        let waited = options.call_deadline;
        let deadline = Instant::now() + waited;
        let late = || MountError::Unanswered { waited };
        loop {
            match self.presence(deadline).await {
                Some(Presence::Attached(_)) => {}
                Some(Presence::WrongVersion(..) | Presence::Absent) | None => return Err(late()),
            }
            let Some((id, answer)) = self.send(body.clone()) else {
                // The connection is just being replaced.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(body)) => return Ok(body),
                Ok(Err(_broken)) => continue,
                Err(_elapsed) => {
                    self.shared.state().waiting.remove(&id);
                    return Err(late());
                }
            }
        }
    }

    fn send(&self, body: Body) -> Option<(u64, oneshot::Receiver<Body>)> {
        let mut state = self.shared.state();
        state.next_id += 1;
        let id = state.next_id;
        state
            .outgoing
            .as_ref()?
            .send(protocol::frame(id, body))
            .ok()?;
        let (answer, waiter) = oneshot::channel();
        state.waiting.insert(id, answer);
        Some((id, waiter))
    }
}

fn unexpected(key: &str) -> MountError {
    let reason = "the shim gave an answer to another question".to_owned();
    MountError::Refused {
        key: key.to_owned(),
        reason,
    }
}
