// SPDX-License-Identifier: Apache-2.0
//! Power cuts at every sync of a run: what was acknowledged is there, what was under way is there
//! wholly or not at all, and the invariants hold.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use redb::StorageBackend;
use sluice_blockindex::digest::ChainId;

use super::tests::{lazy, new};
use super::*;
use crate::snapshots::{Labels, SnapshotKind, Usage};

/// One change since the last sync.
#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Resize(u64),
}

/// A disk in memory with a write cache that a power cut loses in part.
#[derive(Debug, Default)]
struct Disk {
    media: Vec<u8>,
    cache: Vec<Change>,
    /// What a reader sees: the media with the whole cache applied.
    view: Vec<u8>,
    syncs: usize,
    cut_at: Option<usize>,
    seed: u64,
    dead: bool,
}

impl Disk {
    fn apply(bytes: &mut Vec<u8>, change: &Change) {
        match change {
            Change::Write(offset, data) => {
                let start = usize::try_from(*offset).unwrap();
                // A resize that was lost is made up for by the write behind it.
                if bytes.len() < start + data.len() {
                    bytes.resize(start + data.len(), 0);
                }
                bytes[start..start + data.len()].copy_from_slice(data);
            }
            Change::Resize(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.dead {
            return Err(io::Error::other("no power"));
        }
        self.syncs += 1;
        if self.cut_at == Some(self.syncs) {
            self.dead = true;
            // Of the cache, any part reaches the media, in any order of sectors.
            let mut random = StdRng::seed_from_u64(self.seed);
            for change in std::mem::take(&mut self.cache) {
                match &change {
                    Change::Resize(_) => Self::apply(&mut self.media, &change),
                    Change::Write(offset, data) => {
                        for (index, sector) in data.chunks(512).enumerate() {
                            if random.random_bool(0.5) {
                                let at = offset + u64::try_from(index).unwrap() * 512;
                                Self::apply(&mut self.media, &Change::Write(at, sector.to_vec()));
                            }
                        }
                    }
                }
            }
            return Err(io::Error::other("power cut"));
        }
        for change in std::mem::take(&mut self.cache) {
            Self::apply(&mut self.media, &change);
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
struct Plug(Arc<Mutex<Disk>>);

impl Plug {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.dead {
            return Err(io::Error::other("no power"));
        }
        Disk::apply(&mut disk.view, &change);
        disk.cache.push(change);
        Ok(())
    }
}

impl StorageBackend for Plug {
    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.0.lock().unwrap().view.len()).unwrap())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let bytes = disk.view.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::other("read past the end"))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Resize(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.lock().unwrap().sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write(offset, data.to_vec()))
    }
}

/// Names of all snapshots with their kinds, and the targets: the whole observable state.
type State = BTreeSet<String>;

fn state(store: &MetadataStore) -> State {
    let records = store.list(|_| true).unwrap();
    records
        .iter()
        .map(|r| format!("{} {} {:?} {:?}", r.name, r.kind, r.parent, r.labels))
        .collect()
}

/// Runs operations until one fails; answers the state after each, the first before any.
fn operate(store: &MetadataStore) -> (Vec<State>, bool) {
    let chain_id = ChainId::of(b"chain");
    let mark = Labels::from([("mark".into(), "1".into())]);
    let adopted = |parent: Option<&str>| store.adopt(lazy(store, chain_id, parent)).map(|_| ());
    let name = || store.target(chain_id, Some("base")).unwrap().unwrap().name;
    let create = |key: &str, kind, parent: Option<&str>| {
        store.create(new(store, key, kind, parent)).map(|_| ())
    };
    let operations: Vec<Box<dyn Fn() -> Result<(), StoreError> + '_>> = vec![
        Box::new(|| create("k1", SnapshotKind::Active, None)),
        Box::new(|| {
            store
                .commit("k1", "base", Usage::default(), Labels::new())
                .map(|_| ())
        }),
        Box::new(|| adopted(Some("base"))),
        Box::new(|| create("run", SnapshotKind::Active, Some(&name()))),
        Box::new(|| create("view", SnapshotKind::View, Some("base"))),
        Box::new(|| store.update_labels("run", mark.clone(), &[]).map(|_| ())),
        Box::new(|| store.remove("run").map(|_| ())),
        Box::new(|| store.remove(&name()).map(|_| ())),
        Box::new(|| adopted(Some("base"))),
        Box::new(|| store.remove("view").map(|_| ())),
    ];
    let mut states = vec![state(store)];
    for operation in operations {
        if operation().is_err() {
            return (states, false);
        }
        states.push(state(store));
    }
    (states, true)
}

#[test]
fn a_power_cut_at_each_sync_loses_nothing_acknowledged() {
    // The file gets its name when it is complete, so every run starts with a complete one.
    let empty = Arc::new(Mutex::new(Disk::default()));
    drop(MetadataStore::open_on(Plug(empty.clone())).unwrap());
    let empty = empty.lock().unwrap().media.clone();
    let disk = || Disk {
        view: empty.clone(),
        media: empty.clone(),
        ..Disk::default()
    };

    let full = Arc::new(Mutex::new(disk()));
    let (expected, complete) = operate(&MetadataStore::open_on(Plug(full.clone())).unwrap());
    assert!(complete);
    let syncs = full.lock().unwrap().syncs;
    assert!(syncs > expected.len(), "{syncs} syncs");

    let mut unfinished = 0;
    for cut in 1..=syncs {
        for seed in 0..4 {
            let disk = Arc::new(Mutex::new(Disk {
                cut_at: Some(cut),
                seed,
                ..disk()
            }));
            let acknowledged = match MetadataStore::open_on(Plug(disk.clone())) {
                Ok(store) => operate(&store).0.len(),
                Err(_) => 1,
            };
            unfinished += usize::from(acknowledged < expected.len());

            let media = disk.lock().unwrap().media.clone();
            let rebooted = Disk {
                view: media.clone(),
                media,
                ..Disk::default()
            };
            let store = MetadataStore::open_on(Plug(Arc::new(Mutex::new(rebooted))))
                .unwrap_or_else(|error| panic!("cut {cut} seed {seed}: {error}"));
            store
                .check()
                .unwrap_or_else(|error| panic!("cut {cut} seed {seed}: {error}"));
            let after = state(&store);
            let possible = &expected[acknowledged - 1..expected.len().min(acknowledged + 1)];
            assert!(
                possible.contains(&after),
                "cut {cut} seed {seed}: {after:?}"
            );
            // And the store goes on.
            store
                .create(new(&store, "after", SnapshotKind::Active, None))
                .unwrap();
            store.check().unwrap();
        }
    }
    assert!(unfinished > 0, "no cut hit an operation");
}
