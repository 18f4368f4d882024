// SPDX-License-Identifier: Apache-2.0
//! How a blob is cut into pieces. Pure.

use sluice_blockindex::digest::{BlobDigest, IndexDigest};
use sluice_blockindex::extent::{BlobSpace, Extent};

use crate::cluster::home::{self, PieceKey};

/// Bytes of a piece: as pieces of layers, so that homes are spread alike.
pub const PIECE_BYTES: u64 = home::PIECE_BYTES;

/// What a reader of a whole blob waits for until the blob is verified. A client cannot take a blob for
/// complete without its last byte; 64 KiB are one more read of the file.
pub const HELD_BACK_BYTES: u64 = 64 << 10;

/// A piece of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Which piece of it.
    pub number: u32,
}

impl Piece {
    /// The piece, if the blob has it.
    #[must_use]
    pub fn new(blob: BlobDigest, blob_bytes: u64, number: u32) -> Option<Self> {
        (number < count(blob_bytes)).then_some(Piece {
            blob,
            blob_bytes,
            number,
        })
    }

    /// Where it lies in the blob.
    #[must_use]
    pub fn extent(&self) -> Extent<BlobSpace> {
        extent(self.blob_bytes, self.number)
    }

    /// The name by which its home is found.
    #[must_use]
    pub fn key(&self) -> PieceKey {
        PieceKey {
            // Digests of different things: no index has the digest of a blob.
            index: IndexDigest::from_bytes(*self.blob.as_bytes()),
            number: self.number,
        }
    }
}

/// Pieces of a blob of this size.
pub(super) fn count(size_bytes: u64) -> u32 {
    u32::try_from(size_bytes.div_ceil(PIECE_BYTES)).unwrap_or(u32::MAX)
}

/// The piece that a byte is in.
pub(super) fn at(offset: u64) -> u32 {
    u32::try_from(offset / PIECE_BYTES).unwrap_or(u32::MAX)
}

/// Where a piece lies; cut at the end of the blob.
pub(super) fn extent(size_bytes: u64, number: u32) -> Extent<BlobSpace> {
    let start = (u64::from(number) * PIECE_BYTES).min(size_bytes);
    let end = (start + PIECE_BYTES).min(size_bytes);
    Extent::new(start, end).unwrap_or_else(Extent::empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_cut_without_gaps() {
        for (size, pieces) in [
            (0, 0),
            (1, 1),
            (PIECE_BYTES, 1),
            (PIECE_BYTES + 1, 2),
            (3 * PIECE_BYTES, 3),
        ] {
            assert_eq!(count(size), pieces, "{size}");
            let mut end = 0;
            for number in 0..pieces {
                let extent = extent(size, number);
                assert_eq!((extent.start(), extent.is_empty()), (end, false));
                assert_eq!(at(extent.start()), number);
                assert_eq!(at(extent.end() - 1), number);
                end = extent.end();
            }
            assert_eq!(end, size);
            let blob = BlobDigest::of(b"x");
            assert_eq!(Piece::new(blob, size, pieces), None);
        }
    }
}
