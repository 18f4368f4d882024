// SPDX-License-Identifier: Apache-2.0
//! Where the TOC stands in a blob.
//!
//! An eStargz blob ends with an empty gzip member whose extra field has the TOC's offset in hex. Old writers put the
//! bare text there (47 bytes), newer ones a subfield `SG`, as the gzip format wants it (51 bytes). A zstd:chunked blob
//! ends with a skippable frame of numbers: offset, bytes, bytes of the JSON, type.

use super::pin::POSITION_TYPE;
use super::{TOC_JSON_MAX_BYTES, TOC_MAX_BYTES, TocError, TocFormat, TocPin};
use crate::extent::{BlobSpace, Extent};
use crate::seektable::SKIPPABLE_HEADER_BYTES;

/// Offset and magic, as both footers have them.
const TEXT_BYTES: usize = 22;
const TEXT_MAGIC: &[u8] = b"STARGZ";
const FOOTER_BYTES: usize = 51;
const LEGACY_FOOTER_BYTES: usize = 47;
/// gzip, deflate, with an extra field and nothing else.
const GZIP_EXTRA: &[u8] = &[0x1f, 0x8b, 8, 4];
/// Where the length of the extra field stands.
const EXTRA_LENGTH: usize = 10;
/// Length of a zstd:chunked footer: of four numbers, or of seven where the headers of the tar are kept too.
const ZSTD_FOOTER_BYTES: [usize; 2] = [40, 64];
/// What it ends with: as podman writes it, and as the tools of eStargz do.
const ZSTD_MAGICS: [&[u8]; 2] = [b"GNUlInUx", b"GnUlInUx"];
/// The skippable frame that tools write it into.
pub(super) const SKIPPABLE_MAGIC: &[u8] = &[0x50, 0x2a, 0x4d, 0x18];
/// What ends a blob whose TOC is elsewhere.
const EXTERNAL_MAGIC: &[u8] = b"STARGZEXTERNALTOC";

/// How much of a blob's end is read at first: footer and nearly always the TOC. One takes some 1 % of its blob.
const TAIL_MIN_BYTES: u64 = 64 * 1024;
const TAIL_MAX_BYTES: u64 = 1024 * 1024;
const TAIL_SHARE: u64 = 48;

/// Where a TOC stands, as its blob or its manifest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocPlace {
    /// Its bytes in the blob.
    pub extent: Extent<BlobSpace>,
    /// Whose format it has.
    pub format: TocFormat,
    /// Bytes of its JSON, where that is said.
    pub(super) json_bytes: u64,
}

impl TocPin {
    /// What to read first of a blob of this size: the TOC, or the end that tells where it is.
    ///
    /// **Errors** [`TocError::Place`].
    pub fn first_read(&self, blob_bytes: u64) -> Result<Extent<BlobSpace>, TocError> {
        match self {
            Self::Position { extent, .. } => inside(*extent, blob_bytes),
            Self::Footer { .. } => {
                let bytes = (blob_bytes / TAIL_SHARE).clamp(TAIL_MIN_BYTES, TAIL_MAX_BYTES);
                let start = blob_bytes.saturating_sub(bytes);
                Extent::new(start, blob_bytes)
                    .filter(|tail| !tail.is_empty())
                    .ok_or(TocError::Footer)
            }
        }
    }

    /// Where the TOC is, by what [`Self::first_read`] brought.
    ///
    /// **Errors** [`TocError::Footer`], [`TocError::External`], [`TocError::Place`], [`TocError::TooLarge`].
    pub fn locate(&self, first: &[u8], blob_bytes: u64) -> Result<TocPlace, TocError> {
        if let Self::Position { json_bytes, .. } = self {
            return Ok(TocPlace {
                extent: self.first_read(blob_bytes)?,
                format: TocFormat::ZstdChunked,
                json_bytes: *json_bytes,
            });
        }
        if let Some((start, footer)) = newer(first).or_else(|| legacy(first)) {
            let end = blob_bytes.saturating_sub(footer as u64);
            let place = TocError::Place {
                start,
                bytes: end.saturating_sub(start),
                blob_bytes,
            };
            let extent = Extent::new(start, end).filter(|extent| !extent.is_empty());
            return Ok(TocPlace {
                extent: inside(extent.ok_or(place)?, blob_bytes)?,
                format: TocFormat::Estargz,
                json_bytes: 0,
            });
        }
        if let Some([start, bytes, json_bytes]) = zstd_chunked(first) {
            let place = TocError::Place {
                start,
                bytes,
                blob_bytes,
            };
            if json_bytes > TOC_JSON_MAX_BYTES {
                let (bytes, cap) = (json_bytes, TOC_JSON_MAX_BYTES);
                return Err(TocError::TooLarge { bytes, cap });
            }
            let extent = Extent::from_length(start, bytes)
                .filter(|it| !it.is_empty() && it.start() >= SKIPPABLE_HEADER_BYTES);
            return Ok(TocPlace {
                extent: inside(extent.ok_or(place)?, blob_bytes)?,
                format: TocFormat::ZstdChunked,
                json_bytes,
            });
        }
        let end = &first[first.len().saturating_sub(2 * FOOTER_BYTES)..];
        let external = end
            .windows(EXTERNAL_MAGIC.len())
            .any(|window| window == EXTERNAL_MAGIC);
        Err(match external {
            true => TocError::External,
            false => TocError::Footer,
        })
    }
}

