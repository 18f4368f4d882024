// SPDX-License-Identifier: Apache-2.0
//! Puts a tree on a real file system as an unpacker for overlayfs does, and describes what is seen under a path.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test support")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use sluice_blockindex::tree::{DeviceNumber, InodeId, InodeKind, Tree};

/// Makes random trees such that ext4 and the kernel take them: times that ext4 can store, and
/// xattrs that any file may have; no directory is implicit, for that is the unpacker's business.
pub fn make_storable(tree: &mut Tree) {
    let mut pending = vec![tree.root()];
    while let Some(id) = pending.pop() {
        let inode = tree.inode_mut(id);
        inode.implicit = false;
        inode.mtime.seconds %= 2_000_000_000;
        let user = matches!(inode.kind, InodeKind::Regular { .. } | InodeKind::Directory);
        inode.xattrs.retain(|name, value| {
            value.truncate_to(200);
            name.starts_with(b"trusted.") || (user && name.starts_with(b"user."))
        });
        pending.extend(tree.children(id).values());
    }
}

trait Truncate {
    fn truncate_to(&mut self, bytes: usize);
}

impl Truncate for Box<[u8]> {
    /// ext4 keeps only so many bytes of xattrs per file.
    fn truncate_to(&mut self, bytes: usize) {
        if self.len() > bytes {
            *self = self[..bytes].into();
        }
    }
}

/// Unpacks a tree below an empty directory; content comes from the devices.
pub fn extract(tree: &Tree, devices: &[&[u8]], at: &Path) {
    std::fs::create_dir_all(at).unwrap();
    let mut linked: HashMap<InodeId, PathBuf> = HashMap::new();
    let mut pending = vec![(tree.root(), at.to_path_buf())];
    let mut order = Vec::new();
    while let Some((id, path)) = pending.pop() {
        order.push((id, path.clone()));
        for (name, child) in tree.children(id) {
            let path = path.join(OsStr::from_bytes(name));
            if let Some(original) = linked.get(child) {
                std::fs::hard_link(original, &path).unwrap();
                continue;
            }
            create(tree, *child, devices, &path);
            match tree.inode(*child).is_directory() {
                true => pending.push((*child, path)),
                false => {
                    order.push((*child, path.clone()));
                    linked.insert(*child, path);
                }
            }
        }
    }
    // What is in a directory changes its time, so parents come last.
    for (id, path) in order.into_iter().rev() {
        set_attributes(tree, id, &path);
    }
}

fn create(tree: &Tree, id: InodeId, devices: &[&[u8]], path: &Path) {
    let node = |kind: SFlag, number: DeviceNumber| {
        let number = makedev(u64::from(number.major()), u64::from(number.minor()));
        mknod(path, kind, Mode::empty(), number).unwrap();
    };
    match &tree.inode(id).kind {
        InodeKind::Directory => std::fs::create_dir(path).unwrap(),
        InodeKind::Regular { size_bytes, extent } => {
            let size = usize::try_from(*size_bytes).unwrap();
            let content = extent.map_or(&[][..], |run| {
                let start = usize::try_from(run.start_block * 512).unwrap();
                &devices[usize::from(run.device) - 1][start..start + size]
            });
            std::fs::write(path, content).unwrap();
        }
        InodeKind::Symlink(target) => symlink(OsStr::from_bytes(target), path).unwrap(),
        InodeKind::CharDevice(number) => node(SFlag::S_IFCHR, *number),
        InodeKind::BlockDevice(number) => node(SFlag::S_IFBLK, *number),
        InodeKind::Fifo => node(SFlag::S_IFIFO, DeviceNumber::WHITEOUT),
        InodeKind::Socket => node(SFlag::S_IFSOCK, DeviceNumber::WHITEOUT),
    }
}

fn set_attributes(tree: &Tree, id: InodeId, path: &Path) {
    let inode = tree.inode(id);
    lchown(path, Some(inode.uid), Some(inode.gid)).unwrap();
    for (name, value) in &inode.xattrs {
        xattr::set(path, OsStr::from_bytes(name), value).unwrap();
    }
    if !matches!(inode.kind, InodeKind::Symlink(_)) {
        let permissions = std::fs::Permissions::from_mode(u32::from(inode.permissions));
        std::fs::set_permissions(path, permissions).unwrap();
    }
    let time = TimeSpec::new(inode.mtime.seconds, i64::from(inode.mtime.nanoseconds));
    utimensat(
        nix::fcntl::AT_FDCWD,
        path,
        &time,
        &time,
        UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
}

/// What is seen under a mount: one line per path, with a digest of the content.
///
/// overlayfs lists a whiteout in a directory that has nothing to merge with, although the name
/// cannot be found; such names are returned apart.
pub fn describe(at: &Path) -> (BTreeMap<Vec<u8>, String>, Vec<PathBuf>) {
    let (mut lines, mut ghosts) = (BTreeMap::new(), Vec::new());
    let mut pending = vec![at.to_path_buf()];
    while let Some(path) = pending.pop() {
        let stat = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                ghosts.push(path.strip_prefix(at).unwrap().to_path_buf());
                continue;
            }
            stat => stat.unwrap(),
        };
        let detail = if stat.is_dir() {
            pending.extend(
                std::fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            String::new()
        } else if stat.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            format!(
                "{} {}",
                bytes.len(),
                sluice_blockindex::digest::BlobDigest::of(&bytes)
            )
        } else if stat.is_symlink() {
            format!("{:?}", std::fs::read_link(&path).unwrap())
        } else {
            format!("{:x}", stat.rdev())
        };
        let xattrs: BTreeMap<_, _> = xattr::list(&path)
            .unwrap()
            .map(|name| (name.clone(), xattr::get(&path, &name).unwrap()))
            .collect();
        // ext4 gives each symlink 0777.
        let mode = if stat.is_symlink() {
            0o120_777
        } else {
            stat.mode()
        };
        let line = format!(
            "{mode:o} {}:{} {}.{} {detail} {xattrs:?}",
            stat.uid(),
            stat.gid(),
            stat.mtime(),
            stat.mtime_nsec()
        );
        let name = path
            .strip_prefix(at)
            .unwrap()
            .as_os_str()
            .to_os_string()
            .into_vec();
        lines.insert(name, line);
    }
    (lines, ghosts)
}

/// Compares two descriptions and names the paths that differ, not all of them.
#[track_caller]
pub fn assert_same_files(actual: &BTreeMap<Vec<u8>, String>, expected: &BTreeMap<Vec<u8>, String>) {
    let paths: std::collections::BTreeSet<_> = actual.keys().chain(expected.keys()).collect();
    let differing: Vec<_> = paths
        .into_iter()
        .map(|path| {
            (
                String::from_utf8_lossy(path),
                actual.get(path),
                expected.get(path),
            )
        })
        .filter(|(_, actual, expected)| actual != expected)
        .collect();
    assert!(
        differing.is_empty(),
        "path, actual, expected: {differing:#?}"
    );
}
