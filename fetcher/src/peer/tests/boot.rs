// SPDX-License-Identifier: Apache-2.0
//! Boot lists in a zone.

use sluice_blockindex::boot::{BootChunk, BootList};
use sluice_blockindex::digest::IndexDigest;
use sluice_proto::peer::BootListOffer;
use tonic::{Code, Status};

use super::super::lists::ListDesk;
use super::super::wire::WantedList;
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

/// A list of one chunk, and its key.
fn a_list(seed: &[u8]) -> (BootKey, Bytes) {
    let chunk = BootChunk { layer: 0, chunk: 1 };
    let list = BootList::new(vec![IndexDigest::of(seed)], vec![chunk]).unwrap();
    (list.key(), list.encode().into())
}

/// The numbers of the homes of a list, and of those that are none.
fn homes_of_list(nodes: &[TestNode], key: BootKey) -> (Vec<usize>, Vec<usize>) {
    let index = IndexDigest::from_bytes(*key.as_bytes());
    let homes = nodes[0].peers.object_homes(index);
    (0..nodes.len()).partition(|number| homes.contains(&nodes[*number].node.id))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_node_learns_is_had_by_all_that_know_the_key() {
    let layer = six_pieces();
    let nodes = zone(5, &layer, &patient()).await;
    let (key, list) = a_list(b"layer");
    let (homes, others) = homes_of_list(&nodes, key);
    assert_eq!((homes.len(), others.len()), (2, 3));
    let [teller, asker, third] = others[..] else {
        panic!("three others");
    };
    let ask = |node: usize, key| {
        let peers = &nodes[node].peers;
        async move {
            let found = tokio::time::timeout(60 * SECOND, peers.boot_list(key)).await;
            found.unwrap()
        }
    };
    assert_eq!(ask(asker, key).await, None);
    let taken = nodes[teller].peers.offer_boot_list(key, list.clone()).await;
    assert_eq!(taken, 2);
    for home in &homes {
        let known = lock(&nodes[*home].lists).get(&key).cloned().unwrap();
        assert_eq!((known.node, known.list), (id(teller), list.clone()));
    }
    assert!(lock(&nodes[third].lists).is_empty());
    let given = ask(asker, key).await.unwrap();
    assert!(homes.iter().any(|home| id(*home) == given.node));
    assert_eq!(given.list, list);
    // One home that says nonsense, or has another list, does not hide what the other has.
    for nonsense in [Bytes::from_static(b"nonsense"), a_list(b"other").1] {
        let told = OfferedList {
            list: nonsense,
            ..OfferedList::clone(&lock(&nodes[homes[0]].lists)[&key])
        };
        lock(&nodes[homes[0]].lists).insert(key, told);
        assert_eq!(ask(asker, key).await.unwrap().node, id(homes[1]));
    }
    // A home has it from the other home, should it have lost it.
    lock(&nodes[homes[0]].lists).clear();
    let given = ask(homes[0], key).await.unwrap();
    assert_eq!(given.node, id(homes[1]));
    assert_eq!(ask(asker, BootKey::from_bytes([8; 32])).await, None);

    // A home that died is not missed.
    nodes[homes[0]].crash().await;
    assert_eq!(ask(asker, key).await.unwrap().node, id(homes[1]));
    let taken = nodes[asker].peers.offer_boot_list(key, list).await;
    assert_eq!(taken, 1);
    nodes[homes[1]].crash().await;
    assert_eq!(ask(asker, key).await, None);
}

#[tokio::test(start_paused = true)]
async fn lists_are_taken_at_a_bounded_rate_and_by_homes_only() {
    let address = ([127, 0, 0, 1], 1).into();
    let both = [node(0, address), node(1, address)];
    let (view, seen) = watch::channel(view_of(&both, 0));
    let peers = Peers::new(PeerOptions::default(), seen, plain());
    let shelf = TestShelf::default();
    let lists = Arc::clone(&shelf.lists);
    let shelf: Arc<dyn Shelf> = Arc::new(shelf);
    let desk = ListDesk::new();
    let offer = || BootListOffer {
        node: "node-1".into(),
        key: Bytes::copy_from_slice(&[4; 32]),
        list: Bytes::from_static(b"a list"),
    };
    let mut taken = 0;
    let refused: Status = loop {
        match desk.take(&peers, &shelf, offer()).await {
            Ok(_) => taken += 1,
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!((64..=65).contains(&taken), "{taken}");
    tokio::time::sleep(SECOND).await;
    assert!(desk.take(&peers, &shelf, offer()).await.is_ok());
    // Another home takes all: this node is none any more.
    let mut other = (*view_of(&both, 0)).clone();
    other.others[0].role = Role::Supernode;
    view.send_replace(Arc::new(other));
    tokio::time::sleep(60 * SECOND).await;
    lock(&lists).clear();
    let refused = desk.take(&peers, &shelf, offer()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(lock(&lists).is_empty());
    // Who asks gets what is here all the same, and nothing that is malformed.
    let key = BootKey::from_bytes([4; 32]);
    let offered = OfferedList::try_from(offer()).unwrap();
    lock(&lists).insert(key, offered);
    let wanted = WantedList { node: id(1), key };
    let reply = desk.find(&peers, &shelf, wanted.to_proto()).await.unwrap();
    assert_eq!(reply.list, offer().list);
    let mut malformed = wanted.to_proto();
    malformed.key.clear();
    let refused = desk.find(&peers, &shelf, malformed).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}
