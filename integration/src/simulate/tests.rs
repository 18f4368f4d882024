// SPDX-License-Identifier: Apache-2.0
//! What the policy promises, in numbers.

use super::figures::Figures;
use super::scenario::{Failures, Image, Links, Policy, Scenario};
use super::world::World;

fn run(change: impl FnOnce(&mut Scenario)) -> Figures {
    let mut scenario = Scenario::default();
    change(&mut scenario);
    let figures = World::new(scenario.clone()).run();
    assert_eq!(figures.unfinished, 0, "{scenario:?}");
    figures
}

fn start_only(scenario: &mut Scenario) {
    scenario.image.background = false;
}

fn slow_lines(scenario: &mut Scenario) {
    start_only(scenario);
    scenario.links.down_mbit = 100.0;
    scenario.links.up_mbit = 100.0;
}

#[test]
fn a_seed_decides_everything() {
    let with = |seed| {
        run(|scenario| {
            scenario.seed = seed;
            scenario.nodes = 60;
            scenario.failures.killed = 0.1;
        })
    };
    assert_eq!(with(1), with(1));
    assert_ne!(with(1), with(2));
}

#[test]
fn egress_is_flat_and_starts_grow_no_faster_than_the_logarithm() {
    let by_nodes = [1, 10, 100, 1000].map(|nodes| run(|scenario| scenario.nodes = nodes));
    for figures in &by_nodes {
        assert!((0.99..1.1).contains(&figures.images), "{figures:?}");
        assert!((0.99..1.05).contains(&figures.starts), "{figures:?}");
    }
    let [lone, ten, hundred, thousand] = by_nodes.map(|figures| figures.start.max);
    assert!(thousand < 1.1 * lone, "{thousand} s, alone {lone} s");
    // A difference below 2 % of a start is nothing to draw a line through.
    let slope = (hundred - ten).max(0.02 * lone);
    assert!(
        thousand - hundred < 1.5 * slope,
        "{ten}, {hundred}, {thousand}"
    );
}

#[test]
fn eight_nodes_on_slow_lines_start_as_one_does() {
    let start = |nodes, fanout| {
        let figures = run(|scenario| {
            slow_lines(scenario);
            scenario.nodes = nodes;
            scenario.policy.fanout = fanout;
        });
        figures.start.max
    };
    let fanout = Policy::default().fanout;
    let lone = start(1, fanout);
    assert!(start(8, fanout) < 1.15 * lone);
    // All slots for one thing: what the degree of the tree is for.
    assert!(start(8, 16) > 1.3 * lone);
}

#[test]
fn those_that_still_receive_have_to_be_named() {
    let start = |name_receiving| {
        let figures = run(|scenario| {
            slow_lines(scenario);
            scenario.nodes = 100;
            scenario.policy.name_receiving = name_receiving;
        });
        figures.start.max
    };
    assert!(start(false) > 1.3 * start(true));
}

#[test]
fn two_requests_find_a_place_in_the_tree() {
    let figures = run(|scenario| {
        start_only(scenario);
        scenario.nodes = 300;
    });
    let asked = figures.asked_per_fetch();
    assert!((1.5..2.6).contains(&asked), "{asked} requests per fetch");
}

#[test]
fn nodes_that_die_cost_what_they_had_in_flight() {
    for silent in [false, true] {
        let figures = run(|scenario| {
            scenario.nodes = 200;
            scenario.failures = Failures {
                killed: 0.1,
                silent,
                ..Failures::default()
            };
        });
        assert!(figures.counts.lost > 0, "{figures:?}");
        assert!(figures.images < 1.05, "{figures:?}");
        // A process that dies is refused at once, a host that dies is given up after three seconds.
        let most = if silent { 20.0 } else { 4.2 };
        assert!(figures.start.max < most, "{figures:?}");
    }
}

#[test]
fn containers_of_a_host_share_its_store() {
    let figures = run(|scenario| {
        start_only(scenario);
        scenario.nodes = 50;
        scenario.containers = 10;
    });
    let received = figures.sent_mean + figures.egress_start / 50;
    let start = Image::default().start_bytes;
    assert!(received < start * 101 / 100, "{figures:?}");
    assert!(figures.starts < 1.01, "{figures:?}");
}

#[test]
fn zones_fetch_once_each_and_supernodes_for_all() {
    let figures = run(|scenario| {
        scenario.nodes = 90;
        scenario.zones = 3;
    });
    assert!((2.9..3.1).contains(&figures.images), "{figures:?}");
    let figures = run(|scenario| {
        scenario.nodes = 50;
        scenario.supernodes = 2;
    });
    assert!((0.99..1.01).contains(&figures.images), "{figures:?}");
    // What a supernode fetches is not what the 50 nodes fetch.
    assert_eq!(
        figures.counts.origin,
        u64::from(Image::default().requests) + 133
    );
}

#[test]
fn an_origin_budget_is_kept() {
    // 2 MB/s for the zone; what nodes may take at once is little here.
    let figures = run(|scenario| {
        start_only(scenario);
        scenario.nodes = 10;
        scenario.policy.origin = 2_000_000;
        scenario.policy.origin_burst = 256 << 10;
    });
    let seconds = (figures.egress - 10 * (256 << 10)) as f64 / 2e6;
    assert!(figures.start.max > seconds, "{figures:?}");
    // The homes' shares are used one after the other, so it takes longer than one budget would.
    assert!(figures.start.max < 10.0 * seconds, "{figures:?}");
}

#[test]
fn hedges_stay_within_their_budget() {
    let figures = run(|scenario| {
        start_only(scenario);
        scenario.nodes = 100;
        scenario.failures.slow = 0.1;
    });
    let counts = figures.counts;
    assert!(counts.hedged > 0, "{counts:?}");
    // 5 % of the requests, and 8 that each node has saved.
    assert!(
        counts.hedged * 100 < counts.asked * 5 + 100 * 8 * 100,
        "{counts:?}"
    );
    assert!(figures.starts < 1.01, "{figures:?}");
}

#[test]
fn a_scenario_can_be_written_down() {
    let text =
        r#"{"nodes": 7, "links": {"up_mbit": 5.0}, "policy": {"background_order": "shuffled"}}"#;
    let scenario: Scenario = serde_json::from_str(text).unwrap();
    assert_eq!((scenario.nodes, scenario.links.up_mbit), (7, 5.0));
    assert_eq!(scenario.links.down_mbit, Links::default().down_mbit);
    assert!(serde_json::from_str::<Scenario>(r#"{"node": 7}"#).is_err());
}
