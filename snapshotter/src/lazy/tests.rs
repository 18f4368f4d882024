// SPDX-License-Identifier: Apache-2.0
//! Decisions over a content store in memory and a registry that is not there, and which snapshots want
//! their image completed.

use super::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::digest::{BlobDigest, ChainId, DiffId, IndexDigest};
use sluice_fetcher::metrics::Metrics;
use sluice_fetcher::registry::fake::{FakeRegistry, Misbehaviour};
use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions};
use sluice_fetcher::scheduler::{Fetcher, FetcherOptions};
use sluice_fetcher::source::RetryPolicy;
use sluice_fetcher::store::{Store, StoreOptions};
use tempfile::TempDir;
use tokio::time::Instant;

use super::unpack_job::UnpackJob;
use crate::boot::{BootMetrics, BootOptions};
use crate::config::IndexUse;
use crate::indexes::{IndexFiles, sample};
use crate::labels::CRI_IMAGE_REFERENCE;
use crate::mount::bind::BindMount;
use crate::node_indexes::{BUDGET_BYTES, NodeIndexes};
use crate::plan::{Refusal, RefusalKind};
use crate::resolve::MemoryContent;
use crate::reuse::Reuse;
use crate::shelf::NodeShelf;
use crate::snapshots::SnapshotId;
use crate::store::DocumentTable;
use crate::unpack::LayerBlob;
use crate::zone_indexes::ZoneIndexMetrics;

struct Site {
    lazy: Lazy,
    content: Arc<MemoryContent>,
    payload: Vec<u8>,
    annotations: LayerAnnotations,
    _dir: TempDir,
}

fn site() -> Site {
    site_with(Duration::from_secs(60))
}

/// With this grace for files.
fn site_with(file_grace: Duration) -> Site {
    let dir = tempfile::tempdir().unwrap();
    let client = RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials)).unwrap();
    let (payload, annotations) = sample::layer();
    let content = Arc::new(MemoryContent::default());
    Site {
        lazy: lazy_with(dir.path(), client, file_grace, Arc::clone(&content)),
        content,
        payload,
        annotations,
        _dir: dir,
    }
}

/// Lazy layers in a directory, with a content store in memory; their shelf trusts everybody, too.
pub(crate) fn lazy_in(directory: &Path, client: RegistryClient, file_grace: Duration) -> Lazy {
    lazy_with(directory, client, file_grace, Arc::default())
}

fn lazy_with(
    directory: &Path,
    client: RegistryClient,
    file_grace: Duration,
    content: Arc<MemoryContent>,
) -> Lazy {
    let at = |name: &str| directory.join(name);
    let store = Arc::new(Store::open(&at("devices"), StoreOptions::default()).unwrap());
    let fetcher = Fetcher::new(FetcherOptions::default(), store, Metrics::new());
    let metadata = Arc::new(MetadataStore::open(&at("metadata.redb")).unwrap());
    let indexes = Arc::new(IndexFiles::open(&at("indexes")).unwrap());
    let layers = Layers::new(
        fetcher,
        client,
        RetryPolicy::default(),
        indexes,
        Arc::clone(&metadata),
    );
    let layers = Arc::new(layers);
    let backend = Arc::new(BindMount::default());
    let boot = Boot::new(
        BootOptions {
            enabled: true,
            window: Duration::from_secs(1),
            whole_pages: false,
        },
        Arc::clone(&layers),
        Arc::clone(&metadata),
        backend.clone(),
        BootMetrics::default(),
    );
    let node_indexes = Arc::new(NodeIndexes::open(&at("node-indexes"), BUDGET_BYTES).unwrap());
    let zone_indexes = ZoneIndexes::new(
        Arc::clone(&node_indexes),
        None,
        IndexUse::Off,
        DiskReserve::default(),
        ZoneIndexMetrics::default(),
    );
    let parts = LazyParts {
        boot,
        reuse: Reuse::new(true, Arc::clone(&layers), Arc::clone(&metadata)),
        content,
        metadata,
        trees: Arc::new(TreeFiles::open(&at("trees")).unwrap()),
        background: Background::new(Arc::clone(&layers), None, DiskReserve::default()),
        shelf: Arc::new(NodeShelf::new(
            Arc::clone(&layers),
            Trust::new(vec!["*".to_owned()]),
        )),
        layers,
        node_indexes,
        zone_indexes: Arc::new(zone_indexes),
        mounts: Arc::new(Mounts::new(backend, &at("mnt"))),
        metrics: LazyMetrics::default(),
    };
    let options = LazyOptions {
        root: directory.to_owned(),
        trust: Trust::new(vec!["*".to_owned()]),
        index_use: IndexPolicy {
            node: IndexUse::On,
            ..IndexPolicy::NONE
        },
        whole_below_bytes: 256 << 10,
        read_deadline: None,
        mount_grace: Duration::from_secs(60),
        file_grace,
        store_budget_bytes: None,
        reserve: DiskReserve::default(),
    };
    Lazy::start(parts, options)
}

