// SPDX-License-Identifier: Apache-2.0
//! Gossip: what `chitchat` spreads for us, and how a node is written in its keys.
//!
//! Every second a node tells three others what it knows of whom, and gets what it lacks. A node is found
//! through one seed; one that says nothing for about ten of its usual intervals (5 to 9 s in clusters of
//! 2 to 100 nodes) is believed dead, and forgotten after [`FORGET_AFTER`]. One that leaves says so.
//!
//! The peer API and gossip share one address: a node's address is where it gossips from.
//!
//! Nothing that arrives is trusted: datagrams of networks that may not be peers are dropped, values are
//! checked before they make a node, our own are written again where somebody changed them, and a server
//! that a datagram ended is started anew by whoever runs the [`Session`]. What gossip says is a hint whom
//! to connect to, no more.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chitchat::transport::{RecvOutcome, SendOutcome, Socket, Transport};
use chitchat::{
    ChitchatConfig, ChitchatEnvelope, ChitchatHandle, ChitchatId, FailureDetectorConfig, NodeState,
    ProtocolVersion,
};
use tokio::sync::watch;

use super::allow::Allow;
use super::membership::Claim;
use super::node::{Node, NodeId, Role};

/// Nodes of another cluster id do not hear each other.
const CLUSTER: &str = "sluice";
/// How often a node gossips. Half of it would find the dead sooner and double the traffic.
pub(super) const GOSSIP_EVERY: Duration = Duration::from_secs(1);
/// How many of its usual intervals a node may be silent. News of a node come every 0.5 to 0.7 s in
/// clusters of 2 to 100 nodes.
const SILENT_INTERVALS: f64 = 10.0;
/// Intervals that the usual one is made of: a minute's.
const INTERVALS: usize = 100;
/// Longer silences are no intervals.
const INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How long a node that is believed dead is asked now and then whether it lives again. A partition that
/// lasts longer heals through the seeds.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// How many nodes are told at once that this one leaves; they tell the others.
const TOLD_OF_LEAVE: usize = 5;
/// How long telling them may take: a round trip.
const LEAVE_TAKES: Duration = Duration::from_millis(400);
/// How long the server may take to end.
const END_DEADLINE: Duration = Duration::from_secs(1);

/// More changes than a node makes in its life: a higher version came from somebody else.
const VERSION_MAX: u64 = 1 << 48;

const ZONE: &str = "zone";
const RACK: &str = "rack";
const ROLE: &str = "role";
const VERSION: &str = "version";
const PROTOCOL: &str = "protocol";
/// `<percent> <slots>`
const LOAD: &str = "load";
/// Set by a node that leaves.
const LEFT: &str = "left";

