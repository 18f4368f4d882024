// SPDX-License-Identifier: Apache-2.0
//! The mirror for ordinary pulls: the pull part of the OCI distribution API, on loopback.
//!
//! containerd, docker, podman, skopeo and other snapshotters ask it as they ask a registry. Manifests come
//! from memory when the registry says that they still hold; blobs from a cache on disk, from other nodes,
//! or from the registry, while they arrive. When the registry is down, what is here is served all the same,
//! for a bounded time. `docs/mirror.md` says how clients are set up.
//!
//! - `request`: what is asked, of which registry: pure.
//! - `access`: who may have what is kept: the registry decides, proofs of that are remembered.
//! - `manifests`: what tags stood for, and the bytes.
//! - `manifest`, `blob`, `pass`: the answers.
//! - `serve`: connections and their bounds.
//!
//! # Rules
//! - The client's `Authorization` goes to the registry that the client named, and nowhere else. It is
//!   never logged or written.
//! - A failure of the registry reaches the client as such; a 401 with its challenge, so that the client
//!   gets its token as if it had asked the registry.
//! - Nothing waits for ever: a head of an answer comes within [`HEAD_DEADLINE`], a body makes progress.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::ACCEPT;
use axum::http::{Method, Request, Response};
use sluice_fetcher::blob_cache::{BlobCache, PieceGivers};
use sluice_fetcher::registry::{PassedAnswer, RegistryClient, Repository, Shown};
use sluice_fetcher::source::{Priority, ReadContext};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod access;
mod answer;
mod blob;
mod manifest;
mod manifests;
mod metrics;
mod pass;
mod request;
mod serve;
mod stall;

use access::Access;
use manifests::Manifests;
use request::{Asked, Refusal};

use crate::config::MirrorConfig;
use crate::snapshots::BlobOrigin;
use crate::trust::Trust;

pub use metrics::{Kind, MirrorMetrics, Outcome};
pub use serve::serve_at;

/// How long a client waits for the head of an answer: the registry's own time-outs (connect, head) fit
/// into it twice, for a question that finds a manifest changed and the request that fetches it.
const HEAD_DEADLINE: Duration = Duration::from_secs(70);
/// How long a body may take however well it goes: a blob of 10 GB at 1 MB/s takes 2.8 h.
const BODY_DEADLINE: Duration = Duration::from_secs(6 * 3600);
/// Bodies of blobs at a time. Each may hold a read of 256 KiB.
const BODIES: usize = 256;
/// How long a request waits for one of these to end, before the client is told to come again.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// Questions to registries at a time whether a repository is open to everybody; none is worth a queue.
const OPEN_QUESTIONS: usize = 4;
/// How long such a question may take.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// What the mirror is doing, for `sluice status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorState {
    /// It listens.
    pub listening: bool,
    /// Why not.
    pub problem: String,
}

/// Finds the nodes that may have pieces of a blob of this place.
pub type Nodes = Arc<dyn Fn(&Repository) -> Option<Arc<dyn PieceGivers>> + Send + Sync>;

/// What the mirror stands on.
pub struct MirrorParts {
    /// Asks registries with what clients showed, and has no credentials of its own.
    pub client: RegistryClient,
    /// Keeps blobs.
    pub blobs: BlobCache,
    /// Other nodes.
    pub nodes: Nodes,
    /// What is counted.
    pub metrics: MirrorMetrics,
    /// Hides what clients showed; new for each process.
    pub key: [u8; 32],
    /// Cancelled when the daemon stops.
    pub stop: CancellationToken,
}

impl fmt::Debug for MirrorParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorParts").finish_non_exhaustive()
    }
}

/// The mirror. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Mirror {
    shared: Arc<Shared>,
}

struct Shared {
    listen: SocketAddr,
    upstream: Option<String>,
    registries: Trust,
    fresh: Duration,
    stale: Duration,
    client: RegistryClient,
    blobs: BlobCache,
    nodes: Nodes,
    access: Access,
    manifests: Manifests,
    bodies: Arc<Semaphore>,
    questions: Arc<Semaphore>,
    metrics: MirrorMetrics,
    state: Mutex<MirrorState>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}

/// What of a client's request the answers need.
#[derive(Debug)]
struct Client {
    head: bool,
    shown: Shown,
    headers: axum::http::HeaderMap,
}

