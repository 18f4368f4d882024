// SPDX-License-Identifier: Apache-2.0
//! Manifests: by tag with revalidation, by digest with a question of access only.
//!
//! A tag that was checked within `[mirror] fresh` needs no question if the client's access is fresh, too.
//! Otherwise the registry is asked by HEAD with `If-None-Match`: 304, or the digest that is known, means
//! unchanged; another digest, or none, means that the manifest is fetched; 401, 403 and 404 are passed on;
//! anything else means that the registry cannot be asked, and what is kept is served within the stale bound.

use std::sync::Arc;

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::{Passed, PassedAnswer, RegistryError, Repository};
use tokio::time::Instant;

use super::access::Standing;
use super::answer::{self, CONTENT_DIGEST};
use super::manifests::{Content, Variant};
use super::request::Target;
use super::{Answered, Client, Kind, Outcome, Shared};

/// The largest manifest that is served; the specification asks for 4 MiB at least.
const MANIFEST_MAX_BYTES: usize = 4 << 20;
/// What a manifest is whose registry does not say.
const UNKNOWN_TYPE: &str = "application/octet-stream";

/// Something by which a registry can be asked whether a repository is open.
#[derive(Clone, Debug)]
pub(super) enum Named {
    Manifest(Target),
    Blob(BlobDigest),
}

/// The registry did not say yes: its answer, or why there is none.
enum No {
    Answer(PassedAnswer),
    Unreachable(RegistryError),
}

impl No {
    fn is_unavailable(&self) -> bool {
        match self {
            No::Answer(answer) => answer.unavailable(),
            No::Unreachable(_) => true,
        }
    }
}

impl Shared {
    pub(super) async fn manifest(
        self: &Arc<Self>,
        place: &Repository,
        target: &Target,
        client: &Client,
    ) -> Answered {
        match target {
            Target::Tag(tag) => self.tag(place, tag, client).await,
            Target::Digest(digest) => self.by_digest(place, *digest, client).await,
        }
    }

    async fn tag(self: &Arc<Self>, place: &Repository, tag: &str, client: &Client) -> Answered {
        let now = Instant::now();
        let (_, accept) = client.accept();
        let target = Target::Tag(tag.to_owned());
        let known = self.manifests.tag(place, tag, &accept);
        let standing = self.access.standing(place, &client.shown, now);
        if let Some(known) = &known
            && standing == Standing::Fresh
            && now.duration_since(known.checked) < self.fresh
            && let Some(response) = self.kept(known, client)
        {
            return (Kind::Tag, Outcome::Cached, response);
        }
        // A HEAD for a client that wants no more, or to learn whether what is known still holds.
        let has_bytes =
            |known: &Variant| client.head || self.manifests.content(known.digest).is_some();
        let known = known.filter(has_bytes);
        let mut no = None;
        if client.head || known.is_some() {
            match self.ask(place, &target, true, known.as_ref(), client).await {
                Ok(answer) => {
                    if let Some(variant) = variant(&answer, known.as_ref(), &accept) {
                        self.accepted(place, client, Named::Manifest(target.clone()));
                        self.access.holds(place, variant.digest, variant.size_bytes);
                        self.manifests.note_tag(place, tag, variant.clone());
                        let same = known.is_some_and(|it| it.digest == variant.digest);
                        let outcome = if same {
                            Outcome::Unchanged
                        } else {
                            Outcome::Fetched
                        };
                        if (same || client.head)
                            && let Some(response) = self.kept(&variant, client)
                        {
                            return (Kind::Tag, outcome, response);
                        }
                    }
                }
                Err(it) => no = Some(it),
            }
        }
        // Not answered by the HEAD: changed, not known here, or the registry knows no HEAD.
        let asks_again = match &no {
            None => true,
            Some(No::Answer(answer)) => matches!(answer.status, 400 | 405 | 501),
            Some(No::Unreachable(_)) => false,
        };
        if asks_again {
            match self.fetch(place, &target, client).await {
                Ok(variant) => {
                    self.manifests.note_tag(place, tag, variant.clone());
                    if let Some(response) = self.kept(&variant, client) {
                        return (Kind::Tag, Outcome::Fetched, response);
                    }
                    return too_large(Kind::Tag);
                }
                Err(it) => no = Some(it),
            }
        }
        let Some(no) = no else {
            return too_large(Kind::Tag);
        };
        if matches!(&no, No::Answer(answer) if answer.status == 404) {
            self.manifests.forget_tag(place, tag);
        }
        let stale = || {
            let known = self.manifests.tag_to_anybody(place, tag, &accept)?;
            let age = now.duration_since(known.checked);
            (age < self.stale.max(self.fresh)).then(|| self.kept(&known, client))?
        };
        self.refused(Kind::Tag, place, client, &no, stale)
    }

