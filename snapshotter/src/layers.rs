// SPDX-License-Identifier: Apache-2.0
//! The layers of this node as the fetcher knows them: opened when first wanted, from durable files.
//!
//! A layer is opened by its metadata record: the index is mapped, the device opened, the sources are
//! the repositories of the record. No network. Repositories that become known later join the same
//! [`OriginSet`], so a fetch that runs already tries them too.
//! Implements the shim's [`FillService`]: a fill for a layer that nobody has opened since the daemon
//! started finds it in the metadata store. A daemon that stops answers no fill any more: its readers
//! go on waiting and are asked for again by the shim when the next daemon is there, as after a crash.
//!
//! **Locks** the table of origin sets is locked for map operations only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use sluice_blockindex::chunkmap::DeviceForm;
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::{RegistryClient, Repository};
use sluice_fetcher::scheduler::{Fetcher, FillError, Filled, LayerHandle, LayerSpec};
use sluice_fetcher::source::{
    BlobSource, FileSource, OriginSet, Priority, RegistryBlobSource, RetryPolicy,
};
use sluice_fetcher::store::{DeviceKey, StoreError as ChunkStoreError, Witnesses};
use tokio_util::sync::CancellationToken;

use crate::indexes::{IndexFiles, LayerIndex, LayerIndexError};
use crate::mount::errno::FillErrno;
use crate::shim::client::{FillRequest, FillService};
use crate::snapshots::{BlobOrigin, IndexSource, LazyLayerRecord};
use crate::store::{MetadataStore, StoreError};
use crate::tree_check::TreeCheck;
use crate::zone_indexes::ZoneIndexes;

/// Why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenLayerError {
    /// Its index file is gone: it must be pulled again.
    #[error("the index file of layer {0} is missing")]
    NoIndex(DeviceKey),
    /// Its index file cannot be used.
    #[error("open index of layer {key}: {source}")]
    Index {
        /// The layer.
        key: DeviceKey,
        /// What is wrong.
        source: LayerIndexError,
    },
    /// Its device cannot be opened.
    #[error("open device of layer {key}: {source}")]
    Device {
        /// The layer.
        key: DeviceKey,
        /// What is wrong.
        source: ChunkStoreError,
    },
    /// The metadata store failed.
    #[error("look up layer: {0}")]
    Metadata(#[from] StoreError),
    /// The daemon stops.
    #[error("stopping")]
    Stopping,
}

/// The name of a layer's device.
#[must_use]
pub fn device_key(record: &LazyLayerRecord) -> DeviceKey {
    DeviceKey {
        diff_id: record.diff_id,
        index: record.index_digest,
    }
}

/// Opens layers and keeps their sources.
#[derive(Debug)]
pub struct Layers {
    fetcher: Fetcher,
    client: RegistryClient,
    retry: RetryPolicy,
    indexes: Arc<IndexFiles>,
    metadata: Arc<MetadataStore>,
    origins: Mutex<HashMap<DeviceKey, OriginSet>>,
    /// Who hears of indexes that were forged; set once.
    zone_indexes: OnceLock<Arc<ZoneIndexes>>,
    /// Cancelled when fills are left to the next daemon.
    leaving: CancellationToken,
}

/// The registry client's form of origins; what is no valid name is left out.
fn places(origins: &[BlobOrigin]) -> impl Iterator<Item = Repository> {
    origins.iter().filter_map(|origin| {
        Repository::new(&origin.host, &origin.repository)
            .inspect_err(|error| tracing::debug!(%origin, "pass over a repository: {error}"))
            .ok()
    })
}

impl Layers {
    /// Over these parts.
    #[must_use]
    pub fn new(
        fetcher: Fetcher,
        client: RegistryClient,
        retry: RetryPolicy,
        indexes: Arc<IndexFiles>,
        metadata: Arc<MetadataStore>,
    ) -> Self {
        Self {
            fetcher,
            client,
            retry,
            indexes,
            metadata,
            origins: Mutex::default(),
            zone_indexes: OnceLock::new(),
            leaving: CancellationToken::new(),
        }
    }

    /// From now on it is told of indexes that are found to be forged; once.
    pub fn attach_indexes(&self, indexes: Arc<ZoneIndexes>) {
        let _ = self.zone_indexes.set(indexes);
    }

    /// From now on no fill is answered, neither with an error nor otherwise. To be called before what
    /// fills need is taken apart.
    pub fn leave_fills(&self) {
        self.leaving.cancel();
    }

    /// The scheduler.
    #[must_use]
    pub fn fetcher(&self) -> &Fetcher {
        &self.fetcher
    }

    /// The client of all registries.
    #[must_use]
    pub fn client(&self) -> &RegistryClient {
        &self.client
    }

