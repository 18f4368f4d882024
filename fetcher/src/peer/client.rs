// SPDX-License-Identifier: Apache-2.0
//! The other nodes, as the scheduler of this one sees them.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use sha2::{Digest as _, Sha256};
use sluice_blockindex::digest::IndexDigest;
use sluice_proto::peer::peer_client::PeerClient;
use sluice_proto::peer::{HelloReply, HelloRequest};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::PROTOCOL;
use super::frames::Frames;
use super::links::{Connect, LinkError, Links};
use super::route::{Reach, Route, patience};
use super::wire::{Part, WantedChunks, WantedObject, WireError};
use crate::clock;
use crate::cluster::bucket::{TokenBucket, share};
use crate::cluster::choice::{Outcome, Scores};
use crate::cluster::hedge::HedgeBudget;
use crate::cluster::holders::Holders;
use crate::cluster::home::{HomeLimit, PieceKey, SharedZones, eligible, far_homes, homes};
use crate::cluster::node::{Node, NodeId, Role, View};
use crate::cluster::uploads::{UploadLimits, Uploads};
use crate::source::Priority;
use crate::store::lock;
use sluice_blockindex::frames::DecodeFrameError;
use sluice_blockindex::units::{FRAME_MAX_BYTES, TOC_CHUNK_MAX_BYTES};

/// Homes of a piece that are asked before the origin: the second takes over when the first dies; a
/// third would be one more silent node to wait for.
const HOMES: usize = 2;
/// What a message may have besides the bytes of a chunk or an object's part.
const MESSAGE_SLACK_BYTES: u64 = 64 << 10;
/// Between two attempts to get an object of a node without a free slot: an index takes as long to send.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// How much of the requests may be asked twice, in percent, and how many of these may be saved up.
const HEDGE_PERCENT: u32 = 2;
const HEDGE_SAVED: u32 = 8;
/// The smallest burst of a token bucket: a chunk passes at once.
const BURST_BYTES: u64 = 1 << 20;

/// How a node takes part.
#[derive(Clone, Debug)]
pub struct PeerOptions {
    /// Bytes per second given to others; 0: no limit.
    pub upload_bytes: u64,
    /// Bytes per second taken from others and from origins; 0: no limit.
    pub download_bytes: u64,
    /// Bytes per second that all nodes of the zone together take from origins; 0: no limit.
    pub origin_bytes: u64,
    /// Requests at one origin at a time of all nodes of the zone together; 0: no limit, less than 3 counts as 3.
    pub origin_requests: u32,
    /// Zones that fetch each piece from the origin once for all of them.
    pub shared_zones: SharedZones,
    /// Uploads that run at once; half of them are for readers only.
    pub upload_slots: usize,
    /// Memory for frames that are passed on as they came.
    pub frames_bytes: usize,
    /// A node that gives no sign of life for so long is left. Six signs are due meanwhile: leaving a home
    /// that lives costs the origin a second fetch.
    pub silence: Duration,
    /// No node is asked besides a first one that was silent for less than this: a home answers at once that
    /// it works on it, and one that is only loaded must not cost the origin a second fetch.
    pub hedge_floor: Duration,
}

impl Default for PeerOptions {
    fn default() -> Self {
        Self {
            upload_bytes: 0,
            download_bytes: 0,
            origin_bytes: 0,
            origin_requests: 0,
            shared_zones: SharedZones::None,
            upload_slots: 16,
            frames_bytes: 64 << 20,
            silence: Duration::from_millis(1500),
            hedge_floor: Duration::from_millis(500),
        }
    }
}

/// Why a node did not give what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// No connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It answered with an error, or the stream broke.
    #[error("{0}")]
    Status(String),
    /// It sent what no node sends.
    #[error("malformed answer: {0}")]
    Wire(#[from] WireError),
    /// It sent bytes that are not what was asked for.
    #[error("{0}")]
    Corrupt(DecodeFrameError),
    /// It sent an object that has another digest.
    #[error("object has digest {actual}, want {expected}")]
    Object {
        /// Asked for.
        expected: IndexDigest,
        /// What came.
        actual: IndexDigest,
    },
    /// It was silent.
    #[error("nothing came for {0:?}")]
    Silent(Duration),
    /// It does not have it.
    #[error("it does not have it")]
    Lacking,
    /// It had no free upload slot for all of the time.
    #[error("it has no free upload slot")]
    Busy,
}

impl From<Status> for PeerError {
    fn from(status: Status) -> Self {
        PeerError::Status(format!("{}: {}", status.code(), status.message()))
    }
}

