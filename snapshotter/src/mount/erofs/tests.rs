// SPDX-License-Identifier: Apache-2.0
//! Kernel mounts over devices of a real chunk store. Need root and a kernel that mounts EROFS from
//! files; print SKIPPED where there is none.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

use async_trait::async_trait;
use sluice_blockindex::chunkmap::{ChunkMap, ChunkRecord, write_chunk_map};
use sluice_blockindex::digest::{ChunkDigest, DiffId, IndexDigest, StrongAlgorithm};
use sluice_blockindex::erofs::{DeviceSlot, write_tree};
use sluice_blockindex::tree::{FileRun, Inode, InodeKind, Tree};
use sluice_fetcher::store::{DeviceKey, SealStep, Store, StoreOptions};

use super::*;
use crate::mount::choice::{Abilities, Ability, MountChoice, Watcher};
use crate::mount::over_fuse;
use crate::mount::{
    Backend, FirstReads, ImageMount, MountError, MountMetrics, MountState, UnmountOutcome, selftest,
};

const CHUNK: usize = 16 * 1024;
const DEVICE_BYTES: usize = 10 * CHUNK;

/// A run of two layers, the second sealed when a test wants it.
struct Site {
    dir: tempfile::TempDir,
    spec: MountSpec,
    contents: Vec<Vec<u8>>,
    store: Store,
}

fn chunk_map(bytes: &[u8]) -> ChunkMap {
    let records: Vec<ChunkRecord> = (0u32..)
        .zip(bytes.chunks(CHUNK))
        .map(|(ordinal, chunk)| ChunkRecord {
            ordinal,
            device_bytes: u32::try_from(chunk.len()).unwrap(),
            frame_bytes: 1,
            crc32: crc32fast::hash(chunk),
            digest: ChunkDigest::of(StrongAlgorithm::Blake3, chunk),
        })
        .collect();
    ChunkMap::parse(write_chunk_map(StrongAlgorithm::Blake3, &records).unwrap()).unwrap()
}

fn site() -> Option<Site> {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("devices"), StoreOptions::default()).unwrap();
    if let Err(reason) = selftest::kernel_serves_sealed(&dir.path().join("devices")) {
        println!("SKIPPED: {reason}");
        return None;
    }
    std::fs::create_dir(dir.path().join("mountpoint")).unwrap();
    let (mut tree, mut slots, mut contents) = (Tree::new(), Vec::new(), Vec::new());
    let mut devices = Vec::new();
    for number in 1..=2u16 {
        let bytes: Vec<u8> = (0..DEVICE_BYTES)
            .map(|at| u8::try_from(at / 512 % 255 + 1).unwrap() ^ u8::try_from(number).unwrap())
            .collect();
        let key = DeviceKey {
            diff_id: DiffId::of(&bytes),
            index: IndexDigest::of(&[u8::try_from(number).unwrap()]),
        };
        let extent = Some(FileRun {
            device: number,
            start_block: 1,
        });
        let size_bytes = 100_000;
        let file = Inode::new(InodeKind::Regular { size_bytes, extent });
        let name = format!("f{number}");
        tree.insert_new(tree.root(), name.as_bytes(), file).unwrap();
        slots.push(DeviceSlot {
            tag: [b'0'; 64],
            blocks: (DEVICE_BYTES / 512) as u64,
        });
        store.device(key, &chunk_map(&bytes)).unwrap();
        let data = store.device_paths(&key).unwrap().data;
        devices.push(DeviceSpec {
            diff_id: key.diff_id,
            index_digest: key.index,
            directory: data.parent().unwrap().to_owned(),
        });
        contents.push(bytes);
    }
    let path = dir.path().join("tree.erofs");
    std::fs::write(&path, write_tree(&tree, &slots).unwrap()).unwrap();
    let spec = MountSpec {
        key: "run".into(),
        mountpoint: dir.path().join("mountpoint"),
        tree: path,
        devices,
        read_deadline: None,
        record: None,
    };
    Some(Site {
        dir,
        spec,
        contents,
        store,
    })
}

impl Site {
    /// Makes all of a device present; gives how to seal it.
    fn fill(&self, number: usize) -> impl FnOnce() {
        let spec = &self.spec.devices[number];
        let key = DeviceKey {
            diff_id: spec.diff_id,
            index: spec.index_digest,
        };
        let bytes = &self.contents[number];
        let device = self.store.device(key, &chunk_map(bytes)).unwrap();
        for (ordinal, chunk) in (0u32..).zip(bytes.chunks(CHUNK)) {
            device.commit(ordinal, chunk).unwrap();
        }
        move || device.seal(&mut || SealStep::Continue).map(drop).unwrap()
    }

    fn seal(&self, number: usize) {
        self.fill(number)();
    }

