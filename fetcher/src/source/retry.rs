// SPDX-License-Identifier: Apache-2.0
//! Repeating what failed in passing: pauses, and a source that resumes broken streams.
//!
//! The pause before attempt n is random between half and all of `base * 2^(n-1)`, at most `cap`; a
//! `Retry-After` of the other side is honoured up to `retry_after_cap`. An attempt that could start
//! only after the caller's deadline, or after the budget is spent, is not waited for: the last error
//! is returned at once.
//!
//! A stream that breaks off in passing is reopened where it broke. The count of attempts starts anew
//! only after [`PROGRESS_BYTES`] more bytes, so a source that yields a byte per connection cannot keep
//! us busy for ever.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::time::Instant;

use super::{BlobSource, BlobStream, Class, ReadContext, SourceError, SourceKind};

/// Progress after which a resumed stream counts as healthy again: about what one connection carries
/// in its first round trips, so that each reopening at least pays for itself.
pub const PROGRESS_BYTES: u64 = 64 * 1024;

/// How failures in passing are repeated.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RetryPolicy {
    /// Most attempts, the first included. 1 = never repeat.
    pub max_attempts: u32,
    /// The first pause.
    pub base: Duration,
    /// The longest pause of our own choice.
    pub cap: Duration,
    /// The longest `Retry-After` that is honoured; a longer one counts as this.
    pub retry_after_cap: Duration,
    /// Longest time from the first attempt to the start of the last.
    pub budget: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            // 0.2 + 0.4 + 0.8 + 1.6 + 3.2 s: outlives the restart of a registry behind a balancer.
            max_attempts: 6,
            base: Duration::from_millis(200),
            cap: Duration::from_secs(10),
            retry_after_cap: Duration::from_secs(60),
            budget: Duration::from_secs(120),
        }
    }
}

impl RetryPolicy {
    /// A policy that never repeats.
    pub fn never() -> Self {
        RetryPolicy {
            max_attempts: 1,
            ..RetryPolicy::default()
        }
    }
}

/// The attempts of one operation.
#[derive(Debug)]
pub(crate) struct Attempts {
    policy: RetryPolicy,
    failed: u32,
    started: Instant,
}

impl Attempts {
    pub(crate) fn new(policy: &RetryPolicy) -> Self {
        Attempts {
            policy: policy.clone(),
            failed: 0,
            started: Instant::now(),
        }
    }

    /// Whether any attempt has failed so far.
    pub(crate) fn happened(&self) -> bool {
        self.failed > 0
    }

    /// Forgets earlier failures, because things went well in between.
    fn renew(&mut self) {
        self.failed = 0;
        self.started = Instant::now();
    }

    /// The pause before the next attempt; `None` when there is none.
    fn pause(&mut self, context: &ReadContext, retry_after: Option<Duration>) -> Option<Duration> {
        self.failed = self.failed.saturating_add(1);
        if self.failed >= self.policy.max_attempts {
            return None;
        }
        let doublings = (self.failed - 1).min(20);
        let full = self
            .policy
            .base
            .saturating_mul(1 << doublings)
            .min(self.policy.cap);
        let own = full.mul_f64(rand::random_range(0.5..=1.0));
        let asked = retry_after.map_or(Duration::ZERO, |asked| {
            asked.min(self.policy.retry_after_cap)
        });
        let pause = own.max(asked);
        let in_budget = self.started.elapsed() + pause <= self.policy.budget;
        let in_time = context.remaining().is_none_or(|left| pause < left);
        (in_budget && in_time).then_some(pause)
    }

    /// Waits before the next attempt after `error`, or gives the error back when it is final.
    pub(crate) async fn wait_after<E: Repeatable>(
        &mut self,
        context: &ReadContext,
        error: E,
    ) -> Result<(), E> {
        if error.class_of() != Class::Transient {
            return Err(error);
        }
        let Some(pause) = self.pause(context, error.retry_after_of()) else {
            return Err(error);
        };
        tracing::debug!(%error, ?pause, attempt = self.failed, "retry after a failure in passing");
        match context.bound(tokio::time::sleep(pause)).await {
            Ok(()) => Ok(()),
            // The caller's own end outranks the error: it is what the caller must see.
            Err(SourceError::Cancelled) => Err(E::cancelled()),
            Err(_) => Err(error),
        }
    }
}

