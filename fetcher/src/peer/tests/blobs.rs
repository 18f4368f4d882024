// SPDX-License-Identifier: Apache-2.0
//! Raw blobs between nodes: each piece costs the origin one fetch, and nobody who lies, dies or refuses
//! costs a reader more than a moment.

use futures::StreamExt as _;
use rand::RngCore as _;
use rand::SeedableRng as _;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::BlobSpace;
use tempfile::TempDir;

use super::*;
use crate::blob_cache::{
    BlobCache, BlobCacheOptions, BlobMetrics, PIECE_BYTES, PieceGivers, Supply,
};
use crate::cluster::home::SharedZones;
use crate::registry::{RegistryError, Repository};
use crate::source::memory::MemorySource;
use crate::source::{BlobStream, ReadContext, SourceError};

/// What a node does with requests of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Gives,
    /// Other bytes.
    Lies,
    /// It may not fetch the blob.
    Denied,
    /// It breaks off half-way.
    Breaks,
}

/// The origin, counted.
#[derive(Debug)]
struct Origin {
    below: MemorySource,
    sent: Arc<Mutex<u64>>,
}

#[async_trait]
impl BlobSource for Origin {
    fn label(&self) -> &str {
        "origin/app"
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Origin
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        let stream = self.below.open(context, extent).await?;
        let sent = Arc::clone(&self.sent);
        // Slow enough that others ask meanwhile.
        let body = stream.body.then(move |piece| {
            let sent = Arc::clone(&sent);
            async move {
                tokio::time::sleep(MILLISECOND).await;
                *lock(&sent) += piece.as_ref().map_or(0, |it| it.len() as u64);
                piece
            }
        });
        Ok(BlobStream::new(stream.extent, body))
    }
}

#[derive(Debug)]
struct BlobShelf {
    cache: BlobCache,
    origin: Arc<Origin>,
    peers: Arc<Peers>,
    manner: Manner,
}

#[async_trait]
impl Shelf for BlobShelf {
    async fn layer(
        &self,
        _: &WantedLayer,
        _: &NodeId,
        _: bool,
    ) -> Result<Arc<LayerHandle>, Refused> {
        Err(Refused::NotHere)
    }

    async fn object(&self, _: &WantedObject) -> Result<Bytes, Refused> {
        Err(Refused::NotHere)
    }

    async fn blob(&self, wanted: &WantedPiece) -> Result<BlobStream, Refused> {
        let extent = wanted.piece.extent();
        let length = usize::try_from(extent.len()).unwrap();
        let bytes = |length| futures::stream::iter([Ok(Bytes::from(vec![7; length]))]);
        match self.manner {
            Manner::Lies => return Ok(BlobStream::new(extent, bytes(length))),
            Manner::Breaks => return Ok(BlobStream::new(extent, bytes(length / 2))),
            Manner::Denied => {
                let denied = RegistryError::Denied {
                    endpoint: "e".into(),
                    what: "w".into(),
                    status: 401,
                    credentials: "none".into(),
                };
                let body = futures::stream::iter([Err(SourceError::Registry(denied))]);
                return Ok(BlobStream::new(extent, body));
            }
            Manner::Gives => {}
        }
        let context = ReadContext::new(Priority::Foreground);
        let nodes = BlobNodes::on_behalf(&self.peers, wanted);
        let supply = Supply {
            origin: self.origin.clone(),
            nodes: nodes.map(|it| Arc::new(it) as Arc<dyn PieceGivers>),
        };
        let read = self.cache.read_piece(&context, &wanted.piece, supply).await;
        read.map_err(|error| Refused::Failed(error.to_string()))
    }
}

struct BlobNode {
    id: NodeId,
    peers: Arc<Peers>,
    cache: BlobCache,
    origin: Arc<Origin>,
    server: JoinHandle<()>,
    stop: CancellationToken,
    _directory: TempDir,
}

impl Drop for BlobNode {
    fn drop(&mut self) {
        self.stop.cancel();
        self.server.abort();
    }
}

