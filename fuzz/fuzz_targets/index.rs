// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make parsing or validation of a layer index panic, overflow or run away; and
//! where they validate, every read of the index succeeds and its parts agree: the chunks partition the
//! device, and each file of the tree has a content of its size at its run.
//!
//! The checksums of the input are put right first, or no mutation would get past them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::chunkmap::Codec;
use sluice_blockindex::erofs::{FileType, TreeReader};
use sluice_blockindex::index::{decompress_index, Index, UncheckedIndex};

fuzz_target!(|data: &[u8]| {
    let _ = decompress_index(data, 1 << 20);
    let mut bytes = data.to_vec();
    put_checksums_right(&mut bytes);
    for parse in [UncheckedIndex::parse, UncheckedIndex::parse_unmodified] {
        if let Ok(index) = parse(bytes.clone()).and_then(UncheckedIndex::reopen) {
            for chunk in index.chunk_map().chunks() {
                chunk.expect("reopened maps are checked");
            }
        }
        if let Ok(index) = parse(bytes.clone()).and_then(UncheckedIndex::validate) {
            read_everything(&index);
        }
    }
});

fn read_everything(index: &Index<Vec<u8>>) {
    let mut end = 0;
    for chunk in index.chunk_map().chunks() {
        let chunk = chunk.expect("validated");
        assert_eq!(chunk.device.start(), end);
        assert!(!chunk.device.is_empty());
        assert!(!chunk.blob.is_empty() || !chunk.codec.is_random_access());
        let restart = index.chunk_map().restart(&chunk);
        assert_eq!(restart.is_some(), chunk.codec == Codec::Deflate);
        if let Some(blob) = &index.metadata().unmodified {
            assert!(chunk.blob.end() <= blob.bytes);
        }
        assert_eq!(index.chunk_map().at(end), Some(chunk));
        end = chunk.device.end();
    }
    assert_eq!(end, index.device_bytes());
    let files = index.files().expect("validated");
    for content in files.contents() {
        assert!(content.run.end() <= end);
    }
    let tree = index.tree().expect("validated");
    let mut directories = vec![tree.root()];
    while let Some(directory) = directories.pop() {
        for entry in tree.read_dir(directory, 0).expect("validated") {
            let entry = entry.expect("validated");
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            match entry.file_type {
                FileType::Directory => directories.push(entry.nid),
                FileType::Regular => has_content(index, &tree, entry.nid),
                _ => {}
            }
        }
    }
}

fn has_content(index: &Index<Vec<u8>>, tree: &TreeReader<'_>, nid: sluice_blockindex::erofs::Nid) {
    let inode = tree.inode(nid).expect("validated");
    if let Some(run) = tree.run(nid).expect("validated") {
        let files = index.files().expect("validated");
        let content = files.at_block(run.start_block).expect("validated");
        assert_eq!(content.run.len(), inode.size_bytes);
    }
}

/// Length and checksums of header and sections, wherever the section table is readable.
fn put_checksums_right(bytes: &mut [u8]) {
    if bytes.len() < 64 {
        return;
    }
    let length = bytes.len() as u64;
    bytes[40..48].copy_from_slice(&length.to_le_bytes());
    let count = u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes")) as usize;
    let Some(table_end) = count.checked_mul(32).map(|n| n + 64).filter(|end| *end <= bytes.len())
    else {
        return;
    };
    for entry in (64..table_end).step_by(32) {
        let word = |at: usize| {
            u64::from_le_bytes(bytes[entry + at..entry + at + 8].try_into().expect("eight bytes"))
        };
        let start = usize::try_from(word(8)).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(word(16)).unwrap_or(usize::MAX));
        if let Some(section) = bytes.get(start..end) {
            let crc32 = crc32fast::hash(section);
            bytes[entry + 24..entry + 28].copy_from_slice(&crc32.to_le_bytes());
        }
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..60]);
    hasher.update(&bytes[64..table_end]);
    bytes[60..64].copy_from_slice(&hasher.finalize().to_le_bytes());
}
