// SPDX-License-Identifier: Apache-2.0
//! The seam below the store: what it asks of the place where the bytes lie.
//!
//! [`DeviceMedia`] is one layer device there, [`Media`] all of them. The directory is the real one,
//! memory serves tests and tools, and the crash model loses what was not synced. All policy (what is
//! trusted when, what is written in which order) stands above, in `device.rs`, once.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use super::DeviceKey;
use super::meta::META_BYTES;
use super::presence::Presence;

/// One layer device.
///
/// All methods block; none may be called on a runtime thread except [`Self::presence`].
pub(crate) trait DeviceMedia: Send + Sync + Debug {
    /// The bitmap. Changes are visible to every process at once and durable after [`Self::sync`].
    fn presence(&self) -> &Presence;

    /// Writes all of `bytes` at `offset` of the device. Visible at once, durable after `sync`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads exactly `buffer.len()` bytes at `offset`. Never written bytes are zeros.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Makes all written bytes, then the bitmap, durable.
    fn sync(&self) -> io::Result<()>;

    /// The record as last replaced; `None` when there is none.
    fn load_meta(&self) -> io::Result<Option<Vec<u8>>>;

    /// Replaces the record: whoever opens the device afterwards finds the old or the new one, whole.
    /// Without `durable` a power cut may bring the old one back, or lose the only one.
    fn replace_meta(&self, record: &[u8; META_BYTES], durable: bool) -> io::Result<()>;

    /// Bytes that the device really takes.
    fn held_bytes(&self) -> io::Result<u64>;
}

/// The bytes of a device that is sealed, to copy from.
pub(crate) trait SealedBytes: Send + Sync + Debug {
    /// Reads exactly `buffer.len()` bytes at `offset`. Blocks.
    fn read_sealed_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// What [`Media::open_device`] found.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The device.
    pub(crate) media: Arc<dyn DeviceMedia>,
    /// Its files were made just now, or did not fit and were made anew: nothing in it counts.
    pub(crate) fresh: bool,
}

/// All layer devices.
pub(crate) trait Media: Send + Sync + Debug {
    /// The devices that are there.
    fn list(&self) -> io::Result<Vec<DeviceKey>>;

    /// Opens a device whose chunks end at `ends`, creating it when it is not there. Files that do not
    /// fit this geometry are replaced by new ones.
    fn open_device(&self, key: &DeviceKey, ends: &[u64]) -> io::Result<Opened>;

    /// The record of a device without opening it.
    fn peek_meta(&self, key: &DeviceKey) -> io::Result<Option<Vec<u8>>>;

    /// Opens the bytes of a device that the caller knows to be sealed.
    fn open_sealed(&self, key: &DeviceKey) -> io::Result<Arc<dyn SealedBytes>>;

    /// Deletes a device, its record first. Fine when there is none.
    fn remove_device(&self, key: &DeviceKey) -> io::Result<()>;

    /// Makes everything written to all devices durable.
    fn sync_all(&self) -> io::Result<()>;

    /// Bytes that a device really takes; 0 when there is none.
    fn held_bytes(&self, key: &DeviceKey) -> io::Result<u64>;

    /// Notes that a device is in use now. Fine when there is none.
    fn touch(&self, key: &DeviceKey) -> io::Result<()>;

    /// When that was last noted, by the wall clock; long ago when nothing is known.
    fn last_used(&self, key: &DeviceKey) -> io::Result<SystemTime>;
}
