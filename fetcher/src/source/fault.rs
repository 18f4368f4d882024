// SPDX-License-Identifier: Apache-2.0
//! A source that misbehaves on demand, for tests.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::{BlobSource, BlobStream, ReadContext, SourceError, SourceKind};

/// What goes wrong.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// The opening fails. With `on_calls(k..k + 1)` this is the countdown: the k-th call fails.
    Fail(SourceError),
    /// The body breaks off after so many bytes, with [`SourceError::Interrupted`].
    Cut {
        /// Bytes that come before the break.
        after_bytes: u64,
    },
    /// Each piece comes after a pause.
    Slow {
        /// The pause.
        pause: Duration,
    },
    /// The byte at this offset of the blob is inverted.
    FlipByte {
        /// Offset in the blob.
        offset: u64,
    },
    /// The range is ignored: the whole blob of this size comes.
    WholeBlob {
        /// Size of the blob.
        size_bytes: u64,
    },
    /// After so many bytes nothing comes any more, until the caller's deadline or cancellation.
    Stall {
        /// Bytes that come before.
        after_bytes: u64,
    },
}

/// Wraps a source and misbehaves on chosen calls.
#[derive(Debug)]
pub struct FaultSource {
    below: Arc<dyn BlobSource>,
    faults: Vec<(Range<u64>, Fault)>,
    calls: AtomicU64,
}

impl FaultSource {
    /// Passes everything on to `below` until faults are added.
    pub fn new(below: Arc<dyn BlobSource>) -> Self {
        FaultSource {
            below,
            faults: Vec::new(),
            calls: AtomicU64::new(0),
        }
    }

    /// Adds a fault on every call.
    #[must_use]
    pub fn always(self, fault: Fault) -> Self {
        self.on_calls(0..u64::MAX, fault)
    }

    /// Adds a fault on the calls of `open` whose number (from 0) is in `calls`.
    #[must_use]
    pub fn on_calls(mut self, calls: Range<u64>, fault: Fault) -> Self {
        self.faults.push((calls, fault));
        self
    }

    /// Calls of `open` so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl BlobSource for FaultSource {
    fn label(&self) -> &str {
        "fault"
    }

    fn kind(&self) -> SourceKind {
        self.below.kind()
    }

    fn whole_blob_only(&self) -> bool {
        let whole = |(_, fault): &(Range<u64>, Fault)| matches!(fault, Fault::WholeBlob { .. });
        self.below.whole_blob_only() || self.faults.iter().any(whole)
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        context.check()?;
        let active: Vec<Fault> = self
            .faults
            .iter()
            .filter(|(calls, _)| calls.contains(&call))
            .map(|(_, fault)| fault.clone())
            .collect();
        let mut asked = extent;
        for fault in &active {
            match fault {
                Fault::Fail(error) => return Err(error.clone()),
                Fault::WholeBlob { size_bytes } if !extent.is_empty() => {
                    if extent.end() > *size_bytes {
                        return Err(SourceError::BeyondEnd { asked: extent });
                    }
                    asked = Extent::new(0, *size_bytes).unwrap_or(extent);
                }
                _ => {}
            }
        }
        let mut stream = self.below.open(context, asked).await?;
        for fault in active {
            stream = misbehave(stream, fault, context.clone());
        }
        Ok(stream)
    }
}

/// Applies one fault to a stream.
fn misbehave(stream: BlobStream, fault: Fault, context: ReadContext) -> BlobStream {
    let extent = stream.extent;
    match fault {
        Fault::Fail(_) | Fault::WholeBlob { .. } => stream,
        Fault::Slow { pause } => {
            let body = stream.body.then(move |piece| {
                let context = context.clone();
                async move {
                    context.bound(tokio::time::sleep(pause)).await?;
                    piece
                }
            });
            BlobStream::new(extent, body)
        }
        Fault::FlipByte { offset } => {
            let mut at = extent.start();
            let body = stream.body.map(move |piece| {
                let piece = piece?;
                let end = at + length(&piece);
                let inside = (at..end).contains(&offset);
                let flipped = if inside {
                    flip(&piece, offset - at)
                } else {
                    piece
                };
                at = end;
                Ok(flipped)
            });
            BlobStream::new(extent, body)
        }
        Fault::Cut { after_bytes } => {
            let cut_at = extent.start().saturating_add(after_bytes);
            let broken = SourceError::Interrupted {
                offset: cut_at,
                expected_end: extent.end(),
                reason: "cut by a fault".into(),
            };
            let tail = stream::once(async move { Err(broken) });
            head(stream, cut_at, tail.boxed())
        }
        Fault::Stall { after_bytes } => {
            let stop_at = extent.start().saturating_add(after_bytes);
            let tail = stream::once(async move {
                context.bound(std::future::pending::<()>()).await?;
                Ok(Bytes::new())
            });
            head(stream, stop_at, tail.boxed())
        }
    }
}

/// The stream up to the offset `stop_at`, then `tail`; the stream itself if it ends before.
fn head(
    stream: BlobStream,
    stop_at: u64,
    tail: stream::BoxStream<'static, Result<Bytes, SourceError>>,
) -> BlobStream {
    let whole = stream.extent;
    if stop_at >= whole.end() {
        return stream;
    }
    let wanted = Extent::new(whole.start(), stop_at).unwrap_or(whole);
    match stream.narrow(wanted) {
        Ok(head) => BlobStream::new(whole, head.body.chain(tail)),
        Err(error) => BlobStream::new(whole, stream::once(async move { Err(error) })),
    }
}

fn length(piece: &Bytes) -> u64 {
    u64::try_from(piece.len()).unwrap_or(u64::MAX)
}

fn flip(piece: &Bytes, at: u64) -> Bytes {
    let mut copy = piece.to_vec();
    if let Some(byte) = usize::try_from(at).ok().and_then(|at| copy.get_mut(at)) {
        *byte = !*byte;
    }
    Bytes::from(copy)
}
