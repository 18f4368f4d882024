// SPDX-License-Identifier: Apache-2.0
//! Kernel mounts whose devices the shim serves: names, attributes and links by the kernel's own EROFS, bytes through
//! FUSE.
//!
//! ```text
//! <mountpoint>           erofs        the run's tree; device i is the file i - 1 below
//! <mountpoint>.devices   fuse.sluice  one file per layer device, served by the shim
//! ```
//! The lower mount is an ordinary one of the shim: its tree has a file for each device and nothing else. So take-over,
//! deadlines and the recording of first reads are those of any FUSE mount, and a read of what is missing can fail but
//! never give zeros, whoever dies. The kernel reads devices past FUSE's own pages, so nothing is in memory twice.
//!
//! The upper mount keeps the files below it open: it goes first. A crash between the two leaves a lower mount that
//! nobody uses; it is known by its key and taken away like any run's that nobody uses.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::erofs::{BLOCK_BYTES, DeviceSlot, write_tree};
use sluice_blockindex::tree::{FileRun, Inode, InodeKind, Tree};

use super::choice::blocking;
use super::erofs::{self, Devices, KernelMounts};
use super::{
    FirstReads, ImageMount, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome,
};
use crate::durable;

/// Ends key, mountpoint and tree of the lower mount.
const SUFFIX: &str = ".devices";

/// How long the shim may take to answer when the files below are opened. It takes microseconds, and seconds while it is
/// started again.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// The run that a mount of the shim is the lower one of.
pub fn run_of(key: &str) -> Option<&str> {
    key.strip_suffix(SUFFIX)
}

/// Makes and takes away such pairs of mounts.
#[derive(Debug)]
pub(super) struct OverFuse {
    fuse: Arc<dyn ImageMount>,
    kernel: Arc<KernelMounts>,
}

impl OverFuse {
    pub(super) fn new(fuse: Arc<dyn ImageMount>, kernel: Arc<KernelMounts>) -> Self {
        Self { fuse, kernel }
    }

    /// Mounts both. On failure neither is left.
    pub(super) async fn mount(&self, spec: &MountSpec) -> io::Result<()> {
        let lower = self.lower(spec);
        let (run, below) = (spec.clone(), lower.clone());
        blocking(move || prepare(&below, &erofs::device_bytes(&run)?)).await?;
        self.fuse.mount(&lower).await.map_err(io::Error::other)?;
        let (run, below, kernel) = (spec.clone(), lower.clone(), Arc::clone(&self.kernel));
        let mounting = blocking(move || kernel.mount(&run, &open(&below)?, Devices::OverFuse));
        let mounted = match tokio::time::timeout(OPEN_DEADLINE, mounting).await {
            Ok(mounted) => mounted,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the shim does not show its files within {OPEN_DEADLINE:?}"),
            )),
        };
        if mounted.is_err() {
            let undone = self.unmount(&spec.key, UnmountMode::Detach).await;
            tracing::debug!(key = spec.key, ?undone, "undo a mount of devices");
        }
        mounted
    }

    /// Whether the files below a run are served.
    pub(super) async fn is_served(&self, key: &str) -> Result<bool, MountError> {
        let state = self.fuse.check(&lower_key(key)).await?;
        Ok(state == MountState::Serving)
    }

    /// Takes the lower mount away; the upper one is gone, or only used by who has it.
    pub(super) async fn unmount(
        &self,
        key: &str,
        mode: UnmountMode,
    ) -> Result<UnmountOutcome, MountError> {
        let outcome = self.fuse.unmount(&lower_key(key), mode).await?;
        if outcome == UnmountOutcome::Done {
            let tree = self.kernel.notes().join(lower_key(key));
            let removed = tokio::fs::remove_file(&tree).await;
            tracing::trace!(key, ?removed, "remove the tree of a mount of devices");
        }
        Ok(outcome)
    }

    /// The first reads of a run's devices.
    pub(super) async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        let key = lower_key(key);
        self.fuse.first_reads(&key, from, forget).await
    }

    /// The lower mount of a run: the same devices at the same places, under a tree of its own, which need not outlive
    /// a reboot.
    fn lower(&self, spec: &MountSpec) -> MountSpec {
        MountSpec {
            key: lower_key(&spec.key),
            mountpoint: lower_mountpoint(&spec.mountpoint),
            tree: self.kernel.notes().join(lower_key(&spec.key)),
            ..spec.clone()
        }
    }
}

/// Where the lower mount of what is mounted here is, or would be.
pub fn lower_mountpoint(mountpoint: &Path) -> PathBuf {
    let mut lower = mountpoint.to_owned().into_os_string();
    lower.push(SUFFIX);
    lower.into()
}

fn lower_key(key: &str) -> String {
    format!("{key}{SUFFIX}")
}

/// Writes the tree of a lower mount whose devices have so many bytes, and makes its mountpoint.
fn prepare(lower: &MountSpec, device_bytes: &[u64]) -> io::Result<()> {
    let directory = lower.tree.parent().unwrap_or(Path::new("/"));
    let tree = device_tree(device_bytes).map_err(io::Error::other)?;
    durable::write(directory, &lower.key, &tree)?;
    match std::fs::create_dir(&lower.mountpoint) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The files of a lower mount. **Blocks** until the shim has answered.
fn open(lower: &MountSpec) -> io::Result<Vec<File>> {
    let numbers = 0..lower.devices.len();
    numbers
        .map(|number| File::open(lower.mountpoint.join(number.to_string())))
        .collect()
}

/// A directory with one file for each device, named by its place, from 0.
fn device_tree(device_bytes: &[u64]) -> Result<Vec<u8>, String> {
    let mut tree = Tree::new();
    let mut slots = Vec::with_capacity(device_bytes.len());
    for (number, &size_bytes) in device_bytes.iter().enumerate() {
        let device = u16::try_from(number + 1).map_err(|error| error.to_string())?;
        let start = FileRun {
            device,
            start_block: 0,
        };
        let extent = (size_bytes > 0).then_some(start);
        let file = Inode::new(InodeKind::Regular { size_bytes, extent });
        let (root, name) = (tree.root(), number.to_string());
        tree.insert_new(root, name.as_bytes(), file)
            .map_err(|error| error.to_string())?;
        slots.push(DeviceSlot {
            tag: [b'0'; 64],
            blocks: size_bytes.div_ceil(BLOCK_BYTES),
        });
    }
    write_tree(&tree, &slots).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use sluice_blockindex::erofs::TreeReader;

    use super::*;

    #[test]
    fn each_device_is_a_file_from_its_first_byte_to_its_last() {
        for devices in [vec![], vec![0], vec![1, 0, 512, 100_001], vec![7; 127]] {
            let bytes = device_tree(&devices).unwrap();
            let tree = TreeReader::open(&bytes).unwrap();
            assert_eq!(tree.devices().len(), devices.len());
            for (number, &size) in devices.iter().enumerate() {
                let name = number.to_string();
                let nid = tree.lookup(tree.root(), name.as_bytes()).unwrap().unwrap();
                let inode = tree.inode(nid).unwrap();
                assert_eq!(inode.size_bytes, size);
                let run = tree.run_of(&inode).unwrap();
                let expected = (size > 0).then_some((number + 1, 0));
                assert_eq!(
                    run.map(|it| (usize::from(it.device), it.start_block)),
                    expected
                );
            }
        }
    }

    #[test]
    fn the_key_of_a_lower_mount_names_its_run() {
        assert_eq!(run_of(&lower_key("abc")), Some("abc"));
        assert_eq!(run_of("abc"), None);
    }
}
