// SPDX-License-Identifier: Apache-2.0
//! Seek table of the Zstandard Seekable Format: the last frame of a blob.
//!
//! Sluice itself reads the layer index; the table is for every other tool that seeks in zstd. It
//! lists each frame of the blob, the skippable ones included (decompressed size 0), without
//! checksums.
//!
//! **Source**: zstd `contrib/seekable_format/zstd_seekable_compression_format.md`, version 0.1.0.

use std::mem::size_of;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Skippable magic of the seek table.
pub const SEEK_TABLE_MAGIC: u32 = 0x184D_2A5E;
/// Last four bytes of a blob with a seek table.
pub const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
/// The most frames that the format allows.
pub const FRAMES_MAX: u32 = 0x0800_0000;
/// Bytes of a skippable frame before its content: magic and size.
pub const SKIPPABLE_HEADER_BYTES: u64 = 8;
/// Bytes at the end of the table that a reader takes first.
pub const FOOTER_BYTES: u64 = 9;

const CHECKSUMS: u8 = 0x80;
/// Bits of the descriptor that a reader must find zero.
const RESERVED: u8 = 0x7c;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    frames: U32,
    descriptor: u8,
    magic: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    compressed: U32,
    decompressed: U32,
}

const _: () = assert!(size_of::<RawFooter>() as u64 == FOOTER_BYTES);
const _: () = assert!(size_of::<RawEntry>() == 8);

/// One frame of the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeekEntry {
    /// Its bytes in the blob, a skippable frame's header included.
    pub compressed_bytes: u32,
    /// What it decompresses to; 0 for a skippable frame.
    pub decompressed_bytes: u32,
}

/// A seek table that cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeekTableError {
    /// The blob does not end in a seek table.
    #[error("no seek table")]
    Missing,
    /// The table is not as long as its parts say.
    #[error("seek table of {actual} bytes, want {expected}")]
    Length {
        /// What the number of frames asks for.
        expected: u64,
        /// What there is.
        actual: u64,
    },
    /// Reserved bits are set.
    #[error("seek table has descriptor {descriptor:#04x}")]
    Descriptor {
        /// The descriptor.
        descriptor: u8,
    },
    /// More frames than the format allows.
    #[error("{frames} frames are too many for a seek table")]
    TooManyFrames {
        /// How many.
        frames: u64,
    },
}

/// Bytes of the whole skippable frame of a table for `frames` frames, as [`write()`] makes it.
pub fn table_bytes(frames: u32) -> u64 {
    SKIPPABLE_HEADER_BYTES + u64::from(frames) * size_of::<RawEntry>() as u64 + FOOTER_BYTES
}

/// The skippable frame that ends a blob.
///
/// **Errors**: more frames than the format allows.
pub fn write(entries: impl ExactSizeIterator<Item = SeekEntry>) -> Result<Vec<u8>, SeekTableError> {
    let error = SeekTableError::TooManyFrames {
        frames: entries.len() as u64,
    };
    let frames = u32::try_from(entries.len()).map_err(|_| error.clone())?;
    if frames > FRAMES_MAX {
        return Err(error);
    }
    let content = u32::try_from(table_bytes(frames) - SKIPPABLE_HEADER_BYTES).map_err(|_| error)?;
    let mut table = Vec::new();
    table.extend_from_slice(&SEEK_TABLE_MAGIC.to_le_bytes());
    table.extend_from_slice(&content.to_le_bytes());
    for entry in entries {
        let raw = RawEntry {
            compressed: entry.compressed_bytes.into(),
            decompressed: entry.decompressed_bytes.into(),
        };
        table.extend_from_slice(raw.as_bytes());
    }
    let footer = RawFooter {
        frames: frames.into(),
        descriptor: 0,
        magic: SEEKABLE_MAGIC.into(),
    };
    table.extend_from_slice(footer.as_bytes());
    Ok(table)
}

