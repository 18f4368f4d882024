// SPDX-License-Identifier: Apache-2.0
//! The registry client: OCI distribution specification 1.1, the client's half.
//!
//! Thin by intent (see docs/decisions/002-registry-client.md): one request at a time is built, sent
//! and judged here, so that the rules that keep a node alive can be kept exactly.
//!
//! - **Credentials** are sent only to the host they belong to, and to the token service that this
//!   host names, never along a redirect to another host.
//! - **Redirects** are followed by hand, at most [`MAX_REDIRECTS`] times, never from https to plain
//!   http unless that host is configured as plain.
//! - **401, 403 and an expired redirect** all mean "refresh once".
//! - **Ranges** are single; an answer of 200 is the whole blob, handed on as such and remembered.
//! - **Every wait is bounded**: connect, head of the answer, stalls in the body, the caller's
//!   deadline. 429 and 5xx are retried with growing pauses, `Retry-After` honoured.
//! - **Mirrors** (`hosts.toml`, Dragonfly) are asked before the registry for what is read, with credentials
//!   of their own; each costs a bounded time, and the registry is always asked last.
//! - **In flight** per host are at most so many requests, of which some are kept for readers.
//!
//! Nothing here is written to disk; a crash leaves at most an unfinished upload at the registry.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::HeaderMap;
use url::Url;

use crate::metrics::Metrics;
use crate::source::{Attempts, ReadContext};

mod auth;
mod blobs;
mod challenge;
mod credentials;
mod dragonfly;
mod endpoint;
mod error;
#[cfg(any(test, feature = "test-support"))]
pub mod fake;
mod hosts;
mod manifests;
mod media;
mod mirrors;
mod options;
mod passing;
mod proxies;
mod reference;
mod referrers;
mod remembered;
mod transport;
mod upload;

use auth::{Authorizer, Entry};
use endpoint::Endpoint;
use mirrors::Mirrors;
use remembered::{RangeMemory, Redirects};
use transport::{Answer, Call, Transport};

pub use credentials::{
    Credential, CredentialChain, CredentialFiles, CredentialProvider, CredentialTarget,
    DockerConfig, KubeletPlugins, NoCredentials, Secret, StaticCredentials,
};
pub use error::RegistryError;
pub use manifests::{FetchedManifest, ManifestBody, Resolved};
pub use media::{MANIFEST_TYPES, is_image_index, is_image_manifest};
pub use options::{DragonflyOptions, HostOptions, MirrorOptions, RegistryOptions};
pub use passing::{Passed, PassedAnswer, PassedBlob, Shown};
pub use proxies::ProxyRules;
pub use reference::{
    DOCKER_HUB, ImageReference, ReferenceError, Repository, api_host, host_name,
    is_plain_http_default, port_of,
};
pub use referrers::{Listed, NewReferrer, Referrer, fallback_tag};
pub use upload::{MountOutcome, Upload};

/// Most redirects followed for one request: registries use one, a proxy in front one more; ten is
/// what browsers and curl users are used to.
pub const MAX_REDIRECTS: usize = 10;

/// A client for any number of registries. Cheap to clone; clones share connections, tokens and limits.
#[derive(Clone)]
pub struct RegistryClient {
    inner: Arc<Inner>,
}

struct Inner {
    options: Arc<RegistryOptions>,
    transport: Arc<Transport>,
    authorizer: Authorizer,
    redirects: Redirects,
    ranges: RangeMemory,
    mirrors: Arc<Mirrors>,
    metrics: Metrics,
}

impl fmt::Debug for RegistryClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryClient").finish_non_exhaustive()
    }
}

impl RegistryClient {
    /// A client with these options, asking `credentials` for what each host needs.
    ///
    /// Reads CA files at once; call it from outside the asynchronous runtime's hot paths.
    ///
    /// **Errors** [`RegistryError::Configuration`] when a CA file cannot be read.
    pub fn new(
        options: RegistryOptions,
        credentials: Arc<dyn CredentialProvider>,
    ) -> Result<Self, RegistryError> {
        Self::counted(options, credentials, Metrics::new())
    }

