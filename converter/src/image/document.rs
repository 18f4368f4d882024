// SPDX-License-Identifier: Apache-2.0
//! Descriptors, manifests and indexes as JSON, with everything kept that we do not know.
//!
//! A document keeps its exact bytes, because its digest names them; changed documents are made by
//! editing the parsed value, whose key order is preserved, so that the same input always gives the
//! same output bytes.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use sluice_blockindex::digest::BlobDigest;

use super::{DOCUMENT_MAX_BYTES, ImageError};

/// Media type of an OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a layer compressed by zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Media type of a layer compressed by gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of a layer that is not compressed.
pub const OCI_LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Docker's manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentKind {
    /// A list of manifests.
    Index,
    /// One manifest.
    Manifest,
}

/// A platform as descriptors and configs name it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture in Go's words.
    #[serde(default)]
    pub architecture: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// CPU variant, such as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Everything else (`os.version`, `os.features`).
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Platform {
    /// Reads `os/architecture[/variant]`. **Errors**: a message for the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some((*variant).to_owned())),
            _ => {
                return Err(format!(
                    "platform {text:?} is not os/architecture[/variant]"
                ));
            }
        };
        if parts.iter().any(|part| part.is_empty()) {
            return Err(format!("platform {text:?} has an empty part"));
        }
        let architecture = match *architecture {
            "x86_64" | "x86-64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Ok(Self {
            architecture: architecture.to_owned(),
            os: (*os).to_owned(),
            variant,
            other: Map::new(),
        })
    }

    /// The platform of this machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            other => other,
        };
        Self {
            architecture: architecture.into(),
            os: "linux".into(),
            ..Self::default()
        }
    }

    /// Whether it says nothing.
    pub fn is_unnamed(&self) -> bool {
        self.os.is_empty() && self.architecture.is_empty()
    }

    /// Whether `self`, asked for by a user, names `found`. Without a variant any is taken;
    /// arm64's only variant is v8.
    pub fn accepts(&self, found: &Self) -> bool {
        let default_of = |platform: &Self| match platform.architecture.as_str() {
            "arm64" => Some("v8".to_owned()),
            _ => platform.variant.clone(),
        };
        self.os == found.os
            && self.architecture == found.architecture
            && (self.variant.is_none() || default_of(self) == default_of(found))
    }

    /// Attestations are listed under the platform `unknown/unknown`.
    pub fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant
            .iter()
            .try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// A reference by digest, as in manifests and indexes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Descriptor {
    /// What the bytes are.
    #[serde(rename = "mediaType", default)]
    pub media_type: String,
    /// Their digest.
    #[serde(serialize_with = "write_digest", deserialize_with = "read_digest")]
    pub digest: BlobDigest,
    /// How many they are.
    pub size: u64,
    /// Free text, sorted by key so that output is reproducible.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "read_map"
    )]
    pub annotations: BTreeMap<String, String>,
    /// In an index: for which platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Everything else (`urls`, `data`, `artifactType`).
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn write_digest<S: Serializer>(digest: &BlobDigest, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(digest)
}

fn read_digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BlobDigest, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map_err(|e| serde::de::Error::custom(format!("digest {text:?}: {e}")))
}

/// `"annotations": null` is written by some tools.
fn read_map<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

impl Descriptor {
    /// A descriptor with nothing but the three fields that are needed.
    pub fn new(media_type: &str, digest: BlobDigest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
            platform: None,
            other: Map::new(),
        }
    }

    /// Whether the bytes live elsewhere, by licence (nondistributable layers).
    pub fn is_foreign(&self) -> bool {
        self.media_type.contains(".nondistributable.") || self.media_type.contains(".foreign.")
    }

    /// Whether only who has a key can read the bytes.
    pub fn is_encrypted(&self) -> bool {
        self.media_type.ends_with("+encrypted")
    }

    /// Whether this is a file system layer of any known compression.
    pub fn is_layer(&self) -> bool {
        self.media_type
            .starts_with("application/vnd.oci.image.layer.")
            || self
                .media_type
                .starts_with("application/vnd.docker.image.rootfs.")
    }
}

/// A manifest or index with its exact bytes.
#[derive(Debug, Clone)]
pub struct Document {
    /// Index or manifest.
    pub kind: DocumentKind,
    /// Media type by which it is served.
    pub media_type: String,
    /// Digest of `bytes`.
    pub digest: BlobDigest,
    /// What is stored and sent.
    pub bytes: Bytes,
    /// The same, parsed; always a JSON object.
    pub value: Value,
}

