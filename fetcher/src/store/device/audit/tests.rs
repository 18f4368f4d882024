// SPDX-License-Identifier: Apache-2.0
//! Rot of every chunk of open and sealed devices, on the model of a disk.

use super::*;
use crate::fixture::TestLayer;
use crate::store::crash::CrashDisk;
use crate::store::{BootId, Store, StoreOptions};

const BOOT: BootId = BootId([1; 16]);

fn open(disk: &CrashDisk) -> Store {
    let options = StoreOptions {
        boot: Some(BOOT),
        reclaim: None,
    };
    Store::on(Box::new(disk.clone()), None, options).unwrap()
}

fn go_on() -> impl FnMut() -> SealStep {
    || SealStep::Continue
}

fn commit_all(device: &Device, layer: &TestLayer) {
    for chunk in 0..layer.chunks.count() {
        device.commit(chunk, layer.bytes_of(chunk)).unwrap();
    }
}

#[test]
fn sound_devices_pass_and_absent_chunks_are_passed_over() {
    let layer = TestLayer::even(90, 4, 600);
    let disk = CrashDisk::default();
    let store = open(&disk);
    let device = store.device(layer.key, &layer.chunks).unwrap();
    device.commit(2, layer.bytes_of(2)).unwrap();
    let audit = device.audit(OnRot::Drop, &mut go_on()).unwrap();
    assert_eq!((audit.checked_chunks, audit.checked_bytes), (1, 600));
    assert_eq!((audit.rotten.len(), audit.dropped), (0, false));
    commit_all(&device, &layer);
    device.seal(&mut go_on()).unwrap();
    let audit = device.audit(OnRot::Drop, &mut go_on()).unwrap();
    assert_eq!(audit.checked_chunks, 4);
    assert_eq!((audit.rotten.len(), audit.other_diff_id), (0, None));
    assert!(device.is_sealed(), "a sound device stays sealed");
}

#[test]
fn a_rotten_chunk_is_told_of_and_dropped_only_when_wanted() {
    let layer = TestLayer::even(91, 4, 600);
    for sealed in [false, true] {
        for rotten in 0..4_u32 {
            let disk = CrashDisk::default();
            let store = open(&disk);
            let device = store.device(layer.key, &layer.chunks).unwrap();
            commit_all(&device, &layer);
            if sealed {
                device.seal(&mut go_on()).unwrap();
            }
            disk.rot(&layer.key, usize::try_from(rotten).unwrap() * 600 + 17);

            let audit = device.audit(OnRot::Keep, &mut go_on()).unwrap();
            assert_eq!((audit.rotten, audit.dropped), (vec![rotten], false));
            assert_eq!((device.is_sealed(), device.is_complete()), (sealed, true));

            let audit = device.audit(OnRot::Drop, &mut go_on()).unwrap();
            assert_eq!((audit.rotten, audit.dropped), (vec![rotten], true));
            assert!(!device.is_sealed() && !device.is_present(rotten));
            assert_eq!(device.present_bytes(), 1800);

            // Killed now, the next daemon does not take the record for a seal.
            let other = open(&disk.after_kill());
            let found = other.device(layer.key, &layer.chunks).unwrap();
            assert!(!found.is_sealed() && !found.is_present(rotten));

            device.commit(rotten, layer.bytes_of(rotten)).unwrap();
            device.seal(&mut go_on()).unwrap();
            let mut bytes = vec![0; 2400];
            device.read_at(0, &mut bytes).unwrap();
            assert_eq!(bytes, layer.tar);
        }
    }
}

#[test]
fn a_power_cut_after_a_drop_shows_no_rotten_chunk() {
    let layer = TestLayer::even(92, 4, 600);
    for seed in 0..64 {
        let disk = CrashDisk::default();
        let store = open(&disk);
        let device = store.device(layer.key, &layer.chunks).unwrap();
        commit_all(&device, &layer);
        device.seal(&mut go_on()).unwrap();
        disk.rot(&layer.key, 700);
        device.audit(OnRot::Drop, &mut go_on()).unwrap();
        let options = StoreOptions {
            boot: Some(BootId([2; 16])),
            reclaim: None,
        };
        let after = Store::on(Box::new(disk.after_power_cut(seed)), None, options).unwrap();
        let found = after.device(layer.key, &layer.chunks).unwrap();
        assert!(!found.is_sealed(), "seed {seed}");
        for chunk in 0..4 {
            // Whatever the cut left of the bits: what is trusted is right.
            found.recheck(chunk).unwrap();
            if found.is_present(chunk) {
                let mut bytes = vec![0; 600];
                found.read_at(u64::from(chunk) * 600, &mut bytes).unwrap();
                assert_eq!(bytes, layer.bytes_of(chunk), "seed {seed} chunk {chunk}");
            }
        }
    }
}

#[test]
fn an_audit_stops_when_it_is_told_to_and_skips_failed_devices() {
    let layer = TestLayer::even(93, 4, 600);
    let store = open(&CrashDisk::default());
    let device = store.device(layer.key, &layer.chunks).unwrap();
    commit_all(&device, &layer);
    let mut steps = 0;
    let stopped = device.audit(OnRot::Drop, &mut || {
        steps += 1;
        if steps == 3 {
            SealStep::Cancel
        } else {
            SealStep::Continue
        }
    });
    assert!(matches!(stopped, Err(StoreError::Cancelled)), "{stopped:?}");
    assert!(device.is_complete());

    let mut liar = layer.clone();
    liar.key.diff_id = DiffId::of(b"claimed");
    let device = store.device(liar.key, &liar.chunks).unwrap();
    commit_all(&device, &liar);
    device.seal(&mut go_on()).unwrap_err();
    let failed = device.audit(OnRot::Drop, &mut go_on());
    assert!(matches!(failed, Err(StoreError::Failed(_))), "{failed:?}");
}
