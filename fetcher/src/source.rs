// SPDX-License-Identifier: Apache-2.0
//! Where the compressed bytes of a blob come from.
//!
//! [`BlobSource`] is the seam at which the world can lie to us: a registry, a mirror, a file, later a
//! peer. A source stands for ONE blob at one kind of place and hands out streams of its bytes. It does
//! not verify digests: the reader of the stream does (chunk digests in the scheduler, the blob digest
//! in whole-blob readers), because only the reader knows what it asked for and why.
//!
//! # Layers, outermost first
//! [`RetrySource`] reopens a broken stream where it broke; [`RegistryBlobSource`] tries every known
//! place of a blob ([`OriginSet`]); the registry client below it does authentication and redirects.
//! The scheduler chooses between sources, and repeats by itself.
//!
//! # Rules
//! - A short body is an error, never a short success.
//! - A source may answer with MORE than was asked (a registry that ignores ranges sends the whole
//!   blob): [`BlobStream::extent`] says what really comes, and it always contains what was asked.
//! - Every wait inside is bounded: by the caller's deadline, by the source's own time-outs, and by
//!   the caller's cancellation. Dropping a future or a stream at any time is safe and frees what it
//!   holds (connection, permit).

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, Stream, StreamExt};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::registry::RegistryError;

#[cfg(any(test, feature = "test-support"))]
pub mod contract;
#[cfg(any(test, feature = "test-support"))]
pub mod fault;
mod file;
#[cfg(any(test, feature = "test-support"))]
pub mod memory;
mod ranges;
mod registry;
mod retry;
mod served;

pub use file::FileSource;
pub use ranges::RangesSource;
pub use registry::{OriginSet, RegistryBlobSource};
pub(crate) use retry::Attempts;
pub use retry::{RetryPolicy, RetrySource};
pub use served::{Blame, Served, read_checked};

/// How urgent a read is. Orders from most to least urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A reader waits for it.
    Foreground,
    /// The boot list names it: a container will want it while it starts.
    Boot,
    /// Nobody waits: completing an image.
    Background,
}

/// What kind of place a source is; labels metrics and orders choices (nearest first).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum SourceKind {
    /// A local file or memory.
    Local,
    /// Another node's daemon.
    Peer,
    /// The daemon of a node in another zone.
    OtherZone,
    /// Another registry endpoint with the same content.
    Mirror,
    /// A Dragonfly daemon, which fetches on behalf of its own network of nodes.
    Dragonfly,
    /// The registry that the image names.
    Origin,
}

impl SourceKind {
    /// The word used in metrics, logs and `sluice status`.
    pub fn as_str(self) -> &'static str {
        match self {
            SourceKind::Local => "local",
            SourceKind::Peer => "peer",
            SourceKind::OtherZone => "other_zone",
            SourceKind::Mirror => "mirror",
            SourceKind::Dragonfly => "dragonfly",
            SourceKind::Origin => "origin",
        }
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a caller says about a read: how urgent, until when, and how to call it off.
///
/// Passed explicitly through every layer; cheap to clone.
#[derive(Clone, Debug)]
pub struct ReadContext {
    /// How urgent the read is.
    pub priority: Priority,
    /// When the caller stops waiting. `None`: only the source's own time-outs bound the wait.
    pub deadline: Option<Instant>,
    /// Cancelled when the caller has lost interest.
    pub cancel: CancellationToken,
}

impl ReadContext {
    /// A context of the given priority, without a deadline.
    pub fn new(priority: Priority) -> Self {
        ReadContext {
            priority,
            deadline: None,
            cancel: CancellationToken::new(),
        }
    }

    /// The same context with a deadline `timeout` from now, if that is sooner than the present one.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        // A deadline beyond what the clock can say is no deadline.
        if let Some(at) = Instant::now().checked_add(timeout) {
            self.deadline = Some(self.deadline.map_or(at, |present| present.min(at)));
        }
        self
    }

