// SPDX-License-Identifier: Apache-2.0
//! Frames: one chunk compressed, on its own, as one zstd frame.
//!
//! A frame always names its content size, so that a decoder needs no window beyond the output
//! buffer and refuses a bomb before it starts. Compression contexts are kept per thread: setting one
//! up costs as much as compressing a small chunk. The bytes depend on the chunk, the level and the
//! version of zstd alone, not on what the thread compressed before.
//!
//! `frames/unmodified.rs` decodes what stands in blobs that Sluice did not write.

mod stream;
mod unmodified;

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{self, CParameter};

use crate::chunkmap::{Chunk, ChunkRecord, Codec};
use crate::digest::{ChunkDigest, StrongAlgorithm};
use crate::gzip::GzipError;
use crate::units::{CHUNK_MAX_BYTES, FRAME_MAX_BYTES};

pub use stream::StreamDecoder;
pub(crate) use unmodified::decoder as unmodified_decoder;
pub use unmodified::{decode_restarted_into, decompress_span_into};

/// zstd level of chunks: see the measurement in `docs/decisions/003-zstd-level.md`.
pub const DEFAULT_LEVEL: i32 = 6;

/// A chunk that cannot be compressed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeFrameError {
    /// No bytes, or above [`CHUNK_MAX_BYTES`].
    #[error("chunk of {bytes} bytes")]
    Size {
        /// Its size.
        bytes: u64,
    },
    /// zstd refused.
    #[error("compress chunk: {reason}")]
    Zstd {
        /// zstd's words.
        reason: String,
    },
    /// zlib refused.
    #[error("compress chunk: {reason}")]
    Gzip {
        /// zlib's words.
        reason: String,
    },
}

/// A frame that is not what the chunk map says. All of these mean damaged or forged bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeFrameError {
    /// The bytes given are not as many as the frame has.
    #[error("chunk {ordinal}: frame of {actual} bytes, want {expected}")]
    FrameLength {
        /// The chunk.
        ordinal: u32,
        /// Bytes that the map names.
        expected: u64,
        /// Bytes given.
        actual: u64,
    },
    /// Not exactly one zstd frame.
    #[error("chunk {ordinal}: not one whole zstd frame")]
    NotOneFrame {
        /// The chunk.
        ordinal: u32,
    },
    /// The frame names another content size, or none.
    #[error("chunk {ordinal}: frame holds {actual:?} bytes, want {expected}")]
    ContentSize {
        /// The chunk.
        ordinal: u32,
        /// Bytes that the map names.
        expected: u64,
        /// Bytes that the frame names.
        actual: Option<u64>,
    },
    /// zstd refused.
    #[error("chunk {ordinal}: {reason}")]
    Zstd {
        /// The chunk.
        ordinal: u32,
        /// zstd's words.
        reason: String,
    },
    /// The frame is no gzip from its restart point on.
    #[error("chunk {ordinal}: {error}")]
    Gzip {
        /// The chunk.
        ordinal: u32,
        /// What is wrong.
        error: GzipError,
    },
    /// A chunk of this codec is not decoded so: gzip needs a restart point, a part of a long zstd frame all
    /// parts before it. No damage, but a mistake of the caller.
    #[error("chunk {ordinal}: cannot be decoded alone, its codec is {codec:?}")]
    Codec {
        /// The chunk.
        ordinal: u32,
        /// Its codec.
        codec: Codec,
    },
    /// The device bytes have another crc32.
    #[error("chunk {ordinal}: crc32 {actual:08x}, want {expected:08x}")]
    Crc32 {
        /// The chunk.
        ordinal: u32,
        /// The map's.
        expected: u32,
        /// That of the bytes.
        actual: u32,
    },
    /// There is something behind the content, up to the next block.
    #[error("chunk {ordinal}: what follows its content is not zero")]
    Padding {
        /// The chunk.
        ordinal: u32,
    },
    /// The device bytes have another strong digest.
    #[error("chunk {ordinal}: digest {actual}, want {expected}")]
    Digest {
        /// The chunk.
        ordinal: u32,
        /// The map's.
        expected: ChunkDigest,
        /// That of the bytes.
        actual: ChunkDigest,
    },
}

