// SPDX-License-Identifier: Apache-2.0
//! What is wrong below or beside the scheduler: rot, sources that lie, sources that trickle.

use std::sync::atomic::{AtomicBool, Ordering};

use sluice_blockindex::digest::{BlobDigest, IndexDigest, StrongAlgorithm};
use sluice_blockindex::encode::{EncodeOptions, encode_layer};
use sluice_blockindex::index::{UncheckedIndex, decompress_index};

use super::*;
use crate::source::OriginSet;

/// An index file that rots after it was validated, as a mapped one may.
#[derive(Clone)]
struct Rotting(Arc<(Vec<u8>, Vec<u8>, AtomicBool)>);

impl AsRef<[u8]> for Rotting {
    fn as_ref(&self) -> &[u8] {
        let (good, rotten, rots) = &*self.0;
        if rots.load(Ordering::Relaxed) {
            rotten
        } else {
            good
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_chunk_map_that_rots_ends_the_fill() {
    let tar = [0; 10_240];
    let options = EncodeOptions {
        level: 1,
        algorithm: StrongAlgorithm::Blake3,
        ..EncodeOptions::default()
    };
    let (blob, trailer) = encode_layer(&tar, options).unwrap();
    let pin = trailer.index.unwrap();
    let range =
        usize::try_from(pin.extent.start()).unwrap()..usize::try_from(pin.extent.end()).unwrap();
    let file = decompress_index(&blob[range], pin.file_bytes).unwrap();
    let index = UncheckedIndex::parse(file.clone())
        .unwrap()
        .validate()
        .unwrap();
    let digest = index.chunk_map().chunk(0).unwrap().digest.0;
    let mut rotten = file.clone();
    let at = file.windows(digest.len()).position(|it| it == digest);
    // The codec's byte stands 8 bytes before the digest.
    rotten[at.unwrap() - 8] = 0xff;
    for in_flight in [false, true] {
        let bytes = Rotting(Arc::new((
            file.clone(),
            rotten.clone(),
            AtomicBool::new(false),
        )));
        let index = UncheckedIndex::parse(bytes.clone())
            .unwrap()
            .validate()
            .unwrap();
        let fetcher = fetcher();
        let line = Line::new("a", &blob);
        line.always(Some(Mishap::Refuse));
        let spec = LayerSpec {
            key: DeviceKey {
                diff_id: trailer.diff_id,
                index: pin.digest,
            },
            chunks: index.chunk_map().clone(),
            blob: BlobDigest::of(&blob),
            blob_bytes: trailer.blob_bytes,
            sources: vec![Arc::new(line.clone())],
            origins: OriginSet::default(),
            windows: None,
            witnesses: None,
        };
        let handle = fetcher.add_layer(spec).await.unwrap();
        let rot = async {
            if in_flight {
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            bytes.0.2.store(true, Ordering::Relaxed);
        };
        let extent = Extent::new(0, 10).unwrap();
        let fill = fetcher.fill(&handle, extent, Priority::Foreground, None);
        let ((), filled) = tokio::join!(rot, fill);
        assert!(no_such_chunk(&filled), "{filled:?}");
    }
}

fn no_such_chunk(filled: &Result<(), FillError>) -> bool {
    matches!(filled, Err(FillError::Store(error))
        if matches!(**error, StoreError::NoSuchChunk { chunk: 0 }))
}

#[tokio::test]
async fn a_removal_waits_for_an_opening_and_leaves_no_dead_layer() {
    let disk = CrashDisk::default();
    let fetcher = fetcher_on(&disk);
    let layer = TestLayer::even(30, 2, 4000);
    let barrier = disk.hold_opening(layer.key);
    let pass = || {
        let barrier = Arc::clone(&barrier);
        tokio::task::spawn_blocking(move || barrier.wait())
    };
    let (adder, remover, spec) = (fetcher.clone(), fetcher.clone(), layer.spec(vec![]));
    let adding = tokio::spawn(async move { adder.add_layer(spec).await });
    pass().await.unwrap();
    let key = layer.key;
    let removing = tokio::spawn(async move { remover.remove_layer(&key).await });
    // It begins, and has all the time that it could want.
    tokio::time::sleep(50 * MILLISECOND).await;
    pass().await.unwrap();
    let added = adding.await.unwrap().unwrap();
    removing.await.unwrap().unwrap();
    assert!(fetcher.layer(&key).is_none());
    assert!(matches!(added.check_open(), Err(FillError::Closed)));
    // And it can be added again.
    let line = Line::new("a", &layer.blob);
    let again = add(&fetcher, &layer, &[&line]).await;
    let extent = chunk_extent(&layer, 1);
    let filled = fetcher.fill(&again, extent, Priority::Foreground, None);
    filled.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_twin_is_closed_when_nothing_more_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let store = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Arc::new(Store::open(dir.path(), store).unwrap());
    let layer = TestLayer::even(31, 4, 4000);
    let others = [b"one", b"two"].map(|index| TestLayer {
        key: DeviceKey {
            index: IndexDigest::of(index),
            ..layer.key
        },
        ..layer.clone()
    });
    let fetcher = Fetcher::new(options(), Arc::clone(&store), Metrics::new());
    let line = Line::new("a", &layer.blob);
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    let first = add(&fetcher, &layer, &[&line]).await;
    async fn fill(fetcher: &Fetcher, layer: &Arc<LayerHandle>, extent: Extent<DeviceSpace>) {
        let filled = fetcher
            .fill(layer, extent, Priority::Foreground, None)
            .await;
        filled.unwrap();
    }
    fill(&fetcher, &first, whole).await;
    fetcher.seal(&first).await.unwrap();
    drop(first);
    let data = store.device_paths(&layer.key).unwrap().data;
    let file = std::fs::metadata(&data).unwrap();
    let open_files = || {
        use std::os::unix::fs::MetadataExt as _;
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        files
            .filter_map(|it| std::fs::metadata(it.unwrap().path()).ok())
            .filter(|it| (it.dev(), it.ino()) == (file.dev(), file.ino()))
            .count()
    };
    fetcher.close_layer(&layer.key);
    assert_eq!(open_files(), 0);
    // Complete: the twin is closed.
    let one = add(&fetcher, &others[0], &[&line]).await;
    fill(&fetcher, &one, whole).await;
    tokio::time::sleep(SECOND).await;
    assert_eq!(open_files(), 0);
    // Not complete, and the twin is removed.
    let two = add(&fetcher, &others[1], &[&line]).await;
    fill(&fetcher, &two, chunk_extent(&layer, 1)).await;
    tokio::time::sleep(SECOND).await;
    assert_eq!((open_files(), line.asked().len()), (1, 1));
    fetcher.remove_layer(&layer.key).await.unwrap();
    assert_eq!(open_files(), 0);
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_nobody_uses_is_evicted_and_fetched_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: None,
    };
    let store = Arc::new(Store::open(dir.path(), store).unwrap());
    let fetcher = Fetcher::new(options(), Arc::clone(&store), Metrics::new());
    let layers = [0, 1, 2].map(|seed| TestLayer::even(50 + seed, 4, 64 << 10));
    let lines = [0, 1, 2].map(|at| Line::new("a", &layers[at].blob));
    let whole = Extent::new(0, layers[0].tar.len() as u64).unwrap();
    for at in [0, 1, 2] {
        let handle = add(&fetcher, &layers[at], &[&lines[at]]).await;
        let filled = fetcher.fill(&handle, whole, Priority::Foreground, None);
        filled.await.unwrap();
        if at != 1 {
            fetcher.seal(&handle).await.unwrap();
        }
        tokio::time::sleep(SECOND).await;
    }
    // Ordered by their last use, whatever order the test's own files got.
    for (layer, age) in layers.iter().zip([300, 200, 100]) {
        let dir = store.device_paths(&layer.key).unwrap().data;
        let used = std::time::SystemTime::now() - Duration::from_secs(age);
        let dir = std::fs::File::open(dir.parent().unwrap()).unwrap();
        dir.set_modified(used).unwrap();
    }
    let none = std::collections::BTreeSet::new();
    let room = |room, pinned: &_, idle| fetcher.make_room(room, pinned, idle).unwrap();
    let held = store.total_held_bytes().unwrap();
    // Within the budget, in use, wanted a moment ago, or pinned: all stay.
    let idle = Duration::from_secs(50);
    assert_eq!(room(Room::Budget(held), &none, idle).evicted, 0);
    let handles = layers
        .each_ref()
        .map(|layer| fetcher.layer(&layer.key).unwrap());
    assert_eq!(room(Room::Budget(0), &none, Duration::ZERO).evicted, 0);
    drop(handles);
    assert_eq!(room(Room::Budget(0), &none, idle).evicted, 0);
    tokio::time::sleep(idle).await;
    let keys = layers.iter().map(|layer| layer.key).collect();
    let report = room(Room::Budget(0), &keys, idle);
    assert_eq!(
        report,
        RoomReport {
            held_bytes: held,
            pinned_bytes: held,
            ..RoomReport::default()
        }
    );
    // The first was not used for longest, and is enough.
    let report = room(Room::Budget(held - 1), &none, idle);
    assert_eq!(
        (report.evicted, report.held_bytes + report.freed_bytes),
        (1, held)
    );
    let mut left: Vec<_> = layers[1..].iter().map(|layer| layer.key).collect();
    left.sort_unstable();
    assert_eq!(store.keys().unwrap(), left);
    assert!(fetcher.layer(&layers[0].key).is_none());
    // A full disk: the next, which is not sealed.
    assert_eq!(room(Room::Bytes(1), &none, idle).evicted, 1);
    assert_eq!(store.keys().unwrap(), [layers[2].key]);
    assert_eq!(fetcher.metrics().evictions().0, 2);
    // It is missing data again, and no error.
    for at in [0, 1] {
        let handle = add(&fetcher, &layers[at], &[&lines[at]]).await;
        assert_eq!(check(&handle, &layers[at]), 0);
        let filled = fetcher.fill(&handle, whole, Priority::Foreground, None);
        filled.await.unwrap();
        assert_eq!(
            (check(&handle, &layers[at]), lines[at].asked().len()),
            (4, 2)
        );
    }
    fetcher.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_source_makes_no_other_wait_for_longer() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(60, 3, 4000));
    let (good, silent) = (
        Line::new("good", &layer.blob),
        Line::new("silent", &layer.blob),
    );
    good.mishaps([Some(Mishap::Refuse), Some(Mishap::Silence)]);
    silent.always(Some(Mishap::Silence));
    let handle = add(&fetcher, &layer, &[&good, &silent]).await;
    let before = clock::now();
    fetcher
        .fill(&handle, chunk_extent(&layer, 1), Priority::Foreground, None)
        .await
        .unwrap();
    // Once each, and once more, twice as long, at the silent one.
    let took = clock::now() - before;
    assert!(took < 4 * options().stall + SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_source_that_trickles_has_stalled_and_a_slow_line_has_not() {
    let layer = TestLayer::even(61, 3, 64 << 10);
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    // One byte in 9 seconds; 64 kbit/s; a twentieth of that.
    for (bytes, pause, stalls) in [
        (1, 9 * SECOND, true),
        (1 << 10, 125 * MILLISECOND, false),
        (512, 1150 * MILLISECOND, false),
    ] {
        let (fetcher, good) = (fetcher(), Line::new("good", &layer.blob));
        let slow = Line::new("slow", &layer.blob).pieces(bytes, pause);
        let handle = add(&fetcher, &layer, &[&slow, &good]).await;
        let before = clock::now();
        fetcher
            .fill(&handle, whole, Priority::Foreground, None)
            .await
            .unwrap();
        assert_eq!(check(&handle, &layer), 3);
        let asked = (slow.asked().len(), good.asked().len());
        assert_eq!(asked, (1, usize::from(stalls)), "{bytes} in {pause:?}");
        if stalls {
            let took = clock::now() - before;
            assert!(took < options().stall + SECOND, "{took:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_read_ahead_gives_its_slot_to_a_reader() {
    let options = FetcherOptions {
        foreground_requests: 1,
        read_ahead_initial_bytes: 1 << 20,
        read_ahead_max_bytes: 1 << 20,
        ..options()
    };
    let fetcher = fetcher_with(options);
    let layers = [62, 63, 64].map(|seed| TestLayer::even(seed, 60, 16 << 10));
    let [ahead, busy, wanted] = &layers;
    // Two layers at one registry, one at another, which is busy for long.
    let lines = [
        Line::new("one/a", &ahead.blob),
        Line::new("two/b", &busy.blob).pieces(16 << 10, 20 * MILLISECOND),
        Line::new("one/c", &wanted.blob),
    ];
    let handles = [
        add(&fetcher, ahead, &[&lines[0]]).await,
        add(&fetcher, busy, &[&lines[1]]).await,
        add(&fetcher, wanted, &[&lines[2]]).await,
    ];
    let whole = Extent::new(0, busy.tar.len() as u64).unwrap();
    let other = fetcher.fill(&handles[1], whole, Priority::Foreground, None);
    let readers = async {
        let fill = |at: usize| {
            let extent = chunk_extent(&layers[at], 0);
            fetcher.fill(&handles[at], extent, Priority::Foreground, None)
        };
        fill(0).await.unwrap();
        tokio::time::sleep(50 * MILLISECOND).await;
        // What follows is on its way, and stands still for the other reader.
        assert!(handles[0].flights.len() > 30);
        let before = clock::now();
        fill(2).await.unwrap();
        clock::now() - before
    };
    let (filled, took) = tokio::join!(other, readers);
    filled.unwrap();
    assert!(took < 50 * MILLISECOND, "{took:?}");
    // What gave way is fetched when it is wanted.
    let rest = Extent::new(0, 1 << 19).unwrap();
    let filled = fetcher.fill(&handles[0], rest, Priority::Foreground, None);
    filled.await.unwrap();
    assert!(check(&handles[0], ahead) >= 32);
}

#[tokio::test(start_paused = true)]
async fn further_places_are_tried_at_once() {
    let (fetcher, layer) = (fetcher(), TestLayer::even(65, 3, 4000));
    let line = Line::new("a", &layer.blob);
    line.mishaps([Some(Mishap::Refuse); 8]);
    let handle = add(&fetcher, &layer, &[&line]).await;
    let fill = fetcher.fill(&handle, chunk_extent(&layer, 1), Priority::Foreground, None);
    let learn = async {
        // After 8 failures it backs off for 10 seconds.
        while line.asked().len() < 8 {
            tokio::time::sleep(10 * MILLISECOND).await;
        }
        tokio::time::sleep(100 * MILLISECOND).await;
        handle.refresh_sources();
        clock::now()
    };
    let (filled, learnt) = tokio::join!(fill, learn);
    filled.unwrap();
    assert!(clock::now() - learnt < 50 * MILLISECOND);
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_evicts_what_nobody_uses_and_goes_on() {
    let disk = CrashDisk::default();
    let fetcher: Arc<std::sync::OnceLock<Fetcher>> = Arc::default();
    let asked = Arc::clone(&fetcher);
    let boot = StoreOptions {
        boot: Some(BootId([1; 16])),
        reclaim: Some(Arc::new(move |bytes| {
            let none = std::collections::BTreeSet::new();
            let fetcher = asked.get().expect("set before the first fill");
            let report = fetcher.make_room(Room::Bytes(bytes), &none, SECOND);
            report.unwrap().freed_bytes > 0
        })),
    };
    let store = Store::on(Box::new(disk.clone()), None, boot).unwrap();
    let fetcher = fetcher.get_or_init(|| Fetcher::new(options(), Arc::new(store), Metrics::new()));
    let (old, new) = (TestLayer::even(66, 3, 4000), TestLayer::even(67, 3, 4000));
    let (line, other) = (Line::new("a", &old.blob), Line::new("b", &new.blob));
    let fill = async |layer: &TestLayer, line: &Line, chunk| {
        let handle = add(fetcher, layer, &[line]).await;
        let extent = chunk_extent(layer, chunk);
        fetcher
            .fill(&handle, extent, Priority::Foreground, None)
            .await
    };
    fill(&old, &line, 1).await.unwrap();
    tokio::time::sleep(2 * SECOND).await;
    disk.fill_up(1);
    fill(&new, &other, 0).await.unwrap();
    assert_eq!(fetcher.store().keys().unwrap(), [new.key]);
    // Nothing is left that may go.
    disk.fill_up(1);
    let error = fill(&new, &other, 1).await.unwrap_err();
    assert!(matches!(error, FillError::NoSpace { .. }), "{error}");
    fill(&new, &other, 1).await.unwrap();
    fill(&old, &line, 1).await.unwrap();
    assert_eq!(line.asked().len(), 2);
}
