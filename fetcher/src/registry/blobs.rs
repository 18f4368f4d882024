// SPDX-License-Identifier: Apache-2.0
//! Blobs: look for, read whole, read a range.

use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{RegistryClient, RegistryError, Repository};
use crate::source::{BlobStream, ReadContext, SourceError};

impl RegistryClient {
    /// The size of `blob` in `place`, `None` where it is not there (HEAD).
    pub async fn blob_size(
        &self,
        _context: &ReadContext,
        place: &Repository,
        _blob: BlobDigest,
    ) -> Result<Option<u64>, RegistryError> {
        Err(self.inner.unfinished(place.host()))
    }

    /// Streams a whole blob, resuming where a body breaks off. The reader verifies the digest.
    pub async fn blob(
        &self,
        _context: &ReadContext,
        place: &Repository,
        _blob: BlobDigest,
        _size_bytes: u64,
    ) -> Result<BlobStream, SourceError> {
        Err(self.inner.unfinished(place.host()).into())
    }

    /// Reads a small blob (such as a config) whole, at most `cap_bytes`, verified against its digest.
    pub async fn blob_bytes(
        &self,
        _context: &ReadContext,
        place: &Repository,
        _blob: BlobDigest,
        _cap_bytes: u64,
    ) -> Result<Bytes, RegistryError> {
        Err(self.inner.unfinished(place.host()))
    }

    /// Whether `place` is known to answer ranges with whole blobs.
    pub fn ignores_ranges(&self, _place: &Repository) -> bool {
        false
    }

    /// One attempt to open a part of `blob`, which has `size_bytes` in all.
    pub(crate) async fn open_blob(
        &self,
        _context: &ReadContext,
        place: &Repository,
        _blob: BlobDigest,
        _size_bytes: u64,
        _extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, RegistryError> {
        Err(self.inner.unfinished(place.host()))
    }
}
