// SPDX-License-Identifier: Apache-2.0
//! Indexes of blobs that nobody converted, which nodes that had the whole blob made, and give each other.
//!
//! An index is asked for by the digest of its blob: only who has the manifest knows it. The homes of the blob
//! ([`Peers::object_homes`]) collect what the nodes of the zone make: a node that made an index tells them, and they fetch
//! it of that node when they find the time. So an index outlives its maker, and of a large zone two nodes are asked.
//!
//! ```text
//! maker --OfferBlobIndex--> home --BlobIndex(background)--> maker       the home keeps it
//! asker --BlobIndex--> first home; the second when that has none, fails, or is late
//! ```
//!
//! No digest pins such an index. What comes here is bytes of bounded size; who takes them checks that they are an index
//! of that blob, and says so when they are none ([`Peers::index_was_false`]). Who speaks a version of the protocol
//! without these calls is neither asked nor told.
//!
//! **Bounds** sizes: those of the format, said before the first byte; what comes beyond them ends it. Uploads: the slots
//! and the budget of all uploads. Look-ups: [`FINDS_AT_ONCE`]. Offers: [`OFFERS_PER_SECOND`] and
//! [`OFFERED_BYTES_PER_SECOND`], beyond them refused. Silence: [`super::PeerOptions`].

mod ask;
mod serve;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};
use sluice_proto::peer::{BlobIndexOffer, BlobIndexTaken};
use tokio::sync::Semaphore;
use tonic::Status;

use super::BLOB_INDEX_PROTOCOL;
use super::client::Peers;
use super::server::{Refused, Shelf, refused, status_of, within_deadline};
use super::wire::{IndexSizes, OfferedIndex};
use crate::clock;
use crate::cluster::bucket::TokenBucket;
use crate::cluster::node::Node;
use crate::source::SourceError;
use crate::store::lock;

pub use ask::GivenIndex;
pub(super) use serve::serve;

/// Indexes that are looked up at once: each opens a file or two.
const FINDS_AT_ONCE: usize = 64;
/// Offers taken, on average and after a rest: an image has some ten layers, and each is indexed once in a zone.
const OFFERS_PER_SECOND: u64 = 8;
const OFFERS_SAVED: u64 = 256;
/// Bytes of what is offered, likewise: what a disk bears that also serves containers. An index with its windows is 2 % of
/// its blob.
const OFFERED_BYTES_PER_SECOND: u64 = 16 << 20;
const OFFERED_BYTES_SAVED: u64 = 1 << 30;
/// Bytes of one message.
const PART_BYTES: usize = 256 << 10;

/// An index that this node has, as it is given to others: `sizes.total_bytes()` bytes, the payload first.
pub struct HeldIndex {
    /// How much it is.
    pub sizes: IndexSizes,
    /// Its bytes.
    pub body: BoxStream<'static, Result<Bytes, SourceError>>,
}

impl std::fmt::Debug for HeldIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldIndex")
            .field("sizes", &self.sizes)
            .finish_non_exhaustive()
    }
}

/// Where a node keeps indexes of blobs that nobody converted.
#[async_trait]
pub trait IndexShelf: Send + Sync + std::fmt::Debug {
    /// The index of a blob that is here; nothing is fetched.
    ///
    /// **Errors** [`Refused`].
    async fn blob_index(&self, blob: BlobDigest) -> Result<HeldIndex, Refused>;

    /// Notes that another node has an index, to be fetched of it later if it is not here. Does not wait for that.
    ///
    /// **Errors** [`Refused`]: it is not wanted, or too many are waiting.
    async fn note_blob_index(&self, offered: OfferedIndex) -> Result<(), Refused>;
}

/// What stands for the index of a blob among the objects that have homes.
fn home_key(blob: BlobDigest) -> IndexDigest {
    IndexDigest::from_bytes(*blob.as_bytes())
}

/// Whether a node knows of such indexes.
fn speaks_of_them(node: &Node) -> bool {
    node.protocol >= BLOB_INDEX_PROTOCOL
}

/// Where other nodes ask for indexes and tell of them.
#[derive(Debug)]
pub(super) struct IndexDesk {
    finds: Semaphore,
    offers: Mutex<TokenBucket>,
    offered_bytes: Mutex<TokenBucket>,
}

impl IndexDesk {
    pub(super) fn new() -> Self {
        let now = clock::now();
        let bucket = |rate, saved| Mutex::new(TokenBucket::new(rate, saved, now));
        Self {
            finds: Semaphore::new(FINDS_AT_ONCE),
            offers: bucket(OFFERS_PER_SECOND, OFFERS_SAVED),
            offered_bytes: bucket(OFFERED_BYTES_PER_SECOND, OFFERED_BYTES_SAVED),
        }
    }

    /// The index of a blob that is here.
    async fn find(&self, shelf: &Arc<dyn Shelf>, blob: BlobDigest) -> Result<HeldIndex, Status> {
        let indexes = shelf
            .indexes()
            .ok_or_else(|| status_of(&Refused::NotHere))?;
        let busy = |_| Status::resource_exhausted("too many ask for indexes");
        let _turn = self.finds.try_acquire().map_err(busy)?;
        within_deadline(indexes.blob_index(blob)).await
    }

    /// Takes word of an index, if this node is a home of the blob.
    pub(super) async fn take(
        &self,
        peers: &Peers,
        shelf: &Arc<dyn Shelf>,
        offer: BlobIndexOffer,
    ) -> Result<BlobIndexTaken, Status> {
        let offered = OfferedIndex::try_from(offer).map_err(|error| refused(&error))?;
        if !peers
            .object_homes(home_key(offered.blob))
            .contains(&peers.me())
        {
            return Err(Status::failed_precondition("not a home of this blob"));
        }
        if peers.giver(&offered.node).is_none() {
            return Err(Status::failed_precondition("the caller gives nothing"));
        }
        let indexes = shelf
            .indexes()
            .ok_or_else(|| status_of(&Refused::NotHere))?;
        let now = clock::now();
        let fits = lock(&self.offers).try_take(1, now)
            && lock(&self.offered_bytes).try_take(offered.sizes.total_bytes(), now);
        if !fits {
            return Err(Status::resource_exhausted("too many indexes"));
        }
        within_deadline(indexes.note_blob_index(offered)).await?;
        Ok(BlobIndexTaken {})
    }
}
