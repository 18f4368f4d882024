// SPDX-License-Identifier: Apache-2.0
//! Puts chunks together from pieces that come in device order: pure.

use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::extent::{DeviceSpace, Extent};

/// The chunk that is being put together.
#[derive(Debug)]
struct Present {
    chunk: Chunk,
    bytes: Vec<u8>,
    /// Bytes that have come.
    filled: u64,
}

/// Puts together the chunks that are wanted, one at a time, and gives them away. What does not become whole is
/// passed over.
#[derive(Debug)]
pub(super) struct Assembly<C> {
    wanted: C,
    present: Option<Present>,
}

impl<C: Iterator<Item = Chunk>> Assembly<C> {
    /// Of these chunks, ascending.
    pub(super) fn new(mut wanted: C) -> Self {
        let present = wanted.next().map(Present::new);
        Self { wanted, present }
    }

    /// Whether no chunk is wanted any more.
    pub(super) fn is_done(&self) -> bool {
        self.present.is_none()
    }

    /// Takes a piece of the device. `read` fills a part of it, counted from the piece's beginning, and says whether it
    /// could. `done` gets each chunk that is whole, and says whether to go on.
    ///
    /// Pieces come in device order and do not overlap.
    pub(super) fn piece(
        &mut self,
        extent: Extent<DeviceSpace>,
        mut read: impl FnMut(u64, &mut [u8]) -> bool,
        mut done: impl FnMut(&Chunk, &[u8]) -> bool,
    ) -> bool {
        while let Some(present) = &mut self.present {
            let content = present.content();
            if let Some(part) = content.intersect(extent)
                && !part.is_empty()
            {
                present.take(part, |buffer| read(part.start() - extent.start(), buffer));
            }
            if present.filled == content.len() {
                if !done(&present.chunk, &present.bytes) {
                    return false;
                }
            } else if content.end() > extent.end() {
                return true;
            }
            self.present = self.wanted.next().map(Present::new);
        }
        true
    }
}

impl Present {
    fn new(chunk: Chunk) -> Self {
        // A chunk has at most 4 MiB.
        let bytes = vec![0; usize::try_from(chunk.device.len()).unwrap_or(0)];
        Self {
            chunk,
            bytes,
            filled: 0,
        }
    }

    /// Its bytes without the padding, which is zeros.
    fn content(&self) -> Extent<DeviceSpace> {
        let (start, bytes) = (self.chunk.device.start(), self.chunk.content_bytes());
        Extent::from_length(start, bytes).unwrap_or(Extent::empty())
    }

    fn take(&mut self, part: Extent<DeviceSpace>, read: impl FnOnce(&mut [u8]) -> bool) {
        let place = |at: u64| usize::try_from(at - self.chunk.device.start()).unwrap_or(usize::MAX);
        let range = place(part.start())..place(part.end());
        if let Some(buffer) = self.bytes.get_mut(range)
            && read(buffer)
        {
            self.filled += part.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::TestLayer;
    use proptest::prelude::*;

    /// The chunks that come of pieces that end at `ends`, of which those at `lost` cannot be read.
    fn assemble(layer: &TestLayer, wanted: &[u32], ends: &[u64], lost: &[usize]) -> Vec<u32> {
        let chunks = wanted.iter().map(|at| layer.chunks.chunk(*at).unwrap());
        let mut assembly = Assembly::new(chunks);
        let (mut start, mut made) = (0, Vec::new());
        for (at, end) in ends.iter().enumerate() {
            let extent = Extent::new(start, *end).unwrap();
            let read = |offset: u64, buffer: &mut [u8]| {
                let from = usize::try_from(start + offset).unwrap();
                buffer.copy_from_slice(&layer.tar[from..from + buffer.len()]);
                !lost.contains(&at)
            };
            let done = |chunk: &Chunk, bytes: &[u8]| {
                assert_eq!(bytes, layer.bytes_of(chunk.ordinal));
                made.push(chunk.ordinal);
                true
            };
            assert!(assembly.piece(extent, read, done));
            start = *end;
        }
        made
    }

    #[test]
    fn chunks_are_whole_or_passed_over() {
        let layer = TestLayer::even(3, 4, 1000);
        // Wanted, where pieces end, which are lost, what becomes whole.
        type Case<'a> = (&'a [u32], &'a [u64], &'a [usize], &'a [u32]);
        let cases: [Case<'_>; 6] = [
            (&[0, 1, 2, 3], &[4000], &[], &[0, 1, 2, 3]),
            (
                &[0, 1, 2, 3],
                &[1, 999, 1000, 3999, 4000],
                &[],
                &[0, 1, 2, 3],
            ),
            (&[1, 3], &[500, 1500, 3500, 4000], &[], &[1, 3]),
            (&[1, 3], &[500, 1500, 3500, 4000], &[1], &[3]),
            (&[0, 1, 2, 3], &[1000, 2500, 4000], &[1], &[0, 3]),
            (&[], &[4000], &[], &[]),
        ];
        for (wanted, ends, lost, expected) in cases {
            assert_eq!(
                assemble(&layer, wanted, ends, lost),
                expected,
                "{wanted:?} {ends:?}"
            );
        }
    }

    #[test]
    fn it_stops_when_it_is_told_to() {
        let layer = TestLayer::even(3, 4, 1000);
        let mut assembly = Assembly::new((0..4).map_while(|at| layer.chunks.chunk(at)));
        let mut made = 0;
        let whole = Extent::new(0, 4000).unwrap();
        let went_on = assembly.piece(
            whole,
            |_, _| true,
            |_, _| {
                made += 1;
                made < 2
            },
        );
        assert!(!went_on && made == 2);
    }

    proptest! {
        #[test]
        fn any_pieces_make_the_chunks(
            lengths in prop::collection::vec(1_usize..400, 1..20),
            cuts in prop::collection::vec(1_u64..300, 1..60),
            mask in any::<u32>(),
        ) {
            let layer = TestLayer::new(5, &lengths);
            let total: usize = lengths.iter().sum();
            let total = u64::try_from(total).unwrap();
            let mut ends = Vec::new();
            let mut at = 0;
            for cut in cuts {
                at = (at + cut).min(total);
                ends.push(at);
            }
            ends.push(total);
            let wanted: Vec<u32> = (0..layer.chunks.count())
                .filter(|at| mask & (1 << (at % 32)) != 0)
                .collect();
            prop_assert_eq!(assemble(&layer, &wanted, &ends, &[]), wanted);
        }
    }
}
