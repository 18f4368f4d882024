// SPDX-License-Identifier: Apache-2.0
//! Plans: checks of a layer, waiting, memory of failures.

use super::*;
use crate::indexes::{IndexFiles, sample};
use crate::resolve::{Manifest, ResolvedManifest};
use sluice_blockindex::digest::ManifestDigest;
use sluice_blockindex::extent::Extent;

fn annotations() -> LayerAnnotations {
    LayerAnnotations {
        index_extent: Extent::new(10, 20).unwrap(),
        index_digest: IndexDigest::of(b"i"),
        blob: BlobDigest::of(b"b"),
        blob_bytes: 100,
        diff_id: DiffId::of(b"d"),
        config: ConfigDigest::of(b"c"),
        port: None,
        boot: Vec::new(),
    }
}

fn layer() -> LayoutLayer {
    LayoutLayer {
        chain_id: ChainId::child(None, DiffId::of(b"d")),
        diff_id: DiffId::of(b"d"),
        descriptor: Some(Descriptor {
            media_type: String::new(),
            digest: BlobDigest::of(b"b").to_string(),
            size_bytes: 100,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
        }),
        mark: Ok(LayerMark::Lazy(annotations())),
    }
}

fn later(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

fn key() -> PlanKey {
    PlanKey::Image("ns".into(), ConfigDigest::of(b"c"))
}

#[test]
fn annotations_must_agree_with_manifest_and_config() {
    type Change = fn(&mut LayoutLayer);
    let other: Change = |l| l.descriptor.as_mut().unwrap().digest = "sha256:00".into();
    let cases: [(Change, Option<RefusalKind>); 7] = [
        (|_| {}, None),
        (|l| l.descriptor = None, None),
        (
            |l| l.diff_id = DiffId::of(b"x"),
            Some(RefusalKind::Mismatch),
        ),
        (
            |l| l.descriptor.as_mut().unwrap().size_bytes = 1,
            Some(RefusalKind::Mismatch),
        ),
        (other, Some(RefusalKind::Mismatch)),
        (
            |l| l.mark = Ok(LayerMark::Unmarked),
            Some(RefusalKind::NotConverted),
        ),
        (
            |l| l.mark = Ok(LayerMark::NotLazy("sparse".into())),
            Some(RefusalKind::NotLazy),
        ),
    ];
    for (number, (change, refused)) in cases.into_iter().enumerate() {
        let mut layer = layer();
        change(&mut layer);
        assert_eq!(
            check_layer(&layer).err().map(|r| r.kind),
            refused,
            "case {number}"
        );
    }
}

#[tokio::test]
async fn waiters_get_their_layer_and_share_one_plan() {
    let plans = Plans::default();
    let mut senders = Vec::new();
    let plan = plans.get_or_start(key(), |sender| senders.push(sender));
    let again = plans.get_or_start(key(), |_| panic!("a second plan"));
    let chain = layer().chain_id;
    assert_eq!(
        plan.outcome(chain, later(20)).await.unwrap_err().kind,
        RefusalKind::Budget
    );
    let layout = Layout {
        manifest: None,
        layers: vec![layer()],
        origins: Vec::new(),
    };
    senders[0].send_modify(|state| state.layout = Some(Ok(Arc::new(layout))));
    assert!(plans.with_chain("ns", chain).is_some() && plans.with_chain("other", chain).is_none());
    let stranger = ChainId::child(None, DiffId::of(b"stranger"));
    let refusal = again.outcome(stranger, later(1000)).await.unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Mismatch);
    let waiting = again.outcome(chain, later(5000));
    let refusal = Refusal::new(RefusalKind::Fetch, "404");
    senders[0].send_modify(|state| {
        state.outcomes.insert(chain, Err(refusal.clone()));
    });
    assert_eq!(waiting.await.unwrap_err(), refusal);
}

#[tokio::test]
async fn a_failure_is_remembered_and_costs_no_second_budget() {
    let plans = Plans::default();
    let plan = plans.get_or_start(key(), drop);
    let begun = Instant::now();
    let chain = layer().chain_id;
    assert_eq!(
        plan.outcome(chain, later(5000)).await.unwrap_err().kind,
        RefusalKind::Budget
    );
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "a plan that ended is not waited for"
    );
    plans.get_or_start(key(), |_| panic!("the failure is forgotten"));
}