impl Document {
    /// Parses what came from `what`. `media_type` is what the transport said, if anything.
    pub fn parse(what: &str, media_type: Option<&str>, bytes: Bytes) -> Result<Self, ImageError> {
        let invalid = |reason: String| ImageError::Invalid {
            what: what.to_owned(),
            reason,
        };
        if bytes.len() as u64 > DOCUMENT_MAX_BYTES {
            return Err(invalid(format!(
                "manifest of {} bytes is too large",
                bytes.len()
            )));
        }
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|e| invalid(format!("manifest is not JSON: {e}")))?;
        if !value.is_object() {
            return Err(invalid("manifest is not a JSON object".to_owned()));
        }
        let own = value
            .get("mediaType")
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty());
        let by_shape = match (value.get("manifests"), value.get("layers")) {
            (Some(_), None) => Some(OCI_INDEX),
            (None, Some(_)) => Some(OCI_MANIFEST),
            _ => None,
        };
        let media_type = own
            .or(media_type.filter(|text| kind_of(text).is_some()))
            .or(by_shape);
        let media_type = media_type.unwrap_or_default().to_owned();
        let Some(kind) = kind_of(&media_type) else {
            let version = value.get("schemaVersion").and_then(Value::as_i64);
            return Err(invalid(match version {
                Some(1) => "docker manifest schema 1 is not supported".to_owned(),
                _ => format!("media type {media_type:?} is neither a manifest nor an index"),
            }));
        };
        let both = value.get("manifests").is_some() && value.get("layers").is_some();
        let list = match kind {
            DocumentKind::Index => "manifests",
            DocumentKind::Manifest => "layers",
        };
        if both || !value.get(list).is_some_and(Value::is_array) {
            // Both lists at once is how one digest could mean two images.
            return Err(invalid(format!(
                "{media_type} needs the list {list:?} and no other"
            )));
        }
        Ok(Self {
            kind,
            media_type,
            digest: BlobDigest::of(&bytes),
            bytes,
            value,
        })
    }

    /// Parses and checks against the descriptor by which it was asked for.
    pub fn verified(what: &str, descriptor: &Descriptor, bytes: Bytes) -> Result<Self, ImageError> {
        verify(what, descriptor, &bytes)?;
        Self::parse(what, Some(&descriptor.media_type), bytes)
    }

    /// The document of an edited value; the bytes depend on the value alone.
    pub fn of_value(media_type: &str, value: Value) -> Self {
        let bytes = Bytes::from(value.to_string());
        let kind = kind_of(media_type).unwrap_or(DocumentKind::Manifest);
        Self {
            kind,
            media_type: media_type.into(),
            digest: BlobDigest::of(&bytes),
            bytes,
            value,
        }
    }

    /// A descriptor of this document.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.bytes.len() as u64)
    }

    /// A list of descriptors: `manifests` of an index, `layers` of a manifest.
    pub fn list(&self, key: &str) -> Result<Vec<Descriptor>, ImageError> {
        let value = self
            .value
            .get(key)
            .cloned()
            .unwrap_or(Value::Array(Vec::new()));
        self.read(key, value)
    }

    /// A single descriptor, such as `config`, if it is there.
    pub fn single(&self, key: &str) -> Result<Option<Descriptor>, ImageError> {
        self.value
            .get(key)
            .map(|value| self.read(key, value.clone()))
            .transpose()
    }

    fn read<T: serde::de::DeserializeOwned>(&self, key: &str, v: Value) -> Result<T, ImageError> {
        serde_json::from_value(v).map_err(|e| ImageError::Invalid {
            what: format!("manifest {}", self.digest),
            reason: format!("{key}: {e}"),
        })
    }
}

/// Checks size, then digest.
pub(crate) fn verify(what: &str, descriptor: &Descriptor, bytes: &[u8]) -> Result<(), ImageError> {
    let corrupt = |expected: String, actual: String| {
        Err(ImageError::Corrupt {
            what: what.to_owned(),
            expected,
            actual,
        })
    };
    if bytes.len() as u64 != descriptor.size {
        return corrupt(
            format!("{} bytes", descriptor.size),
            format!("{}", bytes.len()),
        );
    }
    let actual = BlobDigest::of(bytes);
    if actual != descriptor.digest {
        return corrupt(descriptor.digest.to_string(), actual.to_string());
    }
    Ok(())
}

fn kind_of(media_type: &str) -> Option<DocumentKind> {
    match media_type.split(';').next().unwrap_or_default().trim() {
        OCI_INDEX | DOCKER_INDEX => Some(DocumentKind::Index),
        OCI_MANIFEST | DOCKER_MANIFEST => Some(DocumentKind::Manifest),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_keep_what_they_do_not_know() {
        let text = r#"{"mediaType":"a/b","digest":"sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae","size":3,"platform":{"architecture":"amd64","os":"windows","os.version":"10.0"},"urls":["https://x"]}"#;
        let descriptor: Descriptor = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&descriptor).unwrap(), text);
        assert!(serde_json::from_str::<Descriptor>(&text.replace("sha256:2c", "sha256:")).is_err());
        assert!(serde_json::from_str::<Descriptor>(&text.replace(":3,", ":-3,")).is_err());
    }

    #[test]
    fn platforms_match_as_users_mean_them() {
        let cases = [
            ("linux/amd64", "linux/amd64", true),
            ("linux/x86_64", "linux/amd64", true),
            ("linux/arm64", "linux/arm64/v8", true),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/arm/v7", "linux/arm/v6", false),
            ("linux/arm", "linux/arm/v6", true),
            ("linux/amd64", "windows/amd64", false),
        ];
        for (asked, found, expected) in cases {
            let found = Platform::parse(found).unwrap();
            assert_eq!(
                Platform::parse(asked).unwrap().accepts(&found),
                expected,
                "{asked}"
            );
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d"] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn documents_that_could_mean_two_things_are_refused() {
        let parse = |text: &str| Document::parse("x", None, Bytes::from(text.to_owned()));
        let cases = [
            ("[]", "not a JSON object"),
            ("{", "not JSON"),
            ("{}", "neither a manifest nor an index"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1"),
            (
                r#"{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[],"layers":[]}"#,
                "no other",
            ),
            (
                r#"{"mediaType":"application/vnd.oci.image.index.v1+json","layers":[]}"#,
                "needs the list",
            ),
        ];
        for (text, message) in cases {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
        assert_eq!(
            parse(r#"{"manifests":[]}"#).unwrap().kind,
            DocumentKind::Index
        );
        assert_eq!(
            parse(r#"{"layers":[]}"#).unwrap().kind,
            DocumentKind::Manifest
        );
    }
}
