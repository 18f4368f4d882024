// SPDX-License-Identifier: Apache-2.0
//! From an image config's digest to the image's manifest, its layers and the repositories that have them.
//!
//! An unpacker tells the snapshots service a chain ID and the annotations of one layer, nothing of
//! the registry and nothing of the other layers. containerd's content store knows both: before the
//! first `Prepare` the client has committed the manifest and the config there, has given the manifest
//! the label `containerd.io/gc.ref.content.config` (the digest of its config) and has given what it
//! downloaded the labels `containerd.io/distribution.source.<host>` (comma-separated repositories).
//!
//! Algorithm: list the contents of the namespace by the config label, read each (they are manifests),
//! drop what is not one, put first the manifest with the most layers that can be lazy, and join the
//! sources of all manifests and of the config. Several manifests share a config when an image was
//! converted: all their repositories are remembered, so that any of them may serve a blob.
//!
//! Invariants: only reads go to containerd; each has a deadline of its own; nothing here writes, and
//! every byte read is checked against the digest it was asked by. May be called from a snapshots RPC.

mod containerd;
mod manifest;
#[cfg(test)]
mod memory;
mod ports;
#[cfg(test)]
mod tests;

pub use containerd::{Containerd, ContainerdContent};
pub use manifest::{Config, Descriptor, Manifest, ManifestError, ManifestList};
#[cfg(test)]
pub use memory::MemoryContent;
pub use ports::{KnownPorts, with_ports};

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use sluice_blockindex::annotations;
use sluice_blockindex::digest::{ChainId, ConfigDigest, DiffId, ManifestDigest};

use crate::labels::port_hint;
use crate::snapshots::BlobOrigin;

/// Label of a manifest in containerd's content store: the digest of its config.
pub const CONFIG_LABEL: &str = "containerd.io/gc.ref.content.config";
/// The same of manifests that BuildKit writes, which numbers all that a manifest names, the config first.
const BUILT_CONFIG_LABEL: &str = "containerd.io/gc.ref.content.0";
/// Labels of contents: `<prefix><host>` = the repositories they came from, separated by commas.
pub const SOURCE_LABEL_PREFIX: &str = "containerd.io/distribution.source.";
/// The largest manifest or config that is read. Registries take 4 MiB at most; a larger one would
/// only cost memory inside an RPC.
pub const DOCUMENT_CAP_BYTES: usize = 8 << 20;
/// How many manifests of one config, or recent manifests of a namespace, are read at most.
const MANIFEST_CAP: usize = 32;
/// A pull that is running now has committed its manifest within this time. Longer costs reads of
/// old manifests for each image that is not converted.
pub const RECENT: Duration = Duration::from_secs(15 * 60);

/// Why containerd's content could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// containerd does not answer in time or at all.
    #[error("ask containerd to {what}: {message}")]
    Unavailable {
        /// What was asked.
        what: &'static str,
        /// What the transport said.
        message: String,
    },
    /// The content is larger than the caller accepts.
    #[error("content {digest} has {size_bytes} bytes, more than {cap_bytes}")]
    TooLarge {
        /// Of the content.
        digest: String,
        /// Its size.
        size_bytes: u64,
        /// The caller's cap.
        cap_bytes: usize,
    },
    /// The bytes are not those that the digest names.
    #[error("content {digest} is corrupt in containerd's store")]
    Corrupt {
        /// What was asked for.
        digest: String,
    },
}

impl ContentError {
    /// Whether the same call can succeed later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unavailable { .. } => true,
            Self::TooLarge { .. } | Self::Corrupt { .. } => false,
        }
    }
}

/// Why an image could not be resolved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// containerd could not be asked.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// No manifest of the namespace names this config.
    #[error("no manifest in containerd's content store names config {0}")]
    NoManifest(ConfigDigest),
    /// The config is not in the content store.
    #[error("config {0} is not in containerd's content store")]
    NoConfig(ConfigDigest),
    /// The config cannot be read.
    #[error("read image config {config}: {source}")]
    Config {
        /// Of the config.
        config: ConfigDigest,
        /// What is wrong.
        source: ManifestError,
    },
}

/// What containerd knows about one content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContentInfo {
    /// `sha256:<hex>`.
    pub digest: String,
    /// Bytes.
    pub size_bytes: u64,
    /// All labels.
    pub labels: BTreeMap<String, String>,
    /// When the content or its labels changed last; wall time, only for choosing what to read.
    pub updated: Option<SystemTime>,
}