    /// The same context, called off by `cancel`.
    #[must_use]
    pub fn with_cancel(mut self, cancel: CancellationToken) -> Self {
        self.cancel = cancel;
        self
    }

    /// Time left until the deadline; `None` without one.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Fails when the caller has lost interest or its time is over.
    ///
    /// **Errors** [`SourceError::Cancelled`], [`SourceError::DeadlineExceeded`].
    pub fn check(&self) -> Result<(), SourceError> {
        if self.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        match self.deadline {
            Some(at) if Instant::now() >= at => Err(SourceError::DeadlineExceeded),
            _ => Ok(()),
        }
    }

    /// Runs `work` until it ends, the deadline passes, or the caller cancels.
    ///
    /// **Errors** [`SourceError::Cancelled`], [`SourceError::DeadlineExceeded`].
    /// **Cancel** `work` is dropped in both cases.
    pub async fn bound<T>(&self, work: impl Future<Output = T>) -> Result<T, SourceError> {
        let expiry = async {
            match self.deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(SourceError::Cancelled),
            value = work => Ok(value),
            () = expiry => Err(SourceError::DeadlineExceeded),
        }
    }
}

/// What a caller may do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// May succeed if tried again, here or elsewhere.
    Transient,
    /// The same request to the same source will fail again; another source may succeed.
    Permanent,
    /// The caller called it off or ran out of time.
    Cancelled,
    /// The source answered with bytes or lengths that cannot be right: avoid it for a while.
    Corrupt,
}

/// Why bytes could not be read from a source.
///
/// `Clone`, because one flight answers many waiters.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The caller called it off.
    #[error("cancelled")]
    Cancelled,
    /// The caller's deadline passed.
    #[error("deadline exceeded")]
    DeadlineExceeded,
    /// No byte, or far too few, arrived for the stall time-out.
    #[error("nothing came for {after:?} at offset {offset}")]
    Stalled {
        /// The time-out that passed.
        after: Duration,
        /// Offset in the blob of the byte waited for.
        offset: u64,
    },
    /// The body broke off.
    #[error("body broke off at offset {offset}, expected up to {expected_end}: {reason}")]
    Interrupted {
        /// Offset in the blob of the first byte that did not come.
        offset: u64,
        /// End of the promised extent.
        expected_end: u64,
        /// What the transport said.
        reason: String,
    },
    /// The body ended in good order, but before the promised end.
    #[error("body ended at offset {offset}, promised up to {expected_end}")]
    ShortBody {
        /// Offset in the blob of the first byte that did not come.
        offset: u64,
        /// End of the promised extent.
        expected_end: u64,
    },
    /// The body went on after the promised end.
    #[error("body is longer than the promised end {expected_end}")]
    LongBody {
        /// End of the promised extent.
        expected_end: u64,
    },
    /// The answer is for another extent than the one asked for.
    #[error("asked for {asked:?}, answered {answered}")]
    WrongExtent {
        /// The extent asked for.
        asked: Extent<BlobSpace>,
        /// What the answer said of itself.
        answered: String,
    },
    /// The extent lies beyond the end of the blob.
    #[error("extent {asked:?} is beyond the end of the blob")]
    BeyondEnd {
        /// The extent asked for.
        asked: Extent<BlobSpace>,
    },
    /// The bytes are not what their digest says.
    #[error("digest mismatch: expected {expected}, got {actual}")]
    DigestMismatch {
        /// The digest asked for.
        expected: BlobDigest,
        /// The digest of the bytes that came.
        actual: BlobDigest,
    },
    /// A local file could not be read.
    #[error("read {}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// No place is known that has the blob.
    #[error("no source is known for {blob}")]
    NoSource {
        /// The blob.
        blob: String,
    },
    /// The registry client failed.
    #[error(transparent)]
    Registry(RegistryError),
}

