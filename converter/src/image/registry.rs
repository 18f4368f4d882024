// SPDX-License-Identifier: Apache-2.0
//! One image in a registry, over the fetcher's client, which does authentication, redirects, retries
//! and time-outs.
//!
//! Uploads read the spool from its start; pieces are sent one after another, so that an upload holds
//! one piece in memory. An upload that fails is aborted; one that the process did not live to abort is
//! the registry's to expire.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use sluice_blockindex::digest::{BlobDigest, ManifestDigest};
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_fetcher::registry::{
    ImageReference, MountOutcome, RegistryClient, RegistryError, Repository,
};
use sluice_fetcher::source::{
    BlobSource, BlobStream, OriginSet, Priority, ReadContext, RegistryBlobSource, RetryPolicy,
    SourceError,
};

use super::{BlobBody, Descriptor, Document, ImageError, ImageReader, ImageWriter};

/// Bytes read from the spool at a time; the client gathers them into pieces.
const READ_BYTES: usize = 1024 * 1024;

/// Signatures as OCI 1.1 referrers, by the tools that make them.
const SIGNATURES: [(&str, &str); 3] = [
    ("application/vnd.cncf.notary.signature", "notation"),
    ("application/vnd.dev.cosign.artifact.sig.v1+json", COSIGN),
    ("application/vnd.dev.sigstore.bundle.v0.3+json", COSIGN),
];
const COSIGN: &str = "cosign";

/// The tag under which cosign keeps signatures where it does not use referrers.
pub(super) fn cosign_tag(manifest: BlobDigest) -> String {
    format!("sha256-{}.sig", manifest.hex())
}

/// The most bytes of one range: an index, which may have this many.
const RANGE_MAX_BYTES: u64 = sluice_blockindex::annotations::INDEX_MAX_BYTES;

/// One image of a repository.
#[derive(Debug)]
pub struct RegistryImage {
    client: RegistryClient,
    reference: ImageReference,
    label: String,
}

impl RegistryImage {
    /// The image that `reference` names; nothing is asked yet.
    pub fn new(client: RegistryClient, reference: ImageReference) -> Self {
        let label = format!("docker://{reference}");
        Self {
            client,
            reference,
            label,
        }
    }

    /// The reference, with Docker's defaults filled in.
    pub fn reference(&self) -> &ImageReference {
        &self.reference
    }

    fn place(&self) -> &Repository {
        self.reference.place()
    }

    fn context() -> ReadContext {
        // A user waits for a conversion; the client bounds each wait by its own time-outs.
        ReadContext::new(Priority::Foreground)
    }

    async fn manifest(&self, reference: &ImageReference) -> Result<Document, ImageError> {
        let what = format!("image docker://{reference}");
        let fetched = self.client.manifest(&Self::context(), reference).await;
        let fetched = fetched.map_err(|e| registry_error("read", &what, e))?;
        Document::parse(&what, Some(&fetched.media_type), fetched.bytes)
    }

    fn blob_name(&self, digest: BlobDigest) -> String {
        format!("blob {digest} of {}", self.place())
    }

    async fn open(&self, digest: BlobDigest, whole_bytes: u64) -> Result<BlobStream, ImageError> {
        let opened = self
            .client
            .blob(&Self::context(), self.place(), digest, whole_bytes)
            .await;
        opened.map_err(|e| source_error("read", self.blob_name(digest), e))
    }

    async fn put(&self, reference: &ImageReference, document: &Document) -> Result<(), ImageError> {
        let (media_type, bytes) = (&document.media_type, document.bytes.clone());
        let put = self
            .client
            .put_manifest(&Self::context(), reference, media_type, bytes)
            .await;
        let what = format!("docker://{reference}");
        let stored = put.map_err(|e| registry_error("write manifest", &what, e))?;
        match stored.as_bytes() == document.digest.as_bytes() {
            true => Ok(()),
            false => Err(ImageError::Corrupt {
                what,
                expected: document.digest.to_string(),
                actual: stored.to_string(),
            }),
        }
    }
}

