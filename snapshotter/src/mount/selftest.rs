// SPDX-License-Identifier: Apache-2.0
//! Whether this kernel and this file system can serve mounts by EROFS: tried on a scratch mount at the
//! daemon's start, because version numbers tell little (distributions build the file system without
//! its file-backed mounts, hardened ones forbid them, and a root on overlayfs leaves no room for
//! another overlay above).
//!
//! The scratch directory lies in the chunk store, so that the very file system of the devices is tried.
//! **Blocks** for some milliseconds; a kernel that hangs is the caller's to bound. A crash leaves the
//! directory, and perhaps its mounts: the next test begins by taking both away.

mod asks;
mod over_fuse;

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::mount::MsFlags;
use sluice_blockindex::erofs::{BLOCK_BYTES, DeviceSlot, write_tree};
use sluice_blockindex::tree::{FileRun, Inode, InodeKind, Tree};

use crate::sys::{mountpoint, newmount};

/// Name of the scratch directory; no device has one that begins with a dot.
pub const SCRATCH_NAME: &str = ".selftest";

/// Blocks of each scratch device: more than one request of the kernel reads.
const DEVICE_BLOCKS: u64 = 1024;
/// Where in each device the file's content begins.
const START_BLOCK: u64 = 3;
/// Length of each file: not whole pages, nor whole blocks.
const FILE_BYTES: u64 = 300_001;

/// Makes a scratch mount below `devices` and reads from it, directly and through an overlay.
///
/// **Errors** what does not work, for people.
pub fn kernel_serves_sealed(devices: &Path) -> Result<(), String> {
    in_scratch(devices, try_in)
}

/// Makes a scratch mount over devices that are filled while they are read.
///
/// **Errors** what does not work, for people.
pub fn kernel_asks_first(devices: &Path) -> Result<(), String> {
    in_scratch(devices, asks::try_in)
}

/// Makes a scratch mount whose devices stand on a scratch mount of FUSE, served by this process.
///
/// **Errors** what does not work, for people.
pub fn kernel_reads_over_fuse(devices: &Path) -> Result<(), String> {
    in_scratch(devices, over_fuse::try_in)
}

fn in_scratch(
    devices: &Path,
    test: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), String> {
    let scratch = devices.join(SCRATCH_NAME);
    let cleared = clear(&scratch).and_then(|()| fs::create_dir_all(&scratch));
    cleared.map_err(|error| format!("make scratch directory: {error}"))?;
    let result = test(&scratch);
    if let Err(error) = clear(&scratch) {
        tracing::warn!(path = %scratch.display(), "remove the self-test's files: {error}");
    }
    result
}

