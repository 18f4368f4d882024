// SPDX-License-Identifier: Apache-2.0
//! Who may have what is kept. No I/O.
//!
//! The registry decides. Each time that it lets a client into a repository, what the client showed (its
//! `Authorization`, or nothing) is remembered as a keyed hash, as a *proof* of access; what the repository
//! holds is remembered likewise. Kept content is given to whom a proof speaks for, of a repository that is
//! known to hold it. A proof is fresh for a short time. While the registry does not answer, older proofs
//! count, up to the stale bound.
//!
//! Tokens live for minutes, and each is a new thing to show: a repository whose content everybody gets,
//! as the mirror finds out by asking for itself without any credential, is open to all.
//!
//! All of it is in memory with a key of this process: a restart forgets it. **Bounds** entries:
//! [`REMEMBERED`] of each kind; the least recently used go, which costs a question to the registry.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::{Repository, Shown};
use tokio::time::Instant;

/// Proofs, open repositories, and contents of repositories. An entry takes some 200 bytes.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not zero");

/// What the proofs say of a client and a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// Nothing.
    Unknown,
    /// The registry let it in some time ago: good while the registry cannot be asked.
    Stale,
    /// The registry let it in just now.
    Fresh,
}

#[derive(Debug)]
struct Tables {
    proofs: LruCache<[u8; 32], Instant>,
    /// When everybody was let in last.
    open: LruCache<Repository, Instant>,
    /// When that was asked last.
    asked: LruCache<Repository, Instant>,
    /// What is in which repository, with its size.
    contents: LruCache<(Repository, BlobDigest), u64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Access {
    key: [u8; 32],
    fresh: Duration,
    stale: Duration,
    tables: Mutex<Tables>,
}

impl Access {
    /// Proofs are fresh, and good at all, for so long. `key` must be new for each process.
    pub(super) fn new(key: [u8; 32], fresh: Duration, stale: Duration) -> Self {
        let tables = Tables {
            proofs: LruCache::new(REMEMBERED),
            open: LruCache::new(REMEMBERED),
            asked: LruCache::new(REMEMBERED),
            contents: LruCache::new(REMEMBERED),
        };
        Access {
            key,
            fresh,
            stale: stale.max(fresh),
            tables: Mutex::new(tables),
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Each change is one map operation.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registry let a client in who showed this.
    pub(super) fn accepted(&self, place: &Repository, shown: &Shown, now: Instant) {
        let name = shown.fingerprint(&self.key, place);
        let mut tables = self.tables();
        tables.proofs.put(name, now);
        if shown.is_nothing() {
            tables.open.put(place.clone(), now);
        }
    }

    /// The registry did not let it in.
    pub(super) fn denied(&self, place: &Repository, shown: &Shown) {
        let name = shown.fingerprint(&self.key, place);
        let mut tables = self.tables();
        tables.proofs.pop(&name);
        if shown.is_nothing() {
            tables.open.pop(place);
        }
    }

    /// Whether it should be found out if the repository is open to everybody; true once in a while.
    pub(super) fn should_ask(&self, place: &Repository, now: Instant) -> bool {
        let mut tables = self.tables();
        let before = tables.asked.get(place).copied();
        let due = before.is_none_or(|before| now.duration_since(before) >= self.fresh);
        if due {
            tables.asked.put(place.clone(), now);
        }
        due
    }

    /// What is known of a client.
    pub(super) fn standing(&self, place: &Repository, shown: &Shown, now: Instant) -> Standing {
        let name = shown.fingerprint(&self.key, place);
        let mut tables = self.tables();
        let proof = tables.proofs.get(&name).copied();
        let open = tables.open.get(place).copied();
        match proof.max(open).map(|at| now.duration_since(at)) {
            Some(age) if age < self.fresh => Standing::Fresh,
            Some(age) if age < self.stale => Standing::Stale,
            _ => Standing::Unknown,
        }
    }

    /// The registry says that the repository holds this.
    pub(super) fn holds(&self, place: &Repository, digest: BlobDigest, size_bytes: u64) {
        let key = (place.clone(), digest);
        self.tables().contents.put(key, size_bytes);
    }

    /// The registry says that it does not.
    pub(super) fn lacks(&self, place: &Repository, digest: BlobDigest) {
        self.tables().contents.pop(&(place.clone(), digest));
    }

    /// The size of what the repository is known to hold.
    pub(super) fn held_bytes(&self, place: &Repository, digest: BlobDigest) -> Option<u64> {
        self.tables()
            .contents
            .get(&(place.clone(), digest))
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, header::AUTHORIZATION};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn shown(text: &str) -> Shown {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, text.parse().unwrap());
        Shown::of(&headers).unwrap()
    }

    fn place(name: &str) -> Repository {
        Repository::new("r.example", name).unwrap()
    }

    #[test]
    fn proofs_speak_for_one_credential_and_one_repository_for_a_time() {
        let access = Access::new([1; 32], 10 * SECOND, 100 * SECOND);
        let (now, a, b) = (Instant::now(), place("a"), place("b"));
        let alice = shown("Basic YWxpY2U=");
        access.accepted(&a, &alice, now);
        let cases = [
            (&a, &alice, 0, Standing::Fresh),
            (&a, &alice, 9, Standing::Fresh),
            (&a, &alice, 10, Standing::Stale),
            (&a, &alice, 99, Standing::Stale),
            (&a, &alice, 100, Standing::Unknown),
            (&b, &alice, 0, Standing::Unknown),
            (&a, &Shown::NOTHING, 0, Standing::Unknown),
            (&a, &shown("Basic YWxpY2V="), 0, Standing::Unknown),
        ];
        for (place, shown, after, expected) in cases {
            let standing = access.standing(place, shown, now + after * SECOND);
            assert_eq!(standing, expected, "{place} {after}");
        }
        access.denied(&a, &alice);
        assert_eq!(access.standing(&a, &alice, now), Standing::Unknown);
    }

    #[test]
    fn what_everybody_gets_is_open_to_all() {
        let access = Access::new([1; 32], 10 * SECOND, 100 * SECOND);
        let (now, a, token) = (Instant::now(), place("a"), shown("Bearer x"));
        access.accepted(&a, &Shown::NOTHING, now);
        assert_eq!(access.standing(&a, &token, now), Standing::Fresh);
        assert_eq!(access.standing(&place("b"), &token, now), Standing::Unknown);
        access.denied(&a, &Shown::NOTHING);
        assert_eq!(access.standing(&a, &token, now), Standing::Unknown);
        assert!(access.should_ask(&a, now) && !access.should_ask(&a, now + 9 * SECOND));
        assert!(access.should_ask(&a, now + 10 * SECOND));
    }

    #[test]
    fn contents_belong_to_a_repository() {
        let access = Access::new([1; 32], SECOND, SECOND);
        let digest = BlobDigest::of(b"x");
        access.holds(&place("a"), digest, 7);
        assert_eq!(access.held_bytes(&place("a"), digest), Some(7));
        assert_eq!(access.held_bytes(&place("b"), digest), None);
        access.lacks(&place("a"), digest);
        assert_eq!(access.held_bytes(&place("a"), digest), None);
    }

    #[test]
    fn nothing_that_was_shown_is_shown() {
        let text = format!("{:?}", shown("Bearer secret"));
        assert!(!text.contains("secret"), "{text}");
        let access = Access::new([1; 32], SECOND, SECOND);
        access.accepted(&place("a"), &shown("Bearer secret"), Instant::now());
        assert!(!format!("{access:?}").contains("secret"));
    }
}
