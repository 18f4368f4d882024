// SPDX-License-Identifier: Apache-2.0
//! Which range requests bring a set of chunks: pure.
//!
//! A request costs a round trip, a byte costs its share of the line. Chunks that are neighbours in the
//! blob come in one request, also over a small gap whose bytes are then thrown away, up to a cap.
//!
//! And [`FrameCutter`], which cuts the stream of a request into the frames of chunks.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::extent::{BlobSpace, Extent};

/// Where to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The most bytes between two chunks that are fetched and thrown away to save a request.
    pub(crate) gap_bytes: u64,
    /// The most bytes of the first request; chunks are never divided.
    pub(crate) first_bytes: u64,
    /// The most bytes of each further request.
    pub(crate) piece_bytes: u64,
}

/// So many bytes, but at least `least`, and never more than `most`, which an operator may have set below that.
pub(crate) fn between(bytes: u64, least: u64, most: u64) -> u64 {
    bytes.clamp(least.min(most), most)
}

/// One range request and the chunks that it is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// What is asked for.
    pub(crate) extent: Extent<BlobSpace>,
    /// The chunks wanted, in the order in which they arrive.
    pub(crate) chunks: Vec<u32>,
}

/// Puts chunks, ascending in the blob, into as few requests as `limits` allow and `apart` does not
/// forbid for two neighbours. Chunks of one frame always come together.
pub(crate) fn coalesce(
    chunks: impl Iterator<Item = Chunk>,
    limits: &Limits,
    apart: impl Fn(&Chunk, &Chunk) -> bool,
) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut last: Option<Chunk> = None;
    for chunk in chunks {
        let before = last.replace(chunk);
        let shared = before.is_some_and(|it| it.blob == chunk.blob);
        let divided = before.is_some_and(|it| apart(&it, &chunk));
        let cap = if pieces.len() < 2 {
            limits.first_bytes
        } else {
            limits.piece_bytes
        };
        match pieces.last_mut() {
            Some(piece)
                if shared
                    || !divided
                        && chunk.blob.start().saturating_sub(piece.extent.end())
                            <= limits.gap_bytes
                        && piece.extent.hull(chunk.blob).len() <= cap =>
            {
                piece.extent = piece.extent.hull(chunk.blob);
                piece.chunks.push(chunk.ordinal);
            }
            _ => pieces.push(Piece {
                extent: chunk.blob,
                chunks: vec![chunk.ordinal],
            }),
        }
    }
    pieces
}

/// A frame, and those of its chunks that are wanted: one or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CutFrame {
    /// Ascending. Several where they share the frame, in an unmodified blob.
    pub(crate) chunks: Vec<Chunk>,
    /// The frame.
    pub(crate) bytes: Bytes,
}

/// Cuts a stream of blob bytes into the frames of chunks.
///
/// Bytes between frames, and frames that are not wanted when they begin, are dropped as they pass:
/// it never holds more than one frame.
#[derive(Debug)]
pub(crate) struct FrameCutter {
    at: u64,
    chunks: VecDeque<Chunk>,
    frame: BytesMut,
    skipping: bool,
}

impl FrameCutter {
    /// A cutter for a stream that starts at `at`, for chunks that ascend in the blob.
    pub(crate) fn new(at: u64, chunks: impl Iterator<Item = Chunk>) -> Self {
        let chunks = chunks.skip_while(|chunk| chunk.blob.start() < at).collect();
        Self {
            at,
            chunks,
            frame: BytesMut::new(),
            skipping: false,
        }
    }

