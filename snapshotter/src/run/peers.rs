// SPDX-License-Identifier: Apache-2.0
//! The peer API of the daemon, put together: connections to other nodes, and what they are given.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use sluice_fetcher::cluster::link::{Links, PeerStream};
use sluice_fetcher::cluster::membership::{Hello, Membership};
use sluice_fetcher::cluster::node::{Node, NodeId, Role, View};
use sluice_fetcher::peer::wire::node_of;
use sluice_fetcher::peer::{Connect, PROTOCOL, PeerOptions, PeerServer, Peers, endpoint};
use sluice_fetcher::scheduler::Fetcher;
use sluice_proto::peer::HelloRequest;
use sluice_proto::peer::peer_client::PeerClient;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::ClusterConfig;
use crate::listen::listen;
use crate::shelf::NodeShelf;

/// Connections whose handshake is under way: a peer that is slow must not hold others up.
const HANDSHAKES: usize = 64;
/// Accepted connections that wait for the server.
const ACCEPTED: usize = 16;
/// How often the load is told to the membership.
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// Nodes of the zone to which connections are opened before they are needed: the homes of a usual zone. In
/// a larger one a burst opens some of its own.
const WARM: usize = 64;
/// How long one of these may take, and how many are opened at once.
const WARM_DEADLINE: Duration = Duration::from_secs(3);
const WARM_AT_ONCE: usize = 4;
/// How often nodes that were silent are probed, how long each may take, and how many at once.
const PROBE_EVERY: Duration = Duration::from_millis(500);
const PROBE_DEADLINE: Duration = Duration::from_secs(1);
const PROBES_AT_ONCE: usize = 16;
/// After an accept that failed for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How this node connects to others.
pub(super) fn connect(links: &Links) -> Connect {
    let links = links.clone();
    Arc::new(move |node| {
        let connector = links.connector(node.address, Some(node.id.as_str()));
        Ok(endpoint(node.address)?.connect_with_connector_lazy(connector))
    })
}

/// Asks a node of a static list who it is.
pub(super) fn hello(links: &Links, me: &NodeId) -> Hello {
    let (links, me) = (links.clone(), me.to_string());
    Arc::new(move |asked| {
        let (links, node) = (links.clone(), me.clone());
        Box::pin(async move {
            let connector = links.connector(asked.address, asked.name.as_deref());
            let endpoint = endpoint(asked.address).ok()?;
            let channel = endpoint.connect_with_connector(connector).await.ok()?;
            let request = HelloRequest {
                node,
                protocol: PROTOCOL,
            };
            let reply = PeerClient::new(channel).hello(request).await.ok()?;
            node_of(&reply.into_inner(), asked.address)
                .inspect_err(|error| tracing::debug!(address = %asked.address, "no node: {error}"))
                .ok()
        })
    })
}

/// The other nodes, as this one is to use them.
pub(super) fn peers(
    config: &ClusterConfig,
    view: watch::Receiver<Arc<View>>,
    links: &Links,
) -> Arc<Peers> {
    let options = PeerOptions {
        upload_bytes: config.upload_bytes_per_second.unwrap_or(0),
        download_bytes: config.download_bytes_per_second.unwrap_or(0),
        origin_bytes: config.origin_bytes_per_second.unwrap_or(0),
        origin_requests: config.origin_requests.unwrap_or(0),
        shared_zones: config.shared_zones.clone(),
        upload_slots: usize::from(config.upload_slots),
        ..PeerOptions::default()
    };
    Arc::new(Peers::new(options, view, connect(links)))
}

