// SPDX-License-Identifier: Apache-2.0
//! File of windows: what the restart points of a gzip blob need besides the blob.
//!
//! A header and then the windows, each a zstd frame of its own that names its content size, in order of
//! their restart points. The index pins the file as a whole and each window in it, so the file can be
//! fetched whole or a window at a time; nobody needs it to mount, nor to read a blob from its front.
//!
//! The byte table is in `docs/formats/layer-index.md`.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zstd::bulk::Compressor;
use zstd::zstd_safe::{self, CParameter};

use crate::chunkmap::WindowPin;
use crate::digest::StrongAlgorithm;
use crate::extent::Extent;
use crate::gzip::WINDOW_MAX_BYTES;

const MAGIC: [u8; 8] = *b"SLUICEWN";
const VERSION: u32 = 1;
/// Bytes of the file's header.
pub const HEADER_BYTES: u64 = 16;
/// The most bytes of a compressed window: one of noise, and what zstd adds to it.
pub const PAYLOAD_MAX_BYTES: u64 = WINDOW_MAX_BYTES as u64 + 1024;
/// The most bytes of a file of windows. As an index above its limit, a larger one makes a layer not lazy.
pub const WINDOWS_MAX_BYTES: u64 = 256 * 1024 * 1024;
/// zstd level of windows. Level 9 saves 6 % of them and takes four times as long, which is a sixth of the
/// time of indexing (`docs/decisions/040-gzip-restarts.md`).
const LEVEL: i32 = 3;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    reserved: [u8; 4],
}

const _: () = assert!(size_of::<RawHeader>() as u64 == HEADER_BYTES);
const _: () = assert!(offset_of!(RawHeader, version) == 8);

/// A window or its file that is not what the index says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// The file does not begin as one of this version.
    #[error("not a file of windows of version 1")]
    Header,
    /// The payload has another length or digest than the index says.
    #[error("window at {start}: not the payload that the index pins")]
    Payload {
        /// Where it should stand in the file.
        start: u64,
    },
    /// The payload is no zstd frame of the window's size.
    #[error("window at {start}: not one zstd frame of {bytes} bytes")]
    Frame {
        /// Where it stands in the file.
        start: u64,
        /// Bytes that the window should have.
        bytes: u64,
    },
    /// Compression failed.
    #[error("compress window: {reason}")]
    Zstd {
        /// zstd's words.
        reason: String,
    },
}

/// Checks the first [`HEADER_BYTES`] of a file.
///
/// **Errors**: another file, or one of another version.
pub fn check_header(header: &[u8]) -> Result<(), WindowError> {
    match RawHeader::read_from_prefix(header) {
        Ok((raw, _))
            if raw.magic == MAGIC && raw.version.get() == VERSION && raw.reserved == [0; 4] =>
        {
            Ok(())
        }
        _ => Err(WindowError::Header),
    }
}

/// Verifies and decompresses one window.
///
/// **Shape**: `payload` is exactly the bytes at `pin.extent` of the file.
///
/// **Errors**: anything that is not precisely what the index says; at most 32 KiB are allocated.
pub fn read_window(
    payload: &[u8],
    pin: &WindowPin,
    algorithm: StrongAlgorithm,
) -> Result<Vec<u8>, WindowError> {
    let start = pin.extent.start();
    if payload.len() as u64 != pin.extent.len() || algorithm.digest(payload) != pin.digest {
        return Err(WindowError::Payload { start });
    }
    let bytes = u64::from(pin.bytes);
    let frame_error = WindowError::Frame { start, bytes };
    let named = zstd_safe::get_frame_content_size(payload).ok().flatten();
    let whole = zstd_safe::find_frame_compressed_size(payload) == Ok(payload.len());
    if !whole || named != Some(bytes) || bytes > WINDOW_MAX_BYTES as u64 {
        return Err(frame_error);
    }
    match zstd::bulk::decompress(payload, WINDOW_MAX_BYTES) {
        Ok(window) if window.len() as u64 == bytes => Ok(window),
        _ => Err(frame_error),
    }
}

/// Writes a file of windows.
pub(crate) struct WindowsWriter {
    file: Vec<u8>,
    compressor: Compressor<'static>,
    algorithm: StrongAlgorithm,
}

impl WindowsWriter {
    /// A file without windows.
    ///
    /// **Errors**: zstd has no memory.
    pub(crate) fn new(algorithm: StrongAlgorithm) -> Result<Self, WindowError> {
        let mut compressor = Compressor::new(LEVEL).map_err(failed)?;
        for parameter in [
            CParameter::ContentSizeFlag(true),
            CParameter::ChecksumFlag(false),
        ] {
            compressor.set_parameter(parameter).map_err(failed)?;
        }
        let header = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: [0; 4],
        };
        Ok(Self {
            file: header.as_bytes().to_vec(),
            compressor,
            algorithm,
        })
    }

    /// Adds a window; an empty one needs no place.
    ///
    /// **Errors**: zstd has no memory.
    pub(crate) fn add(&mut self, window: &[u8]) -> Result<Option<WindowPin>, WindowError> {
        if window.is_empty() {
            return Ok(None);
        }
        let payload = self.compressor.compress(window).map_err(failed)?;
        let start = self.file.len() as u64;
        let frame_error = WindowError::Frame {
            start,
            bytes: window.len() as u64,
        };
        let extent = Extent::from_length(start, payload.len() as u64);
        let pin = WindowPin {
            extent: extent.ok_or_else(|| frame_error.clone())?,
            bytes: u32::try_from(window.len()).map_err(|_| frame_error)?,
            digest: self.algorithm.digest(&payload),
        };
        self.file.extend_from_slice(&payload);
        Ok(Some(pin))
    }

    /// Bytes of the file by now.
    pub(crate) fn bytes(&self) -> u64 {
        self.file.len() as u64
    }

    /// The file; empty when it has no window.
    pub(crate) fn finish(self) -> Vec<u8> {
        if self.bytes() == HEADER_BYTES {
            Vec::new()
        } else {
            self.file
        }
    }
}

