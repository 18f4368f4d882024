// SPDX-License-Identifier: Apache-2.0
//! The life cycle on a real store and real directories, with a scripted lazy side.

use std::fs;
use std::future::pending;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use sluice_blockindex::digest::{BlobDigest, ChainId, DiffId, IndexDigest};
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::store::{MetadataStore, StoreError};

mod repair;

/// How the lazy side decides.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Script {
    Ordinary,
    Lazy,
    WrongLayer,
    Hang,
    Unpack,
    UnpackFails,
    UnpackHangs,
}

/// A lazy side that follows a script; its mounts are directories below `mounts`.
#[derive(Debug)]
struct Scripted {
    script: Mutex<Script>,
    mounts: PathBuf,
    decided: AtomicUsize,
    reused: AtomicUsize,
    lost: Mutex<bool>,
    mountable: Mutex<bool>,
    released: Mutex<Vec<String>>,
    requests: Mutex<Vec<PrepareRequest>>,
}

#[derive(Debug)]
struct Unpacker(Script);

#[async_trait]
impl UnpackSource for Unpacker {
    async fn unpack(self: Box<Self>, target: &UnpackTarget) -> Result<(), UnpackError> {
        fs::write(target.directory.join("unpacked"), vec![7; 10_000]).unwrap();
        match self.0 {
            Script::UnpackFails => Err(UnpackError("digest mismatch".into())),
            Script::UnpackHangs => pending().await,
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl LazyLayers for Scripted {
    async fn decide(&self, request: &PrepareRequest) -> LazyDecision {
        self.decided.fetch_add(1, Ordering::SeqCst);
        self.requests.lock().unwrap().push(request.clone());
        let script = *self.script.lock().unwrap();
        match script {
            Script::Ordinary => LazyDecision::Ordinary {
                reason: "scripted".into(),
            },
            Script::Lazy => {
                tokio::time::sleep(Duration::from_millis(5)).await;
                LazyDecision::Lazy(layer(request.chain_id))
            }
            Script::WrongLayer => LazyDecision::Lazy(layer(ChainId::of(b"another"))),
            Script::Hang => pending().await,
            Script::Unpack | Script::UnpackFails | Script::UnpackHangs => {
                LazyDecision::Unpack(Box::new(Unpacker(script)))
            }
        }
    }

    fn reused(&self, _request: &PrepareRequest, _existing: &SnapshotRecord) {
        self.reused.fetch_add(1, Ordering::SeqCst);
    }

    async fn lowers(
        &self,
        _user: &SnapshotRecord,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<PathBuf>, MountError> {
        let chain_id = chain[0].chain_id().unwrap();
        if !*self.mountable.lock().unwrap() {
            return Err(MountError::Unavailable {
                chain_id,
                reason: "scripted".into(),
            });
        }
        let path = self.mounts.join(chain_id.hex());
        fs::create_dir_all(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(33), Some(44)).unwrap();
        Ok(vec![path])
    }

    fn released(&self, removed: &SnapshotRecord) {
        self.released.lock().unwrap().push(removed.name.clone());
    }

    fn usage(&self, record: &SnapshotRecord) -> Usage {
        let layer = record.layer.as_ref().unwrap();
        Usage {
            inodes: 1,
            size_bytes: layer.device_bytes,
        }
    }

    fn lacks_index(&self, _layer: &LazyLayerRecord) -> bool {
        *self.lost.lock().unwrap()
    }

    async fn cleanup(&self) {}
}

fn layer(chain_id: ChainId) -> LazyLayerRecord {
    LazyLayerRecord {
        chain_id,
        diff_id: DiffId::of(b"diff"),
        index_digest: IndexDigest::of(b"index"),
        blob_digest: BlobDigest::of(b"blob"),
        blob_bytes: 10,
        index_source: crate::snapshots::IndexSource::Blob,
        device_bytes: 20,
        sources: Vec::new(),
    }
}

/// A root directory, and what is open on it.
struct World {
    root: TempDir,
    lazy: Arc<Scripted>,
    snapshots: Snapshots,
}

impl World {
    fn new(script: Script) -> Self {
        let root = tempfile::tempdir().unwrap();
        let (lazy, snapshots) = open(root.path(), script);
        World {
            root,
            lazy,
            snapshots,
        }
    }

    /// Stops and starts again on the same root.
    async fn restart(self) -> Self {
        let World {
            root,
            lazy,
            snapshots,
        } = self;
        snapshots.stop(Duration::from_secs(5)).await;
        drop(snapshots);
        let script = *lazy.script.lock().unwrap();
        let (lazy, snapshots) = open(root.path(), script);
        World {
            root,
            lazy,
            snapshots,
        }
    }

    fn script(&self, script: Script) {
        *self.lazy.script.lock().unwrap() = script;
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.root.path().join(relative)
    }

    /// Names below `snapshots/`, sorted.
    fn directories(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("snapshots")).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    async fn prepare(&self, key: &str, parent: &str) -> Vec<Mount> {
        match self
            .snapshots
            .prepare(key, parent, Labels::new())
            .await
            .unwrap()
        {
            Prepared::Mounts(mounts) => mounts,
            Prepared::Exists { name } => panic!("{key} is answered by {name}"),
        }
    }

    /// Commits an empty layer.
    async fn layer(&self, name: &str, parent: &str) {
        let key = format!("{name}-key");
        self.prepare(&key, parent).await;
        self.snapshots
            .commit(name, &key, Labels::new())
            .await
            .unwrap();
    }

    async fn names(&self) -> Vec<String> {
        self.snapshots
            .list(&[])
            .await
            .unwrap()
            .into_iter()
            .map(|record| record.name)
            .collect()
    }

    fn overlay(&self, options: &[&str]) -> Vec<Mount> {
        let root = self.root.path().to_str().unwrap();
        let options = options
            .iter()
            .map(|option| option.replace('@', root))
            .collect();
        vec![Mount {
            kind: "overlay",
            source: "overlay".into(),
            options,
        }]
    }

    fn bind(&self, source: &str, access: &str) -> Vec<Mount> {
        let source = source.replace('@', self.root.path().to_str().unwrap());
        vec![Mount {
            kind: "bind",
            source,
            options: vec![access.into(), "rbind".into()],
        }]
    }
}

fn open(root: &Path, script: Script) -> (Arc<Scripted>, Snapshots) {
    let lazy = Arc::new(Scripted {
        script: Mutex::new(script),
        mounts: root.join("mnt"),
        decided: AtomicUsize::new(0),
        reused: AtomicUsize::new(0),
        lost: Mutex::new(false),
        mountable: Mutex::new(true),
        released: Mutex::default(),
        requests: Mutex::default(),
    });
    let store = Arc::new(MetadataStore::open(&root.join("metadata.redb")).unwrap());
    let directories = SnapshotDirectories::open(root).unwrap();
    let metrics = crate::telemetry::SnapshotMetrics::default();
    let options = SnapshotOptions {
        prepare_budget: Duration::from_millis(200),
        mount_deadline: Duration::from_secs(5),
        overlay: OverlayOptions {
            extra: vec!["index=off".into()],
            idmapped: Arc::default(),
        },
    };
    (
        lazy.clone(),
        Snapshots::start(store, directories, lazy, options, metrics).unwrap(),
    )
}

fn reference(chain_id: ChainId) -> Labels {
    Labels::from([(LABEL_SNAPSHOT_REF.into(), chain_id.to_string())])
}

#[tokio::test]
async fn mounts_are_those_of_overlayfs() {
    let world = World::new(Script::Ordinary);
    let view = |key: &'static str, parent: &'static str| {
        let snapshots = world.snapshots.clone();
        async move { snapshots.view(key, parent, Labels::new()).await.unwrap() }
    };
    assert_eq!(
        world.prepare("a", "").await,
        world.bind("@/snapshots/1/fs", "rw")
    );
    assert_eq!(view("v0", "").await, world.bind("@/snapshots/2/fs", "ro"));
    world
        .snapshots
        .commit("one", "a", Labels::new())
        .await
        .unwrap();
    assert_eq!(
        view("v1", "one").await,
        world.bind("@/snapshots/1/fs", "ro")
    );
    let on_one = world.overlay(&[
        "workdir=@/snapshots/4/work",
        "upperdir=@/snapshots/4/fs",
        "lowerdir=@/snapshots/1/fs",
        "index=off",
    ]);
    assert_eq!(world.prepare("b", "one").await, on_one);
    assert_eq!(world.snapshots.mounts("b").await.unwrap(), on_one);
    world
        .snapshots
        .commit("two", "b", Labels::new())
        .await
        .unwrap();
    let lower = "lowerdir=@/snapshots/4/fs:@/snapshots/1/fs";
    assert_eq!(
        view("v2", "two").await,
        world.overlay(&[lower, "index=off"])
    );
    let committed = world.snapshots.mounts("two").await.unwrap_err();
    assert!(matches!(
        committed,
        SnapshotError::Store(StoreError::NotMountable { .. })
    ));

    let mode = |path: &str| fs::metadata(world.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        [
            "snapshots",
            "snapshots/1",
            "snapshots/1/fs",
            "snapshots/1/work"
        ]
        .map(mode),
        [0o700, 0o700, 0o755, 0o711]
    );
    assert!(!world.path("snapshots/2/work").exists());
}

#[tokio::test]
async fn an_upper_directory_belongs_to_its_parents_owner_or_to_the_mapped_root() {
    let world = World::new(Script::Lazy);
    let owner = |id: u32| {
        let metadata = fs::metadata(world.path(&format!("snapshots/{id}/fs"))).unwrap();
        (metadata.uid(), metadata.gid())
    };
    world.layer("base", "").await;
    std::os::unix::fs::chown(world.path("snapshots/1/fs"), Some(11), Some(22)).unwrap();
    world.prepare("child", "base").await;
    assert_eq!(owner(2), (11, 22));

    let mapping = |uids: &str| {
        Labels::from([
            ("containerd.io/snapshot/uidmapping".into(), uids.into()),
            (
                "containerd.io/snapshot/gidmapping".into(),
                "0:2000:10".into(),
            ),
        ])
    };
    world
        .snapshots
        .prepare("mapped", "base", mapping("0:1000:10"))
        .await
        .unwrap();
    assert_eq!(owner(3), (1000, 2000));
    let wrong = world
        .snapshots
        .prepare("wrong", "base", mapping("x"))
        .await
        .unwrap_err();
    assert!(
        matches!(wrong, SnapshotError::InvalidLabel { .. }),
        "{wrong}"
    );

    let labels = reference(ChainId::of(b"lazy"));
    let Prepared::Exists { name } = world.snapshots.prepare("p", "", labels).await.unwrap() else {
        panic!("not lazy");
    };
    world.prepare("on-lazy", &name).await;
    let id = world.snapshots.stat("on-lazy").await.unwrap().id;
    assert_eq!(owner(u32::try_from(id.0).unwrap()), (33, 44));
}

#[tokio::test]
async fn a_lazy_layer_is_committed_with_its_label_and_parent() {
    let world = World::new(Script::Lazy);
    let (low, high) = (ChainId::of(b"low"), ChainId::of(b"high"));
    let mut labels = reference(low);
    labels.insert("containerd.io/snapshot/x".into(), "y".into());
    let first = world
        .snapshots
        .prepare("ns/1/extract", "", labels.clone())
        .await
        .unwrap();
    let Prepared::Exists { name } = first.clone() else {
        panic!("not lazy")
    };
    let filter = format!("labels.\"{LABEL_SNAPSHOT_REF}\"=={low},parent==\"\"");
    let found = world.snapshots.list(&[filter]).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((&found[0].name, &found[0].labels), (&name, &labels));
    assert_eq!(found[0].kind, SnapshotKind::Committed);
    assert!(matches!(
        world.snapshots.stat("ns/1/extract").await,
        Err(SnapshotError::Store(StoreError::NotFound { .. }))
    ));
    assert_eq!(world.snapshots.usage(&name).await.unwrap().size_bytes, 20);

    // Another namespace asks for the same: nothing is decided, nothing changes.
    let again = world
        .snapshots
        .prepare("other/9/extract", "", reference(low))
        .await
        .unwrap();
    assert_eq!(
        (again, world.snapshots.stat(&name).await.unwrap().labels),
        (first, labels)
    );
    assert_eq!(world.lazy.decided.load(Ordering::SeqCst), 1);
    assert_eq!(world.lazy.reused.load(Ordering::SeqCst), 1);

    let second = world
        .snapshots
        .prepare("ns/2/extract", &name, reference(high))
        .await
        .unwrap();
    let Prepared::Exists { name: top } = second else {
        panic!("not lazy")
    };
    let request = world.lazy.requests.lock().unwrap().last().unwrap().clone();
    assert_eq!(request.namespace.as_deref(), Some("ns"));
    assert_eq!(
        (request.parent.as_ref(), request.parent_chain),
        (Some(&name), Some(low))
    );
    assert_eq!((request.chain.len(), request.chain_id), (1, high));

    // A container on it: one lower, from the lazy side.
    let mounts = world.prepare("container", &top).await;
    let lower = format!("lowerdir=@/mnt/{}", high.hex());
    let id = world.snapshots.stat("container").await.unwrap().id;
    let (work, upper) = (
        format!("workdir=@/snapshots/{id}/work"),
        format!("upperdir=@/snapshots/{id}/fs"),
    );
    assert_eq!(mounts, world.overlay(&[&work, &upper, &lower, "index=off"]));
    let view = world
        .snapshots
        .view("view", &top, Labels::new())
        .await
        .unwrap();
    assert_eq!(view, world.bind(&format!("@/mnt/{}", high.hex()), "ro"));
    assert!(world.snapshots.remove(&top).await.is_err());
    for name in ["container", "view", &top, &name] {
        world.snapshots.remove(name).await.unwrap();
    }
    assert_eq!(
        *world.lazy.released.lock().unwrap(),
        ["container", "view", &top, &name]
    );
    assert_eq!(world.names().await, Vec::<String>::new());
}

#[tokio::test]
async fn only_a_request_with_a_chain_id_asks_the_lazy_side() {
    let world = World::new(Script::Lazy);
    world.prepare("plain", "").await;
    let odd = Labels::from([(LABEL_SNAPSHOT_REF.into(), "no-digest".into())]);
    let odd = world.snapshots.prepare("odd", "", odd).await.unwrap();
    assert!(matches!(odd, Prepared::Mounts(_)));
    assert_eq!(world.lazy.decided.load(Ordering::SeqCst), 0);
    // A view never does.
    world
        .snapshots
        .view("view", "", reference(ChainId::of(b"1")))
        .await
        .unwrap();
    assert_eq!(world.lazy.decided.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn what_cannot_be_lazy_is_ordinary() {
    for script in [
        Script::Ordinary,
        Script::WrongLayer,
        Script::Hang,
        Script::UnpackFails,
        Script::UnpackHangs,
    ] {
        let world = World::new(script);
        let begun = std::time::Instant::now();
        let prepared = world
            .snapshots
            .prepare("k", "", reference(ChainId::of(b"1")))
            .await
            .unwrap();
        assert!(matches!(prepared, Prepared::Mounts(_)), "{script:?}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{script:?}");
        assert_eq!(world.names().await, ["k"], "{script:?}");
        let id = world.snapshots.stat("k").await.unwrap().id.to_string();
        world.snapshots.cleanup().await.unwrap();
        assert_eq!(world.directories(), [id], "{script:?}");
    }
}

#[tokio::test]
async fn an_unpacked_layer_is_ordinary_and_answers() {
    let world = World::new(Script::Unpack);
    let chain_id = ChainId::of(b"1");
    let prepared = world
        .snapshots
        .prepare("k", "", reference(chain_id))
        .await
        .unwrap();
    let Prepared::Exists { name } = prepared else {
        panic!("not unpacked")
    };
    let record = world.snapshots.stat(&name).await.unwrap();
    assert_eq!(
        (record.is_lazy(), record.labels),
        (false, reference(chain_id))
    );
    let usage = world.snapshots.usage(&name).await.unwrap();
    assert_eq!(usage, record.usage);
    assert!(usage.inodes == 2 && usage.size_bytes >= 10_000, "{usage:?}");
    let view = world
        .snapshots
        .view("v", &name, Labels::new())
        .await
        .unwrap();
    assert_eq!(
        view,
        world.bind(&format!("@/snapshots/{}/fs", record.id), "ro")
    );
    world.snapshots.cleanup().await.unwrap();
    assert!(Path::new(&view[0].source).join("unpacked").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_prepares_find_one_snapshot() {
    for script in [Script::Lazy, Script::Unpack] {
        let world = World::new(script);
        let mut racers = tokio::task::JoinSet::new();
        for index in 0..24 {
            let snapshots = world.snapshots.clone();
            racers.spawn(async move {
                let labels = reference(ChainId::of(b"same"));
                snapshots
                    .prepare(&format!("ns/{index}/k"), "", labels)
                    .await
                    .unwrap()
            });
        }
        let prepared = racers.join_all().await;
        assert!(
            prepared.iter().all(|one| *one == prepared[0]),
            "{prepared:?}"
        );
        let Prepared::Exists { name } = &prepared[0] else {
            panic!("not answered")
        };
        assert_eq!(world.names().await, std::slice::from_ref(name));
        world.snapshots.cleanup().await.unwrap();
        assert_eq!(
            world.directories().len(),
            usize::from(script == Script::Unpack)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_prepares_of_one_key_make_one_snapshot() {
    let world = World::new(Script::Ordinary);
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let snapshots = world.snapshots.clone();
        racers.spawn(async move { snapshots.prepare("k", "", Labels::new()).await });
    }
    let results = racers.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    for error in results.into_iter().filter_map(Result::err) {
        assert!(
            matches!(
                error,
                SnapshotError::Store(StoreError::AlreadyExists { .. })
            ),
            "{error}"
        );
    }
    world.snapshots.cleanup().await.unwrap();
    assert_eq!(world.directories().len(), 1);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing_half_done() {
    let world = World::new(Script::Lazy);
    let labels = reference(ChainId::of(b"1"));
    // Polled once, then dropped: the decision alone takes 5 ms.
    let prepare = world.snapshots.prepare("k", "", labels.clone());
    assert!(timeout(Duration::ZERO, prepare).await.is_err());
    timeout(Duration::from_secs(5), async {
        while world.names().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let existing = world.names().await;
    let prepared = world.snapshots.prepare("k", "", labels).await.unwrap();
    assert_eq!(
        prepared,
        Prepared::Exists {
            name: existing[0].clone()
        }
    );
}

#[tokio::test]
async fn a_slow_decision_delays_nobody_else() {
    let world = World::new(Script::Hang);
    world.layer("base", "").await;
    let snapshots = world.snapshots.clone();
    let slow = tokio::spawn(async move {
        snapshots
            .prepare("k", "", reference(ChainId::of(b"1")))
            .await
    });
    while world.lazy.decided.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    world.prepare("other", "base").await;
    world.snapshots.stat("base").await.unwrap();
    world.snapshots.usage("other").await.unwrap();
    world
        .snapshots
        .update("base", Labels::new(), Vec::new())
        .await
        .unwrap();
    assert_eq!(world.names().await, ["base", "other"]);
    world.snapshots.remove("other").await.unwrap();
    world.snapshots.cleanup().await.unwrap();
    assert!(!slow.is_finished());
    assert!(matches!(slow.await.unwrap().unwrap(), Prepared::Mounts(_)));
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_mounted_is_taken_back() {
    let world = World::new(Script::Lazy);
    let labels = reference(ChainId::of(b"1"));
    let Prepared::Exists { name } = world.snapshots.prepare("p", "", labels).await.unwrap() else {
        panic!("not lazy");
    };
    *world.lazy.mountable.lock().unwrap() = false;
    let error = world
        .snapshots
        .prepare("k", &name, Labels::new())
        .await
        .unwrap_err();
    assert!(
        matches!(error, SnapshotError::Mount(MountError::Unavailable { .. })),
        "{error}"
    );
    assert_eq!(world.names().await, std::slice::from_ref(&name));
    assert_eq!(*world.lazy.released.lock().unwrap(), ["k"]);
    *world.lazy.mountable.lock().unwrap() = true;
    world.prepare("k", &name).await;
    world.snapshots.cleanup().await.unwrap();
    assert_eq!(world.directories().len(), 1);
}

#[tokio::test]
async fn remove_frees_the_key_and_cleanup_the_directory() {
    let world = World::new(Script::Ordinary);
    world.layer("base", "").await;
    world.prepare("k", "base").await;
    fs::create_dir(world.path("snapshots/2/fs/d")).unwrap();
    world.snapshots.remove("k").await.unwrap();
    assert_eq!(world.directories(), ["1", "2"]);
    world
        .snapshots
        .view("k", "base", Labels::new())
        .await
        .unwrap();
    world.snapshots.cleanup().await.unwrap();
    assert_eq!(world.directories(), ["1", "3"]);
    assert_eq!(fs::read_dir(world.path("graveyard")).unwrap().count(), 0);
}

#[tokio::test]
async fn the_reaper_deletes_without_being_asked() {
    let world = World::new(Script::Ordinary);
    world.prepare("k", "").await;
    world.snapshots.remove("k").await.unwrap();
    timeout(Duration::from_secs(20), async {
        while !world.directories().is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn usage_is_counted_while_active_and_stored_at_commit() {
    let world = World::new(Script::Ordinary);
    world.prepare("k", "").await;
    fs::write(world.path("snapshots/1/fs/a"), vec![1; 50_000]).unwrap();
    fs::hard_link(
        world.path("snapshots/1/fs/a"),
        world.path("snapshots/1/fs/b"),
    )
    .unwrap();
    let active = world.snapshots.usage("k").await.unwrap();
    assert_eq!(active.inodes, 2);
    assert!((50_000..100_000).contains(&active.size_bytes), "{active:?}");
    world
        .snapshots
        .commit("c", "k", Labels::new())
        .await
        .unwrap();
    fs::write(world.path("snapshots/1/fs/later"), vec![1; 50_000]).unwrap();
    assert_eq!(world.snapshots.usage("c").await.unwrap(), active);
    world.snapshots.view("v", "c", Labels::new()).await.unwrap();
    assert_eq!(world.snapshots.usage("v").await.unwrap(), Usage::default());
}

#[tokio::test]
async fn a_restart_finds_everything_and_buries_orphans() {
    let world = World::new(Script::Lazy);
    world.layer("base", "").await;
    world.prepare("k", "base").await;
    let labels = reference(ChainId::of(b"1"));
    world
        .snapshots
        .prepare("p", "base", labels.clone())
        .await
        .unwrap();
    let (names, mounts) = (
        world.names().await,
        world.snapshots.mounts("k").await.unwrap(),
    );
    // What crashes leave: a directory without a row, complete or not.
    for orphan in [
        "snapshots/77/fs",
        "snapshots/new-78/fs",
        "snapshots/junk",
        "graveyard/5/fs",
    ] {
        fs::create_dir_all(world.path(orphan)).unwrap();
    }

    let world = world.restart().await;
    assert_eq!(world.directories(), ["1", "2"]);
    assert_eq!(world.names().await, names);
    assert_eq!(world.snapshots.mounts("k").await.unwrap(), mounts);
    world.snapshots.prepare("p", "base", labels).await.unwrap();
    assert_eq!(world.lazy.decided.load(Ordering::SeqCst), 0);
    world.prepare("new", "base").await;
    assert!(world.snapshots.stat("new").await.unwrap().id.0 > 78);
    world.snapshots.cleanup().await.unwrap();
    assert_eq!(fs::read_dir(world.path("graveyard")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_stopped_life_cycle_refuses_work_and_keeps_its_state() {
    let world = World::new(Script::Ordinary);
    world.prepare("k", "").await;
    world.snapshots.stop(Duration::from_secs(5)).await;
    let refused = world
        .snapshots
        .prepare("l", "", Labels::new())
        .await
        .unwrap_err();
    assert!(matches!(refused, SnapshotError::Stopping));
    assert!(matches!(
        world.snapshots.stat("k").await,
        Err(SnapshotError::Stopping)
    ));
    let world = world.restart().await;
    assert_eq!(
        (world.names().await.len(), world.directories().len()),
        (1, 1)
    );
}

#[tokio::test]
async fn empty_keys_are_refused() {
    let world = World::new(Script::Ordinary);
    let none = Labels::new;
    assert!(matches!(
        world.snapshots.prepare("", "", none()).await,
        Err(SnapshotError::Empty { .. })
    ));
    assert!(matches!(
        world.snapshots.view("", "", none()).await,
        Err(SnapshotError::Empty { .. })
    ));
    world.prepare("k", "").await;
    let commit = world.snapshots.commit("", "k", none()).await;
    assert!(matches!(commit, Err(SnapshotError::Empty { .. })));
    world.script(Script::Lazy);
}
