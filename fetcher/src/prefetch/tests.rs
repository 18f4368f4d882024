// SPDX-License-Identifier: Apache-2.0
//! Whole images in the background, in paused time.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::boot::BootRead;
use crate::fixture::TestLayer;
use crate::fixture::line::{Asked, Line, Mishap, Wire};
use crate::metrics::Metrics;
use crate::scheduler::FetcherOptions;
use crate::source::{BlobSource, SourceKind};
use crate::store::crash::CrashDisk;
use crate::store::{BootId, Store, StoreOptions};
use sluice_blockindex::digest::DiffId;
use sluice_blockindex::extent::Extent;

const SECOND: Duration = Duration::from_secs(1);

fn fetcher() -> Fetcher {
    let options = FetcherOptions {
        request_bytes: 256 << 10,
        shy_request_bytes: 64 << 10,
        read_ahead_max_bytes: 0,
        decodes: 2,
        processors_waited: || None,
        ..FetcherOptions::default()
    };
    fetcher_of(options)
}

fn fetcher_of(options: FetcherOptions) -> Fetcher {
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

async fn add(fetcher: &Fetcher, layer: &TestLayer, line: &Line) -> Arc<LayerHandle> {
    let sources = vec![Arc::new(line.clone()) as Arc<dyn BlobSource>];
    fetcher.add_layer(layer.spec(sources)).await.unwrap()
}

fn is_right(handle: &LayerHandle, layer: &TestLayer) -> bool {
    let mut bytes = vec![0; layer.tar.len()];
    handle.device().read_at(0, &mut bytes).unwrap();
    bytes == layer.tar
}

#[tokio::test(start_paused = true)]
async fn an_image_is_completed_and_sealed() {
    let fetcher = fetcher();
    let layers = [
        TestLayer::even(1, 64, 16 << 10),
        TestLayer::new(2, &[]),
        TestLayer::even(3, 32, 16 << 10),
    ];
    let lines = [0, 1, 2].map(|at| Line::new("a", &layers[at].blob));
    let mut handles = Vec::new();
    for (layer, line) in layers.iter().zip(&lines) {
        handles.push(add(&fetcher, layer, line).await);
    }
    let job = fetcher.prefetch(handles.clone());
    let progress = job.join().await;
    let total_bytes = (96 * (16 << 10)) as u64;
    let expected = PrefetchProgress {
        layers: 3,
        sealed_layers: 3,
        failed_layers: 0,
        total_bytes,
        present_bytes: total_bytes,
    };
    assert_eq!(progress, expected);
    for (handle, layer) in handles.iter().zip(&layers) {
        assert!(handle.device().is_sealed() && is_right(handle, layer));
    }
    // 1 MiB and some in requests of a quarter, and half of that; the first are small, since nothing is known of the line.
    assert_eq!(
        (
            lines[0].asked().len(),
            lines[1].asked().len(),
            lines[2].asked().len()
        ),
        (9, 0, 3)
    );
    assert!(
        lines[0]
            .asked()
            .iter()
            .all(|asked| asked.priority == Priority::Background)
    );
    // Again: nothing to do.
    let job = fetcher.prefetch(handles);
    assert_eq!(job.join().await, expected);
    fetcher.shutdown().await;
}

/// Adds two layers whose sources share one line. Gives the first one's source, and both handles.
async fn share_a_line(
    fetcher: &Fetcher,
    big: &TestLayer,
    small: &TestLayer,
) -> (Line, [Arc<LayerHandle>; 2]) {
    let wire = Wire::default();
    let [back, front] =
        [("back", big), ("front", small)].map(|(label, it)| Line::new(label, &it.blob).over(&wire));
    let one = add(fetcher, big, &back).await;
    let two = add(fetcher, small, &front).await;
    (back, [one, two])
}

/// How long a reader of many small pieces takes who computes for a while between them.
async fn reads(fetcher: &Fetcher, layer: &TestLayer, handle: &Arc<LayerHandle>) -> Duration {
    let before = clock::now();
    for part in 0..100 {
        let chunk = |chunk| layer.chunks.chunk(chunk).unwrap().device;
        let extent = chunk(part * 10).hull(chunk(part * 10 + 9));
        fetcher
            .fill(handle, extent, Priority::Foreground, Some(10 * SECOND))
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(u64::from(part % 7) * 4)).await;
    }
    clock::now() - before
}

