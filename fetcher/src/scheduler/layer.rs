// SPDX-License-Identifier: Apache-2.0
//! One layer as the fetcher sees it.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sluice_blockindex::chunkmap::{Access, Chunk, ChunkMap, DeviceForm};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, DeviceSpace, Extent};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::error::FillError;
use super::flight::{Flights, Transfer};
use super::prefix::streams_of;
use super::sources::SourceSet;
use super::window::ReadAhead;
use super::windows::{LayerWindows, frame_start};
use crate::clock;
use crate::cluster::home::PieceKey;
use crate::source::{BlobSource, OriginSet, SourceKind};
use crate::store::{Device, DeviceKey, Store, Twin, Witnesses, lock};

/// What the fetcher must be told of a layer.
#[derive(Debug)]
pub struct LayerSpec {
    /// Its name in the store.
    pub key: DeviceKey,
    /// Its chunks, from the index that `key` names.
    pub chunks: ChunkMap,
    /// The blob that has them.
    pub blob: BlobDigest,
    /// Size of that blob.
    pub blob_bytes: u64,
    /// Where the blob can be read, the nearest first. More can be added later.
    pub sources: Vec<Arc<dyn BlobSource>>,
    /// The repositories that have it, for nodes that fetch on behalf of this one.
    pub origins: OriginSet,
    /// The file of windows of an unmodified gzip blob, as a blob of its own: a local file, or a blob of a
    /// registry. `None` where the index names none; without one such a layer can be read from its front only.
    pub windows: Option<Arc<dyn BlobSource>>,
    /// Who has a say when it is sealed, besides its diff ID.
    pub witnesses: Option<Arc<dyn Witnesses>>,
}

/// How much of a layer came from where since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerTraffic {
    /// Compressed bytes from local files.
    pub local_bytes: u64,
    /// Compressed bytes from other nodes.
    pub peer_bytes: u64,
    /// Compressed bytes from mirrors.
    pub mirror_bytes: u64,
    /// Compressed bytes from a Dragonfly daemon.
    pub dragonfly_bytes: u64,
    /// Compressed bytes from the image's own registry.
    pub origin_bytes: u64,
    /// Device bytes that were in the store already, under another index or from before a reboot.
    pub store_bytes: u64,
}

#[derive(Debug, Default)]
struct Traffic {
    local: AtomicU64,
    peer: AtomicU64,
    mirror: AtomicU64,
    dragonfly: AtomicU64,
    origin: AtomicU64,
    store: AtomicU64,
}

/// A layer that can be filled. Made by [`super::Fetcher::add_layer`].
#[derive(Debug)]
pub struct LayerHandle {
    pub(crate) device: Arc<Device>,
    pub(crate) sources: SourceSet,
    pub(super) windows: LayerWindows,
    pub(super) witnesses: Option<Arc<dyn Witnesses>>,
    pub(crate) flights: Arc<Flights>,
    pub(crate) ahead: Mutex<ReadAhead>,
    last_miss: Mutex<Option<Instant>>,
    /// Whether a boot list has said what a start reads of it.
    foreseen: AtomicBool,
    /// Cancelled when the layer is closed.
    pub(crate) cancel: CancellationToken,
    /// The transfer on which the whole blob comes, because its source ignores ranges; or whose turn it is to pass
    /// over a frame from its front.
    pub(crate) whole: Mutex<Option<Arc<Transfer>>>,
    twin: Mutex<Option<Arc<Twin>>>,
    last_used: Mutex<Instant>,
    traffic: Traffic,
    blob: BlobDigest,
    blob_bytes: u64,
    origins: OriginSet,
    /// Chunks that can be had by prefix only, frame by frame.
    streams: Vec<Range<u32>>,
    /// Chunks that are made of files the node has ([`crate::reuse`]): only readers fetch them meanwhile.
    pub(crate) expected: Mutex<HashSet<u32>>,
}

impl LayerHandle {
    pub(crate) fn new(
        spec: LayerSpec,
        device: Arc<Device>,
        flights: Arc<Flights>,
        ahead: ReadAhead,
        cancel: CancellationToken,
    ) -> Self {
        let streams = match spec.chunks.access() {
            Access::Random => Vec::new(),
            Access::Prefix => streams_of(&spec.chunks),
        };
        Self {
            streams,
            device,
            sources: SourceSet::new(spec.sources),
            windows: LayerWindows::new(spec.windows),
            witnesses: spec.witnesses,
            flights,
            ahead: Mutex::new(ahead),
            last_miss: Mutex::default(),
            foreseen: AtomicBool::new(false),
            cancel,
            whole: Mutex::new(None),
            twin: Mutex::new(None),
            last_used: Mutex::new(clock::now()),
            traffic: Traffic::default(),
            blob: spec.blob,
            blob_bytes: spec.blob_bytes,
            origins: spec.origins,
            expected: Mutex::default(),
        }
    }

