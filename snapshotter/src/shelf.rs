// SPDX-License-Identifier: Apache-2.0
//! What this node has for other nodes: layers, opened on their behalf where need be, layer indexes, and
//! boot lists.
//!
//! A layer that no snapshot of this node has is a *foster*: the node is its home, or a supernode. Its
//! index comes from the node that asks, its chunks from the repositories that the asker names, as far as
//! `[trust] lazy` allows these here, with this node's own credentials. The sweep leaves fosters alone
//! until nobody has asked for them for a while. Prewarmed layers are fosters as well, kept by
//! [`NodeShelf::hold`] for as long as the configuration says.
//!
//! An index is fetched from the origin by its home, once, however many ask at the same time. One of a blob that nobody
//! converted is in no registry: it is here, or comes of the node that asks, with its windows ([`ZoneIndexes`]).
//!
//! **Bounds** index payloads in memory: [`PAYLOADS_BYTES`]; fosters: their devices count for the store's
//! budget. **Locks** tables are locked for map operations only.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use lru::LruCache;
use sluice_blockindex::boot::BootKey;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};
use sluice_blockindex::extent::Extent;
use sluice_fetcher::blob_cache::{BlobCache, PieceGivers, Supply};
use sluice_fetcher::cluster::node::NodeId;
use sluice_fetcher::peer::wire::{OBJECT_MAX_BYTES, OfferedList, WantedLayer, WantedObject};
use sluice_fetcher::peer::{
    BlobNodes, IndexShelf, Peers, Reach, Refused, Reports, Shelf, WantedPiece, WantedPrewarm,
};
use sluice_fetcher::scheduler::LayerHandle;
use sluice_fetcher::source::{BlobStream, OriginSet, Priority, ReadContext};
use sluice_fetcher::store::DeviceKey;
use tokio::time::Instant;

use crate::boot::Boot;
use crate::indexes::{IndexPin, LayerIndex, PinnedBlob, check_digest};
use crate::layers::Layers;
use crate::prewarm::WeakPrewarms;
use crate::snapshots::BlobOrigin;
use crate::trust::Trust;
use crate::zone_indexes::ZoneIndexes;

/// Memory for payloads of indexes that other nodes may ask for.
const PAYLOADS_BYTES: usize = 64 << 20;
/// How long a home tries to get an index from the origin: as long as a Prepare waits by default.
const ORIGIN_DEADLINE: Duration = Duration::from_secs(5);
/// How long a piece of a raw blob may take.
const PIECE_DEADLINE: Duration = Duration::from_secs(120);
/// How long another node may take to give an index that it has.
const NODE_DEADLINE: Duration = Duration::from_secs(2);
/// A foster is kept for so long after somebody asked for it. Longer than a roll-out over a zone takes
/// from node to node; the store's budget may end it sooner.
const FOSTER_LIFE: Duration = Duration::from_secs(900);

/// An index that is being fetched.
type Flight = Shared<BoxFuture<'static, Result<Bytes, Refused>>>;

/// Recent payloads, within a budget.
struct Payloads {
    held_bytes: usize,
    entries: LruCache<IndexDigest, Bytes>,
}

/// What this node has for others.
pub struct NodeShelf {
    layers: Arc<Layers>,
    trust: Trust,
    /// Set once, when the cluster side has started.
    peers: OnceLock<Arc<Peers>>,
    boot: OnceLock<Arc<Boot>>,
    /// Raw blobs; set once, where there is a mirror.
    blobs: OnceLock<BlobCache>,
    prewarms: OnceLock<WeakPrewarms>,
    /// Indexes of blobs that nobody converted; set once.
    zone_indexes: OnceLock<Arc<ZoneIndexes>>,
    payloads: Mutex<Payloads>,
    flights: Mutex<HashMap<(IndexDigest, Reach), Flight>>,
    /// Until when each is kept.
    fosters: Mutex<HashMap<DeviceKey, Instant>>,
}

impl fmt::Debug for NodeShelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeShelf").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves the tables whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: impl fmt::Display) -> Refused {
    Refused::Failed(error.to_string())
}

/// An index from the first of these nodes that gives it.
///
/// **Errors** [`Refused`]: none does; by the last of them.
async fn index_of(
    peers: &Peers,
    nodes: impl Iterator<Item = &NodeId>,
    wanted: &WantedObject,
) -> Result<Bytes, Refused> {
    let mut refused = Refused::NotHere;
    for id in nodes {
        let Some(node) = peers.giver(id) else {
            continue;
        };
        match peers.object(&node, wanted, ORIGIN_DEADLINE).await {
            Ok(payload) => return Ok(payload),
            Err(error) => {
                tracing::debug!(node = %id, index = %wanted.digest, "no index from a node: {error}");
                refused = failed(error);
            }
        }
    }
    Err(refused)
}

