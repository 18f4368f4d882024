// SPDX-License-Identifier: Apache-2.0
//! Which merged runs are mounted, so that all containers of an image share one mount.
//!
//! ```text
//! absent --ensure--> Mounting --ok--> Mounted --reap--> Retiring --done--> absent
//!    ^                  |failed          ^                  |busy
//!    +------------------+                +------------------+
//! ```
//! The one rule that settles races: who moves a key out of `absent` or `Mounted` owns it until the
//! next move, and everybody else waits for that move. So two containers that start together mount
//! once, and nobody is handed a mount that is being taken away. Whether a mount is *used* is not
//! counted here: the reaper derives it from the snapshots in the metadata store, which cannot drift;
//! `last_used` protects the moment between that look and the unmount.
//!
//! **Locks** the table's lock is held for map operations only, never across an await.
//! **Crash** leaves mounts with the shim; [`Mounts::adopt`] finds them again at start.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sluice_fetcher::store::DeviceKey;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::chain::RunKey;
use crate::mount::over_fuse;
use crate::mount::{
    Backend, ImageMount, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome,
};

/// How long a caller waits for another's mount or unmount of the same run. Above the shim client's
/// own bound of a call, so that the owner's error is what is reported.
const TURN_DEADLINE: Duration = Duration::from_secs(60);

/// Why a run is not mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnsureError<E> {
    /// Its inputs could not be made ready.
    #[error("{0}")]
    Prepare(E),
    /// The back-end could not mount it.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Another caller's mount or unmount of it does not end.
    #[error("run {0} is being mounted or unmounted by another caller, who does not end")]
    Stuck(RunKey),
    /// The mount point could not be made.
    #[error("create mount point {path}: {source}")]
    Mountpoint {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Mounting,
    Mounted,
    Retiring,
}

#[derive(Clone, Debug)]
struct Entry {
    phase: Phase,
    /// What serves it; none yet while it is being mounted for the first time.
    backend: Option<Backend>,
    devices: Vec<DeviceKey>,
    last_used: Instant,
}

fn device_keys(spec: &MountSpec) -> Vec<DeviceKey> {
    let devices = spec.devices.iter();
    devices
        .map(|it| DeviceKey {
            diff_id: it.diff_id,
            index: it.index_digest,
        })
        .collect()
}

/// A mount, for `sluice status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedRun {
    /// Names it.
    pub key: RunKey,
    /// Where it is.
    pub mountpoint: PathBuf,
    /// What serves it.
    pub backend: Option<Backend>,
    /// How many layers it merges.
    pub layers: u32,
}

/// The table of mounts below one directory.
#[derive(Debug)]
pub struct Mounts {
    backend: Arc<dyn ImageMount>,
    directory: PathBuf,
    table: Mutex<BTreeMap<RunKey, Entry>>,
    moved: watch::Sender<()>,
    adopted: AtomicBool,
}

/// Owns a key between two phases; dropped, it puts the key where `fallback` says.
struct Turn<'a> {
    mounts: &'a Mounts,
    key: RunKey,
    fallback: Option<Phase>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut table = self.mounts.table();
        match self.fallback {
            None => {
                table.remove(&self.key);
            }
            Some(phase) => {
                if let Some(entry) = table.get_mut(&self.key) {
                    entry.phase = phase;
                }
            }
        }
        drop(table);
        self.mounts.moved.send_replace(());
    }
}

