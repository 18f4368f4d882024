// SPDX-License-Identifier: Apache-2.0
//! A home that lies, stalls, breaks off or floods: readers get their bytes, and it is left alone.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::{Stream, StreamExt as _};
use sluice_blockindex::boot::BootKey;
use sluice_blockindex::digest::BlobDigest;
use sluice_proto::peer as proto;
use sluice_proto::peer::peer_server::{Peer, PeerServer as Service};
use tonic::{Request, Response, Status};

use super::super::wire::IndexSizes;
use super::*;
use crate::source::Class;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vice {
    /// Chunks of the right length and of other bytes.
    WrongBytes,
    /// A frame that claims to be gigabytes.
    Bomb,
    /// Chunks that nobody asked for, for ever.
    Flood,
    /// Says for ever that it works on it.
    OnlyPromises,
    /// Nothing at all.
    Silence,
    /// Breaks off at once.
    Reset,
    /// Names nodes that do not have it, for ever.
    AlwaysBusy,
    /// Says that it lacks everything.
    Lacks,
}

#[derive(Clone, Debug)]
struct Hostile {
    vice: Vice,
    asked: Arc<AtomicUsize>,
}

type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for Hostile {
    type ChunksStream = Parts<proto::ChunksPart>;
    type ObjectStream = Parts<proto::ObjectPart>;
    type BlobStream = Parts<proto::BlobPart>;

    async fn blob(
        &self,
        _: Request<proto::BlobRequest>,
    ) -> Result<Response<Self::BlobStream>, Status> {
        // As a node of an older version.
        Err(Status::unimplemented("blob"))
    }
    type PrewarmStream = Parts<proto::PrewarmReport>;

    async fn hello(
        &self,
        _: Request<proto::HelloRequest>,
    ) -> Result<Response<proto::HelloReply>, Status> {
        Err(Status::unimplemented("hello"))
    }

    async fn chunks(
        &self,
        request: Request<proto::ChunksRequest>,
    ) -> Result<Response<Self::ChunksStream>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        let first = request.chunks[0].ordinal;
        let chunk = |ordinal: u32, form: proto::Form, data: Vec<u8>| {
            use super::super::wire::{Form, Part};
            let form = match form {
                proto::Form::Raw => Form::Raw,
                proto::Form::Frame => Form::Frame,
                proto::Form::Zstd => Form::Zstd,
            };
            let data = Bytes::from(data);
            proto::ChunksPart::from(Part::Chunk {
                ordinal,
                form,
                data,
            })
        };
        use super::super::wire::Part;
        let once = |part: proto::ChunksPart| futures::stream::iter([Ok(part)]);
        let stream: Parts<proto::ChunksPart> = match self.vice {
            Vice::WrongBytes => Box::pin(
                once(chunk(first, proto::Form::Raw, vec![7; 128 << 10]))
                    .chain(futures::stream::pending()),
            ),
            Vice::Bomb => {
                let bomb = zstd::bulk::compress(&vec![0; 512 << 20], 1).unwrap();
                Box::pin(once(chunk(first, proto::Form::Zstd, bomb)))
            }
            Vice::Flood => Box::pin(futures::stream::repeat_with(move || {
                Ok(chunk(
                    first + 1_000_000,
                    proto::Form::Raw,
                    vec![7; 64 << 10],
                ))
            })),
            Vice::OnlyPromises => Box::pin(
                tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(
                    100 * MILLISECOND,
                ))
                .map(|_| Ok(Part::Working.into())),
            ),
            Vice::Silence => Box::pin(futures::stream::pending()),
            Vice::Reset => return Err(Status::unavailable("reset")),
            Vice::AlwaysBusy => Box::pin(once(Part::Busy(vec![id(900), id(901)]).into())),
            Vice::Lacks => {
                let all = request.chunks.iter().map(|it| it.ordinal).collect();
                Box::pin(once(Part::Lacking(all).into()))
            }
        };
        Ok(Response::new(stream))
    }

    async fn object(
        &self,
        _: Request<proto::ObjectRequest>,
    ) -> Result<Response<Self::ObjectStream>, Status> {
        Err(Status::not_found("object"))
    }

    async fn boot_list(
        &self,
        _: Request<proto::BootListRequest>,
    ) -> Result<Response<proto::BootListReply>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let list = match self.vice {
            Vice::Silence => std::future::pending().await,
            Vice::Flood => vec![1; 64 << 20],
            Vice::AlwaysBusy => return Err(Status::resource_exhausted("busy")),
            // As a node of before there were lists.
            _ => return Err(Status::unimplemented("boot_list")),
        };
        let list = Bytes::from(list);
        Ok(Response::new(proto::BootListReply { list }))
    }

    async fn offer_boot_list(
        &self,
        _: Request<proto::BootListOffer>,
    ) -> Result<Response<proto::BootListTaken>, Status> {
        Err(Status::unimplemented("offer_boot_list"))
    }

    async fn prewarm(
        &self,
        _: Request<proto::PrewarmRequest>,
    ) -> Result<Response<Self::PrewarmStream>, Status> {
        Err(Status::unimplemented("prewarm"))
    }

    type BlobIndexStream = Parts<proto::BlobIndexPart>;

    async fn blob_index(
        &self,
        _: Request<proto::BlobIndexRequest>,
    ) -> Result<Response<Self::BlobIndexStream>, Status> {
        use proto::blob_index_part::Part;
        self.asked.fetch_add(1, Ordering::SeqCst);
        let part = |part| Ok(proto::BlobIndexPart { part: Some(part) });
        let sizes = |index_bytes, windows_bytes| {
            part(Part::Sizes(proto::BlobIndexSizes {
                index_bytes,
                windows_bytes,
            }))
        };
        let once = |part| futures::stream::iter([part]);
        let data = move |length: usize| part(Part::Data(Bytes::from(vec![7; length])));
        let stream: Parts<proto::BlobIndexPart> = match self.vice {
            // Data before any size.
            Vice::WrongBytes => Box::pin(once(data(100))),
            Vice::Bomb => Box::pin(once(sizes(u64::MAX, 0))),
            // The last bytes are more than it said.
            Vice::Flood => Box::pin(
                once(sizes(1000, 0)).chain(futures::stream::repeat_with(move || data(300))),
            ),
            // All that it said, and then no end.
            Vice::OnlyPromises => Box::pin(
                once(sizes(300, 300)).chain(futures::stream::repeat_with(move || data(300))),
            ),
            Vice::Silence => Box::pin(once(sizes(1000, 0)).chain(futures::stream::pending())),
            Vice::Reset => Box::pin(futures::stream::iter([sizes(1000, 0), data(300)])),
            Vice::AlwaysBusy => Box::pin(once(part(Part::Busy(proto::Busy {
                nodes: vec!["node-900".into(), "no name".into()],
                retry_ms: 0,
            })))),
            // As a node of an older version.
            Vice::Lacks => return Err(Status::unimplemented("blob_index")),
        };
        Ok(Response::new(stream))
    }

    async fn offer_blob_index(
        &self,
        _: Request<proto::BlobIndexOffer>,
    ) -> Result<Response<proto::BlobIndexTaken>, Status> {
        Err(Status::unimplemented("offer_blob_index"))
    }
}

