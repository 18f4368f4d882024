// SPDX-License-Identifier: Apache-2.0
//! The table of mounts over a back-end in memory.

use super::*;
use crate::mount::DeviceSpec;
use async_trait::async_trait;
use sluice_blockindex::digest::{DiffId, IndexDigest};
use std::sync::atomic::AtomicUsize;

#[derive(Debug, Default)]
struct Memory {
    mounted: Mutex<BTreeSet<String>>,
    mounts: AtomicUsize,
    refuse: AtomicBool,
    busy: AtomicBool,
}

#[async_trait]
impl ImageMount for Memory {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        self.mounts.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.refuse.load(Ordering::SeqCst) {
            return Err(MountError::Refused {
                key: spec.key.clone(),
                reason: "test".into(),
            });
        }
        self.mounted.lock().unwrap().insert(spec.key.clone());
        Ok(Backend::Bind)
    }

    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        let there = self.mounted.lock().unwrap().contains(key);
        Ok(if there {
            MountState::Serving
        } else {
            MountState::Absent
        })
    }

    async fn unmount(&self, key: &str, _: UnmountMode) -> Result<UnmountOutcome, MountError> {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.busy.load(Ordering::SeqCst) {
            return Ok(UnmountOutcome::Busy);
        }
        self.mounted.lock().unwrap().remove(key);
        Ok(UnmountOutcome::Done)
    }
}

struct Site {
    memory: Arc<Memory>,
    mounts: Mounts,
    _dir: tempfile::TempDir,
}

fn site() -> Site {
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(Memory::default());
    Site {
        mounts: Mounts::new(memory.clone(), dir.path()),
        memory,
        _dir: dir,
    }
}

fn key(n: u8) -> RunKey {
    RunKey::from_hex(&hex::encode([n; 32])).unwrap()
}

async fn ensure(site: &Site, n: u8) -> Result<PathBuf, EnsureError<String>> {
    let spec = MountSpec {
        key: key(n).to_string(),
        mountpoint: site.mounts.mountpoint(key(n)),
        tree: "/tree".into(),
        devices: Vec::new(),
        read_deadline: None,
        record: None,
    };
    site.mounts.ensure(key(n), async move { Ok(spec) }).await
}

async fn reap(site: &Site, used: &[u8], grace: Duration) {
    let used = used.iter().map(|n| key(*n)).collect();
    site.mounts.reap(&used, Instant::now(), grace).await;
}

#[tokio::test]
async fn callers_that_come_together_share_one_mount() {
    let site = site();
    let all = futures::future::join_all((0..8).map(|_| ensure(&site, 1))).await;
    for path in all {
        assert_eq!(path.unwrap(), site.mounts.mountpoint(key(1)));
    }
    assert_eq!(site.memory.mounts.load(Ordering::SeqCst), 1);
    assert_eq!(site.mounts.mounted().len(), 1);
}

#[tokio::test]
async fn a_failure_leaves_nothing_and_the_next_call_tries_again() {
    let site = site();
    site.memory.refuse.store(true, Ordering::SeqCst);
    assert!(matches!(ensure(&site, 1).await, Err(EnsureError::Mount(_))));
    let failed: Result<_, EnsureError<String>> = site
        .mounts
        .ensure(key(1), async { Err("no tree".to_owned()) })
        .await;
    assert!(matches!(failed, Err(EnsureError::Prepare(_))));
    assert_eq!(site.mounts.mounted(), []);
    site.memory.refuse.store(false, Ordering::SeqCst);
    ensure(&site, 1).await.unwrap();
}