/// Parts of an answer as they come.
pub type Parts = BoxStream<'static, Result<Part, PeerError>>;

#[derive(Debug)]
pub(super) struct Buckets {
    pub(super) upload: Mutex<TokenBucket>,
    download: Mutex<TokenBucket>,
    origin: Mutex<TokenBucket>,
}

fn names(nodes: Vec<&Node>) -> Vec<NodeId> {
    nodes.into_iter().map(|node| node.id.clone()).collect()
}

/// The other nodes.
#[derive(Debug)]
pub struct Peers {
    pub(super) options: PeerOptions,
    view: watch::Receiver<Arc<View>>,
    links: Links,
    scores: Mutex<Scores>,
    hedges: Mutex<HedgeBudget>,
    pub(super) uploads: Mutex<Uploads<PieceKey>>,
    pub(super) buckets: Buckets,
    pub(crate) frames: Frames,
    home_limit: HomeLimit,
}

impl Peers {
    /// Sees other nodes through `view`, and connects by `connect`.
    #[must_use]
    pub fn new(options: PeerOptions, view: watch::Receiver<Arc<View>>, connect: Connect) -> Self {
        let now = clock::now();
        let bucket = |rate: u64| Mutex::new(TokenBucket::new(rate, rate.max(BURST_BYTES), now));
        let limits = UploadLimits::of_slots(options.upload_slots);
        let home_limit = HomeLimit::of_requests(options.origin_requests);
        let origin_share = share(options.origin_bytes, &view.borrow(), home_limit);
        Self {
            links: Links::new(connect),
            scores: Mutex::new(Scores::default()),
            hedges: Mutex::new(HedgeBudget::new(HEDGE_PERCENT, HEDGE_SAVED)),
            uploads: Mutex::new(Uploads::new(limits, Holders::default())),
            buckets: Buckets {
                upload: bucket(options.upload_bytes),
                download: bucket(options.download_bytes),
                origin: bucket(origin_share),
            },
            frames: Frames::new(options.frames_bytes),
            home_limit,
            options,
            view,
        }
    }

    /// How this node takes part.
    pub(crate) fn options(&self) -> &PeerOptions {
        &self.options
    }

    /// Who is there.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// This node.
    #[must_use]
    pub fn me(&self) -> NodeId {
        self.view.borrow().me.id.clone()
    }

    /// Whether the node is the first home of a piece in its zone, or nobody else is.
    pub(crate) fn is_home(&self, piece: &PieceKey) -> bool {
        let homes = self.homes_of(piece);
        homes.first().is_none_or(|home| *home == self.me())
    }

    /// Whether it is this node that fetches a piece from the origin: it is its home, also for other zones.
    pub(crate) fn is_origin_home(&self, piece: &PieceKey) -> bool {
        self.is_home(piece) && self.far_homes_of(piece).is_empty()
    }

    /// The homes of a piece in this zone, best first; may contain this node.
    pub(super) fn homes_of(&self, piece: &PieceKey) -> Vec<NodeId> {
        let view = self.view();
        names(homes(&view, &view.me.zone, piece, self.home_limit, HOMES))
    }

    /// The homes of a piece in another zone, which fetches it for this one, best first.
    fn far_homes_of(&self, piece: &PieceKey) -> Vec<NodeId> {
        let shared = &self.options.shared_zones;
        names(far_homes(
            &self.view(),
            shared,
            piece,
            self.home_limit,
            HOMES,
        ))
    }

    /// Who is asked for a piece before the origin, best first, as far as `reach` goes. This node stands where its
    /// own turn is to go there: after the homes of another zone.
    pub(super) fn givers_of(&self, piece: &PieceKey, reach: Reach) -> Vec<NodeId> {
        let me = self.me();
        let near = match reach {
            Reach::Origin => return vec![me],
            Reach::OtherZones => vec![me.clone()],
            Reach::All => self.homes_of(piece),
        };
        let own_turn = near.iter().position(|home| *home == me);
        let mut givers = near;
        let at = own_turn.unwrap_or(givers.len());
        givers.splice(at..at, self.far_homes_of(piece));
        givers
    }

    /// Which nodes may be asked on behalf of `asker`: none of its own zone, which would ask each other in circles,
    /// and none at all if it asks from another zone.
    #[must_use]
    pub fn reach_for(&self, asker: &NodeId) -> Reach {
        let view = self.view();
        let near = self.is_near(asker);
        match near && self.options.shared_zones.contains(&view.me.zone) {
            true => Reach::OtherZones,
            false => Reach::Origin,
        }
    }