#[tokio::test(start_paused = true)]
async fn a_busy_reader_is_slowed_by_a_twentieth_at_most() {
    let small = TestLayer::even(6, 1000, 16 << 10);
    let alone = {
        let fetcher = fetcher();
        let front = add(&fetcher, &small, &Line::new("front", &small.blob)).await;
        reads(&fetcher, &small, &front).await
    };
    let (fetcher, big) = (fetcher(), TestLayer::even(5, 4000, 16 << 10));
    let (back, [one, two]) = share_a_line(&fetcher, &big, &small).await;
    let job = fetcher.prefetch(vec![one.clone()]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = clock::now();
    let beside = reads(&fetcher, &small, &two).await;
    assert!(beside <= alone.mul_f64(1.05), "{beside:?} beside {alone:?}");
    // The image goes on meanwhile, and is soon complete afterwards.
    let sent = back.sent();
    let during = sent
        .iter()
        .filter(|(at, _)| (before..before + beside).contains(at));
    let during: usize = during.map(|(_, bytes)| bytes).sum();
    let capacity = beside.as_millis() * (16 << 10);
    let share = during as f64 / capacity as f64;
    assert!((0.05..0.5).contains(&share), "{share}");
    assert_eq!(job.join().await.sealed_layers, 1);
    assert!(is_right(&one, &big));
    let alone = Duration::from_millis(4000);
    let after = clock::now() - before - beside;
    assert!(after < alone.mul_f64(1.3) + SECOND, "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn beside_a_busy_reader_a_wide_line_is_used() {
    // 500 Mbit/s and 20 ms: the reader alone takes a tenth of it, and never fills it.
    let wide = |line: Line| line.pieces(64 << 10, Duration::from_millis(1));
    let store = || Arc::new(Store::in_memory(StoreOptions::default()).unwrap());
    let small = TestLayer::even(6, 1000, 16 << 10);
    let options = || FetcherOptions {
        read_ahead_max_bytes: 0,
        ..FetcherOptions::default()
    };
    let fetcher = || Fetcher::new(options(), store(), Metrics::new());
    let alone = {
        let fetcher = fetcher();
        let front = add(&fetcher, &small, &wide(Line::new("front", &small.blob))).await;
        reads(&fetcher, &small, &front).await
    };
    let (fetcher, big, wire) = (
        fetcher(),
        TestLayer::even(5, 8000, 16 << 10),
        Wire::default(),
    );
    let [back, front] = [("back", &big), ("front", &small)]
        .map(|(label, it)| wide(Line::new(label, &it.blob)).over(&wire));
    let one = add(&fetcher, &big, &back).await;
    let two = add(&fetcher, &small, &front).await;
    let job = fetcher.prefetch(vec![one.clone()]);
    // Nobody has told of the line yet but the reader.
    let before = clock::now();
    let beside = reads(&fetcher, &small, &two).await;
    assert!(beside <= alone.mul_f64(1.05), "{beside:?} beside {alone:?}");
    let within = before..before + beside;
    let sent = back.sent();
    let during = sent.iter().filter(|(at, _)| within.contains(at));
    let during: usize = during.map(|(_, bytes)| bytes).sum();
    let share = during as f64 / (beside.as_millis() * (64 << 10)) as f64;
    assert!(share > 0.25, "{share}");
    job.cancel();
}

#[tokio::test(start_paused = true)]
async fn beside_readers_it_works_only_while_one_waits() {
    for listed in [true, false] {
        goes_beside_readers(listed).await;
    }
}

async fn goes_beside_readers(listed: bool) {
    let (fetcher, layer) = (fetcher(), TestLayer::even(5, 6000, 16 << 10));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &line).await;
    if listed {
        let list = [BootRead { layer: 0, chunk: 7 }];
        let burst = fetcher.load_boot_list(std::slice::from_ref(&handle), &list);
        assert_eq!(burst.join().await, list);
    }
    let background = || {
        let asked = line.asked();
        let background = asked
            .iter()
            .filter(|it| it.priority == Priority::Background);
        background.count()
    };
    let job = fetcher.prefetch_beside_readers(vec![handle.clone()], 5 * SECOND);
    tokio::time::sleep(SECOND).await;
    assert_eq!(background() == 0, listed);
    let extent = layer.chunks.chunk(5000).unwrap().device;
    let read = fetcher.fill(&handle, extent, Priority::Foreground, Some(SECOND));
    read.await.unwrap();
    tokio::time::sleep(SECOND).await;
    let beside = background();
    assert!(beside > 2);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(background() <= beside + 2, listed, "{}", background());
    assert_eq!(job.join().await.sealed_layers, 1);
}

#[tokio::test(start_paused = true)]
async fn while_containers_start_processors_are_left_to_who_waits_for_them() {
    /// A node on which somebody always waits.
    fn always() -> Option<Duration> {
        static WAITED: AtomicU64 = AtomicU64::new(0);
        let hours = WAITED.fetch_add(1, Ordering::Relaxed);
        Some(Duration::from_secs(3600 * hours))
    }
    let layer = TestLayer::even(5, 12_000, 16 << 10);
    let total = layer.tar.len() as u64;
    // What is present after 10 s, and after 40: compressed bytes are as many.
    let least_and_most = |pressed: bool, starts: bool| match (pressed, starts) {
        (true, true) => [(20_000_000, 70_000_000), (total, total)],
        _ => [(total, total), (total, total)],
    };
    for (pressed, starts) in [(true, true), (true, false), (false, true)] {
        let fetcher = fetcher_of(FetcherOptions {
            decodes: 2,
            processors_waited: if pressed { always } else { || None },
            ..FetcherOptions::default()
        });
        let line = Line::new("a", &layer.blob).pieces(64 << 10, Duration::from_millis(1));
        let handle = add(&fetcher, &layer, &line).await;
        let job = if starts {
            fetcher.prefetch_beside_readers(vec![handle.clone()], 5 * SECOND)
        } else {
            fetcher.prefetch(vec![handle.clone()])
        };
        for (seconds, (least, most)) in [10, 30].into_iter().zip(least_and_most(pressed, starts)) {
            tokio::time::sleep(seconds * SECOND).await;
            let present = handle.device().present_bytes();
            assert!(
                (least..=most).contains(&present),
                "{present} bytes; pressed {pressed}, starts {starts}, {seconds} s"
            );
        }
        assert_eq!(job.join().await.sealed_layers, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_stands_behind_a_reader_comes_before_the_rest() {
    let layer = TestLayer::even(5, 4000, 16 << 10);
    let options = FetcherOptions {
        read_ahead_initial_bytes: 32 << 10,
        shy_request_bytes: 64 << 10,
        shy_request_bytes_min: 64 << 10,
        ..FetcherOptions::default()
    };
    let store = Arc::new(Store::in_memory(StoreOptions::default()).unwrap());
    let fetcher = Fetcher::new(options, store, Metrics::new());
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &line).await;
    let chunk = |chunk| layer.chunks.chunk(chunk).unwrap();
    let read = |at| {
        fetcher.fill(
            &handle,
            chunk(at).device,
            Priority::Foreground,
            Some(SECOND),
        )
    };
    read(3000).await.unwrap();
    let job = fetcher.prefetch(vec![handle.clone()]);
    tokio::time::sleep(Duration::from_millis(400)).await;
    let asked = line.asked().len();
    read(2000).await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    job.cancel();
    let all = line.asked();
    let (first, second) = all.split_at(asked);
    // One request is the reader's own.
    for (asked, from) in [(first, 3000), (second, 2000)] {
        let near = chunk(from).blob.start()..chunk(from + 140).blob.start();
        let near = |asked: &&Asked| near.contains(&asked.extent.start());
        let (count, asked) = (asked.iter().filter(near).count(), asked.len());
        assert!(
            asked > 8 && count + 1 >= asked,
            "{from}: {count} of {asked}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn in_a_readers_pause_it_goes_on_piece_by_piece() {
    let (fetcher, big, small) = (
        fetcher(),
        TestLayer::even(5, 4000, 16 << 10),
        TestLayer::even(6, 100, 16 << 10),
    );
    let (back, [one, two]) = share_a_line(&fetcher, &big, &small).await;
    let chunk = |chunk| small.chunks.chunk(chunk).unwrap().device;
    let read = |part: u32| {
        let extent = chunk(part * 20).hull(chunk(part * 20 + 19));
        fetcher.fill(&two, extent, Priority::Foreground, Some(SECOND))
    };
    read(0).await.unwrap();
    let job = fetcher.prefetch(vec![one.clone()]);
    for part in 1..5 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = clock::now();
        read(part).await.unwrap();
        let took = clock::now() - before;
        // A round trip and 21 pieces; and what was asked for already, if that came first.
        assert!(took <= Duration::from_millis(41 + 8), "{took:?}");
    }
    let asked = back.asked();
    assert!(asked.len() > 8, "{} requests", asked.len());
    assert!(asked.iter().all(|asked| asked.extent.len() <= 64 << 10));
    assert_eq!(job.join().await.sealed_layers, 1);
    assert!(is_right(&one, &big));
}

#[tokio::test(start_paused = true)]
async fn a_broken_source_delays_its_layer_and_no_other() {
    let fetcher = fetcher();
    let (first, second) = (
        TestLayer::even(7, 32, 16 << 10),
        TestLayer::even(8, 32, 16 << 10),
    );
    let (bad, good) = (
        Line::new("bad", &first.blob),
        Line::new("good", &second.blob),
    );
    bad.always(Some(Mishap::Refuse));
    let (one, two) = (
        add(&fetcher, &first, &bad).await,
        add(&fetcher, &second, &good).await,
    );
    let job = fetcher.prefetch(vec![one.clone(), two.clone()]);
    tokio::time::sleep(5 * SECOND).await;
    assert!(two.device().is_sealed() && !one.device().is_complete());
    assert!(bad.asked().len() < 60, "{} requests", bad.asked().len());
    assert_eq!(job.progress().borrow().sealed_layers, 1);
    bad.always(None);
    assert_eq!(job.join().await.sealed_layers, 2);
    assert!(is_right(&one, &first));
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_lies_about_its_diff_id_fails_and_the_rest_goes_on() {
    let fetcher = fetcher();
    let (mut liar, honest) = (
        TestLayer::even(9, 8, 16 << 10),
        TestLayer::even(10, 8, 16 << 10),
    );
    liar.key.diff_id = DiffId::of(b"claimed");
    let lines = [Line::new("a", &liar.blob), Line::new("a", &honest.blob)];
    let one = add(&fetcher, &liar, &lines[0]).await;
    let two = add(&fetcher, &honest, &lines[1]).await;
    let job = fetcher.prefetch(vec![one.clone(), two.clone()]);
    let progress = job.join().await;
    assert_eq!((progress.sealed_layers, progress.failed_layers), (1, 1));
    let extent = Extent::new(0, 10).unwrap();
    let error = fetcher
        .fill(&one, extent, Priority::Foreground, None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, crate::scheduler::FillError::Failed(_)),
        "{error}"
    );
    assert!(one.device().read_at(0, &mut [0]).is_err());
    assert_eq!(fetcher.metrics().seals(), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn what_the_disk_lost_is_fetched_again_and_sealed() {
    let layer = TestLayer::even(12, 8, 16 << 10);
    let disk = CrashDisk::default();
    let boot = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Store::on(Box::new(disk.clone()), None, boot).unwrap();
    let fetcher = Fetcher::new(FetcherOptions::default(), Arc::new(store), Metrics::new());
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &line).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    fetcher
        .fill(&handle, whole, Priority::Foreground, None)
        .await
        .unwrap();
    disk.rot(&layer.key, 40_000);
    let job = fetcher.prefetch(vec![handle.clone()]);
    assert_eq!(job.join().await.sealed_layers, 1);
    assert!(is_right(&handle, &layer));
    assert_eq!(
        line.asked().last().unwrap().extent,
        layer.chunks.chunk(2).unwrap().blob
    );
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn cancelling_stops_requests_but_not_what_a_reader_waits_for() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(11, 400, 16 << 10));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &line).await;
    let job = fetcher.prefetch(vec![handle.clone()]);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let chunk = 8;
    assert!(handle.flights.is_in_flight(chunk));
    let extent = layer.chunks.chunk(chunk).unwrap().device;
    let reader = fetcher.fill(&handle, extent, Priority::Foreground, Some(SECOND));
    let cancel = async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        job.cancel();
    };
    let (read, ()) = tokio::join!(reader, cancel);
    read.unwrap();
    let requests = line.asked().len();
    let progress = job.join().await;
    assert!(progress.present_bytes < progress.total_bytes);
    tokio::time::sleep(SECOND).await;
    assert_eq!(line.asked().len(), requests);
    assert_eq!(handle.flights.len(), 0);
    assert_eq!(
        fetcher
            .metrics()
            .requests(SourceKind::Origin, Priority::Foreground),
        0
    );
    fetcher.shutdown().await;
}
