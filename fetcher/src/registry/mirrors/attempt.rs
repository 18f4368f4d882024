// SPDX-License-Identifier: Apache-2.0
//! One request to a mirror: what comes of it is noted, also where its caller leaves.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use sluice_blockindex::digest::{BlobDigest, Sha256Hasher};
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::time::Instant;

use super::super::endpoint::Endpoint;
use super::super::{RegistryError, Repository};
use super::Mirrors;
use crate::clock;
use crate::source::{Blame, Class, ReadContext, Served, SourceError};

/// What must come of a body within a mirror's stall time-out; less is no help to anybody.
const PROGRESS_BYTES: usize = 4 << 10;
/// So much of a body, or all of it, shows that a mirror is well.
const PROOF_BYTES: u64 = 64 << 10;
/// The pause of a mirror that gave wrong bytes; that does not pass by itself.
const CORRUPT_PAUSE: Duration = Duration::from_secs(60);

/// See the module.
pub(in super::super) struct Attempt {
    mirrors: Arc<Mirrors>,
    at: Arc<Endpoint>,
    place: Repository,
    blob: Option<BlobDigest>,
    began: Instant,
    /// Its caller waits for the head of the answer.
    waiting: bool,
}

impl Attempt {
    /// Begins a request to `at`, which was admitted.
    pub(in super::super) fn begin(
        mirrors: &Arc<Mirrors>,
        at: &Arc<Endpoint>,
        place: &Repository,
        blob: Option<BlobDigest>,
    ) -> Self {
        Attempt {
            mirrors: Arc::clone(mirrors),
            at: Arc::clone(at),
            place: place.clone(),
            blob,
            began: clock::now(),
            waiting: true,
        }
    }

    /// Waits for `work` as long as the endpoint's patience lasts, and for half of the caller's time at most.
    ///
    /// **Errors** [`RegistryError::NoAnswer`] when that is over.
    pub(in super::super) async fn bounded<T>(
        &self,
        context: &ReadContext,
        work: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        let fair = context.remaining().map(|left| left / 2);
        let after = fair.map_or(self.at.patience, |fair| fair.min(self.at.patience));
        let late = |_| RegistryError::NoAnswer {
            endpoint: self.at.label.to_string(),
            what: format!("a request for {}", self.place),
            after,
        };
        tokio::time::timeout(after, work).await.map_err(late)?
    }

    /// It failed, for this reason.
    pub(in super::super) fn failed(mut self, context: &ReadContext, error: &RegistryError) {
        self.waiting = false;
        if error.class() == Class::Cancelled {
            return;
        }
        let metrics = &self.mirrors.metrics;
        metrics.requested(self.at.kind, context.priority);
        metrics.failed(self.at.kind, error.class());
        self.mirrors
            .note(&self.at, &self.place, self.blob, error, self.began);
    }

    /// It gave all that was asked of it.
    pub(in super::super) fn succeeded(&mut self) {
        self.waiting = false;
        self.mirrors.succeeded(&self.at);
    }

    /// It gives the blob only whole: not to be asked by those who cannot wait.
    pub(in super::super) fn whole_only(&self) {
        self.mirrors.lacks(&self.at, &self.place, self.blob, true);
    }

    /// The answer is not taken.
    pub(in super::super) fn declined(mut self, context: &ReadContext) {
        self.waiting = false;
        let metrics = &self.mirrors.metrics;
        metrics.requested(self.at.kind, context.priority);
    }

