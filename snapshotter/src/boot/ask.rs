// SPDX-License-Identifier: Apache-2.0
//! The zone's part in boot lists: asking other nodes for one, telling them what was learnt here, and
//! answering them.
//!
//! Asking begins while the indexes of an image load, which takes as long as an answer does. A load waits for
//! it for [`WAIT`] and goes on without; what comes later is there when the image is mounted. A run is asked
//! for once in [`ASK_AGAIN`]: a pull and the mount that follows it ask once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::boot::{BootKey, BootList};
use sluice_blockindex::digest::IndexDigest;
use sluice_fetcher::peer::Peers;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::document::BootDocument;
use super::metrics::Answer;
use super::{Boot, LOADS_MAX, OfferError, State};

/// How long a load waits for other nodes: some round trips within a zone. Nobody waits for the load, but what
/// comes later than that a container has begun to read by itself.
const WAIT: Duration = Duration::from_millis(300);
/// How long other nodes may take to answer. What comes after [`WAIT`] serves the mount that follows a pull.
const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// Nobody is asked again for the same list before. Longer than from a pull to its mount.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How long the homes of a list may take to store it. Nobody waits for that.
const TELL_DEADLINE: Duration = Duration::from_secs(5);

/// A list that another node gave; nothing of it is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// Which node.
    pub node: String,
    /// In the form of [`BootList::encode`].
    pub list: Bytes,
}

/// Other nodes that may have lists, and want them. Set once, see [`Boot::set_peers`].
#[async_trait]
pub trait BootPeers: Send + Sync + std::fmt::Debug {
    /// A list that other nodes have learnt; `None` when nobody has one.
    ///
    /// **Cancel** safe; the caller waits for a bounded time.
    async fn find(&self, key: BootKey) -> Option<Given>;

    /// Tells those who collect lists what was learnt here; says how many took it.
    ///
    /// **Cancel** safe; the caller waits for a bounded time.
    async fn tell(&self, key: BootKey, list: Bytes) -> usize;
}

#[async_trait]
impl BootPeers for Peers {
    async fn find(&self, key: BootKey) -> Option<Given> {
        let given = self.boot_list(key).await?;
        Some(Given {
            node: given.node.to_string(),
            list: given.list,
        })
    }

    async fn tell(&self, key: BootKey, list: Bytes) -> usize {
        self.offer_boot_list(key, list).await
    }
}

/// An asking that is under way, or over since a while.
#[derive(Debug)]
pub(super) struct Asking {
    began: Instant,
    over: CancellationToken,
}

impl Asking {
    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }
}

impl State {
    /// The end of the asking for a list, and whether the caller is to ask; `None` when too many are under way.
    fn asking(&mut self, key: BootKey) -> Option<(CancellationToken, bool)> {
        self.asks.retain(|_, ask| ask.began.elapsed() < ASK_AGAIN);
        if let Some(ask) = self.asks.get(&key) {
            return Some((ask.over.clone(), false));
        }
        if self.asks.len() >= LOADS_MAX {
            return None;
        }
        let (began, over) = (Instant::now(), CancellationToken::new());
        let ask = Asking {
            began,
            over: over.clone(),
        };
        self.asks.insert(key, ask);
        Some((over, true))
    }
}

impl Boot {
    /// Begins to ask other nodes for the list of a run whose indexes are about to load. Returns at once.
    pub fn seek(self: &Arc<Self>, indexes: &[IndexDigest]) {
        if !self.options.enabled || self.peers.get().is_none() || indexes.is_empty() {
            return;
        }
        let (boot, key) = (Arc::clone(self), BootKey::of_layers(indexes));
        self.spawn(async move {
            if !boot.is_known(key).await {
                boot.begin_to_ask(key);
            }
        });
    }

    async fn is_known(&self, key: BootKey) -> bool {
        let document = self.document(key).await;
        document.is_some_and(|it| it.origin().is_some() || it.off.is_some())
    }

