// SPDX-License-Identifier: Apache-2.0
//! Invariant: no bytes make the chunk map's parser panic; where they parse, the chunks partition the
//! device, frames ascend inside the frame area (or are shared, in the map of an unmodified blob), and a
//! lookup of any range (its bounds are the first 16 bytes of the input) finds exactly the chunks that
//! a scan of all of them finds. Each gzip chunk has a restart point whose window lies inside its file.
//!
//! Where a map ends and the restart points begin, its own header says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_blockindex::chunkmap::{Chunk, ChunkMap, Codec, Restart, RestartState};
use sluice_blockindex::extent::Extent;

fuzz_target!(|data: &[u8]| {
    let Some((bounds, section)) = data.split_first_chunk::<16>() else {
        return;
    };
    if let Ok(map) = ChunkMap::parse(section.to_vec()) {
        check(&map, bounds, false);
    }
    let count =
        section.get(16..20).map_or(0, |it| u32::from_le_bytes(it.try_into().expect("four")));
    let end = usize::try_from(count).expect("64 bits").saturating_mul(64).saturating_add(32);
    let (section, restarts) = section.split_at(end.min(section.len()));
    if let Ok(map) = ChunkMap::parse_unmodified(section.to_vec(), restarts, WINDOWS_BYTES) {
        check(&map, bounds, true);
    }
});

const WINDOWS_BYTES: u64 = 1 << 20;

fn check(map: &ChunkMap, bounds: &[u8; 16], unmodified: bool) {
    let chunks: Vec<Chunk> = map.chunks().map(|chunk| chunk.expect("parsed")).collect();
    let (mut device, mut frames) = (0, 0);
    for chunk in &chunks {
        assert_eq!(chunk.device.start(), device);
        assert!(!chunk.device.is_empty());
        assert!(chunk.blob.start() >= frames || unmodified && chunk.skip_bytes > 0);
        assert!(unmodified || chunk.codec == Codec::Zstd);
        let restart = map.restart(chunk);
        assert_eq!(restart.is_some(), chunk.codec == Codec::Deflate);
        if let Some(Restart { state: RestartState::Block { window: Some(pin), .. }, .. }) = restart
        {
            assert!(pin.bytes <= 32 * 1024 && pin.extent.end() <= WINDOWS_BYTES);
        }
        let stream = map.stream_start(chunk.ordinal).is_some();
        assert_eq!(stream, !chunk.codec.is_random_access());
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
}
