// SPDX-License-Identifier: Apache-2.0
//! Makes indexes of layers that containerd downloads the ordinary way, so that the next pull of the image is lazy,
//! here and on other nodes, without any conversion. The homes of the blob are told of it ([`crate::zone_indexes`]).
//!
//! A job begins when a layer is refused for want of an index. It waits until containerd has the blob, which is while the
//! layer is being unpacked, and reads it from containerd's content store: nothing is downloaded twice. Nothing waits for
//! a job. One runs at a time, with a small claim to the processor; containerd's own unpacking goes first.
//!
//! **Bounds** [`QUEUE`] layers wait; what comes then is left out, and comes again with the next pull.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::indexer::{IndexOptions, IndexedLayer, LayerIndexer};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::Inner;
use crate::plan::LayoutLayer;
use crate::sys::process;

/// Layers that wait for their blob or their turn: those of some images.
const QUEUE: usize = 512;
/// How long a download by containerd may take.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(30 * 60);
/// How often it is asked whether the blob is there.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Bytes of one read from containerd.
const PART_BYTES: usize = 4 << 20;
/// Parts that are read ahead of the indexer.
const PARTS_AHEAD: usize = 2;
/// Layers that cannot have an index, of which it is remembered why.
const UNFIT: usize = 4096;

/// What is under way, and what came to nothing.
#[derive(Debug)]
pub(super) struct IndexJobs {
    turn: Semaphore,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    under_way: BTreeSet<BlobDigest>,
    unfit: BTreeMap<BlobDigest, String>,
}

impl Default for IndexJobs {
    fn default() -> Self {
        Self {
            turn: Semaphore::new(1),
            table: Mutex::default(),
        }
    }
}

impl IndexJobs {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Every critical section leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a blob cannot have an index, where that is known.
    pub(super) fn unfit(&self, blob: BlobDigest) -> Option<String> {
        self.table().unfit.get(&blob).cloned()
    }

    /// Whether a job for the blob is to begin.
    fn begin(&self, blob: BlobDigest) -> bool {
        let mut table = self.table();
        if table.under_way.len() >= QUEUE || table.unfit.contains_key(&blob) {
            return false;
        }
        table.under_way.insert(blob)
    }

    fn is_unfit(&self, blob: BlobDigest, reason: String) {
        let mut table = self.table();
        if table.unfit.len() >= UNFIT {
            table.unfit.pop_first();
        }
        table.unfit.insert(blob, reason);
    }
}

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("containerd does not have it within {DOWNLOAD_LIMIT:?}")]
    NotDownloaded,
    #[error("containerd dropped it before it was read")]
    Dropped,
    #[error(transparent)]
    Content(#[from] crate::resolve::ContentError),
    #[error("its bytes have digest {0}")]
    Digest(BlobDigest),
    #[error("it holds {actual}, the image config says {expected}")]
    DiffId { expected: DiffId, actual: DiffId },
    #[error("cannot have an index: {0}")]
    Unfit(String),
    #[error("keep its index: {0}")]
    Disk(#[from] std::io::Error),
    #[error("the daemon stops")]
    Stopping,
}

/// Takes a blob from what is under way when it is dropped.
struct UnderWay(Arc<Inner>, BlobDigest);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.index_jobs.table().under_way.remove(&self.1);
    }
}

impl Inner {
    /// Makes an index of a layer as soon as containerd has downloaded it.
    pub(super) fn index_when_there(self: &Arc<Self>, namespace: &str, layer: &LayoutLayer) {
        let Some((blob, _)) = layer.blob() else {
            return;
        };
        if self.has_usable_index(blob) || !self.index_jobs.begin(blob) {
            return;
        }
        let under_way = UnderWay(Arc::clone(self), blob);
        let (inner, namespace, diff_id) = (Arc::clone(self), namespace.to_owned(), layer.diff_id);
        self.spawn(async move {
            let begun = Instant::now();
            match inner.make_index(&namespace, blob, diff_id).await {
                Ok(layer) => {
                    let took = begun.elapsed();
                    let format = layer.format;
                    tracing::info!(%blob, ?format, ?took, "indexed a layer: it is lazy from its next pull on");
                    inner.parts.metrics.indexed("made");
                    inner.plans.forget_refused(blob);
                    // Its last step: the others may have it now.
                    inner.parts.zone_indexes.tell(blob).await;
                }
                Err(Failure::Unfit(reason)) => {
                    tracing::info!(%blob, "a layer cannot have an index: {reason}");
                    inner.parts.metrics.indexed("unfit");
                    inner.index_jobs.is_unfit(blob, reason);
                }
                Err(error @ (Failure::Digest(_) | Failure::DiffId { .. })) => {
                    tracing::error!(%blob, "a layer is not what its image says: {error}");
                    inner.parts.metrics.indexed("lies");
                }
                Err(error) => {
                    tracing::warn!(%blob, "failed to index a layer: {error}");
                    inner.parts.metrics.indexed("failed");
                }
            }
            drop(under_way);
        });
    }

