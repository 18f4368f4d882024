// SPDX-License-Identifier: Apache-2.0
//! The daemon: puts the parts together, serves until a signal comes, and takes them apart again.
//!
//! Start needs neither network nor containerd: sockets, the metadata store and the directories
//! are all it waits for. A stop (SIGTERM or SIGINT) answers the requests under way within
//! [`STOP_DEADLINE`], deletes no state and touches no mount; a second signal ends the process at
//! once, which costs no more than a crash does.

mod able;
mod cluster;
mod lazy;
mod lock;
mod mirror;
mod peers;
mod remaps;
mod remembered;
mod sockets;

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use sd_notify::NotifyState;
use sluice_fetcher::blob_cache::PieceGivers;
use sluice_fetcher::cluster::node::View;
use sluice_fetcher::peer::{BlobNodes, Peers};
use sluice_fetcher::registry::Repository;
use sluice_fetcher::steps::{Steps, Watchdog};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use cluster::ClusterError;
pub use lock::{LockError, RootLock};
pub use mirror::MirrorSide;
pub use sockets::{SocketError, bind_private};

use self::cluster::ClusterSide;
use crate::config::Config;
use crate::mirror::Nodes;
use crate::service::{self, RequestLimits};
use crate::snapshots::{
    OverlayOptions, SnapshotDirectories, SnapshotError, SnapshotOptions, Snapshots,
};
use crate::store::{MetadataStore, StoreError};
use crate::telemetry::{self, Health, SnapshotMetrics};

