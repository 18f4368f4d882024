// SPDX-License-Identifier: Apache-2.0
//! Skeleton: all bytes of a tar that are not file content, and how to put the contents back.
//!
//! A node that has the files of a layer under any name can rebuild the exact tar, and so a device
//! that seals against its diff ID, from the skeleton alone. Nothing that mounts a layer needs it.
//!
//! The payload is one zstd frame over a stream of segments, so that neither side holds it whole:
//!
//! ```text
//! magic, version, then segments { literal_bytes u32, content_bytes u64, literal }, the last one 0, 0
//! ```
//!
//! A segment stands for its literal and then one whole file content of `content_bytes` (none when
//! 0). The table of file digests in the layer index has the same contents in the same order.
//!
//! The byte table is in `docs/formats/layer-blob.md`.

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zstd::stream::{read, write};

use crate::extent::{DeviceSpace, Extent};

const MAGIC: [u8; 8] = *b"SLUICESK";
const VERSION: u32 = 1;
/// Literals are flushed at this size; a reader refuses longer ones before it allocates.
const LITERAL_MAX_BYTES: usize = 64 * 1024;
/// zstd level: headers shrink to a thirtieth; each further level gains a few hundredths of that.
const LEVEL: i32 = 6;
/// Largest zstd window that a reader allocates (2^23 bytes); the writer's level needs 2^21.
const WINDOW_LOG_MAX: u32 = 23;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSegment {
    literal_bytes: U32,
    content_bytes: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 16);
const _: () = assert!(size_of::<RawSegment>() == 12);

/// Writes a skeleton while the tar passes.
pub struct SkeletonWriter {
    encoder: write::Encoder<'static, Vec<u8>>,
    literal: Vec<u8>,
}

impl fmt::Debug for SkeletonWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SkeletonWriter")
            .field("literal", &self.literal.len())
            .finish_non_exhaustive()
    }
}

impl SkeletonWriter {
    /// A writer at the start of a tar.
    ///
    /// **Errors**: zstd has no memory.
    pub fn new() -> io::Result<Self> {
        let mut encoder = write::Encoder::new(Vec::new(), LEVEL)?;
        encoder.include_checksum(false)?;
        let header = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
        };
        encoder.write_all(header.as_bytes())?;
        Ok(Self {
            encoder,
            literal: Vec::with_capacity(LITERAL_MAX_BYTES),
        })
    }

    /// Takes bytes that are not file content.
    pub fn literal(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.literal.len() == LITERAL_MAX_BYTES {
                self.segment(0)?;
            }
            let taken = bytes.len().min(LITERAL_MAX_BYTES - self.literal.len());
            self.literal.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// A file content of `bytes` stands here; none for 0.
    pub fn content(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > 0 {
            self.segment(bytes)
        } else {
            Ok(())
        }
    }

    fn segment(&mut self, content_bytes: u64) -> io::Result<()> {
        let literal_bytes = u32::try_from(self.literal.len()).map_err(io::Error::other)?;
        let segment = RawSegment {
            literal_bytes: literal_bytes.into(),
            content_bytes: content_bytes.into(),
        };
        self.encoder.write_all(segment.as_bytes())?;
        self.encoder.write_all(&self.literal)?;
        self.literal.clear();
        Ok(())
    }

    /// Bytes of the payload so far, without those that the compressor still holds.
    pub fn payload_bytes(&self) -> u64 {
        self.encoder.get_ref().len() as u64
    }

    /// The compressed payload.
    pub fn finish(mut self) -> io::Result<Vec<u8>> {
        if !self.literal.is_empty() {
            self.segment(0)?;
        }
        self.segment(0)?;
        self.encoder.finish()
    }
}

/// A skeleton that cannot be read, or contents that do not fit it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SkeletonError {
    /// The payload does not start as a skeleton does.
    #[error("not a skeleton of a known version")]
    Header,
    /// A literal above the cap.
    #[error("skeleton segment {segment}: literal of {bytes} bytes")]
    Literal {
        /// The segment, from 0.
        segment: u64,
        /// Its size.
        bytes: u32,
    },
    /// The tar would get another size than the layer index says.
    #[error("skeleton makes {actual} bytes or more, want {expected}")]
    DeviceBytes {
        /// What the index says.
        expected: u64,
        /// What the skeleton made so far.
        actual: u64,
    },
    /// Bytes after the last segment.
    #[error("skeleton has bytes after its last segment")]
    Trailing,
    /// The provider wrote another number of bytes than the content has.
    #[error("content {ordinal}: {actual} bytes provided, want {expected}")]
    Content {
        /// Its place among the contents, from 0.
        ordinal: u64,
        /// What the skeleton says.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// The payload is damaged, the provider failed, or the output refused bytes.
    #[error("rebuild tar: {0}")]
    Io(#[from] io::Error),
}

/// One file content that a rebuild asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRequest {
    /// Its place among the contents, from 0; the same as in the table of file digests.
    pub ordinal: u64,
    /// Where it stands on the device.
    pub run: Extent<DeviceSpace>,
}

