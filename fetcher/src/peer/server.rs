// SPDX-License-Identifier: Apache-2.0
//! What this node gives to others.
//!
//! A request is answered from the store, from what is on its way, and, unless it says `present_only`,
//! from the origin; from a third node only as [`super::route`] says. Every chunk is sent as it lands. A request without a slot
//! is answered "busy" at once, with nodes that have what it wants, so that load spreads as a tree.
//!
//! **Bounds** requests that run: the upload slots; parts that wait to be sent: [`PARTS_QUEUED`] per
//! request; how long one runs: [`REQUEST_DEADLINE`].

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, FuturesUnordered};
use futures::{Stream, StreamExt as _};
use sluice_blockindex::boot::BootKey;
use sluice_blockindex::chunkmap::{Chunk, Codec};
use sluice_blockindex::frames::{content_of, is_kept_well};
use sluice_proto::peer::peer_server::{Peer, PeerServer as Service};
use sluice_proto::peer::{
    BlobIndexOffer, BlobIndexPart, BlobIndexRequest, BlobIndexTaken, BlobPart, BlobRequest,
    BootListOffer, BootListReply, BootListRequest, BootListTaken, ChunksPart, ChunksRequest,
    HelloReply, HelloRequest, ObjectPart, ObjectRequest, PrewarmReport, PrewarmRequest,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::blobs::{self, WantedPiece};
use super::client::Peers;
use super::indexes::{self, IndexDesk, IndexShelf};
use super::lists::ListDesk;
use super::prewarm::{PrewarmDesk, Reports, WantedPrewarm};
use super::route::Reach;
use super::wire::{
    Form, OBJECT_PART_BYTES, OfferedList, Part, WantedChunks, WantedLayer, WantedObject, WireError,
};
use super::{OLDEST_PROTOCOL, PROTOCOL};
use crate::clock;
use crate::cluster::home::PieceKey;
use crate::cluster::node::{Node, NodeId, Role};
use crate::cluster::uploads::{Admission, Asker};
use crate::scheduler::{Fetcher, FillError, LayerHandle};
use crate::source::{BlobStream, Priority};
use crate::store::lock;

/// The longest that one request may run: a home gives up an origin that is silent long before.
const REQUEST_DEADLINE: Duration = Duration::from_secs(120);
/// Parts of one answer that wait to be sent.
const PARTS_QUEUED: usize = 4;
/// While nothing comes from the origin the asker hears this often that the node is alive. Shorter than
/// the patience of an asker, long enough to cost nothing.
pub(super) const WORKING_EVERY: Duration = Duration::from_millis(250);
/// How long an asker is kept while this node is not being fed itself, before it hears that the node lacks
/// what it wants. A home sends askers on to those that asked just before them, and these need a round trip
/// or two; two nodes that wait for each other lose no more than this.
const GRACE: Duration = Duration::from_millis(500);
/// Chunks compressed for the wire must become at least this much smaller, in percent.
const WORTH_PERCENT: usize = 10;
/// zstd level for the wire: as fast as the line of a zone.
const WIRE_LEVEL: i32 = 1;

/// Why a node does not serve a layer or an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// It does not have it, and was told to fetch nothing.
    #[error("not here")]
    NotHere,
    /// It may not, by its configuration.
    #[error("not allowed: {0}")]
    NotAllowed(String),
    /// It could not fetch or open it.
    #[error("{0}")]
    Failed(String),
}

impl Refused {
    /// The word for it in metrics.
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Refused::NotHere => "not_here",
            Refused::NotAllowed(_) => "not_allowed",
            Refused::Failed(_) => "failed",
        }
    }
}

pub(super) fn status_of(refused: &Refused) -> Status {
    match refused {
        Refused::NotHere => Status::not_found("not here"),
        Refused::NotAllowed(why) => Status::permission_denied(why.clone()),
        Refused::Failed(why) => Status::unavailable(why.clone()),
    }
}

/// How long the shelf may take to look up, note or store what needs no more than this node's disk.
const SHELF_DEADLINE: Duration = Duration::from_secs(2);

/// What the shelf has to say, if it says it in time.
pub(super) async fn within_deadline<T>(
    work: impl Future<Output = Result<T, Refused>>,
) -> Result<T, Status> {
    let done = tokio::time::timeout(SHELF_DEADLINE, work).await;
    let done = done.unwrap_or_else(|_| Err(Refused::Failed("too slow".to_owned())));
    done.map_err(|refused| status_of(&refused))
}