    /// The body of its answer, watched: a failure of it is one of the mirror. Where it is the whole blob its
    /// digest is checked.
    pub(in super::super) fn watch(
        mut self,
        comes: Extent<BlobSpace>,
        size_bytes: u64,
        body: impl Stream<Item = Result<Bytes, SourceError>> + Send + 'static,
    ) -> (
        impl Stream<Item = Result<Bytes, SourceError>> + Send + 'static,
        Served,
    ) {
        self.waiting = false;
        let keeper = Keeper {
            mirrors: Arc::clone(&self.mirrors),
            at: Arc::clone(&self.at),
        };
        let served = Served::new(self.at.kind, Arc::new(keeper));
        let whole = comes.start() == 0 && comes.end() == size_bytes;
        let digest = self.blob.filter(|_| whole);
        let state = Watched {
            stall: self.mirrors.options.mirrors.stall,
            attempt: self,
            body: body.boxed(),
            start: comes.start(),
            at: comes.start(),
            end: comes.end(),
            waited: Duration::ZERO,
            progress_bytes: 0,
            digest: digest.map(|digest| (digest, Sha256Hasher::new())),
        };
        (stream::try_unfold(state, Watched::next), served)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // Callers whose patience is shorter than the mirror's would wait for it each time.
        if self.waiting && self.began.elapsed() >= self.at.patience {
            self.mirrors
                .failed(&self.at, "no answer in time", None, self.began);
        }
    }
}

struct Watched {
    attempt: Attempt,
    stall: Duration,
    body: BoxStream<'static, Result<Bytes, SourceError>>,
    start: u64,
    at: u64,
    end: u64,
    /// How long bytes were waited for since enough of them came. What the reader takes for them is his.
    waited: Duration,
    progress_bytes: usize,
    digest: Option<(BlobDigest, Sha256Hasher)>,
}

impl Watched {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, SourceError> {
        let asked = clock::now();
        let piece = match self.body.next().await {
            Some(Ok(piece)) => piece,
            Some(Err(error)) => return Err(self.failed(error)),
            None if self.at < self.end => {
                let error = SourceError::ShortBody {
                    offset: self.at,
                    expected_end: self.end,
                };
                return Err(self.failed(error));
            }
            None => return self.check().map(|()| None),
        };
        self.waited += asked.elapsed();
        self.progress_bytes += piece.len();
        if self.progress_bytes >= PROGRESS_BYTES {
            (self.waited, self.progress_bytes) = (Duration::ZERO, 0);
        } else if self.waited >= self.stall {
            let error = SourceError::Stalled {
                after: self.stall,
                offset: self.at,
            };
            return Err(self.failed(error));
        }
        if let Some((_, hash)) = &mut self.digest {
            hash.update(&piece);
        }
        let count = u64::try_from(piece.len()).unwrap_or(u64::MAX);
        self.at = self.at.saturating_add(count);
        if self.at >= self.end || self.at - self.start >= PROOF_BYTES {
            self.attempt.succeeded();
        }
        Ok(Some((piece, self)))
    }

    fn check(&mut self) -> Result<(), SourceError> {
        let Some((expected, hash)) = self.digest.take() else {
            return Ok(());
        };
        let actual = BlobDigest::from_bytes(hash.finish());
        if actual == expected {
            return Ok(());
        }
        let (mirrors, at) = (&self.attempt.mirrors, &self.attempt.at);
        mirrors.metrics.corrupt(at.kind.as_str());
        mirrors.gave_wrong_bytes(at);
        Err(SourceError::DigestMismatch { expected, actual })
    }

    fn failed(&mut self, error: SourceError) -> SourceError {
        if error.class() != Class::Cancelled {
            let attempt = &self.attempt;
            let reason = error.to_string();
            attempt
                .mirrors
                .failed(&attempt.at, &reason, None, attempt.began);
        }
        error
    }
}

impl Mirrors {
    /// It gave bytes that are not what their digest says.
    pub(in super::super) fn gave_wrong_bytes(&self, at: &Endpoint) {
        self.failed(at, "it gave wrong bytes", Some(CORRUPT_PAUSE), clock::now());
    }
}

/// Hears that an endpoint gave wrong bytes.
struct Keeper {
    mirrors: Arc<Mirrors>,
    at: Arc<Endpoint>,
}

impl Blame for Keeper {
    fn blame(&self) {
        self.mirrors.gave_wrong_bytes(&self.at);
    }
}
