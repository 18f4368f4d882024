// SPDX-License-Identifier: Apache-2.0
//! Merged trees, mounted by the kernel, against overlayfs over the unpacked layers.
//!
//! Needs root, overlayfs, and a kernel that mounts EROFS from files (6.12 and later); prints
//! SKIPPED and why where it cannot run.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/extract.rs"]
mod extract;
#[path = "support/model.rs"]
mod model;
#[path = "support/mounts.rs"]
mod mounts;
#[path = "support/trees.rs"]
mod trees;

use std::path::{Path, PathBuf};

use extract::{assert_same_files, describe, extract, make_storable};
use model::Directory;
use mounts::{Mount, cannot_mount};
use proptest::collection::vec;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use sluice_blockindex::erofs::{TreeReader, write_tree};
use sluice_blockindex::merge::{MergeBase, merge, merged_devices};
use sluice_blockindex::tree::{Inode, InodeKind, Tree};
use trees::{DEVICE_BLOCKS, device};

/// Device i is filled so that its bytes are found on no other.
fn device_bytes(number: usize) -> Vec<u8> {
    let seed = (number as u64) << 40;
    let words = DEVICE_BLOCKS * 64;
    (0..words)
        .flat_map(|at| {
            (at ^ seed)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .to_le_bytes()
        })
        .collect()
}

/// Layers on disk and as trees, and what is needed to mount them.
struct Stack {
    folder: tempfile::TempDir,
    layers: Vec<PathBuf>,
    images: Vec<Vec<u8>>,
    devices: Vec<PathBuf>,
}

impl Stack {
    fn new(layers: &[Tree], devices: &[Vec<u8>]) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("tree-overlay-")
            .tempdir()
            .unwrap();
        let mut stack = Self {
            layers: vec![],
            images: vec![],
            devices: vec![],
            folder,
        };
        for (number, tree) in layers.iter().enumerate() {
            let at = stack.folder.path().join(format!("l{number}"));
            extract(tree, &[&devices[number]], &at);
            stack.layers.push(at);
            stack.images.push(write_tree(tree, &[device()]).unwrap());
            let path = stack.folder.path().join(format!("d{number}"));
            std::fs::write(&path, &devices[number]).unwrap();
            stack.devices.push(path);
        }
        stack
    }

    /// Merges, and lets the kernel mount the result.
    fn merged(&self, base: MergeBase<'_>) -> nix::Result<(Mount, PathBuf)> {
        let readers: Vec<_> = self
            .images
            .iter()
            .map(|image| TreeReader::open(image).unwrap())
            .collect();
        let merged = merge(&readers, base).unwrap();
        let image = write_tree(&merged, &merged_devices(&readers)).unwrap();
        let path = self.folder.path().join("merged.erofs");
        std::fs::write(&path, image).unwrap();
        let devices: Vec<&Path> = self.devices.iter().map(|path| &**path).collect();
        let at = self.folder.path().join("merged");
        Ok((Mount::erofs(&path, &devices, &at)?, at))
    }

    /// Mounts an overlay of directories, the lowest first.
    fn overlay<'p>(
        &self,
        name: &str,
        lowers: impl DoubleEndedIterator<Item = &'p Path>,
    ) -> (Mount, PathBuf) {
        let mut lowers: Vec<_> = lowers
            .rev()
            .map(|path| path.display().to_string())
            .collect();
        // overlayfs wants two at least; an empty one at the bottom changes nothing.
        let empty = self.folder.path().join("empty");
        std::fs::create_dir_all(&empty).unwrap();
        lowers.push(empty.display().to_string());
        let at = self.folder.path().join(name);
        let options = format!("lowerdir={}", lowers.join(":"));
        (Mount::new("overlay", &at, "overlay", &options).unwrap(), at)
    }
}

fn cannot_run(test: &str) -> bool {
    let reason = cannot_mount("erofs").or_else(|| cannot_mount("overlay"));
    if let Some(reason) = &reason {
        println!("SKIPPED {test}: {reason}");
    }
    reason.is_some()
}

fn generate(runner: &mut TestRunner, marks: bool) -> Vec<Tree> {
    let strategy = vec(trees::tree(marks, 40), 1..5);
    let mut layers = strategy.new_tree(runner).unwrap().current();
    layers.iter_mut().for_each(make_storable);
    layers
}