    /// Whether a node is in this one's zone.
    #[must_use]
    pub(crate) fn is_near(&self, node: &NodeId) -> bool {
        let view = self.view();
        view.node(node).is_some_and(|it| it.zone == view.me.zone)
    }

    /// How many requests this node may have at one origin at a time, if that is limited for the zone.
    ///
    /// 0 for who is no home: it has one for each kind of waiter all the same, as a way to the origin always
    /// remains.
    pub(crate) fn origin_requests(&self) -> Option<usize> {
        if self.options.origin_requests == 0 {
            return None;
        }
        let view = self.view();
        let homes = eligible(&view, &view.me.zone, self.home_limit);
        let is_home = homes.iter().any(|home| home.id == view.me.id);
        let all = usize::try_from(self.options.origin_requests).unwrap_or(usize::MAX);
        Some(if is_home { all / homes.len() } else { 0 })
    }

    /// Looks at what is known of other nodes.
    ///
    /// **Locks** the table of scores while `look` runs: nothing in it may wait.
    pub(crate) fn scored<T>(&self, look: impl FnOnce(&Scores) -> T) -> T {
        look(&lock(&self.scores))
    }

    /// The way to a piece, for a transfer that may ask those within `reach`.
    pub(crate) fn route(
        &self,
        piece: &PieceKey,
        reach: Reach,
        priority: Priority,
        now: Instant,
    ) -> Route {
        let givers = self.givers_of(piece, reach);
        Route::new(self.me(), givers, now + patience(priority))
    }

    /// The node of this name, if it is there and gives.
    #[must_use]
    pub fn giver(&self, id: &NodeId) -> Option<Node> {
        let view = self.view();
        let node = view.node(id)?;
        let avoided = lock(&self.scores).is_avoided(id, clock::now());
        (node.role != Role::Leech && !avoided).then(|| node.clone())
    }

    /// What came of a request to a node.
    pub(crate) fn observe(&self, node: &NodeId, outcome: Outcome) {
        lock(&self.scores).observe(node, outcome, clock::now());
    }

    /// Something came of a node.
    pub(crate) fn heard(&self, node: &NodeId) {
        lock(&self.scores).heard(node, clock::now());
    }

    /// When something came of a node last, on whatever stream.
    pub(crate) fn last_heard(&self, node: &NodeId) -> Option<Instant> {
        self.scored(|scores| scores.last_heard(node))
    }

    /// How long a node may be silent before another is asked besides.
    pub(crate) fn hedge_after(&self, node: &NodeId) -> Duration {
        lock(&self.scores).hedge_after(node, clock::now())
    }

    /// Whether one more request may be made twice.
    pub(crate) fn try_hedge(&self) -> bool {
        lock(&self.hedges).try_hedge()
    }

    pub(super) fn client(&self, node: &Node) -> Result<PeerClient<Channel>, PeerError> {
        let most = TOC_CHUNK_MAX_BYTES.max(FRAME_MAX_BYTES) + MESSAGE_SLACK_BYTES;
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        Ok(PeerClient::new(self.links.to(node, &self.view())?).max_decoding_message_size(most))
    }

    /// Asks a node who it is.
    ///
    /// **Errors** [`PeerError`], within `deadline`.
    pub async fn hello(&self, node: &Node, deadline: Duration) -> Result<HelloReply, PeerError> {
        let mut client = self.client(node)?;
        let request = HelloRequest {
            node: self.me().to_string(),
            protocol: PROTOCOL,
        };
        let answer = tokio::time::timeout(deadline, client.hello(request)).await;
        Ok(answer
            .map_err(|_| PeerError::Silent(deadline))??
            .into_inner())
    }

    /// Nodes that are avoided because they were silent, and are still in the view.
    #[must_use]
    pub fn doubted(&self) -> Vec<Node> {
        let doubted = self.scored(|scores| scores.doubted(clock::now()));
        let view = self.view();
        let nodes = doubted.iter().filter_map(|id| view.node(id));
        nodes.cloned().collect()
    }

    /// Finds out whether a node that was silent is there, and if so, ends the doubt.
    ///
    /// By a new connection, which is used from then on: one on which packets were lost for seconds waits for
    /// seconds before it sends any again, long after the network has recovered.
    ///
    /// **Errors** [`PeerError`], within `deadline`.
    pub async fn probe(&self, node: &Node, deadline: Duration) -> Result<(), PeerError> {
        self.links.forget(&node.id);
        let reply = self.hello(node, deadline).await?;
        if reply.node == node.id.as_str() {
            self.observe(&node.id, Outcome::Reached);
        }
        Ok(())
    }

