// SPDX-License-Identifier: Apache-2.0
//! The kernel mounts our images over device files and must show what our reader says.
//!
//! Needs root and a kernel that mounts EROFS from files (6.12 and later); prints SKIPPED and why where it cannot run.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/mounts.rs"]
mod mounts;
#[path = "support/trees.rs"]
mod trees;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mounts::{Mount, cannot_mount};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use sluice_blockindex::erofs::{
    DeviceSlot, FileType, Nid, TreeLimits, TreeReader, validate, write_tree,
};
use sluice_blockindex::tree::{FileRun, Inode, InodeKind, Timestamp, Tree};
use trees::DEVICE_BLOCKS;

/// Bytes that differ from block to block, so that a wrong block is noticed.
fn device_bytes(seed: u64, blocks: u64) -> Vec<u8> {
    let words = blocks * 64;
    (0..words)
        .flat_map(|at| {
            (at ^ seed)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .to_le_bytes()
        })
        .collect()
}

/// What `stat` says about a device number, from the kernel's own form.
fn rdev(encoded: u32) -> u64 {
    let (major, minor) = (
        (encoded >> 8) & 0xfff,
        (encoded & 0xff) | ((encoded >> 12) & 0xfff00),
    );
    nix::sys::stat::makedev(u64::from(major), u64::from(minor))
}

fn assert_kernel_agrees(at: &Path, reader: TreeReader<'_>, devices: &[Vec<u8>]) -> usize {
    let mut count = 0;
    let mut inodes: BTreeMap<Nid, u64> = BTreeMap::new();
    let mut pending = vec![(at.to_path_buf(), reader.root())];
    while let Some((path, nid)) = pending.pop() {
        count += 1;
        let view = reader.inode(nid).unwrap();
        let stat = std::fs::symlink_metadata(&path).unwrap();
        let place = path.display();
        assert_eq!(stat.mode(), view.mode(), "{place}");
        assert_eq!((stat.uid(), stat.gid()), (view.uid, view.gid), "{place}");
        let mtime = (view.mtime.seconds, i64::from(view.mtime.nanoseconds));
        assert_eq!((stat.mtime(), stat.mtime_nsec()), mtime, "{place}");
        assert_eq!(stat.nlink(), u64::from(view.links), "{place}");
        assert_eq!(stat.size(), view.size_bytes, "{place}");
        assert_eq!(
            *inodes.entry(nid).or_insert(stat.ino()),
            stat.ino(),
            "{place}"
        );
        assert_xattrs(&path, reader, nid);
        match view.file_type {
            FileType::Regular => {
                let bytes = std::fs::read(&path).unwrap();
                let size = usize::try_from(view.size_bytes).unwrap();
                let run = reader.run(nid).unwrap();
                let expected = run.map_or(&[][..], |run| {
                    let start = usize::try_from(run.start_block * 512).unwrap();
                    &devices[usize::from(run.device) - 1][start..start + size]
                });
                assert!(bytes == expected, "content of {place}");
            }
            FileType::Symlink => {
                let target = std::fs::read_link(&path).unwrap();
                assert_eq!(
                    target.as_os_str().as_bytes(),
                    reader.symlink(nid).unwrap(),
                    "{place}"
                );
            }
            FileType::CharDevice | FileType::BlockDevice => {
                assert_eq!(stat.rdev(), rdev(view.device_number.encoded()), "{place}");
            }
            FileType::Directory => {
                let mut names: Vec<_> = std::fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_vec())
                    .collect();
                names.sort();
                let entries = reader.read_dir(nid, 0).unwrap().map(Result::unwrap);
                let entries: Vec<_> = entries
                    .filter(|e| !matches!(e.name, b"." | b".."))
                    .collect();
                assert!(
                    entries
                        .iter()
                        .map(|e| e.name)
                        .eq(names.iter().map(|n| &n[..])),
                    "{place}"
                );
                pending.extend(
                    entries
                        .into_iter()
                        .map(|e| (path.join(OsStr::from_bytes(e.name)), e.nid)),
                );
                assert!(std::fs::symlink_metadata(path.join("absent name")).is_err());
            }
            FileType::Fifo | FileType::Socket => {}
        }
    }
    count
}

