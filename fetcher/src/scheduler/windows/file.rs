// SPDX-License-Identifier: Apache-2.0
//! The file of windows of a layer: read by ranges, verified payload by payload, some kept.
//!
//! **Bounds** what is kept: [`KEPT_BYTES`] per layer; one read: [`READ_BYTES`] and [`AHEAD_BYTES`]. A source that fails
//! rests like any other, and transfers wait for it before they ask for bytes that could not be decoded.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sluice_blockindex::chunkmap::{Chunk, ChunkMap, WindowPin};
use sluice_blockindex::digest::StrongAlgorithm;
use sluice_blockindex::extent::{BlobSpace, Extent, WindowsSpace};
use sluice_blockindex::windows::{WindowError, read_window};
use tokio::sync::watch;
use tokio::time::Instant;

use super::super::error::{FetchFailure, WindowsFailure};
use super::pin_of;
use crate::backoff::Backoff;
use crate::byte_lru::ByteLru;
use crate::clock;
use crate::metrics::Metrics;
use crate::source::{BlobSource, Class, ReadContext, SourceError, read_checked};
use crate::store::lock;

/// Payloads that a layer keeps: some hundred, the windows of 50 to 100 MB of device.
const KEPT_BYTES: usize = 256 << 10;
/// Payloads read with those that are needed: what a line of 100 Mbit/s carries in a few milliseconds, and the
/// windows of some 8 MiB of device around the read.
const AHEAD_BYTES: u64 = 32 << 10;
/// The most bytes of one read, without those beside them.
const READ_BYTES: u64 = 64 << 10;
/// A source that failed is given so many times longer: it may be slow, and not silent.
const PATIENCE: u32 = 4;
/// First pause after the source failed, and the longest: as of other sources.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The windows that follow the one at `after` in their file, up to `end`.
fn following(chunks: &ChunkMap, after: &Chunk, end: u64) -> impl Iterator<Item = WindowPin> {
    (after.ordinal + 1..chunks.count())
        .map_while(|ordinal| chunks.chunk(ordinal))
        // A few restart points in a row may have none.
        .take(1024)
        .filter(|chunk| chunk.skip_bytes == 0)
        .filter_map(|chunk| pin_of(chunks, &chunk))
        .take_while(move |pin| pin.extent.end() <= end)
}

/// Who reads windows, and what it costs whom.
pub(in super::super) struct Reader<'a> {
    pub(in super::super) chunks: &'a ChunkMap,
    pub(in super::super) metrics: &'a Metrics,
    pub(in super::super) context: ReadContext,
    /// How long one read may take, the first time.
    pub(in super::super) stall: Duration,
}

/// The file of windows of a layer.
#[derive(Debug)]
pub(crate) struct LayerWindows {
    source: Mutex<Option<Arc<dyn BlobSource>>>,
    /// Verified payloads, by their place in the file.
    kept: ByteLru<u64, Bytes>,
    backoff: Mutex<Backoff>,
    changed: watch::Sender<()>,
}

impl LayerWindows {
    pub(in super::super) fn new(source: Option<Arc<dyn BlobSource>>) -> Self {
        Self {
            source: Mutex::new(source),
            kept: ByteLru::new(KEPT_BYTES),
            backoff: Mutex::new(Backoff::new(clock::now())),
            changed: watch::Sender::new(()),
        }
    }

    /// Reads them from this source from now on; waiting transfers try it at once.
    pub(in super::super) fn set(&self, source: Arc<dyn BlobSource>) {
        *lock(&self.source) = Some(source);
        *lock(&self.backoff) = Backoff::new(clock::now());
        self.changed.send_replace(());
    }

    /// Whether there is a file of windows to read.
    pub(crate) fn has_source(&self) -> bool {
        lock(&self.source).is_some()
    }

    /// Until when the source is left alone.
    pub(in super::super) fn rests(&self, now: Instant) -> Option<Instant> {
        lock(&self.backoff)
            .not_before()
            .filter(|until| *until > now)
    }

    /// Tells of a new source.
    pub(in super::super) fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Whether the window need not be read.
    pub(in super::super) fn has(&self, pin: &WindowPin) -> bool {
        self.kept.get(&pin.extent.start()).is_some()
    }

    /// The window, read if it is not kept. `chunk` is the first that it is for.
    ///
    /// **Errors** [`FetchFailure::Windows`], [`FetchFailure::NoWindows`]. **Cancel** safe.
    pub(in super::super) async fn get(
        &self,
        reader: &Reader<'_>,
        chunk: &Chunk,
        pin: &WindowPin,
    ) -> Result<Vec<u8>, FetchFailure> {
        let algorithm = reader.chunks.algorithm();
        if let Some(window) = self.kept_window(pin, algorithm) {
            return Ok(window);
        }
        let payload = self.read(reader, &[(*chunk, *pin)]).await?;
        let label = self.label();
        let window = read_window(payload.as_ref(), pin, algorithm);
        window.map_err(|error| FetchFailure::Windows {
            label,
            error: error.into(),
        })
    }

    /// Keeps none of those that it has.
    #[cfg(test)]
    pub(in super::super) fn forget(&self) {
        self.kept.clear();
    }

