// SPDX-License-Identifier: Apache-2.0
//! Contract suite over every store, a model test, and power cuts at every operation.

use proptest::prelude::*;

use super::crash::CrashDisk;
use sluice_blockindex::extent::Extent;

use super::*;
use crate::fixture::TestLayer;
use crate::source::Class;

const BOOT: BootId = BootId([1; 16]);
const NEXT_BOOT: BootId = BootId([2; 16]);

fn options(boot: BootId) -> StoreOptions {
    StoreOptions {
        boot: Some(boot),
        reclaim: None,
    }
}

fn go_on() -> impl FnMut() -> SealStep {
    || SealStep::Continue
}

fn commit_all(device: &Device, layer: &TestLayer) {
    for chunk in 0..layer.chunks.count() {
        device.commit(chunk, layer.bytes_of(chunk)).unwrap();
    }
}

/// Runs `check` over a new store of every kind; it may open the store again, under any boot ID.
fn on_every_store(check: impl Fn(&dyn Fn(BootId) -> Store)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("devices");
    check(&|boot| Store::open(&path, options(boot)).unwrap());
    let disk = CrashDisk::default();
    check(&|boot| Store::on(Box::new(disk.clone()), None, options(boot)).unwrap());
}

#[test]
fn committed_chunks_are_read_back_and_others_are_not() {
    let layer = TestLayer::new(1, &[700, 1, 4096, 513]);
    let check = |store: Store| {
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert_eq!(
            device.commit(2, layer.bytes_of(2)).unwrap(),
            Committed::Stored
        );
        assert_eq!(
            device.commit(2, layer.bytes_of(2)).unwrap(),
            Committed::Already
        );
        assert!(device.is_present(2) && !device.is_present(1));
        assert_eq!(device.present_bytes(), 4096);
        let mut bytes = [0; 4096];
        device.read_at(701, &mut bytes).unwrap();
        assert_eq!(bytes, layer.tar[701..4797]);
        let error = device.read_at(700, &mut bytes).unwrap_err();
        assert!(
            matches!(error, StoreError::NotPresent { chunk: 1 }),
            "{error}"
        );
        let error = device
            .read_at(layer.tar.len() as u64, &mut [0])
            .unwrap_err();
        assert!(matches!(error, StoreError::OutOfRange { .. }), "{error}");
    };
    on_every_store(|open| check(open(BOOT)));
    check(Store::in_memory(options(BOOT)).unwrap());
}

#[test]
fn wrong_bytes_are_never_made_visible() {
    let layer = TestLayer::even(2, 3, 1000);
    on_every_store(|open| {
        let device = open(BOOT).device(layer.key, &layer.chunks).unwrap();
        let mut flipped = layer.bytes_of(1).to_vec();
        flipped[999] ^= 1;
        for bytes in [&flipped[..], &flipped[..999], &[], layer.bytes_of(0)] {
            let error = device.commit(1, bytes).unwrap_err();
            assert!(
                matches!(error, StoreError::Mismatch { chunk: 1 }),
                "{error}"
            );
            assert_eq!(error.class(), Class::Corrupt);
        }
        assert!(!device.is_present(1));
        let error = device.commit(3, &[]).unwrap_err();
        assert!(
            matches!(error, StoreError::NoSuchChunk { chunk: 3 }),
            "{error}"
        );
    });
}