impl BlobNode {
    async fn pull(&self, blob: &Bytes) -> Result<Vec<u8>, SourceError> {
        let place = Repository::new("origin.example", "app").unwrap();
        let supply = Supply {
            origin: self.origin.clone(),
            nodes: Some(Arc::new(BlobNodes::new(Arc::clone(&self.peers), place))),
        };
        let context = ReadContext::new(Priority::Foreground).with_timeout(60 * SECOND);
        let whole = Extent::new(0, blob.len() as u64).unwrap();
        let digest = BlobDigest::of(blob);
        let opened = self
            .cache
            .read(&context, digest, blob.len() as u64, whole, supply);
        let mut body = opened.await.unwrap().body;
        let mut all = Vec::new();
        while let Some(piece) = body.next().await {
            all.extend_from_slice(&piece?);
        }
        Ok(all)
    }

    fn sent_by_origin(&self) -> u64 {
        *lock(&self.origin.sent)
    }
}

/// Nodes with these manners, each with an origin of its own that has the blob.
async fn nodes(blob: &Bytes, manners: &[Manner], options: &PeerOptions) -> Vec<BlobNode> {
    nodes_in(1, blob, manners, options).await
}

/// The same, dealt to so many zones in turn.
async fn nodes_in(
    zones: usize,
    blob: &Bytes,
    manners: &[Manner],
    options: &PeerOptions,
) -> Vec<BlobNode> {
    let mut listeners = Vec::new();
    let mut named = Vec::new();
    for number in 0..manners.len() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        named.push(Node {
            zone: format!("zone-{}", number % zones),
            ..node(number, listener.local_addr().unwrap())
        });
        listeners.push(listener);
    }
    let mut made = Vec::new();
    for ((number, listener), manner) in listeners.into_iter().enumerate().zip(manners) {
        let store = StoreOptions {
            boot: Some(BootId([1; 16])),
            reclaim: None,
        };
        let store = Arc::new(Store::in_memory(store).unwrap());
        let fetcher = Fetcher::new(fetcher_options(SECOND), store, Metrics::new());
        let (_, seen) = watch::channel(view_of(&named, number));
        let peers = Arc::new(Peers::new(options.clone(), seen, plain()));
        let directory = tempfile::tempdir().unwrap();
        let cache = BlobCacheOptions {
            directory: directory.path().to_owned(),
            budget_bytes: 1 << 30,
            stall: 30 * SECOND,
        };
        let cache = BlobCache::open(cache, BlobMetrics::default()).unwrap();
        let origin = Arc::new(Origin {
            below: MemorySource::new(blob.clone()),
            sent: Arc::default(),
        });
        let shelf = BlobShelf {
            cache: cache.clone(),
            origin: Arc::clone(&origin),
            peers: Arc::clone(&peers),
            manner: *manner,
        };
        let stop = CancellationToken::new();
        let shelf = Arc::new(shelf);
        let serving = PeerServer::new(fetcher, Arc::clone(&peers), shelf, "test", stop.clone());
        let server = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            serving.serve(incoming).await.unwrap();
        });
        made.push(BlobNode {
            id: id(number),
            peers,
            cache,
            origin,
            server,
            stop,
            _directory: directory,
        });
    }
    made
}

fn random(length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    rand::rngs::StdRng::seed_from_u64(5).fill_bytes(&mut bytes);
    bytes.into()
}

