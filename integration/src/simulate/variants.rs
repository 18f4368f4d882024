// SPDX-License-Identifier: Apache-2.0
//! Other policies, other fates: what the defaults are compared with.

use super::scenario::{BackgroundOrder, Links, Scenario};

/// A scenario of 1,000 nodes, and what becomes of it when one thing is different.
#[must_use]
pub fn of(base: &Scenario) -> Vec<(&'static str, Scenario)> {
    let mut all = Vec::new();
    let mut with = |name, change: fn(&mut Scenario)| {
        let mut scenario = Scenario {
            nodes: 1000,
            ..base.clone()
        };
        change(&mut scenario);
        all.push((name, scenario));
    };
    with("as above", |_| {});
    with("starts spread over 1 s", |it| it.stagger_ms = 1000.0);
    with("degree 1", |it| it.policy.fanout = 1);
    with("degree 4", |it| it.policy.fanout = 4);
    with("degree 16: slots only", |it| it.policy.fanout = 16);
    with("named only when they have all", |it| {
        it.policy.name_receiving = false;
    });
    with("100 Mbit/s", slow);
    with("100 Mbit/s, degree 4", |it| {
        slow(it);
        it.policy.fanout = 4;
    });
    with("100 Mbit/s, degree 16", |it| {
        slow(it);
        it.policy.fanout = 16;
    });
    with("10 Gbit/s", |it| {
        it.links.down_mbit = 10_000.0;
        it.links.up_mbit = 10_000.0;
        it.links.registry_mbit = 10_000.0;
    });
    with("background in one order", |it| {
        it.policy.background_order = BackgroundOrder::Same;
    });
    with("boot list, 16 at once", |it| it.image.boot_window = 16);
    with("4 supernodes of 10 Gbit/s", |it| it.supernodes = 4);
    with("4 zones", |it| it.zones = 4);
    with("origin budget 25 MB/s", |it| it.policy.origin = 25_000_000);
    with("5 % of the daemons killed", |it| it.failures.killed = 0.05);
    with("1 % of the hosts lost", |it| {
        it.failures.killed = 0.01;
        it.failures.silent = true;
    });
    with("5 % of the nodes slow", |it| it.failures.slow = 0.05);
    with("the same, no hedging", |it| {
        it.failures.slow = 0.05;
        it.policy.hedge = false;
    });
    all
}

fn slow(scenario: &mut Scenario) {
    scenario.links = Links {
        down_mbit: 100.0,
        up_mbit: 100.0,
        ..scenario.links.clone()
    };
}
