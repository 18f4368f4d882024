// SPDX-License-Identifier: Apache-2.0
//! `index.json` of an OCI layout: which images there are, and by what names. Pure.

use std::collections::HashSet;

use serde_json::{Value, json};
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::ImageReference;

use super::document::OCI_INDEX;
use super::registry::cosign_tag;
use super::{Descriptor, ImageError};

/// The annotation that names an entry.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation by which containerd, nerdctl and docker give the whole name.
const IMAGE_NAME: &str = "io.containerd.image.name";

/// The parsed file, with everything kept that we do not know.
#[derive(Debug, Clone)]
pub(super) struct LayoutIndex {
    value: Value,
}

impl LayoutIndex {
    /// One without images.
    pub(super) fn empty() -> Self {
        let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
        Self { value }
    }

    /// Reads the file; `what` names it in messages. **Errors**: not JSON, or no list of images.
    pub(super) fn parse(what: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| ImageError::failed("parse", what, e))?;
        match value.get("manifests").is_some_and(Value::is_array) {
            true => Ok(Self { value }),
            false => Err(ImageError::failed("parse", what, "no list of manifests")),
        }
    }

    /// What is written.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.value.to_string().into_bytes()
    }

    /// All images.
    pub(super) fn entries(&self) -> Result<Vec<Descriptor>, String> {
        serde_json::from_value(self.value["manifests"].clone())
            .map_err(|e| format!("index.json: {e}"))
    }

    /// The entry that the tag names, or the only one. `label` is the image's name as the user wrote it.
    ///
    /// **Errors**: `NotFound` with the names that there are; `Invalid` if several could be meant.
    pub(super) fn entry(&self, label: &str, tag: Option<&str>) -> Result<Descriptor, ImageError> {
        let invalid = |reason: String| ImageError::Invalid {
            what: label.to_owned(),
            reason,
        };
        let entries = self.entries().map_err(invalid)?;
        let names = || {
            let names: Vec<&str> = entries.iter().filter_map(shown_name).collect();
            match names.is_empty() {
                true => "none".to_owned(),
                false => names.join(", "),
            }
        };
        let mut found: Vec<&Descriptor> = match tag {
            Some(tag) => entries
                .iter()
                .filter(|entry| is_named(entry, tag))
                .collect(),
            None => entries.iter().collect(),
        };
        // Two names of one image are no doubt.
        let mut seen = HashSet::new();
        found.retain(|entry| seen.insert(entry.digest));
        match (found.as_slice(), tag) {
            ([entry], _) => Ok((*entry).clone()),
            ([], Some(_)) => Err(ImageError::NotFound {
                what: format!("{label} (tags there: {})", names()),
            }),
            ([], None) => Err(ImageError::NotFound {
                what: format!("any image in {label}"),
            }),
            (_, Some(_)) => Err(invalid(format!(
                "several images have this tag; there are {}",
                names()
            ))),
            (_, None) => {
                // With no tag asked for, the one entry without a name is meant, as when we wrote it.
                let mut unnamed = found.iter().filter(|entry| shown_name(entry).is_none());
                match (unnamed.next(), unnamed.next()) {
                    (Some(entry), None) => Ok((**entry).clone()),
                    _ => Err(invalid(format!(
                        "several images: add one of the tags {}",
                        names()
                    ))),
                }
            }
        }
    }

    /// Whether an entry is a signature of this manifest, by cosign's name for it.
    pub(super) fn is_signed(&self, manifest: BlobDigest) -> bool {
        let tag = cosign_tag(manifest);
        let entries = self.entries().unwrap_or_default();
        entries.iter().any(|entry| is_named(entry, &tag))
    }

    /// Puts an image in place of what had this name.
    pub(super) fn put(&mut self, mut descriptor: Descriptor, tag: Option<&str>) {
        if let Some(tag) = tag {
            let name = (REF_NAME.to_owned(), tag.to_owned());
            descriptor.annotations.extend([name]);
        }
        let Some(list) = self.value["manifests"].as_array_mut() else {
            return;
        };
        list.retain(|entry| {
            let name = entry
                .pointer(&format!("/annotations/{REF_NAME}"))
                .and_then(Value::as_str);
            name != tag
        });
        list.push(serde_json::to_value(&descriptor).expect("descriptors are plain JSON"));
    }
}

/// The name by which a user can ask for an entry.
fn shown_name(entry: &Descriptor) -> Option<&str> {
    let annotation = |name: &str| entry.annotations.get(name).map(String::as_str);
    annotation(IMAGE_NAME).or_else(|| annotation(REF_NAME))
}

fn is_named(entry: &Descriptor, tag: &str) -> bool {
    if entry
        .annotations
        .get(REF_NAME)
        .is_some_and(|name| name == tag)
    {
        return true;
    }
    let image = entry.annotations.get(IMAGE_NAME);
    image.is_some_and(|image| is_same_reference(image, tag))
}

/// Whether two names mean one image, with Docker's defaults filled in.
pub(super) fn is_same_reference(a: &str, b: &str) -> bool {
    let parse = |text: &str| text.parse::<ImageReference>().ok();
    a == b || parse(a).is_some_and(|a| parse(b) == Some(a))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(content: &str, name: Option<&str>, image: Option<&str>) -> Descriptor {
        let mut entry = Descriptor::new(OCI_INDEX, BlobDigest::of(content.as_bytes()), 1);
        for (key, value) in [(REF_NAME, name), (IMAGE_NAME, image)] {
            if let Some(value) = value {
                entry.annotations.insert(key.to_owned(), value.to_owned());
            }
        }
        entry
    }

    #[test]
    fn images_are_found_by_tag_and_by_whole_name() {
        let mut index = LayoutIndex::empty();
        index.value["manifests"] = json!([
            entry("a", Some("v1"), Some("docker.io/library/a:v1")),
            entry("b", Some("v1"), Some("registry.test/b:v1")),
            entry("c", Some("v2"), Some("registry.test/c:v2")),
            entry("c", Some("v3"), None),
        ]);
        for (tag, content) in [
            ("a:v1", "a"),
            ("docker.io/library/a:v1", "a"),
            ("registry.test/b:v1", "b"),
            ("v2", "c"),
            ("v3", "c"),
        ] {
            let found = index.entry("x", Some(tag)).unwrap();
            assert_eq!(found.digest, BlobDigest::of(content.as_bytes()), "{tag}");
        }
        for (tag, message) in [
            (Some("v1"), "several images have this tag"),
            (None, "add one of the tags docker.io/library/a:v1"),
            (Some("nothing"), "tags there"),
        ] {
            let error = index.entry("x", tag).unwrap_err().to_string();
            assert!(error.contains(message), "{tag:?}: {error}");
        }
        index.value["manifests"] = json!([entry("c", Some("v2"), None), entry("c", None, None)]);
        assert!(index.entry("x", None).is_ok(), "one image by two names");
    }
}