    /// The repositories that have the blob.
    pub fn origins(&self) -> &OriginSet {
        &self.origins
    }

    /// Whether the chunk is being made of what the node has.
    pub(crate) fn is_expected(&self, chunk: u32) -> bool {
        lock(&self.expected).contains(&chunk)
    }

    /// Whether the chunk is on its way.
    pub(crate) fn is_being_fed(&self, chunk: u32) -> bool {
        self.flights.is_being_fed(chunk)
    }

    /// Waits until the chunk is on its way, or nobody fetches it. May be long; cancel-safe.
    pub(crate) async fn comes_to_be_fed(&self, chunk: u32) {
        self.flights.comes_to_be_fed(chunk).await;
    }

    /// When a reader last read what was missing; windows are asked for by it.
    pub(crate) fn last_miss(&self) -> Option<Instant> {
        *lock(&self.last_miss)
    }

    /// Takes note of a reader who reads what is missing, and says what to read ahead of him.
    pub(super) fn missed(&self, read: Extent<DeviceSpace>) -> Option<Extent<DeviceSpace>> {
        *lock(&self.last_miss) = Some(clock::now());
        lock(&self.ahead).on_read(read)
    }

    /// Takes note that a boot list loads chunks of it.
    pub(crate) fn foresee(&self) {
        self.foreseen.store(true, Ordering::Relaxed);
    }

    /// Whether a boot list has loaded chunks of it.
    pub(crate) fn is_foreseen(&self) -> bool {
        self.foreseen.load(Ordering::Relaxed)
    }

    /// Its name in the store.
    pub fn key(&self) -> DeviceKey {
        self.device.key()
    }

    /// Its device in the store.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Its chunks.
    pub fn chunks(&self) -> &ChunkMap {
        self.device.chunks()
    }

    /// The blob that has them.
    pub fn blob(&self) -> BlobDigest {
        self.blob
    }

    /// Size of that blob.
    pub fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// Adds a place where the blob can be read. One with the same label and kind is replaced; waiting
    /// transfers try it at once.
    pub fn add_source(&self, source: Arc<dyn BlobSource>) {
        self.sources.add(source);
    }

    /// Sets where its file of windows can be read.
    pub fn set_windows(&self, source: Arc<dyn BlobSource>) {
        self.windows.set(source);
    }

    /// Its sources have learnt of further places of the blob: they need not back off any more, and
    /// waiting transfers try them at once.
    pub fn refresh_sources(&self) {
        self.sources.refresh();
    }

    /// Somebody wants it.
    pub(crate) fn touch(&self) {
        *lock(&self.last_used) = clock::now();
    }

    /// How long nobody has wanted it.
    pub(crate) fn idle(&self) -> Duration {
        clock::now() - *lock(&self.last_used)
    }

    /// How much came from where.
    pub fn traffic(&self) -> LayerTraffic {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LayerTraffic {
            local_bytes: of(&self.traffic.local),
            peer_bytes: of(&self.traffic.peer),
            mirror_bytes: of(&self.traffic.mirror),
            dragonfly_bytes: of(&self.traffic.dragonfly),
            origin_bytes: of(&self.traffic.origin),
            store_bytes: of(&self.traffic.store),
        }
    }