/// What becomes of a small layer, whose index is in the directory.
fn planned(directory: &std::path::Path) -> Arc<PlannedLayer> {
    let files = IndexFiles::open(directory).unwrap();
    let (payload, annotations) = sample::layer();
    let index = files.put(&payload, &(&annotations).into()).unwrap();
    let record = LazyLayerRecord {
        chain_id: ChainId::child(None, annotations.diff_id),
        diff_id: annotations.diff_id,
        index_digest: annotations.index_digest,
        blob_digest: annotations.blob,
        blob_bytes: annotations.blob_bytes,
        index_source: crate::snapshots::IndexSource::Blob,
        device_bytes: index.device_bytes(),
        sources: Vec::new(),
    };
    Arc::new(PlannedLayer { record, index })
}

#[tokio::test]
async fn a_plan_lets_go_of_indexes_that_no_snapshot_needs() {
    let directory = tempfile::tempdir().unwrap();
    let planned = planned(directory.path());
    let index = planned.record.index_digest;
    let plans = Plans::default();
    let mut senders = Vec::new();
    let plan = plans.get_or_start(key(), |sender| senders.push(sender));
    let other = PlanKey::Image("failed".into(), ConfigDigest::of(b"c"));
    plans.get_or_start(other.clone(), drop);
    senders[0].send_modify(|state| {
        state.outcomes.insert(planned.record.chain_id, Ok(planned));
    });
    let there = || plans.table.lock().unwrap().contains_key(&key());
    let (none, needed) = (BTreeSet::new(), BTreeSet::from([index]));
    plans.release(&none, Duration::ZERO);
    assert!(there(), "it runs");
    senders.clear();
    plans.release(&needed, Duration::ZERO);
    assert!(there(), "a snapshot needs it");
    plans.release(&none, Duration::from_secs(60));
    assert!(there(), "it is young");
    plans.release(&none, Duration::ZERO);
    assert!(!there());
    plans.get_or_start(other, |_| panic!("the failure is forgotten"));

    let again = plans.get_or_start(key(), |sender| senders.push(sender));
    plans.forget(&plan);
    assert!(there(), "another plan has the key");
    plans.forget(&again);
    assert!(!there());
}

#[tokio::test]
async fn layers_with_plans_of_their_own_share_one_budget() {
    let plans = Plans::default();
    let (config, chain_id) = (ConfigDigest::of(b"c"), layer().chain_id);
    let key = PlanKey::Layer {
        namespace: "ns".into(),
        config,
        chain_id,
        index: IndexDigest::of(b"i"),
    };
    let mut senders = Vec::new();
    plans.get_or_start(key, |sender| senders.push(sender));
    let refuse = |kind| {
        senders[0].send_modify(|state| {
            let refusal = Refusal::new(kind, "no");
            state.layout = Some(Ok(Arc::new(Layout {
                manifest: None,
                layers: Vec::new(),
                origins: Vec::new(),
            })));
            state.outcomes.insert(chain_id, Err(refusal));
        });
    };
    let spent = |namespace: &str, config| plans.spent(namespace, config).is_some();
    assert!(!spent("ns", config));
    refuse(RefusalKind::Fetch);
    assert!(!spent("ns", config), "it did not take the budget");
    refuse(RefusalKind::Budget);
    assert!(spent("ns", config));
    assert!(!spent("other", config) && !spent("ns", ConfigDigest::of(b"x")));
}

#[test]
fn the_layout_is_that_of_the_manifest_that_is_pulled() {
    let manifest = |blob: &[u8]| {
        let (config, blob) = (ConfigDigest::of(b"c"), BlobDigest::of(blob));
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{config}","size":1}},
            "layers":[{{"mediaType":"l","digest":"{blob}","size":1}}]}}"#
        );
        ResolvedManifest {
            digest: ManifestDigest::of(text.as_bytes()),
            manifest: Manifest::parse(text.as_bytes()).unwrap(),
        }
    };
    let image = ResolvedImage {
        config: ConfigDigest::of(b"c"),
        diff_ids: vec![DiffId::of(b"d")],
        chain_ids: vec![layer().chain_id],
        manifests: vec![manifest(b"first"), manifest(b"second")],
        repositories: Vec::new(),
    };
    for (pulled, expected) in [
        (None, &b"first"[..]),
        (Some(&b"first"[..]), b"first"),
        (Some(b"second"), b"second"),
        (Some(b"neither"), b"first"),
    ] {
        let layout = Layout::of_image(&image, pulled.map(BlobDigest::of)).unwrap();
        let descriptor = layout.layers[0].descriptor.as_ref().unwrap();
        assert_eq!(descriptor.digest, BlobDigest::of(expected).to_string());
    }
}
