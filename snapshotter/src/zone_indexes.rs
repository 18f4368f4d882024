// SPDX-License-Identifier: Apache-2.0
//! Indexes of blobs that nobody converted, from node to node: what one node of a zone made is lazy on all of them.
//!
//! - A node that wants one asks the homes of the blob ([`ZoneIndexes::bring`]); one fetch per blob, however many ask.
//! - A node that made one tells the homes ([`ZoneIndexes::tell`]); they fetch it of the teller when they find the time,
//!   one at a time ([`ZoneIndexes::take_offered`]).
//! - A node gives what it has (`give`).
//!
//! What another node gives is believed in nothing: `receive` checks that it is an index of this very blob before it is
//! kept, as another node's ([`crate::node_indexes`]). That its tree is what the blob's tar says is proven when the layer
//! is sealed.
//!
//! **Bounds** payloads in memory: [`ROOM_KIB`] together; offers that wait: [`OFFERS_WAITING`], beyond them refused; a
//! fetch of what was offered: [`TAKE_DEADLINE`]; other fetches end with those who wait for them. **Locks** the table of
//! flights is locked for map operations only.

mod give;
mod metrics;
mod receive;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared, WeakShared};
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};
use sluice_fetcher::cluster::node::NodeId;
use sluice_fetcher::peer::wire::OfferedIndex;
use sluice_fetcher::peer::{GivenIndex, Peers};
use tokio::sync::{Semaphore, mpsc};

use crate::config::IndexUse;
use crate::disk::DiskReserve;
use crate::node_indexes::{NodeIndex, NodeIndexes};

use metrics::Answer;
pub use metrics::ZoneIndexMetrics;
use receive::ReceiveError;

/// Payloads that may be in memory at once, in KiB: one of the largest, or some hundred usual ones.
const ROOM_KIB: usize = 256 << 10;
/// Offers that wait to be fetched: the layers of a roll-out.
const OFFERS_WAITING: usize = 256;
/// How long the fetch of what was offered may take. Nobody waits for it.
const TAKE_DEADLINE: Duration = Duration::from_secs(120);
/// How long the homes may take to hear of an index.
const TELL_DEADLINE: Duration = Duration::from_secs(5);
/// Homes that are asked one after the other when one gave what is no index.
const ATTEMPTS: usize = 2;
/// Forged indexes that are remembered: a few are an attack, and no more are needed to end it.
const FORGED_REMEMBERED: usize = 256;

/// Whether an index came; one fetch that several may wait for. Ends when nobody does.
type Flight = Shared<BoxFuture<'static, bool>>;

/// A blob of which an index is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedBlob {
    /// Which.
    pub blob: BlobDigest,
    /// The diff ID of its content and its size, where an image says so.
    pub expected: Option<(DiffId, u64)>,
}

/// The indexes of a zone, as one node sees them.
pub struct ZoneIndexes {
    node_indexes: Arc<NodeIndexes>,
    peers: Option<Arc<Peers>>,
    /// What indexes of other nodes are good for here.
    policy: IndexUse,
    reserve: DiskReserve,
    metrics: ZoneIndexMetrics,
    room: Semaphore,
    /// Indexes that were not what their layers' bytes say.
    forged: Mutex<BTreeSet<IndexDigest>>,
    flights: Mutex<HashMap<BlobDigest, WeakShared<BoxFuture<'static, bool>>>>,
    offers: mpsc::Sender<OfferedIndex>,
    offered: tokio::sync::Mutex<mpsc::Receiver<OfferedIndex>>,
}

impl fmt::Debug for ZoneIndexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZoneIndexes").finish_non_exhaustive()
    }
}

