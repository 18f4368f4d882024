// SPDX-License-Identifier: Apache-2.0
//! Layers whose blobs Sluice did not write: which index they may use, if any.
//!
//! | index | used when | trusted because |
//! | --- | --- | --- |
//! | of this node | `[index] node` is not `off` | it was made of the blob itself, and held against the image's diff ID |
//! | of an artifact that refers to the image | `[index] referrer` is `on` | who may push to the repository made it; the seal proves the bytes |
//!
//! The first of these that is there counts. Where there is none the layer is unpacked the ordinary way, and this node
//! makes an index meanwhile ([`super::index_job`]).

use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::chunkmap::Access;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};
use tokio::time::Instant;

use super::Inner;
use crate::config::IndexUse;
use crate::indexes::{IndexPin, LayerIndex, LayerIndexError};
use crate::plan::{LayoutLayer, Outcome, PlannedLayer, Refusal, RefusalKind};
use crate::snapshots::{BlobOrigin, IndexSource, LazyLayerRecord};

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
        origins: &[BlobOrigin],
        _deadline: Instant,
        refusal: Refusal,
    ) -> Outcome {
        let descriptor = layer.descriptor.as_ref();
        let Some(descriptor) = descriptor.filter(|it| it.urls.is_empty()) else {
            return Err(refusal);
        };
        let Ok(blob) = descriptor.digest.parse::<BlobDigest>() else {
            return Err(refusal);
        };
        let pin = IndexPin {
            // Until it is known.
            digest: IndexDigest::of(&[]),
            diff_id: layer.diff_id,
            blob_bytes: descriptor.size_bytes,
            unmodified: Some(blob),
        };
        let Some(found) = self.index_of_this_node(pin).await? else {
            let refusal = match self.index_jobs.unfit(blob) {
                Some(reason) => {
                    let reason = format!("not lazy: no index can be made of it: {reason}");
                    Refusal::new(RefusalKind::NotLazy, reason)
                }
                None => refusal,
            };
            return Err(refusal);
        };
        let Found { pin, index, source } = found;
        if index.chunk_map().access() == Access::Prefix {
            let reason =
                "not lazy: its blob is one long zstd frame, which can only be read from its front";
            return Err(Refusal::new(RefusalKind::NotLazy, reason));
        }
        let sources = self.trusted_sources(blob, origins).await?;
        let record = LazyLayerRecord {
            chain_id: layer.chain_id,
            diff_id: layer.diff_id,
            index_digest: pin.digest,
            blob_digest: blob,
            blob_bytes: descriptor.size_bytes,
            device_bytes: index.device_bytes(),
            sources,
            index_source: source,
        };
        Ok(Arc::new(PlannedLayer { record, index }))
    }

    /// The index that this node made of the blob.
    async fn index_of_this_node(self: &Arc<Self>, pin: IndexPin) -> Result<Option<Found>, Refusal> {
        let Some(blob) = pin.unmodified else {
            return Ok(None);
        };
        if self.options.index_use.node == IndexUse::Off {
            return Ok(None);
        }
        let found = self.blocking(move |inner| {
            let local = |error: std::io::Error| Refusal::new(RefusalKind::Local, error.to_string());
            let made = inner.parts.node_indexes.find(blob).map_err(local)?;
            let Some(made) = made else {
                return Ok(None);
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
                Ok(index) => Ok(Some((pin, index))),
                Err(error @ LayerIndexError::Io { .. }) => {
                    Err(Refusal::new(RefusalKind::Local, error.to_string()))
                }
                // It rotted, or another version of this program made it. It is made again.
                Err(error) => {
                    tracing::warn!(%blob, "drop an index that this node made: {error}");
                    inner.parts.node_indexes.remove(blob).map_err(local)?;
                    Ok(None)
                }
            }
        });
        let found = found.await?;
        Ok(found.map(|(pin, index)| Found {
            pin,
            index,
            source: IndexSource::Node,
        }))
    }

    /// The index on disk, written there if it is not. **Blocks**.
    fn stored(&self, payload: &Bytes, pin: &IndexPin) -> Result<Arc<LayerIndex>, LayerIndexError> {
        let indexes = self.parts.layers.indexes();
        match indexes.get_checked(pin) {
            Ok(Some(index)) => Ok(index),
            Ok(None) | Err(_) => indexes.put(payload, pin),
        }
    }
}
