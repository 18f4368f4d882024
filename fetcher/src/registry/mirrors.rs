// SPDX-License-Identifier: Apache-2.0
//! The mirrors of registries: which there are, and which are asked now.
//!
//! # Which there are
//! A Dragonfly daemon if one is configured, then the hosts of the registry's `hosts.toml`
//! ([`super::hosts`]). Files are looked at again at most every few seconds, off the runtime; while they are
//! read what was known before counts. A file with an error counts for nothing, and a warning says so once.
//! The node's own mirror is left out: it would ask itself.
//!
//! # Which are asked now
//! One that fails (no answer, a time-out, 5xx, 429, wrong bytes) is left alone, for longer with each further
//! failure; when its time is over one request tries it, and the others follow when that went well. One that
//! lacks a blob (404), denies a repository (401, 403) or gives a blob only whole is not asked for
//! that for a while, and for everything else as before.
//!
//! **Locks** each map has its own mutex; none is held across an await or while another is taken.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use sluice_blockindex::digest::BlobDigest;
use tokio::time::Instant;
use url::{Host as UrlHost, Url};

use super::endpoint::Endpoint;
use super::options::RegistryOptions;
use super::{RegistryError, Repository, dragonfly};
use crate::backoff::Backoff;
use crate::clock;
use crate::metrics::Metrics;
use crate::source::{Class, ReadContext};

mod attempt;
mod build;
#[cfg(test)]
mod tests;

pub(super) use attempt::Attempt;

/// Registries and endpoints that are remembered.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// What endpoints are remembered to lack.
const LACKS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Longest wait for files to be read, where nothing is known yet.
const READ_DEADLINE: Duration = Duration::from_secs(2);
/// How long one request alone tries an endpoint that had failed.
const PROBE: Duration = Duration::from_secs(10);

/// The endpoints of a registry.
#[derive(Debug)]
pub(super) struct Endpoints {
    /// Those that are asked first, in order.
    pub(super) mirrors: Vec<Arc<Endpoint>>,
    /// The registry, or what stands for it.
    pub(super) origin: Arc<Endpoint>,
}

/// What is known of a registry's files.
#[derive(Clone)]
struct Known {
    endpoints: Arc<Endpoints>,
    stamp: super::hosts::Stamp,
    looked: Instant,
    /// Somebody is looking.
    looking: bool,
}

/// How an endpoint does.
struct State {
    backoff: Backoff,
    probed: Option<Instant>,
}

pub(super) struct Mirrors {
    options: Arc<RegistryOptions>,
    metrics: Metrics,
    known: Mutex<LruCache<String, Known>>,
    states: Mutex<LruCache<Arc<str>, State>>,
    /// Until when an endpoint is not asked for a blob, or for anything, of a repository.
    lacks: Mutex<LruCache<LackKey, Lack>>,
}

/// An endpoint, a repository, and a blob in it.
type LackKey = (Arc<str>, Repository, Option<BlobDigest>);