/// How long a stop may take in all. Shorter than systemd's 90 s.
const STOP_DEADLINE: Duration = Duration::from_secs(40);
/// How much of it answering requests may take: longer than the budget of a Prepare and the deadline of
/// a mount by default, and what is left is enough to mark the chunk store as cleanly stopped.
const REQUESTS_DEADLINE: Duration = Duration::from_secs(32);
/// How much of it is for connections to the telemetry address, which a client may hold open.
const TELEMETRY_DEADLINE: Duration = Duration::from_secs(1);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A directory cannot be made or used.
    #[error("prepare directory {path:?}: {source}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another daemon has the root.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A socket cannot be bound.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The metadata store cannot be opened.
    #[error("open metadata {path:?}: {source}")]
    Store {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The snapshots cannot be opened.
    #[error("open snapshots: {0}")]
    Snapshots(#[source] SnapshotError),
    /// The cluster side does not start.
    #[error("join the cluster: {0}")]
    Cluster(#[source] ClusterError),
    /// The lazy side does not start.
    #[error("start the lazy side: {0}")]
    Lazy(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No thread can be started for the watchdog.
    #[error("start the watchdog: {0}")]
    Watchdog(#[source] io::Error),
    /// Signals cannot be caught.
    #[error("catch signals: {0}")]
    Signals(#[source] io::Error),
    /// The server of the snapshots service ended.
    #[error("serve the snapshots service: {0}")]
    Serve(String),
}

/// What the parts of the daemon share while they are put together.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The metadata store.
    pub store: Arc<MetadataStore>,
    /// The directories of ordinary snapshots.
    pub directories: SnapshotDirectories,
    /// Where metrics are registered.
    pub registry: &'a mut Registry,
    /// Who is in the cluster; `None`: the node is in none.
    pub cluster: Option<watch::Receiver<Arc<View>>>,
    /// The other nodes; `None`: the node is in no cluster.
    pub peers: Option<Arc<Peers>>,
    /// The mirror for ordinary pulls; `None`: none is configured.
    pub mirror: Option<MirrorSide>,
    /// What is under way, watched.
    pub steps: Steps,
    /// Cancelled when the daemon stops.
    pub stop: CancellationToken,
}

/// Runs the daemon until SIGTERM or SIGINT.
pub async fn run(config: Config) -> Result<(), RunError> {
    if let Err(error) = crate::sys::process::raise_open_files() {
        tracing::warn!(%error, "raise the limit of open files");
    }
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let signals = tokio::spawn(async move {
        for second in [false, true] {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if second {
                tracing::warn!(signal = name, "second signal, ending at once");
                std::process::exit(1);
            }
            tracing::info!(signal = name, "stopping");
            stopped.cancel();
        }
    });
    let result = run_until(config, stop).await;
    signals.abort();
    result
}

/// Runs the daemon until the token is cancelled.
pub async fn run_until(config: Config, stop: CancellationToken) -> Result<(), RunError> {
    make_private(&config.root)?;
    make_private(&config.run_dir)?;
    let _lock = RootLock::take(&config.root)?;
    let listener = bind_private(&config.snapshots_socket())?;

    let path = config.root.join("metadata.redb");
    let store = MetadataStore::open(&path).map_err(|source| RunError::Store { path, source })?;
    let steps = Steps::new();
    let store = Arc::new(store.watched_by(steps.clone()));
    let directories = SnapshotDirectories::open(&config.root).map_err(RunError::Snapshots)?;

    let mut registry = Registry::default();
    let metrics = SnapshotMetrics::register(&mut registry).watched_by(steps.clone());
    steps.register(registry.sub_registry_with_prefix("sluice"));
    let _watchdog = Watchdog::start(steps.clone()).map_err(RunError::Watchdog)?;
    let mut cluster = None;
    if let Some(membership) = &config.cluster {
        let side = ClusterSide::start(membership, &config.root, &mut registry, &stop).await;
        cluster = Some(side.map_err(RunError::Cluster)?);
    }
    let peers = cluster.as_ref().map(|side| Arc::clone(side.peers()));
    let nodes: Nodes = Arc::new(move |place: &Repository| {
        let peers = Arc::clone(peers.as_ref()?);
        Some(Arc::new(BlobNodes::new(peers, place.clone())) as Arc<dyn PieceGivers>)
    });
    let mirror = MirrorSide::start(&config, &mut registry, nodes, &stop).await;

    let lazy = lazy::LazySide::start(Parts {
        config: &config,
        store: Arc::clone(&store),
        directories: directories.clone(),
        registry: &mut registry,
        cluster: cluster.as_ref().map(ClusterSide::view),
        peers: cluster.as_ref().map(|side| Arc::clone(side.peers())),
        mirror: mirror.clone(),
        steps: steps.clone(),
        stop: stop.clone(),
    })
    .await
    .map_err(RunError::Lazy)?;
    if let Some(mirror) = mirror.as_ref().and_then(MirrorSide::mirror) {
        lazy.shelf().attach_blobs(mirror.blobs().clone());
    }
    if let (Some(side), Some(config)) = (&cluster, &config.cluster) {
        side.serve(config, lazy.fetcher(), lazy.shelf());
    }

    let options = SnapshotOptions {
        prepare_budget: config.prepare_budget,
        mount_deadline: config.rpc_deadline,
        overlay: OverlayOptions {
            extra: config.overlay_options.clone(),
            idmapped: remaps::follow(&config, &stop),
        }
        .detect(),
    };
    let snapshots = Snapshots::start(store, directories, lazy.layers(), options, metrics.clone())
        .map_err(RunError::Snapshots)?;

    let health = Health::default();
    let mut telemetry = None;
    if let Some(address) = config.telemetry {
        let (registry, health) = (Arc::new(registry), health.clone());
        let stopping = CancellationToken::new();
        let server = telemetry::serve_at(address, registry, health, stopping.clone());
        telemetry = Some((tokio::spawn(server), stopping));
    }

    let limits = RequestLimits::new(config.prepare_budget, config.rpc_deadline);
    let server = service::serve(snapshots.clone(), listener, metrics, limits, stop.clone());
    let mut server = tokio::spawn(server);
    let pulls = mirror.as_ref().and_then(MirrorSide::serve);
    health.set(true);
    notify(NotifyState::Ready);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        root = ?config.root,
        socket = ?config.snapshots_socket(),
        "serving"
    );

    let early = tokio::select! {
        () = stop.cancelled() => None,
        result = &mut server => Some(result),
    };
    health.set(false);
    notify(NotifyState::Stopping);
    stop.cancel();
    let begun = Instant::now();
    let left = |deadline: Duration| deadline.saturating_sub(begun.elapsed());
    let served = match early {
        Some(result) => Some(result),
        None => tokio::time::timeout(left(REQUESTS_DEADLINE), &mut server)
            .await
            .ok(),
    };
    let result = match served {
        Some(Ok(Ok(()))) => Ok(()),
        Some(Ok(Err(error))) => Err(RunError::Serve(error.to_string())),
        Some(Err(error)) => Err(RunError::Serve(error.to_string())),
        None => {
            tracing::warn!("requests are still under way at the deadline");
            server.abort();
            Ok(())
        }
    };
    if let Some(cluster) = cluster {
        // It began to leave with the stop, and has done so by now.
        cluster.stop().await;
    }
    if let Some(pulls) = pulls
        && tokio::time::timeout(left(REQUESTS_DEADLINE), pulls)
            .await
            .is_err()
    {
        tracing::warn!("pulls are still under way at the deadline");
    }
    snapshots.stop(left(REQUESTS_DEADLINE)).await;
    lazy.stop(left(STOP_DEADLINE - TELEMETRY_DEADLINE)).await;
    if let Some((mut server, stopping)) = telemetry {
        stopping.cancel();
        match tokio::time::timeout(TELEMETRY_DEADLINE, &mut server).await {
            Ok(Ok(Err(error))) => tracing::warn!(%error, "telemetry failed"),
            Ok(_) => {}
            Err(_) => server.abort(),
        }
    }
    tracing::info!("stopped");
    result
}

/// Tells the service manager how far the daemon is, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager is not notified");
    }
}

/// Makes a directory that only its owner may enter.
fn make_private(path: &Path) -> Result<(), RunError> {
    let make = || {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700))
    };
    make().map_err(|source| RunError::Directory {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests;
