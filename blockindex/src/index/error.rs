// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with an index.

use crate::chunkmap::ChunkMapError;
use crate::digest::BlobDigest;
use crate::erofs::TreeError;

/// Bytes of an index that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The payload is no single zstd frame that names its size.
    #[error("index payload is not one zstd frame with a size")]
    Payload,
    /// More decompressed bytes than the cap.
    #[error("index of {bytes} bytes, at most {cap} are accepted")]
    AboveCap {
        /// What the payload claims.
        bytes: u64,
        /// The cap.
        cap: u64,
    },
    /// zstd refused the payload.
    #[error("decompress index: {reason}")]
    Zstd {
        /// zstd's words.
        reason: String,
    },
    /// The magic is missing.
    #[error("not a layer index")]
    Magic,
    /// A version that this reader does not know.
    #[error("layer index of version {version}")]
    Version {
        /// The version.
        version: u32,
    },
    /// Features that a reader must know.
    #[error("layer index needs unknown features {features:#x}")]
    Features {
        /// Their bits.
        features: u64,
    },
    /// The file is not as long as its header says.
    #[error("layer index of {actual} bytes, want {expected}")]
    Length {
        /// What the header says.
        expected: u64,
        /// What there is.
        actual: u64,
    },
    /// Too many sections, or a section out of place.
    #[error("layer index: section {ordinal} at {offset}+{bytes} is out of place")]
    SectionPlace {
        /// Its place in the table.
        ordinal: u32,
        /// Its first byte.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// A section that is needed and missing, or there twice, or unknown and required.
    #[error("layer index: section {id} is missing, repeated or unknown")]
    Section {
        /// Its kind.
        id: u32,
    },
    /// A checksum does not match; `id` 0 is the header.
    #[error("layer index: section {id} has crc32 {actual:08x}, want {expected:08x}")]
    Crc32 {
        /// The section's kind.
        id: u32,
        /// What the table says.
        expected: u32,
        /// That of the bytes.
        actual: u32,
    },
    /// A reserved or padding byte is not zero.
    #[error("layer index: reserved byte set in {place}")]
    Reserved {
        /// Where.
        place: &'static str,
    },
    /// An unknown algorithm of strong digests.
    #[error("layer index: unknown strong digest algorithm {code}")]
    Algorithm {
        /// Its code.
        code: u8,
    },
    /// Two parts of the index contradict each other.
    #[error("layer index: parts disagree on {what}: {left} and {right}")]
    Disagree {
        /// On what.
        what: &'static str,
        /// What one says.
        left: u64,
        /// What the other says.
        right: u64,
    },
    /// The skeleton overlaps the frames, or runs backwards.
    #[error("layer index: skeleton at {start}+{bytes} is out of place")]
    Skeleton {
        /// Its first byte.
        start: u64,
        /// Its length.
        bytes: u64,
    },
    /// The index is of an unmodified blob where one of Sluice's own is wanted, or the other way round.
    #[error("layer index of {actual}, want one of {expected}")]
    Kind {
        /// What is wanted.
        expected: &'static str,
        /// What it is.
        actual: &'static str,
    },
    /// The index is of another blob.
    #[error("layer index of blob {actual}, want one of {expected}")]
    OtherBlob {
        /// The blob that it should be of.
        expected: BlobDigest,
        /// The blob that it names.
        actual: BlobDigest,
    },
    /// The file table is not as long as it says.
    #[error("layer index: file table of {actual} bytes, want {expected}")]
    FilesLength {
        /// What it says.
        expected: u64,
        /// What there is.
        actual: u64,
    },
    /// A content that is empty, off its block, out of order or outside the device.
    #[error("layer index: content {ordinal} at {start}+{bytes} is out of place")]
    FileContent {
        /// Its place in the table.
        ordinal: u32,
        /// Its first byte.
        start: u64,
        /// Its length.
        bytes: u64,
    },
    /// A file of the tree whose run is not in the file table, or there with another size.
    #[error("layer index: file at block {start_block} of {bytes} bytes has no digest")]
    FileDigest {
        /// First block of its run.
        start_block: u64,
        /// Its size.
        bytes: u64,
    },
    /// The chunk map breaks its rules.
    #[error("layer index: {0}")]
    ChunkMap(#[from] ChunkMapError),
    /// The tree breaks its rules.
    #[error("layer index: tree: {0}")]
    Tree(#[from] TreeError),
    /// More than 32-bit counts can hold.
    #[error("layer too large for an index")]
    TooLarge,
}

impl IndexError {
    /// Whether the layer has more of something than an index may have, though nothing is wrong.
    pub(crate) fn is_too_large(&self) -> bool {
        matches!(
            self,
            Self::AboveCap { .. }
                | Self::TooLarge
                | Self::ChunkMap(ChunkMapError::TooLarge)
                | Self::Tree(TreeError::Limit { .. })
        )
    }
}
