// SPDX-License-Identifier: Apache-2.0
//! Fills over a line with latency, in paused time: requests are counted, moments are exact.

mod contents;
mod faults;
mod prefix;
mod registry;
mod unmodified;
mod witness_of_seals;

use super::*;
use crate::fixture::TestLayer;
use crate::fixture::line::{Line, Mishap, Wire};
use crate::source::{BlobSource, Class, SourceKind};
use crate::store::crash::CrashDisk;
use crate::store::{BootId, StoreOptions};

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

pub(crate) fn options() -> FetcherOptions {
    FetcherOptions {
        read_ahead_max_bytes: 0,
        decodes: 2,
        ..FetcherOptions::default()
    }
}

fn fetcher_with(options: FetcherOptions) -> Fetcher {
    let store = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    Fetcher::new(
        options,
        Arc::new(Store::in_memory(store).unwrap()),
        Metrics::new(),
    )
}

fn fetcher() -> Fetcher {
    fetcher_with(options())
}

async fn add(fetcher: &Fetcher, layer: &TestLayer, lines: &[&Line]) -> Arc<LayerHandle> {
    let sources = lines
        .iter()
        .map(|line| Arc::new((*line).clone()) as Arc<dyn BlobSource>);
    fetcher
        .add_layer(layer.spec(sources.collect()))
        .await
        .unwrap()
}

fn chunk_extent(layer: &TestLayer, chunk: u32) -> Extent<DeviceSpace> {
    layer.chunks.chunk(chunk).unwrap().device
}

/// Every present chunk has the tar's bytes; returns how many are.
fn check(handle: &LayerHandle, layer: &TestLayer) -> u32 {
    let mut present = 0;
    for chunk in (0..layer.chunks.count()).filter(|chunk| handle.device.is_present(*chunk)) {
        let mut bytes = vec![0; layer.bytes_of(chunk).len()];
        handle
            .device
            .read_at(chunk_extent(layer, chunk).start(), &mut bytes)
            .unwrap();
        assert!(bytes == layer.bytes_of(chunk), "chunk {chunk}");
        present += 1;
    }
    present
}

