// SPDX-License-Identifier: Apache-2.0
//! The contract over every local twin, and exact checks of retry and faults.

use std::io::Write;

use super::contract::{check_source, sample_blob};
use super::fault::{Fault, FaultSource};
use super::memory::MemorySource;
use super::*;

fn extent(start: u64, end: u64) -> Extent<BlobSpace> {
    Extent::new(start, end).unwrap()
}

fn context() -> ReadContext {
    ReadContext::new(Priority::Foreground)
}

fn quick() -> RetryPolicy {
    RetryPolicy {
        base: Duration::from_millis(1),
        ..RetryPolicy::default()
    }
}

fn stalled() -> SourceError {
    SourceError::Stalled {
        after: Duration::from_secs(1),
        offset: 0,
    }
}

fn size_of(blob: &Bytes) -> u64 {
    u64::try_from(blob.len()).unwrap()
}

fn memory(blob: &Bytes) -> Arc<dyn BlobSource> {
    Arc::new(MemorySource::new(blob.clone()).with_pieces(7001))
}

use std::sync::Arc;

#[tokio::test]
async fn contract_memory() {
    let blob = sample_blob();
    check_source(memory(&blob), &blob).await;
}

#[tokio::test]
async fn contract_file() {
    let blob = sample_blob();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&blob).unwrap();
    let source = FileSource::open_path(file.path()).unwrap();
    check_source(Arc::new(source), &blob).await;
}

#[tokio::test]
async fn contract_whole_blob_only() {
    let blob = sample_blob();
    let whole = Fault::WholeBlob {
        size_bytes: size_of(&blob),
    };
    let source = FaultSource::new(memory(&blob)).always(whole);
    assert!(source.whole_blob_only());
    check_source(Arc::new(source), &blob).await;
}

#[tokio::test]
async fn contract_slow() {
    let blob = sample_blob();
    let source = FaultSource::new(memory(&blob)).always(Fault::Slow {
        pause: Duration::from_micros(50),
    });
    check_source(Arc::new(source), &blob).await;
}

#[tokio::test]
async fn contract_retry_over_cuts() {
    let blob = sample_blob();
    // Every stream breaks after 70 kB, which is progress each time, so all is read in the end.
    let below = FaultSource::new(memory(&blob)).always(Fault::Cut {
        after_bytes: 70_000,
    });
    check_source(Arc::new(RetrySource::new(below, quick())), &blob).await;
}

#[tokio::test]
async fn the_kth_failure_is_repeated_for_every_k() {
    let blob = sample_blob();
    for k in 0..6 {
        let below = FaultSource::new(memory(&blob))
            .always(Fault::Cut {
                after_bytes: 70_000,
            })
            .on_calls(k..k + 1, Fault::Fail(stalled()));
        let source = RetrySource::new(below, quick());
        let all = extent(0, size_of(&blob));
        let read = source
            .open(&context(), all)
            .await
            .unwrap()
            .collect(u64::MAX)
            .await
            .unwrap();
        assert_eq!(read, blob, "k = {k}");
        // 300 007 bytes in steps of 70 000 are five openings; the k-th fails once where it is reached.
        assert_eq!(source.below().calls(), if k < 5 { 6 } else { 5 }, "k = {k}");
    }
}

#[tokio::test]
async fn resumption_over_an_ignored_range_skips_what_was_read() {
    let blob = sample_blob();
    let size_bytes = size_of(&blob);
    let below = FaultSource::new(memory(&blob))
        .on_calls(
            0..1,
            Fault::Cut {
                after_bytes: 100_000,
            },
        )
        .on_calls(1..2, Fault::WholeBlob { size_bytes });
    let source = RetrySource::new(below, quick());
    let wanted = extent(50_000, 250_000);
    let stream = source.open(&context(), wanted).await.unwrap();
    assert_eq!(stream.extent, wanted);
    assert_eq!(
        stream.collect(size_bytes).await.unwrap(),
        blob.slice(50_000..250_000)
    );
    assert_eq!(source.below().calls(), 2);
}

#[tokio::test]
async fn permanent_and_corrupt_failures_are_not_repeated() {
    let blob = sample_blob();
    let errors = [
        SourceError::NoSource { blob: "x".into() },
        SourceError::LongBody { expected_end: 1 },
        SourceError::Cancelled,
    ];
    for error in errors {
        let class = error.class();
        let below = FaultSource::new(memory(&blob)).always(Fault::Fail(error));
        let source = RetrySource::new(below, quick());
        let failed = source.open(&context(), extent(0, 1)).await.unwrap_err();
        assert_eq!(failed.class(), class);
        assert_eq!(source.below().calls(), 1);
    }
}