fn inside(extent: Extent<BlobSpace>, blob_bytes: u64) -> Result<Extent<BlobSpace>, TocError> {
    let sound = extent.end() <= blob_bytes && extent.len() <= TOC_MAX_BYTES;
    sound.then_some(extent).ok_or(TocError::Place {
        start: extent.start(),
        bytes: extent.len(),
        blob_bytes,
    })
}

/// Offset, bytes and bytes of the JSON, of a footer of zstd:chunked.
fn zstd_chunked(bytes: &[u8]) -> Option<[u64; 3]> {
    let frame = ZSTD_FOOTER_BYTES.into_iter().find_map(|length| {
        let header = usize::try_from(SKIPPABLE_HEADER_BYTES).ok()?;
        let frame = bytes.get(bytes.len().checked_sub(header + length)?..)?;
        let said = u32::try_from(length).ok()?.to_le_bytes();
        let numbers = frame.strip_prefix(SKIPPABLE_MAGIC)?.strip_prefix(&said)?;
        let mut magics = ZSTD_MAGICS.into_iter();
        magics.find_map(|magic| numbers.strip_suffix(magic))
    })?;
    let mut numbers = frame.chunks_exact(8).map(|number| {
        let number: [u8; 8] = number.try_into().unwrap_or_default();
        u64::from_le_bytes(number)
    });
    let found = [numbers.next()?, numbers.next()?, numbers.next()?];
    (numbers.next() == Some(POSITION_TYPE)).then_some(found)
}

/// Offset of the TOC and length of the footer.
fn newer(bytes: &[u8]) -> Option<(u64, usize)> {
    let footer = bytes.get(bytes.len().checked_sub(FOOTER_BYTES)?..)?;
    let subfield = [26, 0, b'S', b'G', 22, 0];
    let text = footer[EXTRA_LENGTH..].strip_prefix(&subfield)?;
    let sound = footer.starts_with(GZIP_EXTRA);
    Some((offset(text)?, FOOTER_BYTES)).filter(|_| sound)
}

fn legacy(bytes: &[u8]) -> Option<(u64, usize)> {
    let footer = bytes.get(bytes.len().checked_sub(LEGACY_FOOTER_BYTES)?..)?;
    let text = footer[EXTRA_LENGTH..].strip_prefix(&[22, 0])?;
    let sound = footer.starts_with(GZIP_EXTRA);
    Some((offset(text)?, LEGACY_FOOTER_BYTES)).filter(|_| sound)
}

fn offset(text: &[u8]) -> Option<u64> {
    let digits = text.get(..TEXT_BYTES)?.strip_suffix(TEXT_MAGIC)?;
    let digits = std::str::from_utf8(digits).ok()?;
    let hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hex.then(|| u64::from_str_radix(digits, 16).ok())?
}

/// The footer of an eStargz blob whose TOC stands at `toc_start`: an empty gzip member.
pub(super) fn estargz_footer(toc_start: u64) -> Vec<u8> {
    let mut footer = [
        GZIP_EXTRA,
        &[0, 0, 0, 0, 0, 0xff],
        &[26, 0, b'S', b'G', 22, 0],
    ]
    .concat();
    footer.extend_from_slice(format!("{toc_start:016x}STARGZ").as_bytes());
    footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

/// The payload of the last frame of a zstd:chunked blob: TOC and headers of the tar, each by first byte, bytes,
/// and bytes decompressed.
pub(super) fn zstd_chunked_footer(toc: [u64; 3], headers: [u64; 3]) -> Vec<u8> {
    let numbers = toc.into_iter().chain([POSITION_TYPE]).chain(headers);
    let mut footer: Vec<u8> = numbers.flat_map(u64::to_le_bytes).collect();
    footer.extend_from_slice(ZSTD_MAGICS[0]);
    footer
}
