// SPDX-License-Identifier: Apache-2.0
//! Merged layers against the naive model.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/model.rs"]
mod model;
#[path = "support/trees.rs"]
mod trees;

use model::{Directory, Node};
use proptest::collection::vec;
use proptest::prelude::*;
use sluice_blockindex::erofs::{
    DeviceSlot, TreeError, TreeLimits, TreeReader, to_tree, validate, write_tree,
};
use sluice_blockindex::merge::{
    DirectoryAttributes, LowerAttributes, LowerError, MergeBase, MergeError, merge, merged_devices,
};
use sluice_blockindex::tree::{FileRun, Inode, InodeKind, Tree};
use trees::device;

fn images(layers: &[Tree]) -> Vec<Vec<u8>> {
    layers
        .iter()
        .map(|layer| write_tree(layer, &[device()]).unwrap())
        .collect()
}

fn readers(images: &[Vec<u8>]) -> Vec<TreeReader<'_>> {
    let valid = |image| validate(image, TreeLimits::default()).unwrap().reader();
    images.iter().map(|image| valid(image)).collect()
}

/// Merges, writes, validates and reads the result again.
fn merged(layers: &[Tree], base: MergeBase<'_>) -> Tree {
    let images = images(layers);
    let readers = readers(&images);
    let tree = merge(&readers, base).unwrap();
    let image = write_tree(&tree, &merged_devices(&readers)).unwrap();
    to_tree(validate(&image, TreeLimits::default()).unwrap().reader()).unwrap()
}

fn applied(state: &Directory, layers: &[Tree]) -> Directory {
    let mut state = state.clone();
    for (number, layer) in layers.iter().enumerate() {
        let device = u16::try_from(number + 1).unwrap();
        state.apply(&Directory::of(layer, number, Some(device)));
    }
    state
}