    async fn by_digest(
        self: &Arc<Self>,
        place: &Repository,
        digest: BlobDigest,
        client: &Client,
    ) -> Answered {
        let now = Instant::now();
        let kept = || {
            let content = self.manifests.content(digest)?;
            self.access.held_bytes(place, digest)?;
            Some(as_response(digest, &content, client))
        };
        let standing = self.access.standing(place, &client.shown, now);
        if standing == Standing::Fresh
            && let Some(response) = kept()
        {
            return (Kind::Manifest, Outcome::Cached, response);
        }
        let target = Target::Digest(digest);
        let content = self.manifests.content(digest);
        let no = if client.head || content.is_some() {
            match self.ask(place, &target, true, None, client).await {
                Ok(answer) => {
                    self.accepted(place, client, Named::Manifest(target));
                    let length = length_of(&answer);
                    let size = content.as_ref().map(|it| it.bytes.len() as u64).or(length);
                    self.access.holds(place, digest, size.unwrap_or(0));
                    let response = match &content {
                        Some(content) => as_response(digest, content, client),
                        None => {
                            let media_type = answer.header(&CONTENT_TYPE).unwrap_or(UNKNOWN_TYPE);
                            answer::content(200, digest, media_type, length.unwrap_or(0))
                        }
                    };
                    return (Kind::Manifest, Outcome::Unchanged, response);
                }
                Err(no) => no,
            }
        } else {
            match self.fetch(place, &target, client).await {
                Ok(variant) => {
                    return match self.kept(&variant, client) {
                        Some(response) => (Kind::Manifest, Outcome::Fetched, response),
                        None => too_large(Kind::Manifest),
                    };
                }
                Err(no) => no,
            }
        };
        if matches!(&no, No::Answer(answer) if answer.status == 404) {
            self.access.lacks(place, digest);
        }
        self.refused(Kind::Manifest, place, client, &no, kept)
    }

    /// The answer when the registry did not say yes: what is kept, if the registry cannot be asked and the
    /// client had access lately; else the registry's word.
    fn refused(
        &self,
        kind: Kind,
        place: &Repository,
        client: &Client,
        no: &No,
        kept: impl FnOnce() -> Option<axum::http::Response<Body>>,
    ) -> Answered {
        if no.is_unavailable() {
            let standing = self.access.standing(place, &client.shown, Instant::now());
            match kept() {
                Some(mut response) if standing >= Standing::Stale => {
                    answer::mark_stale(&mut response);
                    return (kind, Outcome::Stale, response);
                }
                Some(_) => self.metrics.denied(),
                None => {}
            }
        }
        match no {
            No::Answer(answer) => {
                let outcome = self.judged(place, client, answer);
                (kind, outcome, answer::refusal(answer))
            }
            No::Unreachable(error) => {
                let response = answer::unreachable(&error.to_string());
                (kind, Outcome::Unavailable, response)
            }
        }
    }

    /// What is kept of a variant, as this client wants it.
    fn kept(&self, variant: &Variant, client: &Client) -> Option<axum::http::Response<Body>> {
        if let Some(content) = self.manifests.content(variant.digest) {
            return Some(as_response(variant.digest, &content, client));
        }
        client.head.then(|| {
            let (digest, size) = (variant.digest, variant.size_bytes);
            answer::content(200, digest, &variant.media_type, size)
        })
    }

