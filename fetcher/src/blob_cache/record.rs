// SPDX-License-Identifier: Apache-2.0
//! The record of a blob that is not whole yet: which pieces are here, and their checksums.
//! `docs/formats/blob-cache.md` has the table. Pure.

use sha2::{Digest as _, Sha256};

use super::pieces;

/// Magic at the beginning.
pub(super) const MAGIC: &[u8; 8] = b"SLUICEBP";
/// The only version.
const VERSION: u32 = 1;
/// Bytes before the entries: magic, version, piece size, blob size, zeros.
pub(super) const HEADER_BYTES: usize = 32;
/// Bytes of an entry: state, crc32, zeros, the origin's name.
pub(super) const ENTRY_BYTES: usize = 32;
/// The state of a piece that is here.
const PRESENT: u32 = 1;
/// The largest blob that is kept: what a record of 32 MiB describes.
const BLOB_MAX_BYTES: u64 = 1 << 41;

/// Whose bytes a piece has: a hash of the registry's and the repository's name, all zeros for bytes that no
/// registry of our own choice gave.
pub(super) type OriginName = [u8; 16];
/// Nobody's.
pub(super) const NO_ORIGIN: OriginName = [0; 16];

/// The name of an origin in records.
pub(super) fn origin_name(label: &str) -> OriginName {
    let digest = Sha256::digest(label.as_bytes());
    let mut name = NO_ORIGIN;
    name.copy_from_slice(&digest[..16]);
    name
}

/// A piece that is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Here {
    pub(super) crc: u32,
    pub(super) origin: OriginName,
}

/// A record as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Size of the blob.
    pub(super) size_bytes: u64,
    /// Each piece, if it is here.
    pub(super) pieces: Vec<Option<Here>>,
}

/// Whether a blob of this size can be kept.
pub(super) fn fits(size_bytes: u64) -> bool {
    size_bytes > 0 && size_bytes <= BLOB_MAX_BYTES
}

/// Bytes of the record of a blob of this size.
fn record_bytes(size_bytes: u64) -> usize {
    let entries = usize::try_from(pieces::count(size_bytes)).unwrap_or(usize::MAX);
    HEADER_BYTES.saturating_add(entries.saturating_mul(ENTRY_BYTES))
}

/// The record of a blob of which nothing is here.
pub(super) fn empty(size_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; record_bytes(size_bytes)];
    let piece_bytes = u32::try_from(pieces::PIECE_BYTES).unwrap_or(0);
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&piece_bytes.to_le_bytes());
    bytes[16..24].copy_from_slice(&size_bytes.to_le_bytes());
    bytes
}

/// Where the entry of a piece stands, and what it is when the piece is here.
pub(super) fn entry(number: u32, here: &Here) -> (u64, [u8; ENTRY_BYTES]) {
    let at = HEADER_BYTES as u64 + u64::from(number) * ENTRY_BYTES as u64;
    let mut bytes = [0; ENTRY_BYTES];
    bytes[..4].copy_from_slice(&PRESENT.to_le_bytes());
    bytes[4..8].copy_from_slice(&here.crc.to_le_bytes());
    bytes[16..].copy_from_slice(&here.origin);
    (at, bytes)
}

/// Reads a record; `None` where it is none, or of another version or piece size.
pub(super) fn parse(bytes: &[u8]) -> Option<Record> {
    let word = |at: usize| -> Option<u32> {
        let word: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(word))
    };
    let size_bytes = u64::from_le_bytes(bytes.get(16..24)?.try_into().ok()?);
    let piece_bytes = u64::from(word(12)?);
    let known = bytes.get(..8)? == MAGIC && word(8)? == VERSION;
    if !known || piece_bytes != pieces::PIECE_BYTES || !fits(size_bytes) {
        return None;
    }
    if bytes.len() != record_bytes(size_bytes) {
        return None;
    }
    let entries = bytes.get(HEADER_BYTES..)?.chunks_exact(ENTRY_BYTES);
    let piece = |entry: &[u8]| -> Option<Here> {
        let state = u32::from_le_bytes(entry[..4].try_into().ok()?);
        let crc = u32::from_le_bytes(entry[4..8].try_into().ok()?);
        let origin = entry[16..].try_into().ok()?;
        (state == PRESENT).then_some(Here { crc, origin })
    };
    Some(Record {
        size_bytes,
        pieces: entries.map(piece).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of `docs/formats/blob-cache.md`.
    const EXAMPLE: &str = "534c554943454250 01000000 00002000 0100200000000000 0000000000000000 \
                           01000000 78563412 0000000000000000 000102030405060708090a0b0c0d0e0f \
                           00000000 00000000 0000000000000000 00000000000000000000000000000000";

    #[test]
    fn the_documented_example_reads_and_writes() {
        let size = pieces::PIECE_BYTES + 1;
        let bytes = hex::decode(EXAMPLE.replace(' ', "")).unwrap();
        let record = parse(&bytes).unwrap();
        let here = Here {
            crc: 0x1234_5678,
            origin: std::array::from_fn(|at| u8::try_from(at).unwrap()),
        };
        assert_eq!(
            record,
            Record {
                size_bytes: size,
                pieces: vec![Some(here), None]
            }
        );
        let mut made = empty(size);
        let (at, entry) = entry(0, &here);
        let at = usize::try_from(at).unwrap();
        made[at..at + ENTRY_BYTES].copy_from_slice(&entry);
        assert_eq!(made, bytes);
    }

    #[test]
    fn damaged_records_are_none() {
        let good = empty(3 * pieces::PIECE_BYTES);
        assert!(parse(&good).is_some());
        for (at, value) in [(0, 0), (8, 2), (12, 1), (16, 1), (23, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(parse(&bad), None, "byte {at}");
        }
        for length in 0..good.len() {
            assert_eq!(parse(&good[..length]), None, "{length}");
        }
    }
}