/// Which contents to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentQuery<'a> {
    /// The label has this value.
    LabelIs {
        /// Of the label.
        key: &'a str,
        /// Wanted.
        value: &'a str,
    },
    /// The label exists.
    HasLabel(&'a str),
}

/// Reads of a content store with namespaces.
///
/// **Errors** [`ContentError::Unavailable`] may pass; the others do not. Every call returns within
/// the implementation's own deadline. **Cancel** safe.
#[async_trait]
pub trait ContentReader: Send + Sync + fmt::Debug {
    /// Lists what fits the query.
    async fn find(
        &self,
        namespace: &str,
        query: ContentQuery<'_>,
    ) -> Result<Vec<ContentInfo>, ContentError>;
    /// What is known about one content; `None` when the namespace does not have it.
    async fn info(
        &self,
        namespace: &str,
        digest: &str,
    ) -> Result<Option<ContentInfo>, ContentError>;
    /// All bytes of one content, not verified; `None` when the namespace does not have it.
    async fn read(
        &self,
        namespace: &str,
        digest: &str,
        cap_bytes: usize,
    ) -> Result<Option<Bytes>, ContentError>;
    /// Up to `bytes` bytes of one content from `offset` on, fewer at its end, not verified; `None` when the namespace
    /// does not have it.
    async fn read_part(
        &self,
        namespace: &str,
        digest: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Option<Bytes>, ContentError>;
    /// What images are called whose registry is this host (without a port), at any port.
    async fn image_names(&self, namespace: &str, host: &str) -> Result<Vec<String>, ContentError>;
}

impl fmt::Display for BlobOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)
    }
}

/// A manifest of the image.
#[derive(Clone, Debug)]
pub struct ResolvedManifest {
    /// Its digest.
    pub digest: ManifestDigest,
    /// What it says.
    pub manifest: Manifest,
}

/// All that the content store tells about an image.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// The image's config.
    pub config: ConfigDigest,
    /// Of its layers, lowest first.
    pub diff_ids: Vec<DiffId>,
    /// Of its layers, lowest first.
    pub chain_ids: Vec<ChainId>,
    /// The manifests of that config with as many layers as the config, the most lazy one first.
    pub manifests: Vec<ResolvedManifest>,
    /// Where the image was seen, each once, as containerd's labels name them.
    pub repositories: Vec<BlobOrigin>,
}

/// The repositories that content labels name.
#[must_use]
pub fn repositories_of(labels: &BTreeMap<String, String>) -> BTreeSet<BlobOrigin> {
    labels
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(SOURCE_LABEL_PREFIX)?, value)))
        .filter(|(host, _)| !host.is_empty())
        .flat_map(|(host, value)| {
            value
                .split(',')
                .map(str::trim)
                .filter(|r| !r.is_empty())
                .map(move |repository| BlobOrigin {
                    host: bracketed(host),
                    repository: repository.to_owned(),
                })
        })
        .collect()
}

/// A host as references write it: containerd's labels have IPv6 addresses without brackets.
fn bracketed(host: &str) -> String {
    if host.starts_with('[') || host.matches(':').count() < 2 {
        return host.to_owned();
    }
    format!("[{host}]")
}

/// The ports that the annotations of a manifest's layers hint at.
#[must_use]
pub fn port_hints(manifest: &Manifest) -> BTreeSet<u16> {
    let layers = manifest.layers.iter();
    layers
        .filter_map(|layer| port_hint(&layer.annotations))
        .collect()
}

/// Reads a content and checks it against its digest.
async fn read_verified(
    content: &dyn ContentReader,
    namespace: &str,
    digest: &str,
) -> Result<Option<Bytes>, ContentError> {
    let Some(bytes) = content.read(namespace, digest, DOCUMENT_CAP_BYTES).await? else {
        return Ok(None);
    };
    let actual = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
    if actual != digest {
        return Err(ContentError::Corrupt {
            digest: digest.to_owned(),
        });
    }
    Ok(Some(bytes))
}

/// As [`read_verified`]; a content that will never be right is passed over, so that one bad manifest does
/// not hide the good ones.
async fn read_if_good(
    content: &dyn ContentReader,
    namespace: &str,
    digest: &str,
) -> Result<Option<Bytes>, ContentError> {
    match read_verified(content, namespace, digest).await {
        Err(error) if !error.may_pass() => {
            tracing::warn!("pass over a content: {error}");
            Ok(None)
        }
        read => read,
    }
}