    fn kernel(&self) -> Arc<KernelMounts> {
        Arc::new(KernelMounts::open(&self.dir.path().join("notes")).unwrap())
    }

    fn assert_shown(&self) {
        for (number, bytes) in self.contents.iter().enumerate() {
            let path = self.spec.mountpoint.join(format!("f{}", number + 1));
            assert!(
                std::fs::read(path).unwrap() == bytes[512..100_512],
                "{number}"
            );
        }
    }

    fn notes(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("notes"))
            .unwrap()
            .count()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let lower = over_fuse::lower_mountpoint(&self.spec.mountpoint);
        for at in [&self.spec.mountpoint, &lower] {
            while let Ok(Unmounted::Done) = mountpoint::detach(at, true) {}
        }
    }
}

#[test]
fn a_sealed_run_is_mounted_known_again_and_unmounted() {
    let Some(site) = site() else { return };
    site.seal(0);
    assert!(!all_sealed(&site.spec).unwrap());
    site.seal(1);
    assert!(all_sealed(&site.spec).unwrap());
    let devices = open_devices(&site.spec).unwrap();
    let kernel = site.kernel();
    for _ in 0..2 {
        kernel.mount(&site.spec, &devices, Devices::Store).unwrap();
        site.assert_shown();
    }
    let at = |spec: &MountSpec| {
        mountpoint::mounts()
            .unwrap()
            .iter()
            .filter(|l| l.mountpoint == spec.mountpoint)
            .count()
    };
    assert_eq!((at(&site.spec), site.notes()), (1, 1));
    // A daemon that starts knows it by its note, and one without the note by its tree.
    let again = site.kernel();
    let mount = KernelMount {
        spec: site.spec.clone(),
        devices: Devices::Store,
    };
    assert_eq!(again.all(), std::slice::from_ref(&mount));
    assert_eq!(again.in_place("run").unwrap(), Some(mount));
    std::fs::remove_file(site.dir.path().join("notes/run.mount")).unwrap();
    let without = site.kernel();
    assert_eq!(without.all(), []);
    without.mount(&site.spec, &devices, Devices::Store).unwrap();
    assert_eq!((at(&site.spec), site.notes()), (1, 1));
    // What is in use stays; what is deleted is read on by who has it open.
    let open = File::open(site.spec.mountpoint.join("f1")).unwrap();
    assert_eq!(
        without.unmount("run", UnmountMode::IfUnused).unwrap(),
        Unmounted::Busy
    );
    assert_eq!(
        without.unmount("run", UnmountMode::Detach).unwrap(),
        Unmounted::Done
    );
    std::fs::remove_dir_all(&site.spec.devices[0].directory).unwrap();
    std::fs::remove_file(&site.spec.tree).unwrap();
    nix::fcntl::posix_fadvise(
        &open,
        0,
        0,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )
    .unwrap();
    let mut bytes = vec![0; 100_000];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut bytes, 0).unwrap();
    assert!(bytes == site.contents[0][512..100_512]);
    assert_eq!(
        without.unmount("run", UnmountMode::Detach).unwrap(),
        Unmounted::Absent
    );
    assert_eq!((at(&site.spec), site.notes()), (0, 0));
}

#[test]
fn notes_that_are_not_true_are_dropped() {
    let Some(site) = site() else { return };
    site.seal(0);
    site.seal(1);
    assert!(all_sealed(&site.spec).unwrap());
    let devices = open_devices(&site.spec).unwrap();
    let kernel = site.kernel();
    kernel.mount(&site.spec, &devices, Devices::Store).unwrap();
    mountpoint::detach(&site.spec.mountpoint, true).unwrap();
    assert_eq!(kernel.in_place("run").unwrap(), None);
    std::fs::write(site.dir.path().join("notes/x.mount"), b"\xff").unwrap();
    let copy = site.dir.path().join("notes/other.mount");
    std::fs::copy(site.dir.path().join("notes/run.mount"), copy).unwrap();
    assert_eq!(site.kernel().all(), []);
    assert_eq!(site.notes(), 0);
}

#[test]
fn a_device_that_ends_early_is_not_mounted() {
    let Some(site) = site() else { return };
    site.seal(0);
    site.seal(1);
    let data = File::options()
        .write(true)
        .open(site.spec.devices[1].directory.join("data"))
        .unwrap();
    data.set_len(1024).unwrap();
    assert!(open_devices(&site.spec).is_err());
}

/// A shim that notes what it is asked.
#[derive(Debug, Default)]
struct Shim {
    /// Mounts of devices, which it makes by a tmpfs.
    lower: Mutex<Vec<MountSpec>>,
    watched: Mutex<Vec<String>>,
    busy: AtomicBool,
    /// Whether nothing was mounted yet when the last watch began.
    before_mount: AtomicBool,
}

