// SPDX-License-Identifier: Apache-2.0
//! A layer device as the worker reads it: the sparse `data` file behind its presence map.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use sluice_blockindex::extent::{DeviceSpace, Extent};
use sluice_fetcher::store::{DeviceKey, DeviceState, PresenceMap};

use crate::mount::DeviceSpec;
use crate::mount::errno::FillErrno;

/// A layer device, open for reading. Several mounts share one.
#[derive(Debug)]
pub struct OpenDevice {
    key: DeviceKey,
    data: File,
    presence: PresenceMap,
    /// Inode of the presence file: another one under the same path is another device.
    inode: u64,
}

/// What came of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceRead {
    /// The buffer is filled.
    Done,
    /// Not all of it is present; the buffer holds nothing of use.
    Missing,
    /// It never will be.
    Failed(FillErrno),
}

impl OpenDevice {
    /// Opens the device of a directory of the chunk store.
    pub fn open(spec: &DeviceSpec) -> io::Result<OpenDevice> {
        let present = spec.directory.join("present");
        let presence = PresenceMap::open(&present).map_err(io::Error::other)?;
        Ok(OpenDevice {
            key: DeviceKey {
                diff_id: spec.diff_id,
                index: spec.index_digest,
            },
            data: File::open(spec.directory.join("data"))?,
            presence,
            inode: std::fs::metadata(present)?.ino(),
        })
    }

    /// Which device it is.
    pub fn key(&self) -> DeviceKey {
        self.key
    }

    /// Size in bytes.
    pub fn device_bytes(&self) -> u64 {
        self.presence.device_bytes()
    }

    /// How many chunks it has.
    pub fn chunk_count(&self) -> u32 {
        self.presence.count()
    }

    /// The chunks that `length` bytes from `start` on touch, ascending.
    pub fn chunks(&self, start: u64, length: usize) -> impl Iterator<Item = u32> + '_ {
        let end = start.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
        let first = self.presence.chunk_at(start);
        let touched = move |chunk: &u32| {
            let extent = self.presence.extent(*chunk);
            extent.is_some_and(|extent| extent.start() < end)
        };
        first
            .into_iter()
            .flat_map(|first| first..self.presence.count())
            .take_while(touched)
    }

    /// Whether `length` bytes from `start` on are present, or never will be. Reads nothing.
    pub fn look(&self, start: u64, length: usize) -> DeviceRead {
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        let extent = Extent::<DeviceSpace>::from_length(start, length)
            .filter(|extent| extent.end() <= self.device_bytes());
        match (extent, self.presence.state()) {
            (None, _) | (_, DeviceState::Failed) => DeviceRead::Failed(FillErrno::Io),
            (Some(_), DeviceState::Sealed) => DeviceRead::Done,
            (Some(extent), DeviceState::Open) => match self.presence.holds(extent) {
                true => DeviceRead::Done,
                false => DeviceRead::Missing,
            },
        }
    }

    /// Whether all of it is present, for good.
    pub fn is_sealed(&self) -> bool {
        self.presence.state() == DeviceState::Sealed
    }

    /// The `data` file.
    pub fn data(&self) -> &File {
        &self.data
    }

    /// Fills the buffer from device byte `start` on, if all of that is present. **Blocks** on the
    /// disk only.
    ///
    /// Presence is asked before the read and again after it: whoever takes chunks away clears the
    /// bits first, so what was read under bits that still stand was read while the bytes stood.
    pub fn read(&self, start: u64, buffer: &mut [u8]) -> DeviceRead {
        let length = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
        let extent = Extent::<DeviceSpace>::from_length(start, length)
            .filter(|extent| extent.end() <= self.device_bytes());
        let Some(extent) = extent else {
            tracing::error!(device = %self.key, start, length, "a file lies outside its device");
            return DeviceRead::Failed(FillErrno::Io);
        };
        if self.presence.state() == DeviceState::Failed {
            return DeviceRead::Failed(FillErrno::Io);
        }
        if !self.presence.holds(extent) {
            return DeviceRead::Missing;
        }
        if let Err(error) = self.data.read_exact_at(buffer, start) {
            tracing::error!(device = %self.key, start, length, %error, "read the chunk store");
            return DeviceRead::Failed(FillErrno::Io);
        }
        if self.presence.holds(extent) {
            DeviceRead::Done
        } else {
            DeviceRead::Missing
        }
    }
}

/// The open devices of this process, each once.
#[derive(Debug, Default)]
pub struct OpenDevices(Mutex<HashMap<PathBuf, Weak<OpenDevice>>>);

impl OpenDevices {
    /// The device of a directory, opened if it is not.
    pub fn get(&self, spec: &DeviceSpec) -> io::Result<Arc<OpenDevice>> {
        let inode = std::fs::metadata(spec.directory.join("present"))?.ino();
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, device| device.strong_count() > 0);
        if let Some(device) = open.get(&spec.directory).and_then(Weak::upgrade)
            && device.inode == inode
        {
            return Ok(device);
        }
        let device = Arc::new(OpenDevice::open(spec)?);
        open.insert(spec.directory.clone(), Arc::downgrade(&device));
        Ok(device)
    }
}
