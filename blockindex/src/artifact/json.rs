// SPDX-License-Identifier: Apache-2.0
//! Artifacts as JSON. Members and annotations that are not known mean nothing, as OCI wants it; entries of a type
//! that is not known are refused: they would say something of a layer.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::cut;
use super::{
    ARTIFACT_MAX_BYTES, ARTIFACT_TYPE, Artifact, ArtifactError, ArtifactLayer, BLOB, BLOB_SIZE,
    DIFF, EMPTY_JSON, EMPTY_TYPE, GENERATION, INDEX_TYPE, IndexBlobs, MANIFEST_TYPE, NOT_LAZY,
    NOT_LAZY_TYPE, RECIPE, Subject, WINDOWS_TYPE,
};
use crate::digest::{BlobDigest, ManifestDigest};
use crate::index::WindowsPin;

type Annotations = BTreeMap<String, String>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    config: RawDescriptor,
    layers: Vec<RawDescriptor>,
    #[serde(default)]
    subject: Option<RawDescriptor>,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<Annotations>,
}

impl Artifact {
    /// Reads an artifact that was found as a referrer of `subject`.
    ///
    /// **Errors** whatever breaks a rule of the format, or is of another image. Nothing is allocated by
    /// what it says.
    pub fn parse(bytes: &[u8], subject: ManifestDigest) -> Result<Self, ArtifactError> {
        let (length, limit_bytes) = (bytes.len() as u64, ARTIFACT_MAX_BYTES);
        if length > limit_bytes {
            let bytes = length;
            return Err(ArtifactError::TooLarge { bytes, limit_bytes });
        }
        let raw: RawManifest = serde_json::from_slice(bytes).map_err(malformed)?;
        let found = raw.read()?;
        let (expected, actual) = (subject, found.subject.digest);
        match expected == actual {
            true => Ok(found),
            false => Err(ArtifactError::OtherSubject { expected, actual }),
        }
    }

    /// The bytes of its manifest, which depend on nothing but its value.
    ///
    /// **Errors** it breaks a rule of the format.
    pub fn to_json(&self) -> Result<Vec<u8>, ArtifactError> {
        self.check()?;
        let mut layers = Vec::with_capacity(self.layers.len() * 2);
        for layer in &self.layers {
            layer.write(&mut layers);
        }
        let subject = RawDescriptor {
            media_type: self.subject.media_type.clone(),
            digest: self.subject.digest.to_string(),
            size: self.subject.bytes,
            annotations: None,
        };
        let raw = RawManifest {
            schema_version: 2,
            media_type: MANIFEST_TYPE.to_owned(),
            artifact_type: ARTIFACT_TYPE.to_owned(),
            config: empty(EMPTY_TYPE, None),
            layers,
            subject: Some(subject),
            annotations: Some(self.annotations()),
        };
        let bytes = serde_json::to_vec(&raw).map_err(malformed)?;
        let (length, limit_bytes) = (bytes.len() as u64, ARTIFACT_MAX_BYTES);
        match length > limit_bytes {
            true => Err(ArtifactError::TooLarge {
                bytes: length,
                limit_bytes,
            }),
            false => Ok(bytes),
        }
    }

    /// The annotations of its manifest; lists of referrers repeat them.
    #[must_use]
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = Annotations::new();
        annotations.insert(GENERATION.to_owned(), self.generation.to_string());
        if !self.recipe.is_empty() {
            annotations.insert(RECIPE.to_owned(), self.recipe.clone());
        }
        annotations
    }
}

/// The generation that annotations of an artifact tell, if they tell one.
#[must_use]
pub fn generation_of(annotations: &BTreeMap<String, String>) -> Option<u32> {
    let text = annotations.get(GENERATION)?;
    let generation = u32::try_from(parse_decimal(text)?).ok()?;
    (generation > 0).then_some(generation)
}

impl RawManifest {
    fn read(self) -> Result<Artifact, ArtifactError> {
        if self.schema_version != 2 {
            return Err(ArtifactError::Value {
                name: "schemaVersion",
                value: self.schema_version.to_string(),
                place: "the manifest".to_owned(),
            });
        }
        is_type("manifest", &self.media_type, MANIFEST_TYPE)?;
        is_type("artifactType", &self.artifact_type, ARTIFACT_TYPE)?;
        is_type("config", &self.config.media_type, EMPTY_TYPE)?;
        self.config.is_empty("config")?;
        let subject = self.subject.ok_or(ArtifactError::NoSubject)?;
        let subject = Subject {
            digest: digest("subject", &subject.digest, || "the manifest".to_owned())?,
            media_type: subject.media_type,
            bytes: subject.size,
        };
        let annotations = self.annotations.unwrap_or_default();
        let place = || "the manifest".to_owned();
        let text = annotation(&annotations, GENERATION, place)?;
        let generation =
            generation_of(&annotations).ok_or_else(|| wrong(GENERATION, text, place))?;
        let mut layers: Vec<ArtifactLayer> = Vec::new();
        for (at, entry) in self.layers.iter().enumerate() {
            entry.add_to(at, &mut layers)?;
        }
        let artifact = Artifact {
            subject,
            generation,
            recipe: annotations.get(RECIPE).cloned().unwrap_or_default(),
            layers,
        };
        artifact.check()?;
        Ok(artifact)
    }
}

