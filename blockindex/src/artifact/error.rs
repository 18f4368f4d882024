// SPDX-License-Identifier: Apache-2.0
//! Why an artifact is refused.

use crate::digest::{BlobDigest, ManifestDigest};

/// Why an artifact is refused, as a whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// More bytes than are looked at.
    #[error("artifact of {bytes} bytes, at most {limit_bytes} are read")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// Not JSON of this shape.
    #[error("artifact is malformed: {reason}")]
    Json {
        /// The parser's words.
        reason: String,
    },
    /// Something is of another kind than it has to be.
    #[error("{what} of the artifact has type {media_type:?}")]
    Type {
        /// What.
        what: &'static str,
        /// Its type, cut to 100 characters.
        media_type: String,
    },
    /// The config, or the blob of a layer without an index, is not OCI's empty value.
    #[error("{what} of the artifact is not the empty value")]
    NotEmpty {
        /// What.
        what: &'static str,
    },
    /// It is of no image.
    #[error("artifact has no subject")]
    NoSubject,
    /// It is of another image.
    #[error("artifact is of {actual}, not of {expected}")]
    OtherSubject {
        /// The image asked about.
        expected: ManifestDigest,
        /// Its own word.
        actual: ManifestDigest,
    },
    /// An annotation is not there.
    #[error("annotation {name} is missing at {place}")]
    Missing {
        /// Its name.
        name: &'static str,
        /// Where it should be.
        place: String,
    },
    /// A value is no number, or no digest.
    #[error("{name} is {value:?} at {place}")]
    Value {
        /// What.
        name: &'static str,
        /// Its value, cut to 100 characters.
        value: String,
        /// Where it stands.
        place: String,
    },
    /// A number out of its range.
    #[error("{what}: {actual} is not within {least} to {most}")]
    Range {
        /// What.
        what: &'static str,
        /// The number.
        actual: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
    /// It says two things of one.
    #[error("{what} {digest} stands twice in the artifact")]
    Duplicate {
        /// What.
        what: &'static str,
        /// Its digest.
        digest: String,
    },
    /// A file of windows that does not follow the index of its layer.
    #[error("windows at {place} do not follow the index of their layer")]
    Windows {
        /// Where they stand.
        place: String,
    },
    /// It says something else of a blob than the image does.
    #[error("artifact says {what} {actual} of blob {blob}, the image {expected}")]
    Disagrees {
        /// The blob.
        blob: BlobDigest,
        /// On what.
        what: &'static str,
        /// In the image.
        expected: String,
        /// In the artifact.
        actual: String,
    },
}

/// That a number is within its bounds, both included.
pub(super) fn within(
    what: &'static str,
    actual: u64,
    least: u64,
    most: u64,
) -> Result<(), ArtifactError> {
    match (least..=most).contains(&actual) {
        true => Ok(()),
        false => Err(ArtifactError::Range {
            what,
            actual,
            least,
            most,
        }),
    }
}

/// The beginning of a text that may be anybody's.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}
