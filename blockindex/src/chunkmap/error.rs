// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with a chunk map.

/// A chunk map that breaks its own rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkMapError {
    /// The section is not as long as its header says.
    #[error("chunk map of {actual} bytes, want {expected}")]
    Length {
        /// Bytes that the header asks for.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// An algorithm of strong digests that this version does not know.
    #[error("unknown strong digest algorithm {code}")]
    Algorithm {
        /// The code as read.
        code: u8,
    },
    /// A reserved byte is not zero.
    #[error("reserved byte set in chunk map, chunk {ordinal:?}")]
    Reserved {
        /// The chunk, or none for the header.
        ordinal: Option<u32>,
    },
    /// A codec that this version does not know.
    #[error("chunk {ordinal} has unknown codec {code}")]
    Codec {
        /// The chunk.
        ordinal: u32,
        /// The code as read.
        code: u8,
    },
    /// The device range of a chunk is empty, too long, or does not follow the one before.
    #[error("chunk {ordinal} has device range {start}..{end}")]
    Device {
        /// The chunk.
        ordinal: u32,
        /// Its first byte.
        start: u64,
        /// One past its last byte.
        end: u64,
    },
    /// The frame of a chunk is empty, too long, overlaps the one before (and is not the same), or leaves
    /// the frame area.
    #[error("chunk {ordinal} has frame {start}+{bytes}, frames end at {limit}")]
    Frame {
        /// The chunk.
        ordinal: u32,
        /// First byte of its frame.
        start: u64,
        /// Bytes of its frame.
        bytes: u64,
        /// Where the frame area ends.
        limit: u64,
    },
    /// A chunk that continues a frame which it cannot continue.
    #[error("chunk {ordinal} cannot begin {skip_bytes} bytes after its frame")]
    Skip {
        /// The chunk.
        ordinal: u32,
        /// Bytes that its frame has before it.
        skip_bytes: u64,
    },
    /// Restart points are not exactly those of the frames that need one.
    #[error("{actual} restart points, want {expected}")]
    Restarts {
        /// Frames that need one.
        expected: u64,
        /// Points there are.
        actual: u64,
    },
    /// A restart point of another frame, or whose state or window breaks the rules.
    #[error("restart point {ordinal}: {what}")]
    Restart {
        /// Its place in the table.
        ordinal: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// A device with bytes but without chunks.
    #[error("no chunk for a device of {device_bytes} bytes")]
    Uncovered {
        /// Bytes of the device.
        device_bytes: u64,
    },
    /// More chunks than 32-bit ordinals, or an address above 64 bits.
    #[error("layer too large for a chunk map")]
    TooLarge,
}
