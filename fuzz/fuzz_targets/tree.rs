// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the tree's validator or reader panic, overflow or run away; and where they
//! validate, everything that is reached from the root can be read, names are found again by lookup,
//! and the tree survives the way into memory and back.
//!
//! The superblock's checksum is put right first, or no mutation would get past it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::erofs::{
    format, to_tree, validate, write_tree, FileType, Nid, TreeLimits, TreeReader,
};

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if bytes.len() >= 1028 + 508 {
        let end = bytes.len().min(1024 + 512);
        let sum = format::superblock_checksum(&bytes[1024..end]);
        bytes[1028..1032].copy_from_slice(&sum.to_le_bytes());
    }
    if let Ok(reader) = TreeReader::open(&bytes) {
        poke(&reader);
    }
    let limits = TreeLimits { bytes: 1 << 20, inodes: 1 << 14, devices: 16 };
    let Ok(valid) = validate(&bytes, limits) else {
        return;
    };
    walk(&valid.reader());
    let tree = to_tree(valid.reader()).expect("validated");
    let devices: Vec<_> = valid.reader().devices().collect();
    if let Ok(again) = write_tree(&tree, &devices) {
        validate(&again, TreeLimits::default()).expect("what we write is valid");
    }
});

/// Reads what any caller could ask an unvalidated reader; each call ends, whatever it says.
fn poke(reader: &TreeReader<'_>) {
    let _ = reader.devices().count();
    for nid in [reader.root(), Nid(0), Nid(2), Nid(40), Nid(u64::MAX)] {
        let _ = reader.inode(nid);
        let _ = reader.symlink(nid);
        let _ = reader.run(nid);
        let _ = reader.lookup(nid, b"name");
        let _ = reader.xattr(nid, b"user.name");
        let _ = reader.xattrs(nid).map(|xattrs| xattrs.take(100).count());
        let _ = reader.read_dir(nid, 1).map(|entries| entries.take(100).count());
    }
}

fn walk(reader: &TreeReader<'_>) {
    let mut directories = vec![reader.root()];
    while let Some(directory) = directories.pop() {
        for entry in reader.read_dir(directory, 0).expect("validated") {
            let entry = entry.expect("validated");
            reader.inode(entry.nid).expect("validated");
            for xattr in reader.xattrs(entry.nid).expect("validated") {
                xattr.expect("validated");
            }
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let found = reader.lookup(directory, entry.name).expect("validated");
            assert_eq!(found, Some(entry.nid));
            match entry.file_type {
                FileType::Directory => directories.push(entry.nid),
                FileType::Regular => drop(reader.run(entry.nid).expect("validated")),
                FileType::Symlink => {
                    assert!(!reader.symlink(entry.nid).expect("validated").is_empty());
                }
                _ => {}
            }
        }
    }
}