impl Client {
    fn header(&self, name: axum::http::HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// What it accepts, as it is passed on and in one form.
    fn accept(&self) -> (Vec<axum::http::HeaderValue>, String) {
        let values: Vec<_> = self.headers.get_all(ACCEPT).iter().cloned().collect();
        let texts = values.iter().filter_map(|value| value.to_str().ok());
        let accepted = manifests::accepted(texts);
        (values, accepted)
    }
}

impl Mirror {
    /// A mirror of this configuration. Serves nobody before [`serve_at`].
    #[must_use]
    pub fn new(config: &MirrorConfig, parts: MirrorParts) -> Self {
        let MirrorParts {
            client,
            blobs,
            nodes,
            metrics,
            key,
            stop,
        } = parts;
        let shared = Shared {
            listen: config.listen,
            upstream: config.upstream.clone(),
            registries: Trust::new(config.registries.clone()),
            fresh: config.fresh,
            stale: config.stale,
            client,
            blobs,
            nodes,
            access: Access::new(key, config.access, config.stale),
            manifests: Manifests::new(),
            bodies: Arc::new(Semaphore::new(BODIES)),
            questions: Arc::new(Semaphore::new(OPEN_QUESTIONS)),
            metrics,
            state: Mutex::default(),
            tasks: TaskTracker::new(),
            stop,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Where it listens, or would.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.shared.listen
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> MirrorState {
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_state(&self, listening: bool, problem: &str) {
        let state = self.shared.state.lock();
        *state.unwrap_or_else(PoisonError::into_inner) = MirrorState {
            listening,
            problem: problem.to_owned(),
        };
    }

    /// The blobs that it keeps.
    #[must_use]
    pub fn blobs(&self) -> &BlobCache {
        &self.shared.blobs
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &MirrorMetrics {
        &self.shared.metrics
    }

    /// Answers one request.
    pub async fn answer(&self, request: Request<()>) -> Response<Body> {
        let begun = Instant::now();
        let (kind, outcome, response) =
            match tokio::time::timeout(HEAD_DEADLINE, self.shared.route(request)).await {
                Ok(answered) => answered,
                Err(_) => (
                    Kind::Other,
                    Outcome::Unavailable,
                    answer::error(504, "UNAVAILABLE", "the registry took too long"),
                ),
            };
        self.shared.metrics.answered(kind, outcome);
        tracing::debug!(
            kind = kind.as_str(),
            outcome = outcome.as_str(),
            status = response.status().as_u16(),
            took = ?begun.elapsed(),
            "answered a pull"
        );
        response
    }

    /// Waits for what runs besides the requests.
    pub async fn stop(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.blobs.stop().await;
    }
}

type Answered = (Kind, Outcome, Response<Body>);

impl Shared {
    async fn route(self: &Arc<Self>, request: Request<()>) -> Answered {
        let refuse = |status, code, what: &str| {
            let response = answer::error(status, code, what);
            (Kind::Other, Outcome::Refused, response)
        };
        let (head, ()) = request.into_parts();
        if !matches!(head.method, Method::GET | Method::HEAD) {
            let mut refused = refuse(405, "UNSUPPORTED", "this is a mirror: push to the registry");
            let allow = axum::http::HeaderValue::from_static("GET, HEAD");
            refused.2.headers_mut().insert("allow", allow);
            return refused;
        }
        let Some(shown) = Shown::of(&head.headers) else {
            return refuse(431, "UNSUPPORTED", "the Authorization is too long");
        };
        let client = Client {
            head: head.method == Method::HEAD,
            shown,
            headers: head.headers,
        };
        let query = head.uri.query().unwrap_or_default();
        let asked = request::parse(head.uri.path(), query, self.upstream.as_deref());
        match asked {
            Ok(Asked::Version(host)) => self.version(host, &client).await,
            Ok(Asked::Manifest(place, target)) if self.serves(&place) => {
                self.manifest(&place, &target, &client).await
            }
            Ok(Asked::Blob(place, digest)) if self.serves(&place) => {
                self.blob(&place, digest, &client).await
            }
            Ok(Asked::Other(place, rest)) if self.serves(&place) => {
                self.other(&place, &rest, &client).await
            }
            Ok(_) => refuse(
                403,
                "DENIED",
                "[mirror] registries allows no pull from there",
            ),
            Err(Refusal::Name) => refuse(400, "NAME_INVALID", "no name, tag or digest"),
            Err(Refusal::NoUpstream) => refuse(
                404,
                "NAME_UNKNOWN",
                "no registry is named (?ns=HOST or /v2/HOST/NAME/), and [mirror] upstream is not set",
            ),
            Err(Refusal::NotFound) => refuse(404, "UNSUPPORTED", "no path of a pull"),
        }
    }

    /// Whether the mirror serves a repository; never itself.
    fn serves(&self, place: &Repository) -> bool {
        let origin = BlobOrigin::from(place);
        place.host() != self.listen.to_string() && self.registries.allows(&origin)
    }

    /// A context for a question to the registry.
    fn asking(&self) -> ReadContext {
        ReadContext::new(Priority::Foreground)
            .with_cancel(self.stop.clone())
            .with_timeout(HEAD_DEADLINE)
    }

    /// What an answer that is no yes means; that the client was not let in is remembered.
    fn judged(&self, place: &Repository, client: &Client, answer: &PassedAnswer) -> Outcome {
        if answer.denied() {
            self.access.denied(place, &client.shown);
            return Outcome::Denied;
        }
        match answer.status {
            404 => Outcome::NotFound,
            _ => Outcome::Unavailable,
        }
    }

    /// The registry let the client in: remembered, and if it showed something, whether it had to.
    fn accepted(self: &Arc<Self>, place: &Repository, client: &Client, what: manifest::Named) {
        let now = Instant::now();
        self.access.accepted(place, &client.shown, now);
        if client.shown.is_nothing() || !self.access.should_ask(place, now) {
            return;
        }
        let Ok(permit) = Arc::clone(&self.questions).try_acquire_owned() else {
            return;
        };
        let (shared, place) = (Arc::clone(self), place.clone());
        self.tasks.spawn(async move {
            let _permit = permit;
            if shared.is_open(&place, &what).await {
                shared
                    .access
                    .accepted(&place, &Shown::NOTHING, Instant::now());
            }
        });
    }

    /// Whether everybody gets this.
    async fn is_open(&self, place: &Repository, what: &manifest::Named) -> bool {
        let context = self.asking().with_timeout(OPEN_DEADLINE);
        match what {
            manifest::Named::Manifest(target) => {
                let reference = match target {
                    request::Target::Tag(tag) => place.tagged(tag).ok(),
                    request::Target::Digest(digest) => {
                        let digest = sluice_blockindex::digest::ManifestDigest::from_bytes(
                            *digest.as_bytes(),
                        );
                        Some(place.with_digest(digest))
                    }
                };
                match reference {
                    Some(reference) => self.client.resolve(&context, &reference).await.is_ok(),
                    None => false,
                }
            }
            manifest::Named::Blob(digest) => {
                let size = self.client.blob_size(&context, place, *digest).await;
                matches!(size, Ok(Some(_)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
