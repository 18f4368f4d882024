// SPDX-License-Identifier: Apache-2.0
//! Manifests: resolve, get, put, tag.
//!
//! A manifest's bytes are kept exactly as they came: its digest is of those.

use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::{ImageIndex, ImageManifest};
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use serde::Deserialize;
use sluice_blockindex::digest::{BlobDigest, ManifestDigest};

use super::endpoint::Endpoint;
use super::media::{self, MANIFEST_TYPES};
use super::mirrors::Attempt;
use super::reference::ImageReference;
use super::transport::{Answer, Call};
use super::{RegistryClient, RegistryError, pull_scope, push_scope};
use crate::source::{Class, ReadContext, SourceKind};

/// What a reference stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The manifest's digest.
    pub digest: ManifestDigest,
    /// Its media type.
    pub media_type: String,
    /// Its size.
    pub size_bytes: u64,
}

/// A manifest as the registry stores it, its bytes verified against its digest.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// The digest of `bytes`.
    pub digest: ManifestDigest,
    /// Its media type: what it says of itself, else what the registry says.
    pub media_type: String,
    /// Exactly the bytes that the digest is of.
    pub bytes: Bytes,
}

/// A parsed manifest.
#[derive(Clone, Debug)]
pub enum ManifestBody {
    /// A list of manifests, one per platform.
    Index(Box<ImageIndex>),
    /// The manifest of one image.
    Image(Box<ImageManifest>),
}

/// The part of a manifest that says what it is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    layers: Option<serde::de::IgnoredAny>,
}

impl RegistryClient {
    /// What `reference` stands for, without reading it (HEAD; GET where HEAD is not supported). Mirrors that
    /// may say so are asked first.
    ///
    /// **Errors** [`RegistryError::NotFound`], [`RegistryError::Denied`]; transient ones are repeated before.
    pub async fn resolve(
        &self,
        context: &ReadContext,
        reference: &ImageReference,
    ) -> Result<Resolved, RegistryError> {
        let resolve =
            |at: Arc<Endpoint>, _| async move { self.resolve_at(context, &at, reference).await };
        self.first_of(context, reference, resolve).await
    }

    /// The manifest or index that `reference` stands for, verified. Mirrors that may say so are asked first.
    ///
    /// **Errors** [`RegistryError::TooLarge`] over [`super::RegistryOptions::manifest_cap_bytes`];
    /// [`RegistryError::DigestMismatch`] where the bytes are not those of the digest asked for or of
    /// the one the registry names.
    pub async fn manifest(
        &self,
        context: &ReadContext,
        reference: &ImageReference,
    ) -> Result<FetchedManifest, RegistryError> {
        let read = |at: Arc<Endpoint>, once| async move {
            self.manifest_at(context, &at, reference, once).await
        };
        self.first_of(context, reference, read).await
    }

    /// Asks each mirror that may answer once, then the registry, which is asked again where it fails in passing.
    pub(super) async fn first_of<T, F>(
        &self,
        context: &ReadContext,
        reference: &ImageReference,
        ask: impl Fn(Arc<Endpoint>, bool) -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        let mirrors = &self.inner.mirrors;
        let place = reference.place();
        let endpoints = mirrors.of(context, place.host()).await?;
        // By digest anybody's answer is as good; what a tag stands for is a matter of trust.
        let pinned = reference.digest();
        let blob = pinned.map(|digest| BlobDigest::from_bytes(*digest.as_bytes()));
        for at in &endpoints.mirrors {
            let can = match pinned {
                Some(_) => at.can.pull,
                None => at.can.resolve,
            };
            // Dragonfly distributes blobs.
            if !can || at.kind == SourceKind::Dragonfly || !mirrors.admits(at, place, blob, true) {
                continue;
            }
            let mut attempt = Attempt::begin(mirrors, at, place, blob);
            match attempt.bounded(context, ask(Arc::clone(at), true)).await {
                Ok(answer) => {
                    attempt.succeeded();
                    return Ok(answer);
                }
                Err(error) => {
                    tracing::debug!(mirror = %at.label, %reference, "mirror gives nothing: {error}");
                    let cancelled = error.class() == Class::Cancelled;
                    // A tag that it does not have says nothing of what it has.
                    if pinned.is_none() && matches!(error, RegistryError::NotFound { .. }) {
                        attempt.succeeded();
                    } else {
                        attempt.failed(context, &error);
                    }
                    if cancelled {
                        return Err(error);
                    }
                }
            }
        }
        ask(Arc::clone(&endpoints.origin), false).await
    }

