// SPDX-License-Identifier: Apache-2.0
//! The store in memory: for tools and tests that need no files. It loses everything when dropped.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::DeviceKey;
use super::media::{DeviceMedia, Media, Opened, SealedBytes};
use super::meta::META_BYTES;
use super::presence::{Presence, Words};

/// Locks, also after a panic elsewhere: what these locks protect is replaced as a whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The devices.
#[derive(Debug, Default)]
pub(crate) struct MemMedia {
    devices: Mutex<BTreeMap<DeviceKey, Arc<MemDevice>>>,
}

/// One device: a vector as long as the layer.
#[derive(Debug)]
struct MemDevice {
    presence: Presence,
    data: Mutex<Vec<u8>>,
    meta: Mutex<Option<Vec<u8>>>,
    used: Mutex<SystemTime>,
}

impl Media for MemMedia {
    fn list(&self) -> io::Result<Vec<DeviceKey>> {
        Ok(lock(&self.devices).keys().copied().collect())
    }

    fn open_device(&self, key: &DeviceKey, ends: &[u64]) -> io::Result<Opened> {
        let mut devices = lock(&self.devices);
        if let Some(device) = devices.get(key)
            && device.presence.fits(ends.iter().copied())
        {
            return Ok(Opened {
                media: Arc::clone(device) as Arc<dyn DeviceMedia>,
                fresh: false,
            });
        }
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let bytes = Presence::encode(ends.iter().copied()).ok_or_else(invalid)?;
        let presence = Presence::from_words(Words::owned(&bytes)).map_err(io::Error::other)?;
        let length = usize::try_from(presence.device_bytes()).map_err(|_| invalid())?;
        let device = Arc::new(MemDevice {
            presence,
            data: Mutex::new(vec![0; length]),
            meta: Mutex::new(None),
            used: Mutex::new(SystemTime::UNIX_EPOCH),
        });
        devices.insert(*key, Arc::clone(&device));
        Ok(Opened {
            media: device,
            fresh: true,
        })
    }

    fn peek_meta(&self, key: &DeviceKey) -> io::Result<Option<Vec<u8>>> {
        Ok(lock(&self.devices)
            .get(key)
            .and_then(|device| lock(&device.meta).clone()))
    }

    fn open_sealed(&self, key: &DeviceKey) -> io::Result<Arc<dyn SealedBytes>> {
        let device = lock(&self.devices).get(key).cloned();
        device
            .map(|device| device as Arc<dyn SealedBytes>)
            .ok_or(io::ErrorKind::NotFound.into())
    }

    fn remove_device(&self, key: &DeviceKey) -> io::Result<()> {
        lock(&self.devices).remove(key);
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }

    fn held_bytes(&self, key: &DeviceKey) -> io::Result<u64> {
        lock(&self.devices)
            .get(key)
            .map_or(Ok(0), |device| device.held_bytes())
    }

    fn touch(&self, key: &DeviceKey) -> io::Result<()> {
        if let Some(device) = lock(&self.devices).get(key) {
            *lock(&device.used) = SystemTime::now();
        }
        Ok(())
    }

    fn last_used(&self, key: &DeviceKey) -> io::Result<SystemTime> {
        let devices = lock(&self.devices);
        let used = devices.get(key).map(|device| *lock(&device.used));
        Ok(used.unwrap_or(SystemTime::UNIX_EPOCH))
    }
}

impl SealedBytes for MemDevice {
    fn read_sealed_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }
}

impl DeviceMedia for MemDevice {
    fn presence(&self) -> &Presence {
        &self.presence
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut data = lock(&self.data);
        let range = place(&data, offset, bytes.len())?;
        data[range].copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let data = lock(&self.data);
        let range = place(&data, offset, buffer.len())?;
        buffer.copy_from_slice(&data[range]);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn load_meta(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(lock(&self.meta).clone())
    }

    fn replace_meta(&self, record: &[u8; META_BYTES], _durable: bool) -> io::Result<()> {
        *lock(&self.meta) = Some(record.to_vec());
        Ok(())
    }

    fn held_bytes(&self) -> io::Result<u64> {
        Ok(u64::try_from(lock(&self.data).len()).unwrap_or(u64::MAX))
    }
}

/// Where `length` bytes at `offset` are in `data`.
pub(crate) fn place(data: &[u8], offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
    usize::try_from(offset)
        .ok()
        .and_then(|start| Some(start..start.checked_add(length)?))
        .filter(|range| range.end <= data.len())
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}
