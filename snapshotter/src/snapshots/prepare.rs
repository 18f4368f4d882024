// SPDX-License-Identifier: Apache-2.0
//! Prepare and View.
//!
//! A Prepare with `containerd.io/snapshot.ref` may be answered by a committed snapshot: one that
//! exists, or one that is made because the layer is lazy or was unpacked here. Everything else
//! that can happen on that way (a slow registry, a bad index, an unpack that fails) ends in the
//! ordinary snapshot that the client asked for, logged under one message with a reason.

use std::sync::Arc;

use sluice_blockindex::digest::ChainId;
use tokio::time::{Instant, timeout_at};

use super::directories::{UnderWay, owner_of};
use super::life_cycle::{Inner, Result};
use super::{
    LABEL_SNAPSHOT_REF, Labels, LazyDecision, Mount, PrepareRequest, SnapshotError, SnapshotId,
    SnapshotKind, SnapshotRecord, Snapshots, UnpackSource, UnpackTarget, Usage, id_map,
    namespace_of, usage,
};
use crate::store::{NewCommitted, NewSnapshot};
use crate::telemetry::PrepareOutcome;

/// Outcome of a Prepare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    /// An active snapshot was made; these are its mounts.
    Mounts(Vec<Mount>),
    /// A committed snapshot answers the request's `containerd.io/snapshot.ref`; no active one was
    /// made.
    Exists {
        /// Its name.
        name: String,
    },
}

/// Arguments of Prepare and View.
#[derive(Debug, Clone)]
struct Wanted {
    kind: SnapshotKind,
    key: String,
    parent: Option<String>,
    labels: Labels,
}

impl Snapshots {
    /// Makes an active snapshot on a committed parent (empty for none), or finds that a committed
    /// one answers already.
    pub async fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Prepared> {
        let wanted = Wanted::new(SnapshotKind::Active, key, parent, labels)?;
        self.running()?
            .owned(move |inner| async move {
                if let Some(record) = inner.answer(&wanted).await? {
                    return Ok(Prepared::Exists { name: record.name });
                }
                inner.create(wanted).await.map(Prepared::Mounts)
            })
            .await
    }

    /// Makes a view of a committed parent (empty for none).
    pub async fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        let wanted = Wanted::new(SnapshotKind::View, key, parent, labels)?;
        self.running()?
            .owned(move |inner| async move { inner.create(wanted).await })
            .await
    }
}

impl Wanted {
    fn new(kind: SnapshotKind, key: &str, parent: &str, labels: Labels) -> Result<Self> {
        if key.is_empty() {
            return Err(SnapshotError::Empty {
                what: "key of the snapshot",
            });
        }
        let parent = (!parent.is_empty()).then(|| parent.to_owned());
        Ok(Self {
            kind,
            key: key.to_owned(),
            parent,
            labels,
        })
    }
}

/// The one message for a Prepare that could have been lazy and is not.
fn log_ordinary(request: &PrepareRequest, reason: &str) {
    tracing::info!(
        chain_id = %request.chain_id,
        key = request.key,
        namespace = request.namespace,
        reason,
        "prepare is ordinary"
    );
}

impl Inner {
    /// The committed snapshot that answers a Prepare, found or made; `None`: make an ordinary one.
    async fn answer(self: &Arc<Self>, wanted: &Wanted) -> Result<Option<SnapshotRecord>> {
        let Some(reference) = wanted.labels.get(LABEL_SNAPSHOT_REF) else {
            return Ok(None);
        };
        let Ok(chain_id) = reference.parse::<ChainId>() else {
            tracing::info!(key = wanted.key, reference, "snapshot.ref is no chain ID");
            return Ok(None);
        };
        let parent = wanted.parent.clone();
        let (existing, lost, chain) = self
            .blocking(move |inner| {
                let existing = inner.store.target(chain_id, parent.as_deref())?;
                let layer = existing.as_ref().and_then(|record| record.layer.as_ref());
                let lost = layer.is_some_and(|layer| inner.lazy.lacks_index(layer));
                Ok((existing, lost, inner.store.chain(parent.as_deref())?))
            })
            .await?;
        let request = PrepareRequest {
            key: wanted.key.clone(),
            namespace: namespace_of(&wanted.key).map(str::to_owned),
            parent: wanted.parent.clone(),
            parent_chain: chain.first().and_then(SnapshotRecord::chain_id),
            chain,
            chain_id,
            labels: wanted.labels.clone(),
            deadline: Instant::now() + self.options.prepare_budget,
        };
        if let Some(existing) = existing {
            if lost {
                self.repair(&request, &existing).await;
            }
            self.lazy.reused(&request, &existing);
            self.metrics.prepared(PrepareOutcome::Existing);
            return Ok(Some(existing));
        }
        let (outcome, result) = self.decide(&request).await?;
        self.metrics.prepared(outcome);
        match result {
            Ok(record) => Ok(Some(record)),
            Err(reason) => {
                log_ordinary(&request, &reason);
                Ok(None)
            }
        }
    }

