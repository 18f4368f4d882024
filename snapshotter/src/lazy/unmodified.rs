// SPDX-License-Identifier: Apache-2.0
//! Layers whose blobs Sluice did not write: which index they may use, if any.
//!
//! | index | used when | trusted because |
//! | --- | --- | --- |
//! | made of the blob's own table of contents | `[index] toc` is `on` | the image's manifest pins it ([`super::toc`]) |
//! | of this node | `[index] node` is not `off` | it was made of the blob itself, and held against the image's diff ID |
//! | of another node | `[index] node` is `on` | the seal proves the bytes, and what the bytes say of the tree |
//! | of an artifact that refers to the image | `[index] referrer` is `on` | who may push to the repository made it; the seal proves the same |
//!
//! The first of these that is there counts; those of other nodes are brought before ([`super::zone_ask`]). Where there
//! is none the layer is unpacked the ordinary way, and this node makes an index meanwhile ([`super::index_job`]).

use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::annotations::LayerMark;
use sluice_blockindex::artifact::{ArtifactLayer, IndexBlobs};
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};
use sluice_blockindex::extent::Extent;
use sluice_fetcher::index_artifact::{FindArtifactError, FoundArtifact, find_index_artifact};
use sluice_fetcher::registry::Repository;
use sluice_fetcher::source::{Priority, ReadContext, read_checked};
use tokio::time::Instant;

use super::Inner;
use super::places::Places;
use super::toc::has_toc;
use crate::config::{IndexPolicy, IndexUse};
use crate::indexes::{IndexPin, LayerIndex, LayerIndexError, PinnedBlob, check_digest};
use crate::plan::{Layout, LayoutLayer, Outcome, PlannedLayer, Refusal, RefusalKind};
use crate::snapshots::{BlobOrigin, IndexSource, LazyLayerRecord};

fn mismatch(artifact: &FoundArtifact, error: &impl std::fmt::Display) -> Refusal {
    let reason = format!("index artifact {}: {error}", artifact.digest);
    Refusal::new(RefusalKind::Mismatch, reason)
}

/// The blobs of an image's layers of which its manifest says nothing that may be used, with size and diff ID.
pub(super) fn unmarked(
    layout: &Layout,
    policy: IndexPolicy,
) -> impl Iterator<Item = (BlobDigest, u64, DiffId)> {
    let layers = layout.layers.iter();
    let layers = layers.filter(move |layer| {
        let toc = policy.toc == IndexUse::On && has_toc(layer);
        matches!(layer.mark, Ok(LayerMark::Unmarked)) && !toc
    });
    layers.filter_map(|layer| {
        let (blob, blob_bytes) = layer.blob()?;
        Some((blob, blob_bytes, layer.diff_id))
    })
}

/// An index that may be used.
struct Found {
    pin: IndexPin,
    index: Arc<LayerIndex>,
    source: IndexSource,
}

