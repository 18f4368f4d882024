// SPDX-License-Identifier: Apache-2.0
//! The shim: the processes that serve mounts and outlive the daemon.
//!
//! ```text
//!   sluiced ── starts, detached ──> holder ── starts, reaps, restarts ──> worker
//!      ^                              │  SEQPACKET pair: fds and records    │ ^
//!      │                              └────────────────────────────────────>│ │ /dev/fuse
//!      └───────────── <run>/shim.sock: Mount, Unmount, Fill ────────────────┘ kernel
//! ```
//!
//! - The **holder** ([`holder`]) keeps descriptors under names and knows nothing of what they are.
//! - The **worker** ([`worker`]) serves; all that it needs to go on after a death is, for each
//!   mount, the `/dev/fuse` descriptor and a mount record ([`record`]), both with the holder; before
//!   Linux 6.9 also a `journal` of the requests that were read and not answered, filled by a `pump`.
//! - The **client** ([`client`]) is `sluiced`'s side. It keeps duplicates of all that the holder keeps, and so
//!   does systemd where it runs the daemon ([`client::reserve`]): worker and holder may die at once, and with
//!   systemd all three.
//!
//! What a death costs: of the daemon, a delay for reads of missing data; of the worker, a delay for
//! all reads of its mounts; of the holder, nothing, and of both a delay. Inode numbers are
//! EROFS nids, so a new worker has no table to restore.
//!
//! Files below the run directory: `shim.sock` (the daemon listens, 0600), `shim.lock` (an `flock`
//! held as long as a holder or worker lives), `shim.log`. The protocols and the record are described
//! in docs/formats/shim.md.

pub mod client;
pub mod device;
pub mod filesystem;
pub mod fills;
mod given_up;
pub mod holder;
mod journal;
pub mod keeper;
mod link;
pub mod log;
mod mounts;
pub mod protocol;
mod pump;
pub mod reads;
pub mod record;
pub mod session;
mod stuck;
pub mod waiting;
mod watch;
pub mod worker;

/// Newest version of the shim protocol that we speak.
pub const PROTOCOL_VERSION: u32 = 4;
/// Oldest version of the shim protocol that we speak.
pub const OLDEST_PROTOCOL_VERSION: u32 = 1;

/// The version in which the worker began to record first reads.
pub const READS_VERSION: u32 = 2;

/// The version in which the worker began to say which binary it is, and to go on as another.
pub const UPGRADE_VERSION: u32 = 3;
/// The version in which the worker began to answer the kernel's events.
pub const WATCH_VERSION: u32 = 3;
/// The version in which the worker began to say what is stuck.
pub const STEPS_VERSION: u32 = 4;

/// Name of the socket below the run directory on which the daemon waits for the worker.
pub const SOCKET_NAME: &str = "shim.sock";
/// Name of the socket below the run directory on which the daemon keeps descriptors, too.
pub const KEEP_SOCKET_NAME: &str = "keep.sock";
/// Name of the lock below the run directory that a living shim holds.
pub const LOCK_NAME: &str = "shim.lock";
/// Argument of holder and worker: keep requests also where the kernel could hand them out again.
pub(crate) const JOURNAL_FLAG: &str = "--journal";
/// Name of the shim's log below the run directory.
pub const LOG_NAME: &str = "shim.log";