fn registry_error(action: &'static str, what: impl ToString, error: RegistryError) -> ImageError {
    match error {
        RegistryError::NotFound { .. } => ImageError::NotFound {
            what: what.to_string(),
        },
        other => ImageError::failed(action, what, other),
    }
}

fn source_error(action: &'static str, what: impl ToString, error: SourceError) -> ImageError {
    match error {
        SourceError::Registry(error) => registry_error(action, what, error),
        other => ImageError::failed(action, what, other),
    }
}

#[async_trait]
impl ImageReader for RegistryImage {
    fn label(&self) -> &str {
        &self.label
    }

    async fn root(&self) -> Result<Document, ImageError> {
        self.manifest(&self.reference).await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        let digest = ManifestDigest::from_bytes(*descriptor.digest.as_bytes());
        let document = self.manifest(&self.place().with_digest(digest)).await?;
        let what = format!("manifest {digest} of {}", self.place());
        Document::verified(&what, descriptor, document.bytes)
    }

    async fn blob(&self, digest: BlobDigest, bytes: u64) -> Result<BlobBody, ImageError> {
        let stream = self.open(digest, bytes).await?;
        let what = self.blob_name(digest);
        Ok(Box::pin(stream.body.map(move |part| {
            part.map_err(|e| source_error("read", &what, e))
        })))
    }

    async fn range(
        &self,
        digest: BlobDigest,
        blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        let what = self.blob_name(digest);
        let source = RegistryBlobSource::new(
            self.client.clone(),
            digest,
            blob_bytes,
            OriginSet::new([self.place().clone()]),
            RetryPolicy::default(),
        );
        let read = async {
            source
                .open(&Self::context(), extent)
                .await?
                .narrow(extent)?
                .collect(RANGE_MAX_BYTES)
                .await
        };
        read.await.map_err(|e| source_error("read", &what, e))
    }

    async fn signers(&self, manifest: BlobDigest) -> Vec<&'static str> {
        let mut found = Vec::new();
        let context = Self::context();
        if let Ok(tag) = self.place().tagged(&cosign_tag(manifest))
            && self.client.resolve(&context, &tag).await.is_ok()
        {
            found.push(COSIGN);
        }
        let subject = ManifestDigest::from_bytes(*manifest.as_bytes());
        for (artifact_type, tool) in SIGNATURES {
            if found.contains(&tool) {
                continue;
            }
            let listed = self
                .client
                .referrers(&context, self.place(), subject, artifact_type);
            match listed.await {
                Ok(listed) if listed.is_empty() => {}
                Ok(_) => found.push(tool),
                Err(error) => tracing::debug!(%manifest, %error, "signatures cannot be listed"),
            }
        }
        found
    }

    fn repository(&self) -> Option<Repository> {
        Some(self.place().clone())
    }
}

