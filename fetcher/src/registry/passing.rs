// SPDX-License-Identifier: Apache-2.0
//! Requests with a credential that somebody else brought: what a mirror asks on behalf of its client.
//!
//! The client's `Authorization` goes to the registry that the client named and never along a redirect, by
//! the same rules as our own ([`super::transport`]). Nothing is repeated and no token is fetched here: the
//! registry's answer, a 401 with its challenge included, is the client's to deal with.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use reqwest::Method;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH};
use reqwest::header::{RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use sha2::{Digest as _, Sha256};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use url::Url;

use super::blobs::judge_extent;
use super::transport::Call;
use super::{RegistryClient, RegistryError, Repository};
use crate::source::{BlobSource, BlobStream, ReadContext, SourceError, SourceKind};

/// The longest `Authorization` that is passed on: tokens of large clouds take some kilobytes.
const AUTHORIZATION_MAX_BYTES: usize = 16 * 1024;

/// What a client showed to be let in: an `Authorization`, or nothing. Never shown in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown(Option<HeaderValue>);

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Shown(…)"
        } else {
            "Shown(nothing)"
        })
    }
}

impl Shown {
    /// Nothing: the client is anonymous.
    pub const NOTHING: Shown = Shown(None);

    /// What stands in a request's headers; `None` where that is more than is passed on.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let Some(value) = headers.get(AUTHORIZATION) else {
            return Some(Shown::NOTHING);
        };
        if value.len() > AUTHORIZATION_MAX_BYTES {
            return None;
        }
        let mut value = value.clone();
        value.set_sensitive(true);
        Some(Shown(Some(value)))
    }

    /// Whether the client is anonymous.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.0.is_none()
    }

    /// A name for it that says nothing without the key.
    #[must_use]
    pub fn fingerprint(&self, key: &[u8; 32], place: &Repository) -> [u8; 32] {
        let mut inner = Sha256::new();
        match &self.0 {
            Some(value) => {
                inner.update([1]);
                inner.update(value.as_bytes());
            }
            None => inner.update([0]),
        }
        let mut hash = blake3::Hasher::new_keyed(key);
        hash.update(&inner.finalize());
        hash.update(place.host().as_bytes());
        hash.update(b"\0");
        hash.update(place.name().as_bytes());
        *hash.finalize().as_bytes()
    }
}

/// A request to pass on.
#[derive(Clone, Debug)]
pub struct Passed {
    /// HEAD instead of GET.
    pub head: bool,
    /// What follows `/v2/NAME/` in the path, with its query. The caller has checked it.
    pub rest: String,
    /// `Accept`.
    pub accept: Vec<HeaderValue>,
    /// `If-None-Match`.
    pub unless: Option<HeaderValue>,
    /// What the client showed.
    pub shown: Shown,
}

/// The registry's answer, with any status.
pub struct PassedAnswer {
    /// The status.
    pub status: u16,
    /// The headers as they came.
    pub headers: HeaderMap,
    /// It came from another endpoint than the registry's own: a status such as 403 is then not the
    /// registry's judgement on the client.
    pub redirected: bool,
    /// The body, bounded in time: an error when it stalls.
    pub body: BoxStream<'static, Result<Bytes, SourceError>>,
}