/// Where the server finds layers and objects.
#[async_trait]
pub trait Shelf: Send + Sync + std::fmt::Debug {
    /// The layer, opened on behalf of `asker` if it is not open, which may have the index.
    ///
    /// **Errors** [`Refused`]. Bounded by its own deadlines.
    async fn layer(
        &self,
        wanted: &WantedLayer,
        asker: &NodeId,
        present_only: bool,
    ) -> Result<Arc<LayerHandle>, Refused>;

    /// An object with this digest, fetched from the origin unless `present_only`; verified.
    ///
    /// **Errors** [`Refused`]. Bounded by its own deadlines.
    async fn object(&self, wanted: &WantedObject) -> Result<Bytes, Refused>;

    /// The boot list with this key that is known here. A shelf without lists has none.
    ///
    /// **Errors** [`Refused`].
    async fn boot_list(&self, key: BootKey) -> Result<Bytes, Refused> {
        let _unknown = key;
        Err(Refused::NotHere)
    }

    /// Takes a boot list that another node has learnt, and checks it.
    ///
    /// **Errors** [`Refused`]: it is not what it says, or not wanted.
    async fn take_boot_list(&self, offered: OfferedList) -> Result<(), Refused> {
        let _unwanted = offered;
        Err(Refused::NotHere)
    }

    /// A piece of a raw blob as it arrives, fetched from the origin unless `present_only`. Unverified: the
    /// asker verifies the whole blob.
    ///
    /// **Errors** [`Refused`]. Bounded by its own deadlines.
    async fn blob(&self, wanted: &WantedPiece) -> Result<BlobStream, Refused> {
        blobs::none(wanted)
    }

    /// Begins to bring an image before anybody asks for it, with this node's own credentials; the reports say
    /// how far it is. Dropped, they end the work. A shelf that cannot do so has nothing.
    ///
    /// **Errors** [`Refused`].
    async fn prewarm(&self, wanted: WantedPrewarm) -> Result<Reports, Refused> {
        let _unwanted = wanted;
        Err(Refused::NotHere)
    }

    /// Where it keeps indexes of blobs that nobody converted, if it does.
    fn indexes(&self) -> Option<&dyn IndexShelf> {
        None
    }
}

/// The server of the peer API.
#[derive(Clone, Debug)]
pub struct PeerServer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) fetcher: Fetcher,
    pub(super) peers: Arc<Peers>,
    pub(super) shelf: Arc<dyn Shelf>,
    lists: ListDesk,
    prewarms: PrewarmDesk,
    pub(super) indexes: IndexDesk,
    compressions: Semaphore,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
    version: String,
}

/// An upload that was admitted. Dropped, it is over.
#[derive(Debug)]
pub(super) struct Upload {
    peers: Arc<Peers>,
    key: PieceKey,
    node: NodeId,
    complete: bool,
}

impl Upload {
    /// It is over; the asker holds the piece if it was `complete`.
    pub(super) fn end(mut self, complete: bool) {
        self.complete = complete;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        lock(&self.peers.uploads).ended(&self.key, &self.node, self.complete);
    }
}