/// Whiteouts stand only where they can hide something, and no directory is implicit.
fn assert_marks(merged: &Directory, lower: Option<&Directory>) {
    assert!(!merged.inode.implicit);
    for (name, node) in &merged.children {
        match node {
            Node::File(inode, _) => assert!(!inode.is_whiteout() || lower.is_some(), "{name:?}"),
            Node::Directory(directory) => {
                let below = lower.and_then(|lower| lower.children.get(name));
                let below = match below {
                    Some(Node::Directory(below)) if !directory.inode.is_opaque() => Some(below),
                    _ => None,
                };
                assert_marks(directory, below);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_bottom_merge_is_the_layers_applied_in_order(layers in vec(trees::tree(true, 40), 1..5)) {
        let merged = Directory::of(&merged(&layers, MergeBase::Bottom), 0, None);
        prop_assert_eq!(merged.lines(), applied(&Directory::nothing(), &layers).lines());
        let lines = merged.lines();
        let mark = |line: &String| line.contains("overlay.opaque") || line.contains("CharDevice(0:0)");
        prop_assert!(!lines.values().any(mark));
    }

    #[test]
    fn a_merge_above_changes_what_is_below_as_its_layers_do(
        base in trees::tree(false, 40),
        layers in vec(trees::tree(true, 40), 1..5),
    ) {
        let base = {
            let mut state = Directory::nothing();
            state.apply(&Directory::of(&base, 1000, None));
            state
        };
        let merged = Directory::of(&merged(&layers, MergeBase::Above(&base)), 2000, None);
        assert_marks(&merged, Some(&base));
        let mut stacked = base.clone();
        stacked.apply(&merged);
        prop_assert_eq!(stacked.lines(), applied(&base, &layers).lines());
    }
}

fn file(start_block: u64) -> Inode {
    let extent = Some(FileRun {
        device: 1,
        start_block,
    });
    Inode::new(InodeKind::Regular {
        size_bytes: 1,
        extent,
    })
}

fn directory(permissions: u16) -> Inode {
    let mut inode = Inode::new(InodeKind::Directory);
    inode.permissions = permissions;
    inode
}

/// Builds a tree from paths, with implicit parents.
fn tree(entries: &[(&str, Inode)]) -> Tree {
    let mut tree = Tree::new();
    for (path, inode) in entries {
        let mut at = tree.root();
        let mut names = path.split('/').map(str::as_bytes).peekable();
        while let Some(name) = names.next() {
            at = match (tree.child(at, name), names.peek()) {
                (Some(known), Some(_)) => known,
                (_, None) => tree.insert_new(at, name, inode.clone()).unwrap(),
                (None, Some(_)) => tree
                    .insert_new(at, name, Inode::implicit_directory())
                    .unwrap(),
            };
        }
    }
    tree
}

struct Everything;

impl LowerAttributes for Everything {
    fn directory(&self, path: &[&[u8]]) -> Result<Option<DirectoryAttributes>, LowerError> {
        let permissions = u16::try_from(path.len()).unwrap();
        let inode = Inode::implicit_directory();
        Ok(Some(DirectoryAttributes {
            permissions,
            uid: 7,
            gid: 8,
            mtime: inode.mtime,
            xattrs: inode.xattrs,
        }))
    }
}

#[test]
fn a_directory_that_replaces_something_hides_what_is_below_the_run() {
    let cases = [
        // A whiteout and a new directory.
        vec![
            tree(&[("a", Inode::whiteout())]),
            tree(&[("a", directory(1)), ("a/x", file(1))]),
        ],
        // A file and a directory instead.
        vec![tree(&[("a", file(1))]), tree(&[("a/x", file(1))])],
        // An opaque directory below an ordinary one.
        vec![
            tree(&[("a/y", file(1))]),
            {
                let mut opaque = directory(1);
                opaque.set_opaque();
                tree(&[("a", opaque)])
            },
            tree(&[("a/x", file(1)), ("a/y", Inode::whiteout())]),
        ],
    ];
    for layers in cases {
        let merged = merged(&layers, MergeBase::Above(&Everything));
        let a = merged.child(merged.root(), b"a").unwrap();
        assert!(merged.inode(a).is_opaque());
        let names: Vec<_> = merged.children(a).keys().map(|name| &**name).collect();
        assert_eq!(names, [b"x"]);
    }
}

#[test]
fn implicit_directories_take_the_attributes_of_the_nearest_below() {
    let layers = [
        tree(&[("a", directory(0o700))]),
        tree(&[("a/b/c", file(1))]),
    ];
    let bottom = merged(&layers, MergeBase::Bottom);
    let permissions = |tree: &Tree, path: &[&[u8]]| {
        let inode = tree.inode(tree.lookup(path.iter().copied()).unwrap());
        assert!(!inode.implicit);
        (inode.permissions, inode.uid)
    };
    assert_eq!(permissions(&bottom, &[]), (0o755, 0));
    assert_eq!(permissions(&bottom, &[b"a"]), (0o700, 0));
    assert_eq!(permissions(&bottom, &[b"a", b"b"]), (0o755, 0));
    let above = merged(&layers, MergeBase::Above(&Everything));
    assert_eq!(permissions(&above, &[]), (0, 7));
    assert_eq!(permissions(&above, &[b"a"]), (0o700, 0));
    assert_eq!(permissions(&above, &[b"a", b"b"]), (2, 7));
}

#[test]
fn links_of_a_layer_stay_links_where_an_upper_layer_replaces_one_name() {
    let mut lower = tree(&[("a", file(1)), ("d/x", file(9))]);
    let linked = lower.child(lower.root(), b"a").unwrap();
    let d = lower.child(lower.root(), b"d").unwrap();
    for (directory, name) in [(lower.root(), b"b"), (lower.root(), b"c"), (d, b"e")] {
        lower.insert(directory, name, linked).unwrap();
    }
    let layers = [lower, tree(&[("a", file(2)), ("c", Inode::whiteout())])];
    let merged = merged(&layers, MergeBase::Bottom);
    let id = |path: &[&[u8]]| merged.lookup(path.iter().copied());
    assert_eq!(id(&[b"b"]), id(&[b"d", b"e"]));
    assert_ne!(id(&[b"a"]), id(&[b"b"]));
    assert_eq!(id(&[b"c"]), None);
    let kind = &merged.inode(id(&[b"a"]).unwrap()).kind;
    let extent = Some(FileRun {
        device: 2,
        start_block: 2,
    });
    assert_eq!(
        *kind,
        InodeKind::Regular {
            size_bytes: 1,
            extent
        }
    );
}

#[test]
fn layers_that_are_no_layers_are_refused() {
    let error = merge(&[], MergeBase::Bottom).unwrap_err();
    assert!(matches!(error, MergeError::LayerCount(0)), "{error:?}");
    let slots: Vec<DeviceSlot> = vec![device(); 2];
    let image = write_tree(&Tree::new(), &slots).unwrap();
    let reader = TreeReader::open(&image).unwrap();
    let error = merge(&[reader], MergeBase::Bottom).unwrap_err();
    assert!(
        matches!(
            error,
            MergeError::Devices {
                layer: 0,
                devices: 2
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_merge_fails_where_what_is_below_cannot_be_told() {
    struct Broken;
    impl LowerAttributes for Broken {
        fn directory(&self, path: &[&[u8]]) -> Result<Option<DirectoryAttributes>, LowerError> {
            match path {
                [] => Everything.directory(path),
                _ => Err("out of order".into()),
            }
        }
    }
    let layer = tree(&[("d", directory(1)), ("d/gone", Inode::whiteout())]);
    let images = images(&[layer]);
    let error = merge(&readers(&images), MergeBase::Above(&Broken)).unwrap_err();
    assert!(
        matches!(&error, MergeError::Lower { path, .. } if **path == *b"d"),
        "{error:?}"
    );
}

#[test]
fn whiteouts_in_the_root_stay_whatever_is_said_of_it() {
    struct Nothing;
    impl LowerAttributes for Nothing {
        fn directory(&self, _: &[&[u8]]) -> Result<Option<DirectoryAttributes>, LowerError> {
            Ok(None)
        }
    }
    let layer = tree(&[("gone", Inode::whiteout()), ("d/gone", Inode::whiteout())]);
    let merged = merged(&[layer], MergeBase::Above(&Nothing));
    assert!(merged.lookup([&b"gone"[..]]).is_some());
    assert!(merged.lookup([&b"d"[..], b"gone"]).is_none());
}

#[test]
fn a_tree_with_a_cycle_that_nobody_validated_ends_in_an_error() {
    let mut tree = tree(&[("a/b", directory(0))]);
    tree.insert_new(tree.root(), b"z", Inode::whiteout())
        .unwrap();
    let mut image = write_tree(&tree, &[device()]).unwrap();
    let (a, b) = {
        let reader = TreeReader::open(&image).unwrap();
        let a = reader.lookup(reader.root(), b"a").unwrap().unwrap();
        (a, reader.lookup(a, b"b").unwrap().unwrap())
    };
    // Make the entry "b" of a lead to a again.
    let needle = b.0.to_le_bytes();
    let start = usize::try_from(a.0).unwrap() * 32;
    let at = start
        + image[start..]
            .windows(8)
            .position(|bytes| bytes == needle)
            .unwrap();
    image[at..at + 8].copy_from_slice(&a.0.to_le_bytes());
    let reader = TreeReader::open(&image).unwrap();
    for base in [MergeBase::Bottom, MergeBase::Above(&Everything)] {
        let error = merge(&[reader, reader], base).unwrap_err();
        let limit = matches!(
            error,
            MergeError::Layer {
                source: TreeError::Limit { .. },
                ..
            }
        );
        assert!(limit, "{error:?}");
    }
    assert!(validate(&image, TreeLimits::default()).is_err());
}
