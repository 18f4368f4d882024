// SPDX-License-Identifier: Apache-2.0
//! Gzip layers as registries have them: read once from the front, and then again from restart points.
//!
//! A gzip blob is a sequence of members; a member is a header, a deflate stream and a trailer; a
//! deflate stream is a sequence of blocks that end at any bit. Decompression can begin at the first
//! byte of a member, or between two blocks if three things are known: how many bits of the byte before
//! belong to the next block, their value, and the **window**: up to 32 KiB of output before, which the
//! next block may copy from. Such a place is a restart point.
//!
//! [`scan`] walks over a whole blob and tells of such places; [`restart`] decompresses from one of
//! them; [`sparse`] finds out which bytes of a window are ever copied, since most are not.
//!
//! Accepted is what `gzip -d` accepts: any header fields, several members, and after the last member
//! anything at all, which is ignored. Unlike that program, and like Go's reader, a stream that copies
//! from before its member is refused.
//!
//! **Source**: RFC 1951, RFC 1952.

pub(crate) mod header;
pub(crate) mod inflate;
pub mod restart;
pub(crate) mod scan;
pub(crate) mod sparse;

/// The most bytes that a window has: no deflate stream copies from farther back.
pub const WINDOW_MAX_BYTES: usize = 32 * 1024;

/// First two bytes of every member.
pub(crate) const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Bytes of a member's trailer: crc32 and length.
pub(crate) const TRAILER_BYTES: usize = 8;

/// Bytes that are no gzip. Offsets count from the first byte that the reader was given: of the blob, or of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GzipError {
    /// A member's header that breaks the rules.
    #[error("gzip member at {offset}: {what}")]
    Header {
        /// First byte of the member.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A deflate stream that breaks the rules, or copies from before its window.
    #[error("invalid deflate stream at {offset}")]
    Deflate {
        /// Where it was noticed.
        offset: u64,
    },
    /// The trailer of a member names another crc32 or length than its content has.
    #[error("gzip member that ends at {offset}: wrong {what}")]
    Trailer {
        /// One past the trailer.
        offset: u64,
        /// What differs.
        what: &'static str,
    },
    /// It ends inside a member.
    #[error("gzip ends at {offset}, inside a member")]
    Truncated {
        /// How many bytes there are.
        offset: u64,
    },
}

/// Where a deflate block begins inside a byte: the last `count` bits of the byte before the block's
/// first whole one belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LeadingBits {
    count: u8,
    value: u8,
}

impl LeadingBits {
    /// `count` bits whose value is `value`; `None` when there are more than 7, or other bits are set.
    pub const fn new(count: u8, value: u8) -> Option<Self> {
        if count < 8 && value >> count == 0 {
            Some(Self { count, value })
        } else {
            None
        }
    }

    /// How many, 0 to 7.
    pub const fn count(self) -> u8 {
        self.count
    }

    /// Their value, below `1 << count`.
    pub const fn value(self) -> u8 {
        self.value
    }
}