    /// As [`Self::new`], counting what mirrors fail to give, and what expires, in `metrics`, whose steps name what is
    /// waited for.
    ///
    /// **Errors** as [`Self::new`].
    pub fn counted(
        options: RegistryOptions,
        credentials: Arc<dyn CredentialProvider>,
        metrics: Metrics,
    ) -> Result<Self, RegistryError> {
        let options = Arc::new(options);
        let steps = metrics.steps().clone();
        let transport = Arc::new(Transport::new(Arc::clone(&options), steps)?);
        let authorizer = Authorizer::new(Arc::clone(&options), Arc::clone(&transport), credentials);
        let redirects = Redirects::new(options.redirect_ttl);
        let ranges = RangeMemory::new(options.range_memory);
        let mirrors = Arc::new(Mirrors::new(Arc::clone(&options), metrics.clone()));
        let inner = Inner {
            options,
            transport,
            authorizer,
            redirects,
            ranges,
            mirrors,
            metrics,
        };
        Ok(RegistryClient {
            inner: Arc::new(inner),
        })
    }

    /// The registries (`host[:port]`) that the administrator named somewhere: in the options, by a directory with a
    /// `hosts.toml`, or with credentials. A registry whose port is not known may be among them.
    ///
    /// Reads files off the runtime. **Cancel** safe.
    pub async fn named_hosts(&self) -> Vec<String> {
        let options = &self.inner.options;
        let mut hosts: Vec<String> = options.hosts.keys().cloned().collect();
        let directories = options.mirrors.directories.clone();
        let (named, known) = tokio::join!(
            tokio::task::spawn_blocking(move || hosts::named(&directories)),
            self.inner.authorizer.hosts(),
        );
        hosts.extend(named.unwrap_or_default());
        hosts.extend(known);
        hosts
    }

    /// The options it was made with.
    pub fn options(&self) -> &RegistryOptions {
        &self.inner.options
    }
}

impl Inner {
    /// The URL of `rest` (`blobs/…`, `manifests/…`) in the API of `place`.
    fn url(&self, place: &Repository, rest: &str) -> Result<Url, RegistryError> {
        self.url_at(place.host(), &format!("{}/{rest}", place.name()))
    }

    /// What is below `/v2/` of a registry.
    fn url_at(&self, host: &str, path: &str) -> Result<Url, RegistryError> {
        let scheme = if self.options.is_plain(host) {
            "http"
        } else {
            "https"
        };
        let text = format!("{scheme}://{}/v2/{path}", api_host(host));
        Url::parse(&text).map_err(|error| RegistryError::Configuration {
            host: host.to_owned(),
            problem: format!("no URL: {error}"),
        })
    }

    /// The registry's own endpoint, the only one that its `Authorization` goes to.
    fn home(&self, place: &Repository) -> Result<Url, RegistryError> {
        self.url(place, "")
    }

    /// Sends `call` once, being let in along the way. The answer may have any status but 401 and
    /// 403 of the registry itself, which become [`RegistryError::Denied`].
    async fn exchange(
        &self,
        context: &ReadContext,
        call: &Call,
        place: &Repository,
        scope: &str,
    ) -> Result<Answer, RegistryError> {
        let origin = Endpoint::origin(&self.options, place.host())?;
        self.exchange_at(context, call, &origin, scope).await
    }

