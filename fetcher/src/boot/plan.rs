// SPDX-License-Identifier: Apache-2.0
//! Which requests load a boot list: pure.
//!
//! A request for each chunk would cost a round trip each; requests in the order of the blob would bring
//! what is read first at the end. So the list is cut into turns of a few MiB in its own order; within
//! a turn neighbours in a blob come in one request, and requests go out in the order in which the first
//! of their chunks is read.

use std::collections::BTreeMap;

use sluice_blockindex::chunkmap::Chunk;

use crate::scheduler::{Limits, coalesce};

/// Compressed bytes of a turn: what a line of 100 Mbit/s carries in two thirds of a second, which is how
/// much later a chunk may come than if each had a request of its own. A larger turn saves requests.
const TURN_BYTES: u64 = 8 << 20;

/// A chunk of the list that is to be fetched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    pub(super) layer: usize,
    pub(super) chunk: Chunk,
}

/// One range request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) layer: usize,
    /// Ascending.
    pub(super) chunks: Vec<u32>,
}

/// The requests for `list`, the most urgent first. `apart` says of two neighbours in the blob of a layer
/// whether requests of their own are better, because different nodes are asked for them.
pub(super) fn burst(
    list: impl Iterator<Item = Listed>,
    limits: &Limits,
    apart: impl Fn(usize, &Chunk, &Chunk) -> bool,
) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut turn, mut bytes) = (Vec::new(), 0);
    for listed in list {
        bytes += listed.chunk.blob.len();
        turn.push(listed);
        if bytes >= TURN_BYTES {
            pieces.extend(requests(&turn, limits, &apart));
            (turn, bytes) = (Vec::new(), 0);
        }
    }
    pieces.extend(requests(&turn, limits, &apart));
    pieces
}

fn requests(
    turn: &[Listed],
    limits: &Limits,
    apart: &impl Fn(usize, &Chunk, &Chunk) -> bool,
) -> Vec<Piece> {
    let mut layers: BTreeMap<usize, BTreeMap<u32, (usize, Chunk)>> = BTreeMap::new();
    for (position, Listed { layer, chunk }) in turn.iter().enumerate() {
        let chunks = layers.entry(*layer).or_default();
        chunks.entry(chunk.ordinal).or_insert((position, *chunk));
    }
    let mut pieces = Vec::new();
    for (layer, chunks) in layers {
        let listed = chunks.values().map(|(_, chunk)| *chunk);
        for piece in coalesce(listed, limits, |left, right| apart(layer, left, right)) {
            let positions = piece.chunks.iter().filter_map(|chunk| chunks.get(chunk));
            let first = positions.map(|(position, _)| *position).min();
            let chunks = piece.chunks;
            pieces.push((first, Piece { layer, chunks }));
        }
    }
    pieces.sort_by_key(|(first, _)| *first);
    pieces.into_iter().map(|(_, piece)| piece).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixture::TestLayer;

    fn listed(layers: &[TestLayer], list: &[(usize, u32)]) -> Vec<Listed> {
        let chunk = |(layer, ordinal): &(usize, u32)| Listed {
            layer: *layer,
            chunk: layers[*layer].chunks.chunk(*ordinal).unwrap(),
        };
        list.iter().map(chunk).collect()
    }

    /// Room for two chunks of a thousand bytes, and a gap of one.
    const LIMITS: Limits = Limits {
        gap_bytes: 1100,
        first_bytes: 3500,
        piece_bytes: 3500,
    };

    #[test]
    fn neighbours_come_together_and_what_is_read_first_goes_first() {
        let layers = [TestLayer::even(1, 20, 1000), TestLayer::even(2, 20, 1000)];
        let list = [(1, 9), (0, 3), (0, 1), (1, 8), (0, 15), (1, 9), (0, 4)];
        let pieces = burst(listed(&layers, &list).into_iter(), &LIMITS, |_, _, _| false);
        let piece = |layer, chunks: &[u32]| Piece {
            layer,
            chunks: chunks.to_vec(),
        };
        let expected = [
            piece(1, &[8, 9]),
            // One, the gap and three fill it.
            piece(0, &[1, 3]),
            piece(0, &[15]),
            piece(0, &[4]),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn neighbours_of_different_homes_come_in_requests_of_their_own() {
        let layers = [TestLayer::even(6, 20, 1000)];
        let list = [(0, 4), (0, 5), (0, 6)];
        let apart = |layer, left: &Chunk, right: &Chunk| {
            assert_eq!((layer, left.ordinal + 1), (0, right.ordinal));
            right.ordinal == 6
        };
        let pieces = burst(listed(&layers, &list).into_iter(), &LIMITS, apart);
        let chunks: Vec<&[u32]> = pieces.iter().map(|piece| &piece.chunks[..]).collect();
        assert_eq!(chunks, [&[4, 5][..], &[6]]);
    }

    #[test]
    fn a_long_list_keeps_its_order_in_turns() {
        const MIB: usize = 1 << 20;
        let layer = TestLayer::even(3, 20, MIB);
        // Backwards: without turns all would come in one request, with the first chunk at its end.
        let list: Vec<(usize, u32)> = (0..20).rev().map(|chunk| (0, chunk)).collect();
        let limits = Limits {
            gap_bytes: 0,
            first_bytes: u64::MAX,
            piece_bytes: u64::MAX,
        };
        let pieces = burst(listed(&[layer], &list).into_iter(), &limits, |_, _, _| {
            false
        });
        let firsts: Vec<u32> = pieces.iter().map(|piece| piece.chunks[0]).collect();
        assert_eq!(firsts, [12, 4, 0]);
    }

    proptest! {
        /// Each chunk of the list in exactly one request, whatever the order.
        #[test]
        fn every_chunk_is_asked_for_once(list in prop::collection::vec((0_usize..2, 0_u32..30), 0..80)) {
            let layers = [TestLayer::even(4, 30, 700), TestLayer::even(5, 30, 700)];
            let pieces = burst(listed(&layers, &list).into_iter(), &LIMITS, |_, _, _| false);
            let mut asked: Vec<(usize, u32)> = Vec::new();
            for piece in &pieces {
                prop_assert!(piece.chunks.is_sorted());
                asked.extend(piece.chunks.iter().map(|chunk| (piece.layer, *chunk)));
            }
            asked.sort_unstable();
            let mut wanted = list;
            wanted.sort_unstable();
            wanted.dedup();
            prop_assert_eq!(asked, wanted);
        }
    }
}
