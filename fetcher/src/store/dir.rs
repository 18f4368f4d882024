// SPDX-License-Identifier: Apache-2.0
//! The store in a directory: `devices/<diff hex>/<index hex>/{data,present,meta}`.
//!
//! Only this file knows names. New files get their content under a temporary name, are synced and
//! renamed, and the directory is synced. `data` is sparse; `present` is written in full, because a
//! hole in a mapped file would turn a full disk into SIGBUS.
//!
//! A crash leaves: a directory without `meta` (removed, or never finished; swept when the store is
//! opened), or a temporary file (overwritten by the next writer).

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sluice_blockindex::digest::{DiffId, IndexDigest};

use super::DeviceKey;
use super::failpoints::{self, Point};
use super::media::{DeviceMedia, Media, Opened, SealedBytes};
use super::meta::META_BYTES;
use super::presence::{Presence, Words};
use crate::sys::SharedWords;

const DATA: &str = "data";
const PRESENT: &str = "present";
const META: &str = "meta";
const TEMPORARY: &str = ".new";
const LOCK: &str = ".lock";
/// `st_blocks` counts these, whatever the file system's block size.
const STAT_BLOCK_BYTES: u64 = 512;
/// Nobody but root reads what an image may keep secret.
const FILE_MODE: u32 = 0o600;

/// Where the files of a device are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePaths {
    /// The sparse file with the device's bytes.
    pub data: PathBuf,
    /// The presence bitmap, see [`super::PresenceMap`].
    pub present: PathBuf,
}

/// Where the files of `key` are in the store whose `devices` directory is `root`.
pub(crate) fn device_paths(root: &Path, key: &DeviceKey) -> DevicePaths {
    let dir = device_dir(root, key);
    DevicePaths {
        data: dir.join(DATA),
        present: dir.join(PRESENT),
    }
}

fn device_dir(root: &Path, key: &DeviceKey) -> PathBuf {
    root.join(key.diff_id.hex()).join(key.index.hex())
}

/// The directory.
#[derive(Debug)]
pub(crate) struct DirMedia {
    root: PathBuf,
    /// Held open for syncfs, and locked: one daemon per store.
    lock: File,
}

impl DirMedia {
    /// Opens or creates the store and takes its lock; sweeps what removals left.
    ///
    /// **Errors**: `WouldBlock` when another process holds the store.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(root.join(LOCK))?;
        lock.try_lock()?;
        let media = Self {
            root: root.to_owned(),
            lock,
        };
        media.sweep()?;
        Ok(media)
    }

    /// Every `<diff>/<index>` directory whose name is one that this store gives.
    fn directories(&self) -> io::Result<Vec<(DeviceKey, PathBuf)>> {
        let mut found = Vec::new();
        for diff in subdirectories(&self.root)? {
            let Some(diff_id) = name_of(&diff, DiffId::from_hex) else {
                continue;
            };
            for path in subdirectories(&diff)? {
                if let Some(index) = name_of(&path, IndexDigest::from_hex) {
                    found.push((DeviceKey { diff_id, index }, path));
                }
            }
        }
        found.sort_unstable_by_key(|(key, _)| *key);
        Ok(found)
    }

    fn sweep(&self) -> io::Result<()> {
        for (key, path) in self.directories()? {
            if !path.join(META).exists() {
                tracing::info!(device = %key, "sweep unfinished device");
                remove_files(&path)?;
            }
        }
        Ok(())
    }
}

fn subdirectories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn name_of<D, E>(path: &Path, parse: fn(&str) -> Result<D, E>) -> Option<D> {
    path.file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| parse(name).ok())
}

