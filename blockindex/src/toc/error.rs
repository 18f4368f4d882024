// SPDX-License-Identifier: Apache-2.0
//! Why a layer is not lazy by its TOC.

use crate::index::IndexError;
use crate::tar::NotLazy;

/// A TOC that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TocError {
    /// An annotation that means nothing.
    #[error("annotation {name} is {value:?}")]
    Annotation {
        /// Its name.
        name: &'static str,
        /// Its value, cut.
        value: String,
    },
    /// One of a pair is missing.
    #[error("annotation {name} is missing")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// The blob does not end as its annotations promise.
    #[error("the blob does not end with the footer of an eStargz or zstd:chunked layer")]
    Footer,
    /// The TOC is a blob of another image.
    #[error("the table of contents is outside of the blob")]
    External,
    /// The TOC is not inside the blob, or too large.
    #[error("table of contents of {bytes} bytes at {start} in a blob of {blob_bytes} bytes")]
    Place {
        /// Its first byte.
        start: u64,
        /// Its size.
        bytes: u64,
        /// Size of the blob.
        blob_bytes: u64,
    },
    /// Other bytes than the manifest pins.
    #[error("the table of contents has another digest than the manifest pins")]
    Digest,
    /// It cannot be decompressed, or is not what it is said to be.
    #[error("decompress table of contents: {reason}")]
    Damaged {
        /// What the decoder says.
        reason: String,
    },
    /// Too large.
    #[error("table of contents of {bytes} bytes, at most {cap} are accepted")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The cap.
        cap: u64,
    },
    /// No JSON, or not of this shape.
    #[error("table of contents: {reason}")]
    Json {
        /// What the parser says.
        reason: String,
    },
    /// A version that this reader does not know.
    #[error("table of contents of version {version}")]
    Version {
        /// The version.
        version: i64,
    },
    /// An entry that means nothing.
    #[error("{path}: {what} in the table of contents")]
    Entry {
        /// Its path, cut.
        path: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A chunk that is out of place, or of a size that cannot be.
    #[error("{path}: chunk at byte {offset} of the file: {what}")]
    Chunk {
        /// The path of its file, cut.
        path: String,
        /// Where it begins in the file.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Well formed, but no tree can be made of it.
    #[error(transparent)]
    NotLazy(#[from] NotLazy),
    /// The tree cannot be written.
    #[error("write tree: {reason}")]
    Tree {
        /// What the writer says.
        reason: String,
    },
    /// The index cannot be written, or does not pass its own validation.
    #[error("write layer index: {0}")]
    Index(#[from] IndexError),
}

impl TocError {
    /// Whether other bytes from elsewhere might do: these are not what is pinned, or were cut.
    pub fn is_of_bytes(&self) -> bool {
        matches!(
            self,
            Self::Footer | Self::Place { .. } | Self::Digest | Self::Damaged { .. }
        )
    }
}