#[tokio::test]
async fn attempts_end_by_count_budget_and_deadline() {
    let blob = sample_blob();
    let cases = [
        (
            "count",
            RetryPolicy {
                max_attempts: 4,
                ..RetryPolicy::default()
            },
            None,
            4..5,
        ),
        (
            "budget",
            RetryPolicy {
                budget: Duration::from_millis(250),
                ..RetryPolicy::default()
            },
            None,
            2..3,
        ),
        (
            "deadline",
            RetryPolicy::default(),
            Some(Duration::from_millis(250)),
            2..3,
        ),
        ("never", RetryPolicy::never(), None, 1..2),
    ];
    for (name, policy, timeout, calls) in cases {
        let below = FaultSource::new(memory(&blob)).always(Fault::Fail(stalled()));
        let source = RetrySource::new(below, policy);
        let context = timeout.map_or_else(context, |timeout| context().with_timeout(timeout));
        let before = Instant::now();
        let error = source.open(&context, extent(0, 1)).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Stalled { .. }),
            "{name}: {error}"
        );
        assert!(
            calls.contains(&source.below().calls()),
            "{name}: {}",
            source.below().calls()
        );
        if let Some(timeout) = timeout {
            assert!(
                before.elapsed() <= timeout,
                "{name} waits past the deadline"
            );
        }
    }
}

#[tokio::test]
async fn a_trickle_per_connection_ends() {
    let blob = sample_blob();
    let below = FaultSource::new(memory(&blob)).always(Fault::Cut { after_bytes: 1 });
    let source = RetrySource::new(below, quick());
    let stream = source
        .open(&context(), extent(0, size_of(&blob)))
        .await
        .unwrap();
    let error = stream.collect(u64::MAX).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Interrupted { offset: 6, .. }),
        "{error}"
    );
    assert_eq!(source.below().calls(), 6);
}

#[tokio::test]
async fn stalls_end_at_the_deadline_and_on_cancel() {
    let blob = sample_blob();
    let source = FaultSource::new(memory(&blob)).always(Fault::Stall {
        after_bytes: 10_000,
    });
    let late = context().with_timeout(Duration::from_millis(300));
    let before = Instant::now();
    let stream = source.open(&late, extent(0, size_of(&blob))).await.unwrap();
    let error = stream.collect(u64::MAX).await.unwrap_err();
    assert!(matches!(error, SourceError::DeadlineExceeded), "{error}");
    assert!(before.elapsed() >= Duration::from_millis(300));

    let cancel = CancellationToken::new();
    let leaving = context().with_cancel(cancel.clone());
    let stream = source
        .open(&leaving, extent(0, size_of(&blob)))
        .await
        .unwrap();
    let (error, ()) = tokio::join!(stream.collect(u64::MAX), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        cancel.cancel();
    });
    assert!(matches!(error.unwrap_err(), SourceError::Cancelled));
}

#[tokio::test]
async fn flipped_bytes_are_exactly_one() {
    let blob = sample_blob();
    let source = FaultSource::new(memory(&blob)).always(Fault::FlipByte { offset: 123_456 });
    let read = source
        .open(&context(), extent(100_000, 200_000))
        .await
        .unwrap();
    let read = read.collect(u64::MAX).await.unwrap();
    let differing: Vec<usize> = (0..100_000)
        .filter(|at| read[*at] != blob[*at + 100_000])
        .collect();
    assert_eq!(differing, [23_456]);
}

#[tokio::test]
async fn bodies_must_have_the_promised_length() {
    let two =
        || futures::stream::iter([Ok(Bytes::from_static(b"ab")), Ok(Bytes::from_static(b"cd"))]);
    let short = BlobStream::new(extent(10, 15), two())
        .collect(100)
        .await
        .unwrap_err();
    assert!(
        matches!(
            short,
            SourceError::ShortBody {
                offset: 14,
                expected_end: 15
            }
        ),
        "{short}"
    );
    let long = BlobStream::new(extent(10, 13), two())
        .collect(100)
        .await
        .unwrap_err();
    assert!(
        matches!(long, SourceError::LongBody { expected_end: 13 }),
        "{long}"
    );
    let exact = BlobStream::new(extent(10, 14), two())
        .collect(100)
        .await
        .unwrap();
    assert_eq!(exact, "abcd");
    let capped = BlobStream::new(extent(10, 14), two())
        .collect(3)
        .await
        .unwrap_err();
    assert_eq!(capped.class(), Class::Permanent);
    let narrowed = BlobStream::new(extent(10, 14), two())
        .narrow(extent(11, 13))
        .unwrap();
    assert_eq!(narrowed.collect(2).await.unwrap(), "bc");
    let outside = BlobStream::new(extent(10, 14), two())
        .narrow(extent(13, 15))
        .unwrap_err();
    assert_eq!(outside.class(), Class::Corrupt);
}
