// SPDX-License-Identifier: Apache-2.0
//! The chunk store: the node's local cache of layer devices.
//!
//! A layer device is a sparse file with the uncompressed tar's bytes at the tar's offsets, a bitmap
//! with one bit per chunk, and a record of what is durably known. Devices are kept per layer index: an
//! image may claim another's diff ID with its own bytes, and only a device that was *sealed* (all of
//! it hashed to the diff ID) is a source for another index of the same layer.
//!
//! The daemon is the only writer; the shim maps the bitmap and reads the data file itself, see
//! [`PresenceMap`]. `docs/formats/store.md` has the files byte by byte, what a crash leaves, and what
//! is assumed of the file system.
//!
//! # When the disk is full
//! A write that finds no room asks [`StoreOptions::reclaim`] to free some and is tried once more; then it fails with
//! [`StoreError::Full`]. The scheduler passes such a chunk to its readers past the store, who take bytes; who needs
//! it in the store sees ENOSPC. Chunks that are present stay readable.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use sluice_blockindex::chunkmap::ChunkMap;
use sluice_blockindex::digest::{DiffId, IndexDigest};

mod budget;
#[cfg(test)]
pub(crate) mod crash;
mod device;
mod dir;
mod error;
mod failpoints;
mod media;
mod mem;
mod meta;
mod presence;
mod twin;
mod witness;

pub use budget::HeldDevice;
pub(crate) use budget::{next_victim, sums};
pub use device::{Audit, Committed, Device, OnRot, Rechecked, SealStep};
pub use dir::DevicePaths;
pub use error::StoreError;
pub use meta::{BootId, FailureRecord, SealProof, SealRecord};
pub use presence::{DeviceState, PresenceError, PresenceMap};
pub(crate) use twin::Twin;
pub use witness::{Objection, SealWitness, Witnesses};

use media::Media;
pub(crate) use mem::lock;
use meta::Meta;

/// Names a device in the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceKey {
    /// What the image says the uncompressed layer digests to.
    pub diff_id: DiffId,
    /// The index by which its chunks are verified.
    pub index: IndexDigest,
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.diff_id, self.index)
    }
}

/// Asked to free at least so many bytes of the disk; true when it freed any.
pub type Reclaim = Arc<dyn Fn(u64) -> bool + Send + Sync>;

/// How a store behaves.
#[derive(Clone, Default)]
pub struct StoreOptions {
    /// The kernel run to trust bits of; `None`: the running one.
    pub boot: Option<BootId>,
    /// Frees room when the disk is full. It must not call back into a device of this store that is
    /// being written.
    pub reclaim: Option<Reclaim>,
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { boot, reclaim } = self;
        f.debug_struct("StoreOptions")
            .field("boot", boot)
            .field("reclaim", &reclaim.is_some())
            .finish()
    }
}

/// What devices of one store share.
pub(crate) struct Shared {
    boot: BootId,
    reclaim: Option<Reclaim>,
    /// Sealed devices by what they are.
    sealed: Mutex<BTreeMap<DiffId, BTreeSet<IndexDigest>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("boot", &self.boot)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn reclaim(&self, bytes: u64) -> bool {
        self.reclaim.as_ref().is_some_and(|reclaim| reclaim(bytes))
    }

    fn add_sealed(&self, key: DeviceKey) {
        lock(&self.sealed)
            .entry(key.diff_id)
            .or_default()
            .insert(key.index);
    }

    fn drop_sealed(&self, key: &DeviceKey) {
        let mut sealed = lock(&self.sealed);
        if let Some(indexes) = sealed.get_mut(&key.diff_id) {
            indexes.remove(&key.index);
            if indexes.is_empty() {
                sealed.remove(&key.diff_id);
            }
        }
    }
}

/// The chunk store.
#[derive(Debug)]
pub struct Store {
    media: Box<dyn Media>,
    /// The `devices` directory; none for a store in memory.
    root: Option<PathBuf>,
    shared: Arc<Shared>,
    open: Mutex<OpenDevices>,
    turned: Condvar,
}

/// **Locks** held for map operations only: no disk is waited for under it.
#[derive(Debug, Default)]
struct OpenDevices {
    devices: BTreeMap<DeviceKey, Weak<Device>>,
    /// Layers of which a device is being opened or removed, each by one thread; who wants one of the
    /// same layer waits, because its indexes share a directory.
    busy: BTreeSet<DiffId>,
    /// Nothing is opened any more.
    stopped: bool,
}

impl OpenDevices {
    fn get(&self, key: &DeviceKey) -> Option<Arc<Device>> {
        self.devices.get(key).and_then(Weak::upgrade)
    }
}