#[test]
fn overlayfs_shows_the_layers_as_the_bottom_merge_does() {
    if cannot_run("overlayfs_shows_the_layers_as_the_bottom_merge_does") {
        return;
    }
    let devices: Vec<_> = (0..5).map(device_bytes).collect();
    let mut runner = TestRunner::deterministic();
    let mut paths = 0;
    for _ in 0..40 {
        let layers = generate(&mut runner, true);
        let stack = Stack::new(&layers, &devices);
        let (_merged, merged_at) = match stack.merged(MergeBase::Bottom) {
            Err(nix::errno::Errno::ENOTBLK) => {
                println!("SKIPPED: this kernel does not mount EROFS from files");
                return;
            }
            merged => merged.unwrap(),
        };
        let (_overlay, overlay_at) = stack.overlay("overlay", stack.layers.iter().map(|p| &**p));
        let (expected, _) = describe(&overlay_at);
        let (actual, ghosts) = describe(&merged_at);
        assert_eq!(ghosts, Vec::<PathBuf>::new());
        assert_same_files(&actual, &expected);
        paths += actual.len();
    }
    println!("overlayfs agrees on {paths} paths");
    assert!(paths > 300);
}

#[test]
fn overlayfs_shows_the_same_above_other_layers() {
    if cannot_run("overlayfs_shows_the_same_above_other_layers") {
        return;
    }
    let devices: Vec<_> = (0..6).map(device_bytes).collect();
    let mut runner = TestRunner::deterministic();
    let mut paths = 0;
    for _ in 0..40 {
        let base = generate(&mut runner, false).remove(0);
        let layers = generate(&mut runner, true);
        let stack = Stack::new(&layers, &devices);
        let base_at = stack.folder.path().join("base");
        extract(&base, &[&devices[5]], &base_at);
        let lower = Directory::of(&base, 1000, None);
        let (_merged, merged_at) = match stack.merged(MergeBase::Above(&lower)) {
            Err(nix::errno::Errno::ENOTBLK) => {
                println!("SKIPPED: this kernel does not mount EROFS from files");
                return;
            }
            merged => merged.unwrap(),
        };
        let lowers = std::iter::once(&*base_at).chain(stack.layers.iter().map(|p| &**p));
        let (_overlay, overlay_at) =
            stack.overlay("overlay", lowers.collect::<Vec<_>>().into_iter());
        let (_short, short_at) = stack.overlay("short", [&*base_at, &*merged_at].into_iter());
        let (expected, _) = describe(&overlay_at);
        let (actual, ghosts) = describe(&short_at);
        assert_eq!(
            ghosts,
            Vec::<PathBuf>::new(),
            "a kept whiteout is seen in a listing"
        );
        assert_same_files(&actual, &expected);
        paths += actual.len();
    }
    println!("overlayfs agrees on {paths} paths");
    assert!(paths > 300);
}

#[test]
fn overlayfs_ignores_an_opaque_mark_on_the_root_of_a_layer_and_so_does_the_merge() {
    if cannot_run("overlayfs_ignores_an_opaque_mark_on_the_root_of_a_layer_and_so_does_the_merge") {
        return;
    }
    let devices: Vec<_> = (0..2).map(device_bytes).collect();
    let root = |opaque: bool, name: &[u8]| {
        let mut tree = Tree::new();
        tree.inode_mut(tree.root()).implicit = false;
        if opaque {
            tree.inode_mut(tree.root()).set_opaque();
        }
        tree.insert_new(tree.root(), name, Inode::new(InodeKind::Fifo))
            .unwrap();
        tree
    };
    let stack = Stack::new(&[root(false, b"lower"), root(true, b"upper")], &devices);
    let (_merged, merged_at) = match stack.merged(MergeBase::Bottom) {
        Err(nix::errno::Errno::ENOTBLK) => {
            println!("SKIPPED: this kernel does not mount EROFS from files");
            return;
        }
        merged => merged.unwrap(),
    };
    let (_overlay, overlay_at) = stack.overlay("overlay", stack.layers.iter().map(|p| &**p));
    let (expected, _) = describe(&overlay_at);
    assert_eq!(
        expected.keys().map(|k| &**k).collect::<Vec<_>>(),
        [&b""[..], b"lower", b"upper"]
    );
    assert_eq!(describe(&merged_at).0, expected);
}