/// What [`Attempts`] needs to know of an error.
pub(crate) trait Repeatable: fmt::Display {
    fn class_of(&self) -> Class;
    fn retry_after_of(&self) -> Option<Duration>;
    fn cancelled() -> Self;
}

impl Repeatable for SourceError {
    fn class_of(&self) -> Class {
        self.class()
    }
    fn retry_after_of(&self) -> Option<Duration> {
        self.retry_after()
    }
    fn cancelled() -> Self {
        SourceError::Cancelled
    }
}

impl Repeatable for crate::registry::RegistryError {
    fn class_of(&self) -> Class {
        self.class()
    }
    fn retry_after_of(&self) -> Option<Duration> {
        self.retry_after()
    }
    fn cancelled() -> Self {
        crate::registry::RegistryError::Cancelled
    }
}

/// A source that repeats failed openings and resumes broken streams of the source below.
///
/// Where the source below answers a resumption with the whole blob, what was read already is skipped.
#[derive(Debug)]
pub struct RetrySource<S> {
    below: Arc<S>,
    policy: RetryPolicy,
}

impl<S: BlobSource> RetrySource<S> {
    /// Repeats by `policy` what fails in `below`.
    pub fn new(below: S, policy: RetryPolicy) -> Self {
        RetrySource {
            below: Arc::new(below),
            policy,
        }
    }

    /// The source below.
    pub fn below(&self) -> &S {
        &self.below
    }
}

#[async_trait]
impl<S: BlobSource + 'static> BlobSource for RetrySource<S> {
    fn label(&self) -> &str {
        self.below.label()
    }

    fn kind(&self) -> SourceKind {
        self.below.kind()
    }

    fn whole_blob_only(&self) -> bool {
        self.below.whole_blob_only()
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        let mut attempts = Attempts::new(&self.policy);
        let first = loop {
            match self.below.open(context, extent).await {
                Ok(stream) => break stream,
                Err(error) => attempts.wait_after(context, error).await?,
            }
        };
        let (comes, served) = (first.extent, first.served);
        let resumed = Resumed {
            below: Arc::clone(&self.below),
            context: context.clone(),
            body: Some(first.body),
            at: comes.start(),
            healthy_at: comes.start().saturating_add(PROGRESS_BYTES),
            end: comes.end(),
            attempts,
        };
        Ok(BlobStream::new(comes, stream::try_unfold(resumed, Resumed::next)).served_by(served))
    }
}

struct Resumed<S> {
    below: Arc<S>,
    context: ReadContext,
    body: Option<BoxStream<'static, Result<Bytes, SourceError>>>,
    at: u64,
    healthy_at: u64,
    end: u64,
    attempts: Attempts,
}

impl<S: BlobSource> Resumed<S> {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, SourceError> {
        while self.at < self.end {
            let piece = match &mut self.body {
                Some(body) => match body.next().await {
                    Some(piece) => piece,
                    None => Err(SourceError::ShortBody {
                        offset: self.at,
                        expected_end: self.end,
                    }),
                },
                None => match self.reopen().await {
                    Ok(body) => {
                        self.body = Some(body);
                        continue;
                    }
                    Err(error) => Err(error),
                },
            };
            match piece {
                Ok(piece) => {
                    self.at = self
                        .at
                        .saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
                    if self.at >= self.healthy_at {
                        self.attempts.renew();
                        self.healthy_at = self.at.saturating_add(PROGRESS_BYTES);
                    }
                    return Ok(Some((piece, self)));
                }
                Err(error) => {
                    self.body = None;
                    self.attempts.wait_after(&self.context, error).await?;
                }
            }
        }
        // The last byte is out, but an error after it (a body that is too long) must still be seen.
        match &mut self.body {
            Some(body) => match body.next().await {
                None => Ok(None),
                Some(Ok(_)) => Err(SourceError::LongBody {
                    expected_end: self.end,
                }),
                Some(Err(error)) => Err(error),
            },
            None => Ok(None),
        }
    }

    async fn reopen(
        &mut self,
    ) -> Result<BoxStream<'static, Result<Bytes, SourceError>>, SourceError> {
        let rest = Extent::new(self.at, self.end).ok_or(SourceError::LongBody {
            expected_end: self.end,
        })?;
        let stream = self.below.open(&self.context, rest).await?;
        Ok(stream.narrow(rest)?.body)
    }
}
