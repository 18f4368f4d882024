// SPDX-License-Identifier: Apache-2.0
//! Learned boot lists: what containers of an image read while they start, loaded before the next one
//! asks for it.
//!
//! ```text
//!   mount made ──> worker records first reads ──> collect ──> document (merge of the last starts) ──> the
//!        │                                                        │ also: attached to the image,      zone
//!        │                                                        v received from other nodes  <───────┘
//!   pull planned, or mount made ──────────────────────────────> load (one burst at boot priority)
//!                                                                 │
//!              which of the loaded chunks were read? <── collect <┘  too few: off
//! ```
//!
//! Lists are kept per run of layers ([`BootKey`]): that is what a start knows without network or content
//! store, what a mount shows, and what stays the same when an image is copied, tagged anew or annotated;
//! images that differ in their config alone share one, and what they read apart falls out of the merge.
//!
//! A list is a hint. Everything that comes from outside is bounded and checked; whatever is wrong with
//! a list costs its use and a log line, never a pull, a mount or a read. All writes come after the
//! answer to containerd; nothing here is waited for.
//!
//! **Locks** `state` is locked for map operations only. **Crash** loses recordings under way.

mod ask;
mod collect;
mod document;
mod load;
mod merge;
mod metrics;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::boot::{BootKey, BootList, BootListError, BootPart};
use sluice_blockindex::digest::IndexDigest;
use sluice_fetcher::boot::BootRead;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::layers::Layers;
use crate::mount::ImageMount;
use crate::snapshots::LazyLayerRecord;
use crate::store::{DocumentTable, MetadataStore, StoreError};

pub use ask::{BootPeers, Given};
pub use document::{BootDocument, Off, Origin};
pub use load::Listed;
pub use metrics::BootMetrics;

/// The most lists of this node. A list is some kilobytes, and an image that was not started for so many
/// others is started as if it were new.
const DOCUMENTS_MAX: u64 = 512;
/// Loaded lists whose use is not known yet: images that were pulled and not started.
const LOADS_MAX: usize = 64;
/// Layers whose part of an attached list is held until their run is known; each is some 10 kB at most.
const PARTS_MAX: usize = 1024;
/// What the configuration says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootOptions {
    /// Whether lists are learnt and loaded.
    pub enabled: bool,
    /// How long first reads are recorded, from the first on.
    pub window: Duration,
    /// Whether whole pages of devices are asked for: then a list means also what shares a page with its chunks.
    pub whole_pages: bool,
}

/// Why a list of another node is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// It is not well-formed.
    #[error(transparent)]
    List(#[from] BootListError),
    /// It is of other layers than the key says.
    #[error("the list is of the layers {actual}, asked for was {expected}")]
    Key {
        /// As asked for.
        expected: BootKey,
        /// Of the list.
        actual: BootKey,
    },
    /// It names nothing.
    #[error("the list is empty")]
    Empty,
    /// This node does not use lists, or not that one.
    #[error("not wanted: {0}")]
    Unwanted(String),
    /// The metadata store failed.
    #[error("store list: {0}")]
    Metadata(#[from] StoreError),
    /// The daemon stops.
    #[error("stopping")]
    Stopping,
}

/// What there is to say about a run's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSummary {
    /// How many chunks it has.
    pub chunks: usize,
    /// Where it is from; `None`: there is none.
    pub origin: Option<Origin>,
    /// How many starts it was learnt from.
    pub starts: usize,
    /// Why it is not used.
    pub off: Option<String>,
    /// Compressed bytes that the last uses loaded.
    pub loaded_bytes: u64,
    /// Of these, of chunks that were then read.
    pub read_bytes: u64,
}

/// What was learnt on this node, for `sluice optimize`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    /// The list of this node's own starts; `None`: none was recorded yet.
    pub list: Option<BootList>,
    /// How many starts these are.
    pub starts: usize,
    /// Why the list is not used.
    pub off: Option<String>,
}