    /// Asks other nodes for a list, unless that was done a moment ago; what comes is stored. Waits for the
    /// answer, but not for long.
    pub(super) async fn ask(self: &Arc<Self>, key: BootKey) {
        if let Some(over) = self.begin_to_ask(key) {
            let _late = tokio::time::timeout(WAIT, over.cancelled()).await;
        }
    }

    /// The token is cancelled when the asking is over, however it ends.
    fn begin_to_ask(self: &Arc<Self>, key: BootKey) -> Option<CancellationToken> {
        let peers = self.peers.get()?.clone();
        let (over, is_new) = self.state().asking(key)?;
        if is_new {
            let (boot, over) = (Arc::clone(self), over.clone().drop_guard());
            self.spawn(async move {
                let _over = over;
                let found = tokio::time::timeout(ASK_DEADLINE, peers.find(key)).await;
                let answer = match found {
                    Err(_) => Answer::Late,
                    Ok(None) => Answer::Nobody,
                    Ok(Some(given)) => boot.examine(key, &given).await,
                };
                boot.metrics.asked(answer);
            });
        }
        Some(over)
    }

    async fn examine(&self, key: BootKey, given: &Given) -> Answer {
        match self.offer(key, &given.node, &given.list).await {
            Ok(()) => Answer::Given,
            Err(error) => {
                tracing::info!(%key, node = given.node, "ignore a boot list: {error}");
                Answer::Refused
            }
        }
    }

    /// Tells other nodes what the starts here have shown. Returns at once.
    pub(super) fn tell(self: &Arc<Self>, key: BootKey, document: &BootDocument) {
        let learned = document.off.is_none().then(|| document.learned()).flatten();
        let Some(list) = learned.filter(|list| !list.chunks().is_empty()) else {
            return;
        };
        let Some(peers) = self.peers.get().cloned() else {
            return;
        };
        let metrics = self.metrics.clone();
        self.spawn(async move {
            let told = peers.tell(key, list.encode().into());
            let told = tokio::time::timeout(TELL_DEADLINE, told).await;
            metrics.told(told.unwrap_or(0));
        });
    }

    /// The list of a run for a node that asks: what was learnt here and what others have told. `None` when
    /// there is none, or it is off: it did not help here.
    pub async fn given(&self, key: BootKey) -> Option<Bytes> {
        let list = self.document(key).await?.shared()?;
        self.metrics.gave();
        Some(list.encode().into())
    }

    /// Takes what a node has told.
    ///
    /// **Errors** those of [`Self::offer`].
    pub async fn take(&self, key: BootKey, node: &str, list: &[u8]) -> Result<(), OfferError> {
        let taken = self.offer(key, node, list).await;
        match &taken {
            Ok(()) => self.metrics.took(),
            Err(error) => {
                tracing::info!(%key, node, "ignore a boot list: {error}");
                self.metrics.ignored("told");
            }
        }
        taken
    }

    /// Takes a list of another node. It counts for little beside this node's own starts, and for all there is
    /// where there are none.
    ///
    /// **Errors**: it is not well-formed, of other layers, or not wanted.
    pub async fn offer(&self, key: BootKey, node: &str, bytes: &[u8]) -> Result<(), OfferError> {
        if !self.options.enabled {
            return Err(OfferError::Unwanted("[boot] enabled is false".to_owned()));
        }
        let list = BootList::decode(bytes)?;
        if list.chunks().is_empty() {
            return Err(OfferError::Empty);
        }
        let actual = list.key();
        if actual != key {
            let expected = key;
            return Err(OfferError::Key { expected, actual });
        }
        let (indexes, node) = (list.layers().to_vec(), node.to_owned());
        self.make_room(key).await?;
        let document = self
            .change(key, indexes, move |document| document.receive(node, list))
            .await?;
        match document.off {
            Some(off) => Err(OfferError::Unwanted(off.reason)),
            None => Ok(()),
        }
    }

    /// Others fill the table up to its bound between two sweeps, and no further.
    async fn make_room(&self, key: BootKey) -> Result<(), OfferError> {
        let swept = self.transact(move |metadata| Self::make_room_for(metadata, key));
        swept.await.ok_or(OfferError::Stopping)??;
        Ok(())
    }
}
