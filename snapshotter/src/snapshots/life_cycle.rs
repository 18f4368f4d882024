// SPDX-License-Identifier: Apache-2.0
//! All operations but Prepare and View, which are in [`super::prepare`].

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::directories::SnapshotDirectories;
use super::{
    Labels, LazyLayers, Mount, OverlayOptions, SnapshotError, SnapshotKind, SnapshotRecord, Usage,
    usage,
};
use crate::filters::Filters;
use crate::store::{MetadataStore, StoreError};
use crate::telemetry::SnapshotMetrics;

pub(super) type Result<T> = std::result::Result<T, SnapshotError>;

/// The reaper waits this long after a Remove for more of them, and for containerd's own Cleanup:
/// an image's removal is a burst, and one pass over the directory serves all of it.
const REAP_DELAY: Duration = Duration::from_secs(2);

/// What the life cycle is told by the configuration.
#[derive(Debug, Clone)]
pub struct SnapshotOptions {
    /// How long a Prepare may wait for the network before it becomes ordinary.
    pub prepare_budget: Duration,
    /// How long an operation may wait for the mounts of lazy layers.
    pub mount_deadline: Duration,
    /// Options of overlay mounts.
    pub overlay: OverlayOptions,
}

/// The snapshots of one root directory. Cheap to clone.
///
/// **Cancel**: an operation whose future is dropped is carried through all the same.
#[derive(Debug, Clone)]
pub struct Snapshots(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) store: Arc<MetadataStore>,
    pub(super) directories: SnapshotDirectories,
    pub(super) lazy: Arc<dyn LazyLayers>,
    pub(super) options: SnapshotOptions,
    pub(super) metrics: SnapshotMetrics,
    /// Owns every task that an operation started.
    tasks: TaskTracker,
    stop: CancellationToken,
    reap: Notify,
}

impl Snapshots {
    /// Takes over a root directory: buries what no row names, reports rows without directory, and
    /// starts the reaper. Must be called on a runtime; blocks for as long as that takes.
    pub fn start(
        store: Arc<MetadataStore>,
        directories: SnapshotDirectories,
        lazy: Arc<dyn LazyLayers>,
        options: SnapshotOptions,
        metrics: SnapshotMetrics,
    ) -> Result<Self> {
        if let Some(highest) = directories.highest_id()? {
            store.reserve_ids_through(highest);
        }
        let inner = Arc::new(Inner {
            store,
            directories,
            lazy,
            options,
            metrics,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            reap: Notify::new(),
        });
        let buried = inner.bury()?;
        let (with_directory, _) = inner.store.ids()?;
        for id in inner.directories.missing(&with_directory) {
            tracing::error!(%id, "directory of a snapshot is missing, its mounts will fail");
        }
        tracing::info!(
            snapshots = with_directory.len(),
            orphans = buried,
            "snapshots opened"
        );
        inner.reap.notify_one();
        let reaper = Arc::clone(&inner);
        inner
            .tasks
            .spawn(async move { reaper.reap_until_stopped().await });
        Ok(Self(inner))
    }

    /// Lets running operations end, at most until the deadline, and refuses new ones.
    pub async fn stop(&self, deadline: Duration) {
        self.0.stop.cancel();
        self.0.tasks.close();
        if tokio::time::timeout(deadline, self.0.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                operations = self.0.tasks.len(),
                "stopping with operations under way"
            );
        }
    }

    /// Refuses an operation that comes after [`Snapshots::stop`].
    pub(super) fn running(&self) -> Result<&Arc<Inner>> {
        if self.0.stop.is_cancelled() {
            Err(SnapshotError::Stopping)
        } else {
            Ok(&self.0)
        }
    }

    /// The snapshot with this key or name.
    pub async fn stat(&self, name: &str) -> Result<SnapshotRecord> {
        let name = name.to_owned();
        self.running()?
            .blocking(move |inner| Ok(inner.store.get(&name)?))
            .await
    }

    /// All snapshots that the filters accept.
    pub async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotRecord>> {
        let filters = Filters::parse(filters)?;
        self.running()?
            .blocking(move |inner| Ok(inner.store.list(|record| filters.accept(record))?))
            .await
    }

    /// Updates labels; see [`MetadataStore::update_labels`].
    pub async fn update(
        &self,
        name: &str,
        labels: Labels,
        mask: Vec<String>,
    ) -> Result<SnapshotRecord> {
        let name = name.to_owned();
        self.running()?
            .blocking(move |inner| Ok(inner.store.update_labels(&name, labels, &mask)?))
            .await
    }

    /// Resources of a snapshot without its parents: of an active one counted now, of a committed
    /// one as stored, of a lazy one what this node really holds. A view has none.
    pub async fn usage(&self, name: &str) -> Result<Usage> {
        let name = name.to_owned();
        self.running()?
            .blocking(move |inner| {
                let record = inner.store.get(&name)?;
                match record.kind {
                    SnapshotKind::Active => inner.count(&record),
                    _ if record.is_lazy() => Ok(inner.lazy.usage(&record)),
                    SnapshotKind::View | SnapshotKind::Committed => Ok(record.usage),
                }
            })
            .await
    }

    /// The mounts of an active snapshot or a view; makes what a reboot took away.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let key = key.to_owned();
        self.running()?
            .owned(move |inner| async move {
                let (record, chain) = inner
                    .blocking(move |inner| Ok(inner.store.with_chain(&key)?))
                    .await?;
                if record.kind == SnapshotKind::Committed {
                    return Err(StoreError::NotMountable { name: record.name }.into());
                }
                let lowers = inner.lowers(&record, chain).await?;
                Ok(inner
                    .options
                    .overlay
                    .mounts(&record, &lowers, &inner.directories))
            })
            .await
    }

    /// Makes an active snapshot a committed one.
    pub async fn commit(&self, name: &str, key: &str, labels: Labels) -> Result<()> {
        if name.is_empty() {
            return Err(SnapshotError::Empty {
                what: "name of the committed snapshot",
            });
        }
        let (name, key) = (name.to_owned(), key.to_owned());
        self.running()?
            .blocking(move |inner| {
                let active = inner.store.get(&key)?;
                let usage = match active.kind {
                    SnapshotKind::Active => inner.count(&active)?,
                    // Refused below, with the error that fits.
                    SnapshotKind::View | SnapshotKind::Committed => Usage::default(),
                };
                inner.store.commit(&key, &name, usage, labels)?;
                Ok(())
            })
            .await
    }

    /// Removes a snapshot without children. Its directory is deleted later.
    pub async fn remove(&self, name: &str) -> Result<()> {
        let name = name.to_owned();
        self.running()?
            .blocking(move |inner| {
                let removed = inner.store.remove(&name)?;
                inner.lazy.released(&removed);
                inner.reap.notify_one();
                Ok(())
            })
            .await
    }

    /// Deletes the directories of removed snapshots and unmounts what nobody uses, now.
    pub async fn cleanup(&self) -> Result<()> {
        self.running()?
            .owned(|inner| async move {
                inner.lazy.cleanup().await;
                inner.blocking(Inner::reap).await
            })
            .await
    }
}

