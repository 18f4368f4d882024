// SPDX-License-Identifier: Apache-2.0
//! Judges an index that was fetched because an artifact names it.

use super::ArtifactLayer;
use crate::digest::IndexDigest;
use crate::index::{INDEX_FILE_MAX_BYTES, Index, IndexError, UncheckedIndex, decompress_index};

/// Why a payload is not the index of a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The layer has no index.
    #[error("layer is not lazy: {reason}")]
    NotLazy {
        /// Why.
        reason: String,
    },
    /// Other bytes than the artifact names.
    #[error(
        "index of {actual_bytes} bytes, digest {actual}; the artifact says {expected_bytes}, {expected}"
    )]
    Payload {
        /// Digest in the artifact.
        expected: IndexDigest,
        /// Size in the artifact.
        expected_bytes: u64,
        /// Digest of what came.
        actual: IndexDigest,
        /// Size of what came.
        actual_bytes: u64,
    },
    /// The index breaks a rule of its format, or is of another blob.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The index says something else than the artifact.
    #[error("index says another {what} than the artifact")]
    Disagrees {
        /// What.
        what: &'static str,
    },
}

impl ArtifactLayer {
    /// Validates a compressed index and proves that it is the one of this layer: of its blob, its diff ID
    /// and its file of windows.
    ///
    /// **Errors** anything else; a node stores only what passes. Costs a decompression and a walk over
    /// the tree; at most [`INDEX_FILE_MAX_BYTES`] are allocated.
    pub fn accept(&self, payload: &[u8]) -> Result<Index<Vec<u8>>, AcceptError> {
        let pin = match &self.index {
            Ok(pin) => pin,
            Err(reason) => {
                let reason = reason.clone();
                return Err(AcceptError::NotLazy { reason });
            }
        };
        let (actual, actual_bytes) = (IndexDigest::of(payload), payload.len() as u64);
        if (actual, actual_bytes) != (pin.digest, pin.bytes) {
            return Err(AcceptError::Payload {
                expected: pin.digest,
                expected_bytes: pin.bytes,
                actual,
                actual_bytes,
            });
        }
        let file = decompress_index(payload, INDEX_FILE_MAX_BYTES)?;
        let index = UncheckedIndex::parse_unmodified(file)?.validate()?;
        index.check_blob(self.blob, self.blob_bytes)?;
        let disagrees = |what| Err(AcceptError::Disagrees { what });
        if index.diff_id() != self.diff_id {
            return disagrees("diff ID");
        }
        let unmodified = index.metadata().unmodified;
        if unmodified.and_then(|blob| blob.windows) != pin.windows {
            return disagrees("file of windows");
        }
        Ok(index)
    }
}