#[tokio::test]
async fn a_cancelled_mount_gives_the_key_up() {
    let site = site();
    assert!(
        tokio::time::timeout(Duration::from_millis(5), ensure(&site, 1))
            .await
            .is_err()
    );
    ensure(&site, 1).await.unwrap();
    assert_eq!(site.memory.mounts.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_mount_that_died_with_its_shim_is_made_again() {
    let site = site();
    ensure(&site, 1).await.unwrap();
    site.memory.mounted.lock().unwrap().clear();
    ensure(&site, 1).await.unwrap();
    assert_eq!(site.memory.mounts.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn only_what_is_idle_for_the_grace_is_reaped() {
    let site = site();
    let grace = Duration::from_millis(500);
    ensure(&site, 1).await.unwrap();
    ensure(&site, 2).await.unwrap();
    reap(&site, &[], grace).await;
    assert_eq!(site.mounts.mounted().len(), 2, "within the grace");
    tokio::time::sleep(grace).await;
    site.memory.busy.store(true, Ordering::SeqCst);
    reap(&site, &[1], grace).await;
    assert_eq!(site.mounts.mounted().len(), 2, "busy");
    site.memory.busy.store(false, Ordering::SeqCst);
    reap(&site, &[1], grace).await;
    assert_eq!(
        site.mounts
            .mounted()
            .iter()
            .map(|m| m.key)
            .collect::<Vec<_>>(),
        [key(1)]
    );
    assert!(!site.mounts.mountpoint(key(2)).exists());
}

#[tokio::test]
async fn who_comes_while_a_mount_is_taken_away_gets_a_new_one() {
    let site = site();
    ensure(&site, 1).await.unwrap();
    let (path, ()) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            ensure(&site, 1).await.unwrap()
        },
        reap(&site, &[], Duration::ZERO)
    );
    assert!(path.exists());
    assert_eq!(site.memory.mounts.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_tree_in_use_is_not_given_away() {
    let site = site();
    assert_eq!(site.mounts.while_absent(key(1), || 7), Some(7));
    ensure(&site, 1).await.unwrap();
    assert_eq!(site.mounts.while_absent(key(1), || 7), None);
}

#[tokio::test]
async fn what_is_asked_for_after_the_look_is_not_reaped() {
    let site = site();
    ensure(&site, 1).await.unwrap();
    let looked_at = Instant::now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    // A container that the look did not see.
    ensure(&site, 1).await.unwrap();
    let nobody = BTreeSet::new();
    let reap = |looked_at| site.mounts.reap(&nobody, looked_at, Duration::ZERO);
    reap(looked_at).await;
    assert_eq!(site.mounts.mounted().len(), 1);
    // To ask whether a tree is in use is no use of it.
    let looked_at = Instant::now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(site.mounts.while_absent(key(1), || 7), None);
    reap(looked_at).await;
    assert_eq!(site.mounts.mounted(), []);
}

#[tokio::test]
async fn what_is_leaving_keeps_its_devices_until_it_has_left() {
    let site = site();
    let device = DeviceSpec {
        diff_id: DiffId::of(b"d"),
        index_digest: IndexDigest::of(b"i"),
        directory: "/d".into(),
    };
    let spec = MountSpec {
        key: key(1).to_string(),
        mountpoint: site.mounts.mountpoint(key(1)),
        tree: "/tree".into(),
        devices: vec![device],
        read_deadline: None,
        record: None,
    };
    assert!(!site.mounts.is_adopted());
    site.mounts.adopt(&[(spec.clone(), Backend::Fuse)]);
    assert!(site.mounts.is_adopted());
    let devices = || site.mounts.devices().len();
    // The back-end does not serve it, and a new mount of it fails: the old one is used all the same.
    site.memory.refuse.store(true, Ordering::SeqCst);
    assert!(ensure(&site, 1).await.is_err());
    assert_eq!(devices(), 1);
    site.memory.busy.store(true, Ordering::SeqCst);
    reap(&site, &[], Duration::ZERO).await;
    assert_eq!(devices(), 1);
    site.memory.busy.store(false, Ordering::SeqCst);
    reap(&site, &[], Duration::ZERO).await;
    assert_eq!(devices(), 0);
}