/// Removes the files and the directory, and the parent when that was the last index of a diff ID.
fn remove_files(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(parent) = dir.parent() {
        match fs::remove_dir(parent) {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound
                ) =>
            {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Temporary name, write, fsync, rename, fsync of the directory; without `durable` no fsync.
fn replace_file(dir: &Path, name: &str, bytes: &[u8], durable: bool) -> io::Result<()> {
    let temporary = dir.join(format!("{name}{TEMPORARY}"));
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(FILE_MODE)
        .open(&temporary)?;
    file.write_all(bytes)?;
    if durable {
        file.sync_all()?;
    }
    fs::rename(&temporary, dir.join(name))?;
    if durable { sync_dir(dir) } else { Ok(()) }
}

/// Removes what vouches for bytes of a device, durably, so that whatever interrupts the making of new
/// files leaves nothing that vouches for them. Of a new device there is nothing, and nothing is synced.
fn forget_records(dir: &Path) -> io::Result<()> {
    let mut removed = false;
    for name in [META, PRESENT] {
        match fs::remove_file(dir.join(name)) {
            Ok(()) => removed = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if removed { sync_dir(dir) } else { Ok(()) }
}

fn open_data(dir: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(FILE_MODE)
        .open(dir.join(DATA))
}

fn held(path: &Path) -> io::Result<u64> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.blocks().saturating_mul(STAT_BLOCK_BYTES)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn held_in(dir: &Path) -> io::Result<u64> {
    [DATA, PRESENT, META]
        .iter()
        .map(|name| held(&dir.join(name)))
        .sum()
}

/// The bitmap at `path`, if it is one for these chunks.
fn map_presence(path: &Path, ends: &[u64]) -> io::Result<Option<Presence>> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Ok(words) = SharedWords::map(&file, true) else {
        return Ok(None);
    };
    let presence = Presence::from_words(Words::Mapped(words));
    Ok(presence
        .ok()
        .filter(|presence| presence.fits(ends.iter().copied())))
}

impl Media for DirMedia {
    fn list(&self) -> io::Result<Vec<DeviceKey>> {
        Ok(self
            .directories()?
            .into_iter()
            .map(|(key, _)| key)
            .collect())
    }

    fn open_device(&self, key: &DeviceKey, ends: &[u64]) -> io::Result<Opened> {
        let dir = device_dir(&self.root, key);
        let device_bytes = ends.last().copied().unwrap_or(0);
        // Nothing of a new device is synced, because nothing of it is missed when a power cut takes it;
        // a pull should not wait for the disk.
        fs::create_dir_all(&dir)?;
        let path = dir.join(PRESENT);
        let mut data = open_data(&dir)?;
        let fits = data.metadata()?.len() == device_bytes;
        let usable = if fits {
            map_presence(&path, ends)?
        } else {
            None
        };
        let fresh = usable.is_none();
        let presence = match usable {
            Some(presence) => presence,
            None => {
                forget_records(&dir)?;
                if !fits {
                    // A new file: who has the old one open never sees it change.
                    fs::remove_file(dir.join(DATA))?;
                    data = open_data(&dir)?;
                    data.set_len(device_bytes)?;
                }
                let bytes = Presence::encode(ends.iter().copied())
                    .ok_or_else(|| io::Error::other("chunk ends do not rise"))?;
                replace_file(&dir, PRESENT, &bytes, false)?;
                map_presence(&path, ends)?
                    .ok_or_else(|| io::Error::other("presence file changed under us"))?
            }
        };
        Ok(Opened {
            media: Arc::new(DirDevice {
                dir,
                data,
                presence,
            }),
            fresh,
        })
    }

    fn peek_meta(&self, key: &DeviceKey) -> io::Result<Option<Vec<u8>>> {
        read_if_there(&device_dir(&self.root, key).join(META))
    }

    fn open_sealed(&self, key: &DeviceKey) -> io::Result<Arc<dyn SealedBytes>> {
        Ok(Arc::new(File::open(device_paths(&self.root, key).data)?))
    }

    fn remove_device(&self, key: &DeviceKey) -> io::Result<()> {
        let dir = device_dir(&self.root, key);
        match fs::remove_file(dir.join(META)) {
            Ok(()) => sync_dir(&dir)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        remove_files(&dir)
    }

    fn sync_all(&self) -> io::Result<()> {
        nix::unistd::syncfs(&self.lock).map_err(io::Error::from)
    }

    fn held_bytes(&self, key: &DeviceKey) -> io::Result<u64> {
        held_in(&device_dir(&self.root, key))
    }

    /// The time of the directory says it: it outlives the daemon and costs no file.
    fn touch(&self, key: &DeviceKey) -> io::Result<()> {
        match File::open(device_dir(&self.root, key)) {
            Ok(dir) => dir.set_modified(SystemTime::now()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn last_used(&self, key: &DeviceKey) -> io::Result<SystemTime> {
        match fs::metadata(device_dir(&self.root, key)) {
            Ok(metadata) => metadata.modified(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(SystemTime::UNIX_EPOCH),
            Err(error) => Err(error),
        }
    }
}

impl SealedBytes for File {
    fn read_sealed_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// One device in the directory.
#[derive(Debug)]
struct DirDevice {
    dir: PathBuf,
    data: File,
    presence: Presence,
}

impl DeviceMedia for DirDevice {
    fn presence(&self) -> &Presence {
        &self.presence
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        failpoints::pass(Point::Write)?;
        self.data.write_all_at(bytes, offset)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        failpoints::pass(Point::Read)?;
        self.data.read_exact_at(buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        failpoints::pass(Point::Sync)?;
        self.data.sync_data()?;
        self.presence.sync()
    }

    fn load_meta(&self) -> io::Result<Option<Vec<u8>>> {
        read_if_there(&self.dir.join(META))
    }

    fn replace_meta(&self, record: &[u8; META_BYTES], durable: bool) -> io::Result<()> {
        failpoints::pass(Point::Record)?;
        if !durable {
            return replace_file(&self.dir, META, record, false);
        }
        replace_file(&self.dir, META, record, true)?;
        // The directories above may be as new as the device.
        let above = self.dir.ancestors().skip(1).take(2);
        above.into_iter().try_for_each(sync_dir)
    }

    fn held_bytes(&self) -> io::Result<u64> {
        held_in(&self.dir)
    }
}
