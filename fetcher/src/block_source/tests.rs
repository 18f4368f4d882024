// SPDX-License-Identifier: Apache-2.0
//! Random reads over sources that fail in random ways, against the plain bytes.

use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::fixture::TestLayer;
use crate::fixture::line::{Line, Mishap};
use crate::metrics::Metrics;
use crate::scheduler::FetcherOptions;
use crate::source::BlobSource;
use crate::store::{BootId, Store, StoreOptions};

fn device(range: Range<u64>) -> Extent<DeviceSpace> {
    Extent::new(range.start, range.end).unwrap()
}

/// What every block source promises, over a device of these bytes.
async fn contract(source: &dyn BlockSource, bytes: &[u8]) {
    let length = bytes.len() as u64;
    assert_eq!(source.device_bytes(), length);
    for range in [
        0..length,
        0..1,
        length - 1..length,
        5..5,
        length..length,
        100..length / 2,
    ] {
        let read = source.read(device(range.clone())).await.unwrap();
        let (start, end) = (
            usize::try_from(range.start).unwrap(),
            usize::try_from(range.end).unwrap(),
        );
        assert!(read == bytes[start..end], "{range:?}");
    }
    for range in [0..length + 1, length..length + 1, u64::MAX - 1..u64::MAX] {
        let error = source.read(device(range)).await.unwrap_err();
        assert!(matches!(error, BlockError::OutOfRange { .. }), "{error}");
    }
}

async fn filled(layer: &TestLayer, lines: &[Line]) -> (Fetcher, FilledLayer) {
    let store = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Arc::new(Store::in_memory(store).unwrap());
    let options = FetcherOptions {
        decodes: 2,
        ..FetcherOptions::default()
    };
    let fetcher = Fetcher::new(options, store, Metrics::new());
    let sources = lines
        .iter()
        .map(|line| Arc::new(line.clone()) as Arc<dyn BlobSource>);
    let handle = fetcher
        .add_layer(layer.spec(sources.collect()))
        .await
        .unwrap();
    // In paused time, and above all that the mishaps of a case can cost: 8 times 80 s at each source.
    let deadline = Some(Duration::from_secs(3600));
    (
        fetcher.clone(),
        FilledLayer::new(fetcher, handle, Priority::Foreground, deadline),
    )
}

#[tokio::test(start_paused = true)]
async fn both_keep_the_contract() {
    let layer = TestLayer::new(1, &[700, 4096, 1, 30_000]);
    contract(&PlainLayer::new(layer.tar.clone()), &layer.tar).await;
    let (fetcher, source) = filled(&layer, &[Line::new("a", &layer.blob)]).await;
    contract(&source, &layer.tar).await;
    fetcher.shutdown().await;
}

#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<usize>,
    reads: Vec<(u64, u64)>,
    mishaps: Vec<Option<Mishap>>,
    forever: Option<Mishap>,
    flip: Option<u64>,
    whole: bool,
}

fn mishap() -> impl Strategy<Value = Mishap> {
    prop_oneof![
        Just(Mishap::Refuse),
        Just(Mishap::Silence),
        (0_usize..20_000).prop_map(Mishap::Cut),
        (0_usize..20_000).prop_map(Mishap::Stall),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop::collection::vec(1_usize..6000, 1..30),
        prop::collection::vec((any::<u64>(), 0_u64..20_000), 1..12),
        prop::collection::vec(prop::option::of(mishap()), 0..8),
        prop::option::weighted(0.2, mishap()),
        prop::option::of(any::<u64>()),
        any::<bool>(),
    )
        .prop_map(|(lengths, reads, mishaps, forever, flip, whole)| Case {
            lengths,
            reads,
            mishaps,
            forever,
            flip,
            whole,
        })
}

async fn run(case: Case) -> Result<(), TestCaseError> {
    let layer = TestLayer::new(2, &case.lengths);
    let frames = layer.chunks.frames_bytes();
    let mut first = Line::new("first", &layer.blob);
    if case.whole {
        first = first.whole();
    }
    if let Some(flip) = case.flip {
        first = first.flip(flip % frames);
    }
    first.mishaps(case.mishaps);
    // One source may be broken for good; the other is only ever slow.
    let second = Line::new("second", &layer.blob);
    second.always(case.forever);
    let (fetcher, source) = filled(&layer, &[first, second]).await;
    let model = PlainLayer::new(layer.tar.clone());
    let total = model.device_bytes();
    let extents: Vec<_> = case
        .reads
        .iter()
        .map(|(start, length)| {
            let start = start % total;
            device(start..total.min(start + length))
        })
        .collect();
    let reads = extents.iter().map(|extent| source.read(*extent));
    for (extent, read) in extents.iter().zip(futures::future::join_all(reads).await) {
        match read {
            Ok(bytes) => prop_assert_eq!(bytes, model.read(*extent).await.unwrap()),
            // Only where both sources are broken in one way or another.
            Err(error) => {
                let excused = case.forever.is_some() && case.flip.is_some();
                prop_assert!(excused, "{} at {}", error, extent);
            }
        }
    }
    fetcher.shutdown().await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Bytes equal the tar or there is an error; never zeros, and no error that a source could mend.
    #[test]
    fn reads_equal_the_tar_or_fail(case in case()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(run(case))?;
    }
}

/// Real threads, real files, real time: 16 readers of one layer, a prefetch, and a source that drops
/// every third request. Nobody hangs, everybody gets the tar's bytes, and it can be sealed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_readers_on_many_threads_agree() {
    let layer = TestLayer::even(3, 150, 10_000);
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(dir.path(), StoreOptions::default()).unwrap());
    let paths = store.device_paths(&layer.key).unwrap();
    let fetcher = Fetcher::new(FetcherOptions::default(), store, Metrics::new());
    let line = Line::new("a", &layer.blob).pieces(8 << 10, Duration::from_micros(200));
    line.mishaps((0..90).map(|at| (at % 3 == 0).then_some(Mishap::Cut(15_000))));
    let handle = fetcher
        .add_layer(layer.spec(vec![Arc::new(line)]))
        .await
        .unwrap();
    let shim = crate::store::PresenceMap::open(&paths.present).unwrap();
    let deadline = Some(Duration::from_secs(60));
    let source = FilledLayer::new(
        fetcher.clone(),
        Arc::clone(&handle),
        Priority::Foreground,
        deadline,
    );
    let job = fetcher.prefetch(vec![Arc::clone(&handle)]);
    let readers = (0..16_u64).map(|reader| {
        let (source, tar) = (source.clone(), layer.tar.clone());
        tokio::spawn(async move {
            let mut at = reader * 7919;
            for _ in 0..40 {
                at = (at * 6_364_136_223 + 1_442_695) % (tar.len() as u64 - 5000);
                let bytes = source.read(device(at..at + 5000)).await.unwrap();
                let at = usize::try_from(at).unwrap();
                assert!(bytes == tar[at..at + 5000], "reader {reader} at {at}");
            }
        })
    });
    for reader in futures::future::join_all(readers).await {
        reader.unwrap();
    }
    let progress = tokio::time::timeout(Duration::from_secs(60), job.join())
        .await
        .unwrap();
    assert_eq!(progress.sealed_layers, 1);
    assert_eq!(shim.state(), crate::store::DeviceState::Sealed);
    assert!(std::fs::read(&paths.data).unwrap() == layer.tar);
    fetcher.shutdown().await;
}
