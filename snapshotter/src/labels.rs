// SPDX-License-Identifier: Apache-2.0
//! What the labels of a `Prepare` say about the layer that it is for.
//!
//! Unpackers copy those annotations of a layer's descriptor that begin with
//! `containerd.io/snapshot/` into the labels of `Prepare`; CRI adds some of its own. Pure. Labels
//! come from whoever wrote the manifest, so nothing here trusts them: what is not well-formed
//! becomes an error with the reason, never a panic.

use std::collections::BTreeMap;

use sluice_blockindex::annotations::{AnnotationError, LayerMark, PORT};
use sluice_blockindex::digest::{ConfigDigest, ManifestDigest};

/// The image reference by which kubelet asked for the image; CRI passes it on.
pub const CRI_IMAGE_REFERENCE: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of the manifest that CRI pulls.
pub const CRI_MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// What the labels of a `Prepare` say.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerLabels {
    /// What the manifest says about the layer's index.
    pub mark: Result<LayerMark, AnnotationError>,
    /// The reference that CRI pulls by.
    pub image_reference: Option<String>,
    /// The manifest that CRI pulls.
    pub manifest: Option<ManifestDigest>,
    /// The port that the converter's hint names.
    pub port: Option<u16>,
}

impl LayerLabels {
    /// Reads the labels of a `Prepare` request.
    #[must_use]
    pub fn parse(labels: &BTreeMap<String, String>) -> Self {
        Self {
            mark: mark_of(labels),
            image_reference: labels
                .get(CRI_IMAGE_REFERENCE)
                .filter(|r| !r.is_empty())
                .cloned(),
            manifest: labels
                .get(CRI_MANIFEST_DIGEST)
                .and_then(|text| text.parse().ok()),
            port: port_hint(labels),
        }
    }

    /// The image config that the labels name.
    #[must_use]
    pub fn config(&self) -> Option<ConfigDigest> {
        match &self.mark {
            Ok(LayerMark::Lazy(annotations)) => Some(annotations.config),
            Ok(LayerMark::NotLazy(_) | LayerMark::Unmarked) | Err(_) => None,
        }
    }
}

/// Reads the annotations of a layer's descriptor, or the labels made from them.
///
/// **Errors** annotations of ours that are incomplete or contradict themselves.
pub fn mark_of(map: &BTreeMap<String, String>) -> Result<LayerMark, AnnotationError> {
    LayerMark::parse(|name| map.get(name).map(String::as_str))
}

/// The port that annotations hint at; nonsense is no hint.
#[must_use]
pub fn port_hint(map: &BTreeMap<String, String>) -> Option<u16> {
    map.get(PORT)?.parse().ok().filter(|port| *port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_blockindex::annotations::{self, LayerAnnotations};
    use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};
    use sluice_blockindex::extent::Extent;

    fn annotations() -> LayerAnnotations {
        LayerAnnotations {
            index_extent: Extent::new(100, 150).unwrap(),
            index_digest: IndexDigest::of(b"index"),
            blob: BlobDigest::of(b"blob"),
            blob_bytes: 200,
            diff_id: DiffId::of(b"tar"),
            config: ConfigDigest::of(b"config"),
            port: None,
            boot: Vec::new(),
        }
    }

    #[test]
    fn annotations_and_what_cri_adds_are_read() {
        let mut map = annotations().to_map();
        map.insert(CRI_IMAGE_REFERENCE.into(), "registry.example/a:1".into());
        map.insert(
            CRI_MANIFEST_DIGEST.into(),
            ManifestDigest::of(b"m").to_string(),
        );
        map.insert("containerd.io/snapshot.ref".into(), "sha256:00".into());
        map.insert(PORT.into(), "5000".into());
        let labels = LayerLabels::parse(&map);
        let pinned = LayerAnnotations {
            port: Some(5000),
            ..annotations()
        };
        assert_eq!(labels.mark, Ok(LayerMark::Lazy(pinned)));
        assert_eq!(labels.config(), Some(ConfigDigest::of(b"config")));
        assert_eq!(
            labels.image_reference.as_deref(),
            Some("registry.example/a:1")
        );
        assert_eq!(labels.manifest, Some(ManifestDigest::of(b"m")));
        assert_eq!(labels.port, Some(5000));
        map.insert(PORT.into(), "70000".into());
        assert_eq!(LayerLabels::parse(&map).port, None);
    }

    #[test]
    fn an_image_that_is_not_converted_offers_nothing() {
        let map = BTreeMap::from([
            ("containerd.io/snapshot/other".to_owned(), "x".to_owned()),
            (CRI_IMAGE_REFERENCE.to_owned(), String::new()),
            (CRI_MANIFEST_DIGEST.to_owned(), "nonsense".to_owned()),
        ]);
        let labels = LayerLabels::parse(&map);
        assert_eq!(labels.mark, Ok(LayerMark::Unmarked));
        assert_eq!((labels.image_reference, labels.manifest), (None, None));
    }

    #[test]
    fn broken_annotations_are_an_error() {
        let mut map = annotations().to_map();
        map.remove(annotations::DIFF);
        assert!(LayerLabels::parse(&map).mark.is_err());
        assert_eq!(LayerLabels::parse(&map).config(), None);
    }
}
