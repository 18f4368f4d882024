// SPDX-License-Identifier: Apache-2.0
//! Which chunks can be made of files that the node has: pure.

use sluice_blockindex::chunkmap::{Chunk, ChunkMap};
use sluice_blockindex::extent::{DeviceSpace, Extent};

/// The chunks all of whose bytes are known without fetching them: contents of files that have a copy, and, `between`
/// the files, what the skeleton has. Ascending; without those that are `present`.
///
/// `runs` are all file contents, in device order, and whether each has a copy.
pub(super) fn makeable(
    chunks: &ChunkMap,
    runs: impl Iterator<Item = (Extent<DeviceSpace>, bool)>,
    between: bool,
    present: impl Fn(u32) -> bool,
) -> Vec<u32> {
    let mut runs = runs.peekable();
    let mut found = Vec::new();
    for chunk in (0..chunks.count()).map_while(|ordinal| chunks.chunk(ordinal)) {
        let Some(wanted) = Extent::from_length(chunk.device.start(), chunk.content_bytes()) else {
            continue;
        };
        // A file of several chunks stays for the next one.
        while runs
            .next_if(|(run, _)| run.end() <= wanted.start())
            .is_some()
        {}
        let (mut known, mut copied, mut all) = (0, 0, true);
        while let Some((run, copy)) = runs.peek().copied() {
            let Some(part) = run.intersect(wanted).filter(|part| !part.is_empty()) else {
                break;
            };
            all &= copy;
            known += part.len();
            copied += if copy { part.len() } else { 0 };
            if run.end() > wanted.end() {
                break;
            }
            runs.next();
        }
        // What holds no file at all is as little as the skeleton that would bring it.
        let whole = all && copied > 0 && (between || known == wanted.len());
        if whole && !present(chunk.ordinal) {
            found.push(chunk.ordinal);
        }
    }
    found
}

/// Compressed bytes of these chunks; frames that several share count once for each that is begun.
pub(super) fn frame_bytes(chunks: &ChunkMap, ordinals: &[u32]) -> u64 {
    let mut last = None;
    let wanted = ordinals.iter().filter_map(|ordinal| chunks.chunk(*ordinal));
    wanted
        .filter(|chunk: &Chunk| last.replace(chunk.blob) != Some(chunk.blob))
        .map(|chunk| chunk.blob.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::TestLayer;

    fn run(start: u64, end: u64) -> Extent<DeviceSpace> {
        Extent::new(start, end).unwrap()
    }

    #[test]
    fn chunks_are_made_of_files_that_have_a_copy_and_of_what_stands_between() {
        let layer = TestLayer::even(1, 5, 1000);
        // Two in the first chunk, one over three chunks, and none in the last.
        let runs = [
            run(100, 300),
            run(500, 900),
            run(1500, 3200),
            run(3500, 3600),
        ];
        let cases: [(&[usize], bool, &[u32]); 9] = [
            (&[0, 1, 2, 3], true, &[0, 1, 2, 3]),
            (&[0, 1, 2, 3], false, &[2]),
            (&[0], true, &[]),
            (&[0, 1], true, &[0]),
            (&[2], true, &[1, 2]),
            (&[2], false, &[2]),
            (&[3], true, &[]),
            (&[2, 3], true, &[1, 2, 3]),
            (&[], true, &[]),
        ];
        for (copies, between, expected) in cases {
            let runs = runs.iter().enumerate();
            let runs = runs.map(|(at, run)| (*run, copies.contains(&at)));
            let found = makeable(&layer.chunks, runs, between, |_| false);
            assert_eq!(found, expected, "{copies:?} {between}");
        }
        let all = runs.iter().map(|run| (*run, true));
        let found = makeable(&layer.chunks, all, true, |chunk| chunk == 1);
        assert_eq!(found, [0, 2, 3]);
    }

    #[test]
    fn contents_that_end_where_chunks_do() {
        let layer = TestLayer::even(1, 3, 1000);
        let runs = [run(0, 1000), run(1000, 2000), run(2000, 3000)];
        for copy in 0..3 {
            let runs = runs.iter().enumerate().map(|(at, run)| (*run, at == copy));
            let found = makeable(&layer.chunks, runs, false, |_| false);
            assert_eq!(found, [u32::try_from(copy).unwrap()]);
        }
        assert!(frame_bytes(&layer.chunks, &[0, 2]) > 2000);
        assert_eq!(frame_bytes(&layer.chunks, &[]), 0);
    }
}
