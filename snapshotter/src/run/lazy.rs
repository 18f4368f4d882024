// SPDX-License-Identifier: Apache-2.0
//! The lazy side of the daemon: what stands behind [`LazyLayers`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::Parts;
use crate::snapshots::{
    LazyDecision, LazyLayerRecord, LazyLayers, MountError, PrepareRequest, SnapshotRecord, Usage,
};

/// The lazy side, running.
#[derive(Debug)]
pub(super) struct LazySide {
    layers: Arc<dyn LazyLayers>,
}

impl LazySide {
    /// Starts it. Waits for neither the network nor containerd.
    pub(super) async fn start(
        parts: Parts<'_>,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        tracing::debug!(root = ?parts.config.root, "no lazy layers in this build");
        Ok(Self {
            layers: Arc::new(NoLazy),
        })
    }

    /// What the life cycle of snapshots asks.
    pub(super) fn layers(&self) -> Arc<dyn LazyLayers> {
        Arc::clone(&self.layers)
    }

    /// Stops what runs, at most until the deadline. Mounts stay.
    pub(super) async fn stop(self, _deadline: Duration) {}
}

/// No layer is lazy: the daemon is an ordinary overlayfs snapshotter.
#[derive(Debug)]
struct NoLazy;

#[async_trait]
impl LazyLayers for NoLazy {
    async fn decide(&self, _request: &PrepareRequest) -> LazyDecision {
        LazyDecision::Ordinary {
            reason: "lazy layers are not available".into(),
        }
    }

    fn reused(&self, _request: &PrepareRequest, _existing: &SnapshotRecord) {}

    async fn lowers(
        &self,
        _user: &SnapshotRecord,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<PathBuf>, MountError> {
        let chain_id = chain
            .iter()
            .find_map(|record| record.layer.as_ref())
            .map(|l| l.chain_id);
        match chain_id {
            Some(chain_id) => Err(MountError::Unavailable {
                chain_id,
                reason: "lazy layers are not available".into(),
            }),
            None => Ok(Vec::new()),
        }
    }

    fn released(&self, _removed: &SnapshotRecord) {}

    fn usage(&self, _layer: &LazyLayerRecord) -> Usage {
        Usage::default()
    }

    async fn cleanup(&self) {}
}
