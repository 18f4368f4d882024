// SPDX-License-Identifier: Apache-2.0
//! What every [`BlobSource`] promises, as checks that run over any of them.
//!
//! The suite knows nothing of the implementation: it is given a source and the blob that it must show.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio_util::sync::CancellationToken;

use super::{BlobSource, Class, Priority, ReadContext};

/// Longest time that any single check may take; a source that hangs fails instead.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);

/// A blob for the suite: 300 kB without repetition in any 256-byte step, so that a wrong offset shows.
pub fn sample_blob() -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = (0..300_007_u32).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u8::try_from(state >> 56).unwrap_or(0)
    });
    bytes.collect()
}

/// Runs all checks; `source` must show exactly `blob`, which is longer than 1000 bytes.
///
/// # Panics
/// When a promise is broken, naming it.
pub async fn check_source(source: Arc<dyn BlobSource>, blob: &Bytes) {
    let size_bytes = length(blob);
    assert!(size_bytes > 1000, "the suite needs a longer blob");
    let within = |check| tokio::time::timeout(CHECK_TIMEOUT, check);
    assert!(!source.label().is_empty(), "a source has a label");

    let extents = [
        (0, size_bytes),
        (0, 1),
        (1, 2),
        (size_bytes - 1, size_bytes),
        (511, 1000),
        (size_bytes / 2, size_bytes),
        (0, size_bytes / 3),
    ];
    for (start, end) in extents {
        within(check_extent(&source, blob, start, end))
            .await
            .expect("an extent comes in time");
    }
    for at in [0, 1, size_bytes] {
        let empty = extent(at, at);
        let stream = source
            .open(&context(), empty)
            .await
            .expect("an empty extent opens");
        assert_eq!(stream.extent, empty, "an empty extent stays empty");
        let bytes = stream
            .collect(0)
            .await
            .expect("an empty extent is readable");
        assert!(bytes.is_empty());
    }
    tokio::time::timeout(CHECK_TIMEOUT, async {
        check_beyond_end(&source, size_bytes).await;
        check_cancelled(&source, size_bytes).await;
        check_dropped(&source, blob).await;
        check_concurrent(&source, blob).await;
    })
    .await
    .expect("the checks of failures end in time");
}

fn context() -> ReadContext {
    ReadContext::new(Priority::Foreground)
}

fn length(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).expect("a blob in memory fits")
}

fn extent(start: u64, end: u64) -> Extent<BlobSpace> {
    Extent::new(start, end).expect("the suite asks forwards")
}

fn slice(blob: &Bytes, part: Extent<BlobSpace>) -> Bytes {
    let start = usize::try_from(part.start()).expect("inside the blob");
    let end = usize::try_from(part.end()).expect("inside the blob");
    blob.slice(start..end)
}

/// The bytes are those of the blob, all that was asked, and exactly what the stream announces.
async fn check_extent(source: &Arc<dyn BlobSource>, blob: &Bytes, start: u64, end: u64) {
    let asked = extent(start, end);
    let mut stream = source
        .open(&context(), asked)
        .await
        .expect("an extent inside opens");
    let comes = stream.extent;
    assert!(
        comes == asked || (comes.start() == 0 && comes.covers(asked)),
        "asked {asked:?}, but {comes:?} comes: neither that nor the whole blob"
    );
    let mut got = Vec::new();
    while let Some(piece) = stream.body.next().await {
        let piece = piece.expect("a healthy source reads without errors");
        assert!(!piece.is_empty(), "pieces are never empty");
        got.extend_from_slice(&piece);
    }
    assert!(
        stream.body.next().await.is_none(),
        "a stream that has ended stays ended"
    );
    assert_eq!(Bytes::from(got), slice(blob, comes), "bytes of {comes:?}");

    let narrowed = source
        .open(&context(), asked)
        .await
        .expect("an extent opens again");
    let narrowed = narrowed
        .narrow(asked)
        .expect("what comes covers what was asked");
    let bytes = narrowed
        .collect(length(blob))
        .await
        .expect("a narrowed stream is readable");
    assert_eq!(bytes, slice(blob, asked), "narrowed bytes of {asked:?}");
}

/// What does not exist is an error for good, never a short success.
async fn check_beyond_end(source: &Arc<dyn BlobSource>, size_bytes: u64) {
    for (start, end) in [
        (0, size_bytes + 1),
        (size_bytes, size_bytes + 1),
        (1 << 40, (1 << 40) + 1),
    ] {
        let error = match source.open(&context(), extent(start, end)).await {
            Err(error) => error,
            Ok(stream) => stream
                .collect(1 << 41)
                .await
                .expect_err("bytes beyond the end"),
        };
        assert_eq!(error.class(), Class::Permanent, "{start}..{end}: {error}");
    }
}

/// A caller that has gone, or whose time is over, gets `Cancelled`.
async fn check_cancelled(source: &Arc<dyn BlobSource>, size_bytes: u64) {
    let cancel = CancellationToken::new();
    cancel.cancel();
    let gone = context().with_cancel(cancel);
    let late = context().with_timeout(Duration::ZERO);
    for context in [gone, late] {
        let error = match source.open(&context, extent(0, size_bytes)).await {
            Err(error) => error,
            Ok(stream) => stream
                .collect(u64::MAX)
                .await
                .expect_err("cancelled, yet it reads"),
        };
        assert_eq!(error.class(), Class::Cancelled, "{error}");
    }
}

/// Streams and openings dropped half-way do no harm to later reads.
async fn check_dropped(source: &Arc<dyn BlobSource>, blob: &Bytes) {
    for _ in 0..20 {
        let mut stream = source
            .open(&context(), extent(0, length(blob)))
            .await
            .expect("opens");
        let first = stream.body.next().await.expect("has a first piece");
        assert!(!first.expect("is readable").is_empty());
        drop(stream);
        let context = context();
        let opening = source.open(&context, extent(0, length(blob)));
        let _ = tokio::time::timeout(Duration::from_micros(50), opening).await;
    }
    check_extent(source, blob, 0, 1000).await;
}

/// Many readers at once each get their own bytes.
async fn check_concurrent(source: &Arc<dyn BlobSource>, blob: &Bytes) {
    let step = length(blob) / 8;
    let reads = (0..8).map(|at| check_extent(source, blob, at * step, (at + 1) * step));
    futures::future::join_all(reads).await;
}
