// SPDX-License-Identifier: Apache-2.0
//! The lazy layers: what the life cycle of snapshots asks through [`LazyLayers`].
//!
//! - `prepare`: decides a Prepare, by a plan for the whole image.
//! - `lowers`: merged trees and their mounts for a chain.
//! - `sweep`: takes away what no snapshot needs any more.
//! - `evict`: takes away what nobody uses, when the store is over its budget or the disk is full.
//! - `pins`: images that somebody wants to stay; `cache`: what is in the store, and why it stays.
//! - `decisions`: remembers why layers are not lazy, and which images were seen.
//!
//! The metadata store is the truth about what exists; everything here can be rebuilt from it and from
//! the files next to it, without network. No lock and no transaction is held across I/O; every wait
//! has a deadline; every task is tracked and joined by [`Lazy::stop`].

mod cache;
mod decisions;
mod evict;
mod index_fetch;
mod index_job;
mod lowers;
mod metrics;
mod pins;
mod places;
mod prepare;
mod sweep;
mod toc;
mod unmodified;
mod unpack_job;
mod usage;
mod zone_ask;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sluice_fetcher::index_artifact::FoundArtifact;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::index_job::IndexJobs;
use crate::background::Background;
use crate::boot::Boot;
use crate::chain::RunKey;
use crate::config::IndexPolicy;
use crate::disk::DiskReserve;
use crate::layers::Layers;
use crate::mounts::Mounts;
use crate::node_indexes::NodeIndexes;
use crate::plan::{Layout, LayoutLayer, Outcome, Plans};
use crate::resolve::ContentReader;
use crate::reuse::Reuse;
use crate::shelf::NodeShelf;
use crate::snapshots::{
    BlobOrigin, LABEL_SNAPSHOT_REF, LazyDecision, LazyLayerRecord, LazyLayers, MountError,
    PrepareRequest, SnapshotKind, SnapshotRecord, Usage,
};
use crate::store::{MetadataStore, StoreError};
use crate::trees::TreeFiles;
use crate::trust::Trust;
use crate::zone_indexes::ZoneIndexes;

pub use cache::{CacheError, CachedLayer, EvictTarget, Evicted};
pub use decisions::{Decision, ImageDocument, ImageLayer, decision_key};
pub use evict::Reclaimer;
pub use metrics::LazyMetrics;
pub use pins::PinDocument;
pub(crate) use sweep::Needed;

/// Begins the keys of snapshots that clients unpack layers into.
///
/// **Source** containerd, `snapshots.UnpackKeyPrefix`.
const UNPACK_KEY_PREFIX: &str = "extract-";

/// What the configuration says.
#[derive(Clone, Debug)]
pub struct LazyOptions {
    /// The root directory.
    pub root: PathBuf,
    /// Which repositories may be lazy.
    pub trust: Trust,
    /// Which indexes of blobs as they are may be used.
    pub index_use: IndexPolicy,
    /// Blobs up to this size that have no usable index are pulled whole on purpose.
    pub whole_below_bytes: u64,
    /// How long a read of missing data may wait; `None`: for ever.
    pub read_deadline: Option<Duration>,
    /// How long a mount that nobody uses stays: a container that restarts finds it.
    pub mount_grace: Duration,
    /// How long files that no snapshot needs stay. Must be longer than a Prepare takes.
    pub file_grace: Duration,
    /// Most bytes of chunks to keep; `None`: no limit.
    pub store_budget_bytes: Option<u64>,
    /// Disk that is kept free of what nobody waits for.
    pub reserve: DiskReserve,
}

/// The parts that lazy layers are made of.
#[derive(Debug)]
pub struct LazyParts {
    /// containerd's content store.
    pub content: Arc<dyn ContentReader>,
    /// Snapshots.
    pub metadata: Arc<MetadataStore>,
    /// Merged trees.
    pub trees: Arc<TreeFiles>,
    /// Layers and their sources.
    pub layers: Arc<Layers>,
    /// What this node has for others.
    pub shelf: Arc<NodeShelf>,
    /// Mounts of runs.
    pub mounts: Arc<Mounts>,
    /// Completion of images.
    pub background: Background,
    /// What containers read while they start.
    pub boot: Arc<Boot>,
    /// Files that other layers have.
    pub reuse: Reuse,
    /// Indexes that nodes made.
    pub node_indexes: Arc<NodeIndexes>,
    /// How these go from node to node.
    pub zone_indexes: Arc<ZoneIndexes>,
    /// What is counted.
    pub metrics: LazyMetrics,
}

