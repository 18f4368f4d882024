// SPDX-License-Identifier: Apache-2.0
//! Layers that say of themselves that they were converted.
//!
//! Whoever wrote the source's manifest could have written the annotations, so they are believed as
//! far as they can be checked at the price of the copy:
//!
//! - the index that they pin is read (one range) and must be sound, of their digest, and of the
//!   config's diff ID; else the layer is converted like any other. It is not read if the
//!   destination's present image has the blob and says the same of it;
//! - when the blob moves through here, or with `--force`, its tar must have the diff ID. A blob that
//!   the destination has or can mount is not read for that.
//!
//! Of a layer that has a table of contents, for a conversion to its format, the same is done with that.

use super::toc::toc_is_sound;
use super::{Conversion, ConvertError, ImagePlan, LayerReporter, Outcome, PlannedLayer, Transfer};
use crate::inspect::{InspectError, read_index};
use crate::pack::check;

impl Conversion {
    /// Brings the layer to the destination as it is; `None` if it is not what its annotations say.
    pub(super) async fn copy_as_annotated(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
        annotated: &Outcome,
        reporter: LayerReporter<'_>,
    ) -> Result<Option<Transfer>, ConvertError> {
        let descriptor = &layer.descriptor;
        if descriptor.is_encrypted() {
            return Ok(Some(self.pusher.copy(descriptor, reporter).await?));
        }
        if !self.index_is_sound(layer, annotated).await? {
            return Ok(None);
        }
        if !self.options.force
            && let Some(transfer) = self.pusher.place(descriptor).await?
        {
            return Ok(Some(transfer));
        }
        let checked = self.stream(layer, check).await?;
        let spool = checked.map_err(Self::layer_error(plan, layer))?;
        let (digest, bytes) = (descriptor.digest, descriptor.size);
        let sent = self.pusher.send(digest, bytes, spool, reporter).await?;
        Ok(Some(sent))
    }

    /// Whether the annotated index is what the annotations say; a layer without one has none to check.
    async fn index_is_sound(
        &self,
        layer: &PlannedLayer,
        annotated: &Outcome,
    ) -> Result<bool, ConvertError> {
        let annotations = match annotated {
            Outcome::Lazy(annotations) => annotations,
            Outcome::Toc(toc) => return toc_is_sound(&*self.source, toc).await,
            Outcome::NotLazy { .. } | Outcome::Foreign => return Ok(true),
        };
        let descriptor = &layer.descriptor;
        if self.reusable.confirms(annotations)
            && self.pusher.has(descriptor.digest, descriptor.size).await?
        {
            return Ok(true);
        }
        match read_index(&*self.source, descriptor, annotations, false).await {
            Ok(_) => Ok(true),
            Err(InspectError::Image(error)) => Err(error.into()),
            Err(error) => {
                let blob = descriptor.digest;
                tracing::warn!(%blob, "layer is not as annotated, converting it: {error}");
                Ok(false)
            }
        }
    }
}