impl Inner {
    /// What becomes of a layer that the manifest says nothing about. `refusal` is what it gets without an index.
    pub(super) async fn unmodified_outcome(
        self: &Arc<Self>,
        layer: &LayoutLayer,
        places: &Places,
        artifact: Option<&FoundArtifact>,
        deadline: Instant,
        refusal: Refusal,
    ) -> Outcome {
        let origins = places.origins.as_slice();
        let Some((blob, blob_bytes)) = layer.blob() else {
            return Err(refusal);
        };
        let pin = IndexPin {
            // Until it is known.
            digest: IndexDigest::of(&[]),
            diff_id: layer.diff_id,
            blob_bytes,
            blob: PinnedBlob::Unmodified(blob),
        };
        let mut sources = origins.to_vec();
        let mut found = self.index_of_nodes(pin, blob).await?;
        if let Some(artifact) = artifact {
            let offered = artifact.artifact.layer(blob, blob_bytes, layer.diff_id);
            let offered = offered.map_err(|error| mismatch(artifact, &error))?;
            match (&found, offered.map(|layer| (layer, &layer.index))) {
                (Some(found), Some((_, Ok(theirs)))) if theirs.digest != found.pin.digest => {
                    // Of another version of this program, or forged.
                    tracing::warn!(%blob, artifact = %artifact.digest, "an artifact has another index than a node made");
                    self.parts.metrics.indexed("differs");
                }
                (None, Some((_, Ok(theirs))))
                    if self.parts.zone_indexes.is_forged(theirs.digest) =>
                {
                    tracing::warn!(%blob, artifact = %artifact.digest, "pass over an index that was found to be forged");
                    self.parts.metrics.indexed("refused");
                }
                (None, Some((layer, Ok(theirs)))) if self.may_use_referrers() => {
                    sources = self.trusted_sources(blob, origins).await?;
                    let fetched = self.index_of_artifact(layer, theirs, &sources, deadline);
                    found = Some(fetched.await?);
                }
                (None, Some((_, Err(reason)))) if self.may_use_referrers() => {
                    let reason = format!("not lazy: {reason}");
                    return Err(Refusal::new(RefusalKind::NotLazy, reason));
                }
                _ => {}
            }
        }
        let Some(found) = found else {
            let refusal = match self.index_jobs.unfit(blob) {
                Some(reason) => {
                    let reason = format!("not lazy: no index can be made of it: {reason}");
                    Refusal::new(RefusalKind::NotLazy, reason)
                }
                None => refusal,
            };
            return Err(refusal);
        };
        if let Some(refusal) = &places.unreachable {
            return Err(refusal.clone());
        }
        let Found { pin, index, source } = found;
        let sources = self.trusted_sources(blob, &sources).await?;
        let record = LazyLayerRecord {
            chain_id: layer.chain_id,
            diff_id: layer.diff_id,
            index_digest: pin.digest,
            blob_digest: blob,
            blob_bytes,
            device_bytes: index.device_bytes(),
            sources,
            index_source: source,
        };
        Ok(Arc::new(PlannedLayer { record, index }))
    }

    fn may_use_referrers(&self) -> bool {
        self.options.index_use.referrer == IndexUse::On
    }

    /// The artifact with indexes of an image, if one may be looked for and a layer has use for it. Takes at most half of
    /// what is left until the deadline: the indexes themselves come after it.
    pub(super) async fn artifact_of(
        self: &Arc<Self>,
        layout: &Layout,
        origins: &[BlobOrigin],
        deadline: Instant,
    ) -> Option<FoundArtifact> {
        let (policy, manifest) = (self.options.index_use, layout.manifest?);
        let unmarked: Vec<BlobDigest> = unmarked(layout, policy).map(|(blob, ..)| blob).collect();
        if unmarked.is_empty() {
            return None;
        }
        let lacks = self.blocking(move |inner| {
            let mut blobs = unmarked.into_iter();
            blobs.any(|blob| !inner.has_usable_index(blob))
        });
        let wanted = match policy.referrer {
            IndexUse::Off => false,
            IndexUse::Verify => policy.node != IndexUse::Off,
            IndexUse::On => lacks.await,
        };
        if !wanted {
            return None;
        }
        let places = origins.iter();
        let places = places.filter(|place| self.options.trust.allows(place));
        let half = deadline.saturating_duration_since(Instant::now()) / 2;
        let context = ReadContext::new(Priority::Foreground).with_timeout(half);
        for place in places {
            let Ok(repository) = Repository::new(&place.host, &place.repository) else {
                continue;
            };
            let client = self.parts.layers.client();
            match find_index_artifact(client, &repository, manifest, &context).await {
                Ok(Some(found)) => {
                    tracing::debug!(%manifest, artifact = %found.digest, %place, "an artifact has indexes");
                    return Some(found);
                }
                Ok(None) => {}
                Err(error @ FindArtifactError::Refused { .. }) => {
                    tracing::warn!(%manifest, %place, "pass over an artifact: {error}");
                    self.parts.metrics.indexed("refused");
                }
                Err(error) => tracing::debug!(%manifest, %place, "look for an artifact: {error}"),
            }
        }
        None
    }

