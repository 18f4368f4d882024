// SPDX-License-Identifier: Apache-2.0
//! Invariant: no frame makes the decoder panic or give anything but exactly the bytes that the chunk
//! map names; and what is encoded decodes to itself.
//!
//! The first two bytes say how many device bytes the map claims.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::chunkmap::{write_chunk_map, ChunkMap, ChunkRecord};
use sluice_blockindex::digest::{ChunkDigest, StrongAlgorithm};
use sluice_blockindex::frames::{decode_chunk, encode_chunk};

const ALGORITHM: StrongAlgorithm = StrongAlgorithm::Blake3;

fuzz_target!(|data: &[u8]| {
    let Some((claim, frame)) = data.split_first_chunk::<2>() else {
        return;
    };
    let record = ChunkRecord {
        ordinal: 0,
        device_bytes: u32::from(u16::from_le_bytes(*claim)),
        frame_bytes: u32::try_from(frame.len()).expect("inputs are small"),
        crc32: 0,
        digest: ChunkDigest([0; 32]),
    };
    if let Some(claimed) = chunk_map(record) {
        // The digest of nothing that exists: whatever decodes must be refused.
        decode_chunk(frame, &claimed.chunk(0).expect("one chunk")).expect_err("forged");
    }
    if !frame.is_empty() {
        let encoded = encode_chunk(0, frame, 3, ALGORITHM).expect("within the cap");
        let map = chunk_map(encoded.record).expect("what we encode is valid");
        let chunk = map.chunk(0).expect("one chunk");
        assert_eq!(decode_chunk(&encoded.frame, &chunk).expect("unchanged"), frame);
        // A frame of this chunk that differs must not pass unless it means the same.
        let mut damaged = encoded.frame.clone();
        let at = usize::from(claim[0]) % damaged.len();
        damaged[at] ^= claim[1] | 1;
        if let Ok(bytes) = decode_chunk(&damaged, &chunk) {
            assert_eq!(bytes, frame);
        }
    }
});

fn chunk_map(record: ChunkRecord) -> Option<ChunkMap> {
    ChunkMap::parse(write_chunk_map(ALGORITHM, &[record]).ok()?).ok()
}