impl fmt::Debug for PassedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassedAnswer")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl PassedAnswer {
    /// A header's value, if it is text.
    #[must_use]
    pub fn header(&self, name: &HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The registry let the client in.
    #[must_use]
    pub fn accepted(&self) -> bool {
        matches!(self.status, 200..=299 | 304)
    }

    /// The registry did not let the client in.
    #[must_use]
    pub fn denied(&self) -> bool {
        matches!(self.status, 401 | 403) && !self.redirected
    }

    /// The registry cannot answer now.
    #[must_use]
    pub fn unavailable(&self) -> bool {
        matches!(self.status, 408 | 429 | 500..=599) || (self.redirected && self.status >= 400)
    }

    /// What of the headers tells a client how to go on after a failure.
    pub fn guidance(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> + '_ {
        [WWW_AUTHENTICATE, RETRY_AFTER]
            .into_iter()
            .flat_map(|name| {
                let values = self.headers.get_all(&name).iter().cloned();
                values.map(move |value| (name.clone(), value))
            })
    }

    /// Reads the body whole.
    ///
    /// **Errors** [`RegistryError::TooLarge`] over `cap_bytes`; those of the body.
    pub async fn collect(mut self, cap_bytes: usize) -> Result<Bytes, RegistryError> {
        let mut all = Vec::new();
        while let Some(piece) = self.body.next().await {
            let piece = piece?;
            if all.len().saturating_add(piece.len()) > cap_bytes {
                return Err(RegistryError::TooLarge {
                    what: "an answer to pass on".into(),
                    limit_bytes: cap_bytes as u64,
                });
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.into())
    }
}

impl RegistryClient {
    /// Passes a request on to `place`, once.
    ///
    /// **Errors** only where no answer came. **Cancel** safe.
    pub async fn pass(
        &self,
        context: &ReadContext,
        place: &Repository,
        request: &Passed,
    ) -> Result<PassedAnswer, RegistryError> {
        let url = self.inner.url(place, &request.rest)?;
        let what = format!("{} of {place}", request.rest);
        self.pass_to(context, url, place.host(), what, request)
            .await
    }

    /// Asks a registry for its version (`/v2/`), as clients do to learn how they are let in.
    ///
    /// **Errors** as [`RegistryClient::pass`].
    pub async fn pass_ping(
        &self,
        context: &ReadContext,
        host: &str,
        shown: &Shown,
    ) -> Result<PassedAnswer, RegistryError> {
        let request = Passed {
            head: false,
            rest: String::new(),
            accept: Vec::new(),
            unless: None,
            shown: shown.clone(),
        };
        let url = self.inner.url_at(host, "")?;
        let what = format!("the version of {host}");
        self.pass_to(context, url, host, what, &request).await
    }

    async fn pass_to(
        &self,
        context: &ReadContext,
        url: Url,
        host: &str,
        what: String,
        request: &Passed,
    ) -> Result<PassedAnswer, RegistryError> {
        let method = if request.head {
            Method::HEAD
        } else {
            Method::GET
        };
        let mut call = Call::new(method, url, what);
        for value in &request.accept {
            call.headers.append(ACCEPT, value.clone());
        }
        if let Some(value) = &request.unless {
            call.headers.insert(IF_NONE_MATCH, value.clone());
        }
        let home = self.inner.url_at(host, "")?;
        let transport = &self.inner.transport;
        let shown = request.shown.0.as_ref();
        let answer = transport.send(context, &call, &home, shown).await?;
        let status = answer.status().as_u16();
        let headers = answer.response.headers().clone();
        let redirected = answer.redirected.is_some();
        Ok(PassedAnswer {
            status,
            headers,
            redirected,
            body: transport.body(context, answer, 0, 0).boxed(),
        })
    }
}

/// A blob as a client with this credential may read it.
#[derive(Clone)]
pub struct PassedBlob {
    client: RegistryClient,
    place: Repository,
    label: String,
    blob: BlobDigest,
    size_bytes: u64,
    shown: Shown,
}

impl fmt::Debug for PassedBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassedBlob")
            .field("place", &self.place)
            .field("blob", &self.blob)
            .finish_non_exhaustive()
    }
}

impl PassedBlob {
    /// `blob`, which has `size_bytes`, in `place`.
    #[must_use]
    pub fn new(
        client: RegistryClient,
        place: Repository,
        blob: BlobDigest,
        size_bytes: u64,
        shown: Shown,
    ) -> Self {
        let label = place.to_string();
        PassedBlob {
            client,
            place,
            label,
            blob,
            size_bytes,
            shown,
        }
    }
}

#[async_trait]
impl BlobSource for PassedBlob {
    fn label(&self) -> &str {
        &self.label
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Origin
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        if extent.is_empty() {
            return Ok(BlobStream::empty(extent));
        }
        let inner = &self.client.inner;
        let url = inner.url(&self.place, &format!("blobs/{}", self.blob))?;
        let what = format!("blob {} of {}", self.blob, self.place);
        let mut call = Call::new(Method::GET, url, what);
        let ranged = extent.len() != self.size_bytes;
        if ranged {
            // Inclusive, as HTTP has it.
            let range = format!("bytes={}-{}", extent.start(), extent.end() - 1);
            if let Ok(value) = HeaderValue::from_str(&range) {
                call.headers.insert(RANGE, value);
            }
        }
        let home = inner.home(&self.place)?;
        let shown = self.shown.0.as_ref();
        let answer = inner.transport.send(context, &call, &home, shown).await?;
        if answer.status().as_u16() == 416 {
            return Err(SourceError::BeyondEnd { asked: extent });
        }
        let accepted = &[200, 206];
        let accept = inner
            .transport
            .accept(context, answer, accepted, &call.what);
        let answer = accept.await.map_err(|error| match error {
            // Whose credential it was is not known here.
            RegistryError::Denied {
                endpoint,
                what,
                status,
                ..
            } => RegistryError::Denied {
                endpoint,
                what,
                status,
                credentials: "as the client gave them".into(),
            },
            other => other,
        })?;
        let comes = judge_extent(&answer, extent, self.size_bytes, ranged)?;
        let (start, end) = (comes.start(), comes.end());
        let body = inner.transport.body(context, answer, start, end);
        Ok(BlobStream::new(comes, body))
    }
}