impl std::fmt::Debug for WindowsWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WindowsWriter")
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

fn failed(error: std::io::Error) -> WindowError {
    WindowError::Zstd {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALGORITHM: StrongAlgorithm = StrongAlgorithm::Blake3;

    fn of(window: &[u8]) -> (Vec<u8>, WindowPin) {
        let mut writer = WindowsWriter::new(ALGORITHM).unwrap();
        let pin = writer.add(window).unwrap().unwrap();
        (writer.finish(), pin)
    }

    fn payload<'a>(file: &'a [u8], pin: &WindowPin) -> &'a [u8] {
        let at = |offset| usize::try_from(offset).unwrap();
        &file[at(pin.extent.start())..at(pin.extent.end())]
    }

    /// A payload that is pinned although no writer makes it.
    fn forged(payload: &[u8], bytes: u32) -> Result<Vec<u8>, WindowError> {
        let pin = WindowPin {
            extent: Extent::from_length(16, payload.len() as u64).unwrap(),
            bytes,
            digest: ALGORITHM.digest(payload),
        };
        read_window(payload, &pin, ALGORITHM)
    }

    #[test]
    fn windows_read_back_and_the_empty_file_is_none() {
        let writer = WindowsWriter::new(ALGORITHM).unwrap();
        assert!(writer.finish().is_empty());
        let mut writer = WindowsWriter::new(ALGORITHM).unwrap();
        let windows = [vec![1; 32 * 1024], vec![], vec![7], (0..=255).collect()];
        let pins: Vec<_> = windows.iter().map(|it| writer.add(it).unwrap()).collect();
        let file = writer.finish();
        check_header(&file).unwrap();
        let mut end = HEADER_BYTES;
        for (window, pin) in windows.iter().zip(&pins) {
            assert_eq!(pin.is_none(), window.is_empty());
            let Some(pin) = pin else { continue };
            assert_eq!(pin.extent.start(), end);
            end = pin.extent.end();
            assert_eq!(
                &read_window(payload(&file, pin), pin, ALGORITHM).unwrap(),
                window
            );
        }
        assert_eq!(end, file.len() as u64);
    }

    #[test]
    fn noise_fits_under_the_cap() {
        let noise: Vec<u8> = (0u64..4096)
            .flat_map(|at| blake3::hash(&at.to_le_bytes()).as_bytes()[..8].to_vec())
            .collect();
        assert_eq!(noise.len(), WINDOW_MAX_BYTES);
        let (file, pin) = of(&noise);
        assert!(pin.extent.len() <= PAYLOAD_MAX_BYTES && pin.extent.len() > 32 * 1024);
        assert_eq!(
            read_window(payload(&file, &pin), &pin, ALGORITHM).unwrap(),
            noise
        );
    }

    #[test]
    fn other_bytes_are_noticed_before_they_are_decompressed() {
        let (file, pin) = of(&[3; 5000]);
        let good = payload(&file, &pin);
        let start = 16;
        for at in 0..good.len() {
            let mut damaged = good.to_vec();
            damaged[at] ^= 1;
            assert_eq!(
                read_window(&damaged, &pin, ALGORITHM),
                Err(WindowError::Payload { start })
            );
            assert_eq!(
                read_window(&good[..at], &pin, ALGORITHM),
                Err(WindowError::Payload { start })
            );
        }
        let other = StrongAlgorithm::Sha256;
        assert_eq!(
            read_window(good, &pin, other),
            Err(WindowError::Payload { start })
        );
    }

    #[test]
    fn windows_that_expand_to_more_are_refused() {
        let compress = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).unwrap();
        let bomb = compress(&vec![0; 10 << 20]);
        for bytes in [1, 32_768, 10 << 20] {
            assert!(matches!(
                forged(&bomb, bytes),
                Err(WindowError::Frame { .. })
            ));
        }
        let small = compress(&[1; 100]);
        assert_eq!(forged(&small, 100).unwrap(), [1; 100]);
        assert!(forged(&small, 99).is_err() && forged(&small, 101).is_err());
        assert!(forged(&[small.clone(), small].concat(), 100).is_err());
        // No content size: the output's end is not known before.
        let mut stream = zstd::Encoder::new(Vec::new(), 3).unwrap();
        std::io::Write::write_all(&mut stream, &[1; 100]).unwrap();
        assert!(forged(&stream.finish().unwrap(), 100).is_err());
        assert!(forged(b"", 0).is_err());
        assert!(forged(b"garbage", 7).is_err());
    }

    #[test]
    fn headers_of_other_files_are_refused() {
        let (file, _) = of(&[3; 5000]);
        for at in 0..16 {
            let mut other = file.clone();
            other[at] ^= 1;
            assert_eq!(check_header(&other), Err(WindowError::Header), "{at}");
            assert_eq!(check_header(&file[..at]), Err(WindowError::Header));
        }
    }
}