/// The lazy layers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lazy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: LazyOptions,
    parts: LazyParts,
    plans: Plans,
    tasks: TaskTracker,
    stop: CancellationToken,
    swept: Notify,
    budget: evict::BudgetWatch,
    payers: usage::Remembered,
    index_jobs: IndexJobs,
    answers: places::Answers,
    /// Tables of contents being read, each with all that it decompresses to.
    tocs: Semaphore,
}

impl Lazy {
    /// Starts the sweeper and goes on with what was under way when the daemon stopped. Must be called
    /// on a runtime; waits for nothing.
    #[must_use]
    pub fn start(parts: LazyParts, options: LazyOptions) -> Self {
        let inner = Arc::new(Inner {
            options,
            parts,
            plans: Plans::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            swept: Notify::new(),
            budget: evict::BudgetWatch::default(),
            payers: usage::Remembered::default(),
            index_jobs: IndexJobs::default(),
            answers: places::Answers::default(),
            tocs: Semaphore::new(toc::PARALLEL),
        });
        let sweeper = Arc::clone(&inner);
        inner.spawn(async move { sweeper.sweep_until_stopped().await });
        let resumer = Arc::clone(&inner);
        inner.spawn(async move { resumer.resume().await });
        let offered = Arc::clone(&inner.parts.zone_indexes);
        inner.spawn(async move { offered.take_offered().await });
        Self(inner)
    }

    /// Ends all tasks and waits for them. Mounts stay.
    pub async fn stop(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
        self.0.parts.background.stop().await;
        self.0.parts.boot.stop().await;
        self.0.parts.reuse.stop().await;
    }

    /// The parts, for the control service.
    #[must_use]
    pub fn parts(&self) -> &LazyParts {
        &self.0.parts
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> &std::path::Path {
        &self.0.options.root
    }

    /// The origins with every port that is known of their hosts, the likeliest first; `hints` are those that the image
    /// names.
    pub async fn candidates(
        &self,
        namespace: &str,
        origins: &[BlobOrigin],
        hints: BTreeSet<u16>,
    ) -> Vec<BlobOrigin> {
        self.0.candidates(namespace, origins, hints).await
    }

    /// What becomes of a layer that no Prepare asks for yet: its index is on disk then.
    pub async fn plan_layer(
        &self,
        layer: &LayoutLayer,
        origins: &[BlobOrigin],
        artifact: Option<&FoundArtifact>,
        deadline: Instant,
    ) -> Outcome {
        let places = origins.into();
        self.0.outcome(layer, &places, artifact, deadline).await
    }

    /// Brings the indexes that other nodes made of an image that no Prepare asks for yet; then the artifact with
    /// indexes of it, if one is needed.
    pub async fn artifact_of(&self, layout: &Layout, deadline: Instant) -> Option<FoundArtifact> {
        self.0.bring_indexes(layout, deadline).await;
        self.0.artifact_of(layout, &layout.origins, deadline).await
    }

    /// Makes an index of a layer that nobody has indexed, reading all of its blob from its registry.
    ///
    /// **Shape**: a file without a name that holds the layer device; `None` when there is nothing to make, because
    /// the policy says so or another job is at it. **Cancelled** when dropped.
    ///
    /// **Errors** why there is no index, in words.
    pub async fn index_from_registry(
        &self,
        layer: &LayoutLayer,
        origins: &[BlobOrigin],
    ) -> Result<Option<std::fs::File>, String> {
        self.0.index_from_registry(layer, origins).await
    }

    /// Whether layers of this repository may be lazy.
    #[must_use]
    pub fn trusts(&self, origin: &BlobOrigin) -> bool {
        self.0.options.trust.allows(origin)
    }

    /// Most bytes of chunks to keep; `None`: no limit.
    #[must_use]
    pub fn store_budget_bytes(&self) -> Option<u64> {
        self.0.options.store_budget_bytes
    }

    /// Disk that is kept free.
    #[must_use]
    pub fn reserve(&self) -> &DiskReserve {
        &self.0.options.reserve
    }

    /// How long files that no snapshot needs stay.
    #[must_use]
    pub fn file_grace(&self) -> Duration {
        self.0.options.file_grace
    }

    /// What the snapshots need.
    pub(crate) async fn needed(&self) -> Result<Needed, StoreError> {
        self.0.blocking(|inner| inner.needed()).await
    }

    /// Takes away what nobody needs, as after a removal.
    pub(crate) async fn sweep_now(&self) {
        self.0.sweep(sweep::CLEANUP_GRACE).await;
    }

    /// How many active snapshots and views stand on each run.
    pub async fn users(&self) -> Result<std::collections::BTreeMap<RunKey, u32>, StoreError> {
        self.0.blocking(|inner| inner.users()).await
    }
}

impl Inner {
    /// Runs a task of ours until it ends or the daemon stops.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(work).await;
        });
    }

    /// Runs blocking work on a thread made for it.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> T {
        let inner = Arc::clone(self);
        match self.tasks.spawn_blocking(move || work(&inner)).await {
            Ok(value) => value,
            // Blocking tasks are not cancelled while the runtime lives, so this is a panic: go on
            // with it, the caller is a task of its own.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Starts the background jobs of containers and views that exist.
    async fn resume(self: &Arc<Self>) {
        let shown = self.blocking(|inner| inner.shown()).await;
        match shown {
            Ok(chains) => {
                chains
                    .into_iter()
                    .for_each(|chain| self.parts.background.want(lazy_layers(&chain)));
            }
            Err(error) => tracing::error!("failed to look up containers: {error}"),
        }
    }

    /// The chains that containers and views stand on.
    fn shown(&self) -> Result<Vec<Vec<SnapshotRecord>>, StoreError> {
        self.chains_below(shows_image)
    }

    /// The chains below the snapshots that are `wanted`.
    fn chains_below(
        &self,
        wanted: impl Fn(&SnapshotRecord) -> bool,
    ) -> Result<Vec<Vec<SnapshotRecord>>, StoreError> {
        let metadata = &self.parts.metadata;
        let snapshots = metadata.list(wanted)?;
        let chain = |record: &SnapshotRecord| metadata.chain(record.parent.as_deref());
        snapshots.iter().map(chain).collect()
    }
}

