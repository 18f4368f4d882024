// SPDX-License-Identifier: Apache-2.0
//! The few fields of image manifests and configs that the daemon reads (OCI and Docker schema 2).
//!
//! Pure. Unknown fields are ignored; nothing is written back from these types.

use std::collections::BTreeMap;

use serde::Deserialize;
use sluice_blockindex::digest::DiffId;

/// Why a document is no manifest or config.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not JSON, or a field is missing or has another type.
    #[error("parse: {0}")]
    Json(#[from] serde_json::Error),
    /// A diff ID is not `sha256:<hex>`.
    #[error("diff ID {0:?} is not a sha256 digest")]
    DiffId(String),
    /// There are more layers than an overlay mount could ever hold.
    #[error("{0} layers are too many")]
    TooManyLayers(usize),
}

/// More layers than this are refused: containerd and the kernel stop at 128 and 500 lowers.
const LAYER_CAP: usize = 1024;

/// A reference from a manifest to a blob.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type.
    #[serde(default)]
    pub media_type: String,
    /// `sha256:<hex>`.
    pub digest: String,
    /// Bytes.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// All annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Alternative addresses; a layer that has some is foreign and not in the registry.
    #[serde(default)]
    pub urls: Vec<String>,
}

/// An image manifest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Manifest {
    /// The image config.
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

impl Manifest {
    /// Parses a manifest.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = serde_json::from_slice(bytes)?;
        if manifest.layers.len() > LAYER_CAP {
            return Err(ManifestError::TooManyLayers(manifest.layers.len()));
        }
        Ok(manifest)
    }
}

/// An entry of an index of manifests.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct ManifestList {
    /// One manifest for each platform.
    pub manifests: Vec<Descriptor>,
}

impl ManifestList {
    /// Parses an index of manifests.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

/// An image config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Lowest layer first.
    pub diff_ids: Vec<DiffId>,
}

#[derive(Deserialize)]
struct RawConfig {
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl Config {
    /// Parses an image config.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let raw: RawConfig = serde_json::from_slice(bytes)?;
        if raw.rootfs.diff_ids.len() > LAYER_CAP {
            return Err(ManifestError::TooManyLayers(raw.rootfs.diff_ids.len()));
        }
        let diff_ids = raw
            .rootfs
            .diff_ids
            .into_iter()
            .map(|text| text.parse().map_err(|_| ManifestError::DiffId(text)))
            .collect::<Result<_, _>>()?;
        Ok(Self { diff_ids })
    }
}
