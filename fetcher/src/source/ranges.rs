// SPDX-License-Identifier: Apache-2.0
//! A long read in several ranges at once.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobSource, BlobStream, ReadContext, SourceError, SourceKind};

/// Bytes of one range: enough that the wait for its first byte is a small part of its time.
const RANGE_BYTES: u64 = 4 << 20;
/// Ranges under way at once. One connection seldom fills a line with a long round trip; many would only take the
/// line from readers.
const RANGES: usize = 4;
/// Pieces as a single answer would have them, so that a queue of pieces is bounded as before.
const PIECE_BYTES: usize = 64 << 10;

/// Asks a source for long extents in ranges, up to [`RANGES`] at once, and gives their bytes in order.
///
/// Holds at most [`RANGES`] times [`RANGE_BYTES`] for each stream. A source that answers a range with the whole blob
/// is asked once.
#[derive(Debug)]
pub struct RangesSource {
    below: Arc<dyn BlobSource>,
    range_bytes: u64,
}

impl RangesSource {
    /// Reads from `below`.
    pub fn new(below: Arc<dyn BlobSource>) -> Self {
        Self {
            below,
            range_bytes: RANGE_BYTES,
        }
    }

    /// The same with ranges of `range_bytes` (at least 1).
    #[cfg(test)]
    fn with_ranges(mut self, range_bytes: u64) -> Self {
        self.range_bytes = range_bytes.max(1);
        self
    }

    /// The extent cut at each `range_bytes` from its start.
    fn cut(&self, extent: Extent<BlobSpace>) -> impl Iterator<Item = Extent<BlobSpace>> + use<> {
        let (end, step) = (extent.end(), self.range_bytes);
        let mut at = extent.start();
        std::iter::from_fn(move || {
            let start = at;
            at = end.min(start.saturating_add(step));
            Extent::new(start, at).filter(|it| !it.is_empty())
        })
    }
}

async fn range(opened: BlobStream, wanted: Extent<BlobSpace>) -> Result<Bytes, SourceError> {
    opened.narrow(wanted)?.collect(wanted.len()).await
}

fn pieces(bytes: Bytes) -> impl Iterator<Item = Result<Bytes, SourceError>> {
    let starts = (0..bytes.len()).step_by(PIECE_BYTES);
    starts.map(move |at| Ok(bytes.slice(at..bytes.len().min(at + PIECE_BYTES))))
}

#[async_trait]
impl BlobSource for RangesSource {
    fn label(&self) -> &str {
        self.below.label()
    }

    fn kind(&self) -> SourceKind {
        self.below.kind()
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        let mut ranges = self.cut(extent);
        let first = match ranges.next() {
            Some(first) if first != extent && !self.below.whole_blob_only() => first,
            _ => return self.below.open(context, extent).await,
        };
        let opened = self.below.open(context, first).await?;
        if opened.extent.start() <= extent.start() && opened.extent.end() >= extent.end() {
            return Ok(opened);
        }
        let served = opened.served.clone();
        let head: BoxFuture<'static, _> = range(opened, first).boxed();
        let (below, context) = (Arc::clone(&self.below), context.clone());
        let rest = ranges.map(move |wanted| {
            let (below, context) = (Arc::clone(&below), context.clone());
            async move { range(below.open(&context, wanted).await?, wanted).await }.boxed()
        });
        let body = stream::iter(std::iter::once(head).chain(rest))
            .buffered(RANGES)
            .map_ok(|bytes| stream::iter(pieces(bytes)))
            .try_flatten();
        Ok(BlobStream::new(extent, body).served_by(served))
    }

    fn whole_blob_only(&self) -> bool {
        self.below.whole_blob_only()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Priority;
    use super::super::contract::{check_source, sample_blob};
    use super::super::fault::{Fault, FaultSource};
    use super::super::memory::MemorySource;
    use super::*;

    fn all_of(blob: &[u8]) -> Extent<BlobSpace> {
        Extent::new(0, blob.len() as u64).unwrap()
    }

    fn over(below: FaultSource) -> (Arc<FaultSource>, RangesSource) {
        let below = Arc::new(below);
        let source = RangesSource::new(Arc::clone(&below) as Arc<dyn BlobSource>);
        (below, source.with_ranges(100_000))
    }

    async fn read(source: &RangesSource, blob: &[u8]) -> Result<Bytes, SourceError> {
        let context = ReadContext::new(Priority::Foreground);
        let opened = source.open(&context, all_of(blob)).await?;
        let wanted = all_of(blob);
        opened.narrow(wanted)?.collect(wanted.len()).await
    }

    #[tokio::test]
    async fn contract_ranges() {
        let blob = sample_blob();
        for range_bytes in [1 << 10, 70_001, 1 << 30] {
            let source = RangesSource::new(Arc::new(MemorySource::new(blob.clone())));
            check_source(Arc::new(source.with_ranges(range_bytes)), &blob).await;
        }
    }

    #[test]
    fn an_extent_is_cut_without_gaps() {
        let source = RangesSource::new(Arc::new(MemorySource::new(Bytes::new())));
        let source = source.with_ranges(10);
        for (start, end, want) in [
            (0, 0, vec![]),
            (5, 15, vec![(5, 15)]),
            (5, 16, vec![(5, 15), (15, 16)]),
            (
                u64::MAX - 12,
                u64::MAX,
                vec![(u64::MAX - 12, u64::MAX - 2), (u64::MAX - 2, u64::MAX)],
            ),
        ] {
            let cut = source.cut(Extent::new(start, end).unwrap());
            let cut: Vec<_> = cut.map(|it| (it.start(), it.end())).collect();
            assert_eq!(cut, want, "{start}..{end}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ranges_are_under_way_at_once() {
        let blob = Bytes::from(vec![7; 800_000]);
        let pause = Duration::from_secs(1);
        let slow = || {
            FaultSource::new(Arc::new(MemorySource::new(blob.clone())))
                .always(Fault::Slow { pause })
        };
        let (below, source) = over(slow());
        let started = tokio::time::Instant::now();
        assert_eq!(read(&source, &blob).await.unwrap(), blob);
        let together = started.elapsed();
        assert_eq!(below.calls(), 8);
        let started = tokio::time::Instant::now();
        let context = ReadContext::new(Priority::Foreground);
        let alone = slow().open(&context, all_of(&blob)).await.unwrap();
        alone.collect(1 << 20).await.unwrap();
        assert!(
            together * 2 <= started.elapsed(),
            "{together:?} of {:?}",
            started.elapsed()
        );
    }

    #[tokio::test]
    async fn a_source_without_ranges_is_asked_once() {
        let blob = sample_blob();
        let size_bytes = blob.len() as u64;
        let memory = || Arc::new(MemorySource::new(blob.clone()));
        // It is known, or found out at the first answer.
        let known = FaultSource::new(memory()).always(Fault::WholeBlob { size_bytes });
        let found = FaultSource::new(memory()).on_calls(0..1, Fault::WholeBlob { size_bytes });
        for below in [known, found] {
            let (below, source) = over(below);
            assert_eq!(read(&source, &blob).await.unwrap(), blob);
            assert_eq!(below.calls(), 1);
        }
    }

    #[tokio::test]
    async fn a_range_that_fails_ends_the_stream() {
        let blob = sample_blob();
        for k in 0..3 {
            let memory = Arc::new(MemorySource::new(blob.clone()));
            let cut = Fault::Cut { after_bytes: 10 };
            let (_, source) = over(FaultSource::new(memory).on_calls(k..k + 1, cut));
            assert!(read(&source, &blob).await.is_err(), "call {k}");
        }
    }
}