    /// As [`Inner::exchange`], at an endpoint.
    async fn exchange_at(
        &self,
        context: &ReadContext,
        call: &Call,
        at: &Endpoint,
        scope: &str,
    ) -> Result<Answer, RegistryError> {
        let home = &at.base;
        let mut entry = Entry::new(at, scope);
        let mut header = self.authorizer.first(context, &mut entry).await?;
        loop {
            let answer = self
                .transport
                .send(context, call, home, header.as_ref())
                .await?;
            let status = answer.status().as_u16();
            if answer.redirected.is_none() && status == 404 {
                // Registries hide from one user what they show to another.
                if let Some(other) = self.authorizer.another(context, &mut entry).await? {
                    drop(answer);
                    header = Some(other);
                    continue;
                }
            }
            if answer.redirected.is_some() || !matches!(status, 401 | 403) {
                self.authorizer.accepted(&entry, status == 404);
                return Ok(answer);
            }
            let endpoint = answer.endpoint.clone();
            let headers = answer.response.headers().clone();
            // The place in the queue is free again before a token is waited for.
            drop(answer);
            header = self.authorizer.again(context, &mut entry, &headers).await?;
            if entry.renews() && header.is_some() {
                tracing::info!(%endpoint, status, "token expired: go on with another");
                self.metrics.registry_did("token_expired");
            }
            if header.is_none() {
                return Err(RegistryError::Denied {
                    endpoint,
                    what: call.what.clone(),
                    status,
                    credentials: entry.summary(),
                });
            }
        }
    }

    /// [`Inner::exchange`], repeated while it fails in passing, until its status is among `accepted`.
    async fn ask(
        &self,
        context: &ReadContext,
        call: &Call,
        place: &Repository,
        scope: &str,
        accepted: &[u16],
    ) -> Result<Answer, RegistryError> {
        let origin = Endpoint::origin(&self.options, place.host())?;
        self.ask_at(context, call, &origin, scope, accepted, false)
            .await
    }

    /// As [`Inner::ask`], at an endpoint; a failure in passing ends it where it is to be asked `once`.
    async fn ask_at(
        &self,
        context: &ReadContext,
        call: &Call,
        at: &Endpoint,
        scope: &str,
        accepted: &[u16],
        once: bool,
    ) -> Result<Answer, RegistryError> {
        let mut attempts = Attempts::new(&self.options.retry);
        loop {
            let outcome = match self.exchange_at(context, call, at, scope).await {
                Ok(answer) => {
                    self.transport
                        .accept(context, answer, accepted, &call.what)
                        .await
                }
                Err(error) => Err(error),
            };
            match outcome {
                Ok(answer) => return Ok(answer),
                Err(error) if once => return Err(error),
                Err(error) => attempts.wait_after(context, error).await?,
            }
        }
    }
}

impl Inner {
    /// As [`Inner::ask_at`], with the whole body of an answer of 200, which is a manifest or another document of at
    /// most [`RegistryOptions::manifest_cap_bytes`]; what other answers have to say is not read.
    async fn ask_document(
        &self,
        context: &ReadContext,
        call: &Call,
        at: &Endpoint,
        scope: &str,
        accepted: &[u16],
        once: bool,
    ) -> Result<Received, RegistryError> {
        let cap_bytes = self.options.manifest_cap_bytes;
        let mut attempts = Attempts::new(&self.options.retry);
        loop {
            let answer = self
                .ask_at(context, call, at, scope, accepted, once)
                .await?;
            let mut received = Received {
                status: answer.status().as_u16(),
                headers: answer.response.headers().clone(),
                bytes: Bytes::new(),
            };
            if received.status != 200 {
                return Ok(received);
            }
            let body = self
                .transport
                .read_body(context, answer, cap_bytes, &call.what);
            match body.await {
                Ok(bytes) => {
                    received.bytes = bytes;
                    return Ok(received);
                }
                Err(error) if once => return Err(error),
                Err(error) => attempts.wait_after(context, error).await?,
            }
        }
    }
}

/// An answer with its body.
struct Received {
    status: u16,
    headers: HeaderMap,
    bytes: Bytes,
}

impl Received {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Of the body, by the sender's word.
    fn media_type(&self) -> Option<String> {
        self.header("content-type").map(media::of_content_type)
    }
}

/// The scope for reading from `place`.
fn pull_scope(place: &Repository) -> String {
    format!("repository:{}:pull", place.name())
}

/// The scope for writing to `place`.
fn push_scope(place: &Repository) -> String {
    format!("repository:{}:pull,push", place.name())
}

#[cfg(test)]
mod tests;
