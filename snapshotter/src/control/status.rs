// SPDX-License-Identifier: Apache-2.0
//! What the daemon holds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use sluice_fetcher::source::{Priority, SourceKind};
use sluice_fetcher::steps::Stuck;
use sluice_fetcher::store::DeviceKey;
use sluice_proto::control::{Image, Layer, Mirror, Mount, SourceBytes, StatusResponse, StuckStep};

use super::{ControlError, ControlService};
use crate::layers::device_key;
use crate::lazy::ImageDocument;
use crate::mount::Backend;
use crate::mount::choice::Abilities;
use crate::run::MirrorSide;
use crate::snapshots::{LazyLayerRecord, SnapshotRecord};
use crate::store::DocumentTable;

/// Lazy layers by chain ID. They serve all namespaces.
type Chains = BTreeMap<String, LazyLayerRecord>;

impl ControlService {
    pub(super) async fn status(&self, wanted: &str) -> Result<StatusResponse, ControlError> {
        let parts = self.lazy.parts();
        let (records, documents) = self
            .metadata(|metadata| {
                let records = metadata.list(SnapshotRecord::is_lazy)?;
                Ok((
                    records,
                    metadata.documents::<ImageDocument>(DocumentTable::Images)?,
                ))
            })
            .await?;
        let mut chains = Chains::new();
        let mut by_device: BTreeMap<DeviceKey, LazyLayerRecord> = BTreeMap::new();
        for record in records {
            let Some(layer) = record.layer else { continue };
            by_device
                .entry(device_key(&layer))
                .or_insert_with(|| layer.clone());
            chains.insert(layer.chain_id.to_string(), layer);
        }
        let mut layers = BTreeMap::new();
        for (key, record) in by_device {
            layers.insert(key, self.layer(&record).await);
        }
        let documents = documents.into_iter().map(|(_, document)| document);
        let images = self
            .images(documents.collect(), &chains, &layers, wanted)
            .await;
        let store = Arc::clone(parts.layers.fetcher().store());
        let held = tokio::task::spawn_blocking(move || store.total_held_bytes()).await;
        let held = held
            .map_err(|_| ControlError::Stopping)?
            .unwrap_or_else(|error| {
                tracing::warn!("failed to count the store: {error}");
                0
            });
        let users = self.lazy.users().await?;
        let mounts = parts.mounts.mounted().into_iter().map(|run| Mount {
            key: run.key.to_string(),
            mountpoint: run.mountpoint.to_string_lossy().into_owned(),
            backend: run.backend.map_or("", Backend::as_str).into(),
            layers: run.layers,
            users: users.get(&run.key).copied().unwrap_or(0),
        });
        let Abilities {
            sealed,
            lazy,
            over_fuse,
        } = &self.abilities;
        let word = |backend: Backend| backend.as_str().to_owned();
        let (incomplete, reason) = match (lazy, over_fuse) {
            (Ok(()), _) => (Backend::Erofs, None),
            (Err(reason), Ok(())) => (Backend::ErofsFuse, Some(reason)),
            (Err(_), Err(reason)) => (Backend::Fuse, Some(reason)),
        };
        let complete = match sealed {
            Ok(()) => Backend::Erofs,
            Err(_) => Backend::Fuse,
        };
        Ok(StatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            backend: word(incomplete),
            sealed_backend: word(complete),
            backend_reason: reason.cloned().unwrap_or_default(),
            root: self.lazy.root().to_string_lossy().into_owned(),
            store_present_bytes: held,
            images,
            layers: layers.into_values().collect(),
            bytes_by_source: self.bytes_by_source(),
            mounts: mounts.collect(),
            mirror: self.mirror.as_ref().map(mirror_of),
            stuck: self.stuck(),
        })
    }

    /// What is present of a layer.
    async fn layer(&self, record: &LazyLayerRecord) -> Layer {
        let mut layer = Layer {
            diff_id: record.diff_id.to_string(),
            index_digest: record.index_digest.to_string(),
            blob_digest: record.blob_digest.to_string(),
            device_bytes: record.device_bytes,
            blob_bytes: record.blob_bytes,
            ..Default::default()
        };
        match self.lazy.parts().layers.open(record).await {
            Ok(handle) => {
                let device = handle.device();
                layer.present_bytes = device.present_bytes();
                layer.sealed = device.is_sealed();
                if let Some(failure) = device.failure() {
                    layer.failure = failure.described(record.diff_id);
                }
            }
            Err(error) => layer.failure = error.to_string(),
        }
        layer
    }

    async fn images(
        &self,
        documents: Vec<ImageDocument>,
        chains: &Chains,
        layers: &BTreeMap<DeviceKey, Layer>,
        wanted: &str,
    ) -> Vec<Image> {
        let mut names: BTreeMap<String, Vec<(String, Vec<String>)>> = BTreeMap::new();
        let mut images = Vec::new();
        for document in documents {
            let namespace = &document.namespace;
            let lazy: Vec<&Layer> = document
                .layers
                .iter()
                .filter_map(|layer| chains.get(&layer.chain_id))
                .filter_map(|record| layers.get(&device_key(record)))
                .collect();
            if lazy.is_empty() {
                continue;
            }
            if !names.contains_key(namespace) {
                names.insert(namespace.clone(), self.names(namespace).await);
            }
            let leads = |digests: &Vec<String>| digests.contains(&document.manifest);
            let named = names.get(namespace).into_iter().flatten();
            let references: Vec<String> = named
                .filter(|(_, digests)| leads(digests))
                .map(|(name, _)| name.clone())
                .collect();
            let fits = document.manifest.contains(wanted)
                || references
                    .iter()
                    .any(|reference| reference.contains(wanted));
            if !fits {
                continue;
            }
            let records = document.layers.iter().map(|it| chains.get(&it.chain_id));
            images.push(Image {
                boot_lists: self.boot_lists(records).await,
                namespace: document.namespace.clone(),
                references,
                total_bytes: lazy.iter().map(|layer| layer.device_bytes).sum(),
                present_bytes: lazy.iter().map(|layer| layer.present_bytes).sum(),
                sealed: lazy.iter().all(|layer| layer.sealed),
                chain_ids: document
                    .layers
                    .iter()
                    .map(|it| it.chain_id.clone())
                    .collect(),
                diff_ids: document
                    .layers
                    .iter()
                    .map(|it| it.diff_id.clone())
                    .collect(),
                manifest_digest: document.manifest,
                config_digest: document.config,
            });
        }
        images
    }

    fn stuck(&self) -> Vec<StuckStep> {
        let metrics = self.lazy.parts().layers.fetcher().metrics();
        let stuck = metrics.steps().stuck(Instant::now());
        stuck.into_iter().map(stuck_step).collect()
    }

    fn bytes_by_source(&self) -> Vec<SourceBytes> {
        let parts = self.lazy.parts();
        let metrics = parts.layers.fetcher().metrics();
        let kinds = [
            SourceKind::Origin,
            SourceKind::Mirror,
            SourceKind::Dragonfly,
            SourceKind::Peer,
            SourceKind::OtherZone,
            SourceKind::Local,
        ];
        let priorities = [
            (Priority::Foreground, "foreground"),
            (Priority::Boot, "boot"),
            (Priority::Background, "background"),
        ];
        let mut all = Vec::new();
        for kind in kinds {
            for (priority, word) in priorities {
                all.push((kind.as_str(), word, metrics.fetched_bytes(kind, priority)));
            }
        }
        all.push((
            SourceKind::Origin.as_str(),
            "index",
            parts.metrics.fetched_index_bytes(),
        ));
        all.into_iter()
            .filter(|(.., bytes)| *bytes > 0)
            .map(|(source, priority, bytes)| SourceBytes {
                source: source.into(),
                priority: priority.into(),
                bytes,
            })
            .collect()
    }
}

fn stuck_step(stuck: Stuck) -> StuckStep {
    let process = match stuck.pid == std::process::id() {
        true => "sluiced",
        false => "sluice-shim",
    };
    StuckStep {
        step: stuck.step,
        whom: stuck.whom,
        subject: stuck.subject,
        seconds: stuck.stands.as_secs(),
        process: process.into(),
        pid: stuck.pid,
    }
}

/// The mirror, and what it did since the daemon started.
fn mirror_of(side: &MirrorSide) -> Mirror {
    let state = side.state();
    let mut mirror = Mirror {
        address: side.address().to_string(),
        listening: state.listening,
        problem: state.problem,
        budget_bytes: side.budget_bytes(),
        ..Default::default()
    };
    if let Some(running) = side.mirror() {
        let blobs = running.blobs().metrics();
        mirror.held_bytes = running.blobs().held_bytes();
        mirror.cache_bytes = blobs.bytes_from("cache");
        mirror.peer_bytes = blobs.bytes_from("peer");
        mirror.origin_bytes = blobs.bytes_from("origin");
        mirror.stale_served = running.metrics().stale_served();
        mirror.access_denied = running.metrics().access_denied();
    }
    mirror
}