impl ZoneIndexes {
    /// Over what this node has, and these other nodes.
    #[must_use]
    pub fn new(
        node_indexes: Arc<NodeIndexes>,
        peers: Option<Arc<Peers>>,
        policy: IndexUse,
        reserve: DiskReserve,
        metrics: ZoneIndexMetrics,
    ) -> Self {
        let (offers, offered) = mpsc::channel(OFFERS_WAITING);
        Self {
            node_indexes,
            peers,
            policy,
            reserve,
            metrics,
            room: Semaphore::new(ROOM_KIB),
            forged: Mutex::default(),
            flights: Mutex::default(),
            offers,
            offered: tokio::sync::Mutex::new(offered),
        }
    }

    /// Whether there are other nodes to ask.
    #[must_use]
    pub fn has_peers(&self) -> bool {
        self.peers.is_some()
    }

    /// Whoever wanted an index did not wait for it any longer.
    pub fn was_late(&self) {
        self.metrics.asked(Answer::Late);
    }

    fn forged(&self) -> MutexGuard<'_, BTreeSet<IndexDigest>> {
        // Every critical section leaves the set whole.
        self.forged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this index was found not to be what its layer's bytes say, since the daemon started.
    #[must_use]
    pub fn is_forged(&self, digest: IndexDigest) -> bool {
        self.forged().contains(&digest)
    }

    /// The tree of an index was what its layer's bytes say.
    pub(crate) fn tree_was_right(&self) {
        self.metrics.proven(true);
    }

    /// The tree of an index was not what its layer's bytes say: it is dropped here, is not taken again, and who gave it
    /// is left alone. **Blocks**.
    pub(crate) fn tree_was_false(&self, blob: BlobDigest, digest: IndexDigest) {
        self.metrics.proven(false);
        let mut forged = self.forged();
        if forged.len() >= FORGED_REMEMBERED {
            forged.pop_first();
        }
        forged.insert(digest);
        drop(forged);
        let found = self.node_indexes.find(blob);
        let found = found.map(|it| it.filter(|index| index.digest == digest));
        let removed = found.and_then(|found| {
            let Some(index) = found else {
                return Ok(());
            };
            let giver = index.from.and_then(|name| NodeId::parse(&name).ok());
            if let (Some(peers), Some(giver)) = (&self.peers, giver) {
                peers.index_was_false(&giver);
            }
            self.node_indexes.remove(blob)
        });
        if let Err(error) = removed {
            tracing::warn!(%blob, "failed to drop a forged index: {error}");
        }
    }

    /// The index of a blob that is here, if it is the one with this digest.
    pub async fn held(&self, blob: BlobDigest, digest: IndexDigest) -> Option<NodeIndex> {
        let indexes = Arc::clone(&self.node_indexes);
        let found = tokio::task::spawn_blocking(move || indexes.find(blob)).await;
        let found = found.ok()?.inspect_err(|error| {
            tracing::warn!(%blob, "look for an index: {error}");
        });
        found.ok()?.filter(|index| index.digest == digest)
    }

    /// Brings the index of a blob from the homes of it; says whether it is here then.
    ///
    /// Has no deadline of its own. **Cancel** safe: what others wait for goes on.
    pub async fn bring(self: &Arc<Self>, wanted: WantedBlob) -> bool {
        let Some(peers) = self.peers.clone() else {
            return false;
        };
        let zone = Arc::clone(self);
        let fetch = async move {
            let answer = zone.ask_homes(&peers, wanted).await;
            zone.metrics.asked(answer);
            answer == Answer::Given
        };
        self.flight(wanted.blob, fetch).await
    }

    /// Fetches the index of a blob of this node; says whether it is here then.
    ///
    /// Has no deadline of its own. **Cancel** safe: what others wait for goes on.
    pub async fn take_from(self: &Arc<Self>, node: &NodeId, blob: BlobDigest) -> bool {
        let Some(peers) = self.peers.clone() else {
            return false;
        };
        let (zone, node) = (Arc::clone(self), node.clone());
        let fetch = async move {
            let wanted = WantedBlob {
                blob,
                expected: None,
            };
            let given = peers.blob_index_of(&node, blob, true).await;
            let taken = match given {
                Ok(given) => zone.receive(given, wanted).await,
                Err(error) => Err(ReceiveError::Peer(error)),
            };
            taken
                .inspect_err(|error| tell_failure(error, &peers, &node, blob))
                .is_ok()
        };
        self.flight(blob, fetch).await
    }