    pub(super) async fn resolve_at(
        &self,
        context: &ReadContext,
        at: &Endpoint,
        reference: &ImageReference,
    ) -> Result<Resolved, RegistryError> {
        let call = manifest_call(Method::HEAD, at, reference)?;
        let scope = pull_scope(reference.place());
        let once = at.kind != SourceKind::Origin;
        // 400 and 405: seen from registries and proxies that know no HEAD here.
        let accepted = &[200, 400, 405, 501];
        let answer = self
            .inner
            .ask_at(context, &call, at, &scope, accepted, once)
            .await?;
        if let Some(resolved) = resolved_by(&answer, reference) {
            return Ok(resolved);
        }
        drop(answer);
        let manifest = self.manifest_at(context, at, reference, once).await?;
        Ok(Resolved {
            digest: manifest.digest,
            media_type: manifest.media_type,
            size_bytes: u64::try_from(manifest.bytes.len()).unwrap_or(u64::MAX),
        })
    }

    pub(super) async fn manifest_at(
        &self,
        context: &ReadContext,
        at: &Endpoint,
        reference: &ImageReference,
        once: bool,
    ) -> Result<FetchedManifest, RegistryError> {
        let call = manifest_call(Method::GET, at, reference)?;
        let scope = pull_scope(reference.place());
        let received = self
            .inner
            .ask_document(context, &call, at, &scope, &[200], once)
            .await?;
        let digest = ManifestDigest::of(&received.bytes);
        // A digest of another algorithm cannot be compared; ours then stands for itself.
        let stated = received
            .header("docker-content-digest")
            .and_then(|text| text.parse::<ManifestDigest>().ok());
        if let Some(expected) = reference.digest().or(stated)
            && expected != digest
        {
            return Err(RegistryError::DigestMismatch {
                what: call.what,
                expected: expected.to_string(),
                actual: digest.to_string(),
            });
        }
        let media_type = media_type_of(&received.bytes, received.media_type().as_deref());
        Ok(FetchedManifest {
            digest,
            media_type,
            bytes: received.bytes,
        })
    }

