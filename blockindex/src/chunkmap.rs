// SPDX-License-Identifier: Apache-2.0
//! Chunk map: which frame of the blob holds which bytes of the layer device.
//!
//! The section is a header and one fixed-size record per chunk, in ascending device order. A record
//! holds where its chunk starts; the chunk ends where the next one starts, the last one at the
//! device's end. So the chunks partition the device by construction, once the starts ascend.
//!
//! [`ChunkMap`] reads the records where they lie (a `Vec` or a mapped file) and can be cloned
//! cheaply. A map that comes from [`crate::index::Index`] is validated: starts ascend from 0, no
//! chunk is empty or above the cap, frames ascend without overlap inside the frame area.
//!
//! The byte table is in `docs/formats/layer-index.md`.

use std::fmt;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::digest::{ChunkDigest, DIGEST_BYTES, StrongAlgorithm};
use crate::extent::{BlobSpace, DeviceSpace, Extent};
use crate::units::{CHUNK_MAX_BYTES, FRAME_MAX_BYTES};

/// First bytes of the section.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    device_bytes: U64,
    frames_bytes: U64,
    chunk_count: U32,
    algorithm: u8,
    reserved: [u8; 11],
}

/// One chunk.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChunk {
    device_start: U64,
    frame_start: U64,
    frame_bytes: U32,
    crc32: U32,
    codec: u8,
    reserved: [u8; 7],
    digest: [u8; DIGEST_BYTES],
}

const _: () = assert!(size_of::<RawHeader>() == 32);
const _: () = assert!(offset_of!(RawHeader, chunk_count) == 16);
const _: () = assert!(offset_of!(RawHeader, algorithm) == 20);
const _: () = assert!(size_of::<RawChunk>() == 64);
const _: () = assert!(offset_of!(RawChunk, frame_bytes) == 16);
const _: () = assert!(offset_of!(RawChunk, codec) == 24);
const _: () = assert!(offset_of!(RawChunk, digest) == 32);

/// How a frame becomes the chunk's device bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// One zstd frame that names its content size.
    Zstd,
}

impl Codec {
    /// What the record holds for it.
    pub const fn code(self) -> u8 {
        match self {
            Self::Zstd => 1,
        }
    }

    /// Reads what [`Self::code`] writes.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// One chunk: all that is needed to fetch, decode and verify it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Chunk {
    /// Its place in the map, from 0.
    pub ordinal: u32,
    /// The device bytes that it holds.
    pub device: Extent<DeviceSpace>,
    /// Its frame in the blob.
    pub blob: Extent<BlobSpace>,
    /// How the frame becomes the device bytes.
    pub codec: Codec,
    /// CRC-32 (IEEE) of the device bytes.
    pub crc32: u32,
    /// Algorithm of `digest`.
    pub algorithm: StrongAlgorithm,
    /// Strong digest of the device bytes.
    pub digest: ChunkDigest,
}

/// What the map's writer knows of a chunk; its device start follows from those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Its place in the map, from 0.
    pub ordinal: u32,
    /// Bytes of the device that it holds.
    pub device_bytes: u32,
    /// Bytes of its frame.
    pub frame_bytes: u32,
    /// CRC-32 (IEEE) of the device bytes.
    pub crc32: u32,
    /// Strong digest of the device bytes.
    pub digest: ChunkDigest,
}

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
    /// The frame of a chunk is empty, too long, overlaps the one before or leaves the frame area.
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

/// A validated chunk map, read in place.
#[derive(Clone)]
pub struct ChunkMap {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    records: Range<usize>,
    count: u32,
    algorithm: StrongAlgorithm,
    device_bytes: u64,
    frames_bytes: u64,
}

