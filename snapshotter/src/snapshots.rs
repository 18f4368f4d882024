// SPDX-License-Identifier: Apache-2.0
//! The life cycle of snapshots: the contract of containerd's snapshots service, behaving as the
//! overlayfs snapshotter does for all that is not lazy.
//!
//! ```text
//!   Prepare ──────────────► Active ──Commit──► Committed ◄──┐ adopt: Prepare with
//!   View ────► View            │                   │        │ containerd.io/snapshot.ref,
//!               │              │                   │        │ decided lazy or unpacked
//!               └───Remove─────┴──────Remove───────┘
//!                                (no children)
//! ```
//!
//! [`Snapshots`] holds the metadata store, the directories and the lazy side together. Rules:
//!
//! - A row is stored after its directory exists, and deleted before its directory goes. So a crash
//!   leaks a directory at worst, and the reaper finds it: a directory without a row and without an
//!   operation under way is nobody's.
//! - No metadata transaction and no lock is held across the lazy side, directory I/O or mounts.
//!   What a transaction found may be false when the next begins, so each checks again; a race is
//!   settled by the one that commits first.
//! - An operation that changes anything runs in a task of its own: a client that goes away does
//!   not leave it half done.
//! - stat, list, update, usage and remove touch the metadata store and, for the usage of an active
//!   snapshot, its own upper directory; they wait for nobody.
//! - Only remove deletes rows, and it deletes no directory: the reaper and
//!   [`Snapshots::cleanup`] do, by way of a graveyard that survives crashes.

mod directories;
mod error;
mod graveyard;
mod id_map;
mod lazy;
mod life_cycle;
mod options;
mod prepare;
mod record;
mod usage;

#[cfg(test)]
mod tests;

pub use directories::SnapshotDirectories;
pub use error::SnapshotError;
pub use lazy::{
    LazyDecision, LazyLayers, MountError, PrepareRequest, UnpackError, UnpackSource, UnpackTarget,
};
pub use life_cycle::{SnapshotOptions, Snapshots};
pub use options::{Mount, OverlayOptions};
pub use prepare::Prepared;
pub use record::{
    BlobOrigin, IndexSource, LABEL_SNAPSHOT_REF, Labels, LazyLayerRecord, SnapshotId, SnapshotKind,
    SnapshotRecord, Usage, namespace_of,
};
pub(crate) use usage::{of_file as usage_of_file, of_tree as usage_of_tree};
