// SPDX-License-Identifier: Apache-2.0
//! A blob at registries: every known place of it is tried.
//!
//! One blob is often known from several images, in other repositories or at other hosts, with other
//! credentials. When the credentials of one have expired another still works, so all are kept
//! ([`OriginSet`], which may grow while reads run) and the one that worked last is asked first.
//! One opening asks each place once; pauses and repetitions lie around the whole round, so a place
//! that is down costs no pause while another one works. A place that does not answer has a share of
//! the caller's patience only ([`RegistryOptions::place_timeout`]), and is asked last the next time,
//! also when the caller lost patience first.
//!
//! [`RegistryOptions::place_timeout`]: crate::registry::RegistryOptions::place_timeout

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::time::Instant;

use super::{
    BlobSource, BlobStream, Class, ReadContext, RetryPolicy, RetrySource, SourceError, SourceKind,
};
use crate::clock;
use crate::registry::{RegistryClient, Repository};

/// All places that a blob is known to be at. Shared by clones; only grows.
#[derive(Clone, Debug, Default)]
pub struct OriginSet {
    places: Arc<RwLock<Vec<Repository>>>,
}

impl OriginSet {
    /// Starts with these places, best first.
    pub fn new(places: impl IntoIterator<Item = Repository>) -> Self {
        let set = OriginSet::default();
        for place in places {
            set.add(place);
        }
        set
    }

    /// Adds a place; false when it was known already.
    pub fn add(&self, place: Repository) -> bool {
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let new = !places.contains(&place);
        if new {
            places.push(place);
        }
        new
    }

    /// The places known now, in the order in which they became known.
    pub fn places(&self) -> Vec<Repository> {
        self.places
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Reads one blob from the registries that are known to have it. Repeats and resumes by its policy.
pub struct RegistryBlobSource {
    rounds: RetrySource<Round>,
}

impl fmt::Debug for RegistryBlobSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryBlobSource")
            .field("round", self.rounds.below())
            .finish()
    }
}

impl RegistryBlobSource {
    /// A source of `blob`, which has `size_bytes`, at any of `origins`; repeats by `policy`.
    pub fn new(
        client: RegistryClient,
        blob: BlobDigest,
        size_bytes: u64,
        origins: OriginSet,
        policy: RetryPolicy,
    ) -> Self {
        let label = origins
            .places()
            .first()
            .map_or_else(|| "origin".to_owned(), |p| p.to_string());
        let round = Round {
            client,
            blob,
            size_bytes,
            origins,
            label,
            asked_first: AtomicUsize::new(0),
        };
        RegistryBlobSource {
            rounds: RetrySource::new(round, policy),
        }
    }

    /// As [`Self::new`], for callers that repeat by themselves: a failure is told at once, and a
    /// pause that the registry asks for is theirs.
    pub fn once(
        client: RegistryClient,
        blob: BlobDigest,
        size_bytes: u64,
        origins: OriginSet,
    ) -> Self {
        Self::new(client, blob, size_bytes, origins, RetryPolicy::never())
    }

    /// The places it asks, to add to.
    pub fn origins(&self) -> &OriginSet {
        &self.rounds.below().origins
    }
}

#[async_trait]
impl BlobSource for RegistryBlobSource {
    fn label(&self) -> &str {
        self.rounds.label()
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Origin
    }

    fn whole_blob_only(&self) -> bool {
        self.rounds.whole_blob_only()
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        self.rounds.open(context, extent).await
    }
}

/// Each place once.
struct Round {
    client: RegistryClient,
    blob: BlobDigest,
    size_bytes: u64,
    origins: OriginSet,
    label: String,
    /// Index of the place that is asked first. A stale value costs one request, so Relaxed is enough.
    asked_first: AtomicUsize,
}

