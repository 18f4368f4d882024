// SPDX-License-Identifier: Apache-2.0
//! What the metadata store keeps about one snapshot.
//!
//! A record is plain data: it is read in one short transaction and handed out by value, so nobody
//! holds a transaction while it is looked at. `docs/formats/metadata.md` has its encoding.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sluice_blockindex::digest::{BlobDigest, ChainId, DiffId, IndexDigest};
use sluice_blockindex::toc::TocFormat;
use sluice_fetcher::registry::Repository;

/// The label by which an unpacker says which chain ID it is about to make, and by which
/// containerd finds the snapshot that answers it.
pub const LABEL_SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// Labels of a snapshot; sorted, so that the encoding of a record is deterministic.
pub type Labels = BTreeMap<String, String>;

/// The kinds of snapshots that containerd knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// Read-only, never committed.
    View,
    /// Writable, may be committed.
    Active,
    /// Immutable, may be a parent.
    Committed,
}

impl SnapshotKind {
    /// The kind as containerd's filters spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            SnapshotKind::View => "view",
            SnapshotKind::Active => "active",
            SnapshotKind::Committed => "committed",
        }
    }
}

impl fmt::Display for SnapshotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Number of a snapshot: the name of its directory. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Disk resources of one snapshot without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Distinct inodes; a hard link counts once.
    pub inodes: u64,
    /// Allocated bytes.
    pub size_bytes: u64,
}

/// One repository that is known to have a blob.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlobOrigin {
    /// Registry host with port, as in an image reference.
    pub host: String,
    /// Repository within the registry.
    pub repository: String,
}

impl From<&Repository> for BlobOrigin {
    fn from(place: &Repository) -> Self {
        BlobOrigin {
            host: place.host().to_owned(),
            repository: place.name().to_owned(),
        }
    }
}

/// What is needed to serve a lazy layer without its image's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyLayerRecord {
    /// Names the stack that ends with this layer.
    #[serde(with = "as_text")]
    pub chain_id: ChainId,
    /// Digest of the uncompressed tar.
    #[serde(with = "as_text")]
    pub diff_id: DiffId,
    /// Digest of the compressed index payload; names the file under `indexes/`.
    #[serde(with = "as_text")]
    pub index_digest: IndexDigest,
    /// Digest of the blob in the registry.
    #[serde(with = "as_text")]
    pub blob_digest: BlobDigest,
    /// Size of the blob.
    pub blob_bytes: u64,
    /// Size of the layer device.
    pub device_bytes: u64,
    /// Every repository known to have the blob.
    pub sources: Vec<BlobOrigin>,
    /// Where the index came from.
    #[serde(default, skip_serializing_if = "IndexSource::is_blob")]
    pub index_source: IndexSource,
}

/// Where a layer's index came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IndexSource {
    /// It is in the blob, and pinned by the image's manifest.
    #[default]
    Blob,
    /// This node made it of the blob as it is.
    Node,
    /// Another node made it of the blob as it is.
    Peer,
    /// An artifact that refers to the image.
    Referrer,
    /// This node made it of the table of contents of an eStargz layer, which the image's manifest pins.
    Estargz,
    /// The same of a zstd:chunked layer.
    ZstdChunked,
}

impl From<TocFormat> for IndexSource {
    fn from(format: TocFormat) -> Self {
        match format {
            TocFormat::Estargz => Self::Estargz,
            TocFormat::ZstdChunked => Self::ZstdChunked,
        }
    }
}

impl IndexSource {
    /// The word for metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Node => "node",
            Self::Peer => "peer",
            Self::Referrer => "referrer",
            Self::Estargz => "estargz",
            Self::ZstdChunked => "zstd_chunked",
        }
    }

    /// For people.
    #[must_use]
    pub const fn described(self) -> &'static str {
        match self {
            Self::Blob => "index in the blob",
            Self::Node => "blob as it is; index made by this node",
            Self::Peer => "blob as it is; index made by another node",
            Self::Referrer => "blob as it is; index from an artifact that refers to the image",
            Self::Estargz => "blob as it is, eStargz; index made of its table of contents (toc)",
            Self::ZstdChunked => {
                "blob as it is, zstd:chunked; index made of its table of contents (toc)"
            }
        }
    }

    fn is_blob(&self) -> bool {
        *self == Self::Blob
    }
}

