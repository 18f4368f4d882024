// SPDX-License-Identifier: Apache-2.0
//! A model of a disk that loses power: what was not synced may be lost, sector by sector.
//!
//! Every operation that a disk sees (write, sync, replacing a record, flush of everything) counts.
//! The power is cut at a chosen one; from then on every operation fails. What is then found is, for
//! each 512-byte sector of data and each word of a bitmap, either the synced or the newest content,
//! by a seed; a record that was not replaced durably is the old or the new one. Nothing here is nicer than a real
//! disk, except that records and words are not torn, which the file system and the sector size grant.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Barrier, Mutex};
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::DeviceKey;
use super::media::{DeviceMedia, Media, Opened, SealedBytes};
use super::mem::{lock, place};
use super::meta::META_BYTES;
use super::presence::{Presence, Words};

const SECTOR_BYTES: usize = 512;

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct CrashDisk(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    devices: BTreeMap<DeviceKey, Content>,
    operations: u64,
    /// The operation at which the power is cut.
    cut_at: Option<u64>,
    /// Syncs of a device still to fail.
    refuse_syncs: u32,
    /// Writes still to be refused because the disk is full.
    refuse_writes: u32,
    /// The next opening of this device stands still, twice, until somebody else comes there.
    held: Option<(DeviceKey, Arc<Barrier>)>,
    /// Reads of this byte of a device fail.
    unreadable: Option<u64>,
    /// What the bitmaps held at that moment; stores to them afterwards went nowhere.
    frozen: Option<BTreeMap<DeviceKey, Vec<u64>>>,
}

#[derive(Debug)]
struct Content {
    presence: Arc<Presence>,
    durable_words: Vec<u64>,
    data: Vec<u8>,
    durable_data: Vec<u8>,
    meta: Option<Vec<u8>>,
    durable_meta: Option<Vec<u8>>,
}

impl Disk {
    fn freeze(&mut self) {
        if self.frozen.is_none() {
            let words = self
                .devices
                .iter()
                .map(|(key, content)| (*key, content.presence.snapshot()));
            self.frozen = Some(words.collect());
        }
    }

    /// Counts an operation; an error when it is the one at which the power goes, or later.
    fn operate(&mut self) -> io::Result<()> {
        let this = self.operations;
        self.operations += 1;
        if self.cut_at.is_some_and(|cut| this >= cut) {
            self.freeze();
            return Err(io::Error::other("power is off"));
        }
        Ok(())
    }

    fn is_off(&self) -> bool {
        self.frozen.is_some()
    }
}

impl Content {
    fn sync(&mut self) {
        self.durable_data.clone_from(&self.data);
        self.durable_words = self.presence.snapshot();
        self.durable_meta.clone_from(&self.meta);
    }

    fn with(presence: Presence, data: Vec<u8>, meta: Option<Vec<u8>>) -> Self {
        Self {
            durable_words: presence.snapshot(),
            presence: Arc::new(presence),
            durable_data: data.clone(),
            data,
            durable_meta: meta.clone(),
            meta,
        }
    }
}

fn words_of(words: &[u64]) -> Presence {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Presence::from_words(Words::owned(&bytes)).unwrap()
}

impl CrashDisk {
    /// Cuts the power at operation `at`, counted from 0 since the disk was made.
    pub(crate) fn cut_at(&self, at: u64) {
        lock(&self.0).cut_at = Some(at);
    }

    /// Lets the next `writes` writes of data find the disk full.
    pub(crate) fn fill_up(&self, writes: u32) {
        lock(&self.0).refuse_writes = writes;
    }

    /// Lets the next opening of `key` wait at the barrier when it begins, and once more to go on.
    pub(crate) fn hold_opening(&self, key: DeviceKey) -> Arc<Barrier> {
        let barrier = Arc::new(Barrier::new(2));
        lock(&self.0).held = Some((key, Arc::clone(&barrier)));
        barrier
    }

    /// Lets the next sync of a device fail.
    pub(crate) fn fail_sync(&self) {
        lock(&self.0).refuse_syncs = 1;
    }

    /// Lets reads of byte `at` of any device fail, or of none.
    pub(crate) fn unreadable(&self, at: Option<u64>) {
        lock(&self.0).unreadable = at;
    }

    /// Flips a bit of byte `at` of a device, as a disk that rots.
    pub(crate) fn rot(&self, key: &DeviceKey, at: usize) {
        let mut disk = lock(&self.0);
        disk.devices.get_mut(key).unwrap().data[at] ^= 1;
    }

    /// How many operations the disk has seen.
    pub(crate) fn operations(&self) -> u64 {
        lock(&self.0).operations
    }

    /// What a new process of the same kernel run finds: everything that was written.
    pub(crate) fn after_kill(&self) -> Self {
        let disk = lock(&self.0);
        let devices = disk.devices.iter().map(|(key, content)| {
            let presence = words_of(&content.presence.snapshot());
            (
                *key,
                Content::with(presence, content.data.clone(), content.meta.clone()),
            )
        });
        let devices = devices.collect();
        Self(Arc::new(Mutex::new(Disk {
            devices,
            ..Disk::default()
        })))
    }