impl fmt::Debug for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Round")
            .field("blob", &self.blob)
            .field("size_bytes", &self.size_bytes)
            .field("origins", &self.origins)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl BlobSource for Round {
    fn label(&self) -> &str {
        &self.label
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Origin
    }

    fn whole_blob_only(&self) -> bool {
        let places = self.origins.places();
        !places.is_empty()
            && places
                .iter()
                .all(|place| self.client.ignores_ranges(place, self.blob))
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        context.check()?;
        if extent.end() > self.size_bytes {
            return Err(SourceError::BeyondEnd { asked: extent });
        }
        if extent.is_empty() {
            return Ok(BlobStream::empty(extent));
        }
        let places = self.origins.places();
        let first = self
            .asked_first
            .load(Ordering::Relaxed)
            .min(places.len().saturating_sub(1));
        let order = (first..places.len()).chain(0..first);
        let mut left = places.len();
        let mut worst = None;
        for at in order {
            left = left.saturating_sub(1);
            match self.ask(context, &places, at, extent, left).await {
                Ok(stream) => {
                    self.asked_first.store(at, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(error) if error.class() == Class::Cancelled => return Err(error),
                Err(error) => {
                    let place = &places[at];
                    tracing::debug!(%place, blob = %self.blob, %error, "origin failed");
                    worst = Some(more_telling(worst, error));
                }
            }
        }
        Err(worst.unwrap_or_else(|| SourceError::NoSource {
            blob: self.blob.to_string(),
        }))
    }
}

impl Round {
    /// Asks the mirrors of the place at `at`, then the place itself, for a share of the time when `left` more may be asked after it.
    async fn ask(
        &self,
        context: &ReadContext,
        places: &[Repository],
        at: usize,
        extent: Extent<BlobSpace>,
        left: usize,
    ) -> Result<BlobStream, SourceError> {
        let (blob, size_bytes) = (self.blob, self.size_bytes);
        let mirrored = self
            .client
            .open_at_mirrors(context, &places[at], blob, size_bytes, extent);
        if let Some(stream) = mirrored.await? {
            return Ok(stream);
        }
        let share = self.client.options().place_timeout;
        let patience = Patience {
            round: self,
            at,
            next: (at + 1) % places.len(),
            until: clock::moment_after(share),
        };
        let open = self
            .client
            .open_blob(context, &places[at], self.blob, self.size_bytes, extent);
        let after = u32::try_from(left + 1)
            .ok()
            .and_then(|places| context.remaining()?.checked_div(places))
            .map_or(share, |fair| fair.min(share));
        let opened = if left == 0 {
            open.await.map_err(SourceError::from)
        } else {
            let opened = tokio::time::timeout(after, open).await;
            opened.map_or_else(
                |_| {
                    let offset = extent.start();
                    Err(SourceError::Stalled { after, offset })
                },
                |opened| opened.map_err(SourceError::from),
            )
        };
        drop(patience);
        opened
    }
}

/// A wait for a place. When it was long, whether it came to an end or was dropped, the place after it
/// is asked first from then on; a success says otherwise afterwards.
struct Patience<'a> {
    round: &'a Round,
    at: usize,
    next: usize,
    until: Option<Instant>,
}

impl Drop for Patience<'_> {
    fn drop(&mut self) {
        if self.until.is_some_and(|until| clock::now() >= until) {
            let first = &self.round.asked_first;
            // Another opening may know better already.
            let _ =
                first.compare_exchange(self.at, self.next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// Of the failures of several places, the one a caller should act on: one that may pass (so that it
/// is tried again), else the first.
fn more_telling(present: Option<SourceError>, new: SourceError) -> SourceError {
    match present {
        Some(present) if present.class() == Class::Transient || new.class() != Class::Transient => {
            present
        }
        _ => new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_that_may_pass_is_told_before_one_that_will_not() {
        let stalled = |offset| SourceError::Stalled {
            after: std::time::Duration::ZERO,
            offset,
        };
        let gone = |blob: &str| SourceError::NoSource { blob: blob.into() };
        let cases = [
            (vec![gone("a"), gone("b")], gone("a")),
            (vec![gone("a"), stalled(1)], stalled(1)),
            (vec![stalled(1), gone("a")], stalled(1)),
            (vec![stalled(1), stalled(2)], stalled(1)),
        ];
        for (errors, expected) in cases {
            let told = errors
                .iter()
                .cloned()
                .fold(None, |worst, error| Some(more_telling(worst, error)));
            assert_eq!(
                told.unwrap().to_string(),
                expected.to_string(),
                "{errors:?}"
            );
        }
    }
}
