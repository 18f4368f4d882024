// SPDX-License-Identifier: Apache-2.0
//! Layers that others made seekable, eStargz and zstd:chunked: lazy by their own table of contents (TOC).
//!
//! The manifest pins the TOC, so this node believes it as it believes an index in a blob of Sluice's: one read of the
//! blob's end (of a large TOC two), and the index is made here, stored as any other, and found there
//! after a restart. No other node is asked for it, and none gets it to mount.
//!
//! What the TOC says is what there will ever be to compare the bytes with: see `docs/threat-model.md`. A layer whose
//! TOC cannot be used has whatever other index there is, and else is unpacked.

use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::toc::{Toc, TocError, TocLayer, TocPin, TocPlace};
use sluice_fetcher::source::{BlobSource, Class, Priority, ReadContext, SourceError, read_checked};
use tokio::time::Instant;

use super::Inner;
use super::prepare::late;
use crate::config::IndexUse;
use crate::indexes::{IndexPin, PinnedBlob};
use crate::plan::{LayoutLayer, Outcome, PlannedLayer, Refusal, RefusalKind};
use crate::snapshots::{BlobOrigin, IndexSource, LazyLayerRecord};

/// TOCs read at once: each may take some hundred MiB, and a processor.
pub(super) const PARALLEL: usize = 2;
/// Stands in the index, for people.
const WRITER: &str = concat!("sluiced ", env!("CARGO_PKG_VERSION"));

/// Whether the manifest names a TOC of the layer, be it a good one or not.
pub(super) fn has_toc(layer: &LayoutLayer) -> bool {
    !matches!(pin_of(layer), Ok(None))
}

fn pin_of(layer: &LayoutLayer) -> Result<Option<TocPin>, TocError> {
    let Some(descriptor) = &layer.descriptor else {
        return Ok(None);
    };
    TocPin::of_annotations(|name| descriptor.annotations.get(name).map(String::as_str))
}

/// A TOC in the blob, and the bytes of it.
type Read = (TocPlace, Bytes);

impl Inner {
    /// What becomes of a layer by its TOC; `None` where it has none, or none may be used.
    pub(super) async fn toc_outcome(
        self: &Arc<Self>,
        layer: &LayoutLayer,
        origins: &[BlobOrigin],
        deadline: Instant,
    ) -> Option<Outcome> {
        if self.options.index_use.toc != IndexUse::On {
            return None;
        }
        let (blob, blob_bytes) = layer.blob()?;
        let pin = match pin_of(layer) {
            Ok(pin) => pin?,
            Err(error) => return Some(Err(refused(&error))),
        };
        let of = TocBlob {
            layer,
            blob,
            blob_bytes,
        };
        Some(self.planned_by_toc(of, pin, origins, deadline).await)
    }

    async fn planned_by_toc(
        self: &Arc<Self>,
        of: TocBlob<'_>,
        pin: TocPin,
        origins: &[BlobOrigin],
        deadline: Instant,
    ) -> Outcome {
        let TocBlob {
            layer,
            blob,
            blob_bytes,
        } = of;
        let sources = self.trusted_sources(blob, origins).await?;
        let source = self.parts.layers.source(blob, blob_bytes, &sources);
        let mut context = ReadContext::new(Priority::Foreground);
        context.deadline = Some(deadline);
        let (place, bytes) = read(&*source, &context, &pin, blob_bytes).await?;
        self.parts.metrics.index_fetched(bytes.len() as u64);
        let slot = tokio::time::timeout_at(deadline, self.tocs.acquire()).await;
        let slot = slot.map_err(|_| late())?.map_err(|_| late())?;
        let diff_id = layer.diff_id;
        let made = self.blocking(move |inner| {
            let toc = Toc::open(&pin, &place, &bytes)?;
            let built = toc.index(&TocLayer {
                blob,
                blob_bytes,
                diff_id,
                writer: WRITER,
            })?;
            let pin = IndexPin {
                digest: built.digest,
                diff_id,
                blob_bytes,
                blob: PinnedBlob::Toc(blob),
            };
            let payload = Bytes::from(built.payload);
            // For homes that open the layer on this node's behalf.
            inner.parts.shelf.keep(pin.digest, &payload);
            Ok((pin.digest, inner.stored(&payload, &pin)))
        });
        let made = made.await.map_err(|error| refused(&error));
        drop(slot);
        let (index_digest, index) = made?;
        let index = index.map_err(|error| Refusal::new(RefusalKind::Local, error.to_string()))?;
        let record = LazyLayerRecord {
            chain_id: layer.chain_id,
            diff_id,
            index_digest,
            blob_digest: blob,
            blob_bytes,
            device_bytes: index.device_bytes(),
            sources,
            index_source: IndexSource::from(place.format),
        };
        Ok(Arc::new(PlannedLayer { record, index }))
    }
}

/// A layer and its blob.
struct TocBlob<'a> {
    layer: &'a LayoutLayer,
    blob: BlobDigest,
    blob_bytes: u64,
}