    /// Where the next byte lies in the blob.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Takes the next bytes and returns the frames that they complete.
    pub(crate) fn push(
        &mut self,
        mut bytes: Bytes,
        wanted: impl Fn(&Chunk) -> bool,
    ) -> Vec<CutFrame> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let Some(chunk) = self.chunks.front().copied() else {
                self.advance(bytes.len());
                break;
            };
            if self.at < chunk.blob.start() {
                let skipped = shorter(chunk.blob.start() - self.at, bytes.len());
                let _ = bytes.split_to(skipped);
                self.advance(skipped);
                continue;
            }
            if self.at == chunk.blob.start() {
                let any_wanted = self.sharing(chunk.blob).any(&wanted);
                self.skipping = !any_wanted;
            }
            let part = bytes.split_to(shorter(chunk.blob.end() - self.at, bytes.len()));
            self.advance(part.len());
            let ends = self.at == chunk.blob.end();
            let frame = match ends {
                _ if self.skipping => None,
                true if self.frame.is_empty() => Some(part),
                _ => {
                    self.frame.extend_from_slice(&part);
                    ends.then(|| self.frame.split().freeze())
                }
            };
            if ends {
                let count = self.sharing(chunk.blob).count();
                let chunks = self.chunks.drain(..count);
                if let Some(bytes) = frame {
                    // A chunk with a frame of its own was wanted when that began.
                    let wanted = chunks.filter(|chunk| count == 1 || wanted(chunk));
                    let chunks: Vec<Chunk> = wanted.collect();
                    if !chunks.is_empty() {
                        frames.push(CutFrame { chunks, bytes });
                    }
                }
            }
        }
        frames
    }

    /// The next chunks, as far as their frame is this one.
    fn sharing(&self, frame: Extent<BlobSpace>) -> impl Iterator<Item = &Chunk> {
        self.chunks
            .iter()
            .take_while(move |chunk| chunk.blob == frame)
    }

    fn advance(&mut self, bytes: usize) {
        self.at = self
            .at
            .saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

fn shorter(wanted: u64, there: usize) -> usize {
    usize::try_from(wanted).map_or(there, |wanted| wanted.min(there))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixture::TestLayer;

    fn blob(start: u64, end: u64) -> Extent<BlobSpace> {
        Extent::new(start, end).unwrap()
    }

    /// Chunks of a layer with these blob extents, which only need to ascend.
    fn chunks(extents: &[(u64, u64)]) -> Vec<Chunk> {
        let template = TestLayer::even(1, 1, 10).chunks.chunk(0).unwrap();
        let chunk = |(ordinal, (start, end)): (u32, &(u64, u64))| Chunk {
            ordinal,
            blob: blob(*start, *end),
            ..template
        };
        (0..).zip(extents).map(chunk).collect()
    }

    fn ordinals(found: &[CutFrame]) -> Vec<u32> {
        let chunks = found.iter().flat_map(|frame| &frame.chunks);
        chunks.map(|chunk| chunk.ordinal).collect()
    }

    #[test]
    fn neighbours_come_in_one_request() {
        let limits = Limits {
            gap_bytes: 5,
            first_bytes: 25,
            piece_bytes: 40,
        };
        type Case<'a> = (&'a [(u64, u64)], &'a [(u64, u64, &'a [u32])]);
        let cases: &[Case<'_>] = &[
            (&[], &[]),
            (&[(0, 10), (10, 20)], &[(0, 20, &[0, 1])]),
            (&[(0, 10), (15, 20)], &[(0, 20, &[0, 1])]),
            (&[(0, 10), (16, 20)], &[(0, 10, &[0]), (16, 20, &[1])]),
            (
                &[(0, 10), (10, 20), (20, 30)],
                &[(0, 20, &[0, 1]), (20, 30, &[2])],
            ),
            (&[(0, 100), (100, 110)], &[(0, 100, &[0]), (100, 110, &[1])]),
        ];
        for (extents, expected) in cases {
            let pieces = coalesce(chunks(extents).into_iter(), &limits, |_, _| false);
            let expected: Vec<Piece> = expected
                .iter()
                .map(|(start, end, chunks)| Piece {
                    extent: blob(*start, *end),
                    chunks: chunks.to_vec(),
                })
                .collect();
            assert_eq!(pieces, expected, "{extents:?}");
        }
    }

    #[test]
    fn frames_are_cut_wherever_the_bytes_break() {
        let layer = TestLayer::new(2, &[100, 3000, 1, 500]);
        let bytes = Bytes::from(layer.blob.clone());
        for size in [1, 7, 99, 1000, 10_000] {
            let mut cutter = FrameCutter::new(0, layer.chunks.chunks().flatten());
            let mut found = Vec::new();
            for at in (0..bytes.len()).step_by(size) {
                let part = bytes.slice(at..bytes.len().min(at + size));
                found.extend(cutter.push(part, |chunk| chunk.ordinal != 2));
            }
            assert_eq!(cutter.at(), bytes.len() as u64);
            assert_eq!(ordinals(&found), [0, 1, 3], "pieces of {size}");
            for CutFrame { chunks, bytes } in found {
                let device = sluice_blockindex::frames::decode_chunk(&bytes, &chunks[0]).unwrap();
                assert_eq!(device, layer.bytes_of(chunks[0].ordinal));
            }
        }
    }

    #[test]
    fn a_shared_frame_is_never_divided() {
        let limits = Limits {
            gap_bytes: 5,
            first_bytes: 4,
            piece_bytes: 4,
        };
        let extents = [(0, 10), (0, 10), (10, 12), (12, 30), (12, 30)];
        let pieces = coalesce(chunks(&extents).into_iter(), &limits, |_, _| true);
        let found: Vec<_> = pieces.iter().map(|it| it.chunks.clone()).collect();
        assert_eq!(found, [vec![0, 1], vec![2], vec![3, 4]]);
    }

    #[test]
    fn a_shared_frame_goes_to_each_chunk_that_wants_it() {
        let extents = [(0, 10), (0, 10), (0, 10), (12, 20), (12, 20), (20, 21)];
        let bytes = Bytes::from_iter(0..21_u8);
        let pieces = coalesce(
            chunks(&extents).into_iter(),
            &Limits {
                gap_bytes: 5,
                first_bytes: 10,
                piece_bytes: 10,
            },
            |_, _| false,
        );
        let asked: Vec<_> = pieces.iter().map(|piece| piece.extent).collect();
        assert_eq!(asked, [blob(0, 10), blob(12, 21)]);
        for size in [1, 4, 100] {
            for wants in [&[0, 1, 2, 3, 4, 5][..], &[1, 2, 5], &[2], &[4], &[]] {
                let mut cutter = FrameCutter::new(0, chunks(&extents).into_iter());
                let mut found = Vec::new();
                for at in (0..bytes.len()).step_by(size) {
                    let part = bytes.slice(at..bytes.len().min(at + size));
                    found.extend(cutter.push(part, |chunk| wants.contains(&chunk.ordinal)));
                }
                assert_eq!(ordinals(&found), wants, "pieces of {size}");
                let mut blobs: Vec<_> = found.iter().map(|it| it.chunks[0].blob).collect();
                blobs.dedup();
                assert_eq!(blobs.len(), found.len(), "each frame once");
                for frame in found {
                    assert!(
                        frame
                            .chunks
                            .iter()
                            .all(|it| it.blob == frame.chunks[0].blob)
                    );
                    let range = frame.chunks[0].blob.range();
                    let at = |offset| usize::try_from(offset).unwrap();
                    assert_eq!(frame.bytes, bytes[at(range.start)..at(range.end)]);
                }
            }
        }
    }

    #[test]
    fn a_stream_that_starts_later_has_only_whole_frames() {
        let layer = TestLayer::even(3, 4, 300);
        let second = layer.chunks.chunk(1).unwrap().blob.start();
        let mut cutter = FrameCutter::new(second - 1, layer.chunks.chunks().flatten());
        let from = usize::try_from(second - 1).unwrap();
        let found = cutter.push(Bytes::from(layer.blob[from..].to_vec()), |_| true);
        assert_eq!(ordinals(&found), [1, 2, 3]);
    }

    proptest! {
        /// Every chunk in exactly one piece, in order; pieces within their caps and without large gaps.
        #[test]
        fn pieces_cover_the_chunks(
            shape in prop::collection::vec((0_u64..30, 1_u64..60), 0..40),
            gap_bytes in 0_u64..20, first_bytes in 1_u64..100, piece_bytes in 1_u64..200,
        ) {
            let mut at = 0;
            let extents: Vec<(u64, u64)> = shape.iter().map(|(gap, len)| {
                let start = at + gap;
                at = start + len;
                (start, at)
            }).collect();
            let limits = Limits { gap_bytes, first_bytes, piece_bytes };
            let all = chunks(&extents);
            let pieces = coalesce(all.iter().copied(), &limits, |_, _| false);
            let covered: Vec<u32> = pieces.iter().flat_map(|piece| piece.chunks.clone()).collect();
            prop_assert_eq!(covered, (0..u32::try_from(all.len()).unwrap()).collect::<Vec<_>>());
            for (index, piece) in pieces.iter().enumerate() {
                let of = |ordinal: &u32| all[usize::try_from(*ordinal).unwrap()].blob;
                let cap = if index == 0 { first_bytes } else { piece_bytes };
                prop_assert!(piece.extent.len() <= cap || piece.chunks.len() == 1);
                prop_assert_eq!(piece.extent.start(), of(&piece.chunks[0]).start());
                prop_assert_eq!(piece.extent.end(), of(piece.chunks.last().unwrap()).end());
                for pair in piece.chunks.windows(2) {
                    prop_assert!(of(&pair[1]).start() - of(&pair[0]).end() <= gap_bytes);
                }
            }
        }
    }
}
