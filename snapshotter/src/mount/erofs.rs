// SPDX-License-Identifier: Apache-2.0
//! Mounts that the kernel's EROFS serves: of runs whose layers are all sealed, or are watched
//! ([`crate::shim`]) until they are, or stand on files that the shim serves ([`super::over_fuse`]).
//!
//! The daemon mounts; from then on no process of ours is on the path of reads of what is sealed, and
//! none is needed to keep the mount. The kernel has tree and devices open: deleting a file takes nothing from who reads it
//! through a mount. Their blocks are never punched, because a hole would read as zeros.
//!
//! A note of each mount stands in a file below the run directory, written before the mount is made and
//! removed after it is gone, so that a daemon that starts knows which devices are in use. The mount
//! table says which notes are true; one that is not is dropped.
//!
//! **Locks** the table is locked for map operations only. **Blocks** all calls do, on local disks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message as _;
use sluice_blockindex::erofs::BLOCK_BYTES;
use sluice_fetcher::store::{DeviceState, PresenceMap};
use sluice_proto::shim as wire;

use super::{Backend, DeviceSpec, MountSpec, UnmountMode};
use crate::durable;
use crate::sys::map::MappedTree;
use crate::sys::mountpoint::{self, MountLine, Unmounted};
use crate::sys::newmount::{self, Caching};

/// File system type as the mount table shows it.
pub const KIND: &str = "erofs";

const BLOCK: u64 = BLOCK_BYTES;

/// Ends the name of a note.
const NOTE_SUFFIX: &str = ".mount";

/// A mount that the kernel serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelMount {
    /// What is mounted where.
    pub spec: MountSpec,
    /// What its devices are.
    pub devices: Devices,
}

/// What the devices of a mount of the kernel are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// The files of the chunk store.
    Store,
    /// Files that the shim serves over FUSE.
    OverFuse,
}

impl KernelMount {
    /// What serves it.
    pub fn backend(&self) -> Backend {
        match self.devices {
            Devices::Store => Backend::Erofs,
            Devices::OverFuse => Backend::ErofsFuse,
        }
    }
}

/// The mounts of this node that the kernel serves.
#[derive(Debug)]
pub struct KernelMounts {
    notes: PathBuf,
    table: Mutex<BTreeMap<String, KernelMount>>,
}

impl KernelMounts {
    /// Opens the directory of notes, which is created if need be, and finds the mounts that are there.
    pub fn open(notes: &Path) -> io::Result<KernelMounts> {
        durable::create_private_directory(notes)?;
        durable::sweep_temporary(notes)?;
        let lines = mountpoint::mounts()?;
        let mut table = BTreeMap::new();
        for entry in std::fs::read_dir(notes)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if !name.is_some_and(|name| name.ends_with(NOTE_SUFFIX)) {
                continue;
            }
            match read_note(&path) {
                Ok(mount) if is_top(&mount.spec, &lines) => {
                    table.insert(mount.spec.key.clone(), mount);
                }
                Ok(_) => std::fs::remove_file(&path)?,
                Err(error) => {
                    tracing::warn!(path = %path.display(), "drop a note of a mount: {error}");
                    std::fs::remove_file(&path)?;
                }
            }
        }
        Ok(KernelMounts {
            notes: notes.to_owned(),
            table: Mutex::new(table),
        })
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, KernelMount>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where notes stand.
    pub fn notes(&self) -> &Path {
        &self.notes
    }

    /// What is or was mounted, by this daemon or one before it.
    pub fn all(&self) -> Vec<KernelMount> {
        self.table().values().cloned().collect()
    }

    /// The mount of this name, as far as this daemon knows: it does not look.
    pub fn known(&self, key: &str) -> Option<KernelMount> {
        self.table().get(key).cloned()
    }

    /// The mount of this name, if it is the topmost at its mountpoint.
    pub fn in_place(&self, key: &str) -> io::Result<Option<KernelMount>> {
        let Some(mount) = self.known(key) else {
            return Ok(None);
        };
        Ok(is_top(&mount.spec, &mountpoint::mounts()?).then_some(mount))
    }