/// Writes the exact tar: the skeleton's bytes, and in between the contents that `provide` writes.
///
/// `device_bytes` is the size that the layer index names; nothing beyond it is written. The caller
/// verifies the outcome against the diff ID.
///
/// **Errors**: a damaged skeleton, a content of another size, or what `provide` and `out` report. The
/// output is then incomplete.
pub fn rebuild<W, P>(
    payload: &[u8],
    device_bytes: u64,
    mut provide: P,
    out: &mut W,
) -> Result<(), SkeletonError>
where
    W: Write,
    P: FnMut(ContentRequest, &mut dyn Write) -> io::Result<()>,
{
    let mut segments = Segments::open(payload, device_bytes)?;
    let mut ordinal = 0;
    while let Some(segment) = segments.advance()? {
        out.write_all(segment.literal)?;
        let run = segment.content;
        if run.is_empty() {
            continue;
        }
        let mut counted = Counted {
            out,
            written: 0,
            limit: run.len(),
        };
        provide(ContentRequest { ordinal, run }, &mut counted)?;
        let actual = counted.written;
        if actual != run.len() {
            return Err(SkeletonError::Content {
                ordinal,
                expected: run.len(),
                actual,
            });
        }
        ordinal += 1;
    }
    Ok(())
}

/// Bytes that are no content, and the content behind them.
#[derive(Debug)]
pub struct Segment<'a> {
    /// First device byte of the literal.
    pub start: u64,
    /// The bytes.
    pub literal: &'a [u8],
    /// Where the content stands, right behind them; empty when there is none.
    pub content: Extent<DeviceSpace>,
}

/// Reads a skeleton segment by segment, so that nobody holds it whole.
pub struct Segments<R: Read> {
    input: BufReader<read::Decoder<'static, BufReader<R>>>,
    literal: Vec<u8>,
    device_bytes: u64,
    /// Device bytes that were passed.
    offset: u64,
    /// Segments that were read.
    count: u64,
    ended: bool,
}

impl<R: Read> fmt::Debug for Segments<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segments")
            .field("offset", &self.offset)
            .field("device_bytes", &self.device_bytes)
            .finish_non_exhaustive()
    }
}

impl<R: Read> Segments<R> {
    /// At the start of a payload; `device_bytes` is the size that the layer index names.
    ///
    /// **Errors**: it does not begin as a skeleton does.
    pub fn open(payload: R, device_bytes: u64) -> Result<Self, SkeletonError> {
        let mut decoder = read::Decoder::new(payload)?.single_frame();
        decoder.window_log_max(WINDOW_LOG_MAX)?;
        let mut input = BufReader::new(decoder);
        let header: RawHeader = read_raw(&mut input)?;
        if header.magic != MAGIC || header.version.get() != VERSION || header.reserved.get() != 0 {
            return Err(SkeletonError::Header);
        }
        Ok(Self {
            input,
            literal: Vec::with_capacity(LITERAL_MAX_BYTES),
            device_bytes,
            offset: 0,
            count: 0,
            ended: false,
        })
    }

    /// The next segment; `None` at the end, when all of the device was passed.
    ///
    /// **Errors**: a damaged payload; one that makes another size.
    pub fn advance(&mut self) -> Result<Option<Segment<'_>>, SkeletonError> {
        if self.ended {
            return Ok(None);
        }
        let raw: RawSegment = read_raw(&mut self.input)?;
        let (literal_bytes, content_bytes) = (raw.literal_bytes.get(), raw.content_bytes.get());
        if literal_bytes == 0 && content_bytes == 0 {
            self.end()?;
            return Ok(None);
        }
        let length = usize::try_from(literal_bytes).unwrap_or(usize::MAX);
        if length > LITERAL_MAX_BYTES {
            return Err(SkeletonError::Literal {
                segment: self.count,
                bytes: literal_bytes,
            });
        }
        let start = self.offset;
        let content_start = start + u64::from(literal_bytes);
        let content = Extent::from_length(content_start, content_bytes)
            .filter(|run| run.end() <= self.device_bytes)
            .ok_or(SkeletonError::DeviceBytes {
                expected: self.device_bytes,
                actual: content_start,
            })?;
        self.literal.resize(length, 0);
        self.input.read_exact(&mut self.literal)?;
        self.offset = content.end();
        self.count += 1;
        Ok(Some(Segment {
            start,
            literal: &self.literal,
            content,
        }))
    }

    fn end(&mut self) -> Result<(), SkeletonError> {
        self.ended = true;
        if self.offset != self.device_bytes {
            return Err(SkeletonError::DeviceBytes {
                expected: self.device_bytes,
                actual: self.offset,
            });
        }
        if self.input.read(&mut [0])? != 0 {
            return Err(SkeletonError::Trailing);
        }
        Ok(())
    }
}

