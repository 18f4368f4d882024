// SPDX-License-Identifier: Apache-2.0
use proptest::prelude::*;

use super::*;
use crate::clock;
use crate::cluster::node::Node;

fn id(name: &str) -> NodeId {
    NodeId::parse(name).unwrap()
}

fn ids(names: &[&str]) -> Vec<NodeId> {
    names.iter().map(|name| id(name)).collect()
}

fn node(name: &str, zone: &str, rack: &str) -> Node {
    Node {
        id: id(name),
        zone: zone.into(),
        rack: rack.into(),
        role: Role::Node,
        address: ([127, 0, 0, 1], 1).into(),
        version: String::new(),
        protocol: 1,
        load: 0,
        free_slots: 16,
    }
}

/// `me` in rack `r` of zone `z`, with four alike in the rack, two in the zone and one elsewhere.
fn view() -> View {
    let others = [
        ("r1", "z", "r"),
        ("r2", "z", "r"),
        ("r3", "z", "r"),
        ("r4", "z", "r"),
        ("z1", "z", "s"),
        ("z2", "z", "t"),
        ("e1", "y", "r"),
    ];
    View {
        me: node("me", "z", "r"),
        others: others
            .map(|(name, zone, rack)| node(name, zone, rack))
            .to_vec(),
    }
}

fn set<'a>(view: &'a mut View, name: &str) -> &'a mut Node {
    let found = view.others.iter_mut().find(|node| node.id.as_str() == name);
    found.unwrap()
}

fn answered(first_byte_ms: u64) -> Outcome {
    Outcome::Answered {
        first_byte: Duration::from_millis(first_byte_ms),
    }
}

#[test]
fn nearest_first_and_only_who_may_be_asked() {
    let mut view = view();
    set(&mut view, "r2").role = Role::Leech;
    let mut scores = Scores::default();
    let now = clock::now();
    scores.observe(&id("z2"), Outcome::Failed, now);
    let asked = ids(&["e1", "z2", "gone", "me", "z1", "r2", "r1", "r1"]);
    assert_eq!(
        scores.order_named(&view, &asked, now),
        ids(&["r1", "z1", "e1"])
    );
}

#[test]
fn names_of_a_busy_answer_keep_their_order_at_one_distance() {
    let view = view();
    let now = clock::now();
    let mut scores = Scores::default();
    scores.observe(&id("r3"), Outcome::Busy, now);
    scores.observe(&id("z2"), answered(100), now);
    scores.observe(&id("r4"), Outcome::Failed, now);
    let names = ids(&["z2", "r3", "r4", "r1", "e1", "r3", "z1", "r2"]);
    let order = scores.order_named(&view, &names, now);
    assert_eq!(order, ids(&["r3", "r1", "r2", "z2", "z1", "e1"]));
}

#[test]
fn pauses_double_and_end() {
    use Outcome::{Failed, Lacked, Late, Lied, Slow};
    // What happens, and for how many milliseconds the node is avoided after it.
    let cases: [(&[Outcome], u64); 13] = [
        (&[Failed], 500),
        (&[Slow], 2000),
        (&[Late], 10_000),
        (&[Slow, Failed], 1000),
        (&[Slow, Slow], 4000),
        (&[Failed; 9], 30_000),
        (&[Failed, Failed, answered(1), Failed], 500),
        (&[Lacked, Lacked], 0),
        (&[Lacked; 3], 1000),
        (&[Lacked; 4], 2000),
        (&[Lacked, Lacked, answered(1), Lacked], 0),
        (&[Lied], 60_000),
        (&[Lied, answered(1), Lied], 120_000),
    ];
    let check = |outcomes: &[Outcome], ms: u64| {
        let mut scores = Scores::default();
        let mut now = clock::now();
        for outcome in outcomes {
            now += Duration::from_secs(700);
            scores.observe(&id("r1"), *outcome, now);
        }
        let after = |ms| scores.is_avoided(&id("r1"), now + Duration::from_millis(ms));
        assert!(!after(ms), "{outcomes:?}");
        assert!(ms == 0 || after(ms - 1), "{outcomes:?}");
    };
    for (outcomes, ms) in cases {
        check(outcomes, ms);
    }
    check(&[Lied; 9], 600_000);
}

#[test]
fn what_fails_together_is_one_misfortune() {
    let mut scores = Scores::default();
    let now = clock::now();
    for _ in 0..20 {
        scores.observe(&id("r1"), Outcome::Slow, now);
    }
    let avoided =
        |scores: &Scores, ms| scores.is_avoided(&id("r1"), now + Duration::from_millis(ms));
    assert!(avoided(&scores, 1999) && !avoided(&scores, 2000));
    let again = now + Duration::from_secs(2);
    scores.observe(&id("r1"), Outcome::Slow, again);
    scores.observe(&id("r1"), Outcome::Slow, again);
    assert!(avoided(&scores, 5999) && !avoided(&scores, 6000));
}

