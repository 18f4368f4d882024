// SPDX-License-Identifier: Apache-2.0
//! Random trees for the tests of this crate.
//!
//! A tree is described by a list of steps that are applied in order, with indices taken modulo
//! what is there, so that each list is valid and shrinks well.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test support")]

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use sluice_blockindex::erofs::DeviceSlot;
use sluice_blockindex::tree::{DeviceNumber, FileRun, Inode, InodeId, InodeKind, Timestamp, Tree};

/// Size of the only device of generated trees.
pub const DEVICE_BLOCKS: u64 = 4096;

/// One change of a tree under construction.
#[derive(Debug, Clone)]
pub enum Step {
    Add {
        directory: Index,
        name: Vec<u8>,
        inode: Inode,
        opaque: bool,
    },
    Link {
        directory: Index,
        name: Vec<u8>,
        target: Index,
    },
    Remove {
        directory: Index,
        pick: Index,
    },
}

/// The device of generated trees.
pub fn device() -> DeviceSlot {
    DeviceSlot {
        tag: [b'd'; 64],
        blocks: DEVICE_BLOCKS,
    }
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![8 => b'a'..=b'f', 1 => 1u8..b'/', 2 => b'0'..=255u8];
    prop_oneof![
        // Few names, so that layers meet.
        8 => select(vec!["a", "b", "c", "d"]).prop_map(|name| name.as_bytes().to_vec()),
        // Names around "." and "..", some of which sort before them.
        1 => select(vec!["-", "!", ".-", ".!", "...", "..a", ".a", "..-"])
            .prop_map(|name| name.as_bytes().to_vec()),
        2 => vec(byte.clone(), 1..20).prop_map(legal),
        1 => vec(byte, 200..=255).prop_map(legal),
    ]
}

fn legal(name: Vec<u8>) -> Vec<u8> {
    if name == b"." || name == b".." {
        b"dot".to_vec()
    } else {
        name
    }
}

fn xattrs() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let name = select(vec![
        "user.a",
        "user.a.long.name.of.an.attribute",
        "trusted.x",
        "security.capability",
        "security.selinux",
        "system.posix_acl_access",
        "system.posix_acl_default",
    ]);
    let name = name.prop_map(|name| name.as_bytes().to_vec());
    let value = prop_oneof![8 => vec(any::<u8>(), 0..40), 1 => vec(any::<u8>(), 300..1200)];
    prop_oneof![
        3 => Just(Vec::new()),
        1 => btree_map(name, value, 1..4).prop_map(|map| map.into_iter().collect()),
    ]
}

/// Any kind of inode; whiteouts only when `marks`.
fn kind(marks: bool) -> impl Strategy<Value = InodeKind> {
    let regular = (0..200_000u64, 0..DEVICE_BLOCKS).prop_map(|(size_bytes, start)| {
        let blocks = size_bytes.div_ceil(512);
        let start_block = start.min(DEVICE_BLOCKS - blocks);
        let extent = (size_bytes > 0).then_some(FileRun {
            device: 1,
            start_block,
        });
        InodeKind::Regular { size_bytes, extent }
    });
    let target = prop_oneof![8 => vec(1u8..=255, 1..60), 1 => vec(1u8..=255, 400..=4095)];
    let device = (0..4096u32, 0..1_048_576u32).prop_map(|(major, minor)| {
        // 0:0 is a whiteout, which is a matter of `marks`.
        DeviceNumber::new(major, minor.max(1)).unwrap()
    });
    prop_oneof![
        4 => Just(InodeKind::Directory),
        4 => regular,
        2 => target.prop_map(|target| InodeKind::Symlink(target.into())),
        1 => device.clone().prop_map(InodeKind::CharDevice),
        1 => device.prop_map(InodeKind::BlockDevice),
        1 => Just(InodeKind::Fifo),
        1 => Just(InodeKind::Socket),
        (if marks { 3 } else { 1 }) => Just(match marks {
            true => InodeKind::CharDevice(DeviceNumber::WHITEOUT),
            false => InodeKind::Fifo,
        }),
    ]
}

fn inode(marks: bool) -> impl Strategy<Value = Inode> {
    let numbers = (0..=0o7777u16, any::<u32>(), any::<u32>(), any::<bool>());
    let time = (-5_000_000_000..5_000_000_000i64, 0..1_000_000_000u32);
    (kind(marks), numbers, time, xattrs()).prop_map(move |(kind, numbers, time, xattrs)| {
        let (permissions, uid, gid, implicit) = numbers;
        let mut inode = Inode::new(kind);
        inode.permissions = permissions;
        (inode.uid, inode.gid) = (uid, gid);
        inode.mtime = Timestamp {
            seconds: time.0,
            nanoseconds: time.1,
        };
        inode.xattrs = xattrs
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        inode.implicit = implicit && marks && inode.is_directory();
        inode
    })
}

fn step(marks: bool) -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (any::<Index>(), name(), inode(marks), any::<bool>()).prop_map(
            move |(directory, name, inode, opaque)| Step::Add {
                directory, name, opaque: opaque && marks && inode.is_directory(), inode
            }
        ),
        2 => (any::<Index>(), name(), any::<Index>())
            .prop_map(|(directory, name, target)| Step::Link { directory, name, target }),
        1 => (any::<Index>(), any::<Index>())
            .prop_map(|(directory, pick)| Step::Remove { directory, pick }),
    ]
}

/// Builds the tree that the steps describe.
pub fn build(root: Option<Inode>, steps: Vec<Step>) -> Tree {
    let mut tree = Tree::new();
    let top = tree.root();
    if let Some(root) = root {
        *tree.inode_mut(top) = root;
    }
    let mut directories = vec![tree.root()];
    let mut files: Vec<InodeId> = Vec::new();
    for step in steps {
        match step {
            Step::Add {
                directory,
                name,
                inode,
                opaque,
            } => {
                let is_directory = inode.is_directory();
                let directory = *directory.get(&directories);
                let id = tree.insert_new(directory, &name, inode).unwrap();
                if opaque {
                    tree.inode_mut(id).set_opaque();
                }
                if is_directory {
                    directories.push(id)
                } else {
                    files.push(id)
                }
            }
            Step::Link {
                directory,
                name,
                target,
            } if !files.is_empty() => {
                let (directory, target) = (*directory.get(&directories), *target.get(&files));
                tree.insert(directory, &name, target).unwrap();
            }
            Step::Link { .. } => {}
            Step::Remove { directory, pick } => {
                let directory = *directory.get(&directories);
                let names: Vec<_> = tree.children(directory).keys().cloned().collect();
                if !names.is_empty() {
                    tree.remove(directory, &names[pick.index(names.len())]);
                }
            }
        }
    }
    tree
}

/// A tree of up to `steps` inodes; with `marks` a layer's tree, which has whiteouts, opaque and implicit directories.
pub fn tree(marks: bool, steps: usize) -> impl Strategy<Value = Tree> {
    let root = inode(marks).prop_map(|mut inode| {
        inode.kind = InodeKind::Directory;
        inode
    });
    (proptest::option::of(root), vec(step(marks), 0..steps))
        .prop_map(|(root, steps)| build(root, steps))
}