/// A chunk's frame and what the chunk map says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedChunk {
    /// For the chunk map.
    pub record: ChunkRecord,
    /// For the blob.
    pub frame: Vec<u8>,
}

thread_local! {
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses one chunk and computes its digests.
///
/// **Errors**: an empty chunk, one above the cap, or an invalid level.
pub fn encode_chunk(
    ordinal: u32,
    device_bytes: &[u8],
    level: i32,
    algorithm: StrongAlgorithm,
) -> Result<EncodedChunk, EncodeFrameError> {
    let bytes = device_bytes.len() as u64;
    let size_error = EncodeFrameError::Size { bytes };
    if bytes == 0 || bytes > CHUNK_MAX_BYTES {
        return Err(size_error);
    }
    let frame = compress(device_bytes, level)?;
    let record = ChunkRecord {
        ordinal,
        device_bytes: u32::try_from(bytes).map_err(|_| size_error.clone())?,
        frame_bytes: u32::try_from(frame.len()).map_err(|_| size_error)?,
        crc32: crc32fast::hash(device_bytes),
        digest: ChunkDigest::of(algorithm, device_bytes),
    };
    Ok(EncodedChunk { record, frame })
}

/// Compresses into one frame that names its content size and has no checksum.
pub(crate) fn compress(bytes: &[u8], level: i32) -> Result<Vec<u8>, EncodeFrameError> {
    let zstd = |error: std::io::Error| EncodeFrameError::Zstd {
        reason: error.to_string(),
    };
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some((kept, compressor)) if *kept == level => compressor,
            _ => {
                let mut compressor = Compressor::new(level).map_err(zstd)?;
                compressor
                    .set_parameter(CParameter::ContentSizeFlag(true))
                    .map_err(zstd)?;
                compressor
                    .set_parameter(CParameter::ChecksumFlag(false))
                    .map_err(zstd)?;
                &mut slot.insert((level, compressor)).1
            }
        };
        compressor.compress(bytes).map_err(zstd)
    })
}

/// Decompresses a chunk's frame into `out`, whose former content is dropped, and verifies it.
///
/// **Shape**: `frame` is exactly the bytes at `expect.blob`; afterwards `out` holds exactly
/// `expect.device.len()` bytes, or is empty on error.
///
/// **Errors**: anything that is not precisely what the chunk map says. All are corruption, but for the codecs of
/// unmodified blobs that need more than the frame ([`DecodeFrameError::Codec`]).
pub fn decode_chunk_into(
    frame: &[u8],
    expect: &Chunk,
    out: &mut Vec<u8>,
) -> Result<(), DecodeFrameError> {
    out.clear();
    let decoded = match expect.codec {
        Codec::Zstd => decompress(frame, expect, out),
        Codec::ZstdFrames => unmodified::zstd_frames(frame, expect, out),
        Codec::Raw => unmodified::raw(frame, expect, out),
        Codec::Deflate | Codec::ZstdStream | Codec::ZstdNext => Err(DecodeFrameError::Codec {
            ordinal: expect.ordinal,
            codec: expect.codec,
        }),
    };
    let result = decoded
        .and_then(|()| add_padding(out, expect))
        .and_then(|()| verify_chunk(out, expect));
    if result.is_err() {
        out.clear();
    }
    result
}

/// Decompresses a chunk's frame and verifies it; see [`decode_chunk_into`].
pub fn decode_chunk(frame: &[u8], expect: &Chunk) -> Result<Vec<u8>, DecodeFrameError> {
    let mut out = Vec::new();
    decode_chunk_into(frame, expect, &mut out)?;
    Ok(out)
}

/// Checks device bytes from any source against a chunk's length, crc32, strong digest, and padding.
pub fn verify_chunk(device_bytes: &[u8], expect: &Chunk) -> Result<(), DecodeFrameError> {
    check_length(device_bytes, expect.device.len(), expect)?;
    if let Some(expected) = expect.crc32 {
        let actual = crc32fast::hash(device_bytes);
        if actual != expected {
            return Err(DecodeFrameError::Crc32 {
                ordinal: expect.ordinal,
                expected,
                actual,
            });
        }
    }
    verify_digest(content_of(device_bytes, expect)?, expect)
}