#[test]
fn a_killed_daemon_finds_all_chunks_again() {
    let layer = TestLayer::even(3, 100, 600);
    on_every_store(|open| {
        let store = open(BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        for chunk in [0, 63, 64, 99] {
            device.commit(chunk, layer.bytes_of(chunk)).unwrap();
        }
        drop((device, store));
        let store = open(BOOT);
        assert_eq!(store.keys().unwrap(), [layer.key]);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        let present: Vec<u32> = (0..100).filter(|chunk| device.is_present(*chunk)).collect();
        assert_eq!(present, [0, 63, 64, 99]);
        assert_eq!(device.present_bytes(), 2400);
    });
}

#[test]
fn after_an_unclean_reboot_chunks_are_checked_before_they_are_trusted() {
    let layer = TestLayer::even(4, 4, 600);
    on_every_store(|open| {
        let store = open(BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        device.commit(1, layer.bytes_of(1)).unwrap();
        device.commit(2, layer.bytes_of(2)).unwrap();
        drop((device, store));
        let store = open(NEXT_BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert!(!device.is_present(1) && device.is_suspect(1) && device.any_suspect());
        assert_eq!(device.recheck(1).unwrap(), Rechecked::Trusted);
        assert_eq!(device.recheck(1).unwrap(), Rechecked::NotSuspect);
        assert!(device.is_present(1) && !device.is_present(2));
        // Killed before chunk 2 was checked: it still waits.
        drop((device, store));
        let store = open(NEXT_BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert!(device.is_present(1) && device.is_suspect(2) && !device.is_suspect(0));
        // A fetch may come first.
        device.commit(2, layer.bytes_of(2)).unwrap();
        assert!(!device.any_suspect());
    });
}

#[test]
fn a_chunk_that_rotted_over_a_reboot_is_dropped() {
    let layer = TestLayer::even(5, 2, 600);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(BOOT)).unwrap();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    commit_all(&device, &layer);
    let paths = store.device_paths(&layer.key).unwrap();
    drop((device, store));
    let mut data = std::fs::read(&paths.data).unwrap();
    data[600] ^= 1;
    std::fs::write(&paths.data, data).unwrap();
    let store = Store::open(dir.path(), options(NEXT_BOOT)).unwrap();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    assert_eq!(device.recheck(0).unwrap(), Rechecked::Trusted);
    assert_eq!(device.recheck(1).unwrap(), Rechecked::Dropped);
    assert!(device.is_present(0) && !device.is_present(1) && !device.any_suspect());
}

#[test]
fn a_chunk_that_cannot_be_read_after_a_reboot_is_dropped() {
    let layer = TestLayer::even(5, 3, 600);
    let disk = CrashDisk::default();
    let open = |boot| Store::on(Box::new(disk.clone()), None, options(boot)).unwrap();
    let store = open(BOOT);
    commit_all(&store.device(layer.key, &layer.chunks).unwrap(), &layer);
    drop(store);
    let store = open(NEXT_BOOT);
    let device = store.device(layer.key, &layer.chunks).unwrap();
    disk.unreadable(Some(700));
    let found = [0, 1, 2].map(|chunk| device.recheck(chunk).unwrap());
    assert_eq!(
        found,
        [Rechecked::Trusted, Rechecked::Dropped, Rechecked::Trusted]
    );
    assert!(!device.is_present(1) && !device.any_suspect());
    // A fetch writes it anew.
    disk.unreadable(None);
    device.commit(1, layer.bytes_of(1)).unwrap();
    assert_eq!(check_present(&device, &layer, "written anew"), 3);
}

#[test]
fn what_is_sealed_or_failed_is_opened_without_a_write() {
    let honest = TestLayer::even(23, 3, 600);
    let mut liar = honest.clone();
    liar.key.diff_id = DiffId::of(b"claimed");
    for layer in [honest, liar] {
        let disk = CrashDisk::default();
        let open = |boot| Store::on(Box::new(disk.clone()), None, options(boot)).unwrap();
        let device = open(BOOT).device(layer.key, &layer.chunks).unwrap();
        commit_all(&device, &layer);
        let sealed = device.seal(&mut go_on()).is_ok();
        drop(device);
        let store = open(NEXT_BOOT);
        // Opening is one operation; a write would be the next.
        disk.cut_at(disk.operations() + 1);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert_eq!(
            (device.is_sealed(), device.failure().is_none()),
            (sealed, sealed)
        );
        assert_eq!(
            check_present(&device, &layer, "sealed"),
            if sealed { 3 } else { 0 }
        );
    }
}

#[test]
fn a_seal_that_fails_blames_the_disk_where_chunks_rotted() {
    let honest = TestLayer::even(24, 4, 600);
    let mut liar = honest.clone();
    liar.key.diff_id = DiffId::of(b"claimed");
    // Where a byte rotted, and where one cannot be read.
    for (rotten, unreadable, dropped) in [
        (Some(700), None, vec![1]),
        (None, Some(0), vec![0]),
        (Some(2399), Some(601), vec![1, 3]),
    ] {
        for layer in [&honest, &liar] {
            let disk = CrashDisk::default();
            let store = Store::on(Box::new(disk.clone()), None, options(BOOT)).unwrap();
            let device = store.device(layer.key, &layer.chunks).unwrap();
            commit_all(&device, layer);
            if let Some(at) = rotten {
                disk.rot(&layer.key, at);
            }
            disk.unreadable(unreadable);
            let error = device.seal(&mut go_on()).unwrap_err();
            let count = u32::try_from(dropped.len()).unwrap();
            assert!(
                matches!(error, StoreError::Rotten { rotten_chunks } if rotten_chunks == count),
                "{error}"
            );
            assert_eq!(device.present_bytes(), 600 * u64::from(4 - count));
            assert_eq!(
                device
                    .missing(Extent::new(0, 2400).unwrap())
                    .collect::<Vec<_>>(),
                dropped
            );
            // Fetched again, it is judged by what the image says.
            disk.unreadable(None);
            commit_all(&device, layer);
            let result = device.seal(&mut go_on());
            match (layer.key == honest.key, result) {
                (true, Ok(())) | (false, Err(StoreError::Failed(_))) => {}
                (_, other) => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn after_a_clean_stop_nothing_needs_a_check() {
    let layer = TestLayer::even(6, 3, 600);
    on_every_store(|open| {
        let store = open(BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        device.commit(1, layer.bytes_of(1)).unwrap();
        store.stop().unwrap();
        let error = device.commit(2, layer.bytes_of(2)).unwrap_err();
        assert!(matches!(error, StoreError::Stopped), "{error}");
        drop((device, store));
        let store = open(NEXT_BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert!(device.is_present(1) && !device.any_suspect());
        // The marker is gone with the first opening: this stop is not clean.
        drop((device, store));
        let device = open(BootId([3; 16]))
            .device(layer.key, &layer.chunks)
            .unwrap();
        assert!(device.is_suspect(1));
    });
}

#[test]
fn a_complete_layer_is_sealed_and_stays_so() {
    let layer = TestLayer::new(7, &[700, 1, 4096, 513]);
    on_every_store(|open| {
        let store = open(BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        let error = device.seal(&mut go_on()).unwrap_err();
        assert!(
            matches!(error, StoreError::Incomplete { missing_chunks: 4 }),
            "{error}"
        );
        commit_all(&device, &layer);
        let error = device.seal(&mut || SealStep::Cancel).unwrap_err();
        assert!(
            matches!(error, StoreError::Cancelled) && !device.is_sealed(),
            "{error}"
        );
        device.seal(&mut go_on()).unwrap();
        device.seal(&mut go_on()).unwrap();
        assert!(device.is_sealed());
        drop((device, store));
        let store = open(NEXT_BOOT);
        let other = DeviceKey {
            index: IndexDigest::of(b"another"),
            ..layer.key
        };
        assert_eq!(store.sealed_twins(&other), [layer.key]);
        assert_eq!(store.sealed_twins(&layer.key), []);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert!(device.is_sealed() && device.is_complete() && !device.any_suspect());
        store.remove_device(&layer.key).unwrap();
        assert_eq!(store.sealed_twins(&other), []);
        assert_eq!(store.keys().unwrap(), []);
    });
}

#[test]
fn an_empty_layer_is_sealed_at_once() {
    let layer = TestLayer::new(8, &[]);
    on_every_store(|open| {
        let device = open(BOOT).device(layer.key, &layer.chunks).unwrap();
        device.seal(&mut go_on()).unwrap();
        assert!(device.is_sealed());
    });
}

#[test]
fn a_layer_with_another_diff_id_becomes_unreadable_for_good() {
    let mut layer = TestLayer::even(9, 3, 600);
    let actual = layer.key.diff_id;
    layer.key.diff_id = DiffId::of(b"claimed");
    on_every_store(|open| {
        let store = open(BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        commit_all(&device, &layer);
        let error = device.seal(&mut go_on()).unwrap_err();
        assert!(matches!(error, StoreError::Failed(_)), "{error}");
        drop((device, store));
        let store = open(NEXT_BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert_eq!(device.failure().unwrap().actual, actual);
        let error = device.read_at(0, &mut [0]).unwrap_err();
        assert!(
            matches!(error, StoreError::Failed(record) if record.actual == actual),
            "{error}"
        );
    });
}

#[test]
fn a_failed_device_shows_nothing_to_any_process() {
    let mut layer = TestLayer::even(9, 3, 600);
    let actual = layer.key.diff_id;
    layer.key.diff_id = DiffId::of(b"claimed");
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(BOOT)).unwrap();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    commit_all(&device, &layer);
    let paths = store.device_paths(&layer.key).unwrap();
    let shim = PresenceMap::open(&paths.present).unwrap();
    assert!(shim.is_present(0));
    device.seal(&mut go_on()).unwrap_err();
    assert_eq!(
        (shim.state(), shim.present_chunks()),
        (DeviceState::Failed, 0)
    );
    let error = device.read_at(0, &mut [0]).unwrap_err();
    assert!(
        matches!(error, StoreError::Failed(record) if record.actual == actual),
        "{error}"
    );
    let error = device.commit(0, layer.bytes_of(0)).unwrap_err();
    assert!(matches!(error, StoreError::Failed(_)), "{error}");
}

#[test]
fn removal_ends_writing_and_frees_the_bytes() {
    let layer = TestLayer::even(10, 3, 8192);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(BOOT)).unwrap();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    let empty = store.held_bytes(&layer.key).unwrap();
    device.commit(1, layer.bytes_of(1)).unwrap();
    std::fs::File::open(store.device_paths(&layer.key).unwrap().data)
        .unwrap()
        .sync_all()
        .unwrap();
    let held = store.total_held_bytes().unwrap();
    assert!(
        (empty + 8192..empty + 3 * 8192).contains(&held),
        "{empty} then {held}"
    );
    store.remove_device(&layer.key).unwrap();
    store.remove_device(&layer.key).unwrap();
    let error = device.commit(2, layer.bytes_of(2)).unwrap_err();
    assert!(matches!(error, StoreError::Removed), "{error}");
    assert_eq!(store.total_held_bytes().unwrap(), 0);
    let device = store.device(layer.key, &layer.chunks).unwrap();
    assert!(!device.is_present(1));
}

#[test]
fn one_process_has_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options(BOOT)).unwrap();
    let error = Store::open(dir.path(), options(BOOT)).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    drop(store);
    Store::open(dir.path(), options(BOOT)).unwrap();
}

#[test]
fn an_opening_that_waits_for_the_disk_holds_up_its_own_layer_only() {
    let (slow, quick) = (TestLayer::even(25, 2, 600), TestLayer::even(26, 2, 600));
    let disk = CrashDisk::default();
    let store = Store::on(Box::new(disk.clone()), None, options(BOOT)).unwrap();
    let barrier = disk.hold_opening(slow.key);
    std::thread::scope(|scope| {
        let open = || store.device(slow.key, &slow.chunks).unwrap();
        let first = scope.spawn(open);
        barrier.wait();
        let second = scope.spawn(open);
        let (send, opened) = std::sync::mpsc::channel();
        let other = &store;
        scope.spawn(move || {
            let device = other.device(quick.key, &quick.chunks).unwrap();
            other.remove_device(&quick.key).unwrap();
            send.send(device.key()).unwrap();
        });
        let opened = opened.recv_timeout(std::time::Duration::from_secs(30));
        let waits = !second.is_finished();
        barrier.wait();
        let (first, second) = (first.join().unwrap(), second.join().unwrap());
        assert!(opened.is_ok(), "another layer waited");
        assert!(waits && Arc::ptr_eq(&first, &second));
    });
}

#[test]
fn nothing_is_opened_after_the_store_stopped() {
    let layer = TestLayer::even(27, 2, 600);
    let store = Store::in_memory(options(BOOT)).unwrap();
    store.stop().unwrap();
    let error = store.device(layer.key, &layer.chunks).unwrap_err();
    assert!(matches!(error, StoreError::Stopped), "{error}");
}

#[test]
fn unfinished_and_damaged_devices_are_replaced() {
    let layer = TestLayer::even(11, 3, 600);
    let dir = tempfile::tempdir().unwrap();
    let open = || Store::open(dir.path(), options(BOOT)).unwrap();
    let fill = || {
        let store = open();
        let device = store.device(layer.key, &layer.chunks).unwrap();
        commit_all(&device, &layer);
        device.seal(&mut go_on()).unwrap();
        store.device_paths(&layer.key).unwrap()
    };
    let paths = fill();
    std::fs::remove_file(paths.data.with_file_name("meta")).unwrap();
    assert_eq!(
        open().keys().unwrap(),
        [],
        "a device without a record is swept"
    );
    fill();
    std::fs::write(&paths.data, b"short").unwrap();
    let device = open().device(layer.key, &layer.chunks).unwrap();
    assert!(!device.is_sealed() && !device.is_present(0));
    drop(device);
    fill();
    std::fs::write(&paths.present, b"rubbish").unwrap();
    let device = open().device(layer.key, &layer.chunks).unwrap();
    assert!(!device.is_sealed() && !device.is_present(0) && !device.any_suspect());
}

#[test]
fn making_files_anew_may_fail_at_any_step_and_vouches_for_nothing() {
    let layer = TestLayer::even(11, 3, 600);
    let damage = |what: &str, paths: &DevicePaths| match what {
        "data" => std::fs::write(&paths.data, b"short").unwrap(),
        _ => std::fs::write(&paths.present, b"rubbish").unwrap(),
    };
    for damaged in ["data", "present"] {
        for (obstacle, sealed, killed) in [
            ("present.new", true, false),
            ("present.new", false, true),
            ("meta.new", true, false),
            ("meta.new", false, false),
            ("meta.new", false, true),
        ] {
            let what = format!("{damaged} damaged, {obstacle}, {sealed}, {killed}");
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path(), options(BOOT)).unwrap();
            let device = store.device(layer.key, &layer.chunks).unwrap();
            commit_all(&device, &layer);
            if sealed {
                device.seal(&mut go_on()).unwrap();
            } else {
                store.stop().unwrap();
            }
            let paths = store.device_paths(&layer.key).unwrap();
            drop((device, store));
            damage(damaged, &paths);
            let mut store = Store::open(dir.path(), options(BOOT)).unwrap();
            // A directory in the way of a temporary file: what is to replace it cannot be written.
            let obstacle = paths.data.with_file_name(obstacle);
            std::fs::create_dir(&obstacle).unwrap();
            store.device(layer.key, &layer.chunks).unwrap_err();
            std::fs::remove_dir(&obstacle).unwrap();
            if killed {
                drop(store);
                store = Store::open(dir.path(), options(NEXT_BOOT)).unwrap();
            }
            let device = store.device(layer.key, &layer.chunks).unwrap();
            assert_eq!(check_present(&device, &layer, &what), 0, "{what}");
            assert!(!device.is_sealed() && !device.any_suspect(), "{what}");
            commit_all(&device, &layer);
            device.seal(&mut go_on()).unwrap();
        }
    }
}

#[test]
fn after_a_failed_sync_chunks_are_checked_also_by_the_next_daemon() {
    let layer = TestLayer::even(28, 3, 600);
    let disk = CrashDisk::default();
    let open = || Store::on(Box::new(disk.clone()), None, options(BOOT)).unwrap();
    let store = open();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    commit_all(&device, &layer);
    disk.fail_sync();
    device.seal(&mut go_on()).unwrap_err();
    let error = device.seal(&mut go_on()).unwrap_err();
    assert!(matches!(error, StoreError::PreviousIo), "{error}");
    store.stop().unwrap();
    drop((device, store));
    // The kernel dropped a write.
    disk.rot(&layer.key, 700);
    let store = open();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    assert_eq!(check_present(&device, &layer, "lost write"), 0);
    let found = [0, 1, 2].map(|chunk| device.recheck(chunk).unwrap());
    assert_eq!(
        found,
        [Rechecked::Trusted, Rechecked::Dropped, Rechecked::Trusted]
    );
    device.commit(1, layer.bytes_of(1)).unwrap();
    device.seal(&mut go_on()).unwrap();
}

#[test]
fn a_full_disk_asks_for_room_once_and_says_so() {
    let layer = TestLayer::even(12, 2, 600);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let reclaim: Reclaim = {
        let asked = Arc::clone(&asked);
        Arc::new(move |bytes| {
            lock(&asked).push(bytes);
            true
        })
    };
    let disk = CrashDisk::default();
    let options = StoreOptions {
        boot: Some(BOOT),
        reclaim: Some(reclaim),
    };
    let store = Store::on(Box::new(disk.clone()), None, options).unwrap();
    let device = store.device(layer.key, &layer.chunks).unwrap();
    device.commit(0, layer.bytes_of(0)).unwrap();
    disk.fill_up(2);
    let error = device.commit(1, layer.bytes_of(1)).unwrap_err();
    assert!(
        matches!(error, StoreError::Full { needed_bytes: 600 }),
        "{error}"
    );
    assert_eq!(*lock(&asked), [600]);
    assert_eq!(check_present(&device, &layer, "full"), 1);
    disk.fill_up(1);
    device.commit(1, layer.bytes_of(1)).unwrap();
    assert_eq!(*lock(&asked), [600, 600]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The store against a plain map of chunk -> present, over commits, kills, reboots and checks.
    #[test]
    fn the_store_equals_a_plain_map(
        lengths in prop::collection::vec(1_usize..2000, 1..80),
        steps in prop::collection::vec((0_u8..6, any::<prop::sample::Index>()), 1..60),
    ) {
        let layer = TestLayer::new(13, &lengths);
        let count = lengths.len();
        let dir = tempfile::tempdir().unwrap();
        let mut boot = 1;
        let mut present = vec![false; count];
        let mut suspect = vec![false; count];
        let open = |boot: u8| {
            let store = Store::open(dir.path(), options(BootId([boot; 16]))).unwrap();
            let device = store.device(layer.key, &layer.chunks).unwrap();
            (store, device)
        };
        let (mut store, mut device) = open(boot);
        for (step, index) in steps {
            let chunk = index.index(count);
            let ordinal = u32::try_from(chunk).unwrap();
            match step {
                0..=2 => {
                    device.commit(ordinal, layer.bytes_of(ordinal)).unwrap();
                    present[chunk] = true;
                    suspect[chunk] = false;
                }
                3 => {
                    drop((store, device));
                    (store, device) = open(boot);
                }
                4 => {
                    let clean = chunk % 2 == 0;
                    if clean {
                        store.stop().unwrap();
                    }
                    drop((store, device));
                    boot += 1;
                    (store, device) = open(boot);
                    if !clean {
                        for chunk in 0..count {
                            suspect[chunk] |= present[chunk];
                            present[chunk] = false;
                        }
                    }
                }
                _ => {
                    let expected = if suspect[chunk] { Rechecked::Trusted } else { Rechecked::NotSuspect };
                    prop_assert_eq!(device.recheck(ordinal).unwrap(), expected);
                    present[chunk] |= suspect[chunk];
                    suspect[chunk] = false;
                }
            }
            let mut bytes = 0;
            for (chunk, length) in lengths.iter().enumerate() {
                let ordinal = u32::try_from(chunk).unwrap();
                prop_assert_eq!(device.is_present(ordinal), present[chunk]);
                prop_assert_eq!(device.is_suspect(ordinal), suspect[chunk]);
                if present[chunk] {
                    bytes += length;
                    let mut read = vec![0; *length];
                    let at = layer.chunks.chunk(ordinal).unwrap().device.start();
                    device.read_at(at, &mut read).unwrap();
                    prop_assert_eq!(&read[..], layer.bytes_of(ordinal));
                }
            }
            prop_assert_eq!(device.present_bytes(), bytes as u64);
        }
    }
}

/// A daemon's life: fill, a clean stop, more, a kill, the rest, a seal. Errors end it.
fn live(disk: &CrashDisk, layer: &TestLayer) -> Result<(), StoreError> {
    let open = || -> Result<(Store, Arc<Device>), StoreError> {
        let store = Store::on(Box::new(disk.clone()), None, options(BOOT))?;
        let device = store.device(layer.key, &layer.chunks)?;
        Ok((store, device))
    };
    let half = layer.chunks.count() / 2;
    let (store, device) = open()?;
    for chunk in 0..half {
        device.commit(chunk, layer.bytes_of(chunk))?;
    }
    store.stop()?;
    drop((store, device));
    let (store, device) = open()?;
    for chunk in half..layer.chunks.count() {
        device.commit(chunk, layer.bytes_of(chunk))?;
    }
    drop((store, device));
    let (_store, device) = open()?;
    device.seal(&mut || SealStep::Continue)
}

/// Everything that is present is right; returns how many chunks are.
fn check_present(device: &Device, layer: &TestLayer, what: &str) -> u32 {
    let mut present = 0;
    for chunk in 0..layer.chunks.count() {
        if device.is_present(chunk) {
            let mut bytes = vec![0; layer.bytes_of(chunk).len()];
            let at = layer.chunks.chunk(chunk).unwrap().device.start();
            device.read_at(at, &mut bytes).unwrap();
            assert!(
                bytes == layer.bytes_of(chunk),
                "wrong bytes visible in chunk {chunk}: {what}"
            );
            present += 1;
        }
    }
    present
}

#[test]
fn a_power_cut_at_any_operation_shows_no_wrong_byte() {
    let layer = TestLayer::even(14, 6, 1500);
    let disk = CrashDisk::default();
    live(&disk, &layer).unwrap();
    let operations = disk.operations();
    assert!(operations > 12, "only {operations} operations");
    for cut in 0..=operations {
        for seed in 0..12 {
            let what = format!("cut at {cut} of {operations}, seed {seed}");
            let disk = CrashDisk::default();
            disk.cut_at(cut);
            assert_eq!(live(&disk, &layer).is_ok(), cut == operations, "{what}");
            let disk = disk.after_power_cut(seed);
            let store = Store::on(Box::new(disk), None, options(NEXT_BOOT)).unwrap();
            let device = store.device(layer.key, &layer.chunks).unwrap();
            check_present(&device, &layer, &what);
            for chunk in 0..layer.chunks.count() {
                device.recheck(chunk).unwrap();
            }
            check_present(&device, &layer, &what);
            // And it can be completed and sealed.
            commit_all(&device, &layer);
            device.seal(&mut go_on()).unwrap();
            assert_eq!(check_present(&device, &layer, &what), layer.chunks.count());
        }
    }
}

#[test]
fn a_clean_stop_survives_a_power_cut_after_it() {
    let layer = TestLayer::even(15, 6, 1500);
    for seed in 0..12 {
        let disk = CrashDisk::default();
        let store = Store::on(Box::new(disk.clone()), None, options(BOOT)).unwrap();
        let device = store.device(layer.key, &layer.chunks).unwrap();
        device.commit(3, layer.bytes_of(3)).unwrap();
        store.stop().unwrap();
        let disk = disk.after_power_cut(seed);
        let store = Store::on(Box::new(disk), None, options(NEXT_BOOT)).unwrap();
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert_eq!(check_present(&device, &layer, "clean stop"), 1);
    }
}

#[test]
fn a_kill_at_any_operation_loses_no_finished_commit() {
    let layer = TestLayer::even(16, 6, 1500);
    let whole = CrashDisk::default();
    live(&whole, &layer).unwrap();
    for cut in 0..whole.operations() {
        let disk = CrashDisk::default();
        disk.cut_at(cut);
        live(&disk, &layer).unwrap_err();
        let store = Store::on(Box::new(disk.after_kill()), None, options(BOOT)).unwrap();
        let device = store.device(layer.key, &layer.chunks).unwrap();
        check_present(&device, &layer, &format!("killed at {cut}"));
        assert!(!device.any_suspect(), "killed at {cut}");
    }
}

#[test]
fn a_device_that_is_no_tar_is_sealed_by_its_chunks_and_shared_with_nobody() {
    let layer = contents(21);
    on_every_store(|open| {
        let store = open(BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        let error = device.seal(&mut go_on()).unwrap_err();
        assert!(matches!(error, StoreError::Incomplete { .. }), "{error}");
        // There is no crc32: the digest decides, and the padding must be zeros.
        for at in [0, layer.bytes_of(0).len() - 1] {
            let mut bad = layer.bytes_of(0).to_vec();
            bad[at] ^= 1;
            let error = device.commit(0, &bad).unwrap_err();
            assert!(
                matches!(error, StoreError::Mismatch { chunk: 0 }),
                "{error}"
            );
        }
        commit_all(&device, &layer);
        drop((device, store));
        // After an unclean stop the digest decides again.
        let store = open(NEXT_BOOT);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert!(device.is_suspect(0) && !device.is_complete());
        for chunk in 0..layer.chunks.count() {
            assert_eq!(device.recheck(chunk).unwrap(), Rechecked::Trusted);
        }
        device.seal(&mut go_on()).unwrap();
        let audit = device.audit(OnRot::Drop, &mut go_on()).unwrap();
        assert_eq!((audit.rotten.len(), audit.other_diff_id), (0, None));
        let other = DeviceKey {
            index: IndexDigest::of(b"another"),
            ..layer.key
        };
        assert_eq!(store.sealed_twins(&other), []);
        drop((device, store));
        let store = open(BOOT);
        assert_eq!(store.sealed_twins(&other), []);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        assert!(device.is_sealed() && device.is_complete());
    });
}

/// Two files, one of them of two chunks, as a table of contents would have them; no diff ID fits them.
fn contents(seed: u64) -> TestLayer {
    crate::fixture::contents::estargz(seed, &[700, 9000, 3])
}
