// SPDX-License-Identifier: Apache-2.0
//! The rules of the chunk records.

use super::format::RawChunk;
use super::{Access, ChunkMapError, Codec};
use crate::units::{CHUNK_MAX_BYTES, FRAME_MAX_BYTES, SPAN_FRAME_MAX_BYTES, SPAN_MAX_BYTES};

/// The frame of the chunk before.
#[derive(Debug, Clone, Copy)]
struct Before {
    codec: Codec,
    start: u64,
    bytes: u64,
    /// First device byte that the frame gives.
    device: u64,
}

impl Before {
    fn end(&self) -> u64 {
        self.start + self.bytes
    }
}

/// Checks all records; `own` of a blob that Sluice wrote.
pub(super) fn check_records(
    records: &[RawChunk],
    device_bytes: u64,
    frames_bytes: u64,
    own: bool,
) -> Result<Access, ChunkMapError> {
    if records.is_empty() && device_bytes != 0 {
        return Err(ChunkMapError::Uncovered { device_bytes });
    }
    let mut device_end = 0;
    let mut before: Option<Before> = None;
    let mut access = Access::Random;
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
        let codec = Codec::from_code(record.codec)
            .filter(|codec| !own || *codec == Codec::Zstd)
            .ok_or(ChunkMapError::Codec {
                ordinal,
                code: record.codec,
            })?;
        if record.reserved != [0; 3] || own && record.skip_bytes.get() != 0 {
            return Err(ChunkMapError::Reserved {
                ordinal: Some(ordinal),
            });
        }
        if !codec.is_random_access() {
            access = Access::Prefix;
        }
        let place = Place {
            ordinal,
            device: start..end,
            frames_bytes,
        };
        before = Some(check_frame(record, codec, before, &place)?);
    }
    Ok(access)
}

struct Place {
    ordinal: u32,
    device: std::ops::Range<u64>,
    frames_bytes: u64,
}

/// Checks the frame of one chunk against the one before.
fn check_frame(
    record: &RawChunk,
    codec: Codec,
    before: Option<Before>,
    place: &Place,
) -> Result<Before, ChunkMapError> {
    let ordinal = place.ordinal;
    let (start, bytes) = (
        record.frame_start.get(),
        u64::from(record.frame_bytes.get()),
    );
    let frame_error = ChunkMapError::Frame {
        ordinal,
        start,
        bytes,
        limit: place.frames_bytes,
    };
    let allowed = match codec {
        Codec::Zstd => 1..=FRAME_MAX_BYTES,
        Codec::ZstdFrames | Codec::Deflate => 1..=SPAN_FRAME_MAX_BYTES,
        Codec::Raw => place.device.end - place.device.start..=place.device.end - place.device.start,
        // A chunk may come wholly out of what its decoder has taken for the one before.
        Codec::ZstdStream | Codec::ZstdNext => 0..=SPAN_FRAME_MAX_BYTES,
    };
    let inside = start
        .checked_add(bytes)
        .is_some_and(|end| end <= place.frames_bytes);
    if !inside || !allowed.contains(&bytes) {
        return Err(frame_error);
    }
    let skip_bytes = u64::from(record.skip_bytes.get());
    let skip_error = ChunkMapError::Skip {
        ordinal,
        skip_bytes,
    };
    let fresh = Before {
        codec,
        start,
        bytes,
        device: place.device.start,
    };
    if skip_bytes != 0 {
        let shareable = matches!(codec, Codec::ZstdFrames | Codec::Deflate);
        return match before {
            Some(before)
                if shareable
                    && (before.codec, before.start, before.bytes) == (codec, start, bytes)
                    && skip_bytes == place.device.start - before.device
                    && place.device.end - before.device <= SPAN_MAX_BYTES =>
            {
                Ok(before)
            }
            _ => Err(skip_error),
        };
    }
    if codec == Codec::ZstdNext {
        let continued = before
            .filter(|before| !before.codec.is_random_access())
            .ok_or(skip_error)?;
        return if start == continued.end() {
            Ok(fresh)
        } else {
            Err(frame_error)
        };
    }
    if start < before.map_or(0, |before| before.end()) {
        return Err(frame_error);
    }
    Ok(fresh)
}
