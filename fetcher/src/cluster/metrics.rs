// SPDX-License-Identifier: Apache-2.0
//! What the cluster side counts. A handle that is passed in; `docs/METRICS.md` is the list.

use std::collections::{BTreeMap, BTreeSet};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::node::View;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlaceLabels {
    zone: String,
    role: &'static str,
}

/// The most zones that are told apart: what names zones is a network that nobody guards.
const ZONES_MAX: usize = 64;
/// The zone of the others.
const OTHER_ZONE: &str = "(others)";

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct ClusterMetrics {
    nodes: Family<PlaceLabels, Gauge>,
    joins: Counter,
    leaves: Counter,
    gossip_failures: Counter,
    refusals: Family<ReasonLabel, Counter>,
    tls_reloads: Counter,
    tls_reload_failures: Counter,
}

impl ClusterMetrics {
    /// Counters that nobody exports yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "cluster_nodes",
            "Nodes believed to live",
            self.nodes.clone(),
        );
        registry.register("cluster_joins", "Nodes that came", self.joins.clone());
        registry.register("cluster_leaves", "Nodes that went", self.leaves.clone());
        registry.register(
            "cluster_gossip_failures",
            "Times that gossip had to begin anew",
            self.gossip_failures.clone(),
        );
        registry.register(
            "peer_refusals",
            "Connections of peers that were refused",
            self.refusals.clone(),
        );
        registry.register(
            "peer_tls_reloads",
            "Times that new TLS files were taken",
            self.tls_reloads.clone(),
        );
        registry.register(
            "peer_tls_reload_failures",
            "Times that new TLS files were no good",
            self.tls_reload_failures.clone(),
        );
    }

    /// Counts the nodes of a view, and how many came and went with it.
    pub(super) fn know(&self, view: &View, joined: usize, left: usize) {
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        self.joins.inc_by(count(joined));
        self.leaves.inc_by(count(left));
        let mut places: BTreeMap<(&str, &'static str), i64> = BTreeMap::new();
        for node in std::iter::once(&view.me).chain(&view.others) {
            *places.entry((&node.zone, node.role.as_str())).or_default() += 1;
        }
        let mut zones: BTreeSet<&str> = BTreeSet::from([view.me.zone.as_str()]);
        self.nodes.clear();
        for ((zone, role), nodes) in places {
            let told_apart = zones.contains(zone) || zones.len() < ZONES_MAX && zones.insert(zone);
            let zone = if told_apart { zone } else { OTHER_ZONE }.to_owned();
            self.nodes
                .get_or_create(&PlaceLabels { zone, role })
                .inc_by(nodes);
        }
    }

    /// Nodes that came, and nodes that went.
    #[must_use]
    pub fn moves(&self) -> (u64, u64) {
        (self.joins.get(), self.leaves.get())
    }

    pub(super) fn gossip_failed(&self) {
        self.gossip_failures.inc();
    }

    /// Times that gossip had to begin anew.
    #[must_use]
    pub fn gossip_failures(&self) -> u64 {
        self.gossip_failures.get()
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(super) fn reloaded(&self, well: bool) {
        if well {
            self.tls_reloads.inc();
        } else {
            self.tls_reload_failures.inc();
        }
    }

    /// Connections refused for `reason`: `network`, `handshake` or `deadline`.
    #[must_use]
    pub fn refusals(&self, reason: &'static str) -> u64 {
        self.refusals.get_or_create(&ReasonLabel { reason }).get()
    }

    /// Times that new TLS files were taken, and times that they were no good.
    #[must_use]
    pub fn tls_reloads(&self) -> (u64, u64) {
        (self.tls_reloads.get(), self.tls_reload_failures.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::node::{Node, NodeId, Role};

    #[test]
    fn nodes_are_counted_by_place_and_zones_are_bounded() {
        let node = |id: &str, zone: &str, role| Node {
            id: NodeId::parse(id).unwrap(),
            zone: zone.into(),
            rack: String::new(),
            role,
            address: ([10, 0, 0, 1], 1).into(),
            version: String::new(),
            protocol: 1,
            load: 0,
            free_slots: 1,
        };
        let metrics = ClusterMetrics::new();
        let mut registry = Registry::with_prefix("sluice");
        metrics.register(&mut registry);
        let text = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let mut view = View::alone(node("me", "z", Role::Node));
        view.others = vec![node("a", "z", Role::Node), node("b", "y", Role::Supernode)];
        metrics.know(&view, 2, 0);
        let shown = text();
        for line in [
            r#"sluice_cluster_nodes{zone="z",role="node"} 2"#,
            r#"sluice_cluster_nodes{zone="y",role="supernode"} 1"#,
            "sluice_cluster_joins_total 2",
            "sluice_cluster_leaves_total 0",
        ] {
            assert!(shown.contains(line), "{line} in {shown}");
        }
        view.others = (0..200)
            .map(|number| node("n", &format!("a{number}"), Role::Node))
            .collect();
        metrics.know(&view, 200, 2);
        let shown = text();
        assert!(!shown.contains(r#"zone="y""#));
        assert!(shown.contains(r#"sluice_cluster_nodes{zone="z",role="node"} 1"#));
        assert!(shown.contains(r#"sluice_cluster_nodes{zone="(others)",role="node"} 137"#));
        assert_eq!(
            shown.matches("sluice_cluster_nodes{").count(),
            ZONES_MAX + 1
        );
    }
}