impl RawDescriptor {
    fn is_empty(&self, what: &'static str) -> Result<(), ArtifactError> {
        let empty = BlobDigest::of(EMPTY_JSON).to_string();
        match self.digest == empty && self.size == EMPTY_JSON.len() as u64 {
            true => Ok(()),
            false => Err(ArtifactError::NotEmpty { what }),
        }
    }

    /// Takes the entry at place `at` of the list; windows go to the layer before.
    fn add_to(&self, at: usize, layers: &mut Vec<ArtifactLayer>) -> Result<(), ArtifactError> {
        let place = || format!("entry {at}");
        let none = Annotations::new();
        let annotations = self.annotations.as_ref().unwrap_or(&none);
        let text = annotation(annotations, BLOB_SIZE, place)?;
        let mut layer = ArtifactLayer {
            blob: digest(BLOB, annotation(annotations, BLOB, place)?, place)?,
            blob_bytes: parse_decimal(text).ok_or_else(|| wrong(BLOB_SIZE, text, place))?,
            diff_id: digest(DIFF, annotation(annotations, DIFF, place)?, place)?,
            index: Err(String::new()),
        };
        match self.media_type.as_str() {
            INDEX_TYPE => {
                layer.index = Ok(IndexBlobs {
                    digest: digest("digest", &self.digest, place)?,
                    bytes: self.size,
                    windows: None,
                });
            }
            WINDOWS_TYPE => {
                let of = (layer.blob, layer.blob_bytes, layer.diff_id);
                let before = layers.last_mut();
                let before = before.filter(|last| (last.blob, last.blob_bytes, last.diff_id) == of);
                let index = before.and_then(|last| last.index.as_mut().ok());
                let free = index.filter(|index| index.windows.is_none());
                let index = free.ok_or_else(|| ArtifactError::Windows { place: place() })?;
                let file: BlobDigest = digest("digest", &self.digest, place)?;
                index.windows = Some(WindowsPin {
                    bytes: self.size,
                    digest: *file.as_bytes(),
                });
                return Ok(());
            }
            NOT_LAZY_TYPE => {
                self.is_empty("a layer that is not lazy")?;
                layer.index = Err(annotation(annotations, NOT_LAZY, place)?.to_owned());
            }
            other => {
                return Err(ArtifactError::Type {
                    what: "an entry",
                    media_type: cut(other),
                });
            }
        }
        layers.push(layer);
        Ok(())
    }
}

impl ArtifactLayer {
    fn write(&self, entries: &mut Vec<RawDescriptor>) {
        let mut annotations = Annotations::from([
            (BLOB.to_owned(), self.blob.to_string()),
            (BLOB_SIZE.to_owned(), self.blob_bytes.to_string()),
            (DIFF.to_owned(), self.diff_id.to_string()),
        ]);
        let index = match &self.index {
            Ok(index) => index,
            Err(reason) => {
                annotations.insert(NOT_LAZY.to_owned(), reason.clone());
                entries.push(empty(NOT_LAZY_TYPE, Some(annotations)));
                return;
            }
        };
        entries.push(RawDescriptor {
            media_type: INDEX_TYPE.to_owned(),
            digest: index.digest.to_string(),
            size: index.bytes,
            annotations: Some(annotations.clone()),
        });
        if let Some(windows) = index.windows {
            entries.push(RawDescriptor {
                media_type: WINDOWS_TYPE.to_owned(),
                digest: BlobDigest::from_bytes(windows.digest).to_string(),
                size: windows.bytes,
                annotations: Some(annotations),
            });
        }
    }
}

fn empty(media_type: &str, annotations: Option<Annotations>) -> RawDescriptor {
    RawDescriptor {
        media_type: media_type.to_owned(),
        digest: BlobDigest::of(EMPTY_JSON).to_string(),
        size: EMPTY_JSON.len() as u64,
        annotations,
    }
}

fn malformed(error: serde_json::Error) -> ArtifactError {
    ArtifactError::Json {
        reason: cut(&error.to_string()),
    }
}

fn is_type(what: &'static str, actual: &str, expected: &str) -> Result<(), ArtifactError> {
    match actual == expected {
        true => Ok(()),
        false => Err(ArtifactError::Type {
            what,
            media_type: cut(actual),
        }),
    }
}

fn annotation<'a>(
    annotations: &'a Annotations,
    name: &'static str,
    place: impl Fn() -> String,
) -> Result<&'a str, ArtifactError> {
    let found = annotations.get(name).map(String::as_str);
    found.ok_or_else(|| ArtifactError::Missing {
        name,
        place: place(),
    })
}

fn digest<D: FromStr>(
    name: &'static str,
    text: &str,
    place: impl Fn() -> String,
) -> Result<D, ArtifactError> {
    text.parse().map_err(|_| wrong(name, text, place))
}

fn wrong(name: &'static str, value: &str, place: impl Fn() -> String) -> ArtifactError {
    ArtifactError::Value {
        name,
        value: cut(value),
        place: place(),
    }
}

/// A decimal number without sign, spaces or leading zeros: each value has one spelling.
fn parse_decimal(text: &str) -> Option<u64> {
    let value: u64 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}
