// SPDX-License-Identifier: Apache-2.0
//! An index that claims another layer's diff ID with its own bytes: whole, and a lie.

use sluice_blockindex::digest::DiffId;
use sluice_blockindex::erofs::format::{BLOCK_BYTES, SUPERBLOCK_OFFSET, superblock_checksum};
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, compress_index, decompress_index};

/// The file's header, and where the checksum of header and section table stands in it.
const HEADER_BYTES: usize = 64;
const HEADER_CRC: usize = 60;
const SECTION_BYTES: usize = 32;
const SECTION_CRC: usize = 24;
const SECTION_TREE: u32 = 1;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn place(bytes: &[u8], at: usize) -> usize {
    let value = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    usize::try_from(value).unwrap()
}

fn replace_all(bytes: &mut [u8], from: &[u8], to: &[u8]) -> usize {
    let mut replaced = 0;
    for at in 0..=bytes.len() - from.len() {
        if bytes[at..].starts_with(from) {
            bytes[at..at + to.len()].copy_from_slice(to);
            replaced += 1;
        }
    }
    replaced
}

/// The payload of an index, with `claimed` wherever it said `honest`, and every checksum right.
pub fn forge(payload: &[u8], honest: DiffId, claimed: DiffId) -> Vec<u8> {
    let mut file = decompress_index(payload, INDEX_FILE_MAX_BYTES).unwrap();
    let raw = replace_all(&mut file, honest.as_bytes(), claimed.as_bytes());
    let (from, to) = (honest.hex(), claimed.hex());
    let tags = replace_all(&mut file, from.as_bytes(), to.as_bytes());
    assert!(raw > 0 && tags > 0, "{raw} {tags}");
    let sections = usize::try_from(u32_at(&file, 12)).unwrap();
    for section in 0..sections {
        let entry = HEADER_BYTES + section * SECTION_BYTES;
        let (start, length) = (place(&file, entry + 8), place(&file, entry + 16));
        if u32_at(&file, entry) == SECTION_TREE {
            let block = start + SUPERBLOCK_OFFSET..start + SUPERBLOCK_OFFSET + BLOCK_BYTES;
            let sum = superblock_checksum(&file[block.clone()]);
            file[block.start + 4..block.start + 8].copy_from_slice(&sum.to_le_bytes());
        }
        let crc = crc32fast::hash(&file[start..start + length]);
        file[entry + SECTION_CRC..entry + SECTION_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    }
    let table = HEADER_BYTES + sections * SECTION_BYTES;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&file[..HEADER_CRC]);
    hasher.update(&file[HEADER_BYTES..table]);
    let crc = hasher.finalize().to_le_bytes();
    file[HEADER_CRC..HEADER_BYTES].copy_from_slice(&crc);
    compress_index(&file).unwrap()
}
