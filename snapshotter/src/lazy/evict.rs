// SPDX-License-Identifier: Apache-2.0
//! Keeping the chunk store within its budget, and making room on a full disk.
//!
//! Devices that a mount or a container stands on are pinned; of the others the least recently used go,
//! see [`Fetcher::make_room`]. Snapshots, indexes and trees of an evicted layer stay: it is fetched
//! anew when it is wanted.
//!
//! [`Fetcher::make_room`]: sluice_fetcher::scheduler::Fetcher::make_room

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use sluice_fetcher::scheduler::{Room, RoomReport};
use sluice_fetcher::store::{DeviceKey, Reclaim};
use tokio::time::Instant;

use super::{Inner, Lazy};
use crate::layers::device_key;
use crate::snapshots::SnapshotKind;

/// After an attempt that found nothing to evict, writes that find the disk full do not look again for
/// so long: each look lists the store.
const VAIN: Duration = Duration::from_secs(1);

/// Whether the last look found the budget broken by what is in use: said once, not at every look.
#[derive(Debug, Default)]
pub(super) struct BudgetWatch(AtomicBool);

impl Inner {
    /// The devices that are in use: below mounts, and below whatever container there is, also one that
    /// is not mounted or not known to be (the shim's mounts are learnt some time after the start).
    pub(super) fn in_use(&self) -> Result<BTreeSet<DeviceKey>, crate::store::StoreError> {
        let mut used = self.parts.mounts.devices();
        let chains = self.chains_below(|record| record.kind != SnapshotKind::Committed)?;
        let records = chains.iter().flatten();
        let layers = records.filter_map(|record| record.layer.as_ref());
        used.extend(layers.map(device_key));
        Ok(used)
    }

    /// The devices that must stay: in use, or of an image that somebody pinned.
    fn pinned(&self) -> Result<BTreeSet<DeviceKey>, crate::store::StoreError> {
        let mut pinned = self.in_use()?;
        pinned.extend(self.pinned_by()?.into_keys());
        Ok(pinned)
    }

    /// Notes the use of what is in use, and evicts what is over the budget. Errors are logged; the
    /// next pass tries again.
    pub(super) async fn keep_budget(self: &Arc<Self>) {
        self.blocking(Self::keep_budget_now).await;
    }

    fn keep_budget_now(&self) {
        let store = self.parts.layers.fetcher().store();
        let pinned = match self.pinned() {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::error!("failed to look up what is in use: {error}");
                return;
            }
        };
        // What is only pinned is not used by that: unpinned, it goes by its age.
        let used = self.in_use().unwrap_or_default();
        for key in &used {
            if let Err(error) = store.touch(key) {
                tracing::debug!(device = %key, "{error}");
            }
        }
        let budget = self.options.store_budget_bytes;
        let room = Room::Budget(budget.unwrap_or(u64::MAX));
        let Some(report) = self.make_room(room, &pinned) else {
            return;
        };
        let missing = self.options.reserve.missing_bytes();
        if missing > 0 {
            tracing::info!(
                missing,
                "less of the disk is free than [store] reserve says"
            );
            self.make_room(Room::Bytes(missing), &pinned);
        }
        let Some(budget) = budget else { return };
        let over = report.pinned_bytes > budget;
        if over != self.budget.0.swap(over, Ordering::Relaxed) {
            let pinned_bytes = report.pinned_bytes;
            if over {
                tracing::warn!(
                    pinned_bytes,
                    budget,
                    "layers that are in use or pinned take more than [store] budget"
                );
            } else {
                tracing::info!(
                    pinned_bytes,
                    budget,
                    "layers that are in use or pinned fit into [store] budget"
                );
            }
        }
    }

    fn make_room(&self, room: Room, pinned: &BTreeSet<DeviceKey>) -> Option<RoomReport> {
        // Who opens a layer to mount it has that long to get the mount, or a container, known.
        let idle = self.options.mount_grace + self.options.file_grace;
        let fetcher = self.parts.layers.fetcher();
        fetcher
            .make_room(room, pinned, idle)
            .inspect_err(|error| tracing::warn!("failed to look for room: {error}"))
            .ok()
    }
}

/// Makes room for a store whose disk is full. The store is opened before the lazy layers exist; until
/// they are attached and the shim has said what is mounted, there is no room to be had.
#[derive(Clone, Default)]
pub struct Reclaimer(Arc<State>);

#[derive(Default)]
struct State {
    inner: OnceLock<Weak<Inner>>,
    /// How often room was made: who waited for that need not look again.
    made: AtomicU64,
    /// One looks at a time; when it was last in vain.
    vain: Mutex<Option<Instant>>,
}

impl fmt::Debug for Reclaimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reclaimer").finish_non_exhaustive()
    }
}

impl Reclaimer {
    /// What the store calls, on a thread that may block.
    #[must_use]
    pub fn hook(&self) -> Reclaim {
        let state = Arc::clone(&self.0);
        Arc::new(move |bytes| state.reclaim(bytes))
    }

    /// From now on room is made among these layers.
    pub fn attach(&self, lazy: &Lazy) {
        // A second call changes nothing: there is one lazy side.
        let _ = self.0.inner.set(Arc::downgrade(&lazy.0));
    }
}

impl State {
    fn reclaim(&self, bytes: u64) -> bool {
        let Some(inner) = self.inner.get().and_then(Weak::upgrade) else {
            return false;
        };
        if !inner.parts.mounts.is_adopted() {
            return false;
        }
        let before = self.made.load(Ordering::Acquire);
        let mut vain = self.vain.lock().unwrap_or_else(PoisonError::into_inner);
        if self.made.load(Ordering::Acquire) != before {
            return true;
        }
        if vain.is_some_and(|at| at.elapsed() < VAIN) {
            return false;
        }
        let pinned = match inner.pinned() {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::error!("failed to look up what is in use: {error}");
                return false;
            }
        };
        let report = inner.make_room(Room::Bytes(bytes), &pinned);
        let freed = report.is_some_and(|report| report.freed_bytes > 0);
        *vain = (!freed).then(Instant::now);
        if freed {
            self.made.fetch_add(1, Ordering::Release);
        }
        freed
    }
}
