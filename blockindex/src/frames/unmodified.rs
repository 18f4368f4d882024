// SPDX-License-Identifier: Apache-2.0
//! Chunks of unmodified blobs: zstd frames as others cut them, gzip from a restart point, plain bytes.

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::{DecodeFrameError, add_padding, verify_chunk};
use crate::chunkmap::{Chunk, Codec};
use crate::gzip::restart::{RestartAt, inflate_into};
use crate::units::{SPAN_FRAME_MAX_BYTES, SPAN_MAX_BYTES};

/// The largest zstd window that a blob may ask for: 128 MiB, what `zstd -d` takes without options.
pub(crate) const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Decompresses and verifies a chunk of an unmodified gzip blob, into `out`, whose former content is
/// dropped.
///
/// **Shape**: `frame` is exactly the bytes at `expect.blob`, `at` what the chunk map's restart point of
/// this chunk says. Afterwards `out` holds exactly `expect.device.len()` bytes, or is empty on error.
///
/// **Errors**: the frame or the window is not the one that the chunk's digest was made of.
pub fn decode_restarted_into(
    frame: &[u8],
    expect: &Chunk,
    at: RestartAt<'_>,
    out: &mut Vec<u8>,
) -> Result<(), DecodeFrameError> {
    out.clear();
    let result = inflate(frame, expect, at, out)
        .and_then(|()| add_padding(out, expect))
        .and_then(|()| verify_chunk(out, expect));
    if result.is_err() {
        out.clear();
    }
    result
}

/// Decompresses a frame once for all the chunks that share it, into `out`, whose former content is dropped.
///
/// **Shape**: `frame` is exactly the bytes at `last.blob`, `at` what the restart point of a gzip frame says.
/// Afterwards `out` holds what the frame gives up to the end of `last`: the content of a chunk stands behind its
/// `skip_bytes`. Nothing of it is verified yet ([`super::verify_chunk`]).
///
/// Allocates the window and the output, at most 16 MiB.
///
/// **Errors**: the frame is not one of this length and size; [`DecodeFrameError::Codec`] for chunks that share
/// no frame by their codec, or a gzip frame without `at`. `out` is empty then.
pub fn decompress_span_into(
    frame: &[u8],
    last: &Chunk,
    at: Option<RestartAt<'_>>,
    out: &mut Vec<u8>,
) -> Result<(), DecodeFrameError> {
    out.clear();
    let result = match (last.codec, at) {
        (Codec::Deflate, Some(at)) => inflate_span(frame, last, at, out),
        (Codec::ZstdFrames, None) => zstd_span(frame, last, out),
        (codec, _) => Err(DecodeFrameError::Codec {
            ordinal: last.ordinal,
            codec,
        }),
    };
    if result.is_err() {
        out.clear();
    }
    result
}

fn inflate(
    frame: &[u8],
    expect: &Chunk,
    at: RestartAt<'_>,
    out: &mut Vec<u8>,
) -> Result<(), DecodeFrameError> {
    let ordinal = expect.ordinal;
    if expect.codec != Codec::Deflate {
        return Err(DecodeFrameError::Codec {
            ordinal,
            codec: expect.codec,
        });
    }
    inflate_span(frame, expect, at, out)?;
    skip(expect, out);
    Ok(())
}

fn inflate_span(
    frame: &[u8],
    last: &Chunk,
    at: RestartAt<'_>,
    out: &mut Vec<u8>,
) -> Result<(), DecodeFrameError> {
    let end = span_bytes(frame, last)?;
    let ordinal = last.ordinal;
    inflate_into(frame, at, end, out).map_err(|error| DecodeFrameError::Gzip { ordinal, error })
}

/// Decompresses whole zstd frames up to the end of the chunk.
pub(super) fn zstd_frames(
    frame: &[u8],
    expect: &Chunk,
    out: &mut Vec<u8>,
) -> Result<(), DecodeFrameError> {
    zstd_span(frame, expect, out)?;
    skip(expect, out);
    Ok(())
}

fn zstd_span(frame: &[u8], last: &Chunk, out: &mut Vec<u8>) -> Result<(), DecodeFrameError> {
    let ordinal = last.ordinal;
    let end = span_bytes(frame, last)?;
    let zstd = |error: std::io::Error| DecodeFrameError::Zstd {
        ordinal,
        reason: error.to_string(),
    };
    let mut decoder = decoder().map_err(zstd)?;
    out.resize(end, 0);
    let mut input = InBuffer::around(frame);
    let mut made = 0;
    while made < end {
        let before = (input.pos(), made);
        let mut output = OutBuffer::around_pos(out.as_mut_slice(), made);
        decoder.run(&mut input, &mut output).map_err(zstd)?;
        made = output.pos();
        if (input.pos(), made) == before {
            let (expected, actual) = (end as u64, Some(made as u64));
            return Err(DecodeFrameError::ContentSize {
                ordinal,
                expected,
                actual,
            });
        }
    }
    Ok(())
}

/// Drops what a frame gives before the chunk.
fn skip(expect: &Chunk, out: &mut Vec<u8>) {
    let skip = usize::try_from(expect.skip_bytes).unwrap_or(usize::MAX);
    out.drain(..skip.min(out.len()));
}

/// A decoder of zstd frames as others write them.
pub(crate) fn decoder() -> std::io::Result<Decoder<'static>> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
    Ok(decoder)
}

/// The bytes of the chunk as they are.
pub(super) fn raw(frame: &[u8], expect: &Chunk, out: &mut Vec<u8>) -> Result<(), DecodeFrameError> {
    span_bytes(frame, expect)?;
    out.extend_from_slice(frame);
    Ok(())
}

/// What the frame gives up to the chunk's end; checks sizes before anything is allocated.
fn span_bytes(frame: &[u8], expect: &Chunk) -> Result<usize, DecodeFrameError> {
    let ordinal = expect.ordinal;
    let (expected, actual) = (expect.blob.len(), frame.len() as u64);
    if expected != actual || actual > SPAN_FRAME_MAX_BYTES {
        return Err(DecodeFrameError::FrameLength {
            ordinal,
            expected,
            actual,
        });
    }
    let end = u64::from(expect.skip_bytes).saturating_add(expect.content_bytes());
    usize::try_from(end)
        .ok()
        .filter(|_| end <= SPAN_MAX_BYTES)
        .ok_or(DecodeFrameError::ContentSize {
            ordinal,
            expected: end,
            actual: None,
        })
}