impl SourceError {
    /// What a caller may do about it.
    pub fn class(&self) -> Class {
        match self {
            SourceError::Cancelled | SourceError::DeadlineExceeded => Class::Cancelled,
            SourceError::Stalled { .. }
            | SourceError::Interrupted { .. }
            | SourceError::ShortBody { .. } => Class::Transient,
            SourceError::LongBody { .. }
            | SourceError::WrongExtent { .. }
            | SourceError::DigestMismatch { .. } => Class::Corrupt,
            SourceError::BeyondEnd { .. }
            | SourceError::Io { .. }
            | SourceError::NoSource { .. } => Class::Permanent,
            SourceError::Registry(error) => error.class(),
        }
    }

    /// How long the source asked to be left alone (`Retry-After`), if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            SourceError::Registry(error) => error.retry_after(),
            _ => None,
        }
    }
}

impl From<RegistryError> for SourceError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Cancelled => SourceError::Cancelled,
            RegistryError::DeadlineExceeded => SourceError::DeadlineExceeded,
            RegistryError::Read(inner) => *inner,
            other => SourceError::Registry(other),
        }
    }
}

/// Reads compressed bytes of one blob.
///
/// **Promises** Short reads are errors. The returned stream's extent contains the asked one; it is
/// larger only where the source cannot do ranges, and then it starts at 0. All is cancel-safe: a
/// dropped future or stream loses only what had not been handed over.
///
/// **Errors** [`Class::Transient`]: try again, here or elsewhere. [`Class::Permanent`]: try elsewhere.
/// [`Class::Corrupt`]: try elsewhere and avoid this source. [`Class::Cancelled`]: stop.
#[async_trait]
pub trait BlobSource: Send + Sync + fmt::Debug {
    /// A name for logs, such as `registry.example/team/app`.
    fn label(&self) -> &str;

    /// What kind of place this is.
    fn kind(&self) -> SourceKind;

    /// Opens a stream of the bytes of `extent` (half-open, offsets in the blob).
    ///
    /// An empty extent gives an empty stream without any request.
    ///
    /// **Errors** before the first byte from here, later ones from the stream.
    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError>;

    /// Whether the source is known to answer any range with the whole blob. A caller that wants
    /// several ranges then does best to ask for the whole blob once.
    fn whole_blob_only(&self) -> bool {
        false
    }
}

/// Bytes of a blob as they arrive.
///
/// Yields exactly `extent.len()` bytes and then ends, or yields an error as its last item.
pub struct BlobStream {
    /// What really comes. Contains the asked extent; larger (from 0) where a source ignores ranges.
    pub extent: Extent<BlobSpace>,
    /// The bytes, in order. Pieces are never empty.
    pub body: BoxStream<'static, Result<Bytes, SourceError>>,
    /// Who gives them, where the source is another one than it says of itself.
    pub served: Option<Served>,
}

impl fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobStream")
            .field("extent", &self.extent)
            .finish_non_exhaustive()
    }
}

impl BlobStream {
    /// A stream over `body` that checks that exactly `extent.len()` bytes come.
    pub fn new<S>(extent: Extent<BlobSpace>, body: S) -> Self
    where
        S: Stream<Item = Result<Bytes, SourceError>> + Send + 'static,
    {
        let body = Exact {
            body: Box::pin(body),
            at: extent.start(),
            end: extent.end(),
            over: false,
        };
        BlobStream {
            extent,
            body: body.boxed(),
            served: None,
        }
    }

    /// The same stream, given by `served`.
    #[must_use]
    pub fn served_by(mut self, served: Option<Served>) -> Self {
        self.served = served;
        self
    }

    /// An empty stream.
    pub fn empty(extent: Extent<BlobSpace>) -> Self {
        BlobStream::new(extent, futures::stream::empty())
    }