fn read_raw<T: FromBytes + IntoBytes>(input: &mut impl Read) -> io::Result<T> {
    let mut raw = T::new_zeroed();
    input.read_exact(raw.as_mut_bytes())?;
    Ok(raw)
}

/// Counts what a provider writes and lets no byte beyond the content pass.
struct Counted<'a, W> {
    out: &'a mut W,
    written: u64,
    limit: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = usize::try_from(self.limit - self.written).unwrap_or(usize::MAX);
        if left == 0 && !bytes.is_empty() {
            return Err(io::Error::other("content longer than the skeleton says"));
        }
        let written = self.out.write(&bytes[..bytes.len().min(left)])?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar of three literals and two contents, the last literal longer than one segment.
    fn example() -> (Vec<u8>, Vec<u8>, Vec<Vec<u8>>) {
        let contents = vec![b"first".to_vec(), b"second content".to_vec()];
        let long = vec![7; LITERAL_MAX_BYTES * 2 + 5];
        let mut writer = SkeletonWriter::new().unwrap();
        let mut tar = Vec::new();
        for (literal, content) in [
            (&b"head"[..], &contents[0][..]),
            (b"", &contents[1]),
            (&long, b""),
        ] {
            writer.literal(literal).unwrap();
            writer.content(content.len() as u64).unwrap();
            tar.extend_from_slice(literal);
            tar.extend_from_slice(content);
        }
        (writer.finish().unwrap(), tar, contents)
    }

    fn build(
        payload: &[u8],
        device_bytes: u64,
        contents: &[Vec<u8>],
    ) -> Result<Vec<u8>, SkeletonError> {
        let mut out = Vec::new();
        let provide = |request: ContentRequest, out: &mut dyn Write| {
            out.write_all(&contents[usize::try_from(request.ordinal).unwrap()])
        };
        rebuild(payload, device_bytes, provide, &mut out)?;
        Ok(out)
    }

    #[test]
    fn the_tar_comes_back_byte_for_byte() {
        let (payload, tar, contents) = example();
        assert_eq!(build(&payload, tar.len() as u64, &contents).unwrap(), tar);
    }

    #[test]
    fn an_empty_tar_has_a_skeleton_too() {
        let payload = SkeletonWriter::new().unwrap().finish().unwrap();
        assert_eq!(build(&payload, 0, &[]).unwrap(), b"");
    }

    #[test]
    fn other_sizes_are_refused() {
        let (payload, tar, mut contents) = example();
        for wrong in [0, tar.len() as u64 - 1, tar.len() as u64 + 1] {
            let result = build(&payload, wrong, &contents);
            assert!(
                matches!(result, Err(SkeletonError::DeviceBytes { .. })),
                "{wrong}"
            );
        }
        contents[1].pop();
        let result = build(&payload, tar.len() as u64, &contents);
        assert!(matches!(
            result,
            Err(SkeletonError::Content {
                ordinal: 1,
                expected: 14,
                actual: 13
            })
        ));
        contents[1] = vec![1; 15];
        let result = build(&payload, tar.len() as u64, &contents);
        assert!(matches!(result, Err(SkeletonError::Io(_))));
    }

    #[test]
    fn damaged_payloads_are_refused() {
        let (payload, tar, contents) = example();
        for length in 0..payload.len() {
            assert!(
                build(&payload[..length], tar.len() as u64, &contents).is_err(),
                "{length}"
            );
        }
        let raw = zstd::encode_all(&b"SLUICESK\x02\0\0\0\0\0\0\0"[..], 1).unwrap();
        assert!(matches!(build(&raw, 0, &[]), Err(SkeletonError::Header)));
        let huge = [&b"SLUICESK\x01\0\0\0\0\0\0\0"[..], &[255; 12]].concat();
        let raw = zstd::encode_all(&huge[..], 1).unwrap();
        assert!(matches!(
            build(&raw, 0, &[]),
            Err(SkeletonError::Literal { .. })
        ));
        let more = [&b"SLUICESK\x01\0\0\0\0\0\0\0"[..], &[0; 13]].concat();
        let raw = zstd::encode_all(&more[..], 1).unwrap();
        assert!(matches!(build(&raw, 0, &[]), Err(SkeletonError::Trailing)));
    }
}