impl PeerServer {
    /// A server that gives what `fetcher` and `shelf` have, and says that its version is `version`.
    #[must_use]
    pub fn new(
        fetcher: Fetcher,
        peers: Arc<Peers>,
        shelf: Arc<dyn Shelf>,
        version: &str,
        stop: CancellationToken,
    ) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let shared = Shared {
            fetcher,
            peers,
            shelf,
            lists: ListDesk::new(),
            prewarms: PrewarmDesk::new(),
            indexes: IndexDesk::new(),
            compressions: Semaphore::new((processors / 2).max(1)),
            tasks: TaskTracker::new(),
            stop,
            version: version.to_owned(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// How much of the upload is taken, in percent, and uploads that could begin now.
    #[must_use]
    pub fn load(&self) -> (u8, u16) {
        let uploads = lock(&self.shared.peers.uploads);
        (uploads.load(), uploads.free_slots())
    }

    /// Serves connections until the token is cancelled and the answers under way have ended, or were
    /// cut by it.
    ///
    /// **Errors** of the transport.
    pub async fn serve<S, IO>(self, incoming: S) -> Result<(), tonic::transport::Error>
    where
        S: Stream<Item = std::io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let stop = self.shared.stop.clone();
        let shared = Arc::clone(&self.shared);
        let result = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .concurrency_limit_per_connection(256)
            .initial_stream_window_size(256 << 10)
            .tcp_nodelay(true)
            .add_service(Service::new(self).max_decoding_message_size(1 << 20))
            .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
            .await;
        shared.tasks.close();
        shared.tasks.wait().await;
        result
    }
}

pub(super) type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) fn refused(error: &WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

impl Shared {
    /// What a daemon that stops has is not asked any more: its metadata is being closed.
    fn running(&self) -> Result<&Self, Status> {
        match self.stop.is_cancelled() {
            true => Err(Status::unavailable("stopping")),
            false => Ok(self),
        }
    }

    /// Begins an upload of a piece, or says whom to ask instead.
    pub(super) fn admit(
        &self,
        key: PieceKey,
        node: &NodeId,
        background: bool,
        as_home: bool,
    ) -> Result<Upload, Vec<NodeId>> {
        let view = self.peers.view();
        // Who is far away is not named to those who are near.
        let gives = |it: &Node| it.role != Role::Leech && it.zone == view.me.zone;
        let gives = view.node(node).is_none_or(gives);
        let asker = Asker {
            node,
            background,
            gives,
            as_home,
        };
        match lock(&self.peers.uploads).admit(&key, asker) {
            Admission::Serve => Ok(Upload {
                peers: Arc::clone(&self.peers),
                key,
                node: node.clone(),
                complete: false,
            }),
            Admission::Busy(named) => Err(named),
        }
    }

    /// The answer to an asker who has an upload. `send` says whether all of it was sent; what it does not send before
    /// its deadline, or before the server stops, is asked for elsewhere.
    pub(super) fn answer<T, F>(
        self: &Arc<Self>,
        upload: Upload,
        send: impl FnOnce(Arc<Self>, mpsc::Sender<Result<T, Status>>) -> F,
    ) -> Response<Parts<T>>
    where
        T: Send + 'static,
        F: Future<Output = bool> + Send + 'static,
    {
        let (parts, answer) = mpsc::channel(PARTS_QUEUED);
        let sent = tokio::time::timeout(REQUEST_DEADLINE, send(Arc::clone(self), parts.clone()));
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let served = stop.run_until_cancelled(sent).await;
            upload.end(matches!(served, Some(Ok(true))));
            // Who asks again when the stream has ended finds the slot free.
            drop(parts);
        });
        Response::new(Box::pin(ReceiverStream::new(answer)))
    }

    /// Opens the layer, checks the asker's right to it, and sends all that is wanted. The asker hears that
    /// the node is alive while the layer's index is being fetched.
    async fn serve_chunks(
        &self,
        wanted: WantedChunks,
        parts: &mpsc::Sender<Result<ChunksPart, Status>>,
    ) -> Result<bool, Gone> {
        let mut beat = tokio::time::interval(WORKING_EVERY);
        let (name, asker) = (wanted.layer.clone(), wanted.node.clone());
        let mut opening = self.shelf.layer(&name, &asker, wanted.present_only);
        let opened = loop {
            tokio::select! {
                biased;
                opened = &mut opening => break opened,
                () = parts.closed() => return Err(Gone),
                _ = beat.tick() => give(parts, Part::Working).await?,
            }
        };
        let layer = match opened {
            Ok(layer) => layer,
            Err(refused) => {
                self.fetcher.metrics().refused(refused.word());
                let _ = parts.send(Err(status_of(&refused))).await;
                return Ok(false);
            }
        };
        let knows = |want: &super::wire::WantedChunk| {
            let chunk = layer.chunks().chunk(want.ordinal);
            chunk.is_some_and(|chunk| want.names(&chunk))
        };
        if !wanted.chunks.iter().all(knows) {
            // Who does not know the digests has no index, and so no right to the bytes.
            self.fetcher.metrics().refused("digest");
            let unknown = Status::permission_denied("unknown digest");
            let _ = parts.send(Err(unknown)).await;
            return Ok(false);
        }
        self.send(wanted, layer, parts).await
    }

    /// Sends all that is wanted, as it lands; says whether that was all.
    async fn send(
        &self,
        wanted: WantedChunks,
        layer: Arc<LayerHandle>,
        parts: &mpsc::Sender<Result<ChunksPart, Status>>,
    ) -> Result<bool, Gone> {
        if wanted.present_only {
            tokio::select! {
                biased;
                () = parts.closed() => return Err(Gone),
                () = fed(&layer, &wanted) => {}
            }
        }
        let mut lacking = BTreeSet::new();
        let mut coming = Vec::new();
        for want in &wanted.chunks {
            let Some(chunk) = layer.chunks().chunk(want.ordinal) else {
                lacking.insert(want.ordinal);
                continue;
            };
            let there = layer.device().is_present(chunk.ordinal);
            if !there && wanted.present_only && !layer.is_being_fed(chunk.ordinal) {
                lacking.insert(chunk.ordinal);
            } else {
                coming.push(chunk);
            }
        }
        let mut complete = lacking.is_empty();
        if !complete {
            give(parts, Part::Lacking(lacking)).await?;
        }
        let reach = self.peers.reach_for(&wanted.node);
        let mut landing = FuturesUnordered::new();
        // As urgent as the asker is until each chunk has a waiter of its own.
        let mut held: Option<Vec<_>> = None;
        if !wanted.present_only {
            // All at once, so that neighbours share a request.
            let ordinals: Vec<u32> = coming.iter().map(|chunk| chunk.ordinal).collect();
            let waiting = self
                .fetcher
                .launch_for_peer(&layer, &ordinals, wanted.priority, reach);
            held = Some(waiting);
        }
        for chunk in coming {
            landing.push(self.landed(&layer, chunk, &wanted, reach));
        }
        let mut beat = tokio::time::interval(WORKING_EVERY);
        loop {
            tokio::select! {
                biased;
                () = parts.closed() => return Err(Gone),
                landed = landing.next() => match landed {
                    None => return Ok(complete),
                    Some((chunk, true)) => {
                        drop(held.take());
                        let part = self.part(&layer, &chunk).await;
                        let (form, bytes) = part_bytes(&part);
                        self.fetcher.metrics().served(form, bytes);
                        let wait = lock(&self.peers.buckets.upload).take(bytes, clock::now());
                        if !wait.is_zero() {
                            tokio::time::sleep(wait).await;
                        }
                        give(parts, part).await?;
                        beat.reset();
                    }
                    Some((chunk, false)) => {
                        complete = false;
                        give(parts, Part::Lacking(BTreeSet::from([chunk.ordinal]))).await?;
                    }
                },
                _ = beat.tick() => give(parts, Part::Working).await?,
            }
        }
    }

    async fn landed(
        &self,
        layer: &Arc<LayerHandle>,
        chunk: Chunk,
        wanted: &WantedChunks,
        reach: Reach,
    ) -> (Chunk, bool) {
        let (fetcher, priority) = (&self.fetcher, wanted.priority);
        let landed = if wanted.present_only {
            let flight = fetcher.await_flight(layer, chunk.ordinal, priority, REQUEST_DEADLINE);
            flight.await
        } else {
            let filled =
                fetcher.fill_for_peer(layer, chunk.device, priority, reach, REQUEST_DEADLINE);
            let failed = |error: &FillError| {
                tracing::debug!(device = %layer.key(), chunk = chunk.ordinal, "lack for a peer: {error}");
            };
            filled.await.inspect_err(failed).is_ok()
        };
        (chunk, landed)
    }

    /// A present chunk as it is sent.
    async fn part(&self, layer: &Arc<LayerHandle>, chunk: &Chunk) -> Part {
        let lacking = || Part::Lacking(BTreeSet::from([chunk.ordinal]));
        let ordinal = chunk.ordinal;
        let known = self.peers.frames.get(&chunk.digest);
        if let Some((form, data)) = &known
            && *form != Form::Raw
            && fits(*form, data, chunk)
        {
            return Part::Chunk {
                ordinal,
                form: *form,
                data: data.clone(),
            };
        }
        // Compressed only while a processor is idle enough for it, and once.
        let compress = known
            .is_none_or(|(form, _)| form != Form::Raw)
            .then(|| self.compressions.try_acquire().ok());
        let compress = compress.flatten();
        let (device, wanted) = (Arc::clone(layer.device()), *chunk);
        let pack = compress.is_some();
        let read = tokio::task::spawn_blocking(move || read(&device, &wanted, pack)).await;
        match read {
            Ok(Some((Form::Zstd, data))) => {
                self.peers.frames.put(chunk.digest, Form::Zstd, &data);
                Part::Chunk {
                    ordinal,
                    form: Form::Zstd,
                    data,
                }
            }
            Ok(Some((form, data))) => {
                if pack {
                    self.peers.frames.put(chunk.digest, Form::Raw, &[]);
                }
                Part::Chunk {
                    ordinal,
                    form,
                    data,
                }
            }
            Ok(None) | Err(_) => lacking(),
        }
    }
}

