// SPDX-License-Identifier: Apache-2.0
//! One 512-byte tar header: v7, ustar, pax, star and GNU, read as Go's `archive/tar` reads it.
//!
//! containerd unpacks with that reader, so what it accepts and how it understands it decides what a
//! layer means. **Source**: POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU tar manual, "Basic
//! Tar Format".

use std::ops::Range;

use super::ScanError;

pub(super) const BLOCK: usize = 512;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE: usize = 156;
const LINK_NAME: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..263;
const VERSION: Range<usize> = 263..265;
const MAJOR: Range<usize> = 329..337;
const MINOR: Range<usize> = 337..345;
const PREFIX: Range<usize> = 345..500;
const STAR_PREFIX: Range<usize> = 345..476;
const STAR_TRAILER: Range<usize> = 508..512;
const GNU_ATIME: Range<usize> = 345..357;
const GNU_CTIME: Range<usize> = 357..369;

/// A header as it stands in the tar, before PAX records and GNU long names change it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawHeader {
    pub name: Vec<u8>,
    pub link_name: Vec<u8>,
    pub kind: u8,
    pub size: i64,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub mtime: i64,
    pub major: i64,
    pub minor: i64,
    /// Whether it has times of access or change.
    pub other_times: bool,
}

enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// Reads the header block that starts at `offset` of the tar.
pub(super) fn parse(block: &[u8; BLOCK], offset: u64) -> Result<RawHeader, ScanError> {
    let number = |range: Range<usize>, field| {
        parse_number(&block[range]).ok_or(ScanError::Number { offset, field })
    };
    let sum = parse_octal(&block[CHECKSUM]);
    let (unsigned, signed) = checksums(block);
    if sum != Some(unsigned) && sum != Some(signed) {
        return Err(ScanError::Checksum { offset });
    }
    let mut header = RawHeader {
        name: until_nul(&block[NAME]).to_vec(),
        link_name: until_nul(&block[LINK_NAME]).to_vec(),
        kind: block[TYPE],
        size: number(SIZE, "size")?,
        mode: number(MODE, "mode")?,
        uid: number(UID, "uid")?,
        gid: number(GID, "gid")?,
        mtime: number(MTIME, "mtime")?,
        major: 0,
        minor: 0,
        other_times: false,
    };
    let format = format(block);
    if matches!(format, Format::V7) {
        return Ok(header);
    }
    header.major = number(MAJOR, "devmajor")?;
    header.minor = number(MINOR, "devminor")?;
    let prefix = match format {
        Format::V7 => &[][..],
        Format::Ustar => until_nul(&block[PREFIX]),
        Format::Star => {
            number(476..488, "atime")?;
            number(488..500, "ctime")?;
            header.other_times = true;
            until_nul(&block[STAR_PREFIX])
        }
        Format::Gnu => {
            header.other_times = block[GNU_ATIME.start] != 0 || block[GNU_CTIME.start] != 0;
            gnu_prefix(block)
        }
    };
    if !prefix.is_empty() {
        header.name = [prefix, b"/", &header.name].concat();
    }
    Ok(header)
}

fn format(block: &[u8; BLOCK]) -> Format {
    match (&block[MAGIC], &block[VERSION]) {
        (b"ustar\0", _) if &block[STAR_TRAILER] == b"tar\0" => Format::Star,
        (b"ustar\0", _) => Format::Ustar,
        (b"ustar ", b" \0") => Format::Gnu,
        _ => Format::V7,
    }
}

/// The GNU format has no prefix: times stand in its place. Writers before Go 1.8 put one there
/// nonetheless, so where the times are no numbers and the text is ASCII it is taken as a prefix.
fn gnu_prefix(block: &[u8; BLOCK]) -> &[u8] {
    let unset_or_number = |range: Range<usize>| {
        let field = &block[range];
        field[0] == 0 || parse_number(field).is_some()
    };
    if unset_or_number(GNU_ATIME) && unset_or_number(GNU_CTIME) {
        return &[];
    }
    let prefix = until_nul(&block[PREFIX]);
    if prefix.is_ascii() { prefix } else { &[] }
}

/// The two sums that tars carry: over unsigned bytes, and, from some old writers, over signed ones.
/// The checksum's own field counts as spaces.
fn checksums(block: &[u8; BLOCK]) -> (u64, u64) {
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if CHECKSUM.contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    // A negative sum has no octal spelling; the unsigned one stands in, which is compared anyway.
    let unsigned = unsigned.unsigned_abs();
    (unsigned, u64::try_from(signed).unwrap_or(unsigned))
}

/// The bytes before the first NUL.
pub(super) fn until_nul(field: &[u8]) -> &[u8] {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    &field[..end]
}

/// A number: base-256 when the first bit is set, else octal.
fn parse_number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => parse_base256(field),
        _ => i64::try_from(parse_octal(field)?).ok(),
    }
}

/// Big-endian two's complement of which the very first bit is the mark of this form.
fn parse_base256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let invert = if negative { 0xff } else { 0 };
    let mut value = 0u64;
    for (at, byte) in field.iter().enumerate() {
        let byte = byte ^ invert;
        let byte = if at == 0 { byte & 0x7f } else { byte };
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if negative { !value } else { value })
}

/// Octal digits between any spaces and NULs; nothing at all is 0.
fn parse_octal(field: &[u8]) -> Option<u64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !blank(byte)) else {
        return Some(0);
    };
    let end = field
        .iter()
        .rposition(|byte| !blank(byte))
        .map_or(start, |last| last + 1);
    until_nul(&field[start..end])
        .iter()
        .try_fold(0u64, |value, digit| match digit {
            b'0'..=b'7' if value >> 61 == 0 => Some(value << 3 | u64::from(digit - b'0')),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_oddities() {
        let cases: [(&[u8], Option<i64>); 14] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0 644 ", Some(0o644)),
            (b"12345670", Some(0o12_345_670)),
            (b"\0\0\0\0", Some(0)),
            (b"", Some(0)),
            (b"        ", Some(0)),
            (b"64\0junk\0", Some(0o64)),
            (b"8", None),
            (b"-1", None),
            (b"+1", None),
            (b"1 2", None),
            (b"777777777777777777777", Some(i64::MAX)),
            (b"1000000000000000000000", None),
        ];
        for (field, expected) in cases {
            assert_eq!(parse_number(field), expected, "{field:?}");
        }
    }

    #[test]
    fn base_256_numbers() {
        let cases: [(&[u8], Option<i64>); 7] = [
            (b"\x80\0\0\0\0\0\0\x01", Some(1)),
            (b"\x80\x02\0\0\0\0\0\0", Some(0x2_0000_0000_0000)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe",
                Some(-2),
            ),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
        ];
        for (field, expected) in cases {
            assert_eq!(parse_number(field), expected, "{field:?}");
        }
    }
}
