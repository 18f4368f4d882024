// SPDX-License-Identifier: Apache-2.0
//! What is in the chunk store, why it stays there, and taking it out on demand.
//!
//! Looking opens no layer: bitmaps are mapped from their files, so that what nobody uses is not used by
//! being looked at.

use std::collections::BTreeSet;
use std::time::SystemTime;

use sluice_blockindex::digest::DiffId;
use sluice_fetcher::store::{DeviceKey, DeviceState, PresenceMap, StoreError as ChunkStoreError};

use super::sweep::CLEANUP_GRACE;
use super::{Inner, Lazy};
use crate::store::StoreError;

/// A device in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedLayer {
    /// Its name.
    pub key: DeviceKey,
    /// Bytes that it takes on the disk.
    pub held_bytes: u64,
    /// Size of the device; 0 when its bitmap cannot be read.
    pub device_bytes: u64,
    /// Of these, present.
    pub present_bytes: u64,
    /// Whether it is complete and proven.
    pub sealed: bool,
    /// When it was last in use.
    pub last_used: SystemTime,
    /// Why it is not evicted; `None` if it may be.
    pub stays: Option<String>,
}

/// What is to be evicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvictTarget {
    /// All that nobody uses.
    Unused,
    /// Every device of this layer.
    Layer(DiffId),
    /// These devices.
    Devices(BTreeSet<DeviceKey>),
}

impl EvictTarget {
    fn means(&self, layer: &CachedLayer) -> bool {
        match self {
            EvictTarget::Unused => layer.stays.is_none(),
            EvictTarget::Layer(diff_id) => layer.key.diff_id == *diff_id,
            EvictTarget::Devices(keys) => keys.contains(&layer.key),
        }
    }
}

/// What became of a device that was to be evicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// Its name.
    pub key: DeviceKey,
    /// Bytes that it took.
    pub freed_bytes: u64,
    /// Why it was not evicted; `None` if it was.
    pub stays: Option<String>,
}

/// Why the store cannot be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The metadata store failed.
    #[error(transparent)]
    Metadata(#[from] StoreError),
    /// The chunk store failed.
    #[error(transparent)]
    Store(#[from] ChunkStoreError),
}

impl Inner {
    fn cached(&self) -> Result<Vec<CachedLayer>, CacheError> {
        let store = self.parts.layers.fetcher().store();
        let mounted = self.parts.mounts.devices();
        let used = self.in_use()?;
        let pinned = self.pinned_by()?;
        let mut layers = Vec::new();
        for held in store.held_devices(&BTreeSet::new())? {
            let key = held.key;
            let stays = if mounted.contains(&key) {
                Some("mounted".to_owned())
            } else if used.contains(&key) {
                Some("a container has it".to_owned())
            } else {
                let images = pinned.get(&key).map(|images| {
                    let images: Vec<&str> = images.iter().map(String::as_str).collect();
                    format!("pinned: {}", images.join(" "))
                });
                // Before the shim has said what is mounted, nothing is known to be free.
                let unknown = !self.parts.mounts.is_adopted();
                images.or_else(|| unknown.then(|| "mounts are not known yet".to_owned()))
            };
            let mut layer = CachedLayer {
                key,
                held_bytes: held.held_bytes,
                device_bytes: 0,
                present_bytes: 0,
                sealed: false,
                last_used: held.last_used,
                stays,
            };
            let presence = store
                .device_paths(&key)
                .and_then(|paths| PresenceMap::open(&paths.present).ok());
            if let Some(map) = presence {
                let present = (0..map.count()).filter(|chunk| map.is_present(*chunk));
                layer.device_bytes = map.device_bytes();
                layer.present_bytes = present
                    .filter_map(|chunk| map.extent(chunk))
                    .map(|extent| extent.len())
                    .sum();
                layer.sealed = map.state() == DeviceState::Sealed;
            }
            layers.push(layer);
        }
        layers.sort_by_key(|layer| (layer.last_used, layer.key));
        Ok(layers)
    }

    fn evict_now(&self, target: &EvictTarget) -> Result<Vec<Evicted>, CacheError> {
        let fetcher = self.parts.layers.fetcher();
        let mut done = Vec::new();
        for layer in self.cached()? {
            if !target.means(&layer) {
                continue;
            }
            let mut evicted = Evicted {
                key: layer.key,
                freed_bytes: 0,
                stays: layer.stays,
            };
            if evicted.stays.is_none() {
                // Who opens a layer to mount it has told of its container before, and is soon done.
                match fetcher.evict(&layer.key, CLEANUP_GRACE) {
                    Ok(true) => {
                        tracing::info!(device = %layer.key, bytes = layer.held_bytes, "evicted a layer on demand");
                        evicted.freed_bytes = layer.held_bytes;
                    }
                    Ok(false) => evicted.stays = Some("it is being used at this moment".to_owned()),
                    Err(error) => evicted.stays = Some(error.to_string()),
                }
            }
            done.push(evicted);
        }
        Ok(done)
    }
}

impl Lazy {
    /// What is in the store, the least recently used first.
    pub async fn cached(&self) -> Result<Vec<CachedLayer>, CacheError> {
        self.0.blocking(Inner::cached).await
    }

    /// Evicts what is meant and nobody uses. Snapshots, indexes and trees stay: such a layer is fetched
    /// anew when it is wanted.
    pub async fn evict(&self, target: EvictTarget) -> Result<Vec<Evicted>, CacheError> {
        self.0.blocking(move |inner| inner.evict_now(&target)).await
    }
}
