// SPDX-License-Identifier: Apache-2.0
//! Layers in formats that others read too: eStargz and zstd:chunked, with a table of contents (TOC).
//!
//! zstd:chunked keeps diff IDs. eStargz ends the tar with its TOC, so the diff IDs are others, and a config that names
//! them takes the place of the image's.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;

use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::toc::{Toc, TocFormat, TocLayer, TocPin};

use super::{
    Conversion, ConvertError, How, ImagePlan, LayerReporter, Outcome, PlannedLayer, Transfer,
};
use crate::image::{ImageError, ImageReader, read_small};
use crate::inspect::{InspectError, wrong};
use crate::pack::{PackedToc, pack_toc};
use crate::plan::{PlanError, TocBlob, media_type, with_diff_ids};
use crate::report::Event;

impl Conversion {
    /// Packs the layer into the format and sends it.
    pub(super) async fn pack_toc_and_send(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
        format: TocFormat,
        reporter: LayerReporter<'_>,
    ) -> Result<(Outcome, Transfer, How), ConvertError> {
        let (pool, budget) = (Arc::clone(&self.pool), Arc::clone(&self.budget));
        let options = self.options.recipe.toc_options(format);
        let packing = self.stream(layer, move |input, body, spool, progress| {
            pack_toc(input, options, body, spool, (&pool, &budget), progress)
        });
        let packed: PackedToc = packing.await?.map_err(Self::layer_error(plan, layer))?;
        let outcome = Outcome::Toc(TocBlob {
            media_type: media_type(format).to_owned(),
            blob: packed.blob,
            blob_bytes: packed.blob_bytes,
            diff_id: packed.diff_id,
            toc: packed.toc,
        });
        let sent = self
            .pusher
            .send(packed.blob, packed.blob_bytes, packed.spool, reporter);
        Ok((outcome, sent.await?, How::Converted))
    }

    /// The image as it is planned, with a config that names the diff IDs of what its layers became. Nothing is
    /// stored where they are as they were.
    pub(super) async fn with_diff_ids(
        &self,
        plan: &ImagePlan,
        outcomes: &[Outcome],
    ) -> Result<Option<ImagePlan>, ConvertError> {
        let now = plan.layers.iter().zip(outcomes);
        let now: Vec<DiffId> = now
            .map(|(layer, outcome)| match outcome {
                Outcome::Toc(toc) => toc.diff_id,
                Outcome::Lazy(_) | Outcome::NotLazy { .. } | Outcome::Foreign => layer.diff_id,
            })
            .collect();
        let pairs = plan.layers.iter().zip(&now);
        let changed = pairs.filter(|(layer, now)| layer.diff_id != **now).count();
        if changed == 0 {
            return Ok(None);
        }
        let mut plan = plan.clone();
        let before = plan.config.digest;
        let config = read_small(&*self.source, &plan.config).await?;
        let config = with_diff_ids(&config, &now).map_err(|e| PlanError::Inconsistent {
            manifest: plan.source.digest,
            reason: format!("config {before}: {e}"),
        })?;
        plan.config_digest = sluice_blockindex::digest::ConfigDigest::of(&config);
        plan.config.digest = BlobDigest::of(&config);
        plan.config.size = config.len() as u64;
        // Inlined content would be that of the old config.
        plan.config.other.remove("data");
        let mut spool = self.pusher.spool()?;
        let digest = plan.config.digest;
        let spooled = spool.write_all(&config);
        spooled.map_err(|e| ImageError::failed("spool", digest, e))?;
        let sent = self.pusher.send(
            digest,
            plan.config.size,
            Arc::new(spool),
            LayerReporter::silent(),
        );
        sent.await?;
        self.reporter.event(&Event::DiffIdsChanged {
            platform: plan.platform.to_string(),
            layers: changed as u64,
            config_before: before.to_string(),
            config: digest.to_string(),
        });
        Ok(Some(plan))
    }
}

/// Whether the blob has the TOC that its pins say, and it is one that makes the layer lazy. Whether it is true
/// only the blob tells.
///
/// **Errors**: it could not be read.
pub(super) async fn toc_is_sound(
    reader: &dyn ImageReader,
    toc: &TocBlob,
) -> Result<bool, ConvertError> {
    let Ok(pins) = &toc.toc else {
        return Ok(true);
    };
    match read_toc(reader, toc, pins).await {
        Ok(()) => Ok(true),
        Err(InspectError::Image(error)) => Err(error.into()),
        // Not the TOC's fault: whoever was to check it died.
        Err(InspectError::Io(error)) => Err(ConvertError::Run(error.to_string())),
        Err(InspectError::Content(error)) => {
            let blob = toc.blob;
            tracing::warn!(%blob, "layer is not as annotated, converting it: {error}");
            Ok(false)
        }
    }
}

/// Reads the TOC that these annotations pin, and makes an index of it as a node does.
async fn read_toc(
    reader: &dyn ImageReader,
    toc: &TocBlob,
    pins: &BTreeMap<String, String>,
) -> Result<(), InspectError> {
    let (blob, blob_bytes, diff_id) = (toc.blob, toc.blob_bytes, toc.diff_id);
    let pin = TocPin::of_annotations(|name| pins.get(name).map(String::as_str)).map_err(wrong)?;
    let pin = pin.ok_or_else(|| wrong("no table of contents is pinned"))?;
    let first = pin.first_read(blob_bytes).map_err(wrong)?;
    let mut bytes = reader.range(blob, blob_bytes, first).await?;
    let place = pin.locate(&bytes, blob_bytes).map_err(wrong)?;
    if place.extent != first {
        bytes = reader.range(blob, blob_bytes, place.extent).await?;
    }
    let checking = tokio::task::spawn_blocking(move || {
        let toc = Toc::open(&pin, &place, &bytes)?;
        toc.index(&TocLayer {
            blob,
            blob_bytes,
            diff_id,
            writer: "",
        })
    });
    let checked = checking.await.map_err(std::io::Error::other)?;
    checked.map(drop).map_err(wrong)
}
