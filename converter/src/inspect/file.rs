// SPDX-License-Identifier: Apache-2.0
//! Looks into a file: a blob, all of which is then checked, or an index.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use sluice_blockindex::annotations::INDEX_MAX_BYTES;
use sluice_blockindex::digest::{DiffId, Sha256Hasher};
use sluice_blockindex::encode::INDEX_FRAME_MAGIC;
use sluice_blockindex::frames::decode_chunk_into;
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, SkeletonPin, decompress_index};
use sluice_blockindex::seektable::{self, SKIPPABLE_HEADER_BYTES, SeekEntry};

use super::{IndexReport, InspectError, InspectedIndex, beyond_the_end, inspect_index, wrong};

/// The last bytes of a seek table, which tell how long it is.
const SEEK_FOOTER_BYTES: u64 = 9;
/// Bytes of a file in memory at a time, where a part of it may be large.
const READ_BYTES: u64 = 1024 * 1024;

/// What was found in a file; nothing in it is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileReport {
    /// An index, alone or in its blob, and the listing of its files if that was asked for.
    Index(IndexReport, Option<String>),
    /// A blob that can be read frame by frame, but has no index.
    NotLazy(NotLazyReport),
}

/// What the seek table of a blob without an index says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotLazyReport {
    /// Why the blob is not lazy, as far as it tells.
    pub reason: String,
    /// Diff ID of what it decompresses to.
    pub diff_id: String,
    /// Bytes of that.
    pub device_bytes: u64,
    /// Frames.
    pub frames: u64,
    /// Bytes of all frames.
    pub frames_bytes: u64,
}

/// Inspects a file that is a converted blob, an index file, or the compressed index of a blob.
pub fn inspect_file(file: &File, tree: bool) -> Result<FileReport, InspectError> {
    let bytes = file.metadata()?.len();
    if let Ok(footer) = read_at(
        file,
        bytes.saturating_sub(SEEK_FOOTER_BYTES),
        SEEK_FOOTER_BYTES,
    ) && let Ok(table_bytes) = seektable::frame_bytes(&footer)
    {
        return inspect_blob(file, bytes, table_bytes, tree);
    }
    if bytes > INDEX_FILE_MAX_BYTES {
        return Err(wrong(
            "neither a converted blob (no seek table) nor a layer index (too large)",
        ));
    }
    let content = read_at(file, 0, bytes)?;
    let (content, payload_bytes) = match decompress_index(&content, INDEX_FILE_MAX_BYTES) {
        Ok(file) => (file, bytes),
        Err(_) => (content, 0),
    };
    let inspected = inspect_index(content, payload_bytes, tree)?;
    Ok(FileReport::Index(inspected.report, inspected.listing))
}

