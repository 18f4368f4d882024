// SPDX-License-Identifier: Apache-2.0
//! The seam between the life cycle of snapshots and the lazy layers.
//!
//! The life cycle owns the metadata store and the directories of ordinary snapshots; it knows
//! nothing of registries, indexes or mounts. What it asks of the lazy side is this trait.

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use sluice_blockindex::digest::ChainId;
use tokio::time::Instant;

use super::record::{Labels, LazyLayerRecord, SnapshotRecord, Usage};

/// A Prepare that carries `containerd.io/snapshot.ref`.
#[derive(Debug, Clone)]
pub struct PrepareRequest {
    /// Backend key as containerd gave it, `<namespace>/<n>/<key>`.
    pub key: String,
    /// The namespace in it; `None` if containerd's metadata plugin did not make the key.
    pub namespace: Option<String>,
    /// Backend name of the parent, exactly as given.
    pub parent: Option<String>,
    /// The parent and all below it, nearest parent first; empty for a bottom layer.
    pub chain: Vec<SnapshotRecord>,
    /// Chain ID of the parent, if known.
    pub parent_chain: Option<ChainId>,
    /// What the unpacker is about to make: the value of `containerd.io/snapshot.ref`.
    pub chain_id: ChainId,
    /// All labels of the request.
    pub labels: Labels,
    /// When the answer is no longer waited for.
    pub deadline: Instant,
}

/// What becomes of a Prepare that carries `containerd.io/snapshot.ref`.
#[derive(Debug)]
pub enum LazyDecision {
    /// Commit it at once; the layer's index is durable on disk.
    Lazy(LazyLayerRecord),
    /// It cannot be lazy, but containerd need not download it: unpack it from this source, then
    /// commit it as an ordinary snapshot.
    Unpack(Box<dyn UnpackSource>),
    /// containerd shall download and unpack it.
    Ordinary {
        /// Why, for `sluice why`, the log and the metric.
        reason: String,
    },
}

/// Where a layer is unpacked to.
#[derive(Debug, Clone)]
pub struct UnpackTarget {
    /// Empty directory that becomes an overlayfs lower: whiteouts as character devices 0:0,
    /// opaque directories by `trusted.overlay.opaque`. The caller sets the owner of the directory
    /// itself to that of its parent's root before the call.
    pub directory: PathBuf,
    /// The parent and all below it, nearest parent first.
    pub chain: Vec<SnapshotRecord>,
}

/// A layer that can be fetched, verified against its diff ID and unpacked.
#[async_trait]
pub trait UnpackSource: Send + Sync + Debug {
    /// Fills the directory and returns when all is written and verified.
    ///
    /// **Errors**: any: the directory is then thrown away and the Prepare becomes ordinary.
    /// **Cancel**: dropped at the deadline; it may still write for a moment, into a directory that
    /// is moved away.
    async fn unpack(self: Box<Self>, target: &UnpackTarget) -> Result<(), UnpackError>;
}

/// Why an unpack failed.
#[derive(Debug, thiserror::Error)]
#[error("unpack layer: {0}")]
pub struct UnpackError(#[from] pub Box<dyn std::error::Error + Send + Sync>);

/// Why the lower directories of a chain cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The chain needs something that is not on disk; it must be pulled again.
    #[error("lazy layer {chain_id} cannot be mounted: {reason}")]
    Unusable {
        /// The chain that was to be mounted.
        chain_id: ChainId,
        /// What is missing or wrong.
        reason: String,
    },
    /// Nothing is wrong with the chain; the same call may work later.
    #[error("mount of lazy layer {chain_id} is not possible now: {reason}")]
    Unavailable {
        /// The chain that was to be mounted.
        chain_id: ChainId,
        /// What stands in the way.
        reason: String,
    },
    /// The operating system refused.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, in the present tense.
        action: String,
        /// What it answered.
        #[source]
        source: io::Error,
    },
}

/// The lazy layers, as the life cycle of snapshots sees them.
///
/// **Locks**: none is held and no metadata transaction is open in any call.
#[async_trait]
pub trait LazyLayers: Send + Sync + Debug + 'static {
    /// Decides a Prepare that carries `containerd.io/snapshot.ref`, for which no committed
    /// snapshot exists yet, or one whose index is lost.
    ///
    /// When it returns [`LazyDecision::Lazy`], all that [`LazyLayers::lowers`] will need is
    /// durable on disk. It never fails: what cannot be had makes the layer ordinary.
    /// **Cancel**: the future is dropped at `request.deadline`; work that shall go on (the indexes
    /// of the other layers) belongs to tasks of its own.
    async fn decide(&self, request: &PrepareRequest) -> LazyDecision;

    /// Another Prepare was answered by a snapshot that exists: its image may name further
    /// repositories for the same blob. Returns at once.
    fn reused(&self, request: &PrepareRequest, existing: &SnapshotRecord);

    /// Lower directories for a chain that has at least one lazy layer, highest first; mounts the
    /// merged runs that are not mounted. Ordinary layers are `snapshots/<id>/fs`.
    ///
    /// Uses durable inputs only, never the network, and may be called for a chain that is mounted.
    /// `user` stands in the metadata store before the call and until it is removed: it is what
    /// keeps the mounts in use.
    /// **Shape**: `chain` nearest parent first, never empty; the result has at least one path.
    /// **Cancel**: not cancelled.
    async fn lowers(
        &self,
        user: &SnapshotRecord,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<PathBuf>, MountError>;

    /// A snapshot has just been removed from the metadata store: an active one or a view frees
    /// its use of mounts, a committed lazy one its layer. Returns at once; the work is done later.
    fn released(&self, removed: &SnapshotRecord);

    /// What a lazy snapshot holds of this node's disk; what several have, one of them is charged for. Blocks
    /// shortly: no network, no mount.
    fn usage(&self, record: &SnapshotRecord) -> Usage;

    /// Whether the layer's index is not on disk, which a mount after a restart needs. What is there
    /// stays for a while. Blocks shortly.
    fn lacks_index(&self, layer: &LazyLayerRecord) -> bool;

    /// Unmounts and deletes what nobody uses any more, and returns when that is done. Called from
    /// containerd's Cleanup.
    async fn cleanup(&self);
}
