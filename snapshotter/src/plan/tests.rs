// SPDX-License-Identifier: Apache-2.0
//! Plans: checks of a layer, waiting, memory of failures.

use super::*;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};
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