impl Mounts {
    /// An empty table for mounts at `directory/<run key>`; the directory exists.
    #[must_use]
    pub fn new(backend: Arc<dyn ImageMount>, directory: &Path) -> Self {
        Self {
            backend,
            directory: directory.to_owned(),
            table: Mutex::default(),
            moved: watch::Sender::new(()),
            adopted: AtomicBool::new(false),
        }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<RunKey, Entry>> {
        // Every critical section leaves the map whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a run is mounted.
    #[must_use]
    pub fn mountpoint(&self, key: RunKey) -> PathBuf {
        self.directory.join(key.to_string())
    }

    /// Takes over mounts that are there already: those that the kernel or the shim serves, and those
    /// that are only leaving, whose devices are in use as well. The reaper asks for the end of either;
    /// a call that wants one that is leaving finds it absent and mounts it again. Of a run that comes
    /// twice the first counts.
    pub fn adopt(&self, served: &[(MountSpec, Backend)]) {
        let mut table = self.table();
        for (spec, backend) in served {
            let Some(key) = RunKey::from_hex(&spec.key) else {
                continue;
            };
            let entry = Entry {
                phase: Phase::Mounted,
                backend: Some(*backend),
                devices: device_keys(spec),
                last_used: Instant::now(),
            };
            table.entry(key).or_insert(entry);
        }
        drop(table);
        self.adopted.store(true, Ordering::Release);
    }

    /// Whether [`Mounts::adopt`] was called. Before, the table does not know what is in use, and
    /// nothing may be taken away.
    #[must_use]
    pub fn is_adopted(&self) -> bool {
        self.adopted.load(Ordering::Acquire)
    }

    /// What is mounted.
    #[must_use]
    pub fn mounted(&self) -> Vec<MountedRun> {
        let table = self.table();
        table
            .iter()
            .filter(|(_, entry)| entry.phase == Phase::Mounted)
            .map(|(key, entry)| MountedRun {
                key: *key,
                mountpoint: self.mountpoint(*key),
                backend: entry.backend,
                layers: u32::try_from(entry.devices.len()).unwrap_or(u32::MAX),
            })
            .collect()
    }

    /// Whether the run is in the table, in whatever phase.
    #[must_use]
    pub fn knows(&self, key: RunKey) -> bool {
        self.table().contains_key(&key)
    }

    /// The devices below all mounts: their files are in use.
    #[must_use]
    pub fn devices(&self) -> BTreeSet<DeviceKey> {
        self.table()
            .values()
            .flat_map(|entry| entry.devices.iter().copied())
            .collect()
    }

    /// Mounts the run unless it is mounted and served, and says where.
    ///
    /// `prepare` makes tree and devices ready; it runs at most once, in the call that mounts.
    /// **Cancel** safe: the key is given up, and a mount that is made all the same is found by the
    /// next call.
    pub async fn ensure<E>(
        &self,
        key: RunKey,
        prepare: impl Future<Output = Result<MountSpec, E>>,
    ) -> Result<PathBuf, EnsureError<E>> {
        let deadline = Instant::now() + TURN_DEADLINE;
        let turn = loop {
            let mut moved = self.moved.subscribe();
            match self.begin(key) {
                Begin::Mine(turn) => break turn,
                Begin::There => match self.backend.check(&key.to_string()).await? {
                    MountState::Serving => return Ok(self.mountpoint(key)),
                    // The shim died with its mounts, or this one is only leaving.
                    MountState::Absent => {
                        if let Some(turn) = self.begin_again(key) {
                            break turn;
                        }
                    }
                },
                Begin::Wait => {
                    let move_ = moved.changed();
                    if tokio::time::timeout_at(deadline, move_).await.is_err() {
                        return Err(EnsureError::Stuck(key));
                    }
                }
            }
        };
        self.mount(turn, prepare).await
    }

    async fn mount<E>(
        &self,
        mut turn: Turn<'_>,
        prepare: impl Future<Output = Result<MountSpec, E>>,
    ) -> Result<PathBuf, EnsureError<E>> {
        let spec = prepare.await.map_err(EnsureError::Prepare)?;
        // Nothing looks at the directory: a dead mount may lie on it, which only the back-end touches.
        if let Err(source) = tokio::fs::create_dir(&spec.mountpoint).await
            && source.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(EnsureError::Mountpoint {
                path: spec.mountpoint,
                source,
            });
        }
        let backend = self.backend.mount(&spec).await?;
        if let Some(entry) = self.table().get_mut(&turn.key) {
            entry.backend = Some(backend);
            entry.devices = device_keys(&spec);
            entry.last_used = Instant::now();
        }
        turn.fallback = Some(Phase::Mounted);
        Ok(spec.mountpoint)
    }

    fn begin(&self, key: RunKey) -> Begin<'_> {
        let now = Instant::now();
        let mut table = self.table();
        match table.get_mut(&key) {
            None => Begin::Mine(self.claim(&mut table, key)),
            Some(entry) if entry.phase == Phase::Mounted => {
                entry.last_used = now;
                Begin::There
            }
            Some(_) => Begin::Wait,
        }
    }

