// SPDX-License-Identifier: Apache-2.0
//! Connections to other nodes: one channel per node, opened when first wanted.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::cluster::node::{Node, NodeId, View};
use crate::store::lock;

/// How long opening a connection may take: longer than a zone's worst round trip with one lost packet.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// A connection in use is asked for a sign of life this often, and given up after as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Bytes that may be on their way to us on one stream: a piece, so that one round trip costs nothing.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// On all streams of a connection.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// A node that cannot be connected to.
#[derive(Clone, Debug, thiserror::Error)]
#[error("connect to {address}: {reason}")]
pub struct LinkError {
    /// Its address.
    pub address: SocketAddr,
    /// Why not.
    pub reason: String,
}

/// Makes a channel to a node; it connects when it is first used.
pub type Connect = Arc<dyn Fn(&Node) -> Result<Channel, LinkError> + Send + Sync>;

/// What every connection to a node has set, whatever carries it.
///
/// **Errors** [`LinkError`] when the address makes no URL.
pub fn endpoint(address: SocketAddr) -> Result<Endpoint, LinkError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|error| LinkError {
        address,
        reason: error.to_string(),
    })?;
    Ok(endpoint
        .connect_timeout(CONNECT_DEADLINE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

/// Connections without encryption.
#[must_use]
pub fn plain() -> Connect {
    Arc::new(|node| Ok(endpoint(node.address)?.connect_lazy()))
}

/// The channels.
pub(super) struct Links {
    connect: Connect,
    table: Mutex<HashMap<NodeId, (SocketAddr, Channel)>>,
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").finish_non_exhaustive()
    }
}

impl Links {
    pub(super) fn new(connect: Connect) -> Self {
        Self {
            connect,
            table: Mutex::default(),
        }
    }

    /// The next use of this node opens a connection anew. What runs on the old one goes on.
    pub(super) fn forget(&self, node: &NodeId) {
        lock(&self.table).remove(node);
    }

    /// The channel to a node. A new one closes those to nodes that have gone.
    pub(super) fn to(&self, node: &Node, view: &View) -> Result<Channel, LinkError> {
        let mut table = lock(&self.table);
        match table.get(&node.id) {
            Some((address, channel)) if *address == node.address => Ok(channel.clone()),
            _ => {
                let channel = (self.connect)(node)?;
                table.retain(|id, _| view.node(id).is_some());
                table.insert(node.id.clone(), (node.address, channel.clone()));
                Ok(channel)
            }
        }
    }
}
