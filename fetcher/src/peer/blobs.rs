// SPDX-License-Identifier: Apache-2.0
//! Pieces of raw blobs between nodes, for pulls that are not lazy.
//!
//! Each piece has homes, as pieces of layers have. The home reads it from its own cache, which fetches it
//! from the origin once, and sends it while it arrives; with no upload slot free it names nodes that have
//! the piece. Nothing of a piece can be verified by itself: the asker verifies the whole blob, and tells on
//! who gave parts of one that is wrong.
//!
//! A home that may not fetch the blob, for want of a credential, says so and is not asked again by that
//! reader: it goes to the origin, with the credential of its client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::Extent;
use sluice_proto::peer::{BlobPart, BlobRequest, blob_part};
use tonic::Request;

use super::client::{PeerError, Peers};
use super::route::Reach;
use super::wire::{WireError, places_to_proto};
use crate::blob_cache::{GivenPiece, Piece, PieceGivers};
use crate::clock;
use crate::cluster::choice::Outcome;
use crate::cluster::node::{Node, NodeId};
use crate::registry::Repository;
use crate::source::{OriginSet, SourceError};

mod serve;

pub(super) use serve::{none, serve};

/// Nodes that a busy home names and that are asked.
const NAMED: usize = 3;
/// How long a busy home is asked again and again: as long as it takes to send a piece to each of its slots.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two of these.
const BUSY_PAUSE: Duration = Duration::from_millis(100);
/// Longest time without a byte of a piece, whatever signs of life come: what a home waits for its origin.
const STALL: Duration = Duration::from_secs(30);

/// A piece that a node asks for.
#[derive(Clone, Debug)]
pub struct WantedPiece {
    /// Who asks.
    pub node: NodeId,
    /// What.
    pub piece: Piece,
    /// Where it may be fetched.
    pub places: OriginSet,
    /// Only if it is here or on its way.
    pub present_only: bool,
}

impl TryFrom<BlobRequest> for WantedPiece {
    type Error = WireError;

    fn try_from(request: BlobRequest) -> Result<Self, WireError> {
        let malformed = |field| WireError::Malformed { field };
        let digest = request.blob_digest.as_ref().try_into();
        let blob = BlobDigest::from_bytes(digest.map_err(|_| malformed("blob digest"))?);
        let number = u32::try_from(request.start / crate::blob_cache::PIECE_BYTES);
        let number = number.map_err(|_| malformed("range"))?;
        let piece = Piece::new(blob, request.blob_bytes, number);
        let piece = piece.ok_or_else(|| malformed("range"))?;
        // Whole pieces only: their homes are what spreads the load.
        if Extent::new(request.start, request.end) != Some(piece.extent()) {
            return Err(malformed("range"));
        }
        Ok(WantedPiece {
            node: NodeId::parse(&request.node)?,
            piece,
            places: super::wire::places(&request.places),
            present_only: request.present_only,
        })
    }
}

impl WantedPiece {
    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> BlobRequest {
        let extent = self.piece.extent();
        BlobRequest {
            node: self.node.to_string(),
            blob_digest: Bytes::copy_from_slice(self.piece.blob.as_bytes()),
            blob_bytes: self.piece.blob_bytes,
            start: extent.start(),
            end: extent.end(),
            places: places_to_proto(&self.places),
            present_only: self.present_only,
        }
    }
}

/// What a node answers first.
enum First {
    Piece(GivenPiece),
    Busy(Vec<NodeId>),
    /// It will not give this blob, and that is no fault.
    Refused,
    Failed(PeerError, Outcome),
}

/// The other nodes, for one reader of one blob.
#[derive(Debug)]
pub struct BlobNodes {
    peers: Arc<Peers>,
    places: OriginSet,
    /// Which nodes may be asked.
    reach: Reach,
    /// A home said that it may not fetch the blob.
    refused: AtomicBool,
}

