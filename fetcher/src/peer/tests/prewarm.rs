// SPDX-License-Identifier: Apache-2.0
//! Nodes that ask each other for prewarms, over loopback.

use futures::StreamExt as _;
use sluice_blockindex::digest::ManifestDigest;
use sluice_proto::peer::PrewarmReport;

use super::*;
use crate::registry::Repository;

/// What a shelf says: of the repository `refused` nothing, of `endless` no end, of others two reports.
pub(super) fn reports(wanted: &WantedPrewarm) -> Result<Reports, Refused> {
    let report = |phase: &str| PrewarmReport {
        phase: phase.to_owned(),
        note: format!("{} {}", wanted.reference, wanted.boot),
        ..PrewarmReport::default()
    };
    let two = futures::stream::iter([report("queued"), report("done")]);
    match wanted.reference.repository() {
        "refused" => Err(Refused::NotAllowed("not trusted".to_owned())),
        "endless" => Ok(two.chain(futures::stream::pending()).boxed()),
        _ => Ok(two.boxed()),
    }
}

fn wanted(number: usize, repository: &str) -> WantedPrewarm {
    let place = Repository::new("r.test", repository).unwrap();
    WantedPrewarm::new(id(number), &place, ManifestDigest::of(b"m"), true)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_brings_what_a_member_asks_for_within_bounds() {
    let layer = TestLayer::even(7, 1, 4096);
    let nodes = zone(2, &layer, &patient()).await;
    let (me, other) = (&nodes[0], &nodes[1].node);
    let ask = async |wanted: &WantedPrewarm| me.peers.prewarm(other, wanted).await;
    let refusal = async |wanted: &WantedPrewarm| match ask(wanted).await {
        Ok(_) => panic!("taken: {wanted:?}"),
        Err(error) => error.to_string(),
    };

    let app = wanted(0, "app");
    let told: Vec<_> = ask(&app).await.unwrap().collect().await;
    let told: Vec<PrewarmReport> = told.into_iter().map(Result::unwrap).collect();
    let phases: Vec<&str> = told.iter().map(|it| it.phase.as_str()).collect();
    assert_eq!(phases, ["queued", "done"]);
    assert_eq!(told[0].note, format!("{} true", app.reference));

    let untrusted = refusal(&wanted(0, "refused")).await;
    assert!(untrusted.contains("not trusted"), "{untrusted}");
    let stranger = refusal(&wanted(9, "app")).await;
    assert!(stranger.contains("no member"), "{stranger}");

    // More than are watched, or asked for in a moment.
    let (endless, mut held) = (wanted(0, "endless"), Vec::new());
    let too_many = loop {
        match ask(&endless).await {
            Ok(reports) => held.push(reports),
            Err(error) => break error.to_string(),
        }
        assert!(held.len() < 1000, "no bound");
    };
    assert!(too_many.contains("too many prewarms"), "{too_many}");
    assert!(held.len() >= 16, "{}", held.len());
    drop(held);
    // The streams that were dropped are free again, and time earns requests.
    let begun = tokio::time::Instant::now();
    while ask(&app).await.is_err() {
        assert!(begun.elapsed() < 60 * SECOND, "refused for ever");
        tokio::time::sleep(100 * MILLISECOND).await;
    }
}