    /// Fetches and checks the index that an artifact has of a layer, unless it is on disk.
    async fn index_of_artifact(
        self: &Arc<Self>,
        layer: &ArtifactLayer,
        blobs: &IndexBlobs,
        sources: &[BlobOrigin],
        deadline: Instant,
    ) -> Result<Found, Refusal> {
        let pin = IndexPin {
            digest: blobs.digest,
            diff_id: layer.diff_id,
            blob_bytes: layer.blob_bytes,
            blob: PinnedBlob::Unmodified(layer.blob),
        };
        let source = IndexSource::Referrer;
        let known = self.blocking(move |inner| inner.parts.layers.indexes().get_checked(&pin));
        if let Ok(Some(index)) = known.await {
            return Ok(Found { pin, index, source });
        }
        let fetch = |reason: String| Refusal::new(RefusalKind::Fetch, reason);
        let invalid = |reason: String| Refusal::new(RefusalKind::Index, reason);
        let extent = Extent::from_length(0, blobs.bytes)
            .ok_or_else(|| invalid("the artifact names an index of no bytes".to_owned()))?;
        let blob = BlobDigest::from_hex(&blobs.digest.hex())
            .map_err(|error| invalid(error.to_string()))?;
        let mut context = ReadContext::new(Priority::Foreground);
        context.deadline = Some(deadline);
        let place = self.parts.layers.source(blob, blobs.bytes, sources);
        let check = |payload: &[u8]| check_digest(payload, pin.digest);
        let payload = read_checked(&*place, &context, extent, check).await;
        let payload = payload
            .map_err(|error| fetch(format!("fetch index: {error}")))?
            .map_err(|error| invalid(error.to_string()))?;
        self.parts.metrics.index_fetched(payload.len() as u64);
        self.parts.shelf.keep(pin.digest, &payload);
        let stored = self.blocking(move |inner| inner.parts.layers.indexes().put(&payload, &pin));
        let index = stored.await.map_err(|error| invalid(error.to_string()))?;
        let named = index.metadata().unmodified.and_then(|blob| blob.windows);
        if named != blobs.windows {
            let reason = "the index names another file of windows than its artifact";
            return Err(invalid(reason.to_owned()));
        }
        Ok(Found { pin, index, source })
    }

    /// Whether this node has an index of the blob that it may use: its own, or another node's.
    pub(super) fn has_usable_index(&self, blob: BlobDigest) -> bool {
        let indexes = &self.parts.node_indexes;
        match self.options.index_use.node {
            IndexUse::Off => false,
            IndexUse::Verify => indexes.has_own(blob),
            IndexUse::On => indexes.has(blob),
        }
    }

    /// The index that this node, or another one, made of the blob, as far as it may be used.
    async fn index_of_nodes(
        self: &Arc<Self>,
        pin: IndexPin,
        blob: BlobDigest,
    ) -> Result<Option<Found>, Refusal> {
        let found = self.blocking(move |inner| {
            let local = |error: std::io::Error| Refusal::new(RefusalKind::Local, error.to_string());
            if !inner.has_usable_index(blob) {
                return Ok(None);
            }
            let made = inner.parts.node_indexes.find(blob).map_err(local)?;
            let Some(made) = made else {
                return Ok(None);
            };
            let source = match made.from {
                None => IndexSource::Node,
                Some(_) => IndexSource::Peer,
            };
            let pin = IndexPin {
                digest: made.digest,
                ..pin
            };
            let indexes = inner.parts.layers.indexes();
            if let Some(windows) = &made.windows {
                indexes.keep_windows(pin.digest, windows).map_err(local)?;
            }
            match inner.stored(&made.payload, &pin) {
                Ok(index) => {
                    // For homes that open the layer on this node's behalf.
                    inner.parts.shelf.keep(pin.digest, &made.payload);
                    Ok(Some(Found { pin, index, source }))
                }
                Err(error @ LayerIndexError::Io { .. }) => {
                    Err(Refusal::new(RefusalKind::Local, error.to_string()))
                }
                // It rotted, another version of this program made it, or another node lied. It is made again.
                Err(error) => {
                    let from = made.from.as_deref().unwrap_or("this node");
                    tracing::warn!(%blob, from, "drop an index of no use: {error}");
                    inner.parts.node_indexes.remove(blob).map_err(local)?;
                    Ok(None)
                }
            }
        });
        found.await
    }

    /// The index on disk, written there if it is not. **Blocks**.
    pub(super) fn stored(
        &self,
        payload: &Bytes,
        pin: &IndexPin,
    ) -> Result<Arc<LayerIndex>, LayerIndexError> {
        let indexes = self.parts.layers.indexes();
        match indexes.get_checked(pin) {
            Ok(Some(index)) => Ok(index),
            Ok(None) | Err(_) => indexes.put(payload, pin),
        }
    }
}
