// SPDX-License-Identifier: Apache-2.0
//! Several nodes in one process, over loopback: who fetches what from the origin, and who survives what.

mod blobs;
mod boot;
mod hostile;
mod indexes;
mod prewarm;
mod unmodified;
mod zones;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::boot::BootKey;
use sluice_blockindex::extent::{DeviceSpace, Extent};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use self::indexes::TestIndexes;
use super::wire::{OfferedList, WantedLayer, WantedObject};
use super::*;
use crate::cluster::choice::Outcome;
use crate::cluster::home::{HomeLimit, PieceKey, homes};
use crate::cluster::node::{Node, NodeId, Role, View};
use crate::fixture::TestLayer;
use crate::fixture::line::{Line, Mishap};
use crate::metrics::Metrics;
use crate::scheduler::{Fetcher, FetcherOptions, LayerHandle};
use crate::source::{BlobSource, Priority, SourceKind};
use crate::store::{BootId, Store, StoreOptions, lock};

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

/// Opens the layers that a test gave it.
#[derive(Debug, Default)]
struct TestShelf {
    layers: Mutex<HashMap<[u8; 32], Arc<LayerHandle>>>,
    lists: TestLists,
    indexes: Arc<TestIndexes>,
}

/// Boot lists that a node has.
type TestLists = Arc<Mutex<HashMap<BootKey, OfferedList>>>;

#[async_trait]
impl Shelf for TestShelf {
    async fn layer(
        &self,
        wanted: &WantedLayer,
        _: &NodeId,
        _: bool,
    ) -> Result<Arc<LayerHandle>, Refused> {
        let layers = lock(&self.layers);
        layers
            .get(wanted.key.index.as_bytes())
            .cloned()
            .ok_or(Refused::NotHere)
    }

    async fn object(&self, _: &WantedObject) -> Result<Bytes, Refused> {
        Err(Refused::NotHere)
    }

    async fn boot_list(&self, key: BootKey) -> Result<Bytes, Refused> {
        let lists = lock(&self.lists);
        let known = lists.get(&key).map(|it| it.list.clone());
        known.ok_or(Refused::NotHere)
    }

    async fn take_boot_list(&self, offered: OfferedList) -> Result<(), Refused> {
        lock(&self.lists).insert(offered.key, offered);
        Ok(())
    }

    async fn prewarm(&self, wanted: WantedPrewarm) -> Result<Reports, Refused> {
        prewarm::reports(&wanted)
    }

    fn indexes(&self) -> Option<&dyn IndexShelf> {
        Some(&*self.indexes)
    }
}

struct TestNode {
    node: Node,
    fetcher: Fetcher,
    peers: Arc<Peers>,
    line: Line,
    layer: Arc<LayerHandle>,
    lists: TestLists,
    indexes: Arc<TestIndexes>,
    view: watch::Sender<Arc<View>>,
    server: JoinHandle<()>,
    stop: CancellationToken,
}

impl TestNode {
    /// As a crash: connections break, nobody answers any more.
    async fn crash(&self) {
        self.server.abort();
        self.stop.cancel();
        self.fetcher.shutdown().await;
    }

    async fn read(&self, extent: Extent<DeviceSpace>) {
        let filled =
            self.fetcher
                .fill(&self.layer, extent, Priority::Foreground, Some(60 * SECOND));
        filled.await.unwrap();
    }

    async fn read_all(&self) {
        let chunks = self.layer.chunks().chunks().flatten();
        for chunk in chunks.collect::<Vec<_>>() {
            self.read(chunk.device).await;
        }
    }

    async fn complete(&self) {
        let progress = self.fetcher.prefetch(vec![Arc::clone(&self.layer)]);
        let progress = tokio::time::timeout(60 * SECOND, progress.join()).await;
        assert_eq!(progress.unwrap().sealed_layers, 1);
    }

    fn peer_bytes(&self) -> u64 {
        self.layer.traffic().peer_bytes
    }
}

fn id(number: usize) -> NodeId {
    NodeId::parse(&format!("node-{number}")).unwrap()
}

fn node(number: usize, address: SocketAddr) -> Node {
    Node {
        id: id(number),
        zone: "zone".into(),
        rack: String::new(),
        role: Role::Node,
        address,
        version: "test".into(),
        protocol: PROTOCOL,
        load: 0,
        free_slots: 1,
    }
}