#[tokio::test(start_paused = true)]
async fn eight_readers_of_one_chunk_make_one_request() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(1, 10, 4000));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let extent = chunk_extent(&layer, 3);
    let fills = (0..8).map(|_| fetcher.fill(&handle, extent, Priority::Foreground, Some(SECOND)));
    for result in futures::future::join_all(fills).await {
        result.unwrap();
    }
    assert_eq!(line.asked().len(), 1);
    assert_eq!(line.asked()[0].priority, Priority::Foreground);
    assert_eq!((check(&handle, &layer), handle.flights.len()), (1, 0));
    assert_eq!(
        fetcher
            .metrics()
            .requests(SourceKind::Origin, Priority::Foreground),
        1
    );
    // Present: no request, no wait.
    let before = clock::now();
    fetcher
        .fill(&handle, extent, Priority::Foreground, None)
        .await
        .unwrap();
    assert_eq!(
        (clock::now() - before, line.asked().len()),
        (Duration::ZERO, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn neighbours_come_in_one_request_and_gaps_are_bridged() {
    let options = FetcherOptions {
        gap_bytes: 5000,
        ..options()
    };
    let (fetcher, layer) = (fetcher_with(options), TestLayer::even(2, 20, 4000));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let fill = |start, end| {
        let extent = Extent::new(start, end).unwrap();
        fetcher.fill(&handle, extent, Priority::Foreground, Some(SECOND))
    };
    fill(4000, 8000).await.unwrap();
    fill(0, 20_000).await.unwrap();
    assert_eq!(line.asked().len(), 2, "{:?}", line.asked());
    assert_eq!(check(&handle, &layer), 5);
    // A gap of two chunks is too wide.
    fill(28_000, 36_000).await.unwrap();
    fill(24_000, 40_000).await.unwrap();
    assert_eq!(line.asked().len(), 5, "{:?}", line.asked());
}

#[tokio::test(start_paused = true)]
async fn a_sequential_reader_makes_few_requests() {
    let options = FetcherOptions {
        read_ahead_initial_bytes: 64 << 10,
        read_ahead_max_bytes: 1 << 20,
        ..options()
    };
    let (fetcher, layer) = (fetcher_with(options), TestLayer::even(3, 200, 16 << 10));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let before = clock::now();
    for chunk in 0..200 {
        let extent = chunk_extent(&layer, chunk);
        fetcher
            .fill(&handle, extent, Priority::Foreground, Some(SECOND))
            .await
            .unwrap();
    }
    assert_eq!(check(&handle, &layer), 200);
    let requests = line.asked().len();
    assert!(requests <= 12, "{requests} requests: {:?}", line.asked());
    // 200 pieces of 1 ms each on one line; few round trips are not hidden behind it.
    let took = clock::now() - before;
    assert!(took < Duration::from_millis(360), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_chunk_lands_before_its_range_ends() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(4, 10, 16 << 10));
    let line = Line::new("a", &layer.blob).pieces(16 << 10, Duration::from_millis(100));
    let handle = add(&fetcher, &layer, &[&line]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    let before = clock::now();
    let all = fetcher.fill(&handle, whole, Priority::Foreground, None);
    let first = async {
        tokio::time::sleep(MILLISECOND).await;
        let extent = chunk_extent(&layer, 0);
        fetcher
            .fill(&handle, extent, Priority::Foreground, None)
            .await
            .unwrap();
        clock::now() - before
    };
    let (all, first) = tokio::join!(all, first);
    all.unwrap();
    // A frame is a little longer than its chunk here: it ends in the second piece.
    assert!(first <= Duration::from_millis(230), "{first:?}");
    assert!(clock::now() - before >= SECOND);
    assert_eq!(line.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn background_stands_still_while_a_reader_receives() {
    let (fetcher, big, small) = (
        fetcher(),
        TestLayer::even(5, 60, 16 << 10),
        TestLayer::even(6, 20, 16 << 10),
    );
    let wire = Wire::default();
    let (back, front) = (
        Line::new("back", &big.blob).over(&wire),
        Line::new("front", &small.blob).over(&wire),
    );
    let (one, two) = (
        add(&fetcher, &big, &[&back]).await,
        add(&fetcher, &small, &[&front]).await,
    );
    let whole = |layer: &TestLayer| Extent::new(0, layer.tar.len() as u64).unwrap();
    let background = fetcher.fill(&one, whole(&big), Priority::Background, None);
    let reader = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        fetcher
            .fill(&two, whole(&small), Priority::Foreground, None)
            .await
            .unwrap();
    };
    let (background, ()) = tokio::join!(background, reader);
    background.unwrap();
    let (first, last) = (front.sent()[0].0, front.sent().last().unwrap().0);
    let between = |from, to| {
        back.sent()
            .iter()
            .filter(|(at, _)| *at > from && *at < to)
            .count()
    };
    // One piece is on its way already when the reader's first byte comes.
    assert!(between(first, last) <= 1, "{} pieces", between(first, last));
    // While the reader waited for its first byte, the line was in use.
    assert!(between(first - Duration::from_millis(18), first) >= 15);
    // And the reader took as long as if it were alone: a round trip and its pieces, and that one.
    let took = last - (front.sent()[0].0 - Duration::from_millis(21));
    assert!(took <= Duration::from_millis(21 + 25), "{took:?}");
    assert_eq!((check(&one, &big), check(&two, &small)), (60, 20));
    assert_eq!((back.asked().len(), front.asked().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_reader_promotes_the_background_flight_that_has_its_chunk() {
    let (fetcher, big, other) = (
        fetcher(),
        TestLayer::even(7, 40, 16 << 10),
        TestLayer::even(8, 500, 16 << 10),
    );
    let (back, front) = (
        Line::new("back", &big.blob),
        Line::new("front", &other.blob),
    );
    let (one, two) = (
        add(&fetcher, &big, &[&back]).await,
        add(&fetcher, &other, &[&front]).await,
    );
    let whole = |layer: &TestLayer| Extent::new(0, layer.tar.len() as u64).unwrap();
    let background = fetcher.fill(&one, whole(&big), Priority::Background, None);
    // Some other reader keeps the line busy for half a second.
    let busy = fetcher.fill(&two, whole(&other), Priority::Foreground, None);
    let reader = async {
        tokio::time::sleep(Duration::from_millis(40)).await;
        let before = clock::now();
        let extent = chunk_extent(&big, 35);
        fetcher
            .fill(&one, extent, Priority::Foreground, None)
            .await
            .unwrap();
        clock::now() - before
    };
    let (background, busy, took) = tokio::join!(background, busy, reader);
    background.unwrap();
    busy.unwrap();
    assert!(took <= Duration::from_millis(45), "{took:?}");
    assert_eq!(back.asked().len(), 1, "no request of its own");
}

#[tokio::test(start_paused = true)]
async fn a_reader_promotes_a_flight_that_waits_to_ask() {
    let (fetcher, big, other) = (
        fetcher(),
        TestLayer::even(7, 4, 16 << 10),
        TestLayer::even(8, 500, 16 << 10),
    );
    let (back, front) = (
        Line::new("back", &big.blob),
        Line::new("front", &other.blob),
    );
    let (one, two) = (
        add(&fetcher, &big, &[&back]).await,
        add(&fetcher, &other, &[&front]).await,
    );
    let whole = |layer: &TestLayer| Extent::new(0, layer.tar.len() as u64).unwrap();
    // Some reader keeps the line busy for half a second.
    let busy = fetcher.fill(&two, whole(&other), Priority::Foreground, None);
    let background = async {
        tokio::time::sleep(Duration::from_millis(40)).await;
        fetcher
            .fill(&one, whole(&big), Priority::Background, None)
            .await
            .unwrap();
    };
    let reader = async {
        tokio::time::sleep(Duration::from_millis(80)).await;
        assert_eq!((one.flights.len(), back.asked().len()), (4, 0));
        let before = clock::now();
        fetcher
            .fill(&one, chunk_extent(&big, 2), Priority::Foreground, None)
            .await
            .unwrap();
        clock::now() - before
    };
    let (busy, (), took) = tokio::join!(busy, background, reader);
    busy.unwrap();
    assert!(took <= Duration::from_millis(30), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_waiter_does_not_cancel_the_owner() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(9, 4, 4000));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let extent = chunk_extent(&layer, 1);
    let owner = fetcher.fill(&handle, extent, Priority::Foreground, None);
    assert!(tokio::time::timeout(5 * MILLISECOND, owner).await.is_err());
    fetcher
        .fill(&handle, extent, Priority::Foreground, Some(SECOND))
        .await
        .unwrap();
    assert_eq!(line.asked().len(), 1);
    // And one that nobody waits for any more still lands.
    let extent = chunk_extent(&layer, 2);
    let owner = fetcher.fill(&handle, extent, Priority::Foreground, None);
    assert!(tokio::time::timeout(5 * MILLISECOND, owner).await.is_err());
    tokio::time::sleep(SECOND).await;
    assert_eq!((check(&handle, &layer), line.asked().len()), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_wait_and_names_the_last_failure() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(10, 4, 4000));
    for (mishap, named) in [
        (Mishap::Silence, false),
        (Mishap::Refuse, true),
        (Mishap::Stall(10), false),
    ] {
        let line = Line::new("a", &layer.blob);
        line.always(Some(mishap));
        let handle = add(&fetcher, &layer, &[&line]).await;
        let before = clock::now();
        let deadline = 5 * SECOND;
        let extent = chunk_extent(&layer, 1);
        let error = fetcher
            .fill(&handle, extent, Priority::Foreground, Some(deadline))
            .await;
        let error = error.unwrap_err();
        assert_eq!(clock::now() - before, deadline, "{mishap:?}");
        assert!(
            matches!(&error, FillError::Deadline { last, .. } if last.is_some() == named),
            "{mishap:?}: {error}"
        );
        assert_eq!(error.class(), Class::Transient);
        assert!(handle.device.read_at(extent.start(), &mut [0]).is_err());
        // The source is well again: the next reader gets its bytes.
        line.always(None);
        fetcher
            .fill(&handle, extent, Priority::Foreground, Some(30 * SECOND))
            .await
            .unwrap();
        assert_eq!(check(&handle, &layer), 1);
        fetcher.remove_layer(&layer.key).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_transfer_is_left_for_another_source() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(11, 10, 4000));
    let (bad, good) = (
        Line::new("bad", &layer.blob),
        Line::new("good", &layer.blob),
    );
    let bad = bad.pieces(4096, MILLISECOND);
    bad.always(Some(Mishap::Stall(20_000)));
    let handle = add(&fetcher, &layer, &[&bad, &good]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    let before = clock::now();
    fetcher
        .fill(&handle, whole, Priority::Foreground, Some(60 * SECOND))
        .await
        .unwrap();
    let took = clock::now() - before;
    assert!(
        took >= options().stall && took < options().stall + SECOND,
        "{took:?}"
    );
    assert_eq!(check(&handle, &layer), 10);
    assert_eq!((bad.asked().len(), good.asked().len()), (1, 1));
    assert!(
        good.asked()[0].extent.start() > 15_000,
        "what had come is not asked for again"
    );
    assert_eq!(fetcher.metrics().stalls(SourceKind::Origin), 1);
}

#[tokio::test(start_paused = true)]
async fn cuts_and_refusals_are_retried_until_the_bytes_are_there() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(12, 10, 4000));
    let line = Line::new("a", &layer.blob).pieces(1000, MILLISECOND);
    line.mishaps([
        Some(Mishap::Refuse),
        Some(Mishap::Cut(9000)),
        Some(Mishap::Cut(0)),
        Some(Mishap::Refuse),
        Some(Mishap::Cut(4500)),
    ]);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    fetcher
        .fill(&handle, whole, Priority::Foreground, Some(60 * SECOND))
        .await
        .unwrap();
    assert_eq!(check(&handle, &layer), 10);
    assert_eq!(line.asked().len(), 6);
    // 2 chunks, then 1, then the rest: nothing that had come was asked for again.
    let starts: Vec<u64> = line
        .asked()
        .iter()
        .map(|asked| asked.extent.start())
        .collect();
    assert!(starts.is_sorted() && starts[5] > 12_000, "{starts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_corrupt_chunk_is_dropped_and_asked_of_another_source() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(13, 6, 4000));
    let at = layer.chunks.chunk(2).unwrap().blob.start() + 100;
    let (bad, good) = (
        Line::new("bad", &layer.blob).flip(at),
        Line::new("good", &layer.blob),
    );
    let handle = add(&fetcher, &layer, &[&bad, &good]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    fetcher
        .fill(&handle, whole, Priority::Foreground, Some(SECOND))
        .await
        .unwrap();
    assert_eq!(check(&handle, &layer), 6);
    assert_eq!((bad.asked().len(), good.asked().len()), (1, 1));
    assert_eq!(good.asked()[0].extent, layer.chunks.chunk(2).unwrap().blob);
    assert_eq!(fetcher.metrics().corrupt_chunks(SourceKind::Origin), 1);
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_is_corrupt_everywhere_is_an_error_and_never_zeros() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(14, 3, 4000));
    let at = layer.chunks.chunk(1).unwrap().blob.start() + 100;
    let line = Line::new("bad", &layer.blob).flip(at);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let extent = chunk_extent(&layer, 1);
    let error = fetcher
        .fill(&handle, extent, Priority::Foreground, Some(30 * SECOND))
        .await;
    let error = error.unwrap_err();
    let corrupt = |error: &FillError| {
        matches!(
            error,
            FillError::Deadline {
                last: Some(FetchFailure::Corrupt { .. }),
                ..
            }
        )
    };
    assert!(corrupt(&error), "{error}");
    // It backs off: 1, 2, 4, 8, 10 seconds.
    assert_eq!(line.asked().len(), 6);
    assert!(handle.device.read_at(extent.start(), &mut [0]).is_err());
    // Other chunks of the same source are well.
    let extent = chunk_extent(&layer, 2);
    fetcher
        .fill(&handle, extent, Priority::Foreground, Some(30 * SECOND))
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_source_that_ignores_ranges_is_asked_once() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(15, 50, 4000));
    let line = Line::new("a", &layer.blob).whole();
    let handle = add(&fetcher, &layer, &[&line]).await;
    let fill = |chunk| {
        fetcher.fill(
            &handle,
            chunk_extent(&layer, chunk),
            Priority::Foreground,
            None,
        )
    };
    fill(30).await.unwrap();
    // All else comes with it, also when nobody waits.
    let (near, far) = tokio::join!(fill(31), fill(49));
    near.unwrap();
    far.unwrap();
    tokio::time::sleep(SECOND).await;
    assert_eq!((check(&handle, &layer), line.asked().len()), (50, 1));
}

#[tokio::test(start_paused = true)]
async fn two_streams_of_a_whole_blob_become_one() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(16, 50, 16 << 10));
    let line = Line::new("a", &layer.blob).whole();
    let handle = add(&fetcher, &layer, &[&line]).await;
    let fill = |chunk| {
        fetcher.fill(
            &handle,
            chunk_extent(&layer, chunk),
            Priority::Foreground,
            None,
        )
    };
    let later = async {
        tokio::time::sleep(30 * MILLISECOND).await;
        fill(49).await
    };
    let (one, two, three, four) = tokio::join!(fill(10), fill(40), fill(2), later);
    for filled in [one, two, three, four] {
        filled.unwrap();
    }
    tokio::time::sleep(SECOND).await;
    assert_eq!(check(&handle, &layer), 50);
    // Who came when it was known did not ask.
    assert_eq!(line.asked().len(), 3);
    assert!(
        line.sent_bytes() < layer.blob.len() + (64 << 10),
        "{} sent",
        line.sent_bytes()
    );
}

#[tokio::test(start_paused = true)]
async fn chunks_of_a_sealed_twin_are_copied() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(17, 6, 4000));
    let line = Line::new("a", &layer.blob);
    let first = add(&fetcher, &layer, &[&line]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    fetcher
        .fill(&first, whole, Priority::Foreground, None)
        .await
        .unwrap();
    fetcher.seal(&first).await.unwrap();
    let other = layer.under_another_index();
    let unused = Line::new("unused", &other.blob);
    let second = add(&fetcher, &other, &[&unused]).await;
    fetcher
        .fill(&second, whole, Priority::Foreground, None)
        .await
        .unwrap();
    assert_eq!((check(&second, &other), unused.asked().len()), (6, 0));
    assert_eq!(second.traffic().store_bytes, layer.tar.len() as u64);
    fetcher.seal(&second).await.unwrap();
    assert_eq!(fetcher.metrics().seals(), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn chunks_of_before_a_reboot_are_checked_not_fetched() {
    let layer = TestLayer::even(18, 6, 4000);
    let dir = tempfile::tempdir().unwrap();
    let open = |boot| {
        let options = StoreOptions {
            boot: Some(BootId([boot; 16])),
            reclaim: None,
        };
        Arc::new(Store::open(dir.path(), options).unwrap())
    };
    let line = Line::new("a", &layer.blob);
    {
        let fetcher = Fetcher::new(options(), open(1), Metrics::new());
        let handle = add(&fetcher, &layer, &[&line]).await;
        let half = Extent::new(0, 12_000).unwrap();
        fetcher
            .fill(&handle, half, Priority::Foreground, None)
            .await
            .unwrap();
        fetcher.shutdown().await;
    }
    let fetcher = Fetcher::new(options(), open(2), Metrics::new());
    let handle = add(&fetcher, &layer, &[&line]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    fetcher
        .fill(&handle, whole, Priority::Foreground, None)
        .await
        .unwrap();
    assert_eq!(check(&handle, &layer), 6);
    let asked = line.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(
        asked[1].extent.start(),
        layer.chunks.chunk(3).unwrap().blob.start()
    );
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_layer_without_a_source_waits_for_one() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(19, 3, 4000));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &[]).await;
    let extent = chunk_extent(&layer, 1);
    let fill = fetcher.fill(&handle, extent, Priority::Foreground, Some(10 * SECOND));
    let later = async {
        tokio::time::sleep(3 * SECOND).await;
        handle.add_source(Arc::new(line.clone()));
        clock::now()
    };
    let (filled, added) = tokio::join!(fill, later);
    filled.unwrap();
    assert!(clock::now() - added < Duration::from_millis(30));
}

#[tokio::test(start_paused = true)]
async fn closing_ends_fills_and_shutdown_joins_everything() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(20, 3, 4000));
    let line = Line::new("a", &layer.blob);
    line.always(Some(Mishap::Silence));
    for shut in [false, true] {
        let handle = add(&fetcher, &layer, &[&line]).await;
        let extent = chunk_extent(&layer, 1);
        let fill = fetcher.fill(&handle, extent, Priority::Foreground, None);
        let close = async {
            tokio::time::sleep(SECOND).await;
            if shut {
                fetcher.shutdown().await;
            } else {
                fetcher.close_layer(&layer.key);
            }
        };
        let (filled, ()) = tokio::join!(fill, close);
        assert!(matches!(filled, Err(FillError::Closed)), "{filled:?}");
        tokio::time::sleep(MILLISECOND).await;
        assert_eq!(handle.flights.len(), 0);
    }
    let error = fetcher.add_layer(layer.spec(vec![])).await.unwrap_err();
    assert!(matches!(error, StoreError::Stopped), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_full_store_is_said_at_once_and_gets_better() {
    let (disk, fetcher, layer, _, handle) = on_a_disk(21).await;
    let fill = |chunk| {
        fetcher.fill(
            &handle,
            chunk_extent(&layer, chunk),
            Priority::Foreground,
            None,
        )
    };
    fill(0).await.unwrap();
    disk.fill_up(1);
    let error = fill(1).await.unwrap_err();
    assert!(
        matches!(error, FillError::NoSpace { needed_bytes: 4000 }),
        "{error}"
    );
    // What is present is read on, and the next fill finds room.
    fill(0).await.unwrap();
    fill(1).await.unwrap();
    assert_eq!(check(&handle, &layer), 2);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_is_slower_than_the_stall_limit_still_serves() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(22, 3, 4000));
    let line = Line::new("slow", &layer.blob).first_byte(3 * options().stall);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let extent = chunk_extent(&layer, 1);
    let deadline = Some(Duration::from_secs(300));
    fetcher
        .fill(&handle, extent, Priority::Foreground, deadline)
        .await
        .unwrap();
    assert_eq!((check(&handle, &layer), line.asked().len()), (1, 3));
    assert_eq!(fetcher.metrics().stalls(SourceKind::Origin), 2);
}

fn fetcher_on(disk: &CrashDisk) -> Fetcher {
    let boot = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Store::on(Box::new(disk.clone()), None, boot).unwrap();
    Fetcher::new(options(), Arc::new(store), Metrics::new())
}

/// A layer in a store on a disk that can be filled up.
async fn on_a_disk(seed: u64) -> (CrashDisk, Fetcher, TestLayer, Line, Arc<LayerHandle>) {
    let disk = CrashDisk::default();
    let fetcher = fetcher_on(&disk);
    let layer = TestLayer::even(seed, 8, 4000);
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &[&line]).await;
    (disk, fetcher, layer, line, handle)
}

#[tokio::test(start_paused = true)]
async fn what_a_full_store_does_not_keep_is_passed_to_its_readers() {
    let (disk, fetcher, layer, line, handle) = on_a_disk(31).await;
    disk.fill_up(3);
    // From the middle of one chunk to the middle of another: three are refused, the fourth is kept.
    let extent = Extent::<DeviceSpace>::new(4000 + 100, 4 * 4000 + 7).unwrap();
    let pass = || fetcher.fill_or_pass(&handle, extent, Priority::Foreground, Some(30 * SECOND));
    let tar: Vec<u8> = (0..8)
        .flat_map(|chunk| layer.bytes_of(chunk).to_vec())
        .collect();
    let expected = Filled::Passed(tar[4100..16007].to_vec().into());
    assert_eq!(pass().await.unwrap(), expected);
    assert_eq!(check(&handle, &layer), 1);
    // The disk has room again, as the next chunk shows: all is fetched anew and kept, though it is still in memory.
    let next = fetcher.fill(&handle, chunk_extent(&layer, 7), Priority::Foreground, None);
    next.await.unwrap();
    let asked = line.asked().len();
    assert_eq!(pass().await.unwrap(), Filled::Present);
    assert_eq!((check(&handle, &layer), line.asked().len()), (5, asked + 1));
}

#[tokio::test(start_paused = true)]
async fn many_readers_of_a_full_store_get_their_bytes() {
    let (disk, fetcher, layer, _, handle) = on_a_disk(32).await;
    disk.fill_up(u32::MAX);
    let read = |chunk: u32| {
        let (fetcher, handle) = (fetcher.clone(), Arc::clone(&handle));
        let extent = chunk_extent(&layer, chunk);
        let expected = Filled::Passed(layer.bytes_of(chunk).to_vec().into());
        async move {
            let fill = fetcher.fill_or_pass(&handle, extent, Priority::Foreground, None);
            assert_eq!(fill.await.unwrap(), expected);
        }
    };
    futures::future::join_all((0..40).map(|reader| read(reader % 8))).await;
    assert_eq!(check(&handle, &layer), 0);
    // Who needs it in the store is told, and what nobody waits for ends.
    let extent = chunk_extent(&layer, 3);
    let error = fetcher.fill(&handle, extent, Priority::Background, None);
    assert!(matches!(error.await, Err(FillError::NoSpace { .. })));
    tokio::time::timeout(SECOND, async {
        while handle.flights.len() > 0 {
            tokio::time::sleep(MILLISECOND).await;
        }
    })
    .await
    .unwrap();
}
