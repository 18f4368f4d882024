// SPDX-License-Identifier: Apache-2.0
//! Media types of manifests.

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What is accepted as a manifest, in order of preference.
pub const MANIFEST_TYPES: &[&str] = &[OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST];

/// Whether `media_type` names a list of manifests.
pub fn is_image_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// Whether `media_type` names the manifest of one image.
pub fn is_image_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// The media type of a `Content-Type` value: without parameters, lower case.
pub(super) fn of_content_type(value: &str) -> String {
    value
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types_lose_their_parameters() {
        let cases = [
            ("application/vnd.oci.image.index.v1+json", OCI_INDEX),
            (
                "Application/vnd.oci.image.manifest.v1+JSON; charset=utf-8",
                OCI_MANIFEST,
            ),
            ("", ""),
        ];
        for (value, expected) in cases {
            assert_eq!(of_content_type(value), expected);
        }
    }

    #[test]
    fn kinds_are_told_apart() {
        assert!(is_image_index(OCI_INDEX) && is_image_index(DOCKER_INDEX));
        assert!(is_image_manifest(OCI_MANIFEST) && is_image_manifest(DOCKER_MANIFEST));
        assert!(!is_image_index(OCI_MANIFEST) && !is_image_manifest(DOCKER_INDEX));
    }
}