    /// The fetch of a blob's index that is under way, or this one.
    fn flight(
        &self,
        blob: BlobDigest,
        fetch: impl Future<Output = bool> + Send + 'static,
    ) -> Flight {
        // Every critical section leaves the table whole.
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let lives = |flight: &WeakShared<_>| {
            let flight: Option<Flight> = flight.upgrade();
            flight.filter(|it| it.peek().is_none())
        };
        flights.retain(|_, flight| lives(flight).is_some());
        if let Some(flight) = flights.get(&blob).and_then(WeakShared::upgrade) {
            return flight;
        }
        let flight = fetch.boxed().shared();
        flights.extend(flight.downgrade().map(|weak| (blob, weak)));
        flight
    }

    async fn ask_homes(&self, peers: &Arc<Peers>, wanted: WantedBlob) -> Answer {
        let (mut skip, mut answer) = (BTreeSet::new(), Answer::Nobody);
        for _ in 0..ATTEMPTS {
            let given = peers.blob_index(wanted.blob, false, &skip).await;
            let Some(given) = given else {
                break;
            };
            let node = given.node.clone();
            let Err(error) = self.receive(given, wanted).await else {
                return Answer::Given;
            };
            answer = match error {
                ReceiveError::False(_) => Answer::Refused,
                ReceiveError::Peer(_) | ReceiveError::Disk(_) => Answer::Failed,
            };
            tell_failure(&error, peers, &node, wanted.blob);
            skip.insert(node);
        }
        answer
    }

    /// Tells the homes of a blob that its index is here.
    pub async fn tell(&self, blob: BlobDigest) {
        let Some(peers) = &self.peers else {
            return;
        };
        let sizes = match self.parts_of(blob).await {
            Ok(Some((_, sizes))) => sizes,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%blob, "look for an index: {error}");
                return;
            }
        };
        let told = peers.offer_blob_index(blob, sizes);
        let told = tokio::time::timeout(TELL_DEADLINE, told).await;
        self.metrics.told(told.unwrap_or(0));
    }

    /// Fetches what other nodes tell of, one after the other, for as long as the daemon runs.
    pub async fn take_offered(self: &Arc<Self>) {
        let mut offered = self.offered.lock().await;
        while let Some(OfferedIndex { node, blob, .. }) = offered.recv().await {
            let indexes = Arc::clone(&self.node_indexes);
            let here = tokio::task::spawn_blocking(move || indexes.has(blob)).await;
            if here.unwrap_or(true) {
                continue;
            }
            // What nobody waits for does not fill the disk.
            if self.reserve.missing_bytes() > 0 {
                tracing::debug!(%blob, %node, "pass over an index: the disk is full");
                continue;
            }
            let taken = tokio::time::timeout(TAKE_DEADLINE, self.take_from(&node, blob)).await;
            if taken == Ok(true) {
                tracing::info!(%blob, %node, "keep the index of a layer for other nodes");
                self.metrics.taken();
            }
        }
    }

    async fn receive(&self, given: GivenIndex, wanted: WantedBlob) -> Result<(), ReceiveError> {
        let is_forged = |digest| self.is_forged(digest);
        receive::receive(given, wanted, &self.node_indexes, &self.room, is_forged).await
    }
}

/// Tells where it is to be told why an index that another node gave is not kept.
fn tell_failure(error: &ReceiveError, peers: &Peers, node: &NodeId, blob: BlobDigest) {
    match error {
        ReceiveError::False(reason) => {
            tracing::warn!(%node, %blob, "refuse an index: {reason}");
            peers.index_was_false(node);
        }
        ReceiveError::Peer(error) => {
            tracing::debug!(%node, %blob, "no index of a node: {error}");
        }
        ReceiveError::Disk(error) => {
            tracing::warn!(%blob, "failed to keep an index: {error}");
        }
    }
}