    /// The index files.
    #[must_use]
    pub fn indexes(&self) -> &Arc<IndexFiles> {
        &self.indexes
    }

    /// A source of a blob at these places, for reading it without the scheduler: it repeats what
    /// fails by itself, within the caller's deadline.
    #[must_use]
    pub fn source(
        &self,
        blob: BlobDigest,
        blob_bytes: u64,
        origins: &[BlobOrigin],
    ) -> Arc<dyn BlobSource> {
        let set = OriginSet::new(places(origins));
        let (client, retry) = (self.client.clone(), self.retry.clone());
        Arc::new(RegistryBlobSource::new(
            client, blob, blob_bytes, set, retry,
        ))
    }

    /// A source of the blob at this place alone, which is asked once.
    #[must_use]
    pub fn source_once(
        &self,
        blob: BlobDigest,
        blob_bytes: u64,
        place: &BlobOrigin,
    ) -> Arc<dyn BlobSource> {
        let set = OriginSet::new(places(std::slice::from_ref(place)));
        let client = self.client.clone();
        Arc::new(RegistryBlobSource::once(client, blob, blob_bytes, set))
    }

    /// Adds what is new of these places to the layer's, and lets an open layer try them at once; says
    /// whether there were any before.
    fn origin_set(&self, key: DeviceKey, origins: &[BlobOrigin]) -> (OriginSet, bool) {
        let mut sets = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sets.contains_key(&key);
        let set = sets.entry(key).or_default().clone();
        drop(sets);
        // Each is added, also after one that was new.
        let new = places(origins)
            .filter(|place| set.add(place.clone()))
            .count();
        if new > 0
            && let Some(handle) = self.fetcher.layer(&key)
        {
            handle.refresh_sources();
        }
        (set, known)
    }

    /// Opens a layer whose index is at hand.
    pub async fn open_with(
        &self,
        record: &LazyLayerRecord,
        index: &LayerIndex,
    ) -> Result<Arc<LayerHandle>, OpenLayerError> {
        let (blob, blob_bytes) = (record.blob_digest, record.blob_bytes);
        let proven = match record.index_source {
            IndexSource::Blob
            | IndexSource::Node
            | IndexSource::Estargz
            | IndexSource::ZstdChunked => true,
            IndexSource::Peer | IndexSource::Referrer => false,
        };
        let at = (device_key(record), blob, blob_bytes);
        self.open_layer(at, &record.sources, index, proven).await
    }

    /// As [`Self::open_with`], for a layer that no record names.
    pub async fn open_at(
        &self,
        key: DeviceKey,
        blob: BlobDigest,
        blob_bytes: u64,
        places: &[BlobOrigin],
        index: &LayerIndex,
    ) -> Result<Arc<LayerHandle>, OpenLayerError> {
        let at = (key, blob, blob_bytes);
        self.open_layer(at, places, index, false).await
    }

    /// Opens a layer. Where its tree is not `proven` by who made it, it is when the layer is sealed: of a blob that
    /// Sluice wrote the manifest pins it.
    async fn open_layer(
        &self,
        (key, blob, blob_bytes): (DeviceKey, BlobDigest, u64),
        places: &[BlobOrigin],
        index: &LayerIndex,
        proven: bool,
    ) -> Result<Arc<LayerHandle>, OpenLayerError> {
        let (origins, known) = self.origin_set(key, places);
        if known && let Some(handle) = self.fetcher.layer(&key) {
            return Ok(handle);
        }
        let known_places = origins.clone();
        let windows = self.windows_of(key, &origins, index).await;
        // A device that is no tar says nothing of a tree. Who mounts such a layer made the index himself.
        let is_tar = index.form() == DeviceForm::Tar;
        let doubted = !proven && is_tar && index.metadata().unmodified.is_some();
        let witnesses = doubted.then(|| {
            Arc::new(TreeCheck {
                key,
                blob,
                indexes: Arc::clone(&self.indexes),
                zone: self.zone_indexes.get().cloned(),
            })
        });
        // The scheduler repeats what fails, and waits as long as a registry asks it to.
        let source = RegistryBlobSource::once(self.client.clone(), blob, blob_bytes, origins);
        let spec = LayerSpec {
            key,
            chunks: index.chunk_map().clone(),
            blob,
            blob_bytes,
            sources: vec![Arc::new(source)],
            origins: known_places,
            windows,
            witnesses: witnesses.map(|it| it as Arc<dyn Witnesses>),
        };
        let added = self.fetcher.add_layer(spec).await;
        // The device was told of every chunk; of a layer that nobody reads no page is needed after that.
        index.source().release_pages();
        added.map_err(|source| OpenLayerError::Device { key, source })
    }