    pub(crate) fn arrived(&self, kind: SourceKind, bytes: u64) {
        let counter = match kind {
            SourceKind::Local => &self.traffic.local,
            SourceKind::Peer | SourceKind::OtherZone => &self.traffic.peer,
            SourceKind::Mirror => &self.traffic.mirror,
            SourceKind::Dragonfly => &self.traffic.dragonfly,
            SourceKind::Origin => &self.traffic.origin,
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn found_in_store(&self, bytes: u64) {
        self.traffic.store.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether nothing more is to be fetched for it, for good.
    pub(crate) fn check_open(&self) -> Result<(), FillError> {
        if let Some(failure) = self.device.failure() {
            return Err(FillError::Failed(failure));
        }
        if self.cancel.is_cancelled() {
            Err(FillError::Closed)
        } else {
            Ok(())
        }
    }

    /// Whether some of it can be had only after what stands before: gzip without a file of windows, and long frames
    /// of zstd.
    pub(crate) fn is_ordered(&self) -> bool {
        !self.streams.is_empty() || self.gains_by_order() && !self.windows.has_source()
    }

    /// Whether what is fetched from the front on costs less: no window is read for it.
    pub(crate) fn gains_by_order(&self) -> bool {
        self.chunks().restart_count() > 0
    }

    /// Whether a transfer has its turn to which others hand their chunks over.
    pub(crate) fn is_passed_over(&self) -> bool {
        lock(&self.whole).is_some()
    }

    /// Until when its file of windows is left alone.
    pub(crate) fn windows_rest(&self) -> Option<Instant> {
        self.windows.rests(clock::now())
    }

    /// The chunks of the frame that this one is in, which all come with it: itself alone, unless the frame is
    /// longer than a chunk may be.
    pub(crate) fn sharing(&self, ordinal: u32) -> Range<u32> {
        let continues = |ordinal: u32| {
            let chunk = self.chunks().chunk(ordinal);
            chunk.is_some_and(|chunk| chunk.skip_bytes > 0)
        };
        let (mut first, mut end) = (ordinal, ordinal.saturating_add(1));
        // The first chunk of a map skips nothing.
        while first > 0 && continues(first) {
            first -= 1;
        }
        while continues(end) {
            end += 1;
        }
        first..end
    }

    /// Claims those of `chunks` that are not in flight for `transfer`, and what else comes in their frames
    /// and is missing; returns how many.
    pub(crate) fn claim(
        &self,
        transfer: &Arc<Transfer>,
        chunks: impl IntoIterator<Item = u32>,
    ) -> usize {
        let mut all = BTreeSet::new();
        for ordinal in chunks {
            if all.insert(ordinal) {
                let others = self.sharing(ordinal).filter(|other| *other != ordinal);
                all.extend(others.filter(|other| !self.device.is_present(*other)));
            }
        }
        self.flights.claim(transfer, all)
    }

    /// The frames that can be had from their front only, as the chunks of each.
    pub(super) fn streams(&self) -> &[Range<u32>] {
        &self.streams
    }

    /// The one of [`Self::streams`] that has this chunk.
    pub(super) fn stream_of(&self, ordinal: u32) -> Option<Range<u32>> {
        let after = self.streams.partition_point(|it| it.start <= ordinal);
        let stream = self.streams.get(after.checked_sub(1)?)?;
        stream.contains(&ordinal).then(|| stream.clone())
    }

    /// The chunk by which sources are judged that sent this one corrupt: of a long frame the first, since who asks
    /// for any other takes it all.
    pub(crate) fn judged_by(&self, ordinal: u32) -> u32 {
        self.stream_of(ordinal)
            .map_or(ordinal, |stream| stream.start)
    }

    /// The piece that a chunk is in, with all chunks of its frame: else each home would fetch the frame.
    pub(crate) fn piece(&self, chunk: &Chunk) -> PieceKey {
        let stream = self.stream_of(chunk.ordinal);
        let first = stream.and_then(|stream| self.chunks().chunk(stream.start));
        let begin = first.map_or_else(|| self.frame_begin(chunk), |first| first.device.start());
        PieceKey::at(self.key().index, begin)
    }

    /// First device byte that the frame of a chunk gives.
    fn frame_begin(&self, chunk: &Chunk) -> u64 {
        match self.chunks().form() {
            DeviceForm::Tar => frame_start(chunk),
            // Between two contents of a frame may be what no device has.
            DeviceForm::Contents => {
                let first = self.chunks().chunk(self.sharing(chunk.ordinal).start);
                first.map_or(chunk.device.start(), |first| first.device.start())
            }
        }
    }

    /// The chunks whose frames lie wholly in `extent`, ascending.
    pub(crate) fn chunks_in(&self, extent: Extent<BlobSpace>) -> impl Iterator<Item = Chunk> + '_ {
        let chunks = self.chunks();
        let (mut low, mut high) = (0, chunks.count());
        // The first chunk that does not start before the extent; frames ascend with chunks.
        while low < high {
            let middle = low + (high - low) / 2;
            let before = chunks
                .chunk(middle)
                .is_some_and(|it| it.blob.start() < extent.start());
            if before {
                low = middle + 1
            } else {
                high = middle
            }
        }
        (low..chunks.count())
            .map_while(|chunk| self.chunks().chunk(chunk))
            .take_while(move |chunk| chunk.blob.end() <= extent.end())
    }

    /// Whether sealed devices of the same layer have its bytes at the same places. Where the device is no tar the diff
    /// ID says nothing of its bytes.
    pub(crate) fn has_twins(&self, store: &Store) -> bool {
        self.chunks().form() == DeviceForm::Tar && !store.sealed_twins(&self.key()).is_empty()
    }

    /// A sealed device of the same layer, opened when there is one. **Blocks** (shortly).
    ///
    /// It is kept open until this layer is sealed or closed, or the twin removed: an open file keeps
    /// its bytes on the disk.
    pub(crate) fn twin(&self, store: &Store) -> Option<Arc<Twin>> {
        let mut twin = lock(&self.twin);
        let may = !self.cancel.is_cancelled() && self.has_twins(store);
        if twin.is_none() && may {
            *twin = store.open_twin(&self.key()).map(Arc::new);
        }
        twin.clone()
    }

    /// Closes the twin: nothing more is copied from it.
    pub(crate) fn drop_twin(&self) {
        *lock(&self.twin) = None;
    }

    /// Closes the twin if it is the device of this name.
    pub(crate) fn drop_twin_of(&self, key: &DeviceKey) {
        lock(&self.twin).take_if(|twin| twin.key() == *key);
    }
}