/// Takes away what a test made, or an earlier one left.
fn clear(scratch: &Path) -> io::Result<()> {
    let lines = mountpoint::mounts()?;
    for line in lines
        .iter()
        .rev()
        .filter(|l| l.mountpoint.starts_with(scratch))
    {
        mountpoint::detach(&line.mountpoint, true)?;
    }
    match fs::remove_dir_all(scratch) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> String {
    move |error| format!("{what}: {error}")
}

/// The part of a device that its file shows.
fn shown(device: &[u8]) -> &[u8] {
    let start = usize::try_from(START_BLOCK * BLOCK_BYTES).unwrap_or(0);
    &device[start..][..usize::try_from(FILE_BYTES).unwrap_or(0)]
}

fn try_in(scratch: &Path) -> Result<(), String> {
    let at = |name: &str| scratch.join(name);
    for name in ["tree", "empty", "overlay"] {
        fs::create_dir(at(name)).map_err(failed("make scratch directory"))?;
    }
    let contents = [1, 2].map(content);
    let mut files = Vec::new();
    for (number, bytes) in contents.iter().enumerate() {
        let path = at(&format!("device{number}"));
        fs::write(&path, bytes).map_err(failed("write scratch device"))?;
        files.push(File::open(&path).map_err(failed("open scratch device"))?);
    }
    let tree = at("tree.erofs");
    let image = sample_tree().ok_or("build scratch tree")?;
    fs::write(&tree, image).map_err(failed("write scratch tree"))?;
    newmount::erofs(&tree, &files, &at("tree"), newmount::Caching::Both)
        .map_err(|error| error.to_string())?;
    compare(&at("tree"), &contents)?;
    // As a container has it: an image below another directory.
    let options = format!(
        "lowerdir={}:{}",
        at("empty").display(),
        at("tree").display()
    );
    mountpoint::attach(
        "overlay",
        &at("overlay"),
        "overlay",
        MsFlags::MS_RDONLY,
        &options,
    )
    .map_err(failed("mount an overlay on EROFS"))?;
    compare(&at("overlay"), &contents)
}

fn compare(mounted: &Path, contents: &[Vec<u8>; 2]) -> Result<(), String> {
    for (number, content) in contents.iter().enumerate() {
        let path = mounted.join(format!("directory/file{number}"));
        let read = fs::read(&path).map_err(|error| format!("read from EROFS: {error}"))?;
        if read != shown(content) {
            return Err("EROFS shows other bytes than are in the device".into());
        }
        let listed = fs::read_dir(mounted.join("directory")).map(Iterator::count);
        if listed.map_err(|error| format!("list a directory of EROFS: {error}"))? != contents.len()
        {
            return Err("EROFS shows other names than are in the tree".into());
        }
    }
    Ok(())
}

/// Bytes that differ from place to place, and are never zero.
fn content(seed: u64) -> Vec<u8> {
    let words = DEVICE_BLOCKS * BLOCK_BYTES / 8;
    let word = |at: u64| {
        (at.wrapping_mul(2) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ seed << 7)
            | 0x0101_0101_0101_0101
    };
    (0..words).flat_map(|at| word(at).to_le_bytes()).collect()
}

fn sample_tree() -> Option<Vec<u8>> {
    let mut tree = Tree::new();
    let directory = Inode::new(InodeKind::Directory);
    let directory = tree.insert_new(tree.root(), b"directory", directory).ok()?;
    let mut slots = Vec::new();
    for device in 1..=2u16 {
        let extent = Some(FileRun {
            device,
            start_block: START_BLOCK,
        });
        let size_bytes = FILE_BYTES;
        let file = Inode::new(InodeKind::Regular { size_bytes, extent });
        let name = format!("file{}", device - 1);
        tree.insert_new(directory, name.as_bytes(), file).ok()?;
        slots.push(DeviceSlot {
            tag: [b'0'; 64],
            blocks: DEVICE_BLOCKS,
        });
    }
    write_tree(&tree, &slots).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_leaves_nothing_behind_and_may_be_repeated() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            println!("{:?}", kernel_serves_sealed(dir.path()));
            println!("{:?}", kernel_asks_first(dir.path()));
            println!("{:?}", kernel_reads_over_fuse(dir.path()));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            let below = |l: &mountpoint::MountLine| l.mountpoint.starts_with(dir.path());
            assert!(!mountpoint::mounts().unwrap().iter().any(below));
            // What a test that was killed leaves.
            fs::create_dir(dir.path().join(SCRATCH_NAME)).unwrap();
            fs::write(dir.path().join(SCRATCH_NAME).join("device0"), b"x").unwrap();
        }
    }

    #[test]
    fn wrong_bytes_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("directory")).unwrap();
        let contents = [1, 2].map(content);
        assert!(contents.iter().all(|bytes| !bytes.contains(&0)));
        let start = usize::try_from(START_BLOCK * BLOCK_BYTES).unwrap();
        let length = usize::try_from(FILE_BYTES).unwrap();
        for (number, bytes) in contents.iter().enumerate() {
            let path = dir.path().join(format!("directory/file{number}"));
            fs::write(path, shown(bytes)).unwrap();
        }
        assert_eq!(compare(dir.path(), &contents), Ok(()));
        let mut wrong = contents.clone();
        wrong[1][start + length - 1] = 0;
        assert!(compare(dir.path(), &wrong).is_err());
    }
}
