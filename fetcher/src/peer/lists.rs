// SPDX-License-Identifier: Apache-2.0
//! Boot lists that nodes give each other.
//!
//! A list is named by the key of its run of layers, which is made of the digests of their indexes: only
//! who has the manifest knows it. Its homes ([`Peers::object_homes`]) collect what the nodes of the zone
//! learn, and are asked by a node that has none. So a start anywhere is a start with the zone's list, and
//! the death of one home costs nothing.
//!
//! A list is a hint. On the way it is bytes of bounded size; who takes it decodes and checks it, and every
//! chunk that it names is verified like any other. Nothing is retried but what a home was too busy for: the next
//! start asks and tells again.
//!
//! **Bounds** answers being made: [`FINDS_AT_ONCE`], beyond them "busy"; lists taken: [`OFFERS_PER_SECOND`]
//! and a burst of [`OFFERS_SAVED`], beyond them refused; bytes: [`LIST_MAX_BYTES`] each, within the upload
//! budget.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sluice_blockindex::boot::{BootKey, BootList};
use sluice_blockindex::digest::IndexDigest;
use sluice_proto::peer::peer_client::PeerClient;
use sluice_proto::peer::{BootListOffer, BootListReply, BootListRequest, BootListTaken};
use tokio::sync::Semaphore;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::client::{PeerError, Peers};
use super::server::{Shelf, refused, within_deadline};
use super::wire::{LIST_MAX_BYTES, OfferedList, WantedList, list_of};
use crate::clock;
use crate::cluster::bucket::TokenBucket;
use crate::cluster::node::{Node, NodeId, Role};
use crate::store::lock;

/// Lists that are looked up at once: each is a read of the metadata store, done in a millisecond.
const FINDS_AT_ONCE: usize = 64;
/// Lists taken from other nodes, on average and after a rest: each is a durable write, and a node that tells
/// of more starts than that has told enough.
const OFFERS_PER_SECOND: u64 = 8;
const OFFERS_SAVED: u64 = 64;
/// Between two attempts at a home that is busy; a fifth of the time that a start can make use of an answer.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// A list that another node gave: well-formed and of the run that was asked for; the rest is to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenList {
    /// Who gave it.
    pub node: NodeId,
    /// Its bytes, at most [`LIST_MAX_BYTES`].
    pub list: Bytes,
}

impl Peers {
    /// The homes of a list that are other nodes.
    fn list_homes(&self, key: BootKey) -> Vec<Node> {
        let me = self.me();
        let homes = self.object_homes(IndexDigest::from_bytes(*key.as_bytes()));
        let others = homes.into_iter().filter(|home| *home != me);
        others.filter_map(|home| self.giver(&home)).collect()
    }

    fn list_client(&self, node: &Node) -> Result<PeerClient<Channel>, PeerError> {
        let most = LIST_MAX_BYTES + (1 << 10);
        Ok(self.client(node)?.max_decoding_message_size(most))
    }

    /// Asks the homes of a list for it, all at once; the first answer that is one counts.
    ///
    /// Has no deadline of its own. **Cancel** safe.
    pub async fn boot_list(&self, key: BootKey) -> Option<GivenList> {
        let homes = self.list_homes(key);
        let mut answers: FuturesUnordered<_> = homes
            .iter()
            .map(|node| async move { (node, self.boot_list_of(node, key).await) })
            .collect();
        while let Some((node, answer)) = answers.next().await {
            match answer {
                Ok(list) if is_of(&list, key) => {
                    let node = node.id.clone();
                    return Some(GivenList { node, list });
                }
                // The other home may do better.
                Ok(_) => tracing::info!(node = %node.id, %key, "ignore a boot list that is none"),
                Err(PeerError::Lacking) => {}
                Err(error) => tracing::debug!(node = %node.id, %key, "no boot list: {error}"),
            }
        }
        None
    }

