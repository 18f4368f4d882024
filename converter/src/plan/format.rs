// SPDX-License-Identifier: Apache-2.0
//! Which format layers are written in, and what becomes of a layer in one that others read too. Pure.

use std::collections::BTreeMap;
use std::fmt;

use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::frames::DEFAULT_LEVEL;
use sluice_blockindex::toc::{
    ESTARGZ_DIGEST, ESTARGZ_TAR_BYTES, TocFormat, TocPin, ZSTD_CHUNKED_CHECKSUM,
    ZSTD_CHUNKED_HEADERS, ZSTD_CHUNKED_POSITION,
};

use super::{Action, ImagePlan, Outcome, PlannedLayer};
use crate::image::Descriptor;
use crate::image::document::{OCI_LAYER_GZIP, OCI_LAYER_ZSTD};

/// Annotation of such a layer: diff ID of the layer that it was made from.
pub const SOURCE_DIFF: &str = "sluice.source.diff";
/// Annotation of such a layer: its diff ID, if that is another.
pub const DIFF: &str = "sluice.diff-id";
/// Annotation of a layer that has no table of contents (TOC): why.
pub const NO_TOC: &str = "sluice.no-toc";

/// What pins a TOC.
const PINS: [&str; 5] = [
    ESTARGZ_DIGEST,
    ESTARGZ_TAR_BYTES,
    ZSTD_CHUNKED_CHECKSUM,
    ZSTD_CHUNKED_POSITION,
    ZSTD_CHUNKED_HEADERS,
];

/// gzip's own default: the highest level takes twice the time for some hundredths.
const GZIP_LEVEL: i32 = 6;

/// The format of layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum LayerFormat {
    /// Sluice's own.
    #[default]
    Sluice,
    /// One with a TOC.
    Toc(TocFormat),
}

impl LayerFormat {
    /// All there are.
    pub const ALL: [Self; 3] = [
        Self::Sluice,
        Self::Toc(TocFormat::ZstdChunked),
        Self::Toc(TocFormat::Estargz),
    ];

    /// As users name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sluice => "sluice",
            Self::Toc(format) => format.as_str(),
        }
    }

    /// Reads what users name. **Errors**: a message with what there is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|it| it.as_str() == text);
        known.ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str);
            format!("want one of {}", names.join(", "))
        })
    }

    /// The level of compression, if nobody chose one.
    pub const fn default_level(self) -> i32 {
        match self {
            Self::Toc(TocFormat::Estargz) => GZIP_LEVEL,
            Self::Sluice | Self::Toc(TocFormat::ZstdChunked) => DEFAULT_LEVEL,
        }
    }

    /// The highest level of compression.
    pub const fn level_max(self) -> i32 {
        match self {
            Self::Toc(TocFormat::Estargz) => 9,
            Self::Sluice | Self::Toc(TocFormat::ZstdChunked) => 22,
        }
    }
}

impl fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A layer in a format with a TOC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocBlob {
    /// Of the blob.
    pub media_type: String,
    /// Its digest.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Its diff ID: of eStargz another than the layer had.
    pub diff_id: DiffId,
    /// The annotations that pin the TOC, or why it has none.
    pub toc: Result<BTreeMap<String, String>, String>,
}

impl TocBlob {
    /// The blob as a descriptor with nothing more than the pins.
    pub fn descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(&self.media_type, self.blob, self.blob_bytes);
        descriptor.annotations = self.toc.clone().unwrap_or_default();
        descriptor
    }

    /// What its descriptor says of it, made from a layer of this diff ID.
    pub fn to_map(&self, source_diff: DiffId) -> BTreeMap<String, String> {
        let mut map = match &self.toc {
            Ok(pins) => pins.clone(),
            Err(reason) => BTreeMap::from([(NO_TOC.to_owned(), reason.clone())]),
        };
        map.insert(SOURCE_DIFF.to_owned(), source_diff.to_string());
        if self.diff_id != source_diff {
            map.insert(DIFF.to_owned(), self.diff_id.to_string());
        }
        map
    }

    /// Reads [`Self::to_map`], with the diff ID of the layer that it was made from; `None` where that is not said.
    pub fn of_annotations(descriptor: &Descriptor) -> Option<(DiffId, Self)> {
        let annotations = &descriptor.annotations;
        let source_diff = annotations.get(SOURCE_DIFF)?.parse().ok()?;
        let diff_id = annotations.get(DIFF).map(|text| text.parse()).transpose();
        Some((
            source_diff,
            Self {
                media_type: descriptor.media_type.clone(),
                blob: descriptor.digest,
                blob_bytes: descriptor.size,
                diff_id: diff_id.ok()?.unwrap_or(source_diff),
                toc: toc_of(descriptor)?,
            },
        ))
    }
}

/// What a descriptor pins of a TOC, or why there is none; `None` where it says neither.
fn toc_of(descriptor: &Descriptor) -> Option<Result<BTreeMap<String, String>, String>> {
    match descriptor.annotations.get(NO_TOC) {
        Some(reason) => Some(Err(reason.clone())),
        None => pins(descriptor).map(Ok),
    }
}

fn pins(descriptor: &Descriptor) -> Option<BTreeMap<String, String>> {
    let get = |name: &str| descriptor.annotations.get(name);
    TocPin::of_annotations(|name| get(name).map(String::as_str)).ok()??;
    let pins = descriptor.annotations.iter();
    let pins = pins.filter(|(name, _)| PINS.contains(&name.as_str()));
    Some(
        pins.map(|(name, text)| (name.clone(), text.clone()))
            .collect(),
    )
}

/// The media type of layers in a format.
pub fn media_type(format: TocFormat) -> &'static str {
    match format {
        TocFormat::Estargz => OCI_LAYER_GZIP,
        TocFormat::ZstdChunked => OCI_LAYER_ZSTD,
    }
}

/// Changes what is done to the layers of an image to what is wanted in this format.
pub fn aim(plan: &mut ImagePlan, format: LayerFormat) {
    let LayerFormat::Toc(format) = format else {
        return;
    };
    for layer in &mut plan.layers {
        if layer.action != Action::Foreign && !layer.descriptor.is_encrypted() {
            layer.action = match of_format(layer, format) {
                Some(blob) => Action::Copy(Outcome::Toc(blob)),
                None => Action::Convert,
            };
        }
    }
}

/// The layer as it is, if its annotations say that it has this format, or that it cannot have it.
fn of_format(layer: &PlannedLayer, format: TocFormat) -> Option<TocBlob> {
    let descriptor = &layer.descriptor;
    let ending = match format {
        TocFormat::Estargz => "gzip",
        TocFormat::ZstdChunked => "zstd",
    };
    if !descriptor.media_type.ends_with(ending) {
        return None;
    }
    Some(TocBlob {
        media_type: descriptor.media_type.clone(),
        blob: descriptor.digest,
        blob_bytes: descriptor.size,
        diff_id: layer.diff_id,
        toc: toc_of(descriptor)?,
    })
}