    /// The file of windows that an index names: this node's own, else the blob beside the index in the repositories that
    /// have it.
    async fn windows_of(
        &self,
        key: DeviceKey,
        origins: &OriginSet,
        index: &LayerIndex,
    ) -> Option<Arc<dyn BlobSource>> {
        let pin = index.metadata().unmodified?.windows?;
        let indexes = Arc::clone(&self.indexes);
        let here = tokio::task::spawn_blocking(move || {
            let path = indexes.windows(key.index)?;
            let opened = FileSource::open_path(&path);
            opened
                .inspect_err(|error| tracing::warn!(device = %key, "open windows: {error}"))
                .ok()
        });
        if let Ok(Some(file)) = here.await {
            return Some(Arc::new(file));
        }
        let (client, blob) = (self.client.clone(), BlobDigest::from_bytes(pin.digest));
        let source = RegistryBlobSource::once(client, blob, pin.bytes, origins.clone());
        Some(Arc::new(source))
    }

    /// Opens a layer from its record.
    pub async fn open(&self, record: &LazyLayerRecord) -> Result<Arc<LayerHandle>, OpenLayerError> {
        let key = device_key(record);
        if let Some(handle) = self.fetcher.layer(&key) {
            self.origin_set(key, &record.sources);
            return Ok(handle);
        }
        let index = self.index(record).await?;
        self.open_with(record, &index).await
    }

    /// The layer's index, which is on disk.
    pub async fn index(&self, record: &LazyLayerRecord) -> Result<Arc<LayerIndex>, OpenLayerError> {
        let key = device_key(record);
        let (indexes, digest) = (Arc::clone(&self.indexes), record.index_digest);
        let opened = tokio::task::spawn_blocking(move || indexes.get(digest)).await;
        opened
            .map_err(|_| OpenLayerError::Stopping)?
            .map_err(|source| OpenLayerError::Index { key, source })?
            .ok_or(OpenLayerError::NoIndex(key))
    }

    /// Finds a layer by its device and opens it; `None` when no snapshot has it.
    pub async fn by_key(&self, key: DeviceKey) -> Result<Option<Arc<LayerHandle>>, OpenLayerError> {
        if let Some(handle) = self.fetcher.layer(&key) {
            return Ok(Some(handle));
        }
        let metadata = Arc::clone(&self.metadata);
        let records = tokio::task::spawn_blocking(move || metadata.layers()).await;
        let records = records.map_err(|_| OpenLayerError::Stopping)??;
        let same = records.into_iter().map(|(_, record)| record);
        let merged = same
            .filter(|record| device_key(record) == key)
            .reduce(|mut all, one| {
                all.sources.extend(one.sources);
                all
            });
        match merged {
            Some(record) => self.open(&record).await.map(Some),
            None => Ok(None),
        }
    }

    /// Closes a layer that no snapshot has any more and deletes its device.
    pub async fn remove(&self, key: &DeviceKey) -> Result<(), ChunkStoreError> {
        self.origins
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(key);
        self.fetcher.remove_layer(key).await
    }
}

/// What a failed fill means to the reader. Exhaustive by class, since the enum may grow.
fn errno_of(error: &FillError) -> FillErrno {
    match error {
        FillError::Deadline { .. } => FillErrno::Deadline,
        FillError::NoSpace { .. } => FillErrno::NoSpace,
        FillError::Closed => FillErrno::Stale,
        _ => FillErrno::Io,
    }
}

impl Layers {
    async fn fill_range(&self, request: FillRequest) -> Result<Filled, FillErrno> {
        let key = DeviceKey {
            diff_id: request.diff_id,
            index: request.index_digest,
        };
        let handle = match self.by_key(key).await {
            Ok(Some(handle)) => handle,
            Ok(None) => {
                tracing::error!(device = %key, "a reader asks for a layer that no snapshot has");
                return Err(FillErrno::Stale);
            }
            Err(error) => {
                tracing::error!(device = %key, "failed to open a layer for a reader: {error}");
                return Err(FillErrno::Io);
            }
        };
        let (extent, deadline) = (request.extent, request.deadline);
        let (fetcher, reader) = (&self.fetcher, Priority::Foreground);
        let filled = match request.takes_bytes {
            true => {
                fetcher
                    .fill_or_pass(&handle, extent, reader, deadline)
                    .await
            }
            false => {
                let filled = fetcher.fill(&handle, extent, reader, deadline).await;
                filled.map(|()| Filled::Present)
            }
        };
        filled.map_err(|error| errno_of(&error))
    }
}

#[async_trait]
impl FillService for Layers {
    async fn fill(&self, request: FillRequest) -> Result<Filled, FillErrno> {
        let filled = self
            .leaving
            .run_until_cancelled(self.fill_range(request))
            .await;
        match filled {
            Some(result) if !self.leaving.is_cancelled() => result,
            // The reader's deadline is the shim's to keep.
            _ => std::future::pending().await,
        }
    }
}