    /// Asks a node for chunks. The stream is unverified, and may be dropped at any time.
    pub(crate) async fn chunks(
        &self,
        node: &Node,
        wanted: &WantedChunks,
    ) -> Result<Parts, PeerError> {
        lock(&self.hedges).requested();
        let mut client = self.client(node)?;
        let answer = client.chunks(Request::new(wanted.to_proto())).await?;
        let parts = answer.into_inner();
        Ok(parts.map(|part| Ok(Part::try_from(part?)?)).boxed())
    }

    /// Asks one node for an object and checks its digest.
    ///
    /// **Errors** [`PeerError`], within `deadline`.
    pub async fn object(
        &self,
        node: &Node,
        wanted: &WantedObject,
        deadline: Duration,
    ) -> Result<Bytes, PeerError> {
        let begun = clock::now();
        let until = begun.checked_add(deadline);
        let fetched = async {
            loop {
                match self.object_of(node, wanted).await {
                    // Going elsewhere would cost the origin a fetch for each node that waits here.
                    Err(PeerError::Busy)
                        if until.is_some_and(|it| clock::now() + BUSY_PAUSE < it) =>
                    {
                        tokio::time::sleep(BUSY_PAUSE).await;
                    }
                    result => return result,
                }
            }
        };
        let fetched = tokio::time::timeout(deadline, fetched).await;
        let result = fetched.unwrap_or(Err(PeerError::Silent(deadline)));
        let outcome = match &result {
            Ok(_) => Outcome::Answered {
                first_byte: clock::now() - begun,
            },
            Err(PeerError::Object { .. } | PeerError::Wire(_)) => Outcome::Lied,
            Err(PeerError::Silent(_)) => Outcome::Slow,
            Err(PeerError::Lacking) => Outcome::Lacked,
            Err(PeerError::Busy) => Outcome::Busy,
            Err(_) => Outcome::Failed,
        };
        self.observe(&node.id, outcome);
        result
    }

    async fn object_of(&self, node: &Node, wanted: &WantedObject) -> Result<Bytes, PeerError> {
        let mut client = self.client(node)?;
        let mut parts = match client.object(Request::new(wanted.to_proto())).await {
            Ok(answer) => answer.into_inner(),
            Err(status) if status.code() == tonic::Code::NotFound => {
                return Err(PeerError::Lacking);
            }
            Err(status) if status.code() == tonic::Code::ResourceExhausted => {
                return Err(PeerError::Busy);
            }
            Err(status) => return Err(status.into()),
        };
        let length = usize::try_from(wanted.extent.len()).unwrap_or(usize::MAX);
        let mut all = BytesMut::new();
        let mut hasher = Sha256::new();
        while let Some(part) = parts.next().await {
            let part = part?;
            // More than was asked for is not kept: the digest will differ.
            if all.len() + part.data.len() > length {
                break;
            }
            hasher.update(&part.data);
            all.extend_from_slice(&part.data);
        }
        let actual = IndexDigest::from_bytes(hasher.finalize().into());
        if actual == wanted.digest {
            Ok(all.freeze())
        } else {
            Err(PeerError::Object {
                expected: wanted.digest,
                actual,
            })
        }
    }

    /// The homes of an object in this zone, best first; may contain this node.
    #[must_use]
    pub fn object_homes(&self, digest: IndexDigest) -> Vec<NodeId> {
        self.homes_of(&PieceKey::of_object(digest))
    }

    /// Who is asked for an object before the origin, as far as `reach` goes; see [`Self::object_homes`].
    #[must_use]
    pub fn object_givers(&self, digest: IndexDigest, reach: Reach) -> Vec<NodeId> {
        self.givers_of(&PieceKey::of_object(digest), reach)
    }

    /// Waits as the download budget says; to be called for what came. Cancel-safe.
    pub(crate) async fn downloaded(&self, bytes: u64, from_origin: bool) {
        let now = clock::now();
        let mut wait = lock(&self.buckets.download).take(bytes, now);
        if from_origin && self.options.origin_bytes > 0 {
            let rate = share(self.options.origin_bytes, &self.view(), self.home_limit);
            let mut bucket = lock(&self.buckets.origin);
            bucket.set_rate(rate, now);
            wait = wait.max(bucket.take(bytes, now));
        }
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}
