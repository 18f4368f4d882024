// SPDX-License-Identifier: Apache-2.0
//! Images where they are kept: one reader and one writer trait, and what stands behind them.
//!
//! The traits are the seam to the world: a registry ([`registry`]), an OCI layout as a directory
//! ([`oci_layout`]) or in a tar ([`oci_archive`]), what `docker save` wrote ([`docker_archive`], read
//! only), containerd's own store ([`mod@containerd`]), and an in-memory store for tests. What they return is NOT trusted, except that a
//! document is checked against its descriptor before it is handed out ([`Document::verified`]); a
//! blob's bytes are checked by whoever streams them, because only the reader of the whole can.
//! A writer makes blobs visible by digest first and names them last, so that a failure at any point
//! leaves the destination's tag as it was.

use std::fmt::Debug;
use std::fs::File;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
pub use sluice_fetcher::registry::Repository;

mod archive;
pub mod containerd;
pub mod docker_archive;
pub mod document;
mod file_body;
mod layout_index;
pub mod location;
pub mod oci_archive;
pub mod oci_layout;
pub mod prefix;
pub mod registry;

#[cfg(test)]
pub(crate) mod contract;
#[cfg(test)]
#[allow(
    dead_code,
    reason = "the conversion tests that use the rest land with the encoder"
)]
pub(crate) mod memory;

pub use document::{Descriptor, Document, DocumentKind, Platform};
pub use location::Location;
pub use prefix::Prefix;

/// The most bytes of a manifest, index or config. Registries refuse manifests above 4 MiB; configs of
/// machine-made images with long histories reach a few hundred KiB.
pub const DOCUMENT_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// A blob's bytes as they come.
pub type BlobBody = Pin<Box<dyn Stream<Item = Result<Bytes, ImageError>> + Send>>;

/// Why an image could not be read or written. The text names the thing.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no such image or blob.
    #[error("{what} not found")]
    NotFound {
        /// Reference or digest, with where it was looked for.
        what: String,
    },
    /// What was named is ambiguous or malformed.
    #[error("{what}: {reason}")]
    Invalid {
        /// Reference, path or digest.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Bytes do not have the digest or size by which they are named.
    #[error("{what} is corrupt: expected {expected}, got {actual}")]
    Corrupt {
        /// Reference or digest.
        what: String,
        /// Digest or size that was named.
        expected: String,
        /// Digest or size found.
        actual: String,
    },
    /// The network, the registry or the disk failed.
    #[error("{action} {what}: {reason}")]
    Failed {
        /// Verb phrase in the present tense.
        action: &'static str,
        /// What it was done to.
        what: String,
        /// The cause.
        reason: String,
    },
}

impl ImageError {
    /// A failed action with any displayable cause.
    pub fn failed(action: &'static str, what: impl ToString, reason: impl ToString) -> Self {
        Self::Failed {
            action,
            what: what.to_string(),
            reason: reason.to_string(),
        }
    }

    /// Whether the thing simply is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// Reads one image by its name.
#[async_trait]
pub trait ImageReader: Send + Sync + Debug {
    /// The image's name as the user wrote it, for messages.
    fn label(&self) -> &str;

    /// The manifest or index that the name stands for. **Errors**: `NotFound` if it is not there.
    async fn root(&self) -> Result<Document, ImageError>;

    /// A manifest or index by its descriptor, verified. **Errors**: `NotFound`, `Corrupt`.
    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError>;

    /// All bytes of a blob, NOT verified. A body that ends early or runs on is cut by the caller.
    async fn blob(&self, digest: BlobDigest, bytes: u64) -> Result<BlobBody, ImageError>;

    /// Part of a blob, exactly as long as `extent`, NOT verified.
    async fn range(
        &self,
        digest: BlobDigest,
        blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError>;

    /// The tools by which a manifest was signed, as far as their signatures are kept beside it. What
    /// cannot be asked counts as not signed: this is for a hint, not for trust.
    async fn signers(&self, _manifest: BlobDigest) -> Vec<&'static str> {
        Vec::new()
    }

    /// The repository that holds the blobs, if other repositories of its registry can mount them.
    fn repository(&self) -> Option<Repository> {
        None
    }
}

/// Writes one image under a name. What is there can be read back by [`ImageReader`].
#[async_trait]
pub trait ImageWriter: ImageReader {
    /// Whether the blob is there with that size.
    async fn has_blob(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError>;

    /// Takes a blob from another repository without transfer; false if that cannot be done, as
    /// anywhere but in a registry.
    async fn mount_blob(
        &self,
        _digest: BlobDigest,
        _from: &Repository,
    ) -> Result<bool, ImageError> {
        Ok(false)
    }

    /// Stores a blob. `spool` holds exactly `bytes` bytes whose digest the caller has computed;
    /// its position is anywhere. Storing what is there already is no error. `progress` is told bytes
    /// as they go out, if that takes time.
    async fn put_blob(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ImageError>;

    /// Stores a manifest or index by digest, unnamed.
    async fn put_document(&self, document: &Document) -> Result<(), ImageError>;

    /// Stores a manifest or index and gives it the image's name. The last step of a conversion.
    async fn name(&self, document: &Document) -> Result<(), ImageError>;

    /// Lets go of what was held for the writing only. Called once, after the last write, also after a
    /// failure; whoever dies before leaves it to expire.
    async fn close(&self) {}

    /// A directory on the file system where blobs end, if there is one: spool files made there can
    /// be renamed instead of copied.
    fn spool_directory(&self) -> Option<&std::path::Path> {
        None
    }
}

/// Reads a whole small blob, such as a config, and verifies it.
pub async fn read_small(
    reader: &dyn ImageReader,
    descriptor: &Descriptor,
) -> Result<Bytes, ImageError> {
    use futures::StreamExt;
    let what = || format!("blob {} of {}", descriptor.digest, reader.label());
    if descriptor.size > DOCUMENT_MAX_BYTES {
        let reason = format!(
            "{} bytes, at most {DOCUMENT_MAX_BYTES} are read",
            descriptor.size
        );
        return Err(ImageError::Invalid {
            what: what(),
            reason,
        });
    }
    let mut body = reader.blob(descriptor.digest, descriptor.size).await?;
    let mut bytes = Vec::new();
    while let Some(part) = body.next().await {
        bytes.extend_from_slice(&part?);
        if bytes.len() as u64 > descriptor.size {
            break;
        }
    }
    document::verify(&what(), descriptor, &bytes)?;
    Ok(bytes.into())
}
