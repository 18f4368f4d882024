// SPDX-License-Identifier: Apache-2.0
//! Makes indexes of layers that containerd downloads the ordinary way, so that the next pull of the image is lazy,
//! here and on other nodes, without any conversion. The homes of the blob are told of it ([`crate::zone_indexes`]).
//!
//! A job begins when a layer is refused for want of an index. It waits until containerd has the blob, which is while the
//! layer is being unpacked, and reads it from containerd's content store: nothing is downloaded twice. Nothing waits for
//! a job. One runs at a time, with a small claim to the processor; containerd's own unpacking goes first.
//!
//! A prewarm, for which nobody downloads anything, has a job read the blob from its registry instead, and gets the
//! layer's bytes besides ([`Inner::index_from_registry`]): they are not fetched a second time.
//!
//! **Bounds** [`QUEUE`] layers wait; what comes then is left out, and comes again with the next pull.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::indexer::{ChunkBytes, IndexOptions, IndexedLayer, LayerIndexer};
use sluice_fetcher::source::{Priority, ReadContext, SourceError};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::Inner;
use crate::config::IndexUse;
use crate::plan::LayoutLayer;
use crate::snapshots::BlobOrigin;
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
/// How long reading a blob from its registry may take.
const REGISTRY_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Parts that are asked of a registry at a time.
const REGISTRY_READS: usize = 3;
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
    #[error("read it from its registry: {0}")]
    Registry(#[from] SourceError),
    #[error("{0}")]
    Untrusted(String),
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
            let made = inner.make_index(&namespace, blob, diff_id).await;
            // Its error was told.
            let _ = inner.settle_index(blob, begun, made).await;
            drop(under_way);
        });
    }

    /// Makes an index of a layer that nobody has indexed, reading all of its blob from these places, and keeps it.
    ///
    /// **Shape**: a file without a name that holds the layer device; `None` when there is nothing to make, because
    /// the policy says so or another job is at it. It may take half an hour; **cancelled** when dropped.
    ///
    /// **Errors** why there is no index, in words.
    pub(super) async fn index_from_registry(
        self: &Arc<Self>,
        layer: &LayoutLayer,
        origins: &[BlobOrigin],
    ) -> Result<Option<File>, String> {
        let Some((blob, blob_bytes)) = layer.blob() else {
            return Ok(None);
        };
        if self.options.index_use.node == IndexUse::Off || !self.index_jobs.begin(blob) {
            return Ok(None);
        }
        let _under_way = UnderWay(Arc::clone(self), blob);
        let begun = Instant::now();
        let made = self.read_and_index(layer.diff_id, blob, blob_bytes, origins);
        let (device, made) = match made.await {
            Ok((device, layer)) => {
                // A pull names the host alone, and has nothing else to ask of it.
                if let Some(place) = origins.first() {
                    self.found_at(place);
                }
                (Some(device), Ok(layer))
            }
            Err(failure) => (None, Err(failure)),
        };
        self.settle_index(blob, begun, made).await?;
        Ok(device)
    }

    /// Tells how a job ended, and whom it concerns.
    async fn settle_index(
        self: &Arc<Self>,
        blob: BlobDigest,
        begun: Instant,
        made: Result<IndexedLayer, Failure>,
    ) -> Result<(), String> {
        let error = match made {
            Ok(layer) => {
                let (format, took) = (layer.format, begun.elapsed());
                tracing::info!(%blob, ?format, ?took, "indexed a layer: it is lazy from its next pull on");
                self.parts.metrics.indexed("made");
                self.plans.forget_refused(blob);
                // Its last step: the others may have it now.
                self.parts.zone_indexes.tell(blob).await;
                return Ok(());
            }
            Err(error) => error,
        };
        let described = error.to_string();
        match error {
            Failure::Unfit(reason) => {
                tracing::info!(%blob, "a layer cannot have an index: {reason}");
                self.parts.metrics.indexed("unfit");
                self.index_jobs.is_unfit(blob, reason);
            }
            error @ (Failure::Digest(_) | Failure::DiffId { .. }) => {
                tracing::error!(%blob, "a layer is not what its image says: {error}");
                self.parts.metrics.indexed("lies");
            }
            error => {
                tracing::warn!(%blob, "failed to index a layer: {error}");
                self.parts.metrics.indexed("failed");
            }
        }
        Err(described)
    }

    async fn make_index(
        self: &Arc<Self>,
        namespace: &str,
        blob: BlobDigest,
        diff_id: DiffId,
    ) -> Result<IndexedLayer, Failure> {
        let blob_bytes = self.downloaded(namespace, blob).await?;
        let (parts, taken) = mpsc::channel(PARTS_AHEAD);
        let read = self.read_parts(namespace, blob, blob_bytes, parts);
        let (layer, _) = self.index_of(blob, diff_id, read, taken, None).await?;
        Ok(layer)
    }

    async fn read_and_index(
        self: &Arc<Self>,
        diff_id: DiffId,
        blob: BlobDigest,
        blob_bytes: u64,
        origins: &[BlobOrigin],
    ) -> Result<(File, IndexedLayer), Failure> {
        let places = self.trusted_sources(blob, origins).await;
        let places = places.map_err(|refusal| Failure::Untrusted(refusal.reason))?;
        let device = self.blocking(|inner| crate::durable::unnamed(&inner.options.root));
        let device = device.await?;
        let (parts, taken) = mpsc::channel(PARTS_AHEAD);
        let read = self.ask_parts(blob, blob_bytes, &places, parts);
        let made = self.index_of(blob, diff_id, read, taken, Some(device));
        let (layer, device) = made.await?;
        Ok((device.ok_or(Failure::Stopping)?, layer))
    }

    /// Indexes what `read` gives to `taken`, checks it against what it should be, and keeps the index. The device's
    /// bytes are written to `device`, which comes back.
    async fn index_of(
        self: &Arc<Self>,
        blob: BlobDigest,
        diff_id: DiffId,
        read: impl Future<Output = Result<(), Failure>>,
        taken: mpsc::Receiver<Bytes>,
        device: Option<File>,
    ) -> Result<(IndexedLayer, Option<File>), Failure> {
        let turn = self.index_jobs.turn.acquire().await;
        let _turn = turn.map_err(|_| Failure::Stopping)?;
        let (done, indexed) = oneshot::channel();
        // A thread of its own: what it gives up it need not take back.
        let thread = std::thread::Builder::new().name("index".to_owned());
        thread.spawn(move || {
            // Whoever waits for containerd's unpacking comes first.
            process::yield_to_others();
            let _nobody_waits = done.send(index(taken, device));
        })?;
        let read = read.await;
        let indexed = indexed.await.map_err(|_| Failure::Stopping)?;
        read?;
        let (layer, device) = indexed?;
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
                Ok((layer, device))
            }
            Err(reason) => Err(Failure::Unfit(reason.clone())),
        });
        kept.await
    }

    /// Asks a registry for the blob part by part. Ends early, without an error, when nobody takes the parts.
    async fn ask_parts(
        &self,
        blob: BlobDigest,
        blob_bytes: u64,
        places: &[BlobOrigin],
        parts: mpsc::Sender<Bytes>,
    ) -> Result<(), Failure> {
        let source = self.parts.layers.source(blob, blob_bytes, places);
        let context = ReadContext::new(Priority::Background).with_timeout(REGISTRY_LIMIT);
        let starts = (0..blob_bytes).step_by(PART_BYTES);
        let reads = futures::stream::iter(starts).map(|start| {
            let (source, context) = (&source, &context);
            async move {
                let length = (blob_bytes - start).min(PART_BYTES as u64);
                let extent = Extent::from_length(start, length).unwrap_or(Extent::empty());
                source.open(context, extent).await?.collect(length).await
            }
        });
        let mut reads = reads.buffered(REGISTRY_READS);
        while let Some(part) = reads.try_next().await? {
            if parts.send(part).await.is_err() {
                break;
            }
        }
        Ok(())
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

/// Indexes what comes, and writes the device's bytes to a file where one is given. **Blocks**.
///
/// **Errors** why a blob cannot have an index, or that the disk takes no more.
fn index(
    mut parts: mpsc::Receiver<Bytes>,
    mut device: Option<File>,
) -> Result<(IndexedLayer, Option<File>), Failure> {
    let unfit = |error: sluice_blockindex::indexer::IndexerError| Failure::Unfit(error.to_string());
    let mut written = Ok(());
    let mut keep = |chunk: ChunkBytes<'_>| {
        if let (Some(device), Ok(())) = (&mut device, &written) {
            // Chunks come in device order, without gaps.
            written = device.write_all(chunk.bytes);
        }
    };
    let mut indexer = LayerIndexer::new(IndexOptions::default()).map_err(unfit)?;
    while let Some(part) = parts.blocking_recv() {
        indexer.push(&part, &mut keep).map_err(unfit)?;
    }
    let layer = indexer.finish(&mut keep).map_err(unfit)?;
    written?;
    Ok((layer, device))
}