fn assert_xattrs(path: &Path, reader: TreeReader<'_>, nid: Nid) {
    let ours: BTreeMap<Vec<u8>, Vec<u8>> = reader
        .xattrs(nid)
        .unwrap()
        .map(Result::unwrap)
        .map(|(name, value)| (name.to_boxed().into(), value.to_vec()))
        .collect();
    let kernels: BTreeMap<Vec<u8>, Vec<u8>> = xattr::list(path)
        .unwrap()
        .map(|name| {
            let value = xattr::get(path, &name);
            let value = value
                .unwrap_or_else(|error| panic!("{path:?} {name:?}: {error}"))
                .unwrap();
            (name.into_vec(), value)
        })
        .collect();
    assert_eq!(kernels, ours, "{}", path.display());
}

/// A valid ACL: kernels parse ACLs and refuse others.
fn acl(write: u8) -> Box<[u8]> {
    let entry = |tag: u8, permissions: u8| [tag, 0, permissions, 0, 255, 255, 255, 255];
    [
        &[2, 0, 0, 0][..],
        &entry(1, 6),
        &entry(4, 4),
        &entry(0x20, write),
    ]
    .concat()
    .into()
}

/// A tree with one of everything that the random ones might miss.
fn handmade() -> Tree {
    let mut tree = Tree::new();
    let root = tree.root();
    let big = tree
        .insert_new(root, b"big", Inode::implicit_directory())
        .unwrap();
    for number in 0..3000u32 {
        let name = format!("{number}-{}", "x".repeat((number % 200) as usize));
        let size_bytes = u64::from(number) * 7;
        let start_block = u64::from(number);
        let extent = (size_bytes > 0).then_some(FileRun {
            device: 1,
            start_block,
        });
        let mut file = Inode::new(InodeKind::Regular { size_bytes, extent });
        file.mtime = Timestamp {
            seconds: i64::from(number) - 1500,
            nanoseconds: number,
        };
        tree.insert_new(big, name.as_bytes(), file).unwrap();
    }
    for bytes in [1, 447, 448, 449, 511, 512, 513, 1023, 4095] {
        let link = Inode::new(InodeKind::Symlink(vec![b'l'; bytes].into()));
        tree.insert_new(root, format!("link{bytes}").as_bytes(), link)
            .unwrap();
    }
    for (name, permissions) in [("default", 0o755), ("access", 0o644)] {
        let mut inode = Inode::new(InodeKind::Directory);
        inode.permissions = permissions;
        let mask = u8::try_from(permissions & 7).unwrap();
        inode.xattrs.insert(
            format!("system.posix_acl_{name}").into_bytes().into(),
            acl(mask),
        );
        tree.insert_new(root, name.as_bytes(), inode).unwrap();
    }
    let mut full = Inode::new(InodeKind::Directory);
    full.permissions = 0o7777;
    // The directory's bytes are just a whole block, and just fit behind the inode.
    let names_of = |bytes: usize| {
        // 12 + 1 for ".", 12 + 2 for "..", 12 for the entry.
        vec![b'n'; bytes - 39]
    };
    for bytes in [511 - 64, 512 - 64, 239, 240, 241] {
        let name = format!("full{bytes}");
        let id = tree
            .insert_new(root, name.as_bytes(), full.clone())
            .unwrap();
        let mut rest = bytes;
        for letter in b'a'..=b'z' {
            let take = rest.min(200);
            if rest < 60 {
                break;
            }
            let mut name = names_of(take.max(40));
            name[0] = letter;
            tree.insert_new(id, &name, Inode::new(InodeKind::Fifo))
                .unwrap();
            rest -= take;
        }
    }
    tree
}

