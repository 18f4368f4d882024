// SPDX-License-Identifier: Apache-2.0
//! Blobs that nobody converted, among nodes: no frame goes round that cannot be decoded alone.

use super::*;
use crate::fixture::unmodified::{Unmodified, Written};
use crate::peer::wire::Form;

/// Nodes that all have the layer; those of `with_windows` its file of windows, too.
async fn nodes_of(made: &Unmodified, count: usize, with_windows: &[usize]) -> Vec<TestNode> {
    let nodes = zone(count, &made.layer, &patient()).await;
    for number in with_windows {
        let windows = Line::new("origin/windows", &made.windows);
        nodes[*number].layer.set_windows(Arc::new(windows));
    }
    nodes
}

fn no_frames(nodes: &[TestNode], made: &Unmodified) {
    for node in nodes {
        for chunk in made.layer.chunks.chunks().flatten() {
            let kept = node.peers.frames.get(&chunk.digest);
            assert!(!matches!(kept, Some((Form::Frame, _))), "{chunk:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_on_four_nodes_cost_the_origin_one_of_any_blob() {
    for written in Written::RANDOM {
        let made = Unmodified::new(30, written, 6 << 20);
        let nodes = nodes_of(&made, 4, &[0, 1, 2, 3]).await;
        all(nodes.iter().map(TestNode::read_all)).await;
        nodes.iter().for_each(|node| check_all(node, &made.layer));
        no_frames(&nodes, &made);
        let egress = egress_percent(&nodes, &made.layer);
        assert!((99..200).contains(&egress), "{written:?}: {egress}");
        let peers: u64 = nodes.iter().map(TestNode::peer_bytes).sum();
        assert!(peers > made.layer.blob.len() as u64, "{written:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_without_windows_says_so_and_the_asker_has_its_own() {
    let made = Unmodified::new(31, Written::Gzip, 6 << 20);
    let nodes = nodes_of(&made, 2, &[1]).await;
    // In the middle of a piece of the other's, which has nothing.
    let count = made.layer.chunks.count();
    let of_other = (2..count).find(|it| {
        let chunk = made.layer.chunks.chunk(*it).unwrap();
        let begins = |it: u32| home_of(&nodes, &made.layer, it, 0) == 0;
        chunk.skip_bytes == 0 && begins(*it) && begins(*it - 1)
    });
    let chunk = made.layer.chunks.chunk(of_other.unwrap()).unwrap();
    nodes[1].read(chunk.device).await;
    assert!(nodes[1].layer.device().is_present(chunk.ordinal));
    assert!(!nodes[0].layer.device().is_present(chunk.ordinal));
    assert_eq!(nodes[1].peer_bytes(), 0);
    // And who has no windows asks who has.
    all(nodes.iter().map(TestNode::complete)).await;
    nodes.iter().for_each(|node| check_all(node, &made.layer));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_home_passes_over_a_long_frame_for_all() {
    let made = Unmodified::one_frame(32);
    let nodes = nodes_of(&made, 3, &[]).await;
    all(nodes.iter().map(TestNode::complete)).await;
    nodes.iter().for_each(|node| check_all(node, &made.layer));
    no_frames(&nodes, &made);
    let egress = egress_percent(&nodes, &made.layer);
    assert!((99..150).contains(&egress), "{egress}");
    let home = home_of_stream(&nodes, &made);
    assert!(nodes[home].line.sent_bytes() as u64 >= made.layer.chunks.frames_bytes());
}

fn home_of_stream(nodes: &[TestNode], made: &Unmodified) -> usize {
    let last = made.layer.chunks.chunk(made.layer.chunks.count() - 1);
    let piece = nodes[0].layer.piece(&last.unwrap());
    assert_eq!(piece.number, 0);
    home_of(nodes, &made.layer, 0, 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_give_each_other_chunks_whose_padding_no_digest_covers() {
    use crate::fixture::contents::{estargz, zstd_chunked};
    let sizes: Vec<usize> = (0..40).map(|number| 50_000 + number * 777).collect();
    for layer in [estargz(33, &sizes), zstd_chunked(33, &sizes)] {
        let made = Unmodified {
            layer,
            windows: Vec::new(),
        };
        let nodes = nodes_of(&made, 3, &[]).await;
        all(nodes.iter().map(TestNode::read_all)).await;
        nodes.iter().for_each(|node| check_all(node, &made.layer));
        no_frames(&nodes, &made);
        let peers: u64 = nodes.iter().map(TestNode::peer_bytes).sum();
        assert!(peers > made.layer.blob.len() as u64, "{peers}");
    }
}