impl ChunkMap {
    /// Reads and validates the section that is the whole of `bytes`.
    ///
    /// **Errors**: any rule that the section breaks.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, ChunkMapError> {
        let range = 0..bytes.len();
        Self::parse_in(Arc::new(bytes), range)
    }

    /// Reads and validates the section at `range` of `bytes`. Costs one pass over the records.
    pub(crate) fn parse_in(
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
    ) -> Result<Self, ChunkMapError> {
        let all = (*bytes).as_ref();
        let section = all.get(range.clone()).ok_or(ChunkMapError::Length {
            expected: range.end as u64,
            actual: all.len() as u64,
        })?;
        let (header, rest) =
            RawHeader::ref_from_prefix(section).map_err(|_| ChunkMapError::Length {
                expected: size_of::<RawHeader>() as u64,
                actual: section.len() as u64,
            })?;
        let count = header.chunk_count.get();
        let expected = u64::from(count) * size_of::<RawChunk>() as u64;
        if rest.len() as u64 != expected {
            return Err(ChunkMapError::Length {
                expected: expected + size_of::<RawHeader>() as u64,
                actual: section.len() as u64,
            });
        }
        let algorithm =
            StrongAlgorithm::from_code(header.algorithm).ok_or(ChunkMapError::Algorithm {
                code: header.algorithm,
            })?;
        if header.reserved != [0; 11] {
            return Err(ChunkMapError::Reserved { ordinal: None });
        }
        let (device_bytes, frames_bytes) = (header.device_bytes.get(), header.frames_bytes.get());
        check_records(as_records(rest), device_bytes, frames_bytes)?;
        let records = range.start + size_of::<RawHeader>()..range.end;
        Ok(Self {
            bytes,
            records,
            count,
            algorithm,
            device_bytes,
            frames_bytes,
        })
    }

    fn records(&self) -> &[RawChunk] {
        as_records(
            (*self.bytes)
                .as_ref()
                .get(self.records.clone())
                .unwrap_or_default(),
        )
    }

    /// How many chunks there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of the layer device, that is of the uncompressed tar.
    pub fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// Where the frames end in the blob.
    pub fn frames_bytes(&self) -> u64 {
        self.frames_bytes
    }

    /// Algorithm of the chunks' digests.
    pub fn algorithm(&self) -> StrongAlgorithm {
        self.algorithm
    }

    /// The chunk at `ordinal`; `None` from [`Self::count`] on (or when a mapped file was damaged
    /// after its validation).
    pub fn chunk(&self, ordinal: u32) -> Option<Chunk> {
        let records = self.records();
        let index = usize::try_from(ordinal).ok()?;
        let record = records.get(index)?;
        let end = match records.get(index + 1) {
            Some(next) => next.device_start.get(),
            None => self.device_bytes,
        };
        Some(Chunk {
            ordinal,
            device: Extent::new(record.device_start.get(), end)
                .filter(|device| device.len() <= CHUNK_MAX_BYTES)?,
            blob: Extent::from_length(record.frame_start.get(), record.frame_bytes.get().into())?,
            codec: Codec::from_code(record.codec)?,
            crc32: record.crc32.get(),
            algorithm: self.algorithm,
            digest: ChunkDigest(record.digest),
        })
    }

    /// All chunks in device order.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = Option<Chunk>> + '_ {
        (0..self.count).map(|ordinal| self.chunk(ordinal))
    }

    /// The ordinals of the chunks that hold any byte of `extent`, by binary search.
    ///
    /// **Shape**: half-open; empty for an empty extent and for one beyond the device.
    pub fn covering(&self, extent: Extent<DeviceSpace>) -> Range<u32> {
        let device = Extent::from_length(0, self.device_bytes).unwrap_or(Extent::empty());
        let Some(extent) = extent.intersect(device) else {
            return 0..0;
        };
        let records = self.records();
        let after = |offset: u64| {
            let index = records.partition_point(|record| record.device_start.get() <= offset);
            u32::try_from(index).unwrap_or(self.count)
        };
        after(extent.start()).saturating_sub(1)..after(extent.end() - 1)
    }

    /// The chunk that holds the device byte at `offset`; `None` beyond the device.
    pub fn at(&self, offset: u64) -> Option<Chunk> {
        let range = self.covering(Extent::from_length(offset, 1)?);
        if range.is_empty() {
            None
        } else {
            self.chunk(range.start)
        }
    }
}