/// The boot lists of this node.
#[derive(Debug)]
pub struct Boot {
    options: BootOptions,
    layers: Arc<Layers>,
    metadata: Arc<MetadataStore>,
    backend: Arc<dyn ImageMount>,
    metrics: BootMetrics,
    peers: OnceLock<Arc<dyn BootPeers>>,
    state: Mutex<State>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    loads: HashMap<BootKey, Load>,
    parts: HashMap<IndexDigest, BootPart>,
    asks: HashMap<BootKey, ask::Asking>,
}

/// A list that was loaded, until a start shows what it was good for.
#[derive(Debug)]
struct Load {
    claimed: BTreeSet<BootRead>,
    running: bool,
    started: Instant,
}

/// The key of a run's list.
#[must_use]
pub fn boot_key(layers: &[LazyLayerRecord]) -> BootKey {
    BootKey::of_layers(&indexes(layers))
}

fn indexes(layers: &[LazyLayerRecord]) -> Vec<IndexDigest> {
    layers.iter().map(|layer| layer.index_digest).collect()
}

impl Boot {
    /// Over these parts; `backend` says what was read first.
    #[must_use]
    pub fn new(
        options: BootOptions,
        layers: Arc<Layers>,
        metadata: Arc<MetadataStore>,
        backend: Arc<dyn ImageMount>,
        metrics: BootMetrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            options,
            layers,
            metadata,
            backend,
            metrics,
            peers: OnceLock::new(),
            state: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the maps whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long mounts are to record first reads; `None`: not at all.
    #[must_use]
    pub fn recorded(&self) -> Option<Duration> {
        self.options.enabled.then_some(self.options.window)
    }

    /// Where lists may be had from; a second call changes nothing.
    pub fn set_peers(&self, peers: Arc<dyn BootPeers>) {
        let _set = self.peers.set(peers);
    }

    /// Ends what runs and waits for it.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(work).await;
        });
    }

    /// Runs a short transaction on a thread that may block.
    async fn transact<T: Send + 'static>(
        &self,
        work: impl FnOnce(&MetadataStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Option<Result<T, StoreError>> {
        let metadata = Arc::clone(&self.metadata);
        let done = self.tasks.spawn_blocking(move || work(&metadata)).await;
        done.ok()
    }

    /// Holds the part of an attached list that a layer's annotations carry, for when its run is known.
    pub fn note_attached(&self, annotations: &LayerAnnotations) {
        if annotations.boot.is_empty() || !self.options.enabled {
            return;
        }
        let index = annotations.index_digest;
        let part = match BootPart::from_texts(&annotations.boot) {
            Ok(part) if part.index() == index => part,
            Ok(part) => {
                let other = part.index();
                tracing::info!(%index, "ignore the attached boot list of a layer: it is of index {other}");
                self.metrics.ignored("index");
                return;
            }
            Err(error) => {
                tracing::info!(%index, "ignore the attached boot list of a layer: {error}");
                self.metrics.ignored("malformed");
                return;
            }
        };
        let mut state = self.state();
        if state.parts.len() >= PARTS_MAX && !state.parts.contains_key(&index) {
            // Whatever goes, its image starts as if nothing were attached.
            let some = state.parts.keys().next().copied();
            some.map(|some| state.parts.remove(&some));
        }
        state.parts.insert(index, part);
    }

    /// The list that is attached to the layers of a run, as far as annotations were seen.
    fn attached(&self, layers: &[LazyLayerRecord]) -> Option<BootList> {
        let indexes = indexes(layers);
        let parts: Vec<BootPart> = {
            let state = self.state();
            let parts = indexes.iter().filter_map(|index| state.parts.get(index));
            parts.cloned().collect()
        };
        match BootList::of_parts(indexes, &parts) {
            Ok(list) if list.chunks().is_empty() => None,
            Ok(list) => Some(list),
            Err(error) => {
                tracing::info!("ignore an attached boot list: {error}");
                self.metrics.ignored("malformed");
                None
            }
        }
    }

    /// What is stored of a list. A row that cannot be read is one that nobody has.
    async fn document(&self, key: BootKey) -> Option<BootDocument> {
        let read = self.transact(move |metadata| {
            metadata.document(DocumentTable::BootLists, &key.to_string())
        });
        match read.await? {
            Ok(document) => document,
            Err(error) => {
                tracing::warn!(%key, "failed to read a boot list: {error}");
                None
            }
        }
    }

    /// Changes what is stored of a list, and gives it back.
    async fn change(
        &self,
        key: BootKey,
        indexes: Vec<IndexDigest>,
        change: impl FnOnce(&mut BootDocument) + Send + 'static,
    ) -> Result<BootDocument, OfferError> {
        let changed = self.transact(move |metadata| {
            let key = key.to_string();
            let table = DocumentTable::BootLists;
            if matches!(
                metadata.document::<BootDocument>(table, &key),
                Err(StoreError::Corrupt { .. })
            ) {
                tracing::warn!(key, "drop a boot list that cannot be read");
                metadata.remove_document(table, &key)?;
            }
            let mut changed = None;
            metadata.change_document(table, &key, |document: Option<BootDocument>| {
                let mut document = document.unwrap_or_else(|| BootDocument::new(&indexes));
                change(&mut document);
                changed = Some(document.clone());
                Some(document)
            })?;
            Ok(changed)
        });
        changed
            .await
            .ok_or(OfferError::Stopping)??
            .ok_or(OfferError::Stopping)
    }

    /// What there is to say about the list of a run.
    pub async fn summary(&self, layers: &[LazyLayerRecord]) -> BootSummary {
        let document = self.document(boot_key(layers)).await;
        let mut summary = document.map_or_else(BootSummary::none, |document| document.summary());
        if !self.options.enabled {
            summary.off = Some("[boot] enabled is false".to_owned());
        }
        summary
    }

    /// What was learnt on this node about a run.
    pub async fn learned(&self, key: BootKey) -> Learned {
        let document = self.document(key).await;
        let off = document.as_ref().and_then(|document| document.off.clone());
        Learned {
            starts: document.as_ref().map_or(0, BootDocument::starts),
            list: document.and_then(|document| document.learned()),
            off: off.map(|off| off.reason),
        }
    }

    /// Forgets lists that were not used for longest, if there are too many. Blocks.
    pub(crate) fn sweep(metadata: &MetadataStore) -> Result<(), StoreError> {
        Self::keep(metadata, DOCUMENTS_MAX)
    }

    /// Makes room for a list that is not among those of this node, if there is none. Blocks.
    fn make_room_for(metadata: &MetadataStore, key: BootKey) -> Result<(), StoreError> {
        let table = DocumentTable::BootLists;
        let known = metadata.document::<BootDocument>(table, &key.to_string());
        match known {
            Ok(None) => Self::keep(metadata, DOCUMENTS_MAX - 1),
            // One that cannot be read is replaced where it stands.
            Ok(Some(_)) | Err(StoreError::Corrupt { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn keep(metadata: &MetadataStore, most: u64) -> Result<(), StoreError> {
        let table = DocumentTable::BootLists;
        let count = metadata.count_documents(table)?;
        let Ok(surplus) = usize::try_from(count.saturating_sub(most)) else {
            return Ok(());
        };
        if surplus == 0 {
            return Ok(());
        }
        let mut all = metadata.documents::<BootDocument>(table)?;
        // What others offered must not push out what was learnt here.
        all.sort_by_key(|(_, document)| (document.starts() > 0, document.at));
        for (key, _) in all.into_iter().take(surplus) {
            metadata.remove_document(table, &key)?;
        }
        Ok(())
    }
}

impl BootSummary {
    fn none() -> Self {
        Self {
            chunks: 0,
            origin: None,
            starts: 0,
            off: None,
            loaded_bytes: 0,
            read_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests;
