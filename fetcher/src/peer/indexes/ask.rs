// SPDX-License-Identifier: Apache-2.0
//! Asking other nodes for an index, and telling them of one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, FuturesUnordered};
use futures::{StreamExt as _, TryStreamExt as _};
use sluice_blockindex::digest::BlobDigest;
use sluice_proto::peer::peer_client::PeerClient;
use sluice_proto::peer::{BlobIndexPart, blob_index_part};
use tokio::time::{Instant, sleep_until};
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};

use super::{PART_BYTES, home_key, speaks_of_them};
use crate::clock;
use crate::cluster::choice::Outcome;
use crate::cluster::node::{Node, NodeId};
use crate::peer::client::{PeerError, Peers};
use crate::peer::wire::{IndexSizes, OfferedIndex, WantedIndex, WireError};

/// How long the first home is alone before the second is asked as well: several round trips of a zone and a look at a
/// disk. Shorter: both homes send what one would do for; longer: a home that died costs a Prepare that much.
const HEAD_START: Duration = Duration::from_millis(300);
/// Nodes that a busy home names and that are asked.
const NAMED: usize = 3;
/// Between two attempts at a home that is busy.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// An index as another node gives it; nothing of it is believed.
pub struct GivenIndex {
    /// Who gives it.
    pub node: NodeId,
    /// How much it is, within the limits of the format.
    pub sizes: IndexSizes,
    /// Exactly `sizes.total_bytes()` bytes, the payload first, or an error as its last item.
    pub body: BoxStream<'static, Result<Bytes, PeerError>>,
}

impl std::fmt::Debug for GivenIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GivenIndex")
            .field("node", &self.node)
            .field("sizes", &self.sizes)
            .finish_non_exhaustive()
    }
}

/// What a node says first.
enum First {
    Index(GivenIndex),
    Busy(Vec<NodeId>),
}

impl Peers {
    /// The homes of a blob's index that are other nodes, speak of such indexes and are not to be passed over.
    fn index_homes(&self, blob: BlobDigest, skip: &BTreeSet<NodeId>) -> Vec<Node> {
        let homes = self.object_homes(home_key(blob)).into_iter();
        homes.filter_map(|id| self.index_giver(&id, skip)).collect()
    }

    fn index_giver(&self, id: &NodeId, skip: &BTreeSet<NodeId>) -> Option<Node> {
        let fits = *id != self.me() && !skip.contains(id);
        fits.then(|| self.giver(id))?.filter(speaks_of_them)
    }

    fn index_client(&self, node: &Node) -> Result<PeerClient<Channel>, PeerError> {
        let most = PART_BYTES + (1 << 10);
        Ok(self.client(node)?.max_decoding_message_size(most))
    }

    /// Asks the homes of a blob for its index, but not those in `skip`: one after the other as each says that it has
    /// none, or has not answered for a moment. `None` when none of them gives it.
    ///
    /// Has no deadline of its own: a home that is busy is asked again for as long as the caller waits. **Cancel** safe.
    pub async fn blob_index(
        self: &Arc<Self>,
        blob: BlobDigest,
        background: bool,
        skip: &BTreeSet<NodeId>,
    ) -> Option<GivenIndex> {
        let mut homes = self.index_homes(blob, skip).into_iter();
        let mut asked = FuturesUnordered::new();
        let mut next_at = Instant::now();
        loop {
            if homes.len() > 0 && (asked.is_empty() || Instant::now() >= next_at) {
                if let Some(home) = homes.next() {
                    asked.push(self.index_of_home(home, blob, background, skip));
                    next_at = Instant::now() + HEAD_START;
                }
                continue;
            }
            tokio::select! {
                biased;
                answer = asked.next() => match answer {
                    Some(Some(given)) => return Some(given),
                    Some(None) => next_at = Instant::now(),
                    None => return None,
                },
                () = sleep_until(next_at), if homes.len() > 0 => {}
            }
        }
    }