/// What an endpoint is not asked for.
#[derive(Clone, Copy)]
struct Lack {
    until: Option<Instant>,
    /// It has the blob, but gives it only whole: who does not wait may have it.
    whole_only: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mirrors {
    pub(super) fn new(options: Arc<RegistryOptions>, metrics: Metrics) -> Self {
        Mirrors {
            options,
            metrics,
            known: Mutex::new(LruCache::new(REMEMBERED)),
            states: Mutex::new(LruCache::new(REMEMBERED)),
            lacks: Mutex::new(LruCache::new(LACKS)),
        }
    }

    /// The endpoints of `host`. Waits for files only where nothing is known of it, and for a short time.
    ///
    /// **Errors** where `host` makes no URL, or the caller leaves.
    pub(super) async fn of(
        self: &Arc<Self>,
        context: &ReadContext,
        host: &str,
    ) -> Result<Arc<Endpoints>, RegistryError> {
        if self.options.mirrors.directories.is_empty() {
            return self.without_files(host);
        }
        let now = clock::now();
        let stamp = {
            let mut all = lock(&self.known);
            match all.get_mut(host) {
                Some(known)
                    if known.looking || now < known.looked + self.options.mirrors.look_every =>
                {
                    return Ok(Arc::clone(&known.endpoints));
                }
                Some(known) => {
                    known.looking = true;
                    Some((Arc::clone(&known.endpoints), known.stamp.clone()))
                }
                None => None,
            }
        };
        let (mirrors, host_name) = (Arc::clone(self), host.to_owned());
        let before = stamp.as_ref().map(|(endpoints, _)| Arc::clone(endpoints));
        // Not joined: it ends by itself, and its result is kept for the next who asks.
        let looking = tokio::task::spawn_blocking(move || mirrors.look(&host_name, stamp));
        if let Some(before) = before {
            return Ok(before);
        }
        let looked = context
            .bound(tokio::time::timeout(READ_DEADLINE, looking))
            .await?;
        match looked {
            Ok(Ok(endpoints)) => endpoints,
            // A file system that hangs: without mirrors then.
            Ok(Err(_)) | Err(_) => self.without_files(host),
        }
    }

    fn without_files(&self, host: &str) -> Result<Arc<Endpoints>, RegistryError> {
        Ok(Arc::new(Endpoints {
            mirrors: self.dragonfly(host)?.into_iter().collect(),
            origin: Arc::new(Endpoint::origin(&self.options, host)?),
        }))
    }

    fn dragonfly(&self, host: &str) -> Result<Option<Arc<Endpoint>>, RegistryError> {
        let Some(dragonfly) = &self.options.mirrors.dragonfly else {
            return Ok(None);
        };
        dragonfly::endpoint(&self.options, dragonfly, host).map(|it| Some(Arc::new(it)))
    }

    /// Reads the files of `host` if they changed, and remembers what they say. **Blocks.**
    fn look(
        &self,
        host: &str,
        before: Option<(Arc<Endpoints>, super::hosts::Stamp)>,
    ) -> Result<Arc<Endpoints>, RegistryError> {
        let (endpoints, stamp) = match before {
            Some((endpoints, stamp)) if stamp.holds() => (endpoints, stamp),
            _ => {
                let found = super::hosts::find(&self.options.mirrors.directories, host);
                let stamp = found.stamp.clone();
                (Arc::new(self.endpoints(host, &found)?), stamp)
            }
        };
        let known = Known {
            endpoints: Arc::clone(&endpoints),
            stamp,
            looked: clock::now(),
            looking: false,
        };
        lock(&self.known).put(host.to_owned(), known);
        Ok(endpoints)
    }

    /// Whether the endpoint is worth a request for `blob`, or for anything, of the repository. What it
    /// gives only whole is for those who can wait.
    pub(super) fn admits(
        &self,
        at: &Endpoint,
        place: &Repository,
        blob: Option<BlobDigest>,
        can_wait: bool,
    ) -> bool {
        let now = clock::now();
        {
            let mut lacks = lock(&self.lacks);
            let mut lacking = |blob| {
                let key = (Arc::clone(&at.label), place.clone(), blob);
                lacks.get(&key).is_some_and(|lack| {
                    lack.until.is_some_and(|until| now < until) && !(lack.whole_only && can_wait)
                })
            };
            if lacking(None) || (blob.is_some() && lacking(blob)) {
                return false;
            }
        }
        let mut states = lock(&self.states);
        let Some(state) = states.get_mut(&at.label) else {
            return true;
        };
        if !state.backoff.is_failing() {
            return true;
        }
        let rests = state.backoff.not_before().is_some_and(|until| now < until);
        let probed = state.probed.is_some_and(|since| now < since + PROBE);
        if rests || probed {
            return false;
        }
        state.probed = Some(now);
        true
    }

    /// It gave what was asked of it.
    fn succeeded(&self, at: &Endpoint) {
        let recovered = {
            let mut states = lock(&self.states);
            let Some(state) = states.get_mut(&at.label) else {
                return;
            };
            let recovered = state.backoff.is_failing();
            state.backoff.succeeded();
            state.probed = None;
            recovered
        };
        if recovered {
            tracing::info!(mirror = %at.label, "mirror is back");
        }
    }

    /// A request that was begun at `began` failed. `asked`: a pause that it asked for.
    fn failed(&self, at: &Endpoint, reason: &str, asked: Option<Duration>, began: Instant) {
        let now = clock::now();
        let options = &self.options.mirrors;
        let (new, pause) = {
            let mut states = lock(&self.states);
            let state = states.get_or_insert_mut(Arc::clone(&at.label), || State {
                backoff: Backoff::new(began),
                probed: None,
            });
            let new = !state.backoff.is_failing();
            state.backoff.failed(
                options.first_pause,
                options.longest_pause,
                asked,
                began,
                now,
            );
            state.probed = None;
            let until = state.backoff.not_before();
            (new, until.map(|until| until.saturating_duration_since(now)))
        };
        if new {
            self.metrics.left_alone(at.kind);
            tracing::warn!(mirror = %at.label, ?pause, "leave a mirror alone: {reason}");
        } else {
            tracing::debug!(mirror = %at.label, ?pause, "mirror failed again: {reason}");
        }
    }

    /// It does not have `blob`, or lets nobody into the repository (`None`).
    fn lacks(&self, at: &Endpoint, place: &Repository, blob: Option<BlobDigest>, whole_only: bool) {
        let until = clock::moment_after(self.options.mirrors.lack_memory);
        let key = (Arc::clone(&at.label), place.clone(), blob);
        lock(&self.lacks).put(key, Lack { until, whole_only });
    }

    /// Whether a URL of `hosts.toml` leads to this node's own mirror.
    fn is_own(&self, url: &Url) -> bool {
        let Some(own) = self.options.mirrors.own else {
            return false;
        };
        if url.port_or_known_default() != Some(own.port()) {
            return false;
        }
        let loops = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
        let reached = |ip: IpAddr| {
            ip == own.ip()
                || (loops(ip) && loops(own.ip()))
                // It listens everywhere. An address that can be bound is one of this machine.
                || (own.ip().is_unspecified() && UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok())
        };
        match url.host() {
            Some(UrlHost::Ipv4(ip)) => reached(ip.into()),
            Some(UrlHost::Ipv6(ip)) => reached(ip.to_ipv4_mapped().map_or(ip.into(), IpAddr::V4)),
            Some(UrlHost::Domain(name)) => {
                let local = name == "localhost" || name.ends_with(".localhost");
                local && loops(own.ip())
            }
            None => false,
        }
    }

    /// A request failed: takes note of what that says of the endpoint, or of what was asked for.
    fn note(
        &self,
        at: &Endpoint,
        place: &Repository,
        blob: Option<BlobDigest>,
        error: &RegistryError,
        began: Instant,
    ) {
        match error {
            RegistryError::NotFound { .. } => self.lacks(at, place, blob, false),
            RegistryError::Denied { .. } => self.lacks(at, place, None, false),
            RegistryError::DigestMismatch { .. } => self.gave_wrong_bytes(at),
            _ if error.class() == Class::Cancelled => {}
            _ => self.failed(at, &error.to_string(), error.retry_after(), began),
        }
    }
}
