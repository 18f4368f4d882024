// SPDX-License-Identifier: Apache-2.0
//! Trees written and read again, against the tree in memory, and with damaged bytes.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/trees.rs"]
mod trees;

use std::collections::HashMap;

use proptest::prelude::*;
use sluice_blockindex::dump::dump;
use sluice_blockindex::erofs::{
    DeviceSlot, DirEntry, FileType, InodeFault, Nid, TreeError, TreeLimits, TreeReader, WriteError,
    to_tree, validate, write_tree,
};
use sluice_blockindex::tree::{
    IMPLICIT_XATTR, Inode, InodeId, InodeKind, OPAQUE_XATTR, Timestamp, Tree,
};
use trees::{DEVICE_BLOCKS, device};

fn image(tree: &Tree) -> Vec<u8> {
    write_tree(tree, &[device()]).unwrap()
}

fn check(image: &[u8]) -> Result<TreeReader<'_>, TreeError> {
    validate(image, TreeLimits::default()).map(|tree| tree.reader())
}

/// Compares a tree with its image, name by name and attribute by attribute.
fn assert_same(tree: &Tree, reader: TreeReader<'_>) {
    let mut seen: HashMap<Nid, InodeId> = HashMap::new();
    let mut names: HashMap<Nid, u32> = HashMap::new();
    let mut pending = vec![(tree.root(), reader.root(), reader.root())];
    while let Some((id, nid, parent)) = pending.pop() {
        let inode = tree.inode(id);
        let view = reader.inode(nid).unwrap();
        assert_eq!(*seen.entry(nid).or_insert(id), id, "one inode, one number");
        assert_eq!(view.permissions, inode.permissions);
        assert_eq!(
            (view.uid, view.gid, view.mtime),
            (inode.uid, inode.gid, inode.mtime)
        );
        for (name, value) in &inode.xattrs {
            assert_eq!(reader.xattr(nid, name).unwrap(), Some(&**value));
        }
        let marked = reader.xattr(nid, IMPLICIT_XATTR).unwrap().is_some();
        assert_eq!(marked, inode.implicit);
        let count = reader.xattrs(nid).unwrap().map(Result::unwrap).count();
        assert_eq!(count, inode.xattrs.len() + usize::from(inode.implicit));
        assert_eq!(reader.xattr(nid, b"user.absent").unwrap(), None);
        match &inode.kind {
            InodeKind::Regular { size_bytes, extent } => {
                assert_eq!(
                    (view.file_type, view.size_bytes),
                    (FileType::Regular, *size_bytes)
                );
                assert_eq!(reader.run(nid).unwrap(), *extent);
            }
            InodeKind::Symlink(target) => {
                assert_eq!(reader.symlink(nid).unwrap(), &**target);
                assert_eq!(view.size_bytes, target.len() as u64);
            }
            InodeKind::CharDevice(number) | InodeKind::BlockDevice(number) => {
                assert_eq!(view.device_number, *number);
                assert_eq!(view.is_whiteout(), inode.is_whiteout());
            }
            InodeKind::Fifo => assert_eq!(view.file_type, FileType::Fifo),
            InodeKind::Socket => assert_eq!(view.file_type, FileType::Socket),
            InodeKind::Directory => {
                let children = tree.children(id);
                let subdirectories = children
                    .values()
                    .filter(|id| tree.inode(**id).is_directory())
                    .count();
                assert_eq!(view.links as usize, 2 + subdirectories);
                assert_eq!(reader.lookup(nid, b".").unwrap(), Some(nid));
                assert_eq!(reader.lookup(nid, b"..").unwrap(), Some(parent));
                let listed = list(reader, nid, 0);
                assert!(listed.is_sorted_by(|a, b| a.name < b.name));
                let expected = children.iter().map(|(name, id)| (&**name, *id));
                let found = listed.iter().filter(|e| !matches!(e.name, b"." | b".."));
                assert_eq!(listed.len(), children.len() + 2);
                for ((name, child), entry) in expected.zip(found) {
                    assert_eq!(name, entry.name);
                    assert_eq!(reader.lookup(nid, name).unwrap(), Some(entry.nid));
                    *names.entry(entry.nid).or_default() += 1;
                    pending.push((child, entry.nid, nid));
                }
                assert_resumable(reader, nid, &listed);
                for absent in [&b"zz-absent"[..], b"", b"\xff\xff\xff", b"!", b"a\0"] {
                    let found = reader.lookup(nid, absent).unwrap();
                    assert_eq!(found.is_some(), children.contains_key(absent));
                }
            }
        }
    }
    for (nid, count) in names {
        let view = reader.inode(nid).unwrap();
        if view.file_type != FileType::Directory {
            assert_eq!(view.links, count);
        }
    }
}