impl BlobNodes {
    /// Asks `peers` for pieces of a blob that `place` has.
    #[must_use]
    pub fn new(peers: Arc<Peers>, place: Repository) -> Self {
        BlobNodes {
            peers,
            places: OriginSet::new([place]),
            reach: Reach::All,
            refused: AtomicBool::new(false),
        }
    }

    /// Asks those nodes that may be asked on behalf of a node that wants a piece; `None` where there are none.
    #[must_use]
    pub fn on_behalf(peers: &Arc<Peers>, wanted: &WantedPiece) -> Option<Self> {
        let reach = peers.reach_for(&wanted.node);
        (reach > Reach::Origin).then(|| BlobNodes {
            peers: Arc::clone(peers),
            places: wanted.places.clone(),
            reach,
            refused: AtomicBool::new(false),
        })
    }

    async fn ask(&self, node: &Node, piece: &Piece, present_only: bool) -> First {
        let wanted = WantedPiece {
            node: self.peers.me(),
            piece: *piece,
            places: self.places.clone(),
            present_only,
        };
        let silence = self.peers.options.silence;
        let begun = clock::now();
        let opened = async {
            let mut client = self.peers.client(node)?;
            let answer = client.blob(Request::new(wanted.to_proto())).await?;
            Ok::<_, PeerError>(answer.into_inner())
        };
        let mut parts = match tokio::time::timeout(silence, opened).await {
            Ok(Ok(parts)) => parts,
            Ok(Err(error)) => return First::Failed(error, Outcome::Failed),
            Err(_) => return First::Failed(PeerError::Silent(silence), Outcome::Slow),
        };
        // Signs of life until the first bytes come.
        loop {
            if begun.elapsed() > STALL {
                return First::Failed(PeerError::Silent(STALL), Outcome::Slow);
            }
            let next = match tokio::time::timeout(silence, parts.next()).await {
                Ok(next) => next,
                Err(_) => return First::Failed(PeerError::Silent(silence), Outcome::Slow),
            };
            match next {
                Some(Ok(BlobPart { part: Some(part) })) => match part {
                    blob_part::Part::Working(_) => {}
                    blob_part::Part::Busy(busy) => {
                        let named = busy.nodes.iter().take(NAMED);
                        let named = named.filter_map(|id| NodeId::parse(id).ok());
                        return First::Busy(named.collect());
                    }
                    blob_part::Part::Data(first) => {
                        let giving = Giving {
                            peers: Arc::clone(&self.peers),
                            node: node.id.clone(),
                            silence,
                            first_byte: begun.elapsed(),
                            left_bytes: piece.extent().len(),
                            at: piece.extent().start(),
                        };
                        return First::Piece(giving.body(first, parts));
                    }
                },
                Some(Err(status))
                    if matches!(
                        status.code(),
                        tonic::Code::PermissionDenied | tonic::Code::NotFound
                    ) =>
                {
                    return First::Refused;
                }
                Some(Err(status)) => return First::Failed(status.into(), Outcome::Failed),
                Some(Ok(_)) | None => {
                    return First::Failed(PeerError::Lacking, Outcome::Failed);
                }
            }
        }
    }

    /// Asks a home, and who it names while it is busy.
    async fn of_home(&self, home: &Node, piece: &Piece, skip: &[NodeId]) -> Option<GivenPiece> {
        let begun = clock::now();
        let me = self.peers.me();
        loop {
            match self.ask(home, piece, false).await {
                First::Piece(given) => return Some(given),
                First::Refused => {
                    self.refused.store(true, Ordering::Relaxed);
                    return None;
                }
                First::Failed(error, outcome) => {
                    tracing::debug!(node = %home.id, blob = %piece.blob, "no piece of a home: {error}");
                    self.peers.observe(&home.id, outcome);
                    return None;
                }
                First::Busy(named) => {
                    let may = |id: &NodeId| self.reach == Reach::All || !self.peers.is_near(id);
                    let fit = |id: &&NodeId| **id != me && !skip.contains(id) && may(id);
                    for id in named.iter().filter(fit) {
                        if let Some(node) = self.peers.giver(id)
                            && let First::Piece(given) = self.ask(&node, piece, true).await
                        {
                            return Some(given);
                        }
                    }
                }
            }
            if begun.elapsed() > BUSY_PATIENCE {
                self.peers.observe(&home.id, Outcome::Busy);
                return None;
            }
            tokio::time::sleep(BUSY_PAUSE).await;
        }
    }
}

