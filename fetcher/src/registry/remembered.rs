// SPDX-License-Identifier: Apache-2.0
//! What is remembered of earlier answers: where a blob was redirected to, and who ignores ranges.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;
use sluice_blockindex::digest::BlobDigest;
use tokio::time::Instant;
use url::Url;

use super::Repository;
use super::endpoint::Endpoint;

/// Entries kept: more than the layers that a node fetches at one time; an entry is about 2 kB.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// An endpoint, a repository, and a blob in it.
type Key = (Arc<str>, Repository, BlobDigest);

fn key(at: &Endpoint, place: &Repository, blob: BlobDigest) -> Key {
    (Arc::clone(&at.label), place.clone(), blob)
}

/// The targets of redirects, used again for a short while. They may hold signatures: never logged.
pub(super) struct Redirects {
    life: Duration,
    targets: Mutex<LruCache<Key, (Url, Instant)>>,
}

impl Redirects {
    pub(super) fn new(life: Duration) -> Self {
        Redirects {
            life,
            targets: Mutex::new(LruCache::new(REMEMBERED)),
        }
    }

    pub(super) fn get(&self, at: &Endpoint, place: &Repository, blob: BlobDigest) -> Option<Url> {
        let key = key(at, place, blob);
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let (url, since) = targets.get(&key).cloned()?;
        if since.elapsed() < self.life {
            return Some(url);
        }
        targets.pop(&key);
        None
    }

    pub(super) fn put(&self, at: &Endpoint, place: &Repository, blob: BlobDigest, target: Url) {
        if self.life.is_zero() {
            return;
        }
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        targets.put(key(at, place, blob), (target, Instant::now()));
    }

    pub(super) fn forget(&self, at: &Endpoint, place: &Repository, blob: BlobDigest) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        targets.pop(&key(at, place, blob));
    }
}

/// Blobs of which a repository answered a range with all. Forgotten after a while: a proxy that does so
/// for a cold blob serves ranges of a warm one, and of other blobs anyway.
pub(super) struct RangeMemory {
    life: Duration,
    ignoring: Mutex<LruCache<Key, Instant>>,
}

impl RangeMemory {
    pub(super) fn new(life: Duration) -> Self {
        RangeMemory {
            life,
            ignoring: Mutex::new(LruCache::new(REMEMBERED)),
        }
    }

    pub(super) fn ignores(&self, at: &Endpoint, place: &Repository, blob: BlobDigest) -> bool {
        let key = key(at, place, blob);
        let mut ignoring = self.ignoring.lock().unwrap_or_else(PoisonError::into_inner);
        match ignoring.get(&key).map(Instant::elapsed) {
            Some(age) if age < self.life => true,
            Some(_) => {
                ignoring.pop(&key);
                false
            }
            None => false,
        }
    }

    pub(super) fn note(&self, at: &Endpoint, place: &Repository, blob: BlobDigest) {
        let mut ignoring = self.ignoring.lock().unwrap_or_else(PoisonError::into_inner);
        ignoring.put(key(at, place, blob), Instant::now());
    }
}