/// The contents whose labels say that they are manifests of this config (`sha256:<hex>`), unread.
pub async fn manifests_naming(
    content: &dyn ContentReader,
    namespace: &str,
    config: &str,
) -> Result<Vec<ContentInfo>, ContentError> {
    for key in [CONFIG_LABEL, BUILT_CONFIG_LABEL] {
        let query = ContentQuery::LabelIs { key, value: config };
        let found = content.find(namespace, query).await?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

/// Finds everything that the namespace knows about the image with this config.
///
/// **Errors** as [`ResolveError`]; a manifest that cannot be read or parsed is passed over.
pub async fn resolve_image(
    content: &dyn ContentReader,
    namespace: &str,
    config: ConfigDigest,
) -> Result<ResolvedImage, ResolveError> {
    let wanted = config.to_string();
    let infos = manifests_naming(content, namespace, &wanted).await?;
    let mut repositories = BTreeSet::new();
    let mut manifests = Vec::new();
    for info in infos.into_iter().take(MANIFEST_CAP) {
        repositories.extend(repositories_of(&info.labels));
        let Some(bytes) = read_if_good(content, namespace, &info.digest).await? else {
            continue;
        };
        let (Ok(digest), Ok(manifest)) = (info.digest.parse(), Manifest::parse(&bytes)) else {
            continue;
        };
        if manifest.config.digest == wanted {
            manifests.push(ResolvedManifest { digest, manifest });
        }
    }
    if manifests.is_empty() {
        return Err(ResolveError::NoManifest(config));
    }
    if let Some(info) = content.info(namespace, &wanted).await? {
        repositories.extend(repositories_of(&info.labels));
    }
    let bytes = read_verified(content, namespace, &wanted)
        .await?
        .ok_or(ResolveError::NoConfig(config))?;
    let parsed = Config::parse(&bytes).map_err(|source| ResolveError::Config { config, source })?;
    manifests.retain(|m| m.manifest.layers.len() == parsed.diff_ids.len());
    if manifests.is_empty() {
        return Err(ResolveError::NoManifest(config));
    }
    manifests.sort_by_key(|m| (std::cmp::Reverse(lazy_layers(&m.manifest)), m.digest));
    Ok(ResolvedImage {
        config,
        chain_ids: chain_ids(&parsed.diff_ids),
        diff_ids: parsed.diff_ids,
        manifests,
        repositories: repositories.into_iter().collect(),
    })
}

/// Finds the image of a layer that says nothing about itself: among the manifests that changed
/// recently, one whose config has the chain ID; unless `unmarked` ones count, one with lazy layers.
pub async fn resolve_by_chain(
    content: &dyn ContentReader,
    namespace: &str,
    chain: ChainId,
    now: SystemTime,
    unmarked: bool,
) -> Result<Option<ResolvedImage>, ResolveError> {
    let mut infos = content
        .find(namespace, ContentQuery::HasLabel(CONFIG_LABEL))
        .await?;
    infos.retain(|info| {
        info.updated
            .is_some_and(|at| now.duration_since(at).is_ok_and(|age| age < RECENT))
    });
    infos.sort_by_key(|info| std::cmp::Reverse(info.updated));
    let mut seen = BTreeSet::new();
    for info in infos.into_iter().take(MANIFEST_CAP) {
        let Some(bytes) = read_if_good(content, namespace, &info.digest).await? else {
            continue;
        };
        let Ok(manifest) = Manifest::parse(&bytes) else {
            continue;
        };
        if !unmarked && lazy_layers(&manifest) == 0 {
            continue;
        }
        let Ok(config) = manifest.config.digest.parse::<ConfigDigest>() else {
            continue;
        };
        if !seen.insert(config) {
            continue;
        }
        match resolve_image(content, namespace, config).await {
            Ok(image) if image.chain_ids.contains(&chain) => return Ok(Some(image)),
            Ok(_) => {}
            Err(ResolveError::Content(error)) if error.may_pass() => return Err(error.into()),
            Err(error) => tracing::debug!(%config, "pass over a manifest: {error:#}"),
        }
    }
    Ok(None)
}

/// How many layers of the manifest carry the annotations of a layer index.
fn lazy_layers(manifest: &Manifest) -> usize {
    manifest
        .layers
        .iter()
        .filter(|layer| layer.annotations.contains_key(annotations::INDEX_DIGEST))
        .count()
}

/// The chain ID of each layer, lowest first.
#[must_use]
pub fn chain_ids(diff_ids: &[DiffId]) -> Vec<ChainId> {
    let mut parent = None;
    diff_ids
        .iter()
        .map(|diff_id| {
            let chain = ChainId::child(parent, *diff_id);
            parent = Some(chain);
            chain
        })
        .collect()
}