impl NodeShelf {
    /// Over these layers; fetches for others only from places that `trust` allows.
    #[must_use]
    pub fn new(layers: Arc<Layers>, trust: Trust) -> Self {
        let payloads = Payloads {
            held_bytes: 0,
            entries: LruCache::unbounded(),
        };
        Self {
            layers,
            trust,
            peers: OnceLock::new(),
            boot: OnceLock::new(),
            blobs: OnceLock::new(),
            prewarms: OnceLock::new(),
            zone_indexes: OnceLock::new(),
            payloads: Mutex::new(payloads),
            flights: Mutex::default(),
            fosters: Mutex::default(),
        }
    }

    /// From now on other nodes are asked; once.
    pub fn attach(&self, peers: Arc<Peers>) {
        let _ = self.peers.set(peers);
    }

    /// From now on it has boot lists, too; once.
    pub fn attach_boot(&self, boot: Arc<Boot>) {
        let _ = self.boot.set(boot);
    }

    /// From now on raw blobs are given from this cache; once.
    pub fn attach_blobs(&self, blobs: BlobCache) {
        let _ = self.blobs.set(blobs);
    }

    /// From now on other nodes may ask for prewarms; once.
    pub fn attach_prewarms(&self, prewarms: WeakPrewarms) {
        let _ = self.prewarms.set(prewarms);
    }

    /// From now on it has indexes of blobs that nobody converted, too; once.
    pub fn attach_indexes(&self, indexes: Arc<ZoneIndexes>) {
        let _ = self.zone_indexes.set(indexes);
    }

