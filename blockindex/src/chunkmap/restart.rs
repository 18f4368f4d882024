// SPDX-License-Identifier: Apache-2.0
//! Restart points of gzip: where a frame begins inside a deflate stream, and where its window is kept.

use zerocopy::IntoBytes;

use super::format::{KIND_BLOCK, KIND_MEMBER, RawChunk, RawRestart};
use super::{ChunkMapError, Codec};
use crate::digest::DIGEST_BYTES;
use crate::extent::{Extent, WindowsSpace};
use crate::gzip::{LeadingBits, WINDOW_MAX_BYTES};
use crate::windows::{HEADER_BYTES, PAYLOAD_MAX_BYTES};

/// A window in the file of windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WindowPin {
    /// Its compressed payload.
    pub extent: Extent<WindowsSpace>,
    /// Its bytes, at most 32 KiB.
    pub bytes: u32,
    /// Strong digest of the payload, by the algorithm of the chunk map.
    pub digest: [u8; DIGEST_BYTES],
}

/// What a decoder must know before the first byte of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RestartState {
    /// Nothing: the frame begins with the header of a gzip member.
    Member,
    /// The frame begins between two deflate blocks of a member.
    Block {
        /// Bits of the byte before the frame that belong to it.
        bits: LeadingBits,
        /// The output before, as far as it is ever copied. Whoever has the device bytes right before
        /// the frame's may use up to 32 KiB of them instead.
        window: Option<WindowPin>,
    },
}

/// Where decompression of a gzip blob may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Restart {
    /// First byte of the frame in the blob.
    pub frame_start: u64,
    /// What a decoder must know.
    pub state: RestartState,
}

/// Reads a record; `None` when it breaks the rules.
pub(super) fn read(raw: &RawRestart) -> Option<Restart> {
    state(raw).ok().map(|state| Restart {
        frame_start: raw.frame_start.get(),
        state,
    })
}

fn state(raw: &RawRestart) -> Result<RestartState, &'static str> {
    if raw.reserved != [0; 5] {
        return Err("reserved byte set");
    }
    let pin = (
        raw.window_start.get(),
        raw.payload_bytes.get(),
        raw.window_bytes.get(),
        raw.digest,
    );
    let window = match pin {
        (0, 0, 0, digest) if digest == [0; DIGEST_BYTES] => None,
        (start, payload, bytes, digest) => {
            if payload == 0 || u64::from(payload) > PAYLOAD_MAX_BYTES {
                return Err("payload of its window is empty or too long");
            }
            if bytes == 0 || u64::from(bytes) > WINDOW_MAX_BYTES as u64 {
                return Err("window is empty or too long");
            }
            Some(WindowPin {
                extent: Extent::from_length(start, payload.into()).ok_or("window is nowhere")?,
                bytes,
                digest,
            })
        }
    };
    let bits = LeadingBits::new(raw.bit_count, raw.bit_value).ok_or("leading bits")?;
    match (raw.kind, window) {
        (KIND_MEMBER, None) if bits == LeadingBits::default() => Ok(RestartState::Member),
        (KIND_MEMBER, _) => Err("a member with a state"),
        (KIND_BLOCK, _) if raw.frame_start.get() == 0 => Err("nothing before it"),
        (KIND_BLOCK, window) => Ok(RestartState::Block { bits, window }),
        _ => Err("unknown kind"),
    }
}

/// Checks that the table has a point for each frame of gzip, in order, and nothing else; and that
/// windows ascend without overlap inside their file.
pub(super) fn check(
    table: &[RawRestart],
    chunks: &[RawChunk],
    windows_bytes: u64,
) -> Result<(), ChunkMapError> {
    let begins_frame =
        |chunk: &&RawChunk| chunk.codec == Codec::Deflate.code() && chunk.skip_bytes.get() == 0;
    let expected = chunks.iter().filter(begins_frame).count() as u64;
    let actual = table.len() as u64;
    if expected != actual {
        return Err(ChunkMapError::Restarts { expected, actual });
    }
    let mut end = HEADER_BYTES;
    let frames = chunks.iter().filter(begins_frame);
    for ((ordinal, raw), chunk) in (0..).zip(table).zip(frames) {
        let error = |what| ChunkMapError::Restart { ordinal, what };
        if raw.frame_start.get() != chunk.frame_start.get() {
            return Err(error("not where its frame begins"));
        }
        if let RestartState::Block {
            window: Some(pin), ..
        } = state(raw).map_err(error)?
        {
            if pin.extent.start() < end || pin.extent.end() > windows_bytes {
                return Err(error("window overlaps another or leaves the file"));
            }
            end = pin.extent.end();
        }
    }
    Ok(())
}

/// Writes the table, which is checked with the map when it is read.
pub(crate) fn write_restarts(restarts: &[Restart]) -> Vec<u8> {
    let mut section = Vec::with_capacity(size_of::<RawRestart>() * restarts.len());
    for restart in restarts {
        let (kind, bits, window) = match restart.state {
            RestartState::Member => (KIND_MEMBER, LeadingBits::default(), None),
            RestartState::Block { bits, window } => (KIND_BLOCK, bits, window),
        };
        let extent = window.map_or(Extent::empty(), |pin| pin.extent);
        let raw = RawRestart {
            frame_start: restart.frame_start.into(),
            window_start: extent.start().into(),
            // A longer payload cannot be told and is refused when it is read.
            payload_bytes: u32::try_from(extent.len()).unwrap_or(u32::MAX).into(),
            window_bytes: window.map_or(0, |pin| pin.bytes).into(),
            kind,
            bit_count: bits.count(),
            bit_value: bits.value(),
            reserved: [0; 5],
            digest: window.map_or([0; DIGEST_BYTES], |pin| pin.digest),
        };
        section.extend_from_slice(raw.as_bytes());
    }
    section
}
