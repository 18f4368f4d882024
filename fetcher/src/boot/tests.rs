// SPDX-License-Identifier: Apache-2.0
//! Bursts against readers and the background, in paused time.

use std::time::Duration;

use super::*;
use crate::clock;
use crate::fixture::TestLayer;
use crate::fixture::line::{Line, Mishap, Wire};
use crate::metrics::Metrics;
use crate::scheduler::FetcherOptions;
use crate::source::{BlobSource, Priority};
use crate::store::{BootId, Store, StoreOptions};

const SECOND: Duration = Duration::from_secs(1);
const KIB: usize = 1 << 10;

fn fetcher() -> Fetcher {
    let options = FetcherOptions {
        gap_bytes: 0,
        boot_gap_bytes: 0,
        boot_request_bytes: 256 << 10,
        read_ahead_initial_bytes: 64 << 10,
        read_ahead_max_bytes: 64 << 10,
        decodes: 2,
        ..FetcherOptions::default()
    };
    let store = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Store::in_memory(store).unwrap();
    Fetcher::new(options, Arc::new(store), Metrics::new())
}

async fn add(fetcher: &Fetcher, layer: &TestLayer, line: &Line) -> Arc<LayerHandle> {
    let sources = vec![Arc::new(line.clone()) as Arc<dyn BlobSource>];
    fetcher.add_layer(layer.spec(sources)).await.unwrap()
}

fn reads(layer: usize, chunks: impl IntoIterator<Item = u32>) -> Vec<BootRead> {
    let chunks = chunks.into_iter();
    chunks.map(|chunk| BootRead { layer, chunk }).collect()
}

#[tokio::test(start_paused = true)]
async fn a_list_comes_in_few_requests_over_all_layers_at_once() {
    let fetcher = fetcher();
    let layers = [1, 2, 3].map(|seed| TestLayer::even(seed, 64, 16 * KIB));
    let lines = [0, 1, 2].map(|at| Line::new("a", &layers[at].blob));
    let mut handles = Vec::new();
    for (layer, line) in layers.iter().zip(&lines) {
        handles.push(add(&fetcher, layer, line).await);
    }
    let mut list = Vec::new();
    for chunk in 0..8 {
        for layer in 0..3 {
            list.extend(reads(layer, [20 + chunk]));
        }
    }
    // Nonsense does no harm.
    list.extend([(0, 64), (3, 0), (7, 7)].map(|(layer, chunk)| BootRead { layer, chunk }));
    let began = clock::now();
    let burst = fetcher.load_boot_list(&handles, &list);
    assert_eq!((burst.requests(), burst.claimed().len()), (3, 24));
    let claimed = burst.join().await;
    // One round trip and the pieces of one request: they run beside each other.
    assert!(
        clock::now() - began < Duration::from_millis(40),
        "{:?}",
        clock::now() - began
    );
    for BootRead { layer, chunk } in claimed {
        assert!(handles[layer].device().is_present(chunk));
    }
    for line in &lines {
        let asked = line.asked();
        assert_eq!((asked.len(), asked[0].priority), (1, Priority::Boot));
    }
    // Again: all of it is here.
    let burst = fetcher.load_boot_list(&handles, &list);
    assert_eq!((burst.requests(), burst.claimed().len()), (0, 0));
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_makes_its_request_foreground_and_reads_nothing_ahead() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(4, 640, 16 * KIB));
    let line = Line::new("a", &layer.blob).over(&Wire::default());
    let handle = add(&fetcher, &layer, &line).await;
    // 20 requests of 256 KiB, each of which takes 16 ms of the line.
    let burst = fetcher.load_boot_list(std::slice::from_ref(&handle), &reads(0, 0..320));
    assert!(burst.requests() >= 20);
    let last = layer.chunks.chunk(319).unwrap().device;
    let before = clock::now();
    let filled = fetcher.fill(&handle, last, Priority::Foreground, Some(SECOND));
    filled.await.unwrap();
    // It would be the last of all otherwise.
    let took = clock::now() - before;
    assert!(took < Duration::from_millis(150), "{took:?}");
    assert!(!handle.device().is_present(200));
    burst.join().await;
    // Nothing behind the list was touched.
    assert!((320..640).all(|chunk| !handle.device().is_present(chunk)));
    // What is not on the list is read with what follows it.
    let other = layer.chunks.chunk(400).unwrap().device;
    let filled = fetcher.fill(&handle, other, Priority::Foreground, Some(SECOND));
    filled.await.unwrap();
    tokio::time::sleep(SECOND).await;
    assert!(handle.device().is_present(402));
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_does_not_slow_a_reader_of_something_else() {
    let (fetcher, big, small) = (
        fetcher(),
        TestLayer::even(5, 1600, 16 * KIB),
        TestLayer::even(6, 100, 16 * KIB),
    );
    let wire = Wire::default();
    let lines = [
        Line::new("a", &big.blob).over(&wire),
        Line::new("a", &small.blob).over(&wire),
    ];
    let one = add(&fetcher, &big, &lines[0]).await;
    let two = add(&fetcher, &small, &lines[1]).await;
    let burst = fetcher.load_boot_list(std::slice::from_ref(&one), &reads(0, 0..1600));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = clock::now();
    for part in 0..5 {
        let chunk = |chunk| small.chunks.chunk(chunk).unwrap().device;
        let extent = chunk(part * 20).hull(chunk(part * 20 + 19));
        let filled = fetcher.fill(&two, extent, Priority::Foreground, Some(SECOND));
        filled.await.unwrap();
    }
    // 5 round trips of 20 ms and about 25 pieces each, and what was on its way when the first byte came.
    let took = clock::now() - before;
    assert!(took <= Duration::from_millis(5 * (46 + 6)), "{took:?}");
    // And it used the line whenever the reader did not.
    let during = |at: &tokio::time::Instant| *at > before && *at < before + took;
    let pieces = lines[0].sent().iter().filter(|(at, _)| during(at)).count();
    assert!(pieces > 60, "{pieces} pieces");
    burst.join().await;
    assert!((0..1600).all(|chunk| one.device().is_present(chunk)));
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_fails_is_given_up_and_comes_when_it_is_read() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(7, 64, 16 * KIB));
    let line = Line::new("a", &layer.blob);
    let handle = add(&fetcher, &layer, &line).await;
    line.always(Some(Mishap::Refuse));
    let burst = fetcher.load_boot_list(std::slice::from_ref(&handle), &reads(0, 0..64));
    let claimed = burst.join().await;
    assert_eq!(claimed.len(), 64);
    assert!(line.asked().len() <= 8, "{} requests", line.asked().len());
    assert_eq!(handle.flights.len(), 0);
    line.always(None);
    let extent = layer.chunks.chunk(5).unwrap().device;
    let filled = fetcher.fill(&handle, extent, Priority::Foreground, Some(60 * SECOND));
    filled.await.unwrap();
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_burst_asks_for_nothing_more() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(8, 640, 16 * KIB));
    let line = Line::new("a", &layer.blob).over(&Wire::default());
    let handle = add(&fetcher, &layer, &line).await;
    let burst = fetcher.load_boot_list(std::slice::from_ref(&handle), &reads(0, 0..640));
    tokio::time::sleep(Duration::from_millis(30)).await;
    drop(burst);
    tokio::time::sleep(SECOND).await;
    assert!(line.asked().len() <= 4, "{} requests", line.asked().len());
    assert_eq!(handle.flights.len(), 0);
    fetcher.shutdown().await;
}