fn view_of(nodes: &[Node], me: usize) -> Arc<View> {
    let others = nodes.iter().enumerate().filter(|(number, _)| *number != me);
    Arc::new(View {
        me: nodes[me].clone(),
        others: others.map(|(_, node)| node.clone()).collect(),
    })
}

fn fetcher_options(stall: Duration) -> FetcherOptions {
    FetcherOptions {
        read_ahead_max_bytes: 0,
        stall,
        ..FetcherOptions::default()
    }
}

/// For tests that count what the origin sends: without a processor to spare nodes are silent for seconds, and
/// to leave them then is right, but not what is tested.
fn patient() -> PeerOptions {
    PeerOptions {
        silence: 60 * SECOND,
        hedge_floor: 60 * SECOND,
        ..PeerOptions::default()
    }
}

/// `count` nodes that all have the layer, each with a line of its own to the origin.
async fn zone(count: usize, layer: &TestLayer, options: &PeerOptions) -> Vec<TestNode> {
    zone_with(count, layer, options, |_, line| line).await
}

async fn zone_with(
    count: usize,
    layer: &TestLayer,
    options: &PeerOptions,
    line_of: impl Fn(usize, Line) -> Line,
) -> Vec<TestNode> {
    let mut listeners = Vec::new();
    let mut nodes = Vec::new();
    for number in 0..count {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        nodes.push(node(number, listener.local_addr().unwrap()));
        listeners.push(listener);
    }
    // As patient with chunks as with signs of life.
    let stall = options.silence + SECOND;
    let mut made = Vec::new();
    for (number, listener) in listeners.into_iter().enumerate() {
        let store = StoreOptions {
            boot: Some(BootId([1; 16])),
            reclaim: None,
        };
        let store = Arc::new(Store::in_memory(store).unwrap());
        let fetcher = Fetcher::new(fetcher_options(stall), store, Metrics::new());
        let (view, seen) = watch::channel(view_of(&nodes, number));
        let peers = Arc::new(Peers::new(options.clone(), seen, plain()));
        fetcher.attach_peers(Arc::clone(&peers));
        let line = line_of(number, Line::new("origin/app", &layer.blob));
        let source: Arc<dyn BlobSource> = Arc::new(line.clone());
        let handle = fetcher.add_layer(layer.spec(vec![source])).await.unwrap();
        let shelf = TestShelf::default();
        lock(&shelf.layers).insert(*layer.key.index.as_bytes(), Arc::clone(&handle));
        let (lists, indexes) = (Arc::clone(&shelf.lists), Arc::clone(&shelf.indexes));
        let stop = CancellationToken::new();
        let server = PeerServer::new(
            fetcher.clone(),
            Arc::clone(&peers),
            Arc::new(shelf),
            "test",
            stop.clone(),
        );
        let server = tokio::spawn(async move {
            server
                .serve(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        made.push(TestNode {
            node: nodes[number].clone(),
            fetcher,
            peers,
            line,
            layer: handle,
            lists,
            indexes,
            view,
            server,
            stop,
        });
    }
    made
}

/// Every present chunk has the right bytes, and all are present.
fn check_all(node: &TestNode, layer: &TestLayer) {
    for chunk in 0..layer.chunks.count() {
        assert!(node.layer.device().is_present(chunk), "{chunk}");
        let mut bytes = vec![0; layer.bytes_of(chunk).len()];
        let start = layer.chunks.chunk(chunk).unwrap().device.start();
        node.layer.device().read_at(start, &mut bytes).unwrap();
        assert!(bytes == layer.bytes_of(chunk), "chunk {chunk}");
    }
}

/// Bytes that the origin sent to all nodes, in percent of the frames of the layer.
fn egress_percent(nodes: &[TestNode], layer: &TestLayer) -> u64 {
    let sent: usize = nodes.iter().map(|node| node.line.sent_bytes()).sum();
    sent as u64 * 100 / layer.chunks.frames_bytes()
}

async fn all<T>(work: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    futures::future::join_all(work).await
}

/// The number of the node that is home of the piece of a chunk.
fn home_of(nodes: &[TestNode], layer: &TestLayer, chunk: u32, place: usize) -> usize {
    let chunk = layer.chunks.chunk(chunk).unwrap();
    let piece = PieceKey::of(layer.key.index, &chunk);
    let view = nodes[0].peers.view();
    let home = homes(&view, "zone", &piece, HomeLimit::NONE, place + 1)[place]
        .id
        .clone();
    nodes.iter().position(|it| it.node.id == home).unwrap()
}

/// 12 MiB in 96 chunks: six pieces.
fn six_pieces() -> TestLayer {
    TestLayer::even(7, 96, 128 << 10)
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_on_eight_nodes_cost_the_origin_one() {
    let layer = six_pieces();
    let nodes = zone(8, &layer, &patient()).await;
    all(nodes.iter().map(TestNode::read_all)).await;
    nodes.iter().for_each(|node| check_all(node, &layer));
    // A reader's patience with a busy home ends on a machine without a processor to spare.
    let egress = egress_percent(&nodes, &layer);
    assert!((100..200).contains(&egress), "{egress}");
}

#[tokio::test(flavor = "multi_thread")]
async fn completing_on_eight_nodes_costs_the_origin_one() {
    let layer = six_pieces();
    let nodes = zone(8, &layer, &patient()).await;
    all(nodes.iter().map(TestNode::complete)).await;
    nodes.iter().for_each(|node| check_all(node, &layer));
    let egress = egress_percent(&nodes, &layer);
    assert!((100..120).contains(&egress), "{egress}");
    // Frames are passed on as they came: the zone carries compressed bytes only.
    let served: u64 = nodes
        .iter()
        .map(|node| node.fetcher.metrics().served_bytes())
        .sum();
    let frames = layer.chunks.frames_bytes();
    assert!((6 * frames..=9 * frames).contains(&served), "{served}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_on_few_slots_spreads_as_a_tree() {
    let layer = six_pieces();
    let options = PeerOptions {
        upload_slots: 2,
        ..patient()
    };
    // Slow enough that uploads last, so that slots are taken.
    let nodes = zone_with(8, &layer, &options, |_, line| {
        line.pieces(16 << 10, 4 * MILLISECOND)
    })
    .await;
    let first = Extent::new(0, 2 << 20).unwrap();
    let background = |node: &TestNode| {
        let (fetcher, layer) = (node.fetcher.clone(), Arc::clone(&node.layer));
        async move {
            let filled = fetcher.fill(&layer, first, Priority::Background, Some(60 * SECOND));
            filled.await.unwrap();
        }
    };
    all(nodes.iter().map(background)).await;
    let sent: usize = nodes.iter().map(|node| node.line.sent_bytes()).sum();
    let of_piece: u64 = (0..16)
        .map(|it| layer.chunks.chunk(it).unwrap().blob.len())
        .sum();
    assert!((sent as u64) < of_piece * 5 / 4, "{sent} of {of_piece}");
    let busy: u64 = nodes
        .iter()
        .map(|it| it.fetcher.metrics().busy_answers())
        .sum();
    assert!(busy > 0);
    // Not the home alone served.
    let givers = nodes
        .iter()
        .filter(|it| it.fetcher.metrics().served_bytes() > 0)
        .count();
    assert!(givers > 1, "{givers}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_home_takes_over_when_the_first_dies() {
    let layer = six_pieces();
    let nodes = zone_with(4, &layer, &PeerOptions::default(), |_, line| {
        line.pieces(16 << 10, 10 * MILLISECOND)
    })
    .await;
    let (first, second) = (home_of(&nodes, &layer, 0, 0), home_of(&nodes, &layer, 0, 1));
    let reader = (0..4).find(|it| *it != first && *it != second).unwrap();
    let piece = Extent::new(0, 2 << 20).unwrap();
    let begun = std::time::Instant::now();
    let crash = async {
        tokio::time::sleep(300 * MILLISECOND).await;
        nodes[first].crash().await;
    };
    tokio::join!(nodes[reader].read(piece), crash);
    assert!(begun.elapsed() < 30 * SECOND, "{:?}", begun.elapsed());
    assert_eq!(nodes[reader].line.sent_bytes(), 0, "not itself");
    assert!(nodes[second].line.sent_bytes() > 0);
    // What the first had given was not fetched again.
    let of_piece: u64 = (0..16)
        .map(|it| layer.chunks.chunk(it).unwrap().blob.len())
        .sum();
    assert!((nodes[second].line.sent_bytes() as u64) < of_piece);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_silent_is_asked_again_once_a_probe_reached_it() {
    let layer = six_pieces();
    let nodes = zone(2, &layer, &patient()).await;
    let (peers, other) = (&nodes[0].peers, &nodes[1].node);
    assert!(peers.doubted().is_empty());
    peers.observe(&other.id, Outcome::Late);
    assert_eq!(peers.doubted(), std::slice::from_ref(other));
    assert!(peers.giver(&other.id).is_none(), "nobody is sent to it");
    peers.probe(other, 30 * SECOND).await.unwrap();
    assert!(peers.doubted().is_empty() && peers.giver(&other.id).is_some());
    // One that is not there stays in doubt.
    nodes[1].crash().await;
    peers.observe(&other.id, Outcome::Late);
    assert!(peers.probe(other, 30 * SECOND).await.is_err());
    assert_eq!(peers.doubted(), std::slice::from_ref(other));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_that_cannot_reach_the_origin_costs_no_reader() {
    let layer = six_pieces();
    let nodes = zone(3, &layer, &PeerOptions::default()).await;
    let first = home_of(&nodes, &layer, 0, 0);
    nodes[first].line.always(Some(Mishap::Refuse));
    let piece = Extent::new(0, 2 << 20).unwrap();
    // The home itself gets it from the second one, too.
    all(nodes.iter().map(|node| node.read(piece))).await;
    assert!(nodes[first].peer_bytes() > 0);
    assert_eq!(nodes[first].line.sent_bytes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_that_take_each_other_for_the_home_do_not_wait_for_each_other() {
    let layer = six_pieces();
    let nodes = zone(2, &layer, &patient()).await;
    let everyone: Vec<Node> = nodes.iter().map(|node| node.node.clone()).collect();
    // Each believes that only the other may be home.
    for (number, node) in nodes.iter().enumerate() {
        let mut view = (*view_of(&everyone, number)).clone();
        view.others[0].role = Role::Supernode;
        node.view.send_replace(Arc::new(view));
    }
    let begun = std::time::Instant::now();
    all(nodes.iter().map(TestNode::read_all)).await;
    assert!(begun.elapsed() < 30 * SECOND, "{:?}", begun.elapsed());
    nodes.iter().for_each(|node| check_all(node, &layer));
    // Each chunk is fetched by one of them, or at worst by both.
    assert!(egress_percent(&nodes, &layer) <= 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_know_the_digest_gets_nothing() {
    let layer = six_pieces();
    let nodes = zone(2, &layer, &PeerOptions::default()).await;
    nodes[0].read_all().await;
    let wanted = super::wire::WantedChunks {
        node: id(1),
        layer: WantedLayer {
            key: layer.key,
            blob: nodes[0].layer.blob(),
            blob_bytes: nodes[0].layer.blob_bytes(),
            places: crate::source::OriginSet::default(),
        },
        chunks: vec![super::wire::WantedChunk {
            ordinal: 0,
            digest: [7; 32],
        }],
        priority: Priority::Foreground,
        present_only: true,
    };
    use futures::StreamExt as _;
    let mut parts = nodes[1]
        .peers
        .chunks(&nodes[0].node, &wanted)
        .await
        .unwrap();
    let answer = loop {
        match parts.next().await {
            Some(Ok(super::wire::Part::Working)) => {}
            other => break other,
        }
    };
    assert!(
        matches!(&answer, Some(Err(client::PeerError::Status(text))) if text.contains("digest")),
        "{answer:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_alone_goes_to_the_origin() {
    let layer = six_pieces();
    let nodes = zone(1, &layer, &PeerOptions::default()).await;
    nodes[0].read_all().await;
    assert_eq!(egress_percent(&nodes, &layer), 100);
    assert_eq!(
        nodes[0]
            .fetcher
            .metrics()
            .requests(SourceKind::Peer, Priority::Foreground),
        0
    );
}