    /// Has the lazy side fetch the index of a layer that exists and has lost it: this Prepare may be
    /// the only one that ever brings the means. The layer is what it was, whatever comes of it.
    async fn repair(&self, request: &PrepareRequest, existing: &SnapshotRecord) {
        let decision = timeout_at(request.deadline, self.lazy.decide(request)).await;
        let reason = match (decision, &existing.layer) {
            (Ok(LazyDecision::Lazy(found)), Some(layer))
                if found.index_digest == layer.index_digest =>
            {
                tracing::warn!(
                    name = existing.name,
                    "fetched the lost index of a layer again"
                );
                return;
            }
            (Ok(LazyDecision::Lazy(_)), _) => "the image has another index".to_owned(),
            (Ok(LazyDecision::Unpack(_)), _) => "the image has no index".to_owned(),
            (Ok(LazyDecision::Ordinary { reason }), _) => reason,
            (Err(_), _) => "prepare budget is spent".to_owned(),
        };
        tracing::error!(
            name = existing.name,
            reason,
            "the index of a layer is lost and could not be fetched again"
        );
    }

    /// Asks the lazy side and does what it says; the inner error is the reason why the Prepare is
    /// ordinary.
    async fn decide(
        self: &Arc<Self>,
        request: &PrepareRequest,
    ) -> Result<(PrepareOutcome, std::result::Result<SnapshotRecord, String>)> {
        let decision = timeout_at(request.deadline, self.lazy.decide(request)).await;
        Ok(match decision {
            Err(_) => (
                PrepareOutcome::BudgetSpent,
                Err("prepare budget is spent".to_owned()),
            ),
            Ok(LazyDecision::Ordinary { reason }) => (PrepareOutcome::Ordinary, Err(reason)),
            Ok(LazyDecision::Lazy(layer)) if layer.chain_id != request.chain_id => {
                let reason = format!("the layer found is that of {}", layer.chain_id);
                (PrepareOutcome::Ordinary, Err(reason))
            }
            Ok(LazyDecision::Lazy(layer)) => {
                let id = self.store.allocate_id();
                let record = self
                    .adopt(request, id, Some(layer), Usage::default())
                    .await?;
                (PrepareOutcome::Lazy, Ok(record))
            }
            Ok(LazyDecision::Unpack(source)) => match self.unpack(request, source).await {
                Ok(record) => (PrepareOutcome::Unpacked, Ok(record)),
                Err(reason) => (PrepareOutcome::UnpackFailed, Err(reason)),
            },
        })
    }

    /// Stores the committed snapshot that answers, or finds the one that another Prepare stored.
    async fn adopt(
        self: &Arc<Self>,
        request: &PrepareRequest,
        id: SnapshotId,
        layer: Option<super::LazyLayerRecord>,
        usage: Usage,
    ) -> Result<SnapshotRecord> {
        let new = NewCommitted {
            id,
            chain_id: request.chain_id,
            parent: request.parent.clone(),
            labels: request.labels.clone(),
            layer,
            usage,
        };
        let adopted = self
            .blocking(move |inner| Ok(inner.store.adopt(new)?))
            .await?;
        if !adopted.created {
            self.lazy.reused(request, &adopted.record);
        }
        Ok(adopted.record)
    }

    /// Unpacks a layer within the request's deadline and stores it; the error is the reason why
    /// the Prepare becomes ordinary. A directory that is given up goes to the reaper.
    async fn unpack(
        self: &Arc<Self>,
        request: &PrepareRequest,
        source: Box<dyn UnpackSource>,
    ) -> std::result::Result<SnapshotRecord, String> {
        let id = self.store.allocate_id();
        // Until the row is stored, or the directory given up.
        let under_way = self.directories.under_way(id);
        let result = self.unpack_into(request, source, id).await;
        drop(under_way);
        match result {
            Ok(record) if record.id == id => {
                tracing::info!(chain_id = %request.chain_id, name = record.name, "layer unpacked");
                Ok(record)
            }
            result => {
                self.wake_reaper();
                result
            }
        }
    }