#[async_trait]
impl ImageMount for Shim {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        if over_fuse::run_of(&spec.key).is_some() && !self.lower.lock().unwrap().contains(spec) {
            let flags = nix::mount::MsFlags::empty();
            mountpoint::attach("test", &spec.mountpoint, "tmpfs", flags, "").unwrap();
            for (number, device) in spec.devices.iter().enumerate() {
                let file = spec.mountpoint.join(number.to_string());
                std::fs::copy(device.directory.join("data"), file).unwrap();
            }
            self.lower.lock().unwrap().push(spec.clone());
        }
        Ok(Backend::Fuse)
    }
    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        let lower = self.lower.lock().unwrap();
        Ok(match lower.iter().any(|spec| spec.key == key) {
            true => MountState::Serving,
            false => MountState::Absent,
        })
    }
    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError> {
        let mut lower = self.lower.lock().unwrap();
        if let Some(at) = lower.iter().position(|spec| spec.key == key) {
            let detach = mode == UnmountMode::Detach;
            match mountpoint::detach(&lower[at].mountpoint, detach).unwrap() {
                Unmounted::Busy => return Ok(UnmountOutcome::Busy),
                _ => lower.remove(at),
            };
        }
        Ok(UnmountOutcome::Done)
    }
    async fn first_reads(&self, key: &str, _: u32, _: bool) -> Result<FirstReads, MountError> {
        let recorded = over_fuse::run_of(key).is_some() && !self.lower.lock().unwrap().is_empty();
        Ok(FirstReads {
            recorded,
            ..FirstReads::default()
        })
    }
}

#[async_trait]
impl Watcher for Shim {
    async fn watch(&self, spec: &MountSpec) -> Result<(), MountError> {
        self.before_mount.store(
            mountpoint::mount_at(&spec.mountpoint).unwrap().is_none(),
            SeqCst,
        );
        self.watched.lock().unwrap().push(spec.key.clone());
        Ok(())
    }
    async fn unwatch(&self, key: &str) -> Result<UnmountOutcome, MountError> {
        if self.busy.load(SeqCst) {
            return Ok(UnmountOutcome::Busy);
        }
        self.watched.lock().unwrap().retain(|it| it != key);
        Ok(UnmountOutcome::Done)
    }
    async fn watched(&self) -> Result<Vec<String>, MountError> {
        Ok(self.watched.lock().unwrap().clone())
    }
}

fn choice(site: &Site, sealed: Ability, lazy: Ability) -> (MountChoice, Arc<Shim>, MountMetrics) {
    let abilities = Abilities {
        sealed,
        lazy,
        over_fuse: no(),
    };
    choice_of(site, abilities)
}

fn choice_of(site: &Site, abilities: Abilities) -> (MountChoice, Arc<Shim>, MountMetrics) {
    let metrics = MountMetrics::default();
    let shim = Arc::new(Shim::default());
    let (fuse, watcher) = (shim.clone(), shim.clone());
    let choice = MountChoice::new(fuse, watcher, site.kernel(), abilities, metrics.clone());
    (choice, shim, metrics)
}

fn no() -> Ability {
    Err("test".into())
}

#[tokio::test]
async fn the_kernel_gets_what_is_sealed_and_the_shim_the_rest() {
    let Some(site) = site() else { return };
    let (chosen, shim, metrics) = choice(&site, Ok(()), no());
    assert_eq!(chosen.mount(&site.spec).await.unwrap(), Backend::Fuse);
    site.seal(0);
    site.seal(1);
    let (unable, ..) = choice(&site, no(), no());
    assert_eq!(unable.mount(&site.spec).await.unwrap(), Backend::Fuse);
    assert_eq!(chosen.check("run").await.unwrap(), MountState::Absent);
    assert_eq!(chosen.mount(&site.spec).await.unwrap(), Backend::Erofs);
    assert_eq!(chosen.check("run").await.unwrap(), MountState::Serving);
    assert!(shim.watched.lock().unwrap().is_empty());
    site.assert_shown();
    let made = [Backend::Fuse, Backend::Erofs].map(|backend| metrics.made_with(backend));
    assert_eq!(made, [1, 1]);
    // Also one that may not make any knows what is there, and takes it away.
    let (unable, ..) = choice(&site, no(), no());
    assert_eq!(unable.check("run").await.unwrap(), MountState::Serving);
    let done = unable.unmount("run", UnmountMode::IfUnused).await.unwrap();
    assert_eq!(done, UnmountOutcome::Done);
    assert_eq!(chosen.check("run").await.unwrap(), MountState::Absent);
    // What the kernel refuses is served all the same.
    std::fs::write(&site.spec.tree, vec![1; 4096]).unwrap();
    assert_eq!(chosen.mount(&site.spec).await.unwrap(), Backend::Fuse);
    assert_eq!(mountpoint::mount_at(&site.spec.mountpoint).unwrap(), None);
}