#[async_trait]
impl PieceGivers for BlobNodes {
    async fn open(&self, piece: &Piece, skip: &[NodeId]) -> Option<GivenPiece> {
        let me = self.peers.me();
        for home in self.peers.givers_of(&piece.key(), self.reach) {
            // Its own turn: no third node is asked on anybody's behalf.
            if home == me || self.refused.load(Ordering::Relaxed) {
                return None;
            }
            if skip.contains(&home) {
                continue;
            }
            let Some(node) = self.peers.giver(&home) else {
                continue;
            };
            if let Some(given) = self.of_home(&node, piece, skip).await {
                return Some(given);
            }
        }
        None
    }

    fn lied(&self, nodes: &[NodeId]) {
        for node in nodes {
            tracing::warn!(%node, "a node gave parts of a blob that is wrong");
            self.peers.observe(node, Outcome::Lied);
        }
    }
}

/// A piece that is being given.
struct Giving {
    peers: Arc<Peers>,
    node: NodeId,
    silence: Duration,
    first_byte: Duration,
    left_bytes: u64,
    at: u64,
}

impl Giving {
    fn body(self, first: Bytes, parts: tonic::Streaming<BlobPart>) -> GivenPiece {
        let node = self.node.clone();
        let body = stream::try_unfold(
            (self, Some(first), parts),
            move |(mut giving, first, mut parts)| async move {
                if giving.left_bytes == 0 {
                    giving.ended();
                    return Ok(None);
                }
                let bytes = match first {
                    Some(first) => first,
                    None => giving.next(&mut parts).await.inspect_err(|_| {
                        giving.peers.observe(&giving.node, Outcome::Failed);
                    })?,
                };
                // More than was asked for is nobody's.
                let length = usize::try_from(giving.left_bytes).unwrap_or(usize::MAX);
                let bytes = bytes.slice(..bytes.len().min(length));
                let came = bytes.len() as u64;
                giving.peers.downloaded(came, false).await;
                giving.left_bytes -= came;
                giving.at += came;
                Ok(Some((bytes, (giving, None, parts))))
            },
        );
        GivenPiece {
            node,
            body: body.boxed(),
        }
    }

    fn ended(&self) {
        let outcome = Outcome::Answered {
            first_byte: self.first_byte,
        };
        self.peers.observe(&self.node, outcome);
    }

    async fn next(&self, parts: &mut tonic::Streaming<BlobPart>) -> Result<Bytes, SourceError> {
        let waiting = clock::now();
        let broke = |reason: String| SourceError::Interrupted {
            offset: self.at,
            expected_end: self.at + self.left_bytes,
            reason,
        };
        loop {
            let silent = waiting.elapsed() > STALL;
            let next = tokio::time::timeout(self.silence, parts.next()).await;
            match next {
                Ok(Some(Ok(BlobPart { part: Some(part) }))) => match part {
                    blob_part::Part::Data(bytes) if !bytes.is_empty() => return Ok(bytes),
                    blob_part::Part::Working(_) if !silent => {}
                    _ => return Err(broke("no bytes".into())),
                },
                Ok(Some(Err(status))) => return Err(broke(status.message().to_owned())),
                Ok(Some(Ok(_)) | None) => return Err(broke("the node ended it".into())),
                Err(_) => {
                    return Err(SourceError::Stalled {
                        after: self.silence,
                        offset: self.at,
                    });
                }
            }
        }
    }
}
