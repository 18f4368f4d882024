// SPDX-License-Identifier: Apache-2.0
//! The rules of the chunk records.

use super::format::RawChunk;
use super::{Access, ChunkMapError, Codec};
use crate::units::{
    BLOCK_BYTES, CHUNK_MAX_BYTES, FRAME_MAX_BYTES, SPAN_FRAME_MAX_BYTES, SPAN_MAX_BYTES,
    TOC_CHUNK_MAX_BYTES,
};

/// Whose records they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Of a blob that Sluice wrote.
    Own,
    /// Of any other, whose device is its tar.
    Unmodified,
    /// Of one whose device is the contents that a table of contents names.
    Contents,
}

impl Kind {
    fn chunk_max_bytes(self) -> u64 {
        match self {
            Self::Own | Self::Unmodified => CHUNK_MAX_BYTES,
            Self::Contents => TOC_CHUNK_MAX_BYTES,
        }
    }

    fn allows(self, codec: Codec) -> bool {
        match self {
            Self::Own => codec == Codec::Zstd,
            Self::Unmodified => true,
            Self::Contents => matches!(codec, Codec::ZstdFrames | Codec::Deflate),
        }
    }
}

/// The frame of the chunk before.
#[derive(Debug, Clone, Copy)]
struct Before {
    codec: Codec,
    start: u64,
    bytes: u64,
    /// First device byte that the frame gives.
    device: u64,
    /// Where the content of the last chunk ends in what the frame gives.
    given: u64,
}

impl Before {
    fn end(&self) -> u64 {
        self.start + self.bytes
    }
}

/// Checks all records.
pub(super) fn check_records(
    records: &[RawChunk],
    device_bytes: u64,
    frames_bytes: u64,
    kind: Kind,
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
        let fits = start < end && end - start <= kind.chunk_max_bytes();
        if start != device_end || !fits {
            return Err(ChunkMapError::Device {
                ordinal,
                start,
                end,
            });
        }
        device_end = end;
        let codec = Codec::from_code(record.codec)
            .filter(|codec| kind.allows(*codec))
            .ok_or(ChunkMapError::Codec {
                ordinal,
                code: record.codec,
            })?;
        let padding = u64::from(record.padding_bytes.get());
        let extra = match kind {
            Kind::Own => record.skip_bytes.get() == 0 && padding == 0,
            Kind::Unmodified => padding == 0,
            // Only a content that ends inside a block needs any.
            Kind::Contents => {
                record.crc32.get() == 0
                    && padding < BLOCK_BYTES.min(end - start)
                    && (padding == 0 || end.is_multiple_of(BLOCK_BYTES))
            }
        };
        if record.reserved != 0 || !extra {
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
            content: end - start - padding,
            kind,
            frames_bytes,
        };
        before = Some(check_frame(record, codec, before, &place)?);
    }
    Ok(access)
}

struct Place {
    ordinal: u32,
    device: std::ops::Range<u64>,
    /// Bytes of it that the frame gives.
    content: u64,
    kind: Kind,
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
        given: skip_bytes + place.content,
    };
    if skip_bytes != 0 {
        let shareable = matches!(codec, Codec::ZstdFrames | Codec::Deflate);
        let follows = |before: &Before| match place.kind {
            // Headers of the tar may stand between two contents.
            Kind::Contents => skip_bytes >= before.given,
            Kind::Own | Kind::Unmodified => skip_bytes == place.device.start - before.device,
        };
        return match before {
            Some(before)
                if shareable
                    && (before.codec, before.start, before.bytes) == (codec, start, bytes)
                    && follows(&before)
                    && fresh.given <= SPAN_MAX_BYTES =>
            {
                Ok(Before {
                    given: fresh.given,
                    ..before
                })
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
