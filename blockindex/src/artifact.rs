// SPDX-License-Identifier: Apache-2.0
//! Index artifact: what makes an image lazy that nobody converted.
//!
//! An OCI 1.1 image manifest with an `artifactType` of its own, whose `subject` is the image's manifest:
//! registries list it as a referrer of that image, of which not a byte changes. For each layer it
//! names the layer index and, where there is one, the file of windows as blobs beside it, or says why
//! the layer cannot be lazy. A layer that it does not name is none of its business (converted by
//! Sluice, for one).
//!
//! ```text
//! Artifact::parse(bytes, subject)  -> Artifact          who, which blobs: checked against each other
//! ArtifactLayer::accept(payload)   -> Index             validated, and of this very blob and layer
//! ```
//!
//! Anybody who may push to the repository can push an artifact. Nothing in one is believed beyond what
//! the blobs themselves prove: an index names its blob, its size, its diff ID and its file of windows, and
//! must agree with the artifact; an artifact that names another subject than the one it was found by is
//! refused.
//!
//! **Order.** Of several valid artifacts of one image the one with the highest *generation* counts, of
//! equal ones that with the greatest digest. No clock is involved: whoever replaces an artifact counts on.
//!
//! The JSON is in `docs/formats/index-artifact.md`.

mod accept;
mod error;
mod json;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use crate::annotations::{INDEX_MAX_BYTES, REASON_MAX_BYTES};
use crate::digest::{BlobDigest, DiffId, IndexDigest, ManifestDigest};
use crate::index::WindowsPin;
use crate::windows::{HEADER_BYTES, WINDOWS_MAX_BYTES};

pub use accept::AcceptError;
pub use error::ArtifactError;
pub use json::generation_of;

/// The `artifactType`. What a reader of version 1 could not understand gets another one.
pub const ARTIFACT_TYPE: &str = "application/vnd.sluice.index.v1";
/// Media type of a compressed layer index.
pub const INDEX_TYPE: &str = "application/vnd.sluice.layer-index.v1+zstd";
/// Media type of a file of windows.
pub const WINDOWS_TYPE: &str = "application/vnd.sluice.windows.v1";
/// Media type of an entry that stands for a layer without an index; its blob is [`EMPTY_JSON`].
pub const NOT_LAZY_TYPE: &str = "application/vnd.sluice.not-lazy.v1";
/// Media type of the config.
pub const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// Media type of the artifact's manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's manifest; an image may have one.
const DOCKER_MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// The config's bytes: OCI's empty value.
pub const EMPTY_JSON: &[u8] = b"{}";

/// Annotation of an entry: digest of the image's blob.
pub const BLOB: &str = "sluice.blob";
/// Annotation of an entry: size of that blob in bytes, decimal.
pub const BLOB_SIZE: &str = "sluice.blob.size";
/// Annotation of an entry: diff ID of the layer.
pub const DIFF: &str = "sluice.diff";
/// Annotation of a [`NOT_LAZY_TYPE`] entry: why.
pub const NOT_LAZY: &str = "sluice.not-lazy";
/// Annotation of the manifest: its generation, decimal, from 1.
pub const GENERATION: &str = "sluice.generation";
/// Annotation of the manifest: names what decides the bytes of its indexes besides the blobs. Only those
/// who write look at it, to see whether they would write the same.
pub const RECIPE: &str = "sluice.recipe";

/// The most bytes of an artifact's manifest: what every registry takes at least.
pub const ARTIFACT_MAX_BYTES: u64 = 4 * 1024 * 1024;
/// The most layers of an artifact, as of a boot list. Overlayfs and the kernel's EROFS take fewer.
pub const LAYERS_MAX: usize = 512;
/// The most bytes of the subject; larger manifests are read nowhere in Sluice.
pub const SUBJECT_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// The most bytes of a recipe.
pub const RECIPE_MAX_BYTES: usize = 64;

/// The manifest of the image that an artifact is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Its media type: of one image, not of an index.
    pub media_type: String,
    /// Its digest.
    pub digest: ManifestDigest,
    /// Its size.
    pub bytes: u64,
}

/// A checked artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The image.
    pub subject: Subject,
    /// The higher one counts; from 1.
    pub generation: u32,
    /// What its writer says of how its indexes were made; empty: nothing.
    pub recipe: String,
    /// What it says of layers, each once, in the order of the image.
    pub layers: Vec<ArtifactLayer>,
}