    async fn unpack_into(
        self: &Arc<Self>,
        request: &PrepareRequest,
        source: Box<dyn UnpackSource>,
        id: SnapshotId,
    ) -> std::result::Result<SnapshotRecord, String> {
        let parent = request.chain.first().cloned();
        let make = move |inner: &Inner| {
            // The root of a lazy parent is known to the source only.
            let parent = parent.filter(|parent| !parent.is_lazy());
            let owner = parent.map(|parent| owner_of(&inner.directories.fs(parent.id)));
            inner
                .directories
                .create(id, SnapshotKind::View, owner.transpose()?)
        };
        self.blocking(make)
            .await
            .map_err(|error| error.to_string())?;
        let target = UnpackTarget {
            directory: self.directories.fs(id),
            chain: request.chain.clone(),
        };
        match timeout_at(request.deadline, source.unpack(&target)).await {
            Err(_) => return Err("prepare budget is spent while unpacking".to_owned()),
            Ok(Err(error)) => return Err(error.to_string()),
            Ok(Ok(())) => (),
        }
        let path = target.directory;
        let count = move |_: &Inner| {
            usage::of_tree(&path).map_err(SnapshotError::directory("count usage of", path))
        };
        let usage = self
            .blocking(count)
            .await
            .map_err(|error| error.to_string())?;
        self.adopt(request, id, None, usage)
            .await
            .map_err(|error| error.to_string())
    }

    /// Makes an active snapshot or a view, and answers its mounts.
    async fn create(self: &Arc<Self>, wanted: Wanted) -> Result<Vec<Mount>> {
        let id = self.store.allocate_id();
        let under_way = self.directories.under_way(id);
        let mapped = id_map::mapped_root(&wanted.labels)?;
        let active = wanted.kind == SnapshotKind::Active;
        let stored = self
            .blocking(move |inner| inner.store_new(id, wanted, mapped, under_way))
            .await
            .inspect_err(|_| self.wake_reaper());
        let (record, chain) = stored?;
        // A lazy parent's root is known once it is mounted, and it is mounted once the row that
        // uses the mount is stored.
        let inherit =
            active && mapped.is_none() && chain.first().is_some_and(SnapshotRecord::is_lazy);
        match self.lowers_of_new(&record, chain, inherit).await {
            Ok(mounts) => Ok(mounts),
            Err(error) => {
                self.forget(record).await;
                Err(error)
            }
        }
    }

    /// Directory first, then row. Blocks.
    fn store_new(
        &self,
        id: SnapshotId,
        wanted: Wanted,
        mapped: Option<id_map::Owner>,
        _under_way: UnderWay,
    ) -> Result<(SnapshotRecord, Vec<SnapshotRecord>)> {
        let chain = self.store.chain(wanted.parent.as_deref())?;
        let owner = match (mapped, chain.first()) {
            (Some(owner), _) => Some(owner),
            (None, Some(parent)) if !parent.is_lazy() => {
                Some(owner_of(&self.directories.fs(parent.id))?)
            }
            (None, _) => None,
        };
        self.directories.create(id, wanted.kind, owner)?;
        let record = self.store.create(NewSnapshot {
            id,
            key: wanted.key,
            kind: wanted.kind,
            parent: wanted.parent,
            labels: wanted.labels,
        })?;
        Ok((record, chain))
    }

    async fn lowers_of_new(
        self: &Arc<Self>,
        record: &SnapshotRecord,
        chain: Vec<SnapshotRecord>,
        inherit_owner: bool,
    ) -> Result<Vec<Mount>> {
        let lowers = self.lowers(record, chain).await?;
        if let Some(top) = lowers.first().filter(|_| inherit_owner).cloned() {
            let (id, waited) = (record.id, self.options.mount_deadline);
            let inherit =
                self.blocking(move |inner| inner.directories.set_owner(id, owner_of(&top)?));
            // The mount may hang where the directories of others do not.
            tokio::time::timeout(waited, inherit).await.map_err(|_| {
                SnapshotError::MountTimeout {
                    name: record.name.clone(),
                    waited,
                }
            })??;
        }
        Ok(self
            .options
            .overlay
            .mounts(record, &lowers, &self.directories))
    }

    /// Takes back a snapshot that was stored but cannot be mounted.
    async fn forget(self: &Arc<Self>, record: SnapshotRecord) {
        let removed = self
            .blocking(move |inner| {
                let removed = inner.store.remove(&record.name)?;
                inner.lazy.released(&removed);
                Ok(())
            })
            .await;
        if let Err(error) = removed {
            tracing::warn!(%error, "a snapshot without mounts stays until containerd removes it");
        }
        self.wake_reaper();
    }
}
