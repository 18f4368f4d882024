// SPDX-License-Identifier: Apache-2.0
//! The whole way: files, packed by GNU tar, scanned, written as a tree, mounted by the kernel over
//! the tar itself, must be the same files.
//!
//! Needs root, GNU tar, and a kernel that mounts EROFS from files (6.12 and later); prints SKIPPED
//! and why where it cannot run.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/extract.rs"]
mod extract;
#[path = "support/mounts.rs"]
mod mounts;
#[path = "support/trees.rs"]
mod trees;

use std::path::Path;
use std::process::Command;

use extract::{assert_same_files, describe, extract, make_storable};
use mounts::{Mount, cannot_mount};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use sluice_blockindex::erofs::{DeviceSlot, TreeLimits, validate, write_tree};
use sluice_blockindex::tar::Scanner;
use sluice_blockindex::tree::{InodeKind, Tree};
use trees::DEVICE_BLOCKS;

fn device_bytes() -> Vec<u8> {
    let words = DEVICE_BLOCKS * 64;
    (0..words)
        .flat_map(|at| at.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
        .collect()
}

/// tar has no sockets, and an unpacker like containerd's gives files from before 1970 its first second.
fn make_packable(tree: &mut Tree) {
    let mut pending = vec![tree.root()];
    while let Some(id) = pending.pop() {
        if tree.inode(id).kind == InodeKind::Socket {
            tree.inode_mut(id).kind = InodeKind::Fifo;
        }
        // Nor does it set any of these.
        tree.inode_mut(id)
            .xattrs
            .retain(|name, _| !name.starts_with(b"trusted."));
        let seconds = &mut tree.inode_mut(id).mtime.seconds;
        *seconds = seconds.abs();
        pending.extend(tree.children(id).values());
    }
}

fn pack(files: &Path, format: &str, tar: &Path) {
    let status = Command::new("tar")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "--format",
            format,
            "-C",
        ])
        .args([
            files.as_os_str(),
            "-cf".as_ref(),
            tar.as_os_str(),
            ".".as_ref(),
        ])
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn the_kernel_shows_the_files_of_a_tar_that_it_never_unpacked() {
    if let Some(reason) = cannot_mount("erofs") {
        println!("SKIPPED the_kernel_shows_the_files_of_a_tar_that_it_never_unpacked: {reason}");
        return;
    }
    let mut runner = TestRunner::deterministic();
    let content = device_bytes();
    let mut paths = 0;
    for _ in 0..30 {
        let folder = tempfile::Builder::new()
            .prefix("tree-tar-")
            .tempdir()
            .unwrap();
        let mut tree = trees::tree(false, 120)
            .new_tree(&mut runner)
            .unwrap()
            .current();
        make_storable(&mut tree);
        make_packable(&mut tree);
        let files = folder.path().join("files");
        extract(&tree, &[&content], &files);
        let tar = folder.path().join("layer.tar");
        pack(&files, "pax", &tar);

        let bytes = std::fs::read(&tar).unwrap();
        let mut scanner = Scanner::new();
        for piece in bytes.chunks(7777) {
            scanner.push(piece, &mut ()).unwrap();
        }
        let scanned = scanner.finish().unwrap();
        let slot = DeviceSlot {
            tag: [b'd'; 64],
            blocks: bytes.len().div_ceil(512) as u64,
        };
        let image = write_tree(&scanned, &[slot]).unwrap();
        validate(&image, TreeLimits::default()).unwrap();
        let image_path = folder.path().join("layer.erofs");
        std::fs::write(&image_path, image).unwrap();
        let at = folder.path().join("mnt");
        let _mounted = match Mount::erofs(&image_path, &[&tar], &at) {
            Err(nix::errno::Errno::ENOTBLK) => {
                println!("SKIPPED: this kernel does not mount EROFS from files");
                return;
            }
            mounted => mounted.unwrap(),
        };
        let (mut expected, _) = describe(&files);
        let (mut actual, _) = describe(&at);
        // The entry "./" is passed over, as containerd does: the root belongs to the snapshot.
        expected.remove(&b""[..]);
        actual.remove(&b""[..]);
        assert_same_files(&actual, &expected);
        paths += actual.len();
    }
    println!("the kernel agrees on {paths} paths");
    assert!(paths > 300);
}