/// What an artifact says of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactLayer {
    /// The image's blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Diff ID of the layer.
    pub diff_id: DiffId,
    /// Its index, or why it has none, in at most [`REASON_MAX_BYTES`] bytes.
    pub index: Result<IndexBlobs, String>,
}

/// The blobs that are the index of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexBlobs {
    /// Digest of the compressed index, which is a blob of the artifact's repository.
    pub digest: IndexDigest,
    /// Its size.
    pub bytes: u64,
    /// The file of windows, another blob there.
    pub windows: Option<WindowsPin>,
}

impl Artifact {
    /// The entry of a layer of the image, if there is one.
    ///
    /// **Errors** there is one of this blob, but it speaks of another size or diff ID.
    pub fn layer(
        &self,
        blob: BlobDigest,
        blob_bytes: u64,
        diff_id: DiffId,
    ) -> Result<Option<&ArtifactLayer>, ArtifactError> {
        let Some(found) = self.layers.iter().find(|layer| layer.blob == blob) else {
            return Ok(None);
        };
        let disagrees = |what, expected: String, actual: String| ArtifactError::Disagrees {
            blob,
            what,
            expected,
            actual,
        };
        if found.blob_bytes != blob_bytes {
            let (expected, actual) = (blob_bytes.to_string(), found.blob_bytes.to_string());
            return Err(disagrees("size", expected, actual));
        }
        if found.diff_id != diff_id {
            let (expected, actual) = (diff_id.to_string(), found.diff_id.to_string());
            return Err(disagrees("diff ID", expected, actual));
        }
        Ok(Some(found))
    }

    /// Whether both say the same of the same image, whatever their generations.
    #[must_use]
    pub fn says_the_same(&self, other: &Self) -> bool {
        (&self.subject, &self.recipe, &self.layers)
            == (&other.subject, &other.recipe, &other.layers)
    }

    /// The rules that hold whatever the notation.
    fn check(&self) -> Result<(), ArtifactError> {
        let Subject {
            media_type, bytes, ..
        } = &self.subject;
        if media_type != MANIFEST_TYPE && media_type != DOCKER_MANIFEST_TYPE {
            return Err(ArtifactError::Type {
                what: "subject",
                media_type: error::cut(media_type),
            });
        }
        error::within("subject", *bytes, 1, SUBJECT_MAX_BYTES)?;
        error::within("generation", self.generation.into(), 1, u32::MAX.into())?;
        let recipe_bytes = self.recipe.len() as u64;
        error::within("recipe", recipe_bytes, 0, RECIPE_MAX_BYTES as u64)?;
        let count = self.layers.len() as u64;
        error::within("layers", count, 1, LAYERS_MAX as u64)?;
        let (mut blobs, mut indexes) = (BTreeSet::new(), BTreeSet::new());
        for layer in &self.layers {
            if !blobs.insert(layer.blob) {
                let (what, digest) = ("blob", layer.blob.to_string());
                return Err(ArtifactError::Duplicate { what, digest });
            }
            // What the OCI specification can say; nothing is allocated by it.
            error::within("blob", layer.blob_bytes, 1, i64::MAX.unsigned_abs())?;
            match &layer.index {
                Ok(index) => {
                    error::within("index", index.bytes, 1, INDEX_MAX_BYTES)?;
                    if let Some(windows) = index.windows {
                        let least = HEADER_BYTES + 1;
                        error::within("windows", windows.bytes, least, WINDOWS_MAX_BYTES)?;
                    }
                    // An index is of one blob; windows may be alike where only headers differ.
                    if !indexes.insert(index.digest) {
                        let (what, digest) = ("index", index.digest.to_string());
                        return Err(ArtifactError::Duplicate { what, digest });
                    }
                }
                Err(reason) => {
                    let bytes = reason.len() as u64;
                    error::within("reason", bytes, 1, REASON_MAX_BYTES as u64)?;
                }
            }
        }
        Ok(())
    }
}

/// A reason as an artifact can hold it: cut at a character boundary, and never empty.
#[must_use]
pub fn reason_of(text: &str) -> String {
    let text = match text.is_empty() {
        true => "no reason given",
        false => text,
    };
    text[..text.floor_char_boundary(REASON_MAX_BYTES)].to_owned()
}
