// SPDX-License-Identifier: Apache-2.0
//! Uploading blobs.

use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;

use super::{RegistryClient, RegistryError, Repository};
use crate::source::ReadContext;

/// How a mount across repositories went.
#[derive(Debug)]
pub enum MountOutcome {
    /// The blob is now in the repository; nothing was uploaded.
    Mounted,
    /// The registry does not share it and has opened an upload instead.
    Upload(Upload),
}

/// An upload that has been opened: `write` any number of times, then `finish` with the digest.
///
/// **Cancel** Dropping it leaves an unfinished upload, which registries purge; `abort` tells them.
#[derive(Debug)]
pub struct Upload {
    client: RegistryClient,
    place: Repository,
}

impl RegistryClient {
    /// Makes `blob` of `from` known in `to` without sending it. Both are at the same host.
    pub async fn mount_blob(
        &self,
        _context: &ReadContext,
        to: &Repository,
        _from: &Repository,
        _blob: BlobDigest,
    ) -> Result<MountOutcome, RegistryError> {
        Err(self.inner.unfinished(to.host()))
    }

    /// Uploads a blob that is in memory (POST, then one PUT). Safe to repeat.
    pub async fn push_blob(
        &self,
        _context: &ReadContext,
        place: &Repository,
        _blob: BlobDigest,
        _bytes: Bytes,
    ) -> Result<(), RegistryError> {
        Err(self.inner.unfinished(place.host()))
    }

    /// Opens an upload for a blob whose digest and size are known only at its end.
    pub async fn start_upload(
        &self,
        _context: &ReadContext,
        place: &Repository,
    ) -> Result<Upload, RegistryError> {
        Err(self.inner.unfinished(place.host()))
    }
}

impl Upload {
    /// Adds bytes. Sends a piece whenever enough have come together, and waits for it (back pressure).
    pub async fn write(
        &mut self,
        _context: &ReadContext,
        _bytes: Bytes,
    ) -> Result<(), RegistryError> {
        Err(self.client.inner.unfinished(self.place.host()))
    }

    /// Sends what is left and closes the upload: the registry checks that all bytes have this digest.
    pub async fn finish(
        self,
        _context: &ReadContext,
        _blob: BlobDigest,
    ) -> Result<(), RegistryError> {
        Err(self.client.inner.unfinished(self.place.host()))
    }

    /// Tells the registry to forget the upload.
    pub async fn abort(self, _context: &ReadContext) -> Result<(), RegistryError> {
        Err(self.client.inner.unfinished(self.place.host()))
    }
}
