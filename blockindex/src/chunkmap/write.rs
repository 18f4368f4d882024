// SPDX-License-Identifier: Apache-2.0
//! Writing a chunk map.

use zerocopy::IntoBytes;

use super::check::{Kind, check_records};
use super::format::{RawChunk, RawHeader};
use super::{ChunkMapError, ChunkRecord, Codec, DeviceForm, as_records};
use crate::digest::{ChunkDigest, StrongAlgorithm};
use crate::extent::{BlobSpace, Extent};

/// A chunk of an unmodified blob; its device start follows from those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedChunk {
    /// Bytes of the device that it holds.
    pub device_bytes: u32,
    /// Its frame.
    pub blob: Extent<BlobSpace>,
    /// How the frame is decompressed.
    pub codec: Codec,
    /// Bytes that the frame gives before it.
    pub skip_bytes: u32,
    /// CRC-32 (IEEE) of the device bytes; 0 where only the digest is known.
    pub crc32: u32,
    /// Zeros at the end of the device bytes that the digest does not cover.
    pub padding_bytes: u16,
    /// Strong digest of the device bytes without the padding.
    pub digest: ChunkDigest,
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
    let mut frame_start = 0u64;
    let mut placed = Vec::with_capacity(records.len());
    for (ordinal, record) in (0..).zip(records) {
        if record.ordinal != ordinal {
            return Err(ChunkMapError::Device {
                ordinal,
                start: record.ordinal.into(),
                end: record.ordinal.into(),
            });
        }
        let blob = Extent::from_length(frame_start, record.frame_bytes.into())
            .ok_or(ChunkMapError::TooLarge)?;
        placed.push(PlacedChunk {
            device_bytes: record.device_bytes,
            blob,
            codec: Codec::Zstd,
            skip_bytes: 0,
            crc32: record.crc32,
            padding_bytes: 0,
            digest: record.digest,
        });
        frame_start = blob.end();
    }
    write(algorithm, &placed, frame_start, Kind::Own)
}

/// Writes the section for chunks of an unmodified blob, whose frames end at `frames_bytes`.
///
/// **Errors**: chunks that no valid map can hold.
pub(crate) fn write_unmodified(
    algorithm: StrongAlgorithm,
    chunks: &[PlacedChunk],
    frames_bytes: u64,
    form: DeviceForm,
) -> Result<Vec<u8>, ChunkMapError> {
    let kind = match form {
        DeviceForm::Tar => Kind::Unmodified,
        DeviceForm::Contents => Kind::Contents,
    };
    write(algorithm, chunks, frames_bytes, kind)
}

fn write(
    algorithm: StrongAlgorithm,
    chunks: &[PlacedChunk],
    frames_bytes: u64,
    kind: Kind,
) -> Result<Vec<u8>, ChunkMapError> {
    let chunk_count = u32::try_from(chunks.len()).map_err(|_| ChunkMapError::TooLarge)?;
    let mut body = Vec::with_capacity(size_of::<RawChunk>() * chunks.len());
    let mut device_start = 0u64;
    for chunk in chunks {
        let raw = RawChunk {
            device_start: device_start.into(),
            frame_start: chunk.blob.start().into(),
            frame_bytes: u32::try_from(chunk.blob.len())
                .map_err(|_| ChunkMapError::TooLarge)?
                .into(),
            crc32: chunk.crc32.into(),
            codec: chunk.codec.code(),
            reserved: 0,
            padding_bytes: chunk.padding_bytes.into(),
            skip_bytes: chunk.skip_bytes.into(),
            digest: chunk.digest.0,
        };
        body.extend_from_slice(raw.as_bytes());
        device_start = device_start
            .checked_add(chunk.device_bytes.into())
            .ok_or(ChunkMapError::TooLarge)?;
    }
    check_records(as_records(&body), device_start, frames_bytes, kind)?;
    let header = RawHeader {
        device_bytes: device_start.into(),
        frames_bytes: frames_bytes.into(),
        chunk_count: chunk_count.into(),
        algorithm: algorithm.code(),
        reserved: [0; 11],
    };
    let mut section = header.as_bytes().to_vec();
    section.append(&mut body);
    Ok(section)
}