/// A node's keys.
fn keys_of(node: &Node) -> Vec<(String, String)> {
    let load = format!("{} {}", node.load, node.free_slots);
    [
        (ZONE, node.zone.clone()),
        (RACK, node.rack.clone()),
        (ROLE, node.role.as_str().to_owned()),
        (VERSION, node.version.clone()),
        (PROTOCOL, node.protocol.to_string()),
        (LOAD, load),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// The node of these keys; `None` while some are missing, where they make no sense, and when it left.
fn node_of<'a>(id: &ChitchatId, get: impl Fn(&str) -> Option<&'a str>) -> Option<Node> {
    if get(LEFT).is_some() {
        return None;
    }
    let (load, free_slots) = get(LOAD)?.split_once(' ')?;
    Some(Node {
        id: NodeId::parse(&id.node_id).ok()?,
        zone: get(ZONE)?.to_owned(),
        rack: get(RACK)?.to_owned(),
        // A role of a later version: nobody knows what to ask of it.
        role: Role::parse(get(ROLE)?)?,
        address: id.gossip_advertise_addr,
        version: get(VERSION)?.to_owned(),
        protocol: get(PROTOCOL)?.parse().ok()?,
        load: load.parse().ok()?,
        free_slots: free_slots.parse().ok()?,
    })
}

/// The live nodes, as `chitchat` has them.
type Live = BTreeMap<ChitchatId, NodeState>;

fn claims_of(live: &Live, own: &ChitchatId) -> Vec<Claim> {
    let others = live.iter().filter(|(id, _)| *id != own);
    let claims = others.filter_map(|(id, state)| {
        let node = node_of(id, |key| state.get(key))?;
        let generation = id.generation_id;
        Some(Claim { node, generation })
    });
    claims.collect()
}

/// A node's part in the gossip, from its start to its end.
pub(super) struct Session {
    handle: ChitchatHandle,
    live: watch::Receiver<Live>,
}

impl Session {
    /// Listens, and is `me` from now on. `generation` is higher than at any time before.
    ///
    /// **Errors**: the address cannot be listened at.
    pub(super) async fn open(
        transport: &Arc<dyn Transport>,
        listen: SocketAddr,
        allow: &Allow,
        me: &Node,
        generation: u64,
    ) -> anyhow::Result<Self> {
        let config = ChitchatConfig {
            chitchat_id: ChitchatId::new(me.id.as_str(), generation, me.address),
            cluster_id: CLUSTER.to_owned(),
            gossip_interval: GOSSIP_EVERY,
            listen_addr: listen,
            // Seeds change; they are told one by one, see `tell`.
            seed_nodes: Vec::new(),
            failure_detector_config: FailureDetectorConfig::new(
                SILENT_INTERVALS,
                INTERVALS,
                INTERVAL_MAX,
                GOSSIP_EVERY,
                FORGET_AFTER,
            ),
            marked_for_deletion_grace_period: FORGET_AFTER,
            catchup_callback: None,
            extra_liveness_predicate: None,
            protocol_version: ProtocolVersion::V1,
        };
        let guarded = Guarded {
            transport: Arc::clone(transport),
            allow: allow.clone(),
        };
        let handle = chitchat::spawn_chitchat(config, keys_of(me), &guarded).await?;
        let live = handle.chitchat().lock().await.live_nodes_watcher();
        Ok(Session { handle, live })
    }

    /// Waits until the live nodes or their values may have changed.
    ///
    /// **Errors**: the server ended, and why.
    /// **Cancel**: safe.
    pub(super) async fn changed(&mut self) -> Result<(), String> {
        let ended = self.handle.termination_watcher();
        tokio::select! {
            changed = self.live.changed() => changed.map_err(|_| "the server is gone".to_owned()),
            ended = ended => Err(match ended {
                Ok(()) => "the server ended".to_owned(),
                Err(error) => error.to_string(),
            }),
        }
    }

    /// The nodes that live now.
    pub(super) fn claims(&mut self) -> Vec<Claim> {
        claims_of(&self.live.borrow_and_update(), self.handle.chitchat_id())
    }

    /// Says what `me` is now; also undoes what others may have said of it.
    ///
    /// **Errors**: somebody wrote so much in our name that only a new generation helps.
    pub(super) async fn publish(&self, me: &Node) -> Result<(), String> {
        let keys = keys_of(me);
        self.handle
            .with_chitchat(|chitchat| {
                let state = chitchat.self_node_state();
                if state.max_version() > VERSION_MAX {
                    return Err("another node wrote in the name of this one".to_owned());
                }
                for (key, value) in &keys {
                    state.set(key, value);
                }
                Ok(())
            })
            .await
    }

    /// Gossips with whoever is at `address`.
    pub(super) fn tell(&self, address: SocketAddr) {
        // Fails when the server has ended, which `changed` says.
        let _ = self.handle.gossip(address);
    }

    /// Ends it. With `leave` some nodes hear first that this one goes, and tell the others.
    pub(super) async fn close(mut self, leave: bool) {
        if leave {
            let mark = self.handle.with_chitchat(|chitchat| {
                chitchat.self_node_state().set(LEFT, "1");
            });
            // The lock is held by the server only for moments, unless it hangs.
            if tokio::time::timeout(END_DEADLINE, mark).await.is_ok() {
                let claims = self.claims();
                for claim in claims.iter().take(TOLD_OF_LEAVE) {
                    self.tell(claim.node.address);
                }
                if !claims.is_empty() {
                    tokio::time::sleep(LEAVE_TAKES).await;
                }
            }
        }
        let ended = self.handle.termination_watcher();
        let _ = self.handle.initiate_shutdown();
        let _ = tokio::time::timeout(END_DEADLINE, ended).await;
        self.handle.abort();
        let _ = tokio::time::timeout(END_DEADLINE, self.handle.shutdown()).await;
    }
}

/// A transport that drops what comes from networks that may not be peers.
struct Guarded {
    transport: Arc<dyn Transport>,
    allow: Allow,
}

#[async_trait]
impl Transport for Guarded {
    async fn open(&self, listen: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        Ok(Box::new(GuardedSocket {
            socket: self.transport.open(listen).await?,
            allow: self.allow.clone(),
        }))
    }
}

struct GuardedSocket {
    socket: Box<dyn Socket>,
    allow: Allow,
}

#[async_trait]
impl Socket for GuardedSocket {
    fn local_addr(&self) -> anyhow::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// A node that cannot be reached is no failure of the socket.
    async fn send(
        &mut self,
        to: SocketAddr,
        envelope: ChitchatEnvelope,
    ) -> anyhow::Result<SendOutcome> {
        let sent = self.socket.send(to, envelope).await;
        Ok(sent.unwrap_or_else(|error| {
            tracing::debug!(%to, error = format!("{error:#}"), "gossip is not sent");
            SendOutcome { num_bytes_sent: 0 }
        }))
    }

    async fn recv(&mut self) -> anyhow::Result<RecvOutcome> {
        loop {
            let received = self.socket.recv().await?;
            if self.allow.permits(received.from_addr.ip()) {
                return Ok(received);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_what_its_keys_say() {
        let node = Node {
            id: NodeId::parse("node-1").unwrap(),
            zone: "eu-1".into(),
            rack: String::new(),
            role: Role::Supernode,
            address: ([10, 0, 0, 1], 9641).into(),
            version: "0.1.0".into(),
            protocol: 7,
            load: 37,
            free_slots: 500,
        };
        let id = ChitchatId::new("node-1", 3, node.address);
        let keys: BTreeMap<String, String> = keys_of(&node).into_iter().collect();
        let read = |id: &ChitchatId, keys: &BTreeMap<String, String>| {
            node_of(id, |key| keys.get(key).map(String::as_str))
        };
        assert_eq!(read(&id, &keys), Some(node.clone()));
        for key in keys.keys() {
            let mut fewer = keys.clone();
            fewer.remove(key);
            assert_eq!(read(&id, &fewer), None, "without {key}");
        }
        for (key, value) in [
            (ROLE, "boss"),
            (PROTOCOL, "-1"),
            (PROTOCOL, "4294967296"),
            (LOAD, "5"),
            (LOAD, "300 1"),
            (LOAD, "5 70000"),
            (LOAD, "5 1 1"),
            (LEFT, ""),
        ] {
            let mut changed = keys.clone();
            changed.insert(key.into(), value.into());
            assert_eq!(read(&id, &changed), None, "{key} = {value:?}");
        }
        let mut more = keys.clone();
        more.insert("later".into(), "more".into());
        assert_eq!(read(&id, &more), Some(node));
        for name in ["", "a b", &"x".repeat(254)] {
            let id = ChitchatId::new(name, 3, id.gossip_advertise_addr);
            assert_eq!(read(&id, &keys), None, "{name:?}");
        }
    }
}