    /// Mounts the run over its open devices, which are `kind`, unless just that is mounted there.
    ///
    /// **Errors** something else is mounted there; those of the kernel. Nothing is left then.
    pub fn mount(&self, spec: &MountSpec, devices: &[File], kind: Devices) -> io::Result<()> {
        let lines = mountpoint::mounts()?;
        let there = lines.iter().rev().find(|l| l.mountpoint == spec.mountpoint);
        let taken_over = is_top(spec, &lines);
        if let Some(line) = there
            && !taken_over
        {
            let what = format!("{} is mounted at {}", line.kind, line.mountpoint.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        let (over_fuse, caching) = match kind {
            Devices::Store => (false, Caching::Both),
            Devices::OverFuse => (true, Caching::Once),
        };
        let note = wire::Mount {
            over_fuse,
            ..spec.into()
        };
        let note = note.encode_to_vec();
        durable::write(&self.notes, &note_name(&spec.key), &note)?;
        if !taken_over
            && let Err(error) = newmount::erofs(&spec.tree, devices, &spec.mountpoint, caching)
        {
            self.forget(&spec.key);
            return Err(error);
        }
        let mount = KernelMount {
            spec: spec.clone(),
            devices: kind,
        };
        self.table().insert(spec.key.clone(), mount);
        Ok(())
    }

    /// Unmounts; what is not ours is [`Unmounted::Absent`]. Containers that stand on the mount keep the
    /// file system, and it keeps its files: nothing has to wait for them.
    pub fn unmount(&self, key: &str, mode: UnmountMode) -> io::Result<Unmounted> {
        let Some(KernelMount { spec, .. }) = self.in_place(key)? else {
            if self.table().remove(key).is_some() {
                self.forget(key);
            }
            return Ok(Unmounted::Absent);
        };
        let outcome = mountpoint::detach(&spec.mountpoint, mode == UnmountMode::Detach)?;
        if outcome != Unmounted::Busy {
            self.table().remove(key);
            self.forget(key);
        }
        Ok(outcome)
    }

    fn forget(&self, key: &str) {
        let path = self.notes.join(note_name(key));
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), "remove the note of a mount: {error}");
        }
    }
}

fn note_name(key: &str) -> String {
    format!("{key}{NOTE_SUFFIX}")
}

fn read_note(path: &Path) -> io::Result<KernelMount> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mount = wire::Mount::decode(&*std::fs::read(path)?).map_err(io::Error::other)?;
    let devices = match mount.over_fuse {
        false => Devices::Store,
        true => Devices::OverFuse,
    };
    let spec = MountSpec::try_from(mount).map_err(io::Error::other)?;
    let named = path.file_name().and_then(|name| name.to_str());
    if named != Some(&note_name(&spec.key)) {
        return Err(invalid("it has the name of another"));
    }
    Ok(KernelMount { spec, devices })
}

/// Whether the topmost mount at the mountpoint is the tree of this run.
fn is_top(spec: &MountSpec, lines: &[MountLine]) -> bool {
    let mut lines = lines.iter().rev();
    let top = lines.find(|line| line.mountpoint == spec.mountpoint);
    top.is_some_and(|line| line.kind == KIND && Path::new(&line.source) == spec.tree)
}

/// Whether all devices of a run are sealed.
pub fn all_sealed(spec: &MountSpec) -> io::Result<bool> {
    for device in &spec.devices {
        if presence(device)?.state() != DeviceState::Sealed {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Opens the devices of a run and holds them against its tree.
///
/// **Errors** a file cannot be opened or does not fit the tree.
pub fn open_devices(spec: &MountSpec) -> io::Result<Vec<File>> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let tree = MappedTree::open(&spec.tree)?;
    let slots = tree.reader().devices();
    if slots.len() != spec.devices.len() {
        let (wants, has) = (slots.len(), spec.devices.len());
        return Err(invalid(format!(
            "the tree has {wants} devices, the mount {has}"
        )));
    }
    let mut files = Vec::with_capacity(slots.len());
    for (slot, device) in slots.zip(&spec.devices) {
        let file = File::open(device.directory.join("data"))?;
        let bytes = file.metadata()?.len();
        // A file that ends early would be read as zeros by the kernel.
        if bytes != presence(device)?.device_bytes() || bytes.div_ceil(BLOCK) < slot.blocks {
            let device = device.directory.display();
            return Err(invalid(format!(
                "{device} has {bytes} bytes, too few for the tree"
            )));
        }
        files.push(file);
    }
    Ok(files)
}

/// How many bytes each device of a run has.
pub fn device_bytes(spec: &MountSpec) -> io::Result<Vec<u64>> {
    let devices = spec.devices.iter();
    devices
        .map(|device| Ok(presence(device)?.device_bytes()))
        .collect()
}

fn presence(device: &DeviceSpec) -> io::Result<PresenceMap> {
    PresenceMap::open(&device.directory.join("present")).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