#[tokio::test]
async fn what_is_not_sealed_is_watched_before_it_is_mounted_and_after_it_is_gone() {
    let Some(site) = site() else { return };
    site.seal(0);
    let (chosen, shim, _) = choice(&site, Ok(()), Ok(()));
    let watched = || shim.watched.lock().unwrap().clone();
    assert_eq!(chosen.mount(&site.spec).await.unwrap(), Backend::Erofs);
    assert_eq!(watched(), ["run"]);
    assert!(shim.before_mount.load(SeqCst));
    // A watch that was lost is made again, whoever notices first.
    for round in 0..2 {
        shim.watched.lock().unwrap().clear();
        let restored = match round {
            0 => chosen
                .check("run")
                .await
                .map(|state| state == MountState::Serving),
            _ => chosen.tend().await.map(|()| true),
        };
        assert!(restored.unwrap());
        assert_eq!(watched(), ["run"]);
    }
    shim.busy.store(true, SeqCst);
    let busy = chosen.unmount("run", UnmountMode::IfUnused).await.unwrap();
    assert_eq!(busy, UnmountOutcome::Busy);
    assert_eq!(mountpoint::mount_at(&site.spec.mountpoint).unwrap(), None);
    assert_eq!(watched(), ["run"]);
    shim.busy.store(false, SeqCst);
    // A watch without a mount is ended by who tends.
    chosen.tend().await.unwrap();
    assert_eq!(watched(), [""; 0]);
    let done = chosen.unmount("run", UnmountMode::IfUnused).await.unwrap();
    assert_eq!(done, UnmountOutcome::Done);
}

#[tokio::test]
async fn what_is_not_sealed_stands_on_files_that_the_shim_serves() {
    let Some(site) = site() else { return };
    // The test's shim shows what is in the store; a real one fills it.
    site.seal(0);
    let seal = site.fill(1);
    let lower = over_fuse::lower_mountpoint(&site.spec.mountpoint);
    let both = |expected: usize| {
        let lines = mountpoint::mounts().unwrap();
        let ours = lines
            .iter()
            .filter(|it| it.mountpoint == lower || it.mountpoint == site.spec.mountpoint);
        assert_eq!(ours.count(), expected);
    };
    let able = || Abilities {
        sealed: Ok(()),
        lazy: no(),
        over_fuse: Ok(()),
    };
    let (chosen, shim, metrics) = choice_of(&site, able());
    for _ in 0..2 {
        assert_eq!(chosen.mount(&site.spec).await.unwrap(), Backend::ErofsFuse);
        assert_eq!(chosen.check("run").await.unwrap(), MountState::Serving);
        both(2);
    }
    site.assert_shown();
    assert_eq!(metrics.made_with(Backend::ErofsFuse), 2);
    assert!(chosen.first_reads("run", 0, false).await.unwrap().recorded);
    // Nobody watches it, and nobody has to.
    chosen.tend().await.unwrap();
    assert!(shim.watched.lock().unwrap().is_empty());
    // A daemon that starts knows how it stands, and that it is of no use without its server.
    let (again, other, _) = choice_of(&site, able());
    assert_eq!(again.check("run").await.unwrap(), MountState::Absent);
    other
        .lower
        .lock()
        .unwrap()
        .extend(shim.lower.lock().unwrap().drain(..));
    assert_eq!(again.check("run").await.unwrap(), MountState::Serving);
    // One whose server is gone is replaced, not kept; who reads through it keeps it.
    let reader = File::open(site.spec.mountpoint.join("f1")).unwrap();
    let old = other.lower.lock().unwrap().drain(..).next().unwrap();
    mountpoint::detach(&old.mountpoint, true).unwrap();
    assert_eq!(again.mount(&site.spec).await.unwrap(), Backend::ErofsFuse);
    both(2);
    site.assert_shown();
    drop(reader);
    // In use, complete meanwhile, then not in use.
    let reader = File::open(site.spec.mountpoint.join("f1")).unwrap();
    let busy = again.unmount("run", UnmountMode::IfUnused).await.unwrap();
    assert_eq!(busy, UnmountOutcome::Busy);
    both(2);
    seal();
    assert_eq!(again.mount(&site.spec).await.unwrap(), Backend::ErofsFuse);
    drop(reader);
    for _ in 0..50 {
        let done = again.unmount("run", UnmountMode::IfUnused).await.unwrap();
        if done == UnmountOutcome::Done {
            break;
        }
        // The kernel closes the files below a moment after the mount above is gone.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    both(0);
    assert_eq!(site.notes(), 0);
    assert_eq!(again.mount(&site.spec).await.unwrap(), Backend::Erofs);
    both(1);
}