    /// Skips what comes before `wanted` and stops after it.
    ///
    /// **Errors** [`SourceError::WrongExtent`] when `wanted` is not part of what comes.
    pub fn narrow(self, wanted: Extent<BlobSpace>) -> Result<Self, SourceError> {
        if self.extent == wanted {
            return Ok(self);
        }
        if wanted.start() < self.extent.start() || wanted.end() > self.extent.end() {
            return Err(SourceError::WrongExtent {
                asked: wanted,
                answered: format!("{:?}", self.extent),
            });
        }
        let body = Narrow {
            body: self.body,
            skip_bytes: wanted.start() - self.extent.start(),
            left_bytes: wanted.len(),
        };
        Ok(BlobStream {
            extent: wanted,
            body: body.boxed(),
            served: self.served,
        })
    }

    /// Reads the stream to its end into one buffer.
    ///
    /// **Errors** those of the stream; [`RegistryError::TooLarge`] when the extent is over
    /// `cap_bytes`, before anything is allocated.
    pub async fn collect(mut self, cap_bytes: u64) -> Result<Bytes, SourceError> {
        let len_bytes = self.extent.len();
        let capacity = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        if len_bytes > cap_bytes {
            return Err(SourceError::Registry(RegistryError::TooLarge {
                what: "blob extent".into(),
                limit_bytes: cap_bytes,
            }));
        }
        let mut all = BytesMut::with_capacity(capacity);
        while let Some(piece) = self.body.next().await {
            all.extend_from_slice(&piece?);
        }
        Ok(all.freeze())
    }
}

/// Lets exactly the promised number of bytes pass.
struct Exact {
    body: BoxStream<'static, Result<Bytes, SourceError>>,
    at: u64,
    end: u64,
    over: bool,
}

impl Stream for Exact {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.over {
                return Poll::Ready(None);
            }
            let piece = match std::task::ready!(self.body.poll_next_unpin(cx)) {
                Some(Ok(piece)) if piece.is_empty() => continue,
                Some(Ok(piece)) => piece,
                Some(Err(error)) => {
                    self.over = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.over = true;
                    if self.at == self.end {
                        return Poll::Ready(None);
                    }
                    return Poll::Ready(Some(Err(SourceError::ShortBody {
                        offset: self.at,
                        expected_end: self.end,
                    })));
                }
            };
            let after = u64::try_from(piece.len())
                .ok()
                .and_then(|len| self.at.checked_add(len));
            return match after {
                Some(after) if after <= self.end => {
                    self.at = after;
                    Poll::Ready(Some(Ok(piece)))
                }
                _ => {
                    self.over = true;
                    Poll::Ready(Some(Err(SourceError::LongBody {
                        expected_end: self.end,
                    })))
                }
            };
        }
    }
}

/// Cuts a prefix and a suffix off a stream. Stops reading as soon as the wanted bytes are there.
struct Narrow {
    body: BoxStream<'static, Result<Bytes, SourceError>>,
    skip_bytes: u64,
    left_bytes: u64,
}

impl Stream for Narrow {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while self.left_bytes > 0 {
            let mut piece = match std::task::ready!(self.body.poll_next_unpin(cx)) {
                Some(Ok(piece)) => piece,
                Some(Err(error)) => {
                    self.left_bytes = 0;
                    return Poll::Ready(Some(Err(error)));
                }
                // `Exact` below reports a short body itself; after its error nothing comes.
                None => return Poll::Ready(None),
            };
            let skip = usize::try_from(self.skip_bytes)
                .unwrap_or(usize::MAX)
                .min(piece.len());
            self.skip_bytes -= u64::try_from(skip).unwrap_or(0);
            let _ = piece.split_to(skip);
            piece.truncate(usize::try_from(self.left_bytes).unwrap_or(usize::MAX));
            if !piece.is_empty() {
                self.left_bytes -= u64::try_from(piece.len()).unwrap_or(0);
                return Poll::Ready(Some(Ok(piece)));
            }
        }
        Poll::Ready(None)
    }
}

#[cfg(test)]
mod tests;
