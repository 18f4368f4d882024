// SPDX-License-Identifier: Apache-2.0
//! One layer: taken from an artifact, or streamed through an indexer on a thread of its own.

use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::artifact::{ArtifactLayer, IndexBlobs, reason_of};
use sluice_blockindex::chunkmap::{Access, ChunkMap, Codec};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::index::{UncheckedIndex, WindowsPin};
use sluice_blockindex::indexer::{
    BuiltIndex, IndexOptions, IndexedLayer, IndexerError, LayerIndexer,
};
use sluice_fetcher::registry::RegistryError;

use super::{IndexError, Indexing, decided};
use crate::image::ImageReader;
use crate::pack::{BodyParts, PackError, feed};
use crate::plan::{ImagePlan, PlannedLayer};
use crate::pool::ByteBudget;
use crate::report::{Event, LayerIndexing};
use crate::verify::Verifier;

/// What is shown of a layer with an index.
struct Shown {
    codec: String,
    chunks: u64,
}

impl Indexing {
    /// What the artifact says of the layer; `None`: nothing, its index is in its blob.
    pub(super) async fn layer(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
        known: Option<&ArtifactLayer>,
    ) -> Result<(Option<ArtifactLayer>, Event), IndexError> {
        let descriptor = &layer.descriptor;
        let entry = |index| ArtifactLayer {
            blob: descriptor.digest,
            blob_bytes: descriptor.size,
            diff_id: layer.diff_id,
            index,
        };
        if let Some(decided) = decided(&layer.action) {
            let how = match &decided {
                Some(_) => LayerIndexing::Left,
                None => LayerIndexing::Converted,
            };
            let entry = decided.map(|reason| entry(Err(reason)));
            let event = event_of(layer, entry.as_ref(), how, None);
            return Ok((entry, event));
        }
        let known = known.filter(|known| known.blob_bytes == descriptor.size);
        if let Some(known) = known.filter(|_| !self.options.force) {
            let shown = match &known.index {
                Ok(index) => self.reuse(known, index).await?.map(Some),
                // A reason is believed, as that of a converted layer; `--force` looks again.
                Err(_) => Some(None),
            };
            if let Some(shown) = shown {
                let event = event_of(layer, Some(known), LayerIndexing::Reused, shown);
                return Ok((Some(known.clone()), event));
            }
        }
        let source = descriptor.digest.to_string();
        let bytes = descriptor.size;
        self.reporter.event(&Event::LayerStarted { source, bytes });
        let indexed = self.stream(plan, layer).await?;
        let (index, shown) = match indexed.index {
            Ok(mut built) => {
                let file = std::mem::take(&mut built.file);
                let shown = shown_of_file(file).map_err(IndexError::Run)?;
                (Ok(self.push_index(built).await?), Some(shown))
            }
            Err(reason) => (Err(reason_of(&reason)), None),
        };
        let entry = entry(index);
        let event = event_of(layer, Some(&entry), LayerIndexing::Indexed, shown);
        Ok((Some(entry), event))
    }

