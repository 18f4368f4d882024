// SPDX-License-Identifier: Apache-2.0
//! An image store in memory, for tests: counts writes and can be told to lie.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobBody, Descriptor, Document, ImageError, ImageReader, ImageWriter, Repository};

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// What the store did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Counts {
    pub blobs_read: usize,
    pub ranges_read: usize,
    pub blobs_written: usize,
    pub blobs_mounted: usize,
    pub documents_written: usize,
    pub named: usize,
}

#[derive(Debug, Default)]
struct State {
    blobs: BTreeMap<BlobDigest, Bytes>,
    documents: BTreeMap<BlobDigest, Document>,
    root: Option<BlobDigest>,
    counts: Counts,
}

/// One image of one repository.
#[derive(Debug, Default, Clone)]
pub(crate) struct MemoryImage {
    label: String,
    state: Arc<Mutex<State>>,
    /// Blobs of other repositories on the same "registry".
    pub mountable: Option<(Repository, Arc<MemoryImage>)>,
    /// The manifest that is signed.
    pub signed: Option<BlobDigest>,
}

impl MemoryImage {
    pub fn new(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            ..Self::default()
        }
    }

    pub fn insert_blob(&self, bytes: impl Into<Bytes>) -> BlobDigest {
        let bytes = bytes.into();
        let digest = BlobDigest::of(&bytes);
        self.state.lock().unwrap().blobs.insert(digest, bytes);
        digest
    }

    /// Stores other bytes under a digest than it names.
    pub fn corrupt_blob(&self, digest: BlobDigest, bytes: impl Into<Bytes>) {
        self.state
            .lock()
            .unwrap()
            .blobs
            .insert(digest, bytes.into());
    }

    pub fn remove_blob(&self, digest: BlobDigest) {
        self.state.lock().unwrap().blobs.remove(&digest);
    }

    pub fn blob_bytes(&self, digest: BlobDigest) -> Option<Bytes> {
        self.state.lock().unwrap().blobs.get(&digest).cloned()
    }

    pub fn insert_document(&self, document: &Document, root: bool) {
        let mut state = self.state.lock().unwrap();
        state.documents.insert(document.digest, document.clone());
        if root {
            state.root = Some(document.digest);
        }
    }

    pub fn counts(&self) -> Counts {
        self.state.lock().unwrap().counts.clone()
    }

    pub fn reset_counts(&self) {
        self.state.lock().unwrap().counts = Counts::default();
    }

    fn not_found(&self, what: impl ToString) -> ImageError {
        ImageError::NotFound {
            what: format!("{} in {}", what.to_string(), self.label),
        }
    }
}

#[async_trait]
impl ImageReader for MemoryImage {
    fn label(&self) -> &str {
        &self.label
    }

    async fn root(&self) -> Result<Document, ImageError> {
        let state = self.state.lock().unwrap();
        let root = state.root.and_then(|digest| state.documents.get(&digest));
        root.cloned().ok_or_else(|| self.not_found("image"))
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        let state = self.state.lock().unwrap();
        let found = state.documents.get(&descriptor.digest).cloned();
        let found = found.ok_or_else(|| self.not_found(descriptor.digest))?;
        Document::verified(&self.label, descriptor, found.bytes)
    }

    async fn blob(&self, digest: BlobDigest, _bytes: u64) -> Result<BlobBody, ImageError> {
        let mut state = self.state.lock().unwrap();
        state.counts.blobs_read += 1;
        let bytes = state
            .blobs
            .get(&digest)
            .cloned()
            .ok_or_else(|| self.not_found(digest))?;
        let parts: Vec<_> = bytes
            .chunks(10_000)
            .map(|part| Ok(bytes.slice_ref(part)))
            .collect();
        Ok(Box::pin(futures::stream::iter(parts)))
    }

    async fn range(
        &self,
        digest: BlobDigest,
        _blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        let bytes = self
            .blob_bytes(digest)
            .ok_or_else(|| self.not_found(digest))?;
        let (start, end) = (length(extent.start()), length(extent.end()));
        let part = bytes.get(start..end);
        let part = part.ok_or_else(|| ImageError::failed("read", digest, "out of bounds"))?;
        self.state.lock().unwrap().counts.ranges_read += 1;
        Ok(bytes.slice_ref(part))
    }

    async fn signers(&self, manifest: BlobDigest) -> Vec<&'static str> {
        let signed = self.signed == Some(manifest);
        signed.then_some("cosign").into_iter().collect()
    }

    fn repository(&self) -> Option<Repository> {
        Some(Repository::new("memory.test", &self.label).unwrap())
    }
}

#[async_trait]
impl ImageWriter for MemoryImage {
    async fn has_blob(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError> {
        Ok(self
            .blob_bytes(digest)
            .is_some_and(|found| found.len() as u64 == bytes))
    }

    async fn mount_blob(&self, digest: BlobDigest, from: &Repository) -> Result<bool, ImageError> {
        let Some((repository, other)) = &self.mountable else {
            return Ok(false);
        };
        let Some(bytes) = other.blob_bytes(digest).filter(|_| repository == from) else {
            return Ok(false);
        };
        let mut state = self.state.lock().unwrap();
        state.blobs.insert(digest, bytes);
        state.counts.blobs_mounted += 1;
        Ok(true)
    }

    async fn put_blob(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ImageError> {
        let mut content = vec![0; length(bytes)];
        spool.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(spool.metadata().unwrap().len(), bytes);
        assert_eq!(BlobDigest::of(&content), digest, "callers know the digest");
        let mut state = self.state.lock().unwrap();
        progress(bytes);
        state.blobs.insert(digest, content.into());
        state.counts.blobs_written += 1;
        Ok(())
    }

    async fn put_document(&self, document: &Document) -> Result<(), ImageError> {
        let mut state = self.state.lock().unwrap();
        for descriptor in document
            .list("layers")?
            .iter()
            .chain(&document.single("config")?)
        {
            let present = state.blobs.contains_key(&descriptor.digest) || descriptor.is_foreign();
            assert!(
                present,
                "a manifest comes after its blobs: {}",
                descriptor.digest
            );
        }
        for descriptor in document.list("manifests")? {
            assert!(
                state.documents.contains_key(&descriptor.digest),
                "an index comes last"
            );
        }
        state.documents.insert(document.digest, document.clone());
        state.counts.documents_written += 1;
        Ok(())
    }

    async fn name(&self, document: &Document) -> Result<(), ImageError> {
        self.put_document(document).await?;
        let mut state = self.state.lock().unwrap();
        state.root = Some(document.digest);
        state.counts.named += 1;
        Ok(())
    }
}