fn read_at(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Reads the index of a blob, then checks every frame, the diff ID and the skeleton.
fn inspect_blob(
    file: &File,
    blob_bytes: u64,
    table_bytes: u64,
    tree: bool,
) -> Result<FileReport, InspectError> {
    let table_start = blob_bytes.checked_sub(table_bytes);
    let table_start = table_start.ok_or_else(|| wrong("seek table is longer than the blob"))?;
    let entries = seektable::parse(&read_at(file, table_start, table_bytes)?).map_err(wrong)?;
    let mut position = 0_u64;
    let mut payload = None;
    for entry in &entries {
        let frame_bytes = u64::from(entry.compressed_bytes);
        if entry.decompressed_bytes == 0 && frame_bytes >= SKIPPABLE_HEADER_BYTES {
            let magic = read_at(file, position, 4)?;
            let length = frame_bytes - SKIPPABLE_HEADER_BYTES;
            if magic == INDEX_FRAME_MAGIC.to_le_bytes() && length <= INDEX_MAX_BYTES {
                payload = Some(read_at(file, position + SKIPPABLE_HEADER_BYTES, length)?);
            }
        }
        position += frame_bytes;
    }
    if position != table_start {
        let reason = format!("frames of {position} bytes before a seek table at {table_start}");
        return Err(wrong(reason));
    }
    let Some(payload) = payload else {
        return inspect_frames(file, &entries);
    };
    let content = decompress_index(&payload, INDEX_FILE_MAX_BYTES).map_err(wrong)?;
    let InspectedIndex {
        index,
        report,
        listing,
    } = inspect_index(content, payload.len() as u64, tree)?;
    if !index.fits_blob(blob_bytes) {
        return Err(beyond_the_end());
    }
    let mut hasher = Sha256Hasher::new();
    let mut chunk_bytes = Vec::new();
    for (ordinal, chunk) in index.chunk_map().chunks().enumerate() {
        let chunk = chunk.ok_or_else(|| wrong("the chunk map ends early"))?;
        let sizes = entries.get(ordinal).map(|entry| {
            (
                u64::from(entry.compressed_bytes),
                u64::from(entry.decompressed_bytes),
            )
        });
        if sizes != Some((chunk.blob.len(), chunk.device.len())) {
            return Err(wrong(format!(
                "seek table and chunk map differ at frame {ordinal}"
            )));
        }
        let frame = read_at(file, chunk.blob.start(), chunk.blob.len())?;
        decode_chunk_into(&frame, &chunk, &mut chunk_bytes).map_err(wrong)?;
        hasher.update(&chunk_bytes);
    }
    let actual = DiffId::from_bytes(hasher.finish());
    if actual != index.diff_id() {
        let said = index.diff_id();
        return Err(wrong(format!("diff ID is {actual}, the index says {said}")));
    }
    check_skeleton(file, &index.metadata().skeleton)?;
    Ok(FileReport::Index(report, listing))
}

/// The skeleton is not needed to mount; what rebuilds a layer from it relies on its digest.
fn check_skeleton(file: &File, pin: &SkeletonPin) -> Result<(), InspectError> {
    let mut hasher = Sha256Hasher::new();
    let mut start = pin.extent.start();
    while start < pin.extent.end() {
        let length = (pin.extent.end() - start).min(READ_BYTES);
        hasher.update(&read_at(file, start, length)?);
        start += length;
    }
    match hasher.finish() == pin.digest {
        true => Ok(()),
        false => Err(wrong("the skeleton has another digest than the index says")),
    }
}

/// Checks a blob that has a seek table and nothing else: what every frame decompresses to.
fn inspect_frames(file: &File, entries: &[SeekEntry]) -> Result<FileReport, InspectError> {
    let mut hasher = Sha256Hasher::new();
    let (mut position, mut device_bytes) = (0_u64, 0_u64);
    for (ordinal, entry) in entries.iter().enumerate() {
        let expected = u64::from(entry.decompressed_bytes);
        let length = u64::from(entry.compressed_bytes);
        if expected == 0 {
            // We write such frames around an index only, and then it must be found.
            return Err(wrong(format!(
                "frame {ordinal} is empty, and there is no layer index"
            )));
        }
        let frame = FileRange {
            file,
            position,
            end: position + length,
        };
        let actual = hash_frame(frame, &mut hasher)
            .map_err(|e| wrong(format!("decompress frame {ordinal}: {e}")))?;
        if actual != expected {
            return Err(wrong(format!(
                "frame {ordinal} has {actual} bytes, the seek table says {expected}"
            )));
        }
        position += length;
        device_bytes += actual;
    }
    Ok(FileReport::NotLazy(NotLazyReport {
        reason: "seekable zstd without a layer index".to_owned(),
        diff_id: DiffId::from_bytes(hasher.finish()).to_string(),
        device_bytes,
        frames: entries.len() as u64,
        frames_bytes: position,
    }))
}

fn hash_frame(frame: FileRange<'_>, hasher: &mut Sha256Hasher) -> io::Result<u64> {
    let mut decoder = zstd::stream::read::Decoder::new(BufReader::new(frame))?;
    let mut part = vec![0; 128 * 1024];
    let mut total = 0;
    loop {
        match decoder.read(&mut part)? {
            0 => return Ok(total),
            length => {
                hasher.update(&part[..length]);
                total += length as u64;
            }
        }
    }
}

/// A range of a file as a reader.
#[derive(Debug)]
struct FileRange<'a> {
    file: &'a File,
    position: u64,
    end: u64,
}

impl Read for FileRange<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let length = out.len().min(left);
        let read = self.file.read_at(&mut out[..length], self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}
