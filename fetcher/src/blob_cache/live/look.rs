// SPDX-License-Identifier: Apache-2.0
//! What a reader sees of a blob that is open.

use sluice_blockindex::digest::BlobDigest;

use super::super::pieces::{self, HELD_BACK_BYTES};
use super::super::record::OriginName;
use super::{Giver, Live, Phase, Piece, skipped};
use crate::source::SourceError;
use crate::store::lock;

/// What a reader may be shown before the blob is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Reading {
    /// All of it: the end of it comes when it is verified.
    Whole,
    /// A piece for another node, which verifies the whole: whatever is here.
    Any,
    /// A part: only what this origin gave.
    Part(OriginName),
}

impl Reading {
    fn shows(&self, giver: &Giver) -> bool {
        match (self, giver) {
            (Reading::Whole | Reading::Any, _) => true,
            (Reading::Part(mine), Giver::Origin(origin)) => mine == origin,
            (Reading::Part(_), _) => false,
        }
    }
}

/// What a reader can do next.
#[derive(Debug)]
pub(in super::super) enum Look {
    /// Bytes are here up to this offset.
    Ready(u64),
    /// This piece is missing; the last failure to fetch it, if there was one.
    Missing(u32, Option<SourceError>),
    /// It is on its way.
    Wait,
    /// The cache has nothing that this reader may be shown.
    Past,
    /// The blob is complete and wrong.
    Failed(BlobDigest),
}

impl Live {
    /// Whether a piece is here or on its way.
    pub(in super::super) fn has(&self, number: u32) -> bool {
        let state = lock(&self.state);
        let piece = usize::try_from(number).ok();
        let piece = piece.and_then(|at| state.pieces.get(at));
        state.phase == Phase::Whole
            || piece.is_some_and(|piece| !matches!(piece, Piece::Missing(_)))
    }

    /// Bytes of the extent that are here.
    pub(in super::super) fn here(&self, start: u64, end: u64) -> u64 {
        let state = lock(&self.state);
        if state.phase == Phase::Whole {
            return end - start;
        }
        let overlap = |(number, piece): (u32, &Piece)| match piece {
            Piece::Present(_) => {
                let extent = pieces::extent(self.size_bytes, number);
                let until = extent.end().min(end);
                until.saturating_sub(extent.start().max(start))
            }
            _ => 0,
        };
        (0..).zip(&state.pieces).map(overlap).sum()
    }

    /// How this range is read. One that ends with the blob is a read of all of it if what comes before is
    /// here or coming: somebody resumes.
    pub(in super::super) fn reading(&self, start: u64, end: u64, origin: OriginName) -> Reading {
        let state = lock(&self.state);
        let before = usize::try_from(start.div_ceil(pieces::PIECE_BYTES)).unwrap_or(usize::MAX);
        let mut before = state.pieces.iter().take(before);
        let complete = before.all(|piece| !matches!(piece, Piece::Missing(_)));
        if end == self.size_bytes && (start == 0 || complete) {
            Reading::Whole
        } else {
            Reading::Part(origin)
        }
    }

    /// What a reader at `at` of a range that ends at `end` can do.
    pub(in super::super) fn look(&self, at: u64, end: u64, reading: &Reading) -> Look {
        let state = lock(&self.state);
        match state.phase {
            Phase::Whole => return Look::Ready(end),
            Phase::Failed(actual) => return Look::Failed(actual),
            Phase::Broken => return Look::Past,
            Phase::Filling => {}
        }
        let mut to = at;
        for (number, piece) in (0..).zip(&state.pieces).skip(skipped(at)) {
            let extent = pieces::extent(self.size_bytes, number);
            if to >= end {
                break;
            }
            match piece {
                Piece::Present(giver) if reading.shows(giver) => {
                    to = extent.end();
                    continue;
                }
                Piece::Filling { have_bytes, giver } if reading.shows(giver) => {
                    to = to.max(extent.start() + have_bytes);
                }
                Piece::Missing(failure) if to == at => {
                    return Look::Missing(number, failure.clone());
                }
                Piece::Present(_) | Piece::Filling { .. } if to == at => return Look::Past,
                _ => {}
            }
            break;
        }
        let mut to = to.min(end);
        if *reading == Reading::Whole {
            to = to.min(self.size_bytes.saturating_sub(HELD_BACK_BYTES));
        }
        if to > at {
            return Look::Ready(to);
        }
        // Only the proof is wanting, or the rest of a piece: all pieces must come for it.
        let missing = (0..).zip(&state.pieces).find_map(|(number, piece)| {
            let Piece::Missing(failure) = piece else {
                return None;
            };
            (*reading == Reading::Whole && to == self.held_back_from())
                .then(|| Look::Missing(number, failure.clone()))
        });
        missing.unwrap_or(Look::Wait)
    }

    fn held_back_from(&self) -> u64 {
        self.size_bytes.saturating_sub(HELD_BACK_BYTES)
    }
}