    /// The other nodes, where there are any.
    #[must_use]
    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.get()
    }

    /// Layers that are kept for other nodes, or for a start that is to come.
    #[must_use]
    pub fn fosters(&self) -> BTreeSet<DeviceKey> {
        let (mut fosters, now) = (lock(&self.fosters), Instant::now());
        fosters.retain(|_, until| *until > now);
        fosters.keys().copied().collect()
    }

    /// Keeps a layer from the sweep for this time at least, whether a snapshot has it or not; the store's
    /// budget may end it sooner.
    pub fn hold(&self, key: DeviceKey, life: Duration) {
        let until = Instant::now() + life;
        let mut fosters = lock(&self.fosters);
        let known = fosters.entry(key).or_insert(until);
        *known = until.max(*known);
    }

    /// Keeps the payload of an index, for nodes that may ask for it.
    pub fn keep(&self, digest: IndexDigest, payload: &Bytes) {
        if self.peers().is_none() || payload.len() > PAYLOADS_BYTES {
            return;
        }
        let mut payloads = lock(&self.payloads);
        payloads.held_bytes += payload.len();
        if let Some(old) = payloads.entries.put(digest, payload.clone()) {
            payloads.held_bytes -= old.len();
        }
        while payloads.held_bytes > PAYLOADS_BYTES {
            let Some((_, old)) = payloads.entries.pop_lru() else {
                break;
            };
            payloads.held_bytes -= old.len();
        }
    }

    fn kept(&self, digest: IndexDigest) -> Option<Bytes> {
        lock(&self.payloads).entries.get(&digest).cloned()
    }

    fn allowed(&self, places: &OriginSet) -> Vec<BlobOrigin> {
        let places = places.places().into_iter();
        let places = places.map(|place| BlobOrigin::from(&place));
        places.filter(|place| self.trust.allows(place)).collect()
    }

    /// An index for this node itself: from its home, or from the origin when that is this node.
    ///
    /// **Errors** [`Refused`]: the caller has places of its own to ask. **Cancel** safe.
    pub async fn index_of_zone(&self, wanted: &WantedObject) -> Result<Bytes, Refused> {
        let Some(peers) = self.peers() else {
            return Err(Refused::NotHere);
        };
        let me = peers.me();
        let homes = peers.object_homes(wanted.digest);
        let before_me = homes.iter().take_while(|home| **home != me);
        match index_of(peers, before_me, wanted).await {
            Ok(payload) => {
                self.keep(wanted.digest, &payload);
                Ok(payload)
            }
            Err(_) if homes.contains(&me) => self.object(wanted).await,
            Err(refused) => Err(refused),
        }
    }

    /// The flight of an index; the first who wants it begins it.
    ///
    /// One that asks other zones is not joined by who asks from another zone: two zones might wait for each other.
    fn flight(&self, wanted: &WantedObject, places: &[BlobOrigin]) -> Flight {
        let peers = self.peers().map(Arc::clone);
        let reach = peers
            .as_ref()
            .map_or(Reach::Origin, |it| it.reach_for(&wanted.node));
        let mut flights = lock(&self.flights);
        flights.retain(|_, flight| flight.peek().is_none());
        if let Some(flight) = flights.get(&(wanted.digest, reach)) {
            return flight.clone();
        }
        let mut beyond = wanted.clone();
        let source = self.layers.source(wanted.blob, wanted.blob_bytes, places);
        let (extent, digest) = (wanted.extent, wanted.digest);
        let fetch = async move {
            if let Some(peers) = peers.filter(|_| reach > Reach::Origin) {
                let me = peers.me();
                let far = peers.object_givers(digest, reach);
                beyond.node = me.clone();
                let far = far.iter().filter(|home| **home != me);
                if let Ok(payload) = index_of(&peers, far, &beyond).await {
                    return Ok(payload);
                }
            }
            let context = ReadContext::new(Priority::Foreground).with_timeout(ORIGIN_DEADLINE);
            let stream = source.open(&context, extent).await.map_err(failed)?;
            let stream = stream.narrow(extent).map_err(failed)?;
            let payload = stream.collect(extent.len()).await.map_err(failed)?;
            check_digest(&payload, digest).map_err(failed)?;
            Ok(payload)
        };
        let flight = fetch.boxed().shared();
        flights.insert((digest, reach), flight.clone());
        flight
    }

    /// The index of a layer that no snapshot here has.
    async fn foster_index(
        &self,
        wanted: &WantedLayer,
        asker: &NodeId,
    ) -> Result<Arc<LayerIndex>, Refused> {
        let pin = IndexPin {
            digest: wanted.key.index,
            diff_id: wanted.key.diff_id,
            blob_bytes: wanted.blob_bytes,
            blob: PinnedBlob::Either(wanted.blob),
        };
        let indexes = Arc::clone(self.layers.indexes());
        let known = tokio::task::spawn_blocking(move || indexes.get_checked(&pin)).await;
        let index = match known.map_err(failed)?.map_err(failed)? {
            Some(index) => index,
            None => {
                let payload = match self.payload_here(pin.digest, wanted.blob).await {
                    Some(payload) => payload,
                    None => self.index_of_asker(wanted, asker).await?,
                };
                let indexes = Arc::clone(self.layers.indexes());
                let stored = tokio::task::spawn_blocking(move || indexes.put(&payload, &pin));
                stored.await.map_err(failed)?.map_err(failed)?
            }
        };
        if index
            .metadata()
            .unmodified
            .is_some_and(|it| it.windows.is_some())
        {
            self.seek_windows(pin.digest, wanted.blob, asker).await;
        }
        Ok(index)
    }

    /// The payload of an index that is here, be it of a blob that nobody converted.
    async fn payload_here(&self, digest: IndexDigest, blob: BlobDigest) -> Option<Bytes> {
        if let Some(payload) = self.kept(digest) {
            return Some(payload);
        }
        let held = self.zone_indexes.get()?.held(blob, digest).await?;
        self.keep(digest, &held.payload);
        Some(held.payload)
    }

    /// Has the index with this digest keep its windows, from here or of the node that asks. Without them the layer is
    /// read from its front only, and the asker is told that the rest lacks.
    async fn seek_windows(&self, digest: IndexDigest, blob: BlobDigest, asker: &NodeId) {
        let indexes = self.layers.indexes();
        let Some(zone) = self
            .zone_indexes
            .get()
            .filter(|_| indexes.windows(digest).is_none())
        else {
            return;
        };
        let mut held = zone.held(blob, digest).await;
        if held.is_none() {
            let fetched = zone.take_from(asker, blob);
            if tokio::time::timeout(NODE_DEADLINE, fetched).await == Ok(true) {
                held = zone.held(blob, digest).await;
            }
        }
        if let Some(windows) = held.and_then(|held| held.windows)
            && let Err(error) = indexes.keep_windows(digest, &windows)
        {
            tracing::warn!(%blob, "failed to keep windows: {error}");
        }
    }

    async fn index_of_asker(&self, wanted: &WantedLayer, asker: &NodeId) -> Result<Bytes, Refused> {
        let peers = self.peers().ok_or(Refused::NotHere)?;
        let node = peers
            .giver(asker)
            .ok_or_else(|| failed("the asker is no member of the cluster"))?;
        let longest = wanted.blob_bytes.min(OBJECT_MAX_BYTES);
        let object = WantedObject {
            node: peers.me(),
            digest: wanted.key.index,
            blob: wanted.blob,
            blob_bytes: wanted.blob_bytes,
            extent: Extent::new(0, longest).ok_or_else(|| failed("the blob is empty"))?,
            places: OriginSet::default(),
            present_only: true,
        };
        let payload = peers.object(&node, &object, NODE_DEADLINE).await;
        let payload = payload.map_err(failed)?;
        self.keep(wanted.key.index, &payload);
        Ok(payload)
    }
}

