// SPDX-License-Identifier: Apache-2.0
//! Taking away what no snapshot needs any more.
//!
//! Nothing is counted: each pass derives from the metadata store which runs, layers and trees are
//! needed, and takes the rest away in the order mounts, trees, devices, indexes. What is on its way
//! into the metadata store (a Prepare that has its index and is not committed yet) is protected by
//! its age. A pass that dies half-way is made up for by the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::digest::IndexDigest;
use sluice_fetcher::store::DeviceKey;
use tokio::time::Instant;

use super::Inner;
use crate::chain::{RunKey, run_keys};
use crate::layers::device_key;
use crate::snapshots::{SnapshotKind, SnapshotRecord};
use crate::store::StoreError;

/// How long a mount that nobody uses stays at least, also when containerd asks for a clean-up: longer
/// than a client takes from the answer with the mounts to mounting them.
pub(super) const CLEANUP_GRACE: Duration = Duration::from_secs(3);
/// Passes without a removal: they find what a grace held back.
const PERIOD: Duration = Duration::from_secs(60);
/// Removals come in bursts.
const BURST: Duration = Duration::from_secs(1);

/// What is needed.
#[derive(Debug, Default)]
pub(crate) struct Needed {
    /// Runs that active snapshots and views stand on, and how many.
    pub(crate) used: BTreeMap<RunKey, u32>,
    /// Runs that a container of any image here would stand on.
    pub(crate) kept: BTreeSet<RunKey>,
    /// Devices of all lazy layers.
    pub(crate) devices: BTreeSet<DeviceKey>,
}

/// The snapshot with this name and all below it, nearest first.
fn chain_of(by_name: &BTreeMap<&str, &SnapshotRecord>, name: Option<&str>) -> Vec<SnapshotRecord> {
    let mut chain: Vec<SnapshotRecord> = Vec::new();
    let mut next = name.and_then(|name| by_name.get(name));
    while let Some(record) = next {
        chain.push((*record).clone());
        next = record.parent.as_deref().and_then(|name| by_name.get(name));
    }
    chain
}

impl Inner {
    pub(super) async fn sweep_until_stopped(self: &Arc<Self>) {
        loop {
            let grace = self.options.mount_grace.max(CLEANUP_GRACE);
            // A removal is looked at when mounts and files may go; without one, now and then.
            let patience = grace.max(self.options.file_grace) + BURST;
            tokio::select! {
                () = self.swept.notified() => {
                    tokio::time::sleep(patience).await;
                    self.sweep(grace).await;
                    // What goes with a layer may be held for a moment by work on it that is being
                    // cancelled, or by a mount that is leaving: another pass finds it free.
                    tokio::time::sleep(patience).await;
                }
                () = tokio::time::sleep(PERIOD.max(grace)) => {}
            }
            self.sweep(grace).await;
        }
    }

    pub(super) fn users(&self) -> Result<BTreeMap<RunKey, u32>, StoreError> {
        Ok(self.needed()?.used)
    }

    pub(super) fn needed(&self) -> Result<Needed, StoreError> {
        let mut needed = Needed::default();
        let all = self.parts.metadata.list(|_| true)?;
        let by_name: BTreeMap<&str, &SnapshotRecord> = all
            .iter()
            .map(|record| (record.name.as_str(), record))
            .collect();
        let chain = |name: Option<&str>| chain_of(&by_name, name);
        let parents: BTreeSet<&str> = all
            .iter()
            .filter_map(|record| record.parent.as_deref())
            .collect();
        for record in &all {
            if let Some(layer) = &record.layer {
                needed.devices.insert(device_key(layer));
            }
            if record.kind != SnapshotKind::Committed {
                for key in run_keys(&chain(record.parent.as_deref())) {
                    *needed.used.entry(key).or_default() += 1;
                    needed.kept.insert(key);
                }
            } else if !parents.contains(record.name.as_str()) {
                needed.kept.extend(run_keys(&chain(Some(&record.name))));
            }
        }
        Ok(needed)
    }

    /// What is needed now; `None` when that cannot be said, and then nothing may be taken away.
    async fn look(self: &Arc<Self>) -> Option<Needed> {
        let needed = self.blocking(|inner| inner.needed()).await;
        needed
            .inspect_err(|error| tracing::error!("failed to look up what is needed: {error}"))
            .ok()
    }

    /// One pass. Errors are logged; the next pass tries again.
    pub(super) async fn sweep(self: &Arc<Self>, grace: Duration) {
        let looked_at = Instant::now();
        let Some(needed) = self.look().await else {
            return;
        };
        self.parts.background.retain(&needed.devices);
        if !self.parts.mounts.is_adopted() {
            tracing::debug!("nothing is taken away before the shim has said what is mounted");
            return;
        }
        let used = needed.used.keys().copied().collect();
        self.parts.mounts.reap(&used, looked_at, grace).await;
        // Unmounting takes its time, and what was committed meanwhile is needed too.
        let Some(needed) = self.look().await else {
            return;
        };
        let kept = needed.kept;
        self.blocking(move |inner| inner.sweep_trees(&kept)).await;
        self.sweep_devices(&needed.devices).await;
        self.keep_budget().await;
        let indexes: BTreeSet<IndexDigest> = needed.devices.iter().map(|key| key.index).collect();
        self.plans.release(&indexes, self.options.file_grace);
        let documents = self.blocking(move |inner| {
            inner.sweep_indexes(&indexes);
            inner.sweep_documents()
        });
        if let Err(error) = documents.await {
            tracing::warn!("failed to sweep documents: {error}");
        }
    }

    fn sweep_trees(&self, kept: &BTreeSet<RunKey>) {
        let old = match self.parts.trees.older_than(self.options.file_grace) {
            Ok(old) => old,
            Err(error) => {
                tracing::warn!("failed to list trees: {error}");
                return;
            }
        };
        for key in old.into_iter().filter(|key| !kept.contains(key)) {
            let removed = self
                .parts
                .mounts
                .while_absent(key, || self.parts.trees.remove(key));
            if let Some(Err(error)) = removed {
                tracing::warn!(run = %key, "failed to remove a tree: {error}");
            }
        }
    }

    async fn sweep_devices(self: &Arc<Self>, needed: &BTreeSet<DeviceKey>) {
        let keys = self
            .blocking(|inner| inner.parts.layers.fetcher().store().keys())
            .await;
        let keys = match keys {
            Ok(keys) => keys,
            Err(error) => {
                tracing::warn!("failed to list devices: {error}");
                return;
            }
        };
        let mounted = self.parts.mounts.devices();
        let fosters = self.parts.shelf.fosters();
        let indexes = self.parts.layers.indexes();
        for key in keys {
            let young = indexes.touched_within(key.index, self.options.file_grace);
            let used = mounted.contains(&key) || fosters.contains(&key);
            if needed.contains(&key) || used || young {
                continue;
            }
            match self.parts.layers.remove(&key).await {
                Ok(()) => tracing::info!(device = %key, "removed a layer that no snapshot has"),
                Err(error) => tracing::warn!(device = %key, "failed to remove a layer: {error}"),
            }
        }
    }

    fn sweep_indexes(&self, needed: &BTreeSet<IndexDigest>) {
        let mut used = self.parts.mounts.devices();
        used.extend(self.parts.shelf.fosters());
        let held = |digest: IndexDigest| {
            needed.contains(&digest) || used.iter().any(|key| key.index == digest)
        };
        let indexes = self.parts.layers.indexes();
        if let Err(error) = indexes.sweep(held, self.options.file_grace) {
            tracing::warn!("failed to sweep indexes: {error}");
        }
        indexes.release_pages();
    }
}
