// SPDX-License-Identifier: Apache-2.0
//! Taking devices away, so that the store keeps its budget or a full disk has room.
//!
//! What goes is a whole device that nobody uses: not pinned by the caller (mounts and containers stand
//! on it), and no handle of its layer is about, so no fill, transfer, prefetch or reader of ours. Its
//! layer is then as if nothing of it had been fetched yet; it is opened and fetched anew when it is
//! wanted. A use beats an eviction: it is noted under the lock under which an eviction decides. An
//! eviction waits for nobody.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::Fetcher;
use crate::store::{DeviceKey, StoreError, lock, next_victim, sums};

/// How much room is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// All devices together take at most so many bytes.
    Budget(u64),
    /// So many bytes more are free than now.
    Bytes(u64),
}

/// What [`Fetcher::make_room`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoomReport {
    /// Devices that went.
    pub evicted: usize,
    /// Bytes that they took.
    pub freed_bytes: u64,
    /// Bytes that the store takes now.
    pub held_bytes: u64,
    /// Of these, bytes of devices that the caller had pinned.
    pub pinned_bytes: u64,
}

impl Fetcher {
    /// Evicts devices, the least recently used first, until there is the room that is wanted. Spares
    /// those of `pinned`, and those that anybody wanted within `idle`. **Blocks**.
    ///
    /// **Errors** the store cannot be listed; a device that cannot be removed is logged and passed over.
    pub fn make_room(
        &self,
        room: Room,
        pinned: &BTreeSet<DeviceKey>,
        idle: Duration,
    ) -> Result<RoomReport, StoreError> {
        let mut devices = self.core.store.held_devices(pinned)?;
        let (held_bytes, pinned_bytes) = sums(&devices);
        let mut report = RoomReport {
            held_bytes,
            pinned_bytes,
            ..RoomReport::default()
        };
        loop {
            let missing = match room {
                Room::Budget(budget) => report.held_bytes.saturating_sub(budget),
                Room::Bytes(bytes) => bytes.saturating_sub(report.freed_bytes),
            };
            let Some(at) = next_victim(&devices, missing) else {
                break;
            };
            let device = devices.swap_remove(at);
            match self.evict(&device.key, idle) {
                Ok(true) => {
                    tracing::info!(
                        device = %device.key, bytes = device.held_bytes, "evicted a layer"
                    );
                    self.core.metrics.evicted(device.held_bytes);
                    report.evicted += 1;
                    report.freed_bytes += device.held_bytes;
                    report.held_bytes = report.held_bytes.saturating_sub(device.held_bytes);
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(device = %device.key, "failed to evict a layer: {error}");
                }
            }
        }
        self.core
            .metrics
            .store_holds(report.held_bytes, report.pinned_bytes);
        Ok(report)
    }

    /// Closes the layer and deletes its device, unless somebody uses it or wanted it within `idle`; says
    /// whether it did. The caller knows that no mount stands on it. **Blocks**.
    ///
    /// **Errors** the device cannot be deleted.
    pub fn evict(&self, key: &DeviceKey, idle: Duration) -> Result<bool, StoreError> {
        let Some(_turn) = self.turns.try_take(*key) else {
            return Ok(false);
        };
        {
            let mut layers = lock(&self.layers);
            if let Some(layer) = layers.get(key) {
                // The table's own is one; nobody gets another while it is locked. A device that is
                // held besides is being written to, by what is left of a transfer.
                let held = Arc::strong_count(layer) > 1 || Arc::strong_count(&layer.device) > 1;
                if held || layer.idle() < idle {
                    return Ok(false);
                }
                layer.cancel.cancel();
            }
            layers.remove(key);
        }
        let removed = self.core.store.remove_device_unless_busy(key);
        self.drop_twins_of(key);
        removed
    }
}