/// Whether the snapshot shows an image to somebody: a container, or a view of it (an image volume, an
/// image that is mounted by hand). Not a layer that is being unpacked, which names its chain ID in a
/// label or, by clients that do not ask, in its key.
fn shows_image(record: &SnapshotRecord) -> bool {
    let key = record.name.rsplit('/').next().unwrap_or_default();
    let unpacks =
        record.labels.contains_key(LABEL_SNAPSHOT_REF) || key.starts_with(UNPACK_KEY_PREFIX);
    record.kind != SnapshotKind::Committed && !unpacks
}

/// The lazy layers of a chain, lowest first.
fn lazy_layers(chain: &[SnapshotRecord]) -> Vec<LazyLayerRecord> {
    chain
        .iter()
        .rev()
        .filter_map(|record| record.layer.clone())
        .collect()
}

#[async_trait]
impl LazyLayers for Lazy {
    async fn decide(&self, request: &PrepareRequest) -> LazyDecision {
        self.0.decide(request).await
    }

    fn reused(&self, request: &PrepareRequest, existing: &SnapshotRecord) {
        self.0.reused(request, existing);
    }

    async fn lowers(
        &self,
        user: &SnapshotRecord,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<PathBuf>, MountError> {
        let lowers = self.0.lowers(chain).await?;
        if shows_image(user) {
            self.0.parts.background.want(lazy_layers(chain));
        }
        Ok(lowers)
    }

    fn released(&self, _removed: &SnapshotRecord) {
        self.0.swept.notify_one();
    }

    fn usage(&self, record: &SnapshotRecord) -> Usage {
        usage::of(&self.0, record)
    }

    fn lacks_index(&self, layer: &LazyLayerRecord) -> bool {
        !self.0.parts.layers.indexes().hold(layer.index_digest)
    }

    async fn cleanup(&self) {
        self.0.sweep(sweep::CLEANUP_GRACE).await;
    }
}

#[cfg(test)]
pub(crate) mod tests;
