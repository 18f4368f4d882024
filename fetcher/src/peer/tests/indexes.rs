// SPDX-License-Identifier: Apache-2.0
//! Indexes of blobs that nobody converted, in a zone.

use std::collections::BTreeSet;

use futures::StreamExt as _;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};
use tonic::Code;

use super::super::indexes::IndexDesk;
use super::super::wire::{IndexSizes, OfferedIndex};
use super::*;
use crate::source::SourceError;

/// Indexes that a node has, and what it was told of others'.
#[derive(Debug)]
pub(super) struct TestIndexes {
    held: Mutex<HashMap<BlobDigest, (Bytes, Bytes)>>,
    told: Mutex<Vec<OfferedIndex>>,
    asked: Mutex<u32>,
    /// Bytes are given while it is true.
    open: watch::Sender<bool>,
}

impl Default for TestIndexes {
    fn default() -> Self {
        Self {
            held: Mutex::default(),
            told: Mutex::default(),
            asked: Mutex::default(),
            open: watch::Sender::new(true),
        }
    }
}

fn sizes_of(payload: &Bytes, windows: &Bytes) -> IndexSizes {
    IndexSizes {
        index_bytes: payload.len() as u64,
        windows_bytes: windows.len() as u64,
    }
}

#[async_trait]
impl IndexShelf for TestIndexes {
    async fn blob_index(&self, blob: BlobDigest) -> Result<HeldIndex, Refused> {
        *lock(&self.asked) += 1;
        let held = lock(&self.held).get(&blob).cloned();
        let (payload, windows) = held.ok_or(Refused::NotHere)?;
        let mut open = self.open.subscribe();
        let sizes = sizes_of(&payload, &windows);
        let bytes = [payload, windows].into_iter().filter(|it| !it.is_empty());
        let body = async move {
            open.wait_for(|open| *open).await.unwrap();
            futures::stream::iter(bytes.map(Ok::<_, SourceError>))
        };
        let body = futures::stream::once(body).flatten().boxed();
        Ok(HeldIndex { sizes, body })
    }

    async fn note_blob_index(&self, offered: OfferedIndex) -> Result<(), Refused> {
        lock(&self.told).push(offered);
        Ok(())
    }
}

/// The numbers of the homes of a blob's index, best first, and of those that are none.
fn homes_of_blob(nodes: &[TestNode], blob: BlobDigest) -> (Vec<usize>, Vec<usize>) {
    let homes = nodes[0]
        .peers
        .object_homes(IndexDigest::from_bytes(*blob.as_bytes()));
    let number = |home: &NodeId| nodes.iter().position(|it| it.node.id == *home).unwrap();
    let homes: Vec<usize> = homes.iter().map(number).collect();
    let others = (0..nodes.len()).filter(|it| !homes.contains(it));
    (homes.clone(), others.collect())
}

/// Asks the homes, and reads all that comes.
async fn ask(node: &TestNode, blob: BlobDigest, skip: &[usize]) -> Option<(NodeId, Vec<u8>)> {
    let skip: BTreeSet<NodeId> = skip.iter().copied().map(id).collect();
    let asked = async {
        let given = node.peers.blob_index(blob, false, &skip).await?;
        Some((given.node.clone(), read(given).await))
    };
    tokio::time::timeout(60 * SECOND, asked).await.unwrap()
}