    /// Stores a manifest under `reference` (a tag or its digest); its blobs must be there already.
    ///
    /// **Errors** [`RegistryError::DigestMismatch`] where `reference` or the registry name another digest.
    pub async fn put_manifest(
        &self,
        context: &ReadContext,
        reference: &ImageReference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<ManifestDigest, RegistryError> {
        let stored = self.store_manifest(context, reference, media_type, bytes);
        stored.await.map(|(digest, _)| digest)
    }

    /// As [`Self::put_manifest`], with the head of the registry's answer.
    pub(super) async fn store_manifest(
        &self,
        context: &ReadContext,
        reference: &ImageReference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<(ManifestDigest, Answer), RegistryError> {
        let digest = ManifestDigest::of(&bytes);
        let mut call = manifest_call(
            Method::PUT,
            &Endpoint::origin(&self.inner.options, reference.host())?,
            reference,
        )?;
        let mismatch = |what: &str, expected: ManifestDigest| RegistryError::DigestMismatch {
            what: what.to_owned(),
            expected: expected.to_string(),
            actual: digest.to_string(),
        };
        if let Some(expected) = reference.digest().filter(|expected| *expected != digest) {
            return Err(mismatch(&call.what, expected));
        }
        let content_type =
            HeaderValue::from_str(media_type).map_err(|_| RegistryError::Refused {
                endpoint: reference.host().to_owned(),
                what: call.what.clone(),
                status: 400,
                detail: ": malformed media type".into(),
            })?;
        call.headers.insert(CONTENT_TYPE, content_type);
        call.body = bytes;
        let place = reference.place();
        let answer = self
            .inner
            .ask(context, &call, place, &push_scope(place), &[200, 201, 202])
            .await?;
        let stated = answer
            .header("docker-content-digest")
            .and_then(|text| text.parse().ok());
        match stated {
            Some(stated) if stated != digest => Err(mismatch("manifest as stored", stated)),
            _ => Ok((digest, answer)),
        }
    }

    /// Gives the manifest that `from` stands for the name `to` in the same repository.
    pub async fn tag(
        &self,
        context: &ReadContext,
        from: &ImageReference,
        to: &str,
    ) -> Result<ManifestDigest, RegistryError> {
        let named = from
            .place()
            .tagged(to)
            .map_err(|error| RegistryError::Configuration {
                host: from.host().to_owned(),
                problem: error.to_string(),
            })?;
        let manifest = self.manifest(context, from).await?;
        self.put_manifest(context, &named, &manifest.media_type, manifest.bytes)
            .await
    }
}

fn manifest_call(
    method: Method,
    at: &Endpoint,
    reference: &ImageReference,
) -> Result<Call, RegistryError> {
    let rest = format!("manifests/{}", reference.target());
    let what = format!("manifest {reference}");
    let mut call = at.call(method, reference.place(), &rest, what)?;
    let accept = MANIFEST_TYPES.join(", ");
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        call.headers.insert(ACCEPT, accept);
    }
    Ok(call)
}

/// What the head of an answer to HEAD says, if it says all.
fn resolved_by(answer: &Answer, reference: &ImageReference) -> Option<Resolved> {
    if answer.status().as_u16() != 200 {
        return None;
    }
    let stated = answer
        .header("docker-content-digest")?
        .parse::<ManifestDigest>()
        .ok()?;
    let media_type = media::of_content_type(answer.header("content-type")?);
    let size_bytes = answer.header("content-length")?.parse().ok()?;
    let is_manifest = MANIFEST_TYPES.contains(&media_type.as_str());
    let is_asked = reference.digest().is_none_or(|asked| asked == stated);
    (is_manifest && is_asked).then_some(Resolved {
        digest: stated,
        media_type,
        size_bytes,
    })
}

/// What a manifest is: by its own word, by its shape, or by the registry's word.
fn media_type_of(bytes: &[u8], content_type: Option<&str>) -> String {
    let known = |text: &&str| MANIFEST_TYPES.contains(text);
    let Ok(kind) = serde_json::from_slice::<Kind>(bytes) else {
        return content_type.unwrap_or_default().to_owned();
    };
    if let Some(own) = kind.media_type {
        return own;
    }
    match (
        content_type.filter(known),
        kind.manifests.is_some(),
        kind.layers.is_some(),
    ) {
        (Some(stated), _, _) => stated.to_owned(),
        (None, true, _) => media::OCI_INDEX.to_owned(),
        (None, false, true) => media::OCI_MANIFEST.to_owned(),
        (None, false, false) => content_type.unwrap_or_default().to_owned(),
    }
}

impl FetchedManifest {
    /// The manifest's content.
    ///
    /// **Errors** [`RegistryError::Protocol`] when it is no image manifest or index that we know.
    pub fn parse(&self) -> Result<ManifestBody, RegistryError> {
        let wrong = |problem: String| RegistryError::Protocol {
            endpoint: "registry".into(),
            what: format!("manifest {}", self.digest),
            problem,
        };
        let malformed = |error: oci_spec::OciSpecError| wrong(format!("malformed: {error}"));
        if media::is_image_index(&self.media_type) {
            let index = ImageIndex::from_reader(self.bytes.as_ref()).map_err(malformed)?;
            Ok(ManifestBody::Index(Box::new(index)))
        } else if media::is_image_manifest(&self.media_type) {
            let image = ImageManifest::from_reader(self.bytes.as_ref()).map_err(malformed)?;
            Ok(ManifestBody::Image(Box::new(image)))
        } else {
            Err(wrong(format!(
                "media type {:?} is no image",
                self.media_type
            )))
        }
    }
}
