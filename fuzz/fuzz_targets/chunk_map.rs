// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the chunk map's parser panic; where they parse, the chunks partition the
//! device, frames ascend inside the frame area, and a lookup of any range (its bounds are the first 16
//! bytes of the input) finds exactly the chunks that a scan of all of them finds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::chunkmap::{Chunk, ChunkMap};
use sluice_blockindex::extent::Extent;

fuzz_target!(|data: &[u8]| {
    let Some((bounds, section)) = data.split_first_chunk::<16>() else {
        return;
    };
    let Ok(map) = ChunkMap::parse(section.to_vec()) else {
        return;
    };
    let chunks: Vec<Chunk> = map.chunks().map(|chunk| chunk.expect("parsed")).collect();
    let (mut device, mut frames) = (0, 0);
    for chunk in &chunks {
        assert_eq!(chunk.device.start(), device);
        assert!(chunk.blob.start() >= frames && !chunk.device.is_empty());
        (device, frames) = (chunk.device.end(), chunk.blob.end());
    }
    assert_eq!(device, map.device_bytes());
    assert!(frames <= map.frames_bytes());
    let word = |at: usize| u64::from_le_bytes(bounds[at..at + 8].try_into().expect("eight bytes"));
    for (start, length) in [(word(0), word(8)), (word(0) % (device + 1), word(8) % (device + 1))] {
        let Some(extent) = Extent::from_length(start, length) else {
            continue;
        };
        let expected: Vec<u32> = chunks
            .iter()
            .filter(|chunk| chunk.device.intersect(extent).is_some())
            .map(|chunk| chunk.ordinal)
            .collect();
        assert_eq!(map.covering(extent).collect::<Vec<_>>(), expected);
        assert_eq!(map.at(start).is_some(), start < device);
    }
});