    /// Asks the registry; anything but yes is [`No`].
    async fn ask(
        &self,
        place: &Repository,
        target: &Target,
        head: bool,
        known: Option<&Variant>,
        client: &Client,
    ) -> Result<PassedAnswer, No> {
        let unless = known.and_then(|known| {
            let etag = known.etag.clone();
            let etag = etag.unwrap_or_else(|| answer::etag(known.digest));
            HeaderValue::from_str(&etag).ok()
        });
        let request = Passed {
            head,
            rest: format!("manifests/{target}"),
            accept: client.accept().0,
            unless,
            shown: client.shown.clone(),
        };
        let answer = self.client.pass(&self.asking(), place, &request).await;
        match answer {
            Ok(answer) if answer.accepted() => Ok(answer),
            Ok(answer) => Err(No::Answer(answer)),
            Err(error) => Err(No::Unreachable(error)),
        }
    }

    /// Fetches a manifest, verifies and keeps it.
    async fn fetch(
        self: &Arc<Self>,
        place: &Repository,
        target: &Target,
        client: &Client,
    ) -> Result<Variant, No> {
        let answer = self.ask(place, target, false, None, client).await?;
        let stated = digest_of(&answer);
        let etag = answer.header(&ETAG).map(str::to_owned);
        let media_type = answer.header(&CONTENT_TYPE).unwrap_or(UNKNOWN_TYPE);
        let media_type = media_type.to_owned();
        let bytes = answer.collect(MANIFEST_MAX_BYTES).await;
        let bytes: Bytes = bytes.map_err(No::Unreachable)?;
        let digest = BlobDigest::of(&bytes);
        let expected = match target {
            Target::Digest(digest) => Some(*digest),
            Target::Tag(_) => stated,
        };
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(No::Unreachable(RegistryError::DigestMismatch {
                what: format!("manifest {target} of {place}"),
                expected: expected.to_string(),
                actual: digest.to_string(),
            }));
        }
        self.accepted(place, client, Named::Manifest(target.clone()));
        self.access.holds(place, digest, bytes.len() as u64);
        let size_bytes = bytes.len() as u64;
        let content = Content {
            media_type: media_type.clone(),
            bytes,
        };
        self.manifests.keep(digest, content);
        Ok(Variant {
            accept: client.accept().1,
            digest,
            media_type,
            size_bytes,
            etag,
            checked: Instant::now(),
        })
    }
}

/// Cannot be: what was kept just now is gone. The client comes again.
fn too_large(kind: Kind) -> Answered {
    let response = answer::error(
        503,
        "UNAVAILABLE",
        "the manifest could not be kept, come again",
    );
    (kind, Outcome::Unavailable, response)
}

fn digest_of(answer: &PassedAnswer) -> Option<BlobDigest> {
    answer.header(&CONTENT_DIGEST)?.parse().ok()
}

fn length_of(answer: &PassedAnswer) -> Option<u64> {
    answer.header(&CONTENT_LENGTH)?.parse().ok()
}

/// What an answer to HEAD says that a tag stands for; `None` where it does not say.
fn variant(answer: &PassedAnswer, known: Option<&Variant>, accept: &str) -> Option<Variant> {
    let checked = Instant::now();
    let unchanged = |known: &Variant| Variant {
        accept: accept.to_owned(),
        checked,
        ..known.clone()
    };
    if answer.status == 304 {
        return known.map(unchanged);
    }
    let digest = digest_of(answer)?;
    if let Some(known) = known.filter(|known| known.digest == digest) {
        return Some(unchanged(known));
    }
    Some(Variant {
        accept: accept.to_owned(),
        digest,
        media_type: answer.header(&CONTENT_TYPE)?.to_owned(),
        size_bytes: length_of(answer)?,
        etag: answer.header(&ETAG).map(str::to_owned),
        checked,
    })
}

fn as_response(
    digest: BlobDigest,
    content: &Content,
    client: &Client,
) -> axum::http::Response<Body> {
    if answer::is_known(client.header(IF_NONE_MATCH), digest) {
        let mut response = answer::empty(304);
        answer::set(&mut response, ETAG, &answer::etag(digest));
        answer::set(&mut response, CONTENT_DIGEST, &digest.to_string());
        return response;
    }
    let length = content.bytes.len() as u64;
    let mut response = answer::content(200, digest, &content.media_type, length);
    if !client.head {
        *response.body_mut() = Body::from(content.bytes.clone());
    }
    response
}
