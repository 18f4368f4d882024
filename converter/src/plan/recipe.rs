// SPDX-License-Identifier: Apache-2.0
//! How layers are made. Pure.

use std::fmt;

use sluice_blockindex::encode::EncodeOptions;
use sluice_blockindex::toc::TocFormat;
use sluice_blockindex::toc::write::TocOptions;

use super::{LayerFormat, RECIPE_NAME};
use crate::image::Descriptor;

/// Names everything about the encoder that decides the bytes of a converted layer. To be changed with any
/// change of it, of the default level or of the default chunk size: a stale value would keep old blobs.
const ENCODER: &str = "3";
/// The same for the encoder of layers with a table of contents.
const TOC_ENCODER: &str = "2";

/// What decides the bytes of a converted layer besides its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// In which format.
    pub format: LayerFormat,
    /// Level of zstd, of eStargz that of gzip.
    pub level: i32,
    /// About how many bytes of the tar a chunk has.
    pub chunk_bytes: u64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self::of(LayerFormat::default())
    }
}

impl Recipe {
    /// The usual one of a format.
    pub fn of(format: LayerFormat) -> Self {
        Self {
            format,
            level: format.default_level(),
            chunk_bytes: EncodeOptions::default().chunk_bytes,
        }
    }

    /// As the encoder takes it.
    pub fn options(&self) -> EncodeOptions {
        EncodeOptions {
            level: self.level,
            chunk_bytes: self.chunk_bytes,
            ..EncodeOptions::default()
        }
    }

    /// As the encoder of this format takes it.
    pub fn toc_options(&self, format: TocFormat) -> TocOptions {
        TocOptions {
            format,
            level: self.level,
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// Whether an annotated layer was made by this recipe.
    pub fn made(&self, layer: &Descriptor) -> bool {
        let annotated = layer.annotations.get(RECIPE_NAME);
        annotated.is_some_and(|annotated| *annotated == self.to_string())
    }
}

/// The value of the annotation. What is as usual is not named, so that images that were converted before
/// there was a choice need not be converted again.
impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let usual = Self::of(self.format);
        match self.format {
            LayerFormat::Sluice => f.write_str(ENCODER)?,
            LayerFormat::Toc(format) => write!(f, "{};{TOC_ENCODER}", format.as_str())?,
        }
        if self.level != usual.level {
            write!(f, ";level={}", self.level)?;
        }
        if self.chunk_bytes != usual.chunk_bytes {
            write!(f, ";chunk={}", self.chunk_bytes)?;
        }
        Ok(())
    }
}