impl fmt::Debug for ChunkMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkMap")
            .field("count", &self.count)
            .field("algorithm", &self.algorithm)
            .field("device_bytes", &self.device_bytes)
            .field("frames_bytes", &self.frames_bytes)
            .finish_non_exhaustive()
    }
}

fn as_records(bytes: &[u8]) -> &[RawChunk] {
    <[RawChunk]>::ref_from_bytes(bytes).unwrap_or_default()
}

fn check_records(
    records: &[RawChunk],
    device_bytes: u64,
    frames_bytes: u64,
) -> Result<(), ChunkMapError> {
    if records.is_empty() && device_bytes != 0 {
        return Err(ChunkMapError::Uncovered { device_bytes });
    }
    let mut device_end = 0;
    let mut frame_end = 0;
    for (ordinal, record) in (0..).zip(records) {
        let start = record.device_start.get();
        let end = match usize::try_from(ordinal)
            .ok()
            .and_then(|index| records.get(index + 1))
        {
            Some(next) => next.device_start.get(),
            None => device_bytes,
        };
        let fits = start < end && end - start <= CHUNK_MAX_BYTES;
        if start != device_end || !fits {
            return Err(ChunkMapError::Device {
                ordinal,
                start,
                end,
            });
        }
        device_end = end;
        let (start, bytes) = (
            record.frame_start.get(),
            u64::from(record.frame_bytes.get()),
        );
        let end = start.checked_add(bytes).filter(|end| *end <= frames_bytes);
        match end {
            Some(end) if start >= frame_end && (1..=FRAME_MAX_BYTES).contains(&bytes) => {
                frame_end = end;
            }
            _ => {
                return Err(ChunkMapError::Frame {
                    ordinal,
                    start,
                    bytes,
                    limit: frames_bytes,
                });
            }
        }
        if Codec::from_code(record.codec).is_none() {
            return Err(ChunkMapError::Codec {
                ordinal,
                code: record.codec,
            });
        }
        if record.reserved != [0; 7] {
            return Err(ChunkMapError::Reserved {
                ordinal: Some(ordinal),
            });
        }
    }
    Ok(())
}

/// Writes the section for chunks that follow one another from 0, in the device and in the blob.
///
/// **Shape**: `records` ascend by ordinal from 0 without gaps.
///
/// **Errors**: records that no valid map can hold.
pub fn write_chunk_map(
    algorithm: StrongAlgorithm,
    records: &[ChunkRecord],
) -> Result<Vec<u8>, ChunkMapError> {
    let chunk_count = u32::try_from(records.len()).map_err(|_| ChunkMapError::TooLarge)?;
    let mut body = Vec::with_capacity(size_of_val(records));
    let (mut device_start, mut frame_start) = (0u64, 0u64);
    for (ordinal, record) in (0..).zip(records) {
        let device_end = device_start
            .checked_add(record.device_bytes.into())
            .ok_or(ChunkMapError::TooLarge)?;
        if record.ordinal != ordinal {
            return Err(ChunkMapError::Device {
                ordinal,
                start: device_start,
                end: device_end,
            });
        }
        let raw = RawChunk {
            device_start: device_start.into(),
            frame_start: frame_start.into(),
            frame_bytes: record.frame_bytes.into(),
            crc32: record.crc32.into(),
            codec: Codec::Zstd.code(),
            reserved: [0; 7],
            digest: record.digest.0,
        };
        body.extend_from_slice(raw.as_bytes());
        device_start = device_end;
        frame_start = frame_start
            .checked_add(record.frame_bytes.into())
            .ok_or(ChunkMapError::TooLarge)?;
    }
    check_records(as_records(&body), device_start, frame_start)?;
    let header = RawHeader {
        device_bytes: device_start.into(),
        frames_bytes: frame_start.into(),
        chunk_count: chunk_count.into(),
        algorithm: algorithm.code(),
        reserved: [0; 11],
    };
    let mut section = header.as_bytes().to_vec();
    section.append(&mut body);
    Ok(section)
}

#[cfg(test)]
mod tests;
