// SPDX-License-Identifier: Apache-2.0
//! Header of a gzip member, byte by byte.
//!
//! Nothing of it is kept: name, comment and extra field may be of any length. Its own checksum is
//! verified where there is one. Reserved flags are refused, as RFC 1952 asks.

use super::MAGIC;

const DEFLATE: u8 = 8;
const FLAG_CRC: u8 = 2;
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
const FLAG_COMMENT: u8 = 16;
const FLAGS_RESERVED: u8 = 0xe0;
/// Bytes that every header has.
const FIXED_BYTES: usize = 10;

/// What the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Fixed(usize),
    ExtraLow,
    ExtraHigh { low: u8 },
    Extra { left: u16 },
    Name,
    Comment,
    CrcLow,
    CrcHigh { low: u8 },
    Done,
}

/// Reads one header.
#[derive(Debug, Clone)]
pub(crate) struct HeaderParser {
    field: Field,
    flags: u8,
    crc: crc32fast::Hasher,
}

impl HeaderParser {
    /// Before the first byte.
    pub(crate) fn new() -> Self {
        Self {
            field: Field::Fixed(0),
            flags: 0,
            crc: crc32fast::Hasher::new(),
        }
    }

    /// After the magic, which somebody else took.
    pub(crate) fn after_magic() -> Self {
        let mut parser = Self::new();
        parser.field = Field::Fixed(MAGIC.len());
        parser.crc.update(&MAGIC);
        parser
    }

    /// Whether the header is complete.
    pub(crate) fn is_done(&self) -> bool {
        self.field == Field::Done
    }

    /// Takes bytes up to the header's end; returns how many.
    ///
    /// **Errors**: what is wrong with the header.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        for (taken, byte) in bytes.iter().enumerate() {
            if self.is_done() {
                return Ok(taken);
            }
            let next = self.next(*byte)?;
            if !matches!(self.field, Field::CrcLow | Field::CrcHigh { .. }) {
                self.crc.update(&[*byte]);
            }
            self.field = self.skip_absent(next);
        }
        Ok(bytes.len())
    }

    fn next(&mut self, byte: u8) -> Result<Field, &'static str> {
        Ok(match self.field {
            Field::Fixed(at) => {
                match at {
                    0 | 1 if byte != MAGIC[at] => return Err("no gzip magic"),
                    2 if byte != DEFLATE => return Err("unknown compression method"),
                    3 if byte & FLAGS_RESERVED != 0 => return Err("reserved flags set"),
                    3 => self.flags = byte,
                    _ => {}
                }
                match at + 1 {
                    FIXED_BYTES => Field::ExtraLow,
                    next => Field::Fixed(next),
                }
            }
            Field::ExtraLow => Field::ExtraHigh { low: byte },
            Field::ExtraHigh { low } => Field::Extra {
                left: u16::from_le_bytes([low, byte]),
            },
            Field::Extra { left } => Field::Extra {
                left: left.saturating_sub(1),
            },
            Field::Name if byte == 0 => Field::Comment,
            Field::Name => Field::Name,
            Field::Comment if byte == 0 => Field::CrcLow,
            Field::Comment => Field::Comment,
            Field::CrcLow => Field::CrcHigh { low: byte },
            Field::CrcHigh { low } => {
                let expected = u16::from_le_bytes([low, byte]);
                let [b0, b1, ..] = self.crc.clone().finalize().to_le_bytes();
                if u16::from_le_bytes([b0, b1]) != expected {
                    return Err("wrong header checksum");
                }
                Field::Done
            }
            Field::Done => Field::Done,
        })
    }

    /// The first field from `field` on that this header has.
    fn skip_absent(&self, field: Field) -> Field {
        let has = |flag| self.flags & flag != 0;
        match field {
            Field::ExtraLow if !has(FLAG_EXTRA) => self.skip_absent(Field::Name),
            Field::Extra { left: 0 } => self.skip_absent(Field::Name),
            // A name that has begun is never absent.
            Field::Name if !has(FLAG_NAME) => self.skip_absent(Field::Comment),
            Field::Comment if !has(FLAG_COMMENT) => self.skip_absent(Field::CrcLow),
            Field::CrcLow if !has(FLAG_CRC) => Field::Done,
            present => present,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with all fields that `flags` name, its checksum right.
    pub(crate) fn header(flags: u8) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 255];
        if flags & FLAG_EXTRA != 0 {
            bytes.extend([3, 0, b'a', 0, b'b']);
        }
        if flags & FLAG_NAME != 0 {
            bytes.extend(b"name\0");
        }
        if flags & FLAG_COMMENT != 0 {
            bytes.extend(b"\0");
        }
        if flags & FLAG_CRC != 0 {
            let crc = crc32fast::hash(&bytes).to_le_bytes();
            bytes.extend(&crc[..2]);
        }
        bytes
    }

    #[test]
    fn every_combination_of_fields_is_read_to_its_end() {
        for flags in 0..32 {
            let header = header(flags);
            let bytes = [&header[..], b"rest"].concat();
            for piece in [1, 2, 3, 100] {
                let mut parser = HeaderParser::new();
                let mut taken = 0;
                while !parser.is_done() {
                    let end = bytes.len().min(taken + piece);
                    taken += parser.push(&bytes[taken..end]).unwrap();
                }
                assert_eq!(taken, header.len(), "flags {flags:#x}");
                assert_eq!(parser.push(b"more"), Ok(0));
            }
            for length in 0..header.len() {
                let mut parser = HeaderParser::new();
                assert_eq!(parser.push(&header[..length]), Ok(length));
                assert!(!parser.is_done(), "flags {flags:#x}, {length}");
            }
            let mut parser = HeaderParser::after_magic();
            assert_eq!(parser.push(&header[2..]), Ok(header.len() - 2));
            assert!(parser.is_done());
        }
    }

    #[test]
    fn an_empty_extra_field_is_one() {
        let mut bytes = vec![
            0x1f,
            0x8b,
            8,
            FLAG_EXTRA | FLAG_NAME,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        bytes.extend(b"n\0x");
        let mut parser = HeaderParser::new();
        assert_eq!(parser.push(&bytes), Ok(bytes.len() - 1));
    }

    #[test]
    fn broken_headers_are_refused() {
        let with = |at: usize, byte| {
            let mut bytes = header(31);
            bytes[at] = byte;
            HeaderParser::new().push(&bytes).unwrap_err()
        };
        assert_eq!(with(0, 0), "no gzip magic");
        assert_eq!(with(1, 0), "no gzip magic");
        assert_eq!(with(2, 0), "unknown compression method");
        assert_eq!(with(3, 0x20), "reserved flags set");
        assert_eq!(with(5, 9), "wrong header checksum");
        let last = header(31).len() - 1;
        assert_eq!(with(last, header(31)[last] ^ 1), "wrong header checksum");
    }
}