/// A node whose only home is hostile.
async fn beside(vice: Vice, layer: &TestLayer) -> (TestNode, Arc<AtomicUsize>, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let hostile = Hostile {
        vice,
        asked: Arc::clone(&asked),
    };
    let server = tokio::spawn(async move {
        let _ = tonic::transport::Server::builder()
            .add_service(Service::new(hostile))
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await;
    });
    let good = zone(1, layer, &PeerOptions::default()).await.remove(0);
    let mut other = node(1, address);
    other.role = Role::Supernode;
    let view = View {
        me: good.node.clone(),
        others: vec![other],
    };
    good.view.send_replace(Arc::new(view));
    (good, asked, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_home_of_a_boot_list_is_none() {
    let layer = six_pieces();
    let key = BootKey::from_bytes([3; 32]);
    // Whether it leaves the asker waiting, whose deadline it is then.
    let cases = [
        (Vice::Flood, false),
        (Vice::Lacks, false),
        (Vice::Silence, true),
        (Vice::AlwaysBusy, true),
    ];
    for (vice, waits) in cases {
        let (good, asked, server) = beside(vice, &layer).await;
        let deadline = if waits { SECOND } else { READ_BOUND };
        let found = tokio::time::timeout(deadline, good.peers.boot_list(key)).await;
        assert_eq!(found.is_err(), waits, "{vice:?}");
        assert_eq!(found.ok().flatten(), None, "{vice:?}");
        let times = asked.load(Ordering::SeqCst);
        // One that is busy is asked again, and not all the time.
        let most = if vice == Vice::AlwaysBusy { 21 } else { 1 };
        assert!((1..=most).contains(&times), "{vice:?}: {times}");
        let taken = good.peers.offer_boot_list(key, Bytes::from_static(b"list"));
        assert_eq!(taken.await, 0, "{vice:?}");
        server.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_home_of_an_index_costs_time_and_nothing_else() {
    let layer = six_pieces();
    let (blob, nobody) = (BlobDigest::of(b"blob"), BTreeSet::new());
    // Whether it gives nothing at all, the bytes that come of it, and whether it is left alone afterwards.
    let cases = [
        (Vice::WrongBytes, true, 0, true),
        (Vice::Bomb, true, 0, true),
        (Vice::Flood, false, 900, true),
        (Vice::OnlyPromises, false, 600, false),
        (Vice::Silence, false, 0, true),
        (Vice::Reset, false, 300, true),
        (Vice::Lacks, true, 0, false),
    ];
    for (vice, nothing, bytes, avoided) in cases {
        let (good, _, server) = beside(vice, &layer).await;
        let asked = good.peers.blob_index(blob, false, &nobody);
        let given = tokio::time::timeout(READ_BOUND, asked).await.unwrap();
        assert_eq!(given.is_none(), nothing, "{vice:?}");
        if let Some(mut given) = given {
            let (mut came, mut failed) = (0, false);
            while let Some(part) = tokio::time::timeout(READ_BOUND, given.body.next())
                .await
                .unwrap()
            {
                failed = part.is_err();
                came += part.map_or(0, |it| it.len());
            }
            assert_eq!(came, bytes, "{vice:?}");
            assert_eq!(failed, came as u64 != given.sizes.total_bytes(), "{vice:?}");
        }
        assert_eq!(good.peers.giver(&id(1)).is_none(), avoided, "{vice:?}");
        server.abort();
    }
    // One that is busy is asked again, and not all the time, for as long as the caller likes.
    let (good, asked, server) = beside(Vice::AlwaysBusy, &layer).await;
    let found = good.peers.blob_index(blob, false, &nobody);
    assert!(tokio::time::timeout(SECOND, found).await.is_err());
    let times = asked.load(Ordering::SeqCst);
    assert!((2..=21).contains(&times), "{times}");
    let sizes = IndexSizes {
        index_bytes: 1,
        windows_bytes: 0,
    };
    assert_eq!(good.peers.offer_blob_index(blob, sizes).await, 0);
    // What says that it speaks an older version is not asked at all.
    let mut view = View::clone(&good.peers.view());
    view.others[0].protocol = BLOB_INDEX_PROTOCOL - 1;
    good.view.send_replace(Arc::new(view));
    assert!(good.peers.blob_index(blob, false, &nobody).await.is_none());
    assert_eq!(asked.load(Ordering::SeqCst), times);
    server.abort();
}

/// How long a read may take beside any of them: their patience is seconds, a slow machine takes the rest.
const READ_BOUND: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hostile_home_costs_time_and_nothing_else() {
    let layer = six_pieces();
    let cases = [
        // What is counted against the node.
        (Vice::WrongBytes, Some(Class::Corrupt)),
        (Vice::Bomb, Some(Class::Corrupt)),
        (Vice::Flood, Some(Class::Corrupt)),
        (Vice::OnlyPromises, Some(Class::Transient)),
        (Vice::Silence, Some(Class::Transient)),
        (Vice::Reset, Some(Class::Transient)),
        (Vice::AlwaysBusy, None),
        (Vice::Lacks, None),
    ];
    let work = cases.map(|(vice, class)| {
        let layer = &layer;
        async move {
            let (good, asked, server) = beside(vice, layer).await;
            let begun = std::time::Instant::now();
            good.read(Extent::new(0, 2 << 20).unwrap()).await;
            let took = begun.elapsed();
            assert!(took < READ_BOUND, "{vice:?}: {took:?}");
            let times = asked.load(Ordering::SeqCst);
            assert!(times > 0, "{vice:?}: never asked");
            if let Some(class) = class {
                let metrics = good.fetcher.metrics();
                assert!(metrics.failures(SourceKind::Peer, class) > 0, "{vice:?}");
                good.read(Extent::new(2 << 20, 4 << 20).unwrap()).await;
                // One that lies is left alone for a minute; one that fails may have recovered soon.
                if class == Class::Corrupt {
                    assert_eq!(asked.load(Ordering::SeqCst), times, "{vice:?}: asked again");
                }
            }
            let begun = std::time::Instant::now();
            good.read_all().await;
            let took = begun.elapsed();
            assert!(took < 2 * READ_BOUND, "{vice:?}: {took:?} for the rest");
            check_all(&good, layer);
            server.abort();
        }
    });
    all(work).await;
}