/// Serves the peer API until the token is cancelled. An address that cannot be listened at, because its
/// network is not up yet or another process has it, is tried again: the node takes from others meanwhile,
/// and its containers need none of it.
pub(super) fn serve(
    address: SocketAddr,
    links: Links,
    parts: (Fetcher, Arc<Peers>, Arc<NodeShelf>),
    membership: Arc<Membership>,
    tasks: &TaskTracker,
    stop: CancellationToken,
) {
    let (fetcher, peers, shelf) = parts;
    let (warm, view) = (Arc::clone(&peers), membership.view());
    let stopped = stop.clone();
    tasks.spawn(async move {
        stopped.run_until_cancelled(keep_warm(warm, view)).await;
    });
    let (doubting, stopped) = (Arc::clone(&peers), stop.clone());
    tasks.spawn(async move {
        stopped.run_until_cancelled(probe_doubted(doubting)).await;
    });
    let version = env!("CARGO_PKG_VERSION");
    let server = PeerServer::new(fetcher, peers, shelf, version, stop.clone());
    let (accepted, incoming) = mpsc::channel(ACCEPTED);
    let (handshakes, stopping) = (tasks.clone(), stop.clone());
    let listening = stop.clone();
    tasks.spawn(async move {
        let listen = listen(address, "other nodes", |_| {});
        if let Some(listener) = listening.run_until_cancelled(listen).await {
            tracing::info!(%address, "serving other nodes");
            accept(listener, links, accepted, handshakes, stopping).await;
        }
    });
    let load = server.clone();
    let loaded = async move {
        let mut every = tokio::time::interval(LOAD_EVERY);
        loop {
            every.tick().await;
            let (percent, free_slots) = load.load();
            membership.set_load(percent, free_slots);
        }
    };
    let stopped = stop.clone();
    tasks.spawn(async move {
        stopped.run_until_cancelled(loaded).await;
    });
    tasks.spawn(async move {
        let incoming = ReceiverStream::new(incoming);
        if let Err(error) = server.serve(incoming).await {
            tracing::error!("peer API ended: {error}");
        }
    });
}

/// Opens connections to nodes that come, so that the first reads of a burst need not: a connection that is
/// opened while the line is full may lose its first packets, and then waits for seconds.
async fn keep_warm(peers: Arc<Peers>, mut view: watch::Receiver<Arc<View>>) {
    let mut known = BTreeSet::new();
    loop {
        let now = Arc::clone(&view.borrow_and_update());
        known.retain(|id| now.node(id).is_some());
        let same_zone = now.others.iter().filter(|it| it.zone == now.me.zone);
        let new: Vec<Node> = same_zone
            .filter(|it| it.role != Role::Leech && !known.contains(&it.id))
            .take(WARM.saturating_sub(known.len()))
            .cloned()
            .collect();
        known.extend(new.iter().map(|node| node.id.clone()));
        let greet = |node: Node| {
            let peers = Arc::clone(&peers);
            async move {
                if let Err(error) = peers.hello(&node, WARM_DEADLINE).await {
                    tracing::debug!(node = %node.id, "no answer to hello: {error}");
                }
            }
        };
        futures::stream::iter(new)
            .for_each_concurrent(WARM_AT_ONCE, greet)
            .await;
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// Asks nodes that were silent whether they are there, so that no reader has to find out, and so that what
/// they fetched is asked of them again as soon as the network between has recovered.
async fn probe_doubted(peers: Arc<Peers>) {
    let mut every = tokio::time::interval(PROBE_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let probe = |node: Node| {
            let peers = Arc::clone(&peers);
            async move {
                if let Err(error) = peers.probe(&node, PROBE_DEADLINE).await {
                    tracing::debug!(node = %node.id, "no answer to a probe: {error}");
                }
            }
        };
        let doubted = peers.doubted();
        futures::stream::iter(doubted)
            .for_each_concurrent(PROBES_AT_ONCE, probe)
            .await;
    }
}

async fn accept(
    listener: TcpListener,
    links: Links,
    accepted: mpsc::Sender<std::io::Result<PeerStream>>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let permit = Arc::clone(&handshakes).acquire_owned();
        let next = async {
            // Never closed.
            let permit = permit.await.ok();
            (listener.accept().await, permit)
        };
        let Some((connection, permit)) = stop.run_until_cancelled(next).await else {
            return;
        };
        let stream = match connection {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("failed to accept a node's connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (links, accepted, stop) = (links.clone(), accepted.clone(), stop.clone());
        tasks.spawn(async move {
            let handshake = stop.run_until_cancelled(links.accept(stream)).await;
            drop(permit);
            match handshake {
                Some(Ok(stream)) => {
                    let _ = stop.run_until_cancelled(accepted.send(Ok(stream))).await;
                }
                Some(Err(error)) => tracing::debug!("refuse a connection: {error}"),
                None => {}
            }
        });
    }
}