    /// What an artifact says of a layer, if it still holds: the index is there, sound, and of this blob, and its
    /// file of windows is there.
    async fn reuse(
        &self,
        known: &ArtifactLayer,
        index: &IndexBlobs,
    ) -> Result<Option<Shown>, IndexError> {
        let context = Self::context();
        if let Some(windows) = index.windows {
            let digest = BlobDigest::from_bytes(windows.digest);
            if !self.has(&context, digest, windows.bytes).await? {
                return Ok(None);
            }
        }
        let digest = BlobDigest::from_bytes(*index.digest.as_bytes());
        let payload = self
            .client
            .blob_bytes(&context, self.place(), digest, index.bytes);
        let payload = match payload.await {
            Ok(payload) => payload,
            Err(
                RegistryError::NotFound { .. }
                | RegistryError::TooLarge { .. }
                | RegistryError::DigestMismatch { .. },
            ) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let entry = known.clone();
        let accepted = tokio::task::spawn_blocking(move || {
            let index = entry.accept(&payload);
            index.map(|index| shown_of(index.chunk_map()))
        });
        match accepted.await.map_err(|e| IndexError::Run(e.to_string()))? {
            Ok(shown) => Ok(Some(shown)),
            Err(error) => {
                let blob = known.blob;
                tracing::warn!(%blob, "the index that an artifact names is refused, index the layer again: {error}");
                Ok(None)
            }
        }
    }

    /// Streams the blob through an indexer and checks what it turned out to be.
    async fn stream(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
    ) -> Result<IndexedLayer, IndexError> {
        let descriptor = &layer.descriptor;
        let body = self.source.blob(descriptor.digest, descriptor.size).await?;
        let (feed, parts) = feed(body);
        let what = format!("blob {} of {}", descriptor.digest, self.source.label());
        let verifier = Verifier::new(&what, descriptor.digest, descriptor.size);
        let (reporter, source) = (Arc::clone(&self.reporter), descriptor.digest.to_string());
        let (budget, caps, diff_id) = (Arc::clone(&self.budget), self.options.caps, layer.diff_id);
        let cap = caps.for_blob(descriptor.size);
        let indexing = tokio::task::spawn_blocking(move || {
            let progress = |bytes| reporter.progress(&source, bytes);
            let indexed = run(parts, verifier, cap, &budget, &progress)?;
            match indexed.diff_id == diff_id {
                true => Ok(indexed),
                false => Err(PackError::DiffId {
                    expected: diff_id,
                    actual: indexed.diff_id,
                }),
            }
        });
        let ((), indexed) = tokio::join!(feed, indexing);
        let indexed = indexed.map_err(|e| IndexError::Run(e.to_string()))?;
        let indexed = indexed.map_err(|source| IndexError::Layer {
            blob: descriptor.digest,
            platform: plan.platform.to_string(),
            source,
        })?;
        if indexed.trailing_garbage {
            let (blob, bytes) = (descriptor.digest, indexed.trailing_bytes);
            tracing::warn!(%blob, bytes, "the blob goes on after its gzip data with what every tool ignores");
        }
        Ok(indexed)
    }

    async fn push_index(&self, built: BuiltIndex) -> Result<IndexBlobs, IndexError> {
        let context = Self::context();
        let BuiltIndex {
            payload,
            digest,
            windows,
            ..
        } = built;
        let windows = match windows.is_empty() {
            true => None,
            false => {
                let (file, bytes) = (BlobDigest::of(&windows), windows.len() as u64);
                self.push(&context, file, Bytes::from(windows)).await?;
                let digest = *file.as_bytes();
                Some(WindowsPin { bytes, digest })
            }
        };
        let bytes = payload.len() as u64;
        let blob = BlobDigest::from_bytes(*digest.as_bytes());
        self.push(&context, blob, Bytes::from(payload)).await?;
        Ok(IndexBlobs {
            digest,
            bytes,
            windows,
        })
    }
}

/// Runs one indexer over a blob. Blocks.
fn run(
    mut body: BodyParts,
    mut verifier: Verifier,
    (device_max_bytes, limit): (u64, &'static str),
    budget: &ByteBudget,
    progress: &dyn Fn(u64),
) -> Result<IndexedLayer, PackError> {
    let options = IndexOptions {
        device_max_bytes,
        ..IndexOptions::default()
    };
    let failed = |error: IndexerError| match error {
        IndexerError::DeviceTooLarge { limit_bytes } => PackError::TooLarge { limit_bytes, limit },
        error => PackError::Index {
            reason: error.to_string(),
        },
    };
    let mut indexer = Some(LayerIndexer::new(options).map_err(failed)?);
    let (mut claim, mut broken) = (None, None);
    while let Some(part) = body.blocking_recv() {
        let part = part?;
        progress(part.len() as u64);
        verifier.update(&part)?;
        let Some(working) = &mut indexer else {
            continue;
        };
        if let Err(error) = working.push(&part, &mut |_| {}) {
            // The blob may be another one altogether; its digest tells, and is then the cause.
            broken = Some(failed(error));
            indexer = None;
            continue;
        }
        if claim.is_none() && budget.is_large(working.held_bytes()) {
            claim = Some(budget.claim_large());
        }
    }
    // A body that was called off ends too early, and so is told by its size.
    verifier.finish()?;
    match (indexer, broken) {
        (_, Some(error)) => Err(error),
        (Some(indexer), None) => indexer.finish(&mut |_| {}).map_err(failed),
        (None, None) => Err(PackError::Stopped),
    }
}

/// What is shown of an index that was made just now.
///
/// **Errors** it cannot be opened.
fn shown_of_file(file: Vec<u8>) -> Result<Shown, String> {
    let index = UncheckedIndex::parse_unmodified(file).and_then(UncheckedIndex::reopen);
    let index = index.map_err(|error| format!("open the index: {error}"))?;
    Ok(shown_of(index.chunk_map()))
}

/// How the blob is compressed, in a word, and into how many chunks it is cut.
fn shown_of(chunks: &ChunkMap) -> Shown {
    let word = match chunks.chunk(0).map(|chunk| chunk.codec) {
        Some(Codec::Deflate) => "gzip",
        Some(Codec::Raw) => "tar",
        Some(Codec::Zstd | Codec::ZstdFrames | Codec::ZstdStream | Codec::ZstdNext) => "zstd",
        Some(_) => "of another kind",
        None => "empty",
    };
    let codec = match chunks.access() {
        Access::Random => word.to_owned(),
        Access::Prefix => format!("{word} by prefix"),
    };
    Shown {
        codec,
        chunks: chunks.count().into(),
    }
}

fn event_of(
    layer: &PlannedLayer,
    entry: Option<&ArtifactLayer>,
    how: LayerIndexing,
    shown: Option<Shown>,
) -> Event {
    let index = entry.and_then(|entry| entry.index.as_ref().ok());
    let windows = index.and_then(|index| index.windows);
    Event::LayerIndexed {
        source: layer.descriptor.digest.to_string(),
        source_bytes: layer.descriptor.size,
        how,
        lazy: index.is_some() || how == LayerIndexing::Converted,
        chunks: shown.as_ref().map_or(0, |shown| shown.chunks),
        codec: shown.map(|shown| shown.codec),
        index_bytes: index.map_or(0, |index| index.bytes),
        windows_bytes: windows.map_or(0, |windows| windows.bytes),
        reason: entry.and_then(|entry| entry.index.clone().err()),
    }
}