/// A blob of some pieces, of which node 1 of two is the home of at least one.
const PIECES: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_costs_the_zone_one_fetch_however_many_pull_it() {
    let blob = random(PIECES * usize::try_from(PIECE_BYTES).unwrap() + 1000);
    let nodes = nodes(&blob, &[Manner::Gives; 4], &patient()).await;
    let pulls = futures::future::join_all(nodes.iter().map(|node| node.pull(&blob)));
    for pulled in tokio::time::timeout(60 * SECOND, pulls).await.unwrap() {
        assert!(pulled.unwrap() == blob);
    }
    let sent: u64 = nodes.iter().map(BlobNode::sent_by_origin).sum();
    assert_eq!(sent, blob.len() as u64);
    for node in &nodes {
        assert_eq!(
            node.cache.whole_bytes(BlobDigest::of(&blob)),
            Some(blob.len() as u64),
            "{}",
            node.id
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_costs_zones_that_share_one_fetch() {
    let blob = random(PIECES * usize::try_from(PIECE_BYTES).unwrap() + 1000);
    for (shared_zones, cost) in [(SharedZones::All, 1), (SharedZones::None, 2)] {
        let options = PeerOptions {
            shared_zones,
            ..patient()
        };
        let nodes = nodes_in(2, &blob, &[Manner::Gives; 4], &options).await;
        let pulls = futures::future::join_all(nodes.iter().map(|node| node.pull(&blob)));
        for pulled in tokio::time::timeout(60 * SECOND, pulls).await.unwrap() {
            assert!(pulled.unwrap() == blob);
        }
        let sent: u64 = nodes.iter().map(BlobNode::sent_by_origin).sum();
        assert_eq!(sent, cost * blob.len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn homes_without_a_slot_name_others_or_are_waited_for() {
    let blob = random(PIECES * usize::try_from(PIECE_BYTES).unwrap());
    let options = PeerOptions {
        upload_slots: 1,
        ..patient()
    };
    let nodes = nodes(&blob, &[Manner::Gives; 5], &options).await;
    let pulls = futures::future::join_all(nodes.iter().map(|node| node.pull(&blob)));
    for pulled in tokio::time::timeout(120 * SECOND, pulls).await.unwrap() {
        assert!(pulled.unwrap() == blob);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lies_is_found_out_and_left_alone() {
    let blob = random(PIECES * usize::try_from(PIECE_BYTES).unwrap());
    let nodes = nodes(&blob, &[Manner::Gives, Manner::Lies], &patient()).await;
    let end = nodes[0].pull(&blob).await.unwrap_err();
    assert!(matches!(end, SourceError::DigestMismatch { .. }), "{end}");
    assert_eq!(nodes[0].peers.giver(&nodes[1].id), None, "avoided");
    assert!(nodes[0].pull(&blob).await.unwrap() == blob);
    assert!(nodes[0].sent_by_origin() >= blob.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_break_off_refuse_or_are_gone_cost_no_reader() {
    let blob = random(PIECES * usize::try_from(PIECE_BYTES).unwrap());
    for manner in [Manner::Breaks, Manner::Denied] {
        let nodes = nodes(&blob, &[Manner::Gives, manner], &PeerOptions::default()).await;
        assert!(nodes[0].pull(&blob).await.unwrap() == blob, "{manner:?}");
        assert_eq!(nodes[0].sent_by_origin(), blob.len() as u64, "{manner:?}");
        if manner == Manner::Denied {
            // It did what it could.
            assert!(nodes[0].peers.giver(&nodes[1].id).is_some());
        }
    }
    let nodes = nodes(&blob, &[Manner::Gives; 2], &PeerOptions::default()).await;
    nodes[1].stop.cancel();
    nodes[1].server.abort();
    assert!(nodes[0].pull(&blob).await.unwrap() == blob);
}

#[test]
fn requests_are_for_whole_pieces() {
    let piece = crate::blob_cache::Piece::new(BlobDigest::of(b"x"), PIECE_BYTES + 5, 1).unwrap();
    let wanted = WantedPiece {
        node: id(1),
        piece,
        places: Default::default(),
        present_only: true,
    };
    let good = wanted.to_proto();
    let read = WantedPiece::try_from(good.clone()).unwrap();
    assert_eq!(
        (read.piece, read.node, read.present_only),
        (piece, id(1), true)
    );
    type Change = fn(&mut sluice_proto::peer::BlobRequest);
    let changes: [Change; 6] = [
        |it| it.start += 1,
        |it| it.end -= 1,
        |it| it.end = u64::MAX,
        |it| it.blob_bytes = 0,
        |it| it.blob_digest = Bytes::from_static(b"short"),
        |it| it.node = "a b".into(),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(WantedPiece::try_from(bad).is_err(), "{number}");
    }
}