/// Waits until all that is wanted is here or on its way, or nobody fetches it; [`GRACE`] at most.
async fn fed(layer: &LayerHandle, wanted: &WantedChunks) {
    let all = async {
        for want in &wanted.chunks {
            if !layer.device().is_present(want.ordinal) {
                layer.comes_to_be_fed(want.ordinal).await;
            }
        }
    };
    // What is not fed by then is lacking.
    let _ = tokio::time::timeout(GRACE, all).await;
}

/// Whether who knows the chunk map can use bytes that were kept for a chunk with this digest: the same content
/// may have another frame in another blob, and in an unmodified one none that is decoded alone.
fn fits(form: Form, data: &Bytes, chunk: &Chunk) -> bool {
    match form {
        Form::Frame => chunk.codec == Codec::Zstd && data.len() as u64 == chunk.blob.len(),
        Form::Raw | Form::Zstd => true,
    }
}

/// Reads a chunk and compresses it if that is wanted and worth it. **Blocks**.
fn read(device: &crate::store::Device, chunk: &Chunk, pack: bool) -> Option<(Form, Bytes)> {
    let mut bytes = vec![0; usize::try_from(chunk.device.len()).ok()?];
    device.read_at(chunk.device.start(), &mut bytes).ok()?;
    // What rotted, or was evicted while it was read, is not given on.
    if !is_kept_well(&bytes, chunk) {
        return None;
    }
    // On the wire a chunk is what its digest is of.
    let content = content_of(&bytes, chunk).ok()?.len();
    bytes.truncate(content);
    if pack
        && let Ok(packed) = zstd::bulk::compress(&bytes, WIRE_LEVEL)
        && packed.len() * 100 <= bytes.len() * (100 - WORTH_PERCENT)
    {
        return Some((Form::Zstd, packed.into()));
    }
    Some((Form::Raw, bytes.into()))
}

