// SPDX-License-Identifier: Apache-2.0
//! Who is in the cluster.

use sluice_fetcher::cluster::node::{Node, View};
use sluice_proto::control::{ClusterNode, NodesResponse};

/// How far a node is from itself.
const SELF: &str = "self";

/// The nodes of a view, the node itself first, then the nearest; none without a cluster.
pub(super) fn nodes_of(view: Option<&View>) -> NodesResponse {
    let Some(view) = view else {
        return NodesResponse::default();
    };
    let mut others: Vec<&Node> = view.others.iter().collect();
    // Stable: those of one distance stay sorted by name.
    others.sort_by_key(|node| view.distance(node));
    let others = others
        .into_iter()
        .map(|node| node_of(node, view.distance(node).as_str()));
    NodesResponse {
        clustered: true,
        nodes: std::iter::once(node_of(&view.me, SELF))
            .chain(others)
            .collect(),
    }
}

fn node_of(node: &Node, distance: &str) -> ClusterNode {
    ClusterNode {
        name: node.id.to_string(),
        zone: node.zone.clone(),
        rack: node.rack.clone(),
        role: node.role.as_str().to_owned(),
        address: node.address.to_string(),
        version: node.version.clone(),
        protocol: node.protocol,
        load_percent: node.load.into(),
        free_slots: node.free_slots.into(),
        distance: distance.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use sluice_fetcher::cluster::node::{NodeId, Role};

    use super::*;

    fn node(id: &str, zone: &str, rack: &str) -> Node {
        Node {
            id: NodeId::parse(id).unwrap(),
            zone: zone.into(),
            rack: rack.into(),
            role: Role::Supernode,
            address: ([10, 0, 0, 1], 9641).into(),
            version: "0.1.0".into(),
            protocol: 1,
            load: 37,
            free_slots: 5,
        }
    }

    #[test]
    fn the_nearest_come_first() {
        assert_eq!(nodes_of(None), NodesResponse::default());
        let view = View {
            me: node("m", "z", "r"),
            others: vec![
                node("a", "y", "r"),
                node("b", "z", "s"),
                node("c", "z", "r"),
                node("d", "z", ""),
                node("e", "z", "r"),
            ],
        };
        let answer = nodes_of(Some(&view));
        assert!(answer.clustered);
        let shown = answer
            .nodes
            .iter()
            .map(|node| format!("{} {}", node.name, node.distance));
        let shown: Vec<_> = shown.collect();
        let expected = [
            "m self",
            "c rack",
            "e rack",
            "b zone",
            "d zone",
            "a elsewhere",
        ];
        assert_eq!(shown, expected);
        assert_eq!(
            answer.nodes[0],
            ClusterNode {
                name: "m".into(),
                zone: "z".into(),
                rack: "r".into(),
                role: "supernode".into(),
                address: "10.0.0.1:9641".into(),
                version: "0.1.0".into(),
                protocol: 1,
                load_percent: 37,
                free_slots: 5,
                distance: "self".into(),
            }
        );
    }
}
