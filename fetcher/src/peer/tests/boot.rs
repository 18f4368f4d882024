// SPDX-License-Identifier: Apache-2.0
//! Boot lists in a zone.

use super::*;
use crate::boot::BootRead;

#[tokio::test(flavor = "multi_thread")]
async fn the_same_boot_list_on_all_nodes_costs_the_origin_one() {
    let layer = six_pieces();
    let nodes = zone(4, &layer, &patient()).await;
    // Half of every piece, from the back.
    let chunks = (0..96).rev().filter(|chunk| chunk % 16 < 8);
    let list: Vec<BootRead> = chunks.map(|chunk| BootRead { layer: 0, chunk }).collect();
    let burst = |node: &TestNode| {
        let layers = [Arc::clone(&node.layer)];
        node.fetcher.load_boot_list(&layers, &list).join()
    };
    let brought = tokio::time::timeout(60 * SECOND, all(nodes.iter().map(burst))).await;
    brought.unwrap();
    for node in &nodes {
        let lacking = list
            .iter()
            .filter(|it| !node.layer.device().is_present(it.chunk));
        assert_eq!(lacking.count(), 0);
    }
    let frames = list.iter().map(|it| layer.chunks.chunk(it.chunk).unwrap());
    let listed: u64 = frames.map(|chunk| chunk.blob.len()).sum();
    let sent: usize = nodes.iter().map(|node| node.line.sent_bytes()).sum();
    assert!((sent as u64) < listed * 5 / 4, "{sent} of {listed}");
    for (number, node) in nodes.iter().enumerate() {
        let is_home = |it: &BootRead| home_of(&nodes, &layer, it.chunk, 0) == number;
        let of_others = list.iter().filter(|it| !is_home(it)).count();
        assert_eq!(node.peer_bytes() > 0, of_others > 0, "node {number}");
    }
}