/// The form of a part in metrics, and its bytes.
fn part_bytes(part: &Part) -> (&'static str, u64) {
    match part {
        Part::Chunk { data, form, .. } => {
            let word = match form {
                Form::Raw => "raw",
                Form::Frame => "frame",
                Form::Zstd => "zstd",
            };
            (word, data.len() as u64)
        }
        Part::Lacking(_) | Part::Busy(_) | Part::Working => ("none", 0),
    }
}

/// The asker went away.
struct Gone;

async fn give(parts: &mpsc::Sender<Result<ChunksPart, Status>>, part: Part) -> Result<(), Gone> {
    parts.send(Ok(part.into())).await.map_err(|_| Gone)
}

#[tonic::async_trait]
impl Peer for PeerServer {
    type ChunksStream = Parts<ChunksPart>;
    type ObjectStream = Parts<ObjectPart>;
    type BlobStream = Parts<BlobPart>;
    type PrewarmStream = Parts<PrewarmReport>;
    type BlobIndexStream = Parts<BlobIndexPart>;

    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let view = self.shared.peers.view();
        let me = &view.me;
        let (load, free_slots) = self.load();
        Ok(Response::new(HelloReply {
            node: me.id.to_string(),
            zone: me.zone.clone(),
            rack: me.rack.clone(),
            role: me.role.as_str().to_owned(),
            version: self.shared.version.clone(),
            protocol: PROTOCOL,
            oldest_protocol: OLDEST_PROTOCOL,
            capabilities: vec!["blobs".to_owned()],
            load: load.into(),
            free_slots: free_slots.into(),
        }))
    }

    async fn chunks(
        &self,
        request: Request<ChunksRequest>,
    ) -> Result<Response<Self::ChunksStream>, Status> {
        let wanted = WantedChunks::try_from(request.into_inner()).map_err(|e| refused(&e))?;
        let shared = &self.shared;
        if shared.peers.view().me.role == Role::Leech {
            return Err(Status::permission_denied("this node gives nothing"));
        }
        // Nodes that start the same image ask for the same runs of chunks. Who were sent to a node that has
        // another part of the piece would ask in vain.
        let key = PieceKey {
            index: wanted.layer.key.index,
            number: wanted.chunks.first().map_or(0, |chunk| chunk.ordinal),
        };
        let background = wanted.priority == Priority::Background;
        let upload = match shared.admit(key, &wanted.node, background, !wanted.present_only) {
            Ok(upload) => upload,
            Err(named) => {
                let busy = stream::iter([Ok(Part::Busy(named).into())]);
                return Ok(Response::new(Box::pin(busy)));
            }
        };
        Ok(shared.answer(upload, |shared, parts| async move {
            let served = shared.serve_chunks(wanted, &parts).await;
            matches!(served, Ok(true))
        }))
    }

    async fn blob(
        &self,
        request: Request<BlobRequest>,
    ) -> Result<Response<Self::BlobStream>, Status> {
        blobs::serve(&self.shared, request.into_inner()).await
    }

    async fn object(
        &self,
        request: Request<ObjectRequest>,
    ) -> Result<Response<Self::ObjectStream>, Status> {
        let wanted = WantedObject::try_from(request.into_inner()).map_err(|e| refused(&e))?;
        let shared = &self.shared;
        let key = PieceKey {
            index: wanted.digest,
            number: u32::MAX,
        };
        let as_home = !wanted.present_only;
        let Ok(upload) = shared.admit(key, &wanted.node, false, as_home) else {
            return Err(Status::resource_exhausted("no upload slot is free"));
        };
        let bytes = shared.shelf.object(&wanted).await;
        let bytes = bytes.map_err(|refused| {
            shared.fetcher.metrics().refused(refused.word());
            status_of(&refused)
        })?;
        let parts = in_parts(bytes, upload);
        Ok(Response::new(Box::pin(parts)))
    }

    async fn boot_list(
        &self,
        request: Request<BootListRequest>,
    ) -> Result<Response<BootListReply>, Status> {
        let shared = self.shared.running()?;
        let (peers, shelf) = (&shared.peers, &shared.shelf);
        let reply = shared.lists.find(peers, shelf, request.into_inner());
        let reply = reply.await?;
        Ok(Response::new(reply))
    }

    async fn offer_boot_list(
        &self,
        request: Request<BootListOffer>,
    ) -> Result<Response<BootListTaken>, Status> {
        let shared = self.shared.running()?;
        let (peers, shelf) = (&shared.peers, &shared.shelf);
        let taken = shared.lists.take(peers, shelf, request.into_inner());
        let taken = taken.await?;
        Ok(Response::new(taken))
    }

    async fn prewarm(
        &self,
        request: Request<PrewarmRequest>,
    ) -> Result<Response<Self::PrewarmStream>, Status> {
        let shared = self.shared.running()?;
        let (peers, shelf, stop) = (&shared.peers, &shared.shelf, shared.stop.clone());
        let begun = shared
            .prewarms
            .take(peers, shelf, request.into_inner(), stop);
        let reports = begun.await?;
        Ok(Response::new(Box::pin(reports)))
    }

    async fn blob_index(
        &self,
        request: Request<BlobIndexRequest>,
    ) -> Result<Response<Self::BlobIndexStream>, Status> {
        self.shared.running()?;
        indexes::serve(&self.shared, request.into_inner()).await
    }

    async fn offer_blob_index(
        &self,
        request: Request<BlobIndexOffer>,
    ) -> Result<Response<BlobIndexTaken>, Status> {
        let shared = self.shared.running()?;
        let (peers, shelf) = (&shared.peers, &shared.shelf);
        let taken = shared.indexes.take(peers, shelf, request.into_inner());
        Ok(Response::new(taken.await?))
    }
}

