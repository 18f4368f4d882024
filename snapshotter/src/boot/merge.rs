// SPDX-License-Identifier: Apache-2.0
//! One list of several: pure.
//!
//! A chunk is in the merged list when the lists that have it weigh at least half of all, so that what
//! only one start of many read (another command, another configuration) falls out. It stands where it
//! stood in the middle one of these lists, by weight.

use std::collections::HashMap;

use sluice_blockindex::boot::{BOOT_CHUNKS_MAX, BootChunk, BootList};

/// Merges lists of one run, each with its weight. At most [`BOOT_CHUNKS_MAX`] chunks, the first ones.
pub(super) fn merge(lists: &[(u32, &BootList)]) -> Vec<BootChunk> {
    let total: u32 = lists.iter().map(|(weight, _)| *weight).sum();
    let mut places: HashMap<BootChunk, Vec<(usize, u32)>> = HashMap::new();
    for (weight, list) in lists {
        for (position, chunk) in list.chunks().iter().enumerate() {
            places.entry(*chunk).or_default().push((position, *weight));
        }
    }
    let mut merged: Vec<(usize, BootChunk)> = places
        .into_iter()
        .filter_map(|(chunk, mut places)| {
            let weight: u32 = places.iter().map(|(_, weight)| weight).sum();
            if weight.saturating_mul(2) < total {
                return None;
            }
            places.sort_unstable();
            let mut below = 0;
            let middle = places.iter().find(|(_, of_this)| {
                below += of_this;
                below * 2 >= weight
            });
            middle.map(|(position, _)| (*position, chunk))
        })
        .collect();
    merged.sort_unstable();
    merged.truncate(BOOT_CHUNKS_MAX);
    merged.into_iter().map(|(_, chunk)| chunk).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sluice_blockindex::digest::IndexDigest;

    use super::*;

    fn list(chunks: &[u32]) -> BootList {
        let chunks = chunks.iter().map(|chunk| BootChunk {
            layer: 0,
            chunk: *chunk,
        });
        BootList::new(vec![IndexDigest::of(b"i")], chunks.collect()).unwrap()
    }

    fn merged(lists: &[(u32, &[u32])]) -> Vec<u32> {
        let lists: Vec<(u32, BootList)> = lists
            .iter()
            .map(|(weight, chunks)| (*weight, list(chunks)))
            .collect();
        let lists: Vec<(u32, &BootList)> = lists.iter().map(|(w, list)| (*w, list)).collect();
        merge(&lists).into_iter().map(|at| at.chunk).collect()
    }

    #[test]
    fn what_half_of_the_starts_read_is_kept_in_the_middle_order() {
        type Case<'a> = (&'a [(u32, &'a [u32])], &'a [u32]);
        let cases: &[Case<'_>] = &[
            (&[], &[]),
            (&[(2, &[5, 3, 9])], &[5, 3, 9]),
            // One of three is not half, one of two is.
            (&[(2, &[1, 2]), (2, &[1, 2]), (2, &[1, 7])], &[1, 2]),
            (&[(2, &[1, 2]), (2, &[1, 7])], &[1, 2, 7]),
            // Positions of 4: 2, 0, 2; of 5: 1, 2, 0.
            (
                &[(2, &[3, 5, 4]), (2, &[4, 3, 5]), (2, &[5, 3, 4])],
                &[3, 5, 4],
            ),
            // Another node's list is outvoted by one start here, and is all there is without.
            (&[(1, &[8, 9])], &[8, 9]),
            (&[(2, &[1]), (1, &[8, 1])], &[1]),
        ];
        for (lists, expected) in cases {
            assert_eq!(&merged(lists), expected, "{lists:?}");
        }
    }

    proptest! {
        /// Against the words of the rule, chunk by chunk.
        #[test]
        fn merging_is_what_the_rule_says(
            lists in prop::collection::vec((1_u32..3, prop::collection::vec(0_u32..12, 0..12)), 0..6),
        ) {
            let lists: Vec<(u32, Vec<u32>)> = lists.into_iter().map(|(weight, chunks)| {
                let mut unique: Vec<u32> = Vec::new();
                for chunk in chunks {
                    if !unique.contains(&chunk) {
                        unique.push(chunk);
                    }
                }
                (weight, unique)
            }).collect();
            let borrowed: Vec<(u32, &[u32])> = lists.iter().map(|(w, chunks)| (*w, chunks.as_slice())).collect();
            let got = merged(&borrowed);
            let all: u32 = lists.iter().map(|(weight, _)| weight).sum();
            let mut expected: Vec<(usize, u32)> = Vec::new();
            for chunk in 0..12 {
                // Each list's position as often as the list weighs.
                let mut positions: Vec<usize> = Vec::new();
                for (weight, chunks) in &lists {
                    if let Some(at) = chunks.iter().position(|it| *it == chunk) {
                        positions.extend((0..*weight).map(|_| at));
                    }
                }
                if !positions.is_empty() && positions.len() * 2 >= all as usize {
                    positions.sort_unstable();
                    expected.push((positions[(positions.len() - 1) / 2], chunk));
                }
            }
            expected.sort_unstable();
            let expected: Vec<u32> = expected.into_iter().map(|(_, chunk)| chunk).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
