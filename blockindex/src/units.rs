// SPDX-License-Identifier: Apache-2.0
//! Sizes that the formats share.

/// Size of a device block in bytes: the tar block, which is also the smallest block that EROFS knows.
///
/// A file's content starts on such a block in a tar, so a tree can point straight into the tar.
pub const BLOCK_BYTES: u64 = 512;

/// Device bytes that the encoder aims to put into one chunk.
///
/// Larger chunks compress better and make a smaller index; smaller ones fetch less that nobody
/// reads. 128 KiB is also the largest read that the kernel sends to a FUSE server by default.
pub const CHUNK_TARGET_BYTES: u64 = 128 * 1024;

/// The most device bytes that a chunk may have; every decoder refuses more before it allocates.
pub const CHUNK_MAX_BYTES: u64 = 1024 * 1024;

/// The most blob bytes that a frame may have: an incompressible chunk and what zstd adds to it.
pub const FRAME_MAX_BYTES: u64 = CHUNK_MAX_BYTES + CHUNK_MAX_BYTES / 128 + 1024;

/// The most blob bytes that a frame of an unmodified blob may have: so much a reader of one chunk fetches
/// at most. Frames of 8 MiB of device, which some parallel compressors write, fit in.
pub const SPAN_FRAME_MAX_BYTES: u64 = 8 * 1024 * 1024;

/// The most device bytes that a frame of an unmodified blob may give: so much a reader of one chunk
/// decompresses at most. A deflate block of zeros is some 4 MiB with the encoders in use.
pub const SPAN_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// The most bytes of content that a chunk may have whose digest somebody else's table of contents pins: only
/// all of it can be verified. It is what the writers of eStargz cut large files into.
pub const TOC_CHUNK_MAX_BYTES: u64 = 4 * 1024 * 1024;

/// Rounds a byte count up to whole device blocks.
///
/// **Units**: bytes in, blocks out.
pub const fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

/// Rounds a byte offset up to the next block boundary; `None` when that exceeds `u64`.
pub const fn align_block(offset: u64) -> Option<u64> {
    offset.checked_next_multiple_of(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_round_up() {
        assert_eq!(blocks_for(0), 0);
        assert_eq!(blocks_for(1), 1);
        assert_eq!(blocks_for(512), 1);
        assert_eq!(blocks_for(513), 2);
        assert_eq!(align_block(513), Some(1024));
        assert_eq!(align_block(u64::MAX), None);
    }
}