#[test]
fn doubt_ends_with_an_answer_or_once_with_a_probe() {
    use Outcome::{Failed, Late, Lied, Reached, Slow};
    // What happens at one moment, and whether the node is avoided and doubted after it.
    let cases: [(&[Outcome], bool, bool); 8] = [
        (&[Late], true, true),
        (&[Late, answered(1)], false, false),
        (&[Late, Reached], false, false),
        (&[Slow, Slow, Reached], false, false),
        (&[Slow, Reached, Slow], true, true),
        (&[Slow, Reached, Slow, Reached], true, true),
        (&[Failed, Reached], true, false),
        (&[Lied, Late, Reached], true, false),
    ];
    for (outcomes, avoided, doubted) in cases {
        let mut scores = Scores::default();
        let now = clock::now();
        for outcome in outcomes {
            scores.observe(&id("r1"), *outcome, now);
        }
        assert_eq!(scores.is_avoided(&id("r1"), now), avoided, "{outcomes:?}");
        let expected: &[NodeId] = if doubted { &[id("r1")] } else { &[] };
        assert_eq!(scores.doubted(now), expected, "{outcomes:?}");
        let much_later = now + Duration::from_secs(3600);
        assert_eq!(scores.doubted(much_later), [], "{outcomes:?}");
    }
}

#[test]
fn an_answer_does_not_shorten_the_pause_of_a_liar_and_time_forgives() {
    let mut scores = Scores::default();
    let now = clock::now();
    scores.observe(&id("r1"), Outcome::Lied, now);
    scores.observe(&id("r1"), answered(1), now);
    scores.observe(&id("r1"), Outcome::Failed, now);
    assert!(scores.is_avoided(&id("r1"), now + Duration::from_secs(59)));
    let much_later = now + LIES_REMEMBERED + Duration::from_secs(1);
    scores.observe(&id("r1"), Outcome::Lied, much_later);
    assert!(!scores.is_avoided(&id("r1"), much_later + Duration::from_secs(60)));
}

#[test]
fn hedges_after_the_95th_percentile_within_bounds() {
    let now = clock::now();
    let after = |latencies: &[u64]| {
        let mut scores = Scores::default();
        for ms in latencies {
            scores.observe(&id("r1"), answered(*ms), now);
        }
        scores.hedge_after(&id("r1"), now).as_millis()
    };
    let ramp: Vec<u64> = (1..=100).collect();
    let cases: [(&[u64], u128); 6] = [
        (&[], 250),
        (&[30; 7], 250),
        (&[30; 8], 30),
        (&[1; 20], 20),
        (&[60_000; 20], 2000),
        // The last twenty are 81 to 100.
        (&ramp, 99),
    ];
    for (latencies, ms) in cases {
        assert_eq!(after(latencies), ms, "{latencies:?}");
    }
}

#[test]
fn remembers_only_so_many_and_drops_the_longest_unused() {
    let mut scores = Scores::with_capacity(2);
    let now = clock::now();
    for name in ["r1", "r2", "r1", "r3"] {
        scores.observe(&id(name), Outcome::Failed, now);
    }
    assert_eq!(scores.len(), 2);
    let avoided = |name| scores.is_avoided(&id(name), now);
    assert!(avoided("r1") && !avoided("r2") && avoided("r3"));
}

proptest! {
    /// Whatever happened: the order is a part of the candidates, near before far, without who is avoided.
    #[test]
    fn an_order_is_near_first_and_complete(
        events in prop::collection::vec((0usize..8, 0u8..6, 0u64..50), 0..60),
        picked in prop::collection::vec(0usize..10, 0..12),
    ) {
        let names = ["r1", "r2", "r3", "r4", "z1", "z2", "e1", "me", "gone", "lost"];
        let view = view();
        let mut scores = Scores::with_capacity(6);
        let mut now = clock::now();
        for (node, what, ms) in events {
            let outcome = match what {
                0 => Outcome::Busy,
                1 => Outcome::Lacked,
                2 => Outcome::Failed,
                3 => Outcome::Lied,
                _ => answered(ms),
            };
            now += Duration::from_millis(ms * 20);
            scores.observe(&id(names[node]), outcome, now);
        }
        let mut candidates: Vec<NodeId> = picked.iter().map(|at| id(names[*at])).collect();
        let order = scores.order_named(&view, &candidates, now);
        let distances: Vec<_> = order.iter().map(|id| view.distance(view.node(id).unwrap())).collect();
        prop_assert!(distances.is_sorted());
        candidates.sort();
        candidates.dedup();
        candidates.retain(|id| *id != view.me.id && view.node(id).is_some() && !scores.is_avoided(id, now));
        let mut sorted = order.clone();
        sorted.sort();
        prop_assert_eq!(sorted, candidates);
        for id in &order {
            prop_assert!((HEDGE_MIN..=HEDGE_MAX).contains(&scores.hedge_after(id, now)));
        }
    }
}