async fn read(mut given: GivenIndex) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(part) = given.body.next().await {
        all.extend_from_slice(&part.unwrap());
    }
    assert_eq!(all.len() as u64, given.sizes.total_bytes());
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_had_of_the_homes_of_its_blob() {
    let layer = six_pieces();
    let nodes = zone(5, &layer, &patient()).await;
    let blob = BlobDigest::of(b"blob");
    let (homes, others) = homes_of_blob(&nodes, blob);
    let [maker, asker, third] = others[..] else {
        panic!("{others:?}");
    };
    // More than a message, and more than waits to be sent.
    let payload = Bytes::from(vec![1; 3 << 20]);
    let windows = Bytes::from(vec![2; (2 << 20) + 1]);
    let all = [&payload[..], &windows[..]].concat();
    assert_eq!(ask(&nodes[asker], blob, &[]).await, None);
    let held = (payload.clone(), windows.clone());
    lock(&nodes[maker].indexes.held).insert(blob, held.clone());
    // Nobody asks the maker, who is no home; but the homes are told, and may.
    assert_eq!(ask(&nodes[asker], blob, &[]).await, None);
    assert_eq!(*lock(&nodes[maker].indexes.asked), 0);
    let sizes = sizes_of(&payload, &windows);
    assert_eq!(nodes[maker].peers.offer_blob_index(blob, sizes).await, 2);
    for home in &homes {
        let node = id(maker);
        let told = OfferedIndex { node, blob, sizes };
        assert_eq!(*lock(&nodes[*home].indexes.told), [told]);
        let maker = id(maker);
        let given = nodes[*home].peers.blob_index_of(&maker, blob, true);
        assert_eq!(read(given.await.unwrap()).await, all);
    }
    assert!(lock(&nodes[third].indexes.told).is_empty());
    // One home has it: it is found, whichever of them that is.
    for home in &homes {
        lock(&nodes[*home].indexes.held).insert(blob, held.clone());
        let (node, bytes) = ask(&nodes[asker], blob, &[]).await.unwrap();
        assert_eq!((node, bytes == all), (id(*home), true));
        lock(&nodes[*home].indexes.held).clear();
    }
    // Who is to be passed over is; an index without windows is one.
    for home in &homes {
        lock(&nodes[*home].indexes.held).insert(blob, (payload.clone(), Bytes::new()));
    }
    let (node, bytes) = ask(&nodes[asker], blob, &homes[..1]).await.unwrap();
    assert_eq!((node, bytes == payload), (id(homes[1]), true));
    assert_eq!(ask(&nodes[asker], blob, &homes).await, None);
    // One that gave what is no index is left alone.
    nodes[asker].peers.index_was_false(&id(homes[0]));
    assert_eq!(ask(&nodes[asker], blob, &[]).await.unwrap().0, id(homes[1]));
    // Homes die.
    nodes[homes[0]].crash().await;
    assert_eq!(ask(&nodes[third], blob, &[]).await.unwrap().0, id(homes[1]));
    nodes[homes[1]].crash().await;
    assert_eq!(ask(&nodes[third], blob, &[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_a_busy_home_gets_it_from_one_that_has_it_since() {
    let layer = six_pieces();
    let nodes = zone(5, &layer, &patient()).await;
    let blob = BlobDigest::of(b"blob");
    let (homes, others) = homes_of_blob(&nodes, blob);
    let held = (Bytes::from(vec![1; 100_000]), Bytes::new());
    let home = &nodes[homes[0]];
    lock(&home.indexes.held).insert(blob, held.clone());
    home.indexes.open.send_replace(false);
    // Two are being served, and wait.
    let asks = |number: usize| ask(&nodes[number], blob, &homes[1..]);
    let (mut first, mut second) = (Box::pin(asks(others[0])), Box::pin(asks(others[1])));
    let mut third = Box::pin(asks(others[2]));
    let both = async { tokio::join!(&mut first, &mut second) };
    assert!(tokio::time::timeout(SECOND, both).await.is_err());
    assert!(tokio::time::timeout(SECOND, &mut third).await.is_err());
    // One of them has it from elsewhere: the third is sent to it, while the home is as busy as before.
    lock(&nodes[others[0]].indexes.held).insert(blob, held.clone());
    let (node, bytes) = third.await.unwrap();
    assert_eq!((node, bytes), (id(others[0]), held.0.to_vec()));
    home.indexes.open.send_replace(true);
    for waiting in [first, second] {
        assert_eq!(waiting.await.unwrap(), (id(homes[0]), held.0.to_vec()));
    }
}

#[tokio::test(start_paused = true)]
async fn indexes_are_offered_at_a_bounded_rate_to_homes_and_by_members_only() {
    let address = ([127, 0, 0, 1], 1).into();
    let both = [node(0, address), node(1, address)];
    let (view, seen) = watch::channel(view_of(&both, 0));
    let peers = Peers::new(PeerOptions::default(), seen, plain());
    let shelf = TestShelf::default();
    let indexes = Arc::clone(&shelf.indexes);
    let shelf: Arc<dyn Shelf> = Arc::new(shelf);
    let offer = |node: usize, windows_bytes: u64| {
        let sizes = IndexSizes {
            index_bytes: 1,
            windows_bytes,
        };
        let (node, blob) = (id(node), BlobDigest::of(b"blob"));
        OfferedIndex { node, blob, sizes }.to_proto()
    };
    // Small ones and large ones: each has a bound of its own.
    for (windows_bytes, expected) in [(0, 256..=257), (256 << 20, 4..=5)] {
        let desk = IndexDesk::new();
        let mut taken = 0;
        let refused = loop {
            match desk.take(&peers, &shelf, offer(1, windows_bytes)).await {
                Ok(_) => taken += 1,
                Err(status) => break status,
            }
        };
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(expected.contains(&taken), "{windows_bytes}: {taken}");
        assert_eq!(std::mem::take(&mut *lock(&indexes.told)).len(), taken);
        tokio::time::sleep(60 * SECOND).await;
        desk.take(&peers, &shelf, offer(1, 0)).await.unwrap();
        lock(&indexes.told).clear();
    }
    let desk = IndexDesk::new();
    let stranger = desk.take(&peers, &shelf, offer(2, 0)).await.unwrap_err();
    assert_eq!(stranger.code(), Code::FailedPrecondition);
    let mut wide = offer(1, 0);
    wide.sizes.as_mut().unwrap().index_bytes = u64::MAX;
    let wide = desk.take(&peers, &shelf, wide).await.unwrap_err();
    assert_eq!(wide.code(), Code::InvalidArgument);
    // Another home takes all: this node is none any more.
    let mut other = (*view_of(&both, 0)).clone();
    other.others[0].role = Role::Supernode;
    view.send_replace(Arc::new(other));
    let refused = desk.take(&peers, &shelf, offer(1, 0)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(lock(&indexes.told).is_empty());
}