impl Site {
    fn indexes(&self) -> &IndexFiles {
        self.lazy.parts().layers.indexes()
    }

    /// What becomes of a Prepare of the layer with these annotations.
    async fn decide(&self, annotations: &LayerAnnotations) -> LazyDecision {
        let mut labels = annotations.to_map();
        // Nobody listens there.
        let reference = "127.0.0.1:1/team/app:v1".to_owned();
        labels.insert(CRI_IMAGE_REFERENCE.to_owned(), reference);
        let request = PrepareRequest {
            key: "default/1/extract".into(),
            namespace: Some("default".into()),
            parent: None,
            chain: Vec::new(),
            parent_chain: None,
            chain_id: ChainId::child(None, annotations.diff_id),
            labels,
            deadline: Instant::now() + Duration::from_millis(1500),
        };
        self.lazy.decide(&request).await
    }

    fn chain_id(&self) -> ChainId {
        ChainId::child(None, self.annotations.diff_id)
    }

    /// What is remembered of the layer, as soon as something is.
    async fn remembered(&self) -> Decision {
        let key = decision_key("default", self.chain_id());
        for _ in 0..1000 {
            let table = DocumentTable::Decisions;
            let all = self.lazy.parts().metadata.documents(table).unwrap();
            if let Some((_, decision)) = all.into_iter().find(|(name, _)| *name == key) {
                return decision;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nothing is remembered");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_layer_whose_index_is_gone_is_not_lazy() {
    let site = site();
    let digest = site.annotations.index_digest;
    drop(
        site.indexes()
            .put(&site.payload, &(&site.annotations).into())
            .unwrap(),
    );
    for _ in 0..2 {
        let decision = site.decide(&site.annotations).await;
        assert!(matches!(decision, LazyDecision::Lazy(_)), "{decision:?}");
    }
    std::fs::remove_file(site.indexes().path(digest)).unwrap();
    let decision = site.decide(&site.annotations).await;
    assert!(
        matches!(decision, LazyDecision::Ordinary { .. }),
        "{decision:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_that_a_prepare_names_is_the_one_that_counts() {
    let site = site();
    drop(
        site.indexes()
            .put(&site.payload, &(&site.annotations).into())
            .unwrap(),
    );
    let decision = site.decide(&site.annotations).await;
    assert!(matches!(decision, LazyDecision::Lazy(_)), "{decision:?}");
    // Another manifest with the same config has another index, and that cannot be had.
    let other = LayerAnnotations {
        index_digest: IndexDigest::of(b"another"),
        blob: BlobDigest::of(b"another"),
        ..site.annotations.clone()
    };
    let decision = site.decide(&other).await;
    assert!(
        matches!(decision, LazyDecision::Ordinary { .. }),
        "{decision:?}"
    );
}

/// A layer that nobody converted, in an image that containerd knows; its config says that it is `diff_id`.
fn image_as_it_is(site: &Site, blob: &[u8], diff_id: DiffId) {
    let content = &site.content;
    let config =
        serde_json::json!({"rootfs": {"type": "layers", "diff_ids": [diff_id.to_string()]}});
    let config = content.put("default", serde_json::to_vec(&config).unwrap(), &[]);
    let manifest = serde_json::json!({
        "config": {"digest": config, "size": 1},
        "layers": [{"digest": BlobDigest::of(blob).to_string(), "size": blob.len()}],
    });
    let source = format!("{}127.0.0.1", crate::resolve::SOURCE_LABEL_PREFIX);
    let labels = [
        (crate::resolve::CONFIG_LABEL, config.as_str()),
        (source.as_str(), "team/app"),
    ];
    content.put("default", serde_json::to_vec(&manifest).unwrap(), &labels);
}

async fn decide_unmarked(site: &Site, diff_id: DiffId) -> LazyDecision {
    let request = PrepareRequest {
        key: "default/1/extract".into(),
        namespace: Some("default".into()),
        parent: None,
        chain: Vec::new(),
        parent_chain: None,
        chain_id: ChainId::child(None, diff_id),
        labels: BTreeMap::new(),
        deadline: Instant::now() + Duration::from_millis(1500),
    };
    site.lazy.decide(&request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_gets_an_index_as_it_is_unpacked_and_is_lazy_from_then_on() {
    let site = site();
    let tar = sample::tar();
    let diff_id = DiffId::of(&tar);
    image_as_it_is(&site, &tar, diff_id);
    let blob = BlobDigest::of(&tar);
    // containerd names it without its port.
    let registry = FakeRegistry::start().await;
    registry.add_blob("team/app", tar.clone());
    let decision = decide_unmarked(&site, diff_id).await;
    assert!(
        matches!(decision, LazyDecision::Ordinary { .. }),
        "{decision:?}"
    );
    let indexes = &site.lazy.parts().node_indexes;
    assert!(!indexes.has(blob));
    // containerd has downloaded it.
    site.content.put("default", tar, &[]);
    for _ in 0..1000 {
        if indexes.has(blob) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(indexes.has(blob));
    // What was remembered of the refusal is forgotten when the job is done. Nobody could read it, though.
    let nowhere = |decision: &LazyDecision| match decision {
        LazyDecision::Ordinary { reason } => {
            reason.contains("no registry is known to have it; 127.0.0.1/team/app: ")
        }
        _ => false,
    };
    decided(&site, diff_id, nowhere).await;
    assert_eq!(registry.take_lines(), [""; 0]);
    // The client has written down what it pulled: that is seen without anybody's pulling again.
    let host = registry.host();
    site.content
        .name_image("default", "127.0.0.1:1/team/other:v1");
    site.content
        .name_image("default", &format!("{host}/team/app:v1"));
    let lazy = |decision: &LazyDecision| matches!(decision, LazyDecision::Lazy(_));
    let decision = decided(&site, diff_id, lazy).await;
    let LazyDecision::Lazy(record) = decision else {
        panic!("{decision:?}");
    };
    assert_eq!(record.index_source, crate::snapshots::IndexSource::Node);
    assert_eq!((record.blob_digest, record.diff_id), (blob, diff_id));
    let places: Vec<String> = record.sources.iter().map(ToString::to_string).collect();
    assert_eq!(places.first(), Some(&format!("{host}/team/app")));
    // The name is gone; where it was is known.
    let known = site.lazy.0.proven();
    assert_eq!(known["127.0.0.1/team/app"], record.sources[0]);
}

/// The first decision that is as wanted.
async fn decided(
    site: &Site,
    diff_id: DiffId,
    wanted: impl Fn(&LazyDecision) -> bool,
) -> LazyDecision {
    let mut decision = decide_unmarked(site, diff_id).await;
    for _ in 0..1000 {
        if wanted(&decision) {
            return decision;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        decision = decide_unmarked(site, diff_id).await;
    }
    panic!("{decision:?}");
}

/// An image at hosts that swallow packets is not looked for longer than half of what its Prepare has.
#[tokio::test(flavor = "multi_thread")]
async fn places_that_do_not_answer_cost_half_of_the_time() {
    let site = site();
    let tar = sample::tar();
    image_as_it_is(&site, &tar, DiffId::of(&tar));
    let registry = FakeRegistry::start().await;
    registry.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::NoAnswer);
    let name = format!("{}/team/app:v1", registry.host());
    site.content.name_image("default", &name);
    let origin = BlobOrigin {
        host: registry.host(),
        repository: "team/app".into(),
    };
    let inner = &site.lazy.0;
    let blob = (BlobDigest::of(&tar), tar.len() as u64);
    let (begun, most) = (Instant::now(), Duration::from_millis(700));
    let places = vec![origin.clone(), origin.clone()];
    let refusal = inner.answering(places, blob, begun + most).await;
    let took = begun.elapsed();
    let refusal = refusal.unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Unresolved, "{refusal}");
    assert!(took >= most && took < most * 4, "{took:?}");
    // One that answers with something else is no better.
    registry.behave();
    registry.misbehave(
        "GET",
        "/blobs/",
        0,
        u32::MAX,
        Misbehaviour::Status(403, None),
    );
    let refused = inner.answering(vec![origin], blob, Instant::now() + most);
    let refusal = refused.await.unwrap_err();
    assert!(refusal.reason.contains("403"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_not_what_its_image_says_gets_no_index() {
    let site = site();
    let (tar, claimed) = (sample::tar(), DiffId::of(b"another"));
    image_as_it_is(&site, &tar, claimed);
    let blob = BlobDigest::of(&tar);
    site.content.put("default", tar, &[]);
    let decision = decide_unmarked(&site, claimed).await;
    assert!(
        matches!(decision, LazyDecision::Ordinary { .. }),
        "{decision:?}"
    );
    let jobs = || site.lazy.parts().metrics.indexed_so_far("lies");
    for _ in 0..1000 {
        if jobs() > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(jobs(), 1);
    assert!(!site.lazy.parts().node_indexes.has(blob));
}

#[tokio::test(flavor = "multi_thread")]
async fn how_an_unpack_ended_is_remembered_however_it_ends() {
    type End = fn(UnpackJob);
    let cases: [(End, bool, &str); 3] = [
        (|job| drop(job), false, "budget"),
        (
            |mut job| job.settle(Err("no disk".into())),
            false,
            "no disk",
        ),
        (|mut job| job.settle(Ok(())), true, "not lazy: sparse"),
    ];
    for (end, unpacked, reason) in cases {
        let site = site();
        let job = UnpackJob {
            inner: Arc::clone(&site.lazy.0),
            blob: LayerBlob {
                blob: site.annotations.blob,
                blob_bytes: 1,
                media_type: String::new(),
                diff_id: site.annotations.diff_id,
            },
            origins: Vec::new(),
            deadline: Instant::now(),
            namespace: "default".into(),
            chain_id: site.chain_id(),
            refusal: Refusal::new(RefusalKind::NotLazy, "not lazy: sparse"),
            settled: false,
        };
        end(job);
        let decision = site.remembered().await;
        assert_eq!(decision.unpacked, unpacked, "{decision:?}");
        assert!(decision.reason.contains(reason), "{decision:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_swept_before_the_shim_has_said_what_is_mounted() {
    let site = site_with(Duration::ZERO);
    let inner = &site.lazy.0;
    drop(
        site.indexes()
            .put(&site.payload, &(&site.annotations).into())
            .unwrap(),
    );
    let path = site.indexes().path(site.annotations.index_digest);
    inner.sweep(Duration::ZERO).await;
    assert!(path.exists());
    inner.parts.mounts.adopt(&[]);
    inner.sweep(Duration::ZERO).await;
    assert!(!path.exists());
}

#[test]
fn what_shows_an_image_is_completed_and_what_unpacks_it_is_not() {
    let reference = (LABEL_SNAPSHOT_REF, "sha256:00");
    let other = ("some.label/x", "y");
    let cases = [
        (SnapshotKind::Active, "default/7/web", other, true),
        (SnapshotKind::View, "k8s.io/7/image-volume", other, true),
        (SnapshotKind::Committed, "default/7/sha256:11", other, false),
        (
            SnapshotKind::Active,
            "default/8/extract-1 sha256:11",
            reference,
            false,
        ),
        (
            SnapshotKind::Active,
            "default/8/extract-1 sha256:11",
            other,
            false,
        ),
        (SnapshotKind::View, "default/8/anything", reference, false),
    ];
    for (kind, name, (key, value), expected) in cases {
        let record = SnapshotRecord {
            id: SnapshotId(1),
            name: name.to_owned(),
            kind,
            parent: None,
            labels: BTreeMap::from([(key.to_owned(), value.to_owned())]),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            usage: Usage::default(),
            layer: None,
        };
        assert_eq!(shows_image(&record), expected, "{kind:?} {name} {key}");
    }
}