    /// Takes a key that is not in the table.
    fn claim(&self, table: &mut BTreeMap<RunKey, Entry>, key: RunKey) -> Turn<'_> {
        let entry = Entry {
            phase: Phase::Mounting,
            backend: None,
            devices: Vec::new(),
            last_used: Instant::now(),
        };
        table.insert(key, entry);
        Turn {
            mounts: self,
            key,
            fallback: None,
        }
    }

    /// Takes the key of a run that the back-end does not have. Its devices may be in use all the same,
    /// so a mount that fails leaves it to the reaper.
    fn begin_again(&self, key: RunKey) -> Option<Turn<'_>> {
        let mut table = self.table();
        let entry = table.get_mut(&key)?;
        if entry.phase != Phase::Mounted {
            return None;
        }
        entry.phase = Phase::Mounting;
        Some(Turn {
            mounts: self,
            key,
            fallback: Some(Phase::Mounted),
        })
    }

    /// Takes the key of a run that is neither mounted nor about to be, so that its tree may be
    /// deleted; `None` when it is in use. The key is free again when `work` has returned.
    pub fn while_absent<T>(&self, key: RunKey, work: impl FnOnce() -> T) -> Option<T> {
        let turn = {
            let mut table = self.table();
            // To look is not to use: what is there keeps its age.
            if table.contains_key(&key) {
                return None;
            }
            self.claim(&mut table, key)
        };
        let result = work();
        drop(turn);
        Some(result)
    }

    /// Unmounts what is not in `used`, which was looked up not before `looked_at`, and was not asked for
    /// since `grace` before that.
    ///
    /// **Errors** are logged; such a mount stays and is tried again at the next call.
    pub async fn reap(&self, used: &BTreeSet<RunKey>, looked_at: Instant, grace: Duration) {
        // What is asked for later is used by somebody who is not in `used`.
        let Some(before) = looked_at.checked_sub(grace) else {
            return;
        };
        for key in self.idle(used, before) {
            let Some(mut turn) = self.retire(key, before) else {
                continue;
            };
            match self
                .backend
                .unmount(&key.to_string(), UnmountMode::IfUnused)
                .await
            {
                Ok(UnmountOutcome::Done) => {
                    turn.fallback = None;
                    let path = self.mountpoint(key);
                    for path in [over_fuse::lower_mountpoint(&path), path] {
                        if let Err(error) = tokio::fs::remove_dir(&path).await {
                            tracing::debug!(path = %path.display(), "keep mount point: {error}");
                        }
                    }
                    tracing::info!(run = %key, "unmounted a run that nobody uses");
                }
                Ok(UnmountOutcome::Busy) => tracing::debug!(run = %key, "run is still busy"),
                Err(error) => tracing::warn!(run = %key, "unmount a run: {error}"),
            }
        }
    }

    fn idle(&self, used: &BTreeSet<RunKey>, before: Instant) -> Vec<RunKey> {
        let table = self.table();
        let idle = table.iter().filter(|(key, entry)| {
            entry.phase == Phase::Mounted && !used.contains(key) && entry.last_used <= before
        });
        idle.map(|(key, _)| *key).collect()
    }

    fn retire(&self, key: RunKey, before: Instant) -> Option<Turn<'_>> {
        let mut table = self.table();
        let entry = table.get_mut(&key)?;
        if entry.phase != Phase::Mounted || entry.last_used > before {
            return None;
        }
        entry.phase = Phase::Retiring;
        Some(Turn {
            mounts: self,
            key,
            fallback: Some(Phase::Mounted),
        })
    }
}

enum Begin<'a> {
    Mine(Turn<'a>),
    There,
    Wait,
}

#[cfg(test)]
mod tests;
