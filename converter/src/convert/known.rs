// SPDX-License-Identifier: Apache-2.0
//! Layers that need not be converted, besides those of the destination's present image: an earlier image of
//! the same call had them, or an earlier call, which may have been interrupted, left a record.
//!
//! What this call converted is known by diff ID: the bytes of a converted layer follow from its tar, and
//! that the tar has the diff ID was checked. A layer that names the same diff ID is that layer, whatever
//! blob it would come from. It is mounted or copied from where the first image went. Of an earlier call
//! only the record is there, so the destination must have the blob, and its index must be sound.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sluice_blockindex::digest::{BlobDigest, DiffId};

use super::toc::toc_is_sound;
use super::{
    Conversion, ConvertError, How, ImagePlan, LayerReporter, Outcome, PlannedLayer, Transfer,
};
use crate::image::document::OCI_LAYER_ZSTD;
use crate::image::{Descriptor, ImageReader};
use crate::inspect::{InspectError, read_index};
use crate::records::{Key, Records};

/// What the images of one call share.
#[derive(Debug, Default)]
pub struct Known {
    records: Option<Records>,
    converted: Mutex<HashMap<DiffId, Converted>>,
}

/// A layer of an image before.
#[derive(Debug, Clone)]
struct Converted {
    outcome: Outcome,
    at: Arc<dyn ImageReader>,
}

impl Known {
    /// Nothing yet, but for what `records` say.
    pub fn new(records: Option<Records>) -> Self {
        Self {
            records,
            converted: Mutex::default(),
        }
    }

    fn converted(&self) -> MutexGuard<'_, HashMap<DiffId, Converted>> {
        self.converted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A layer that was known, and how it came to the destination.
type Brought = (Outcome, Transfer, How);

impl Conversion {
    /// The layer, if it is known, once the destination has it.
    pub(super) async fn bring_known(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
        reporter: LayerReporter<'_>,
    ) -> Result<Option<Brought>, ConvertError> {
        if let Some(outcome) = self.reuse(plan, layer).await? {
            return Ok(Some((outcome, Transfer::Present, How::Reused)));
        }
        if let Some(brought) = self.bring_shared(layer, reporter).await? {
            return Ok(Some(brought));
        }
        let outcome = self.recorded(layer).await?;
        Ok(outcome.map(|outcome| (outcome, Transfer::Present, How::Reused)))
    }

    /// A layer that another image of this call had.
    async fn bring_shared(
        &self,
        layer: &PlannedLayer,
        reporter: LayerReporter<'_>,
    ) -> Result<Option<Brought>, ConvertError> {
        let known = self.options.known.converted().get(&layer.diff_id).cloned();
        let Some(Converted { outcome, at }) = known else {
            return Ok(None);
        };
        let Some(blob) = descriptor_of(&outcome) else {
            return Ok(None);
        };
        let transfer = self.pusher.copy_from(&*at, &blob, reporter).await?;
        Ok(Some((outcome, transfer, How::Shared)))
    }

    /// What an earlier call made of the layer, if the destination has it and it is sound.
    async fn recorded(&self, layer: &PlannedLayer) -> Result<Option<Outcome>, ConvertError> {
        let records = self.options.known.records.as_ref();
        let Some(records) = records.filter(|_| !self.options.force) else {
            return Ok(None);
        };
        let Some(outcome) = records.find(&self.key(layer)) else {
            return Ok(None);
        };
        let Some(blob) = descriptor_of(&outcome) else {
            return Ok(None);
        };
        if !self.pusher.has(blob.digest, blob.size).await? {
            return Ok(None);
        }
        let annotations = match &outcome {
            Outcome::Lazy(annotations) => annotations,
            Outcome::Toc(toc) => {
                let sound = toc_is_sound(&*self.destination, toc).await?;
                return Ok(sound.then_some(outcome));
            }
            Outcome::NotLazy { .. } | Outcome::Foreign => return Ok(Some(outcome)),
        };
        match read_index(&*self.destination, &blob, annotations, false).await {
            Ok(_) => Ok(Some(outcome)),
            Err(InspectError::Image(error)) => Err(error.into()),
            Err(error) => {
                let blob = blob.digest;
                tracing::warn!(%blob, "blob is not as recorded, converting its layer: {error}");
                Ok(None)
            }
        }
    }

    /// Remembers a layer that the destination has now; with a record if it was converted just now.
    ///
    /// A layer that others converted is believed for the image that says so, not for images that do not:
    /// only what we checked, now or when the record was made, goes on to further ones.
    pub(super) fn remember_layer(&self, layer: &PlannedLayer, outcome: &Outcome, how: How) {
        let known = &self.options.known;
        let checked = || match how {
            How::Converted | How::Shared => true,
            How::Copied => false,
            How::Reused => {
                let records = known.records.as_ref();
                let recorded = records.and_then(|records| records.find(&self.key(layer)));
                recorded.is_some_and(|recorded| blob_of(&recorded) == blob_of(outcome))
            }
        };
        if let Outcome::Lazy(_) | Outcome::Toc(_) = outcome
            && checked()
        {
            let converted = Converted {
                outcome: outcome.clone(),
                at: Arc::<dyn crate::image::ImageWriter>::clone(&self.destination),
            };
            known.converted().entry(layer.diff_id).or_insert(converted);
        }
        if let Some(records) = known.records.as_ref().filter(|_| how == How::Converted) {
            records.put(&self.key(layer), outcome);
        }
    }

    fn key(&self, layer: &PlannedLayer) -> Key {
        Key {
            source: layer.descriptor.digest,
            diff_id: layer.diff_id,
            recipe: self.options.recipe,
        }
    }
}

fn blob_of(outcome: &Outcome) -> Option<BlobDigest> {
    descriptor_of(outcome).map(|blob| blob.digest)
}

/// The blob that a layer became; `None` for one that is elsewhere.
fn descriptor_of(outcome: &Outcome) -> Option<Descriptor> {
    match outcome {
        Outcome::Lazy(annotations) => {
            let (blob, bytes) = (annotations.blob, annotations.blob_bytes);
            Some(Descriptor::new(OCI_LAYER_ZSTD, blob, bytes))
        }
        Outcome::Toc(toc) => Some(toc.descriptor()),
        Outcome::NotLazy {
            media_type,
            blob,
            blob_bytes,
            ..
        } => Some(Descriptor::new(media_type, *blob, *blob_bytes)),
        Outcome::Foreign => None,
    }
}