impl Inner {
    /// Runs blocking work to its end on a thread of its own, whether or not the caller waits.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(self);
        self.tasks
            .spawn_blocking(move || work(&inner))
            .await
            .unwrap_or_else(broken)
    }

    /// Runs an operation to its end in a task of its own, whether or not the caller waits.
    pub(super) async fn owned<T, F>(
        self: &Arc<Self>,
        operation: impl FnOnce(Arc<Inner>) -> F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        if self.stop.is_cancelled() {
            return Err(SnapshotError::Stopping);
        }
        self.tasks
            .spawn(operation(Arc::clone(self)))
            .await
            .unwrap_or_else(broken)
    }

    /// The lower directories of a chain, highest first.
    ///
    /// The lazy side works in a task that goes on after the deadline, so that a slow mount is
    /// there for the next call.
    pub(super) async fn lowers(
        self: &Arc<Self>,
        user: &SnapshotRecord,
        chain: Vec<SnapshotRecord>,
    ) -> Result<Vec<std::path::PathBuf>> {
        if !chain.iter().any(SnapshotRecord::is_lazy) {
            return Ok(chain
                .iter()
                .map(|record| self.directories.fs(record.id))
                .collect());
        }
        let (lazy, record) = (Arc::clone(&self.lazy), user.clone());
        let task = self
            .tasks
            .spawn(async move { lazy.lowers(&record, &chain).await });
        let waited = self.options.mount_deadline;
        match tokio::time::timeout(waited, task).await {
            Err(_) => Err(SnapshotError::MountTimeout {
                name: user.name.clone(),
                waited,
            }),
            Ok(Err(error)) => broken(error),
            Ok(Ok(lowers)) => Ok(lowers?),
        }
    }

    /// Counts the resources of an ordinary snapshot's directory.
    pub(super) fn count(&self, record: &SnapshotRecord) -> Result<Usage> {
        let path = self.directories.fs(record.id);
        usage::of_tree(&path).map_err(SnapshotError::directory("count usage of", path))
    }

    fn bury(&self) -> Result<usize> {
        self.directories
            .bury(|| Ok::<_, SnapshotError>(self.store.ids()?.0))
    }

    /// Deletes every directory that is nobody's. May run several times at once.
    fn reap(&self) -> Result<()> {
        self.bury()?;
        self.directories.empty_graveyard()?;
        Ok(())
    }

    async fn reap_until_stopped(self: Arc<Self>) {
        let next = async || {
            self.reap.notified().await;
            tokio::time::sleep(REAP_DELAY).await;
        };
        while self.stop.run_until_cancelled(next()).await.is_some() {
            if let Err(error) = self.blocking(Self::reap).await {
                tracing::warn!(%error, "snapshot directories are not reaped");
            }
        }
    }

    /// Wakes the reaper: a directory may have become nobody's.
    pub(super) fn wake_reaper(&self) {
        self.reap.notify_one();
    }
}

/// A task that panicked or was aborted with the runtime.
fn broken<T>(error: tokio::task::JoinError) -> Result<T> {
    Err(SnapshotError::Broken {
        reason: error.to_string(),
    })
}