    /// What the next kernel finds after the power was cut, now or at the chosen operation.
    pub(crate) fn after_power_cut(&self, seed: u64) -> Self {
        let mut disk = lock(&self.0);
        disk.freeze();
        let mut random = StdRng::seed_from_u64(seed);
        let frozen = disk.frozen.clone().unwrap_or_default();
        let devices = disk.devices.iter().map(|(key, content)| {
            let newest = &frozen[key];
            let mut words = content.durable_words.clone();
            for (word, newest) in words.iter_mut().zip(newest) {
                if random.random() {
                    *word = *newest;
                }
            }
            let mut data = content.durable_data.clone();
            let sectors = content.data.chunks(SECTOR_BYTES);
            for (sector, newest) in data.chunks_mut(SECTOR_BYTES).zip(sectors) {
                if random.random() {
                    sector.copy_from_slice(newest);
                }
            }
            let newest = random.random();
            let meta = if newest {
                content.meta.clone()
            } else {
                content.durable_meta.clone()
            };
            (*key, Content::with(words_of(&words), data, meta))
        });
        let devices = devices.collect();
        Self(Arc::new(Mutex::new(Disk {
            devices,
            ..Disk::default()
        })))
    }
}

impl Media for CrashDisk {
    fn list(&self) -> io::Result<Vec<DeviceKey>> {
        Ok(lock(&self.0).devices.keys().copied().collect())
    }

    fn open_device(&self, key: &DeviceKey, ends: &[u64]) -> io::Result<Opened> {
        let held = lock(&self.0).held.take_if(|(held, _)| held == key);
        if let Some((_, barrier)) = held {
            barrier.wait();
            barrier.wait();
        }
        let mut disk = lock(&self.0);
        disk.operate()?;
        let known = disk
            .devices
            .get(key)
            .map(|content| Arc::clone(&content.presence));
        let fresh = known.is_none();
        let presence = match known {
            Some(presence) => presence,
            None => {
                let bytes = Presence::encode(ends.iter().copied()).unwrap();
                let presence = Presence::from_words(Words::owned(&bytes)).unwrap();
                let length = usize::try_from(presence.device_bytes()).unwrap();
                let content = Content::with(presence, vec![0; length], None);
                let presence = Arc::clone(&content.presence);
                disk.devices.insert(*key, content);
                presence
            }
        };
        let media = Arc::new(CrashDevice {
            disk: self.clone(),
            key: *key,
            presence,
        });
        Ok(Opened { media, fresh })
    }

    fn peek_meta(&self, key: &DeviceKey) -> io::Result<Option<Vec<u8>>> {
        Ok(lock(&self.0)
            .devices
            .get(key)
            .and_then(|content| content.meta.clone()))
    }

    fn open_sealed(&self, _key: &DeviceKey) -> io::Result<Arc<dyn SealedBytes>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remove_device(&self, key: &DeviceKey) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.operate()?;
        disk.devices.remove(key);
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.operate()?;
        disk.devices.values_mut().for_each(Content::sync);
        Ok(())
    }

    fn held_bytes(&self, key: &DeviceKey) -> io::Result<u64> {
        let disk = lock(&self.0);
        Ok(disk
            .devices
            .get(key)
            .map_or(0, |content| content.presence.device_bytes()))
    }

    fn touch(&self, _key: &DeviceKey) -> io::Result<()> {
        Ok(())
    }

    fn last_used(&self, _key: &DeviceKey) -> io::Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH)
    }
}

/// One device on the disk.
#[derive(Debug)]
struct CrashDevice {
    disk: CrashDisk,
    key: DeviceKey,
    presence: Arc<Presence>,
}

impl CrashDevice {
    /// Does `work` as one operation; `torn` does what remains of it when the power goes right then.
    fn operate<T>(
        &self,
        work: impl FnOnce(&mut Content) -> io::Result<T>,
        torn: impl FnOnce(&mut Content),
    ) -> io::Result<T> {
        let mut disk = lock(&self.disk.0);
        let was_off = disk.is_off();
        let powered = disk.operate();
        let content = disk
            .devices
            .get_mut(&self.key)
            .ok_or(io::ErrorKind::NotFound)?;
        if let Err(error) = powered {
            if !was_off {
                torn(content);
            }
            return Err(error);
        }
        work(content)
    }
}

impl DeviceMedia for CrashDevice {
    fn presence(&self) -> &Presence {
        &self.presence
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        {
            let mut disk = lock(&self.disk.0);
            if disk.refuse_writes > 0 {
                disk.refuse_writes -= 1;
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        let put = |content: &mut Content| {
            let range = place(&content.data, offset, bytes.len())?;
            content.data[range].copy_from_slice(bytes);
            Ok(())
        };
        // Sectors of a torn write survive or not, like all that is not synced.
        self.operate(put, |content| put(content).unwrap_or_default())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let disk = lock(&self.disk.0);
        let content = disk.devices.get(&self.key).ok_or(io::ErrorKind::NotFound)?;
        let range = place(&content.data, offset, buffer.len())?;
        let bad = |at: u64| usize::try_from(at).is_ok_and(|at| range.contains(&at));
        if disk.unreadable.is_some_and(bad) {
            return Err(io::Error::other("bad sector"));
        }
        buffer.copy_from_slice(&content.data[range]);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        {
            let mut disk = lock(&self.disk.0);
            if disk.refuse_syncs > 0 {
                disk.refuse_syncs -= 1;
                return Err(io::Error::other("lost write"));
            }
        }
        let sync = |content: &mut Content| {
            content.sync();
            Ok(())
        };
        self.operate(sync, |_| ())
    }

    fn load_meta(&self) -> io::Result<Option<Vec<u8>>> {
        let disk = lock(&self.disk.0);
        Ok(disk
            .devices
            .get(&self.key)
            .and_then(|content| content.meta.clone()))
    }

    fn replace_meta(&self, record: &[u8; META_BYTES], durable: bool) -> io::Result<()> {
        let replace = |content: &mut Content| {
            content.meta = Some(record.to_vec());
            if durable {
                content.durable_meta.clone_from(&content.meta);
            }
            Ok(())
        };
        self.operate(replace, |content| content.meta = Some(record.to_vec()))
    }

    fn held_bytes(&self) -> io::Result<u64> {
        Ok(self.presence.device_bytes())
    }
}