/// As [`verify_chunk`], of bytes that were verified before they were kept: the cheapest check that finds what
/// rotted. By the strong digest where no crc32 is known.
pub fn is_kept_well(device_bytes: &[u8], expect: &Chunk) -> bool {
    match expect.crc32 {
        Some(crc32) => {
            device_bytes.len() as u64 == expect.device.len()
                && crc32fast::hash(device_bytes) == crc32
        }
        None => verify_chunk(device_bytes, expect).is_ok(),
    }
}

/// The part of a chunk's device bytes that its digest covers: all but the padding, which must be zeros.
pub fn content_of<'a>(
    device_bytes: &'a [u8],
    expect: &Chunk,
) -> Result<&'a [u8], DecodeFrameError> {
    check_length(device_bytes, expect.device.len(), expect)?;
    let padding = usize::from(expect.padding_bytes);
    let (content, padding) = device_bytes.split_at(device_bytes.len().saturating_sub(padding));
    match padding.iter().all(|byte| *byte == 0) {
        true => Ok(content),
        false => Err(DecodeFrameError::Padding {
            ordinal: expect.ordinal,
        }),
    }
}

/// Verifies the content of a chunk and adds its padding: the device bytes.
pub fn device_bytes_of(mut content: Vec<u8>, expect: &Chunk) -> Result<Vec<u8>, DecodeFrameError> {
    add_padding(&mut content, expect)?;
    verify_chunk(&content, expect)?;
    Ok(content)
}

fn add_padding(content: &mut Vec<u8>, expect: &Chunk) -> Result<(), DecodeFrameError> {
    check_length(content, expect.content_bytes(), expect)?;
    content.resize(content.len() + usize::from(expect.padding_bytes), 0);
    Ok(())
}

fn check_length(bytes: &[u8], expected: u64, expect: &Chunk) -> Result<(), DecodeFrameError> {
    let actual = bytes.len() as u64;
    match actual == expected {
        true => Ok(()),
        false => Err(DecodeFrameError::ContentSize {
            ordinal: expect.ordinal,
            expected,
            actual: Some(actual),
        }),
    }
}

fn verify_digest(content: &[u8], expect: &Chunk) -> Result<(), DecodeFrameError> {
    let actual = ChunkDigest::of(expect.algorithm, content);
    match actual == expect.digest {
        true => Ok(()),
        false => Err(DecodeFrameError::Digest {
            ordinal: expect.ordinal,
            expected: expect.digest,
            actual,
        }),
    }
}

fn decompress(frame: &[u8], expect: &Chunk, out: &mut Vec<u8>) -> Result<(), DecodeFrameError> {
    let ordinal = expect.ordinal;
    let frame_bytes = frame.len() as u64;
    if frame_bytes != expect.blob.len() || frame_bytes > FRAME_MAX_BYTES {
        return Err(DecodeFrameError::FrameLength {
            ordinal,
            expected: expect.blob.len(),
            actual: frame_bytes,
        });
    }
    let length = zstd_safe::find_frame_compressed_size(frame);
    if length != Ok(frame.len()) || is_skippable(frame) {
        return Err(DecodeFrameError::NotOneFrame { ordinal });
    }
    let expected = expect.device.len();
    let actual = zstd_safe::get_frame_content_size(frame).ok().flatten();
    if actual != Some(expected) || expected > CHUNK_MAX_BYTES {
        return Err(DecodeFrameError::ContentSize {
            ordinal,
            expected,
            actual,
        });
    }
    let capacity = usize::try_from(expected).map_err(|_| DecodeFrameError::ContentSize {
        ordinal,
        expected,
        actual,
    })?;
    out.reserve_exact(capacity);
    let zstd = |reason: String| DecodeFrameError::Zstd { ordinal, reason };
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(Decompressor::new().map_err(|error| zstd(error.to_string()))?),
        };
        decompressor
            .decompress_to_buffer(frame, out)
            .map_err(|error| zstd(error.to_string()))
    })?;
    Ok(())
}

fn is_skippable(frame: &[u8]) -> bool {
    matches!(frame, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

#[cfg(test)]
mod tests;