    /// Asks one node for the index of a blob, as long as it is busy again and again.
    ///
    /// **Errors** [`PeerError`]. Has no deadline of its own. **Cancel** safe.
    pub async fn blob_index_of(
        self: &Arc<Self>,
        node: &NodeId,
        blob: BlobDigest,
        background: bool,
    ) -> Result<GivenIndex, PeerError> {
        let node = self.index_giver(node, &BTreeSet::new());
        let node = node.ok_or(PeerError::Lacking)?;
        loop {
            match self.ask_for_index(&node, blob, background).await? {
                First::Index(given) => return Ok(given),
                First::Busy(_) => tokio::time::sleep(BUSY_PAUSE).await,
            }
        }
    }

    /// Asks a home, and those that it names while it is busy.
    async fn index_of_home(
        self: &Arc<Self>,
        home: Node,
        blob: BlobDigest,
        background: bool,
        skip: &BTreeSet<NodeId>,
    ) -> Option<GivenIndex> {
        loop {
            match self.ask_for_index(&home, blob, background).await {
                Ok(First::Index(given)) => return Some(given),
                Ok(First::Busy(named)) => {
                    let named = named.iter().filter_map(|id| self.index_giver(id, skip));
                    for node in named {
                        let answer = self.ask_for_index(&node, blob, background).await;
                        if let Ok(First::Index(given)) = answer {
                            return Some(given);
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(node = %home.id, %blob, "no index of a home: {error}");
                    return None;
                }
            }
            tokio::time::sleep(BUSY_PAUSE).await;
        }
    }

    /// One question; what came of it is noted of the node.
    async fn ask_for_index(
        self: &Arc<Self>,
        node: &Node,
        blob: BlobDigest,
        background: bool,
    ) -> Result<First, PeerError> {
        let begun = clock::now();
        let first = self.first_of_index(node, blob, background, begun).await;
        match &first {
            Ok(_) | Err(PeerError::Lacking) => {}
            Err(error) => self.observe(&node.id, fault_of(error)),
        }
        first
    }

    async fn first_of_index(
        self: &Arc<Self>,
        node: &Node,
        blob: BlobDigest,
        background: bool,
        begun: Instant,
    ) -> Result<First, PeerError> {
        let wanted = WantedIndex {
            node: self.me(),
            blob,
            background,
        };
        let silence = self.options.silence;
        let opened = async {
            let mut client = self.index_client(node)?;
            match client.blob_index(Request::new(wanted.to_proto())).await {
                Ok(answer) => Ok(answer.into_inner()),
                Err(status) => Err(match status.code() {
                    // Unimplemented by one that was set back to an older version.
                    Code::NotFound | Code::Unimplemented => PeerError::Lacking,
                    Code::ResourceExhausted => PeerError::Busy,
                    _ => status.into(),
                }),
            }
        };
        let opened = tokio::time::timeout(silence, opened).await;
        let mut parts = match opened.unwrap_or(Err(PeerError::Silent(silence))) {
            Err(PeerError::Busy) => return Ok(First::Busy(Vec::new())),
            opened => opened?,
        };
        match next_part(&mut parts, silence).await? {
            Some(blob_index_part::Part::Sizes(sizes)) => {
                let sizes = IndexSizes::try_from(sizes)?;
                let giving = Giving {
                    peers: Arc::clone(self),
                    node: node.id.clone(),
                    first_byte: clock::now() - begun,
                    left_bytes: sizes.total_bytes(),
                    parts,
                };
                Ok(First::Index(GivenIndex {
                    node: node.id.clone(),
                    sizes,
                    body: giving.body(),
                }))
            }
            Some(blob_index_part::Part::Busy(busy)) => {
                let named = busy.nodes.iter().take(NAMED);
                let named = named.filter_map(|id| NodeId::parse(id).ok());
                Ok(First::Busy(named.collect()))
            }
            Some(blob_index_part::Part::Data(_)) => Err(malformed("first part")),
            None => Err(PeerError::Lacking),
        }
    }

    /// Tells the homes of a blob that its index is here; says how many will have it.
    ///
    /// Has no deadline of its own. **Cancel** safe: the homes know or not.
    pub async fn offer_blob_index(&self, blob: BlobDigest, sizes: IndexSizes) -> usize {
        let homes = self.index_homes(blob, &BTreeSet::new());
        let offered = OfferedIndex {
            node: self.me(),
            blob,
            sizes,
        };
        let tell = |node: &Node| {
            let (node, offer) = (node.clone(), offered.to_proto());
            async move {
                let mut client = self.index_client(&node)?;
                client.offer_blob_index(Request::new(offer)).await?;
                Ok::<_, PeerError>(())
            }
        };
        let told = futures::future::join_all(homes.iter().map(tell)).await;
        let taken = told.into_iter().zip(&homes).filter(|(told, node)| {
            let refused = told.as_ref().err();
            refused.inspect(
                |error| tracing::debug!(node = %node.id, %blob, "index not taken: {error}"),
            );
            refused.is_none()
        });
        taken.count()
    }

    /// A node gave an index that is none, or not of the blob that was asked for.
    pub fn index_was_false(&self, node: &NodeId) {
        tracing::warn!(%node, "a node gave an index that is wrong");
        self.observe(node, Outcome::Lied);
    }
}

fn malformed(field: &'static str) -> PeerError {
    PeerError::Wire(WireError::Malformed { field })
}

fn fault_of(error: &PeerError) -> Outcome {
    match error {
        PeerError::Wire(_) | PeerError::Object { .. } | PeerError::Corrupt(_) => Outcome::Lied,
        PeerError::Silent(_) => Outcome::Slow,
        PeerError::Busy => Outcome::Busy,
        PeerError::Lacking => Outcome::Lacked,
        PeerError::Link(_) | PeerError::Status(_) => Outcome::Failed,
    }
}

/// The next part, within the time that a node may be silent; `None` at the end of the answer.
async fn next_part(
    parts: &mut Streaming<BlobIndexPart>,
    silence: Duration,
) -> Result<Option<blob_index_part::Part>, PeerError> {
    let next = tokio::time::timeout(silence, parts.try_next()).await;
    match next.map_err(|_| PeerError::Silent(silence))?? {
        None => Ok(None),
        Some(part) => part.part.map(Some).ok_or_else(|| malformed("part")),
    }
}

/// An index that is being given.
struct Giving {
    peers: Arc<Peers>,
    node: NodeId,
    first_byte: Duration,
    left_bytes: u64,
    parts: Streaming<BlobIndexPart>,
}

impl Giving {
    fn body(self) -> BoxStream<'static, Result<Bytes, PeerError>> {
        let body = stream::try_unfold(self, |mut giving| async move {
            if giving.left_bytes == 0 {
                let first_byte = giving.first_byte;
                let (peers, outcome) = (&giving.peers, Outcome::Answered { first_byte });
                peers.observe(&giving.node, outcome);
                return Ok(None);
            }
            let next = giving.next().await;
            let bytes = next.inspect_err(|error| {
                giving.peers.observe(&giving.node, fault_of(error));
            })?;
            giving.peers.downloaded(bytes.len() as u64, false).await;
            Ok(Some((bytes, giving)))
        });
        body.boxed()
    }

    async fn next(&mut self) -> Result<Bytes, PeerError> {
        let silence = self.peers.options.silence;
        match next_part(&mut self.parts, silence).await? {
            Some(blob_index_part::Part::Data(bytes)) => {
                let came = bytes.len() as u64;
                if came == 0 || came > self.left_bytes {
                    return Err(malformed("length of an index"));
                }
                self.left_bytes -= came;
                Ok(bytes)
            }
            Some(_) => Err(malformed("part")),
            None => Err(PeerError::Status("it ended in the middle".to_owned())),
        }
    }
}