    fn kept_window(&self, pin: &WindowPin, algorithm: StrongAlgorithm) -> Option<Vec<u8>> {
        let payload = self.kept.get(&pin.extent.start())?;
        // It was verified when it was put here.
        read_window(&payload, pin, algorithm).ok()
    }

    fn label(&self) -> Arc<str> {
        lock(&self.source)
            .as_ref()
            .map_or("nowhere", |it| it.label())
            .into()
    }

    /// Reads these windows (ascending) in as few reads as may be, and keeps them. Those at hand are passed over.
    ///
    /// **Errors** as [`Self::get`]. **Cancel** safe: what was read is kept.
    pub(in super::super) async fn prepare(
        &self,
        reader: &Reader<'_>,
        lacking: &[(Chunk, WindowPin)],
    ) -> Result<(), FetchFailure> {
        let needed: Vec<_> = lacking.iter().filter(|(_, pin)| !self.has(pin)).collect();
        let mut rest = &needed[..];
        while let Some((_, first)) = rest.first() {
            let end = first.extent.start().saturating_add(READ_BYTES);
            let count = rest.iter().take_while(|(_, pin)| pin.extent.end() <= end);
            let (now, later) = rest.split_at(count.count().max(1));
            let now: Vec<_> = now.iter().map(|it| **it).collect();
            self.read(reader, &now).await?;
            rest = later;
        }
        Ok(())
    }

    /// One read; returns the first payload.
    async fn read(
        &self,
        reader: &Reader<'_>,
        needed: &[(Chunk, WindowPin)],
    ) -> Result<Bytes, FetchFailure> {
        let (Some((first, pin)), Some((last, end_pin))) = (needed.first(), needed.last()) else {
            return Ok(Bytes::new());
        };
        let Some(source) = lock(&self.source).clone() else {
            return Err(FetchFailure::NoWindows {
                chunk: first.ordinal,
            });
        };
        let until = end_pin.extent.end().saturating_add(AHEAD_BYTES);
        let further: Vec<_> = following(reader.chunks, last, until).collect();
        let hull = further
            .iter()
            .fold(pin.extent.hull(end_pin.extent), |hull, pin| {
                hull.hull(pin.extent)
            });
        let began = clock::now();
        let result = self.read_hull(reader, &*source, hull, needed).await;
        let label: Arc<str> = source.label().into();
        match result {
            Ok(payloads) => {
                lock(&self.backoff).succeeded();
                let all = needed.iter().map(|(_, pin)| pin).chain(&further);
                for pin in all {
                    let payload = part(&payloads, hull, pin);
                    // Those read ahead are not verified yet, and may be wrong without harm.
                    if read_window(payload, pin, reader.chunks.algorithm()).is_ok() {
                        let (payload, bytes) = (Bytes::copy_from_slice(payload), payload.len());
                        self.kept.put(pin.extent.start(), payload, bytes);
                    }
                }
                Ok(Bytes::copy_from_slice(part(&payloads, hull, pin)))
            }
            Err(error) => {
                let failure = FetchFailure::Windows { label, error };
                if failure.class() != Class::Cancelled {
                    reader.metrics.failed(source.kind(), failure.class());
                    let asked = failure.retry_after();
                    let now = clock::now();
                    lock(&self.backoff).failed(FIRST_PAUSE, LONGEST_PAUSE, asked, began, now);
                }
                Err(failure)
            }
        }
    }

    async fn read_hull(
        &self,
        reader: &Reader<'_>,
        source: &dyn BlobSource,
        hull: Extent<WindowsSpace>,
        needed: &[(Chunk, WindowPin)],
    ) -> Result<Bytes, WindowsFailure> {
        let (metrics, priority) = (reader.metrics, reader.context.priority);
        metrics.requested(source.kind(), priority);
        let beyond = SourceError::BeyondEnd {
            asked: Extent::empty(),
        };
        // A file of its own: its offsets are those of the blob that it is.
        let extent: Option<Extent<BlobSpace>> = Extent::new(hull.start(), hull.end());
        let extent = extent.ok_or(beyond)?;
        let check = |bytes: &[u8]| {
            let sound = |(_, pin): &(Chunk, WindowPin)| {
                read_window(part(bytes, hull, pin), pin, reader.chunks.algorithm()).map(|_| ())
            };
            needed.iter().try_for_each(sound)
        };
        let reading = read_checked(source, &reader.context, extent, check);
        let after = match lock(&self.backoff).is_failing() {
            true => reader.stall.saturating_mul(PATIENCE),
            false => reader.stall,
        };
        let stalled = SourceError::Stalled {
            after,
            offset: hull.start(),
        };
        let read = tokio::time::timeout(after, reading).await;
        let bytes: Result<Bytes, WindowError> = read.map_err(|_| stalled)??;
        let bytes = bytes?;
        metrics.arrived(source.kind(), priority, hull.len());
        Ok(bytes)
    }
}

/// The payload of a window in what was read; empty when it is not inside.
fn part<'a>(bytes: &'a [u8], hull: Extent<WindowsSpace>, pin: &WindowPin) -> &'a [u8] {
    let at =
        |offset: u64| usize::try_from(offset.saturating_sub(hull.start())).unwrap_or(usize::MAX);
    bytes
        .get(at(pin.extent.start())..at(pin.extent.end()))
        .unwrap_or_default()
}
