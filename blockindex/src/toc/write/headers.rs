// SPDX-License-Identifier: Apache-2.0
//! The headers of a tar as tar-split keeps them: with these and the files the exact tar is made again.
//!
//! A line of JSON for what stands before each content, and one for the content: its name, size and crc64. Readers count
//! on one line with all bytes from the end of the content before, padding first, to the end of a header. They are the
//! skeleton that [`crate::skeleton`] is, in words of others.

use std::fmt;
use std::io::{self, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use zstd::stream::write::Encoder;

/// Writes the lines, compressed.
pub(super) struct HeadersWriter {
    encoder: Encoder<'static, Vec<u8>>,
    lines: u64,
    bytes: u64,
}

/// All lines.
#[derive(Debug)]
pub(super) struct Headers {
    /// Compressed.
    pub(super) payload: Vec<u8>,
    /// Bytes that they decompress to.
    pub(super) bytes: u64,
}

impl fmt::Debug for HeadersWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeadersWriter")
            .field("lines", &self.lines)
            .finish_non_exhaustive()
    }
}

impl HeadersWriter {
    pub(super) fn new(level: i32) -> io::Result<Self> {
        let mut encoder = Encoder::new(Vec::new(), level)?;
        encoder.include_checksum(false)?;
        Ok(Self {
            encoder,
            lines: 0,
            bytes: 0,
        })
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.encoder.get_ref().len() as u64
    }

    /// Bytes that are no content.
    pub(super) fn segment(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let payload = STANDARD.encode(bytes);
        let line = self.lines;
        self.line(format!(
            "{{\"type\":2,\"payload\":\"{payload}\",\"position\":{line}}}\n"
        ))
    }

    /// The content of an entry, which may be none.
    pub(super) fn file(
        &mut self,
        name: &[u8],
        bytes: u64,
        crc64: Option<[u8; 8]>,
    ) -> io::Result<()> {
        let name = Value::from(String::from_utf8_lossy(name));
        let payload = match crc64 {
            Some(crc64) => format!("\"{}\"", STANDARD.encode(crc64)),
            None => "null".to_owned(),
        };
        let size = match bytes {
            0 => String::new(),
            bytes => format!(",\"size\":{bytes}"),
        };
        let line = self.lines;
        self.line(format!(
            "{{\"type\":1,\"name\":{name}{size},\"payload\":{payload},\"position\":{line}}}\n"
        ))
    }

    fn line(&mut self, line: String) -> io::Result<()> {
        self.lines += 1;
        self.bytes += line.len() as u64;
        self.encoder.write_all(line.as_bytes())
    }

    pub(super) fn finish(self) -> io::Result<Headers> {
        Ok(Headers {
            payload: self.encoder.finish()?,
            bytes: self.bytes,
        })
    }
}

/// The polynomial of ISO 3309, lowest bit first.
const POLYNOMIAL: u64 = 0xD800_0000_0000_0000;

/// For each byte what it makes of the sum, and the same with up to seven zeros behind it.
static TABLES: [[u64; 256]; 8] = tables();

const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 {
                sum >> 1 ^ POLYNOMIAL
            } else {
                sum >> 1
            };
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// The sum that tar-split has of contents: crc64 of ISO 3309, big-endian.
#[derive(Debug)]
pub(super) struct Crc64(u64);

impl Default for Crc64 {
    fn default() -> Self {
        Self(u64::MAX)
    }
}

impl Crc64 {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        let (eights, rest) = bytes.as_chunks::<8>();
        let mut sum = self.0;
        for eight in eights {
            let mixed = (sum ^ u64::from_le_bytes(*eight)).to_le_bytes();
            sum = mixed
                .iter()
                .zip(TABLES.iter().rev())
                .fold(0, |sum, (byte, table)| sum ^ table[usize::from(*byte)]);
        }
        for byte in rest {
            let [low, ..] = (sum ^ u64::from(*byte)).to_le_bytes();
            sum = sum >> 8 ^ TABLES[0][usize::from(low)];
        }
        self.0 = sum;
    }

    pub(super) fn finish(&self) -> [u8; 8] {
        (!self.0).to_be_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_iso_3309() {
        for (text, expected) in [
            ("", 0),
            ("a", 0x3420_0000_0000_0000_u64),
            ("abcdefghij", 0x7F5B_6E21_B002_D367),
            ("123456789", 0xB909_56C7_75A4_1001),
        ] {
            for cut in 0..=text.len() {
                let mut sum = Crc64::default();
                sum.update(&text.as_bytes()[..cut]);
                sum.update(&text.as_bytes()[cut..]);
                assert_eq!(u64::from_be_bytes(sum.finish()), expected, "{text} {cut}");
            }
        }
    }

    #[test]
    fn lines_are_those_of_tar_split() {
        let mut headers = HeadersWriter::new(3).unwrap();
        headers.segment(b"abc").unwrap();
        headers.segment(b"").unwrap();
        headers.file("a\"b".as_bytes(), 0, None).unwrap();
        headers
            .file(b"c", 7, Some([0, 0, 0, 0, 0, 0, 0, 1]))
            .unwrap();
        let headers = headers.finish().unwrap();
        let text = zstd::decode_all(headers.payload.as_slice()).unwrap();
        assert_eq!(text.len() as u64, headers.bytes);
        assert_eq!(
            String::from_utf8(text).unwrap(),
            concat!(
                "{\"type\":2,\"payload\":\"YWJj\",\"position\":0}\n",
                "{\"type\":1,\"name\":\"a\\\"b\",\"payload\":null,\"position\":1}\n",
                "{\"type\":1,\"name\":\"c\",\"size\":7,\"payload\":\"AAAAAAAAAAE=\",\"position\":2}\n",
            )
        );
    }
}