#[async_trait]
impl Shelf for NodeShelf {
    async fn layer(
        &self,
        wanted: &WantedLayer,
        asker: &NodeId,
        present_only: bool,
    ) -> Result<Arc<LayerHandle>, Refused> {
        let key = wanted.key;
        if let Some(until) = lock(&self.fosters).get_mut(&key) {
            *until = (Instant::now() + FOSTER_LIFE).max(*until);
        }
        match self.layers.by_key(key).await {
            Ok(Some(handle)) => return Ok(handle),
            Ok(None) if present_only => return Err(Refused::NotHere),
            Ok(None) => {}
            Err(error) => return Err(failed(error)),
        }
        let places = self.allowed(&wanted.places);
        if places.is_empty() {
            let why = "[trust] lazy allows none of the layer's repositories";
            return Err(Refused::NotAllowed(why.to_owned()));
        }
        let index = self.foster_index(wanted, asker).await?;
        // Before it is opened: the sweep must not find it without a reason to be.
        self.hold(key, FOSTER_LIFE);
        let (blob, blob_bytes) = (wanted.blob, wanted.blob_bytes);
        let opened = self.layers.open_at(key, blob, blob_bytes, &places, &index);
        let handle = opened.await.map_err(failed)?;
        tracing::info!(device = %key, node = %asker, "opened a layer on behalf of a node");
        Ok(handle)
    }

    async fn object(&self, wanted: &WantedObject) -> Result<Bytes, Refused> {
        if let Some(payload) = self.payload_here(wanted.digest, wanted.blob).await {
            return Ok(payload);
        }
        if wanted.present_only {
            return Err(Refused::NotHere);
        }
        let places = self.allowed(&wanted.places);
        if places.is_empty() {
            let why = "[trust] lazy allows none of the layer's repositories";
            return Err(Refused::NotAllowed(why.to_owned()));
        }
        let payload = self.flight(wanted, &places).await?;
        self.keep(wanted.digest, &payload);
        Ok(payload)
    }

    async fn boot_list(&self, key: BootKey) -> Result<Bytes, Refused> {
        let boot = self.boot.get().ok_or(Refused::NotHere)?;
        boot.given(key).await.ok_or(Refused::NotHere)
    }

    async fn take_boot_list(&self, offered: OfferedList) -> Result<(), Refused> {
        let boot = self.boot.get().ok_or(Refused::NotHere)?;
        let OfferedList { node, key, list } = offered;
        let taken = boot.take(key, node.as_str(), &list).await;
        taken.map_err(|error| Refused::NotAllowed(error.to_string()))
    }

    async fn blob(&self, wanted: &WantedPiece) -> Result<BlobStream, Refused> {
        let blobs = self.blobs.get().ok_or(Refused::NotHere)?;
        let piece = &wanted.piece;
        let here = blobs.has_piece(piece);
        let places = match wanted.present_only {
            // Whose place nobody is can give nothing more than is here.
            true => Vec::new(),
            false => self.allowed(&wanted.places),
        };
        if places.is_empty() && wanted.present_only && !here {
            return Err(Refused::NotHere);
        }
        if places.is_empty() && !wanted.present_only && !here {
            let why = "[trust] lazy allows none of the blob's repositories";
            return Err(Refused::NotAllowed(why.to_owned()));
        }
        let peers = self.peers().filter(|_| !wanted.present_only);
        let nodes = peers.and_then(|peers| BlobNodes::on_behalf(peers, wanted));
        let supply = Supply {
            origin: self.layers.source(piece.blob, piece.blob_bytes, &places),
            nodes: nodes.map(|it| Arc::new(it) as Arc<dyn PieceGivers>),
        };
        let context = ReadContext::new(Priority::Foreground).with_timeout(PIECE_DEADLINE);
        let read = blobs.read_piece(&context, piece, supply).await;
        read.map_err(failed)
    }

    async fn prewarm(&self, wanted: WantedPrewarm) -> Result<Reports, Refused> {
        let prewarms = self.prewarms.get().and_then(WeakPrewarms::get);
        let prewarms = prewarms.ok_or(Refused::NotHere)?;
        let origin = BlobOrigin::from(wanted.reference.place());
        // Before the registry hears of it: nobody makes this node talk to whom it does not trust.
        if !self.trust.allows(&origin) {
            let why = format!("[trust] lazy does not allow {origin}");
            return Err(Refused::NotAllowed(why));
        }
        prewarms.start_for(wanted)
    }

    fn indexes(&self) -> Option<&dyn IndexShelf> {
        let indexes = self.zone_indexes.get()?;
        Some(&**indexes)
    }
}