/// Reads the bytes of a TOC: in one request, unless it is larger than what is guessed of a blob whose place
/// the manifest does not say.
async fn read(
    source: &dyn BlobSource,
    context: &ReadContext,
    pin: &TocPin,
    blob_bytes: u64,
) -> Result<Read, Refusal> {
    let not_read = |error: SourceError| match error.class() {
        Class::Cancelled => late(),
        Class::Transient if matches!(error, SourceError::Stalled { .. }) => late(),
        Class::Transient | Class::Permanent | Class::Corrupt => Refusal::new(
            RefusalKind::Fetch,
            format!("fetch table of contents: {error}"),
        ),
    };
    let first = pin
        .first_read(blob_bytes)
        .map_err(|error| refused(&error))?;
    // What a mirror gives may be anything: of another blob's end no place can be read.
    let check = |bytes: &[u8]| pin.locate(bytes, blob_bytes).map(|_| ());
    let bytes = read_checked(source, context, first, check).await;
    let bytes = bytes.map_err(not_read)?.map_err(|error| refused(&error))?;
    let place = pin
        .locate(&bytes, blob_bytes)
        .map_err(|error| refused(&error))?;
    let extent = place.extent;
    if extent.start() >= first.start() {
        let from = usize::try_from(extent.start() - first.start()).unwrap_or(usize::MAX);
        let length = usize::try_from(extent.len()).unwrap_or(usize::MAX);
        let end = from.saturating_add(length).min(bytes.len());
        return Ok((place, bytes.slice(from.min(end)..end)));
    }
    let whole = read_checked(source, context, extent, |_| Ok::<_, TocError>(())).await;
    let whole = whole.map_err(not_read)?.map_err(|error| refused(&error))?;
    Ok((place, whole))
}

/// Bytes that are not the pinned ones may be others the next time; what is pinned and of no use stays so.
fn refused(error: &TocError) -> Refusal {
    let kind = match error.is_of_bytes() {
        true => RefusalKind::Fetch,
        false => RefusalKind::NotConverted,
    };
    Refusal::new(kind, format!("not lazy by its table of contents: {error}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use sluice_blockindex::extent::{BlobSpace, Extent};
    use sluice_fetcher::source::memory::MemorySource;
    use sluice_fetcher::source::{BlobStream, SourceKind};

    use super::*;

    /// Notes what is read.
    #[derive(Debug)]
    struct Counted(MemorySource, Mutex<Vec<Extent<BlobSpace>>>);

    #[async_trait]
    impl BlobSource for Counted {
        fn label(&self) -> &str {
            self.0.label()
        }

        fn kind(&self) -> SourceKind {
            self.0.kind()
        }

        async fn open(
            &self,
            context: &ReadContext,
            extent: Extent<BlobSpace>,
        ) -> Result<BlobStream, SourceError> {
            self.1.lock().unwrap().push(extent);
            self.0.open(context, extent).await
        }
    }

    fn estargz(frames: usize, toc: &[u8]) -> Vec<u8> {
        let footer = [
            &[
                0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0,
            ][..],
            format!("{frames:016x}STARGZ").as_bytes(),
            &[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        [&vec![7; frames][..], toc, &footer].concat()
    }

    async fn read_of(blob: Vec<u8>, pin: &TocPin) -> (Result<Read, Refusal>, Vec<u64>) {
        let blob_bytes = blob.len() as u64;
        let source = Counted(MemorySource::new(blob), Mutex::default());
        let context = ReadContext::new(Priority::Foreground);
        let found = read(&source, &context, pin, blob_bytes).await;
        let sizes = source.1.lock().unwrap().iter().map(|it| it.len()).collect();
        (found, sizes)
    }

    #[tokio::test]
    async fn a_toc_costs_one_request_or_two() {
        let pin = TocPin::Footer {
            json_digest: [0; 32],
        };
        let (small, large) = (vec![1; 5000], vec![2; 200_000]);
        for (toc, requests) in [(small, 1), (large, 2)] {
            let (found, sizes) = read_of(estargz(1 << 20, &toc), &pin).await;
            let (place, bytes) = found.unwrap();
            assert_eq!((place.extent.start(), &bytes[..]), (1 << 20, &toc[..]));
            assert_eq!((sizes.len(), sizes[0]), (requests, 64 << 10));
        }
        let place = Extent::from_length(1000, 50).unwrap();
        let pin = TocPin::Position {
            extent: place,
            json_bytes: 100,
            digest: [0; 32],
        };
        let (found, sizes) = read_of(vec![3; 5000], &pin).await;
        let (found, bytes) = found.unwrap();
        assert_eq!((found.extent, &bytes[..]), (place, &[3; 50][..]));
        assert_eq!(sizes, [50]);
    }

    #[tokio::test]
    async fn a_blob_without_a_toc_says_so() {
        let pin = TocPin::Footer {
            json_digest: [0; 32],
        };
        let (found, _) = read_of(vec![0; 100_000], &pin).await;
        let refusal = found.unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::Fetch);
        assert!(refusal.reason.contains("footer"), "{refusal}");
        let pin = TocPin::Position {
            extent: Extent::from_length(1000, 50).unwrap(),
            json_bytes: 100,
            digest: [0; 32],
        };
        let (found, sizes) = read_of(vec![0; 500], &pin).await;
        assert_eq!(
            (found.unwrap_err().kind, sizes.len()),
            (RefusalKind::Fetch, 0)
        );
    }
}
