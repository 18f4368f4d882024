// SPDX-License-Identifier: Apache-2.0
//! The cluster side of the daemon, put together: its TLS files, and the view of who is there.
//!
//! Nothing of it waits for the network, and only what is wrong with its own files is an error: a node
//! that finds nobody is a node by itself.

use std::path::Path;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use sluice_fetcher::cluster::allow::Allow;
use sluice_fetcher::cluster::link::Links;
use sluice_fetcher::cluster::membership::{
    Discovery, Membership, MembershipError, MembershipOptions,
};
use sluice_fetcher::cluster::metrics::ClusterMetrics;
use sluice_fetcher::cluster::node::{Node, Role, View};
use sluice_fetcher::cluster::tls::{TlsError, TlsFiles};
use sluice_fetcher::peer::{PROTOCOL, Peers};
use sluice_fetcher::scheduler::Fetcher;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{peers, remembered};
use crate::config::{ClusterConfig, ClusterTlsConfig};
use crate::shelf::NodeShelf;

/// Why the node is in no cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The TLS files cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The node cannot be a member.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// The daemon stops.
    #[error("the daemon stops")]
    Stopping,
}

/// The cluster side, running.
#[derive(Debug)]
pub(super) struct ClusterSide {
    membership: Arc<Membership>,
    links: Links,
    peers: Arc<Peers>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl ClusterSide {
    /// Starts it; `root` is where the daemon keeps what outlives it. Ends with `stop`; [`stop`](Self::stop)
    /// waits for that.
    pub(super) async fn start(
        config: &ClusterConfig,
        root: &Path,
        registry: &mut Registry,
        stop: &CancellationToken,
    ) -> Result<Self, ClusterError> {
        let metrics = ClusterMetrics::new();
        metrics.register(registry.sub_registry_with_prefix("sluice"));
        let tasks = TaskTracker::new();
        let files = match &config.tls {
            Some(files) => Some(open_tls(files.clone(), metrics.clone()).await?),
            None => None,
        };
        if let Some(files) = files.clone() {
            let stop = stop.clone();
            tasks.spawn(async move { files.watch(&stop).await });
        }
        let allow = Allow::new(config.allow.clone());
        let links = Links::new(files, allow.clone(), metrics.clone());
        let options = MembershipOptions {
            listen: config.listen,
            discovery: if config.gossip {
                Discovery::Gossip
            } else {
                Discovery::Static(peers::hello(&links, &config.name))
            },
            seeds: config.seeds.clone(),
            seed_file: config.seed_file.clone(),
            remembered: remembered::load(root, config.upload_slots),
            allow,
            metrics,
        };
        let membership = Membership::start(options, node(config), stop)?;
        let peers = peers::peers(config, membership.view(), &links);
        let (root, view, stopped) = (root.to_owned(), membership.view(), stop.clone());
        tasks.spawn(async move {
            let keep = remembered::keep(&root, view);
            stopped.run_until_cancelled(keep).await;
        });
        Ok(Self {
            membership: Arc::new(membership),
            links,
            peers,
            tasks,
            stop: stop.clone(),
        })
    }

    /// The other nodes, for those who ask them.
    pub(super) fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// Serves other nodes from now on.
    pub(super) fn serve(&self, config: &ClusterConfig, fetcher: Fetcher, shelf: Arc<NodeShelf>) {
        let parts = (fetcher, Arc::clone(&self.peers), shelf);
        let (links, membership) = (self.links.clone(), Arc::clone(&self.membership));
        let (tasks, stop) = (&self.tasks, self.stop.clone());
        peers::serve(config.listen, links, parts, membership, tasks, stop);
    }

    /// Who is there.
    pub(super) fn view(&self) -> watch::Receiver<Arc<View>> {
        self.membership.view()
    }

    /// Leaves the cluster, within seconds.
    pub(super) async fn stop(self) {
        self.membership.stop().await;
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn open_tls(
    files: ClusterTlsConfig,
    metrics: ClusterMetrics,
) -> Result<TlsFiles, ClusterError> {
    let open = move || {
        let ClusterTlsConfig { cert, key, ca } = files;
        TlsFiles::open(&cert, &key, &ca, metrics)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    Ok(opened.map_err(|_| ClusterError::Stopping)??)
}

/// This node, as others are to know it.
fn node(config: &ClusterConfig) -> Node {
    Node {
        id: config.name.clone(),
        zone: config.zone.clone(),
        rack: config.rack.clone(),
        role: config.role,
        address: config.advertise.unwrap_or(config.listen),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: PROTOCOL,
        load: 0,
        free_slots: match config.role {
            Role::Leech => 0,
            Role::Node | Role::Supernode => config.upload_slots,
        },
    }
}
