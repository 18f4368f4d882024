// SPDX-License-Identifier: Apache-2.0
//! Moves blobs: looks whether they are there, mounts them, or spools, verifies and sends them.
//!
//! A blob that is copied goes through a spool file: nothing reaches the destination before all of it
//! has been verified, and a failed upload can start again without reading the source again.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt;
use sluice_blockindex::digest::BlobDigest;
use tokio::sync::OnceCell;

use crate::image::{Descriptor, Document, ImageError, ImageReader, ImageWriter};
use crate::report::{LayerReporter, Transfer};
use crate::spool;
use crate::verify::{Verifier, verified};

/// Sends to one destination what comes from one source. Each blob is moved once, whoever asks.
#[derive(Debug)]
pub struct Pusher {
    source: Arc<dyn ImageReader>,
    destination: Arc<dyn ImageWriter>,
    spool_directory: PathBuf,
    flights: tokio::sync::Mutex<HashMap<BlobDigest, Arc<OnceCell<Transfer>>>>,
    uploads: AtomicU64,
    uploaded_bytes: AtomicU64,
}

impl Pusher {
    /// Spools in `work_directory`, or where the destination can rename from, or in the usual place for
    /// large temporary files.
    pub fn new(
        source: Arc<dyn ImageReader>,
        destination: Arc<dyn ImageWriter>,
        work_directory: Option<&Path>,
    ) -> Self {
        let spool_directory = work_directory
            .or(destination.spool_directory())
            // /tmp is often memory; layers are large.
            .unwrap_or(Path::new("/var/tmp"))
            .to_owned();
        Self {
            source,
            destination,
            spool_directory,
            flights: tokio::sync::Mutex::default(),
            uploads: AtomicU64::new(0),
            uploaded_bytes: AtomicU64::new(0),
        }
    }

    /// A new spool file.
    pub fn spool(&self) -> Result<File, ImageError> {
        spool::create(&self.spool_directory).map_err(|e| {
            ImageError::failed("make a spool file in", self.spool_directory.display(), e)
        })
    }

    /// Blobs and documents sent, and their bytes.
    pub fn sent(&self) -> (u64, u64) {
        (
            self.uploads.load(Ordering::Relaxed),
            self.uploaded_bytes.load(Ordering::Relaxed),
        )
    }

    /// Whether the destination has a blob.
    pub async fn has(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError> {
        self.destination.has_blob(digest, bytes).await
    }

    /// Has the destination get a blob without sending it, if it can: it is there, or mounted.
    pub async fn place(&self, descriptor: &Descriptor) -> Result<Option<Transfer>, ImageError> {
        self.place_from(&*self.source, descriptor).await
    }

    async fn place_from(
        &self,
        source: &dyn ImageReader,
        descriptor: &Descriptor,
    ) -> Result<Option<Transfer>, ImageError> {
        let (digest, bytes) = (descriptor.digest, descriptor.size);
        if self.destination.has_blob(digest, bytes).await? {
            return Ok(Some(Transfer::Present));
        }
        let mounted = match source.repository() {
            Some(from) => self.destination.mount_blob(digest, &from).await?,
            None => false,
        };
        Ok(mounted.then_some(Transfer::Mounted))
    }

    /// Stores a blob whose verified bytes are in `spool`.
    pub async fn send(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        reporter: LayerReporter<'_>,
    ) -> Result<Transfer, ImageError> {
        let once = self.flight(digest).await;
        let work = async || {
            if self.destination.has_blob(digest, bytes).await? {
                return Ok(Transfer::Present);
            }
            self.upload(digest, bytes, spool, reporter).await
        };
        once.get_or_try_init(work).await.copied()
    }

    /// Copies a blob as it is.
    pub async fn copy(
        &self,
        descriptor: &Descriptor,
        reporter: LayerReporter<'_>,
    ) -> Result<Transfer, ImageError> {
        self.copy_from(&*self.source, descriptor, reporter).await
    }

    /// Copies a blob of another image as it is.
    pub async fn copy_from(
        &self,
        source: &dyn ImageReader,
        descriptor: &Descriptor,
        reporter: LayerReporter<'_>,
    ) -> Result<Transfer, ImageError> {
        let once = self.flight(descriptor.digest).await;
        once.get_or_try_init(async || self.copy_once(source, descriptor, reporter).await)
            .await
            .copied()
    }

    async fn copy_once(
        &self,
        source: &dyn ImageReader,
        descriptor: &Descriptor,
        reporter: LayerReporter<'_>,
    ) -> Result<Transfer, ImageError> {
        if let Some(transfer) = self.place_from(source, descriptor).await? {
            return Ok(transfer);
        }
        let (digest, bytes) = (descriptor.digest, descriptor.size);
        let what = format!("blob {digest} of {}", source.label());
        let body = source.blob(digest, bytes).await?;
        let mut body = verified(body, Verifier::new(what, digest, bytes));
        let mut spool = self.spool()?;
        while let Some(part) = body.next().await {
            let part = part?;
            reporter.read(part.len() as u64);
            let written = tokio::task::spawn_blocking(move || {
                spool.write_all(&part)?;
                Ok::<File, std::io::Error>(spool)
            });
            let written = written
                .await
                .map_err(|e| ImageError::failed("spool", digest, e))?;
            spool = written.map_err(|e| ImageError::failed("spool", digest, e))?;
        }
        self.upload(digest, bytes, Arc::new(spool), reporter).await
    }

    async fn upload(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        reporter: LayerReporter<'_>,
    ) -> Result<Transfer, ImageError> {
        let sent_bytes = AtomicU64::new(0);
        let progress = |more: u64| {
            let sent_bytes = sent_bytes.fetch_add(more, Ordering::Relaxed) + more;
            reporter.sent(sent_bytes, bytes);
        };
        self.destination
            .put_blob(digest, bytes, spool, &progress)
            .await?;
        self.count(bytes);
        Ok(Transfer::Uploaded)
    }

    /// Stores a manifest or index without naming it.
    pub async fn document(&self, document: &Document) -> Result<(), ImageError> {
        self.destination.put_document(document).await?;
        self.count(document.bytes.len() as u64);
        Ok(())
    }

    /// Names the image. The last step.
    pub async fn name(&self, document: &Document) -> Result<(), ImageError> {
        self.destination.name(document).await?;
        self.count(document.bytes.len() as u64);
        Ok(())
    }

    fn count(&self, bytes: u64) {
        self.uploads.fetch_add(1, Ordering::Relaxed);
        self.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    async fn flight(&self, digest: BlobDigest) -> Arc<OnceCell<Transfer>> {
        Arc::clone(self.flights.lock().await.entry(digest).or_default())
    }
}
