// SPDX-License-Identifier: Apache-2.0
//! Zones that share what they fetch: what they cost the origin and each other, and that nobody waits in a
//! circle.

use super::*;
use crate::cluster::home::SharedZones;

/// Puts the nodes into zones; all know of it.
fn deal(nodes: &[TestNode], zone_of: impl Fn(usize) -> &'static str) {
    let everyone: Vec<Node> = nodes
        .iter()
        .enumerate()
        .map(|(number, it)| Node {
            zone: zone_of(number).into(),
            ..it.node.clone()
        })
        .collect();
    for (number, node) in nodes.iter().enumerate() {
        node.view.send_replace(view_of(&everyone, number));
    }
}

fn east_or_west(number: usize) -> &'static str {
    ["east", "west"][number % 2]
}

fn sharing(options: PeerOptions) -> PeerOptions {
    PeerOptions {
        shared_zones: SharedZones::All,
        ..options
    }
}

fn bytes_from(nodes: &[TestNode], kind: SourceKind) -> u64 {
    let metrics = nodes.iter().map(|node| node.fetcher.metrics());
    metrics
        .map(|it| it.fetched_bytes(kind, Priority::Background))
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn zones_that_share_cost_the_origin_one_and_each_other_half() {
    let layer = six_pieces();
    let nodes = zone(8, &layer, &sharing(patient())).await;
    deal(&nodes, east_or_west);
    all(nodes.iter().map(TestNode::complete)).await;
    nodes.iter().for_each(|node| check_all(node, &layer));
    let egress = egress_percent(&nodes, &layer);
    assert!((100..120).contains(&egress), "{egress}");
    // Each piece crosses from the zone of its home to the other once.
    let frames = layer.chunks.frames_bytes();
    let crossed = bytes_from(&nodes, SourceKind::OtherZone);
    assert!(
        (frames..frames * 5 / 4).contains(&crossed),
        "{crossed} of {frames}"
    );
    assert!(bytes_from(&nodes, SourceKind::Peer) > 4 * frames);
}

#[tokio::test(flavor = "multi_thread")]
async fn zones_that_do_not_share_cost_the_origin_one_each() {
    let layer = six_pieces();
    let nodes = zone(4, &layer, &patient()).await;
    deal(&nodes, east_or_west);
    all(nodes.iter().map(TestNode::complete)).await;
    let egress = egress_percent(&nodes, &layer);
    assert!((200..230).contains(&egress), "{egress}");
    assert_eq!(bytes_from(&nodes, SourceKind::OtherZone), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_is_gone_costs_the_other_no_reader() {
    let layer = six_pieces();
    let nodes = zone(4, &layer, &sharing(PeerOptions::default())).await;
    deal(&nodes, east_or_west);
    for west in [1, 3] {
        nodes[west].crash().await;
    }
    let begun = std::time::Instant::now();
    all([0, 2].map(|east| nodes[east].read_all())).await;
    assert!(begun.elapsed() < 30 * SECOND, "{:?}", begun.elapsed());
    for east in [0, 2] {
        check_all(&nodes[east], &layer);
    }
    let egress = egress_percent(&nodes, &layer);
    assert!((100..200).contains(&egress), "{egress}");
}

/// East believes that west is the home of all; west believes that of east, where it is so.
#[tokio::test(flavor = "multi_thread")]
async fn two_zones_that_take_each_other_for_the_home_do_not_wait_for_each_other() {
    let layer = six_pieces();
    let nodes = zone(2, &layer, &sharing(patient())).await;
    deal(&nodes, east_or_west);
    let pieces: Vec<PieceKey> = (0..6)
        .map(|number| PieceKey {
            index: layer.key.index,
            number,
        })
        .collect();
    // In east's view its zone has a supernode, which is not there and weighs less than west for all pieces.
    let view = (*nodes[0].peers.view()).clone();
    let with = |name: String| -> View {
        let mut view = view.clone();
        view.others.push(Node {
            id: NodeId::parse(&name).unwrap(),
            role: Role::Supernode,
            address: ([127, 0, 0, 1], 1).into(),
            ..view.me.clone()
        });
        view
    };
    let fits = |view: &View| {
        let of = |piece| {
            crate::cluster::home::far_homes(view, &SharedZones::All, piece, HomeLimit::NONE, 1)
        };
        pieces.iter().all(|piece| !of(piece).is_empty())
    };
    let mut views = (0..10_000).map(|number| with(format!("gone-{number}")));
    let view = views.find(fits).unwrap();
    nodes[0].view.send_replace(Arc::new(view));
    let begun = std::time::Instant::now();
    all(nodes.iter().map(TestNode::read_all)).await;
    assert!(begun.elapsed() < 30 * SECOND, "{:?}", begun.elapsed());
    nodes.iter().for_each(|node| check_all(node, &layer));
    assert!(egress_percent(&nodes, &layer) <= 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_of_the_own_zone_is_asked_on_behalf_of_a_node() {
    let layer = six_pieces();
    let nodes = zone(3, &layer, &sharing(patient())).await;
    deal(&nodes, |number| ["east", "east", "west"][number]);
    let peers = &nodes[0].peers;
    assert_eq!(peers.reach_for(&id(1)), Reach::OtherZones);
    assert_eq!(peers.reach_for(&id(2)), Reach::Origin);
    assert_eq!(
        peers.reach_for(&NodeId::parse("stranger").unwrap()),
        Reach::Origin
    );
    for number in 0..6 {
        let piece = PieceKey {
            index: layer.key.index,
            number,
        };
        let beyond = peers.givers_of(&piece, Reach::OtherZones);
        assert!(!beyond.contains(&id(1)), "{beyond:?}");
        assert_eq!(peers.givers_of(&piece, Reach::Origin), [id(0)]);
    }
    let alone = zone(2, &layer, &patient()).await;
    assert_eq!(
        alone[0].peers.reach_for(&id(1)),
        Reach::Origin,
        "nothing is shared"
    );
}
