// SPDX-License-Identifier: Apache-2.0
//! Indexes from node to node, over loopback: what is kept, and what of liars is not.

use std::io::Write as _;
use std::net::SocketAddr;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use rand::{RngCore as _, SeedableRng as _};
use sluice_blockindex::indexer::{BuiltIndex, IndexOptions, index_blob};
use sluice_fetcher::cluster::node::{Node, Role, View};
use sluice_fetcher::metrics::Metrics;
use sluice_fetcher::peer::wire::{IndexSizes, WantedLayer, WantedObject};
use sluice_fetcher::peer::{
    HeldIndex, IndexShelf, PROTOCOL, PeerOptions, PeerServer, Refused, Shelf, plain,
};
use sluice_fetcher::scheduler::{Fetcher, FetcherOptions, LayerHandle};
use sluice_fetcher::store::{Store, StoreOptions};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use super::*;

const LONG: Duration = Duration::from_secs(60);

/// A layer as a registry has it, and its index.
struct Made {
    blob: BlobDigest,
    blob_bytes: u64,
    diff_id: DiffId,
    index: BuiltIndex,
}

impl Made {
    /// A gzip of some megabytes, with windows.
    fn of(seed: u64) -> Self {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let words: Vec<[u8; 8]> = (0..4096).map(|_| random.next_u64().to_le_bytes()).collect();
        let content: Vec<u8> = (0..400_000)
            .flat_map(|_| words[random.next_u32() as usize % words.len()])
            .collect();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, "file", &content[..])
            .unwrap();
        let tar = builder.into_inner().unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        gzip.write_all(&tar).unwrap();
        let blob = gzip.finish().unwrap();
        let made = index_blob(&blob, IndexOptions::default()).unwrap();
        let index = made.index.unwrap();
        assert!(!index.windows.is_empty());
        Self {
            blob: made.blob,
            blob_bytes: made.blob_bytes,
            diff_id: made.diff_id,
            index,
        }
    }

    fn wanted(&self) -> WantedBlob {
        WantedBlob {
            blob: self.blob,
            expected: Some((self.diff_id, self.blob_bytes)),
        }
    }
}

/// Gives the same bytes for any blob, and counts how often.
#[derive(Debug)]
struct Fixed {
    payload: Bytes,
    windows: Bytes,
    asked: Mutex<u32>,
}

impl Fixed {
    fn new(payload: &[u8], windows: &[u8]) -> Arc<Self> {
        Arc::new(Self {
            payload: Bytes::copy_from_slice(payload),
            windows: Bytes::copy_from_slice(windows),
            asked: Mutex::default(),
        })
    }

    fn asked(&self) -> u32 {
        *self.asked.lock().unwrap()
    }
}

#[async_trait]
impl IndexShelf for Fixed {
    async fn blob_index(&self, _: BlobDigest) -> Result<HeldIndex, Refused> {
        *self.asked.lock().unwrap() += 1;
        let sizes = IndexSizes {
            index_bytes: self.payload.len() as u64,
            windows_bytes: self.windows.len() as u64,
        };
        let parts = [self.payload.clone(), self.windows.clone()];
        let parts = parts.into_iter().filter(|it| !it.is_empty()).map(Ok);
        let body = futures::stream::iter(parts).boxed();
        Ok(HeldIndex { sizes, body })
    }

    async fn note_blob_index(&self, _: OfferedIndex) -> Result<(), Refused> {
        Err(Refused::NotHere)
    }
}

#[derive(Debug)]
struct OnlyIndexes(Arc<dyn IndexShelf>);

#[async_trait]
impl Shelf for OnlyIndexes {
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

    fn indexes(&self) -> Option<&dyn IndexShelf> {
        Some(&*self.0)
    }
}

struct TestNode {
    zone: Arc<ZoneIndexes>,
    peers: Arc<Peers>,
    dir: TempDir,
    server: JoinHandle<()>,
}