/// The right to open or remove devices of one layer. Dropped, it lets the next one in.
struct Turn<'a> {
    store: &'a Store,
    diff_id: DiffId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.store.open).busy.remove(&self.diff_id);
        self.store.turned.notify_all();
    }
}

impl Store {
    /// Opens or creates the store in the directory `devices`, for this process alone. **Blocks**.
    ///
    /// **Errors**: [`StoreError::Locked`] when another process has it.
    pub fn open(devices: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let media = dir::DirMedia::open(devices).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => StoreError::Locked {
                path: devices.to_owned(),
            },
            _ => StoreError::io("open store")(error),
        })?;
        Self::on(Box::new(media), Some(devices.to_owned()), options)
    }

    /// A store in memory, which forgets everything when dropped.
    pub fn in_memory(options: StoreOptions) -> Result<Self, StoreError> {
        Self::on(Box::<mem::MemMedia>::default(), None, options)
    }

    pub(crate) fn on(
        media: Box<dyn Media>,
        root: Option<PathBuf>,
        options: StoreOptions,
    ) -> Result<Self, StoreError> {
        let boot = match options.boot {
            Some(boot) => boot,
            None => BootId::current().map_err(StoreError::io("read boot ID"))?,
        };
        let shared = Shared {
            boot,
            reclaim: options.reclaim,
            sealed: Mutex::default(),
        };
        for key in media.list().map_err(StoreError::io("list store"))? {
            let meta = media
                .peek_meta(&key)
                .map_err(StoreError::io("read record of device"))?;
            if meta
                .as_deref()
                .and_then(Meta::decode)
                .and_then(|meta| meta.sealed)
                .is_some_and(|seal| seal.proof == SealProof::DiffId)
            {
                shared.add_sealed(key);
            }
        }
        Ok(Self {
            media,
            root,
            shared: Arc::new(shared),
            open: Mutex::default(),
            turned: Condvar::new(),
        })
    }

    /// The device of a layer, created empty when it is not there. **Blocks**.
    ///
    /// All holders share one [`Device`]. Under another boot ID without a clean stop its chunks are
    /// suspect: not present until [`Device::recheck`] trusts them.
    ///
    /// **Errors** those of the disk; [`StoreError::OtherChunkMap`]; [`StoreError::Stopped`].
    /// **Locks** waits for another opening or removal of the same layer, and of no other.
    pub fn device(&self, key: DeviceKey, chunks: &ChunkMap) -> Result<Arc<Device>, StoreError> {
        let _turn = self.turn(key.diff_id);
        if let Some(device) = lock(&self.open).get(&key) {
            let same = device.chunks().count() == chunks.count()
                && device.device_bytes() == chunks.device_bytes();
            return if same {
                Ok(device)
            } else {
                Err(StoreError::OtherChunkMap)
            };
        }
        let ends: Vec<u64> = chunks
            .chunks()
            .flatten()
            .map(|chunk| chunk.device.end())
            .collect();
        if ends.len() != chunks.chunks().len() {
            return Err(StoreError::NoSuchChunk {
                chunk: chunks.count(),
            });
        }
        let opened = self
            .media
            .open_device(&key, &ends)
            .map_err(StoreError::io("open device"))?;
        let shared = Arc::clone(&self.shared);
        let device = Device::open(key, chunks.clone(), opened.media, opened.fresh, shared)?;
        if !device.is_sealed() {
            self.shared.drop_sealed(&key);
        }
        // Only the order of evictions depends on it.
        if let Err(error) = self.touch(&key) {
            tracing::debug!(device = %key, "{error}");
        }
        let device = Arc::new(device);
        let mut open = lock(&self.open);
        if open.stopped {
            return Err(StoreError::Stopped);
        }
        open.devices.retain(|_, device| device.strong_count() > 0);
        open.devices.insert(key, Arc::downgrade(&device));
        Ok(device)
    }

    /// Waits until nobody else opens or removes a device of this layer. Two Devices of one key would
    /// count bytes twice, and a removal must not meet an opening.
    fn turn(&self, diff_id: DiffId) -> Turn<'_> {
        let mut open = lock(&self.open);
        while !open.busy.insert(diff_id) {
            open = self
                .turned
                .wait(open)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Turn {
            store: self,
            diff_id,
        }
    }

    /// Where the files of a device are, whether it exists or not; `None` for a store in memory.
    pub fn device_paths(&self, key: &DeviceKey) -> Option<DevicePaths> {
        self.root
            .as_deref()
            .map(|root| dir::device_paths(root, key))
    }

    /// The devices that are in the store, open or not. **Blocks**.
    pub fn keys(&self) -> Result<Vec<DeviceKey>, StoreError> {
        self.media.list().map_err(StoreError::io("list store"))
    }

    /// Other indexes under which the same layer is sealed here: sources of its bytes.
    pub fn sealed_twins(&self, key: &DeviceKey) -> Vec<DeviceKey> {
        let sealed = lock(&self.shared.sealed);
        let indexes = sealed.get(&key.diff_id).into_iter().flatten();
        indexes
            .filter(|index| **index != key.index)
            .map(|index| DeviceKey {
                diff_id: key.diff_id,
                index: *index,
            })
            .collect()
    }

    /// Another device that is sealed as the same layer, to copy chunks from. **Blocks** (shortly).
    pub(crate) fn open_twin(&self, key: &DeviceKey) -> Option<Twin> {
        self.sealed_twins(key).into_iter().find_map(|twin| {
            let opened = self.media.open_sealed(&twin);
            opened.map(|bytes| Twin::new(twin, bytes)).ok()
        })
    }

    /// Deletes a device, its record first. **Blocks**. Fine when there is none.
    ///
    /// Who still holds it can neither commit nor seal. The caller has unmounted everything that reads
    /// its files.
    pub fn remove_device(&self, key: &DeviceKey) -> Result<(), StoreError> {
        self.remove_in(&self.turn(key.diff_id), key)
    }

    /// As [`Self::remove_device`], unless a device of the same layer is being opened or removed; says
    /// whether it did. Waits for nobody: a writer that finds the disk full comes here, and others may
    /// wait for that writer.
    pub(crate) fn remove_device_unless_busy(&self, key: &DeviceKey) -> Result<bool, StoreError> {
        let free = lock(&self.open).busy.insert(key.diff_id);
        if !free {
            return Ok(false);
        }
        let turn = Turn {
            store: self,
            diff_id: key.diff_id,
        };
        self.remove_in(&turn, key).map(|()| true)
    }

    fn remove_in(&self, _turn: &Turn<'_>, key: &DeviceKey) -> Result<(), StoreError> {
        let open = lock(&self.open).devices.remove(key);
        if let Some(device) = open.and_then(|device| device.upgrade()) {
            device.mark_removed();
        }
        self.shared.drop_sealed(key);
        self.media
            .remove_device(key)
            .map_err(StoreError::io("remove device"))
    }

    /// Bytes that the device really takes on the disk; 0 when there is none. Waits for nothing but
    /// `stat`.
    pub fn held_bytes(&self, key: &DeviceKey) -> Result<u64, StoreError> {
        self.media
            .held_bytes(key)
            .map_err(StoreError::io("stat device"))
    }

    /// Bytes that all devices really take on the disk. **Blocks**.
    pub fn total_held_bytes(&self) -> Result<u64, StoreError> {
        self.keys()?.iter().map(|key| self.held_bytes(key)).sum()
    }

    /// What every device takes, and when it was last used; pinned are those of `pinned`. **Blocks**.
    pub fn held_devices(
        &self,
        pinned: &BTreeSet<DeviceKey>,
    ) -> Result<Vec<HeldDevice>, StoreError> {
        let held = |key: DeviceKey| {
            Ok(HeldDevice {
                key,
                held_bytes: self.media.held_bytes(&key)?,
                last_used: self.media.last_used(&key)?,
                pinned: pinned.contains(&key),
            })
        };
        let devices: io::Result<_> = self.keys()?.into_iter().map(held).collect();
        devices.map_err(StoreError::io("stat device"))
    }

    /// Notes that the device is in use now. **Blocks** (shortly). Fine when there is none.
    pub fn touch(&self, key: &DeviceKey) -> Result<(), StoreError> {
        let touched = self.media.touch(key);
        touched.map_err(StoreError::io("note use of device"))
    }

    /// Stops all writing, flushes, and records for every open device that its bits can be trusted
    /// after a reboot. **Blocks**, for as long as the disk needs to take what was written.
    ///
    /// **Errors**: nothing is lost by one; the chunks are checked at the next start.
    pub fn stop(&self) -> Result<(), StoreError> {
        let devices: Vec<Arc<Device>> = {
            let mut open = lock(&self.open);
            open.stopped = true;
            open.devices.values().filter_map(Weak::upgrade).collect()
        };
        for device in &devices {
            device.stop();
        }
        self.media
            .sync_all()
            .map_err(StoreError::io("flush store"))?;
        devices.iter().try_for_each(|device| device.mark_clean())
    }
}

#[cfg(test)]
mod tests;