/// The object in parts; the upload lasts until all are sent.
fn in_parts(bytes: Bytes, upload: Upload) -> impl Stream<Item = Result<ObjectPart, Status>> + Send {
    futures::stream::unfold((bytes, upload), |(mut bytes, mut upload)| async move {
        if bytes.is_empty() {
            return None;
        }
        let data = bytes.split_to(bytes.len().min(OBJECT_PART_BYTES));
        upload.complete = bytes.is_empty();
        Some((Ok(ObjectPart { data }), (bytes, upload)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::unmodified::{Unmodified, Written};

    #[test]
    fn frames_are_given_of_blobs_that_sluice_wrote_only() {
        let own = crate::fixture::TestLayer::even(1, 2, 3000);
        let chunk = own.chunks.chunk(0).unwrap();
        let bytes =
            |chunk: &Chunk| Bytes::from(vec![0; usize::try_from(chunk.blob.len()).unwrap()]);
        assert!(fits(Form::Frame, &bytes(&chunk), &chunk));
        // The same content in another blob.
        assert!(!fits(Form::Frame, &bytes(&chunk).slice(1..), &chunk));
        for written in Written::RANDOM {
            let chunk = Unmodified::new(2, written, 100_000)
                .layer
                .chunks
                .chunk(0)
                .unwrap();
            assert!(!fits(Form::Frame, &bytes(&chunk), &chunk), "{written:?}");
            assert!(fits(Form::Zstd, &bytes(&chunk), &chunk));
        }
    }
}