fn list<'a>(reader: TreeReader<'a>, directory: Nid, from: u64) -> Vec<DirEntry<'a>> {
    reader
        .read_dir(directory, from)
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

/// A listing can go on behind each entry, and from the middle of one with the next.
fn assert_resumable(reader: TreeReader<'_>, directory: Nid, listed: &[DirEntry<'_>]) {
    for (at, entry) in listed.iter().enumerate() {
        assert!(entry.next_offset > 0);
        let rest = list(reader, directory, entry.next_offset);
        assert_eq!(rest, listed[at + 1..]);
    }
    assert_eq!(list(reader, directory, 1), listed[1..]);
    assert!(list(reader, directory, u64::MAX).is_empty());
}

/// Calls everything that a reader has on everything that can be reached; the first error ends it.
fn exercise(reader: TreeReader<'_>) -> Result<(), TreeError> {
    let mut pending = vec![reader.root()];
    let mut budget = 5_000;
    while let Some(nid) = pending.pop() {
        budget -= 1;
        if budget == 0 {
            return Ok(());
        }
        let view = reader.inode(nid)?;
        for xattr in reader.xattrs(nid)? {
            let (name, value) = xattr?;
            assert_eq!(reader.xattr(nid, &name.to_boxed())?, Some(value));
        }
        match view.file_type {
            FileType::Directory => {
                for entry in reader.read_dir(nid, 0)? {
                    let entry = entry?;
                    let found = reader.lookup(nid, entry.name)?;
                    assert_eq!(found, Some(entry.nid), "a listed name is found");
                    assert_eq!(reader.inode(entry.nid)?.file_type, entry.file_type);
                    if !matches!(entry.name, b"." | b"..") {
                        pending.push(entry.nid);
                    }
                }
            }
            FileType::Regular => {
                reader.run(nid)?;
            }
            FileType::Symlink => {
                reader.symlink(nid)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// As [`exercise`], for bytes that may be anything: only a panic is wrong.
fn prod(reader: TreeReader<'_>) {
    let mut pending = vec![reader.root()];
    for _ in 0..2_000 {
        let Some(nid) = pending.pop() else { break };
        let _ = reader.inode(nid);
        let _ = reader.run(nid);
        let _ = reader.symlink(nid);
        let _ = reader.xattr(nid, b"user.a");
        let _ = reader.lookup(nid, b"a");
        for from in [0, 7, 511, 512, u64::MAX] {
            let Ok(listing) = reader.read_dir(nid, from) else {
                continue;
            };
            pending.extend(
                listing
                    .filter_map(Result::ok)
                    .map(|entry| entry.nid)
                    .take(50),
            );
        }
    }
    let _ = dump(reader);
    let _ = to_tree(reader);
}

/// Repairs the superblock's checksum, which would otherwise hide what is behind it.
fn mend(image: &mut [u8]) {
    if let Some(block) = image.get_mut(1024..1536) {
        let checksum = sluice_blockindex::erofs::format::superblock_checksum(block);
        block[4..8].copy_from_slice(&checksum.to_le_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn an_image_says_what_the_tree_says(tree in trees::tree(true, 120)) {
        let image = image(&tree);
        let valid = validate(&image, TreeLimits::default()).unwrap();
        assert_same(&tree, valid.reader());
        exercise(valid.reader()).unwrap();
        let again = to_tree(valid.reader()).unwrap();
        prop_assert!(write_tree(&again, &[device()]).unwrap() == image, "read and written again");
    }

    #[test]
    fn flipped_bits_never_panic_and_valid_trees_can_be_read(
        tree in trees::tree(true, 40),
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0..8u32), 1..4),
        mended in proptest::bool::weighted(0.9),
    ) {
        let mut image = image(&tree);
        for (byte, bit) in flips {
            let at = 1024 + byte.index(image.len() - 1024);
            image[at] ^= 1 << bit;
        }
        if mended {
            mend(&mut image);
        }
        if let Ok(reader) = TreeReader::open(&image) {
            prod(reader);
        }
        if let Ok(valid) = validate(&image, TreeLimits::default()) {
            exercise(valid.reader()).unwrap();
            to_tree(valid.reader()).unwrap();
            dump(valid.reader()).unwrap();
        }
    }

    #[test]
    fn arbitrary_bytes_behind_a_superblock_never_panic(
        tail in proptest::collection::vec(any::<u8>(), 0..4096),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut image = image(&Tree::new());
        image.truncate(1024 + 128 + 128);
        image.extend(tail);
        image.resize((image.len() / 512 * 512).max(1536), 0);
        let blocks = u32::try_from(image.len() / 512).unwrap();
        image[1024 + 36..1024 + 40].copy_from_slice(&blocks.to_le_bytes());
        mend(&mut image);
        if let Ok(reader) = TreeReader::open(&image) {
            prod(reader);
        }
        let _ = check(&image);
        let _ = check(&image[..cut.index(image.len())]);
    }
}

#[test]
fn every_flipped_bit_of_a_small_image_is_harmless() {
    let mut tree = Tree::new();
    let mut file = Inode::new(InodeKind::Symlink(b"target".as_slice().into()));
    file.xattrs
        .insert(b"user.k".as_slice().into(), b"v".as_slice().into());
    let id = tree.insert_new(tree.root(), b"a", file).unwrap();
    tree.insert(tree.root(), b"b", id).unwrap();
    tree.insert_new(tree.root(), b"d", Inode::implicit_directory())
        .unwrap();
    let good = image(&tree);
    let (mut valid, mut refused) = (0, 0);
    for bit in 1024 * 8..good.len() * 8 {
        let mut image = good.clone();
        image[bit / 8] ^= 1 << (bit % 8);
        mend(&mut image);
        match validate(&image, TreeLimits::default()) {
            Ok(tree) => {
                valid += 1;
                exercise(tree.reader()).unwrap();
            }
            Err(_) => refused += 1,
        }
    }
    // Attributes and padding may be anything; structure may not.
    assert!(
        valid > 100 && refused > 500,
        "{valid} valid, {refused} refused"
    );
}

#[test]
fn fields_with_one_value_have_no_other() {
    let mut tree = Tree::new();
    tree.insert_new(tree.root(), b"a", Inode::whiteout())
        .unwrap();
    let good = image(&tree);
    let root = usize::from(u16::from_le_bytes([good[1038], good[1039]])) * 32;
    for (what, at) in [
        ("compatible features", 1024 + 8),
        ("block size", 1024 + 12),
        ("extension slots", 1024 + 13),
        ("time base", 1024 + 24),
        ("time base nanoseconds", 1024 + 32),
        ("first block of inodes", 1024 + 40),
        ("first block of shared xattrs", 1024 + 44),
        ("UUID", 1024 + 48),
        ("volume name", 1024 + 79),
        ("incompatible features", 1024 + 80),
        ("compression", 1024 + 84),
        ("place of the device table", 1024 + 88),
        ("reserved in the superblock", 1024 + 127),
        ("place in a single device", 1152 + 68),
        ("reserved in the device slot", 1152 + 127),
        ("reserved in an inode", root + 6),
        ("reserved at the end of an inode", root + 63),
    ] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        mend(&mut bad);
        assert!(check(&bad).is_err(), "{what}");
    }
    check(&good).unwrap();
}

#[test]
fn an_image_is_as_it_always_was() {
    let mut tree = Tree::new();
    let root = tree.root();
    let mut directory = Inode::new(InodeKind::Directory);
    directory.permissions = 0o1777;
    directory.mtime = Timestamp {
        seconds: -5,
        nanoseconds: 1,
    };
    let directory = tree.insert_new(root, b"a dir", directory).unwrap();
    tree.inode_mut(directory).set_opaque();
    let mut file = Inode::new(InodeKind::Regular {
        size_bytes: 1025,
        extent: Some(sluice_blockindex::tree::FileRun {
            device: 1,
            start_block: 3,
        }),
    });
    (file.uid, file.gid, file.permissions) = (1, 2, 0o4755);
    let file = tree.insert_new(directory, b"f", file).unwrap();
    tree.insert(root, b"z", file).unwrap();
    tree.insert_new(root, b"w", Inode::whiteout()).unwrap();
    let mut link = Inode::new(InodeKind::Symlink(b"a dir/f".as_slice().into()));
    link.permissions = 0o777;
    tree.insert_new(root, b"l", link).unwrap();
    let image = image(&tree);
    let text = dump(check(&image).unwrap()).unwrap();
    assert_eq!(
        text,
        r#"/ d 0755 0:0 @0.000000000 trusted.sluice.implicit="y"
/a\x20dir d 1777 0:0 @-5.000000001 trusted.overlay.opaque="y"
/a\x20dir/f f 4755 1:2 @0.000000000 1025 bytes at device 1 block 3
/l l 0777 0:0 @0.000000000 -> a\x20dir/f
/w c 0000 0:0 @0.000000000 0:0
/z = /a\x20dir/f
"#
    );
    let digest = sluice_blockindex::digest::BlobDigest::of(&image);
    assert_eq!(
        digest.hex(),
        "d327a201ef3f114ed9e73c030377e44ec24387848eae41fba1b46ef0b13df23a",
        "the writer makes other bytes than before"
    );
}

#[test]
fn large_directories_are_found_and_listed() {
    let mut tree = Tree::new();
    for number in 0..20_000u32 {
        let name = format!(
            "{:08x}-{}",
            number.wrapping_mul(2_654_435_761),
            "n".repeat((number % 90) as usize)
        );
        tree.insert_new(tree.root(), name.as_bytes(), Inode::new(InodeKind::Fifo))
            .unwrap();
    }
    let image = image(&tree);
    let reader = check(&image).unwrap();
    let listed = list(reader, reader.root(), 0);
    assert_eq!(listed.len(), 20_002);
    for name in tree.children(tree.root()).keys() {
        assert!(reader.lookup(reader.root(), name).unwrap().is_some());
        let mut other = name.to_vec();
        other.push(b'!');
        assert_eq!(reader.lookup(reader.root(), &other).unwrap(), None);
    }
    let middle = listed[9_999].next_offset;
    assert_eq!(list(reader, reader.root(), middle), listed[10_000..]);
}

#[test]
fn a_deep_path_is_written_to_the_limit_and_refused_beyond() {
    let mut tree = Tree::new();
    let mut at = tree.root();
    for _ in 0..2048 {
        at = tree
            .insert_new(at, b"d", Inode::implicit_directory())
            .unwrap();
    }
    let good = image(&tree);
    let reader = check(&good).unwrap();
    assert_eq!(dump(reader).unwrap().lines().count(), 2049);
    to_tree(reader).unwrap();
    tree.insert_new(at, b"d", Inode::implicit_directory())
        .unwrap();
    let error = write_tree(&tree, &[device()]).unwrap_err();
    assert!(
        matches!(
            error,
            WriteError::Inode {
                fault: InodeFault::Depth,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn what_cannot_be_written_is_refused_by_name() {
    let file = |size_bytes, extent| Inode::new(InodeKind::Regular { size_bytes, extent });
    let run = |device, start_block| {
        Some(sluice_blockindex::tree::FileRun {
            device,
            start_block,
        })
    };
    let with_xattr = |name: &[u8], bytes| {
        let mut inode = Inode::new(InodeKind::Fifo);
        inode.xattrs.insert(name.into(), vec![0; bytes].into());
        inode
    };
    let end = DEVICE_BLOCKS;
    let cases = [
        (file(1, None), InodeFault::NoRun(1)),
        (
            file(1, run(0, 0)),
            InodeFault::Run {
                device: 0,
                start_block: 0,
                blocks: 1,
            },
        ),
        (
            file(1, run(2, 0)),
            InodeFault::Run {
                device: 2,
                start_block: 0,
                blocks: 1,
            },
        ),
        (
            file(513, run(1, end - 1)),
            InodeFault::Run {
                device: 1,
                start_block: end - 1,
                blocks: 2,
            },
        ),
        (
            file(1, run(1, u64::MAX)),
            InodeFault::Run {
                device: 1,
                start_block: u64::MAX,
                blocks: 1,
            },
        ),
        (
            file((1 << 40) + 1, run(1, 0)),
            InodeFault::FileSize((1 << 40) + 1),
        ),
        (
            Inode::new(InodeKind::Symlink([].into())),
            InodeFault::SymlinkTarget(0),
        ),
        (
            Inode::new(InodeKind::Symlink(vec![b'x'; 4096].into())),
            InodeFault::SymlinkTarget(4096),
        ),
        (
            Inode::new(InodeKind::Symlink(b"a\0b".as_slice().into())),
            InodeFault::SymlinkTarget(3),
        ),
        (
            with_xattr(b"btrfs.compression", 1),
            InodeFault::XattrName(b"btrfs.compression".as_slice().into()),
        ),
        (
            with_xattr(b"system.nfs4_acl", 1),
            InodeFault::XattrName(b"system.nfs4_acl".as_slice().into()),
        ),
        (
            with_xattr(IMPLICIT_XATTR, 1),
            InodeFault::XattrReserved(IMPLICIT_XATTR.into()),
        ),
        (
            with_xattr(OPAQUE_XATTR, 1),
            InodeFault::XattrReserved(OPAQUE_XATTR.into()),
        ),
        (
            with_xattr(b"user.x", 65_536),
            InodeFault::XattrBytes(65_536),
        ),
        (
            Inode {
                permissions: 0o10_000,
                ..Inode::whiteout()
            },
            InodeFault::Permissions(0o10_000),
        ),
    ];
    for (inode, fault) in cases {
        let mut tree = Tree::new();
        let directory = tree
            .insert_new(tree.root(), b"d", Inode::implicit_directory())
            .unwrap();
        tree.insert_new(directory, b"n", inode).unwrap();
        let error = write_tree(&tree, &[device()]).unwrap_err();
        assert_eq!(
            error,
            WriteError::Inode {
                path: b"d/n".as_slice().into(),
                fault
            }
        );
    }
    let mut tree = Tree::new();
    let directory = tree
        .insert_new(tree.root(), b"d", Inode::implicit_directory())
        .unwrap();
    tree.insert(directory, b"again", directory).unwrap();
    let error = write_tree(&tree, &[device()]).unwrap_err();
    assert!(matches!(
        error,
        WriteError::Inode {
            fault: InodeFault::DirectoryLinked,
            ..
        }
    ));
}

#[test]
fn xattrs_up_to_the_limit_are_kept() {
    let mut tree = Tree::new();
    let mut inode = Inode::new(InodeKind::Fifo);
    for name in ["user.a", "user.b", "user.c"] {
        inode
            .xattrs
            .insert(name.as_bytes().into(), vec![7; 65_535].into());
    }
    let id = tree.insert_new(tree.root(), b"f", inode).unwrap();
    assert_same(&tree, check(&image(&tree)).unwrap());
    for name in ["user.d", "user.e"] {
        tree.inode_mut(id)
            .xattrs
            .insert(name.as_bytes().into(), vec![7; 65_535].into());
    }
    let error = write_tree(&tree, &[device()]).unwrap_err();
    assert!(
        matches!(
            error,
            WriteError::Inode {
                fault: InodeFault::XattrBytes(_),
                ..
            }
        ),
        "{error}"
    );
}

/// The image and the dump of the example in the format's description.
fn documented_example() -> (Vec<u8>, String) {
    let page = include_str!("../../docs/formats/erofs-tree.md");
    let example = page.split("## Example").nth(1).unwrap();
    let mut image = vec![0; 1536];
    let mut text = String::new();
    for line in example.lines().filter_map(|line| line.strip_prefix("    ")) {
        if line.starts_with('/') {
            text.push_str(line);
            text.push('\n');
            continue;
        }
        let (offset, digits) = line.split_once(": ").unwrap();
        let offset = usize::from_str_radix(offset, 16).unwrap();
        for (at, pair) in digits.split_whitespace().enumerate() {
            image[offset + at] = u8::from_str_radix(pair, 16).unwrap();
        }
    }
    (image, text)
}

#[test]
fn the_documented_example_is_what_we_write() {
    let mut tree = Tree::new();
    let root = tree.root();
    tree.inode_mut(root).implicit = false;
    let extent = Some(sluice_blockindex::tree::FileRun {
        device: 1,
        start_block: 1,
    });
    let mut file = Inode::new(InodeKind::Regular {
        size_bytes: 3,
        extent,
    });
    file.permissions = 0o644;
    file.mtime = Timestamp {
        seconds: 1_700_000_000,
        nanoseconds: 0,
    };
    file.xattrs
        .insert(b"user.k".as_slice().into(), b"v".as_slice().into());
    tree.insert_new(root, b"a", file).unwrap();
    let written = write_tree(
        &tree,
        &[DeviceSlot {
            tag: [b'0'; 64],
            blocks: 2,
        }],
    )
    .unwrap();
    let (documented, text) = documented_example();
    let lines = written
        .chunks(16)
        .enumerate()
        .filter(|(_, line)| line.iter().any(|b| *b != 0));
    let hex = lines.map(|(at, line)| {
        let bytes: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("    {:04x}: {}\n", at * 16, bytes.join(" "))
    });
    assert!(
        written == documented,
        "the example should be\n{}",
        hex.collect::<String>()
    );
    assert_eq!(dump(check(&documented).unwrap()).unwrap(), text);
}