/// One snapshot as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Names the directory `snapshots/<id>`.
    pub id: SnapshotId,
    /// Key of an active snapshot or view, name of a committed one.
    pub name: String,
    /// Life-cycle state.
    pub kind: SnapshotKind,
    /// Name of the parent; `None` at the bottom of a chain.
    pub parent: Option<String>,
    /// Labels as containerd gave them.
    pub labels: Labels,
    /// When the snapshot was prepared, or committed.
    pub created: SystemTime,
    /// When its labels changed last.
    pub updated: SystemTime,
    /// Of a committed ordinary snapshot: taken at commit. Zero for all others.
    pub usage: Usage,
    /// Of a committed lazy snapshot: its layer. Such a snapshot has no directory.
    pub layer: Option<LazyLayerRecord>,
}

impl SnapshotRecord {
    /// Whether the snapshot is a lazy layer.
    pub fn is_lazy(&self) -> bool {
        self.layer.is_some()
    }

    /// The chain ID of a committed snapshot: of its layer, else from its label
    /// `containerd.io/snapshot.ref`, else from a backend name `<namespace>/<n>/<chain ID>`.
    pub fn chain_id(&self) -> Option<ChainId> {
        if self.kind != SnapshotKind::Committed {
            return None;
        }
        if let Some(layer) = &self.layer {
            return Some(layer.chain_id);
        }
        self.labels
            .get(LABEL_SNAPSHOT_REF)
            .map(String::as_str)
            .or_else(|| self.name.splitn(3, '/').nth(2))
            .and_then(|text| text.parse().ok())
    }

    /// The containerd namespace that a backend key names.
    pub fn namespace(&self) -> Option<&str> {
        namespace_of(&self.name)
    }
}

/// The containerd namespace of a backend key `<namespace>/<n>/<key>`; `None` for a key that
/// containerd's metadata plugin did not make.
pub fn namespace_of(key: &str) -> Option<&str> {
    let mut parts = key.splitn(3, '/');
    let (namespace, number, _rest) = (parts.next()?, parts.next()?, parts.next()?);
    let numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (numbered && !namespace.is_empty()).then_some(namespace)
}

/// Digests as `sha256:<hex>` text.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: Display,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: char) -> String {
        format!("sha256:{}", String::from(byte).repeat(64))
    }

    fn committed(name: &str, label: Option<&str>) -> SnapshotRecord {
        SnapshotRecord {
            id: SnapshotId(1),
            name: name.into(),
            kind: SnapshotKind::Committed,
            parent: None,
            labels: label
                .map(|v| (LABEL_SNAPSHOT_REF.into(), v.into()))
                .into_iter()
                .collect(),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            usage: Usage::default(),
            layer: None,
        }
    }

    #[test]
    fn namespaces_come_from_backend_keys_only() {
        for (key, namespace) in [
            ("default/12/sha256:aa", Some("default")),
            ("k8s.io/1/a/b/c", Some("k8s.io")),
            ("default/x/key", None),
            ("default//key", None),
            ("/1/key", None),
            ("default/1", None),
            ("key", None),
            ("", None),
        ] {
            assert_eq!(namespace_of(key), namespace, "{key}");
        }
    }

    #[test]
    fn chain_ids_prefer_the_label() {
        let from_name = format!("default/3/{}", digest('a'));
        let chain = |record: SnapshotRecord| record.chain_id().map(|id| id.to_string());
        assert_eq!(chain(committed(&from_name, None)), Some(digest('a')));
        assert_eq!(
            chain(committed(&from_name, Some(&digest('b')))),
            Some(digest('b'))
        );
        assert_eq!(chain(committed("default/3/extract-1", None)), None);
        let mut active = committed(&from_name, None);
        active.kind = SnapshotKind::Active;
        assert_eq!(chain(active), None);
    }

    #[test]
    fn a_layer_survives_its_encoding() {
        let text = format!(
            r#"{{"chain_id":"{}","diff_id":"{}","index_digest":"{}","blob_digest":"{}","blob_bytes":5,"device_bytes":6,"sources":[{{"host":"h:1","repository":"r"}}]}}"#,
            digest('1'),
            digest('2'),
            digest('3'),
            digest('4')
        );
        let layer: LazyLayerRecord = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&layer).unwrap(), text);
        assert!(
            serde_json::from_str::<LazyLayerRecord>(&text.replace("sha256:1", "md5:1")).is_err()
        );
    }
}
