// SPDX-License-Identifier: Apache-2.0
//! The mirror of the daemon, put together. Nothing of it keeps the daemon from starting: a cache that
//! cannot be opened, or a port that is taken, means no mirror, and `sluice status` says why.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use sluice_fetcher::blob_cache::{BlobCache, BlobCacheOptions, BlobMetrics};
use sluice_fetcher::registry::{NoCredentials, RegistryClient};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::lazy::registry_options;
use crate::config::{Config, MirrorConfig};
use crate::mirror::{Mirror, MirrorMetrics, MirrorParts, MirrorState, Nodes, serve_at};

/// Longest wait of a pull without any progress: what the registry client waits for an answer, twice.
const STALL: Duration = Duration::from_secs(60);

/// The mirror, or why there is none.
#[derive(Clone, Debug)]
pub struct MirrorSide {
    address: SocketAddr,
    budget_bytes: u64,
    mirror: Result<Mirror, String>,
}

impl MirrorSide {
    /// Opens the cache. `None`: no mirror is configured.
    pub(super) async fn start(
        config: &Config,
        registry: &mut Registry,
        nodes: Nodes,
        stop: &CancellationToken,
    ) -> Option<Self> {
        let wanted = config.mirror.as_ref()?;
        let mirror = open(config, wanted, registry, nodes, stop).await;
        if let Err(error) = &mirror {
            tracing::error!("failed to start the mirror, going on without: {error}");
        }
        Some(Self {
            address: wanted.listen,
            budget_bytes: wanted.budget_bytes,
            mirror,
        })
    }

    /// The mirror, if it could be started.
    #[must_use]
    pub fn mirror(&self) -> Option<&Mirror> {
        self.mirror.as_ref().ok()
    }

    /// Where it listens, or would.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Most bytes of blobs that it keeps.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> MirrorState {
        match &self.mirror {
            Ok(mirror) => mirror.state(),
            Err(problem) => MirrorState {
                listening: false,
                problem: problem.clone(),
            },
        }
    }

    /// Serves from now on, until the daemon stops.
    pub(super) fn serve(&self) -> Option<JoinHandle<()>> {
        let mirror = self.mirror()?.clone();
        Some(tokio::spawn(serve_at(mirror)))
    }
}

async fn open(
    config: &Config,
    wanted: &MirrorConfig,
    registry: &mut Registry,
    nodes: Nodes,
    stop: &CancellationToken,
) -> Result<Mirror, String> {
    let registry = registry.sub_registry_with_prefix("sluice");
    let (metrics, blob_metrics) = (MirrorMetrics::default(), BlobMetrics::default());
    metrics.register(registry);
    blob_metrics.register(registry);
    let options = BlobCacheOptions {
        directory: config.root.join("mirror"),
        budget_bytes: wanted.budget_bytes,
        stall: STALL,
    };
    let opened = tokio::task::spawn_blocking(move || BlobCache::open(options, blob_metrics)).await;
    let blobs = opened
        .map_err(|error| error.to_string())?
        .map_err(|error| format!("open the cache: {error}"))?;
    // Asks with what clients show, or with nothing; this node's own credentials are not for them.
    let client = RegistryClient::new(registry_options(config), Arc::new(NoCredentials));
    let client = client.map_err(|error| error.to_string())?;
    let parts = MirrorParts {
        client,
        blobs,
        nodes,
        metrics,
        key: rand::random(),
        stop: stop.clone(),
    };
    Ok(Mirror::new(wanted, parts))
}