#[async_trait]
impl ImageWriter for RegistryImage {
    async fn has_blob(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError> {
        let size = self
            .client
            .blob_size(&Self::context(), self.place(), digest)
            .await;
        let size = size.map_err(|e| registry_error("look for", self.blob_name(digest), e))?;
        Ok(size == Some(bytes))
    }

    async fn mount_blob(&self, digest: BlobDigest, from: &Repository) -> Result<bool, ImageError> {
        if from.host() != self.place().host() || from == self.place() {
            return Ok(false);
        }
        let context = Self::context();
        match self
            .client
            .mount_blob(&context, self.place(), from, digest)
            .await
        {
            Ok(MountOutcome::Mounted) => Ok(true),
            Ok(MountOutcome::Upload(upload)) => {
                // The caller has not read the blob yet; its upload starts anew later.
                let _ = upload.abort(&context).await;
                Ok(false)
            }
            // Mounting is a chance, no need: a registry may refuse it to those who may upload.
            Err(e) => {
                tracing::debug!(%digest, %from, error = %e, "mount refused");
                Ok(false)
            }
        }
    }

    async fn put_blob(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ImageError> {
        let context = Self::context();
        let what = self.blob_name(digest);
        let failed = |e| registry_error("upload", &what, e);
        let mut upload = self
            .client
            .start_upload(&context, self.place())
            .await
            .map_err(failed)?;
        let mut offset = 0;
        while offset < bytes {
            let length = usize::try_from(bytes - offset)
                .unwrap_or(READ_BYTES)
                .min(READ_BYTES);
            let file = Arc::clone(&spool);
            let part = tokio::task::spawn_blocking(move || {
                let mut part = vec![0; length];
                file.read_exact_at(&mut part, offset)
                    .map(|()| Bytes::from(part))
            });
            let part = part
                .await
                .map_err(|e| ImageError::failed("read spool of", &what, e))?;
            let part = part.map_err(|e| ImageError::failed("read spool of", &what, e))?;
            if let Err(e) = upload.write(&context, part).await {
                let _ = upload.abort(&context).await;
                return Err(failed(e));
            }
            offset += length as u64;
            progress(length as u64);
        }
        upload.finish(&context, digest).await.map_err(failed)
    }

    async fn put_document(&self, document: &Document) -> Result<(), ImageError> {
        let digest = ManifestDigest::from_bytes(*document.digest.as_bytes());
        self.put(&self.place().with_digest(digest), document).await
    }

    async fn name(&self, document: &Document) -> Result<(), ImageError> {
        if let Some(wanted) = self.reference.digest()
            && wanted.as_bytes() != document.digest.as_bytes()
        {
            return Err(ImageError::Invalid {
                what: self.label.clone(),
                reason: format!(
                    "the result has digest {}; name it by a tag",
                    document.digest
                ),
            });
        }
        self.put(&self.reference, document).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use sluice_fetcher::registry::fake::{FakeRegistry, ReferrersApi};
    use sluice_fetcher::registry::{NoCredentials, RegistryOptions};

    const MANIFEST: &str = crate::image::document::OCI_MANIFEST;

    #[tokio::test]
    async fn signatures_are_found_by_tag_and_by_referrer() {
        let fake = FakeRegistry::start().await;
        let client = RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials));
        let reference = format!("{}/team/app:v1", fake.host()).parse().unwrap();
        let image = RegistryImage::new(client.unwrap(), reference);
        let add = |tag: &str, value: serde_json::Value| {
            let bytes = value.to_string();
            fake.add_manifest("team/app", tag, MANIFEST, bytes.clone());
            Descriptor::new(
                MANIFEST,
                BlobDigest::of(bytes.as_bytes()),
                bytes.len() as u64,
            )
        };
        let manifest = |n: u32| json!({"mediaType": MANIFEST, "layers": [], "n": n});
        for api in [None, Some(ReferrersApi::default())] {
            fake.set_referrers(api);
            let unsigned = add("v1", manifest(1));
            assert!(image.signers(unsigned.digest).await.is_empty());
            // Another kind of referrer is no signature.
            let subject = add("v2", manifest(2));
            let artifact = "application/vnd.sluice.index.v1";
            add(
                "a",
                json!({"mediaType": MANIFEST, "artifactType": artifact, "layers": [], "subject": subject}),
            );
            assert!(image.signers(subject.digest).await.is_empty());
        }
        let by_tag = add("v3", manifest(3));
        add(&cosign_tag(by_tag.digest), manifest(4));
        assert_eq!(image.signers(by_tag.digest).await, ["cosign"]);
        let notary = "application/vnd.cncf.notary.signature";
        let subject = add("v5", manifest(5));
        add(
            "b",
            json!({"mediaType": MANIFEST, "artifactType": notary, "layers": [], "subject": subject}),
        );
        assert_eq!(image.signers(subject.digest).await, ["notation"]);
    }
}