#[test]
fn the_kernel_shows_what_the_reader_says() {
    if let Some(reason) = cannot_mount("erofs") {
        println!("SKIPPED the_kernel_shows_what_the_reader_says: {reason}");
        return;
    }
    let folder = tempfile::Builder::new()
        .prefix("tree-kernel-")
        .tempdir()
        .unwrap();
    let device = device_bytes(0, DEVICE_BLOCKS);
    let device_path = folder.path().join("device");
    std::fs::write(&device_path, &device).unwrap();
    let slot = DeviceSlot {
        tag: [b'd'; 64],
        blocks: DEVICE_BLOCKS,
    };
    let mut runner = TestRunner::deterministic();
    let mut all = vec![Tree::new(), handmade()];
    for _ in 0..60 {
        all.push(
            trees::tree(true, 120)
                .new_tree(&mut runner)
                .unwrap()
                .current(),
        );
    }
    let mut files = 0;
    for mut tree in all {
        make_xattrs_valid(&mut tree);
        let image = write_tree(&tree, &[slot]).unwrap();
        let image_path = folder.path().join("tree.erofs");
        std::fs::write(&image_path, &image).unwrap();
        let at = folder.path().join("mnt");
        let mounted = match Mount::erofs(&image_path, &[&device_path], &at) {
            Err(nix::errno::Errno::ENOTBLK) => {
                println!("SKIPPED: this kernel does not mount EROFS from files");
                return;
            }
            mounted => mounted.unwrap(),
        };
        let reader = validate(&image, TreeLimits::default()).unwrap().reader();
        files += assert_kernel_agrees(&at, reader, std::slice::from_ref(&device));
        drop(mounted);
    }
    println!("the kernel agrees on {files} files");
    assert!(files > 4000);
}

/// Kernels parse ACLs and capabilities, and refuse to show random bytes.
fn make_xattrs_valid(tree: &mut Tree) {
    let mut pending = vec![tree.root()];
    while let Some(id) = pending.pop() {
        let symlink = matches!(tree.inode(id).kind, InodeKind::Symlink(_));
        for (name, value) in &mut tree.inode_mut(id).xattrs {
            if name.starts_with(b"system.posix_acl") {
                *value = acl(4);
            }
            if **name == *b"security.capability" {
                // Version 2, cap_net_raw permitted and effective.
                *value = [&[1, 0, 0, 2, 0, 32][..], &[0; 14]].concat().into();
            }
        }
        if symlink {
            // Nor can a symlink have one, or any attribute of users.
            tree.inode_mut(id)
                .xattrs
                .retain(|name, _| !name.starts_with(b"system."));
        }
        if !matches!(
            tree.inode(id).kind,
            InodeKind::Regular { .. } | InodeKind::Directory
        ) {
            tree.inode_mut(id)
                .xattrs
                .retain(|name, _| !name.starts_with(b"user."));
        }
        pending.extend(tree.children(id).values());
    }
}

#[test]
fn the_kernel_finds_content_on_many_devices() {
    if let Some(reason) = cannot_mount("erofs") {
        println!("SKIPPED the_kernel_finds_content_on_many_devices: {reason}");
        return;
    }
    let folder = tempfile::Builder::new()
        .prefix("tree-kernel-")
        .tempdir()
        .unwrap();
    let mut tree = Tree::new();
    let (mut devices, mut slots, mut paths) = (Vec::new(), Vec::new(), Vec::new());
    for number in 1..=20u16 {
        devices.push(device_bytes(u64::from(number) << 40, 64));
        slots.push(DeviceSlot {
            tag: [b'0'; 64],
            blocks: 64,
        });
        paths.push(folder.path().join(format!("d{number}")));
        std::fs::write(&paths[usize::from(number) - 1], devices.last().unwrap()).unwrap();
        let extent = Some(FileRun {
            device: number,
            start_block: u64::from(number),
        });
        let file = Inode::new(InodeKind::Regular {
            size_bytes: 20_000,
            extent,
        });
        tree.insert_new(tree.root(), format!("f{number}").as_bytes(), file)
            .unwrap();
    }
    let image = write_tree(&tree, &slots).unwrap();
    let image_path = folder.path().join("tree.erofs");
    std::fs::write(&image_path, &image).unwrap();
    let at = folder.path().join("mnt");
    let paths: Vec<&Path> = paths.iter().map(|path| &**path).collect();
    let _mounted = match Mount::erofs(&image_path, &paths, &at) {
        Err(nix::errno::Errno::ENOTBLK) => {
            println!("SKIPPED: this kernel does not mount EROFS from files");
            return;
        }
        mounted => mounted.unwrap(),
    };
    let reader = validate(&image, TreeLimits::default()).unwrap().reader();
    assert_eq!(assert_kernel_agrees(&at, reader, &devices), 21);
}