/// Bytes of the whole skippable frame of the table whose last [`FOOTER_BYTES`] are `footer`.
///
/// So a reader that has only a blob's tail learns how much of it to read.
pub fn frame_bytes(footer: &[u8]) -> Result<u64, SeekTableError> {
    let footer = RawFooter::read_from_bytes(footer).map_err(|_| SeekTableError::Missing)?;
    if footer.magic.get() != SEEKABLE_MAGIC {
        return Err(SeekTableError::Missing);
    }
    if footer.descriptor & RESERVED != 0 {
        return Err(SeekTableError::Descriptor {
            descriptor: footer.descriptor,
        });
    }
    let frames = footer.frames.get();
    if frames > FRAMES_MAX {
        return Err(SeekTableError::TooManyFrames {
            frames: frames.into(),
        });
    }
    let entry = if footer.descriptor & CHECKSUMS == 0 {
        8
    } else {
        12
    };
    Ok(SKIPPABLE_HEADER_BYTES + u64::from(frames) * entry + FOOTER_BYTES)
}

/// Reads the table that is the end of `blob` (the whole blob or any tail that holds the table).
///
/// Checksums, where another writer left them, are skipped.
pub fn parse(blob: &[u8]) -> Result<Vec<SeekEntry>, SeekTableError> {
    let footer_bytes = size_of::<RawFooter>();
    let footer = blob
        .len()
        .checked_sub(footer_bytes)
        .ok_or(SeekTableError::Missing)?;
    let expected = frame_bytes(&blob[footer..])?;
    let error = SeekTableError::Length {
        expected,
        actual: blob.len() as u64,
    };
    let start = usize::try_from(expected)
        .ok()
        .and_then(|expected| blob.len().checked_sub(expected))
        .ok_or(error)?;
    let (magic, rest) =
        U32::read_from_prefix(&blob[start..]).map_err(|_| SeekTableError::Missing)?;
    let (content, rest) = U32::read_from_prefix(rest).map_err(|_| SeekTableError::Missing)?;
    if magic.get() != SEEK_TABLE_MAGIC {
        return Err(SeekTableError::Missing);
    }
    let actual = u64::from(content.get()) + SKIPPABLE_HEADER_BYTES;
    if actual != expected {
        return Err(SeekTableError::Length { expected, actual });
    }
    let with_checksums = blob[footer + 4] & CHECKSUMS != 0;
    let stride = if with_checksums { 12 } else { 8 };
    let entries = rest[..rest.len() - footer_bytes].chunks_exact(stride);
    Ok(entries
        .filter_map(|entry| RawEntry::read_from_prefix(entry).ok())
        .map(|(raw, _)| SeekEntry {
            compressed_bytes: raw.compressed.get(),
            decompressed_bytes: raw.decompressed.get(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> [SeekEntry; 2] {
        [(100, 1000), (8, 0)].map(|(compressed_bytes, decompressed_bytes)| SeekEntry {
            compressed_bytes,
            decompressed_bytes,
        })
    }

    /// The example of `docs/formats/layer-blob.md`.
    #[test]
    fn the_documented_example_reads_back() {
        let table = write(entries().into_iter()).unwrap();
        assert_eq!(
            hex::encode(&table),
            "5e2a4d181900000064000000e80300000800000000000000\
             0200000000b1ea928f"
        );
        assert_eq!(table.len() as u64, table_bytes(2));
        let blob = [&b"frames before it"[..], &table].concat();
        assert_eq!(parse(&blob).unwrap(), entries());
    }

    #[test]
    fn checksums_of_other_writers_are_skipped() {
        let mut table = write(entries().into_iter()).unwrap();
        let footer = table.len() - 9;
        table[footer + 4] = CHECKSUMS;
        table[4] += 8;
        table.splice(24..24, [9; 4]);
        table.splice(16..16, [9; 4]);
        assert_eq!(parse(&table).unwrap(), entries());
    }

    #[test]
    fn damaged_tables_are_refused() {
        let table = write(entries().into_iter()).unwrap();
        for length in 0..table.len() {
            assert!(parse(&table[..length]).is_err());
            assert!(parse(&table[table.len() - length..]).is_err());
        }
        for at in [0, 4, 24, 28, 29] {
            let mut damaged = table.clone();
            damaged[at] ^= 0x10;
            assert!(parse(&damaged).is_err(), "{at}");
        }
        let mut huge = table;
        huge[24..28].fill(255);
        assert!(matches!(
            parse(&huge),
            Err(SeekTableError::TooManyFrames { .. })
        ));
    }
}