    async fn make_index(
        self: &Arc<Self>,
        namespace: &str,
        blob: BlobDigest,
        diff_id: DiffId,
    ) -> Result<IndexedLayer, Failure> {
        let blob_bytes = self.downloaded(namespace, blob).await?;
        let turn = self.index_jobs.turn.acquire().await;
        let _turn = turn.map_err(|_| Failure::Stopping)?;
        let (parts, taken) = mpsc::channel(PARTS_AHEAD);
        let (done, indexed) = oneshot::channel();
        // A thread of its own: what it gives up it need not take back.
        let thread = std::thread::Builder::new().name("index".to_owned());
        thread.spawn(move || {
            // Whoever waits for containerd's unpacking comes first.
            process::yield_to_others();
            let _nobody_waits = done.send(index(taken));
        })?;
        let read = self.read_parts(namespace, blob, blob_bytes, parts).await;
        let indexed = indexed.await.map_err(|_| Failure::Stopping)?;
        read?;
        let layer = indexed.map_err(Failure::Unfit)?;
        if layer.blob != blob {
            return Err(Failure::Digest(layer.blob));
        }
        let actual = layer.diff_id;
        if actual != diff_id {
            let expected = diff_id;
            return Err(Failure::DiffId { expected, actual });
        }
        let kept = self.blocking(move |inner| match &layer.index {
            Ok(index) => {
                let indexes = &inner.parts.node_indexes;
                indexes.keep(blob, &index.payload, &index.windows)?;
                Ok(layer)
            }
            Err(reason) => Err(Failure::Unfit(reason.clone())),
        });
        kept.await
    }

    /// Waits until containerd has the whole blob; gives its size.
    async fn downloaded(&self, namespace: &str, blob: BlobDigest) -> Result<u64, Failure> {
        let (digest, end) = (blob.to_string(), Instant::now() + DOWNLOAD_LIMIT);
        while Instant::now() < end {
            match self.parts.content.info(namespace, &digest).await {
                // A content has a name when it is complete.
                Ok(Some(info)) => return Ok(info.size_bytes),
                Ok(None) => {}
                Err(error) => tracing::debug!(%blob, "look for a blob: {error}"),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Err(Failure::NotDownloaded)
    }

    /// Reads the blob part by part. Ends early, without an error, when nobody takes the parts.
    async fn read_parts(
        &self,
        namespace: &str,
        blob: BlobDigest,
        blob_bytes: u64,
        parts: mpsc::Sender<Bytes>,
    ) -> Result<(), Failure> {
        let (digest, mut offset) = (blob.to_string(), 0);
        while offset < blob_bytes {
            let part = self
                .parts
                .content
                .read_part(namespace, &digest, offset, PART_BYTES);
            let part = part.await?.filter(|part| !part.is_empty());
            let part = part.ok_or(Failure::Dropped)?;
            offset += part.len() as u64;
            if parts.send(part).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Indexes what comes. **Blocks**.
///
/// **Errors** why a blob cannot have an index.
fn index(mut parts: mpsc::Receiver<Bytes>) -> Result<IndexedLayer, String> {
    let mut indexer = LayerIndexer::new(IndexOptions::default()).map_err(|it| it.to_string())?;
    while let Some(part) = parts.blocking_recv() {
        indexer
            .push(&part, &mut |_| {})
            .map_err(|error| error.to_string())?;
    }
    indexer
        .finish(&mut |_| {})
        .map_err(|error| error.to_string())
}