impl Drop for TestNode {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl TestNode {
    fn indexes(&self) -> &NodeIndexes {
        &self.zone.node_indexes
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.dir.path()).unwrap().count()
    }

    async fn bring(&self, wanted: WantedBlob) -> bool {
        tokio::time::timeout(LONG, self.zone.bring(wanted))
            .await
            .unwrap()
    }

    fn holds(&self, made: &Made, from: &str) {
        let found = self.indexes().find(made.blob).unwrap().unwrap();
        assert_eq!(found.payload, made.index.payload);
        let windows = std::fs::read(found.windows.unwrap()).unwrap();
        assert!(windows == made.index.windows);
        assert_eq!(found.from.as_deref(), Some(from));
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

/// Nodes that know each other: those of `fixed` give what it says, the others what they have.
async fn nodes(fixed: &[Option<Arc<Fixed>>]) -> Vec<TestNode> {
    let (mut listeners, mut all) = (Vec::new(), Vec::new());
    for number in 0..fixed.len() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        all.push(node(number, listener.local_addr().unwrap()));
        listeners.push(listener);
    }
    let mut made = Vec::new();
    for (number, (listener, fixed)) in listeners.into_iter().zip(fixed).enumerate() {
        let mut others = all.clone();
        let me = others.remove(number);
        let (_, view) = watch::channel(Arc::new(View { me, others }));
        let peers = Arc::new(Peers::new(PeerOptions::default(), view, plain()));
        let dir = tempfile::tempdir().unwrap();
        let zone = Arc::new(ZoneIndexes::new(
            Arc::new(NodeIndexes::open(dir.path(), 1 << 30).unwrap()),
            Some(Arc::clone(&peers)),
            IndexUse::On,
            DiskReserve::default(),
            ZoneIndexMetrics::default(),
        ));
        let shelf: Arc<dyn IndexShelf> = match fixed {
            Some(fixed) => Arc::clone(fixed) as Arc<dyn IndexShelf>,
            None => Arc::clone(&zone) as Arc<dyn IndexShelf>,
        };
        let store = Arc::new(Store::in_memory(StoreOptions::default()).unwrap());
        let fetcher = Fetcher::new(FetcherOptions::default(), store, Metrics::new());
        let (shelf, stop) = (Arc::new(OnlyIndexes(shelf)), CancellationToken::new());
        let server = PeerServer::new(fetcher, Arc::clone(&peers), shelf, "test", stop);
        let server = tokio::spawn(async move {
            let served = server.serve(TcpListenerStream::new(listener));
            served.await.unwrap();
        });
        made.push(TestNode {
            zone,
            peers,
            dir,
            server,
        });
    }
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_comes_once_however_many_ask_and_is_known_as_another_nodes() {
    let made = Made::of(1);
    let fixed = Fixed::new(&made.index.payload, &made.index.windows);
    let both = nodes(&[Some(Arc::clone(&fixed)), None]).await;
    let asker = &both[1];
    let brought = tokio::join!(
        asker.bring(made.wanted()),
        asker.bring(made.wanted()),
        asker.bring(made.wanted())
    );
    assert_eq!(brought, (true, true, true));
    assert_eq!(fixed.asked(), 1);
    asker.holds(&made, "node-0");
    // Windows, payload, and whose it is.
    assert_eq!(asker.files(), 3);
    assert_eq!(asker.zone.metrics.answers(Answer::Given), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_index_of_the_blob_is_not_kept_and_its_giver_left_alone() {
    let (made, other) = (Made::of(1), Made::of(2));
    let (payload, windows) = (&made.index.payload[..], &made.index.windows[..]);
    let mut wrong = windows.to_vec();
    *wrong.last_mut().unwrap() ^= 1;
    let converted = crate::indexes::sample::layer().0;
    let bad_disk = WantedBlob {
        expected: Some((other.diff_id, made.blob_bytes)),
        ..made.wanted()
    };
    let bad_size = WantedBlob {
        expected: Some((made.diff_id, made.blob_bytes + 1)),
        ..made.wanted()
    };
    let unknown = WantedBlob {
        expected: None,
        ..made.wanted()
    };
    let cases: [(&str, &[u8], &[u8], WantedBlob); 9] = [
        ("noise", &[7; 1000], windows, made.wanted()),
        ("cut", &payload[..payload.len() - 1], windows, made.wanted()),
        ("no windows", payload, &[], made.wanted()),
        ("other windows", payload, &wrong, made.wanted()),
        ("converted", &converted, &[], made.wanted()),
        (
            "another blob",
            &other.index.payload,
            &other.index.windows,
            made.wanted(),
        ),
        (
            "another blob, for a home",
            &other.index.payload,
            &other.index.windows,
            unknown,
        ),
        ("another diff ID", payload, windows, bad_disk),
        ("another size", payload, windows, bad_size),
    ];
    for (name, payload, windows, wanted) in cases {
        let fixed = Fixed::new(payload, windows);
        let both = nodes(&[Some(fixed), None]).await;
        let asker = &both[1];
        assert!(!asker.bring(wanted).await, "{name}");
        assert_eq!(asker.files(), 0, "{name}");
        assert_eq!(asker.zone.metrics.answers(Answer::Refused), 1, "{name}");
        assert!(asker.peers.giver(&id(0)).is_none(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_home_that_lies_the_other_is_asked() {
    let made = Made::of(3);
    let homes_of = |node: &TestNode| {
        let key = IndexDigest::from_bytes(*made.blob.as_bytes());
        node.peers.object_homes(key)
    };
    // Who is home of what depends on names alone.
    let homes = homes_of(&nodes(&[None, None, None]).await[0]);
    let lies = |number: usize| {
        let payload = match id(number) == homes[0] {
            true => &[7; 100][..],
            false => &made.index.payload,
        };
        Some(Fixed::new(payload, &made.index.windows))
    };
    let asker = (0..3).find(|it| !homes.contains(&id(*it))).unwrap();
    let mut fixed: Vec<_> = (0..3).map(lies).collect();
    fixed[asker] = None;
    let all = nodes(&fixed).await;
    assert!(all[asker].bring(made.wanted()).await);
    all[asker].holds(&made, homes[1].as_str());
    assert!(all[asker].peers.giver(&homes[0]).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn homes_take_what_they_are_told_of_and_give_it_when_its_maker_is_gone() {
    let made = Made::of(4);
    let mut all = nodes(&[None, None, None, None]).await;
    let key = IndexDigest::from_bytes(*made.blob.as_bytes());
    let homes = all[0].peers.object_homes(key);
    let others: Vec<usize> = (0..4).filter(|it| !homes.contains(&id(*it))).collect();
    let (maker, asker) = (others[0], others[1]);
    let takers: Vec<_> = all
        .iter()
        .map(|node| {
            let zone = Arc::clone(&node.zone);
            tokio::spawn(async move { zone.take_offered().await })
        })
        .collect();
    all[maker]
        .indexes()
        .keep(made.blob, &made.index.payload, &made.index.windows)
        .unwrap();
    all[maker].zone.tell(made.blob).await;
    let begun = std::time::Instant::now();
    let has = |number: usize| all[number].indexes().has(made.blob);
    while (0..4).filter(|it| has(*it)).count() < 3 {
        assert!(begun.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!has(asker));
    takers.iter().for_each(JoinHandle::abort);
    all[maker].server.abort();
    assert!(all[asker].bring(made.wanted()).await);
    all[asker].holds(&made, homes[0].as_str());
    // A second word of it costs nothing.
    let key = |node: &TestNode| node.indexes().find(made.blob).unwrap().unwrap().from;
    let home = all.iter().position(|it| it.peers.me() == homes[0]).unwrap();
    assert_eq!(key(&all[home]).as_deref(), Some(id(maker).as_str()));
    drop(all.drain(..));
}