    async fn boot_list_of(&self, node: &Node, key: BootKey) -> Result<Bytes, PeerError> {
        let mut client = self.list_client(node)?;
        let wanted = WantedList {
            node: self.me(),
            key,
        };
        loop {
            match client.boot_list(Request::new(wanted.to_proto())).await {
                Ok(reply) => return Ok(list_of(reply.into_inner())?),
                Err(status) => match status.code() {
                    Code::ResourceExhausted => tokio::time::sleep(BUSY_PAUSE).await,
                    // One that does not know of lists has none.
                    Code::NotFound | Code::Unimplemented => return Err(PeerError::Lacking),
                    _ => return Err(status.into()),
                },
            }
        }
    }

    /// Tells the homes of a list what was learnt here; says how many took it.
    ///
    /// Has no deadline of its own. **Cancel** safe: the homes have it or not.
    pub async fn offer_boot_list(&self, key: BootKey, list: Bytes) -> usize {
        let homes = self.list_homes(key);
        let offered = OfferedList {
            node: self.me(),
            key,
            list,
        };
        let tell = |node: &Node| {
            let (node, offer) = (node.clone(), offered.to_proto());
            async move {
                let mut client = self.list_client(&node)?;
                client.offer_boot_list(Request::new(offer)).await?;
                Ok::<_, PeerError>(())
            }
        };
        let told = futures::future::join_all(homes.iter().map(tell)).await;
        let told = told.into_iter().zip(&homes);
        let taken = told.filter(|(told, node)| match told {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(node = %node.id, %key, "boot list not taken: {error}");
                false
            }
        });
        taken.count()
    }
}

/// Whether bytes are a list with this key.
fn is_of(bytes: &[u8], key: BootKey) -> bool {
    BootList::decode(bytes).is_ok_and(|list| list.key() == key && !list.chunks().is_empty())
}

/// Where other nodes ask for lists and leave them.
#[derive(Debug)]
pub(super) struct ListDesk {
    finds: Semaphore,
    offers: Mutex<TokenBucket>,
}

impl ListDesk {
    pub(super) fn new() -> Self {
        let offers = TokenBucket::new(OFFERS_PER_SECOND, OFFERS_SAVED, clock::now());
        Self {
            finds: Semaphore::new(FINDS_AT_ONCE),
            offers: Mutex::new(offers),
        }
    }

    /// Answers a node that asks for a list.
    pub(super) async fn find(
        &self,
        peers: &Peers,
        shelf: &Arc<dyn Shelf>,
        request: BootListRequest,
    ) -> Result<BootListReply, Status> {
        let wanted = WantedList::try_from(request).map_err(|error| refused(&error))?;
        if peers.view().me.role == Role::Leech {
            return Err(Status::not_found("this node gives nothing"));
        }
        let busy = |_| Status::resource_exhausted("too many ask for boot lists");
        let _turn = self.finds.try_acquire().map_err(busy)?;
        let list = within_deadline(shelf.boot_list(wanted.key)).await?;
        let bytes = u64::try_from(list.len()).unwrap_or(u64::MAX);
        let wait = lock(&peers.buckets.upload).take(bytes, clock::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(BootListReply { list })
    }

    /// Takes what a node has learnt, if this node is a home of the list.
    pub(super) async fn take(
        &self,
        peers: &Peers,
        shelf: &Arc<dyn Shelf>,
        offer: BootListOffer,
    ) -> Result<BootListTaken, Status> {
        let offered = OfferedList::try_from(offer).map_err(|error| refused(&error))?;
        let homes = peers.object_homes(IndexDigest::from_bytes(*offered.key.as_bytes()));
        if !homes.contains(&peers.me()) {
            return Err(Status::failed_precondition("not a home of this list"));
        }
        if !lock(&self.offers).try_take(1, clock::now()) {
            return Err(Status::resource_exhausted("too many boot lists"));
        }
        within_deadline(shelf.take_boot_list(offered)).await?;
        Ok(BootListTaken {})
    }
}
