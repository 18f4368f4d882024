// SPDX-License-Identifier: Apache-2.0
//! Writing an index file.

use std::mem::size_of;

use zerocopy::IntoBytes;

use super::files::{self, FileContent};
use super::format::{
    COMPATIBLE, CONTENTS, FLAG_REQUIRED, MAGIC, READ_ONLY, RawHeader, RawMetadata, RawSection,
    SECTION_ALIGN, SECTION_CHUNKS, SECTION_FILES, SECTION_METADATA, SECTION_RESTARTS, SECTION_TREE,
    UNMODIFIED, VERSION,
};
use super::{INDEX_FILE_MAX_BYTES, IndexError, UnmodifiedBlob};
use crate::chunkmap::{
    ChunkMapError, ChunkRecord, DeviceForm, PlacedChunk, Restart, write_chunk_map, write_restarts,
    write_unmodified,
};
use crate::digest::{DIGEST_BYTES, DiffId, StrongAlgorithm};
use crate::extent::{BlobSpace, Extent};

/// zstd level of the payload. Most of it is digests, which no level compresses; level 12 takes more
/// than twice the time for a five-hundredth of the size.
const LEVEL: i32 = 9;

/// Where the skeleton lies in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkeletonPin {
    /// Its compressed payload, without the header of the skippable frame.
    pub extent: Extent<BlobSpace>,
    /// sha256 of that payload.
    pub digest: [u8; DIGEST_BYTES],
}

/// What an index file is made of.
#[derive(Debug, Clone, Copy)]
pub struct IndexParts<'a> {
    /// The EROFS image; its one device has [`device_tag`] and as many blocks as the device needs.
    pub tree: &'a [u8],
    /// All chunks, in device order from 0.
    pub chunks: &'a [ChunkRecord],
    /// All file contents, in device order.
    pub files: &'a [FileContent],
    /// Diff ID of the layer.
    pub diff_id: DiffId,
    /// The skeleton in the blob.
    pub skeleton: SkeletonPin,
    /// Algorithm of all strong digests.
    pub algorithm: StrongAlgorithm,
    /// Name of the program; its first 32 bytes are kept.
    pub writer: &'a str,
}

/// The tag of the layer device in the tree: the 64 hex digits of the diff ID.
pub(crate) fn device_tag(diff_id: DiffId) -> Box<[u8; 64]> {
    let mut tag = Box::new([0; 64]);
    for (at, digit) in tag.iter_mut().zip(diff_id.hex().bytes()) {
        *at = digit;
    }
    tag
}

/// What the index of an unmodified blob is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UnmodifiedParts<'a> {
    /// What the device is.
    pub(crate) form: DeviceForm,
    /// The EROFS image; its one device has [`device_tag`] and as many blocks as the device needs.
    pub(crate) tree: &'a [u8],
    /// All chunks, in device order from 0.
    pub(crate) chunks: &'a [PlacedChunk],
    /// Restart points of the frames of gzip.
    pub(crate) restarts: &'a [Restart],
    /// All file contents, in device order.
    pub(crate) files: &'a [FileContent],
    /// Diff ID of the layer.
    pub(crate) diff_id: DiffId,
    /// The blob, and the windows.
    pub(crate) blob: UnmodifiedBlob,
    /// Where the frames end in the blob.
    pub(crate) frames_bytes: u64,
    /// Algorithm of all strong digests.
    pub(crate) algorithm: StrongAlgorithm,
    /// Name of the program; its first 32 bytes are kept.
    pub(crate) writer: &'a str,
}

/// Writes an index file.
///
/// The parts are not validated against each other; [`super::UncheckedIndex::validate`] does that.
///
/// **Errors**: chunks that no map can hold, counts above 32 bits, or a file above
/// [`INDEX_FILE_MAX_BYTES`].
pub fn write_index(parts: &IndexParts<'_>) -> Result<Vec<u8>, IndexError> {
    let chunks = write_chunk_map(parts.algorithm, parts.chunks)?;
    let files = files::write(parts.algorithm, parts.files)?;
    let total = |bytes: fn(&ChunkRecord) -> u32| {
        parts
            .chunks
            .iter()
            .try_fold(0u64, |total, chunk| total.checked_add(bytes(chunk).into()))
            .ok_or(ChunkMapError::TooLarge)
    };
    let metadata = RawMetadata {
        diff_id: *parts.diff_id.as_bytes(),
        device_bytes: total(|chunk| chunk.device_bytes)?.into(),
        frames_bytes: total(|chunk| chunk.frame_bytes)?.into(),
        skeleton_start: parts.skeleton.extent.start().into(),
        skeleton_bytes: parts.skeleton.extent.len().into(),
        skeleton_digest: parts.skeleton.digest,
        chunk_count: count(parts.chunks.len())?.into(),
        file_count: count(parts.files.len())?.into(),
        algorithm: parts.algorithm.code(),
        reserved: [0; 7],
        writer: writer(parts.writer),
        blob_digest: [0; DIGEST_BYTES],
        blob_bytes: 0.into(),
        windows_bytes: 0.into(),
        windows_digest: [0; DIGEST_BYTES],
        reserved_tail: [0; 32],
    };
    write_sections(
        0,
        &[
            (SECTION_TREE, parts.tree),
            (SECTION_CHUNKS, &chunks),
            (SECTION_FILES, &files),
            (SECTION_METADATA, metadata.as_bytes()),
        ],
    )
}

/// Writes the index file of an unmodified blob; see [`write_index`].
pub(crate) fn write_unmodified_index(parts: &UnmodifiedParts<'_>) -> Result<Vec<u8>, IndexError> {
    let chunks = write_unmodified(
        parts.algorithm,
        parts.chunks,
        parts.frames_bytes,
        parts.form,
    )?;
    let restarts = write_restarts(parts.restarts);
    let files = files::write(parts.algorithm, parts.files)?;
    let device_bytes = parts
        .chunks
        .iter()
        .try_fold(0u64, |total, chunk| {
            total.checked_add(chunk.device_bytes.into())
        })
        .ok_or(ChunkMapError::TooLarge)?;
    let metadata = RawMetadata {
        diff_id: *parts.diff_id.as_bytes(),
        device_bytes: device_bytes.into(),
        frames_bytes: parts.frames_bytes.into(),
        skeleton_start: parts.frames_bytes.into(),
        skeleton_bytes: 0.into(),
        skeleton_digest: [0; DIGEST_BYTES],
        chunk_count: count(parts.chunks.len())?.into(),
        file_count: count(parts.files.len())?.into(),
        algorithm: parts.algorithm.code(),
        reserved: [0; 7],
        writer: writer(parts.writer),
        blob_digest: *parts.blob.digest.as_bytes(),
        blob_bytes: parts.blob.bytes.into(),
        windows_bytes: parts.blob.windows.map_or(0, |pin| pin.bytes).into(),
        windows_digest: parts
            .blob
            .windows
            .map_or([0; DIGEST_BYTES], |pin| pin.digest),
        reserved_tail: [0; 32],
    };
    let mut sections: Vec<(u32, &[u8])> = vec![
        (SECTION_TREE, parts.tree),
        (SECTION_CHUNKS, &chunks),
        (SECTION_FILES, &files),
        (SECTION_METADATA, metadata.as_bytes()),
    ];
    if !restarts.is_empty() {
        sections.push((SECTION_RESTARTS, &restarts));
    }
    let features = match parts.form {
        DeviceForm::Tar => UNMODIFIED,
        DeviceForm::Contents => UNMODIFIED | CONTENTS,
    };
    write_sections(features, &sections)
}

fn write_sections(incompatible: u64, sections: &[(u32, &[u8])]) -> Result<Vec<u8>, IndexError> {
    let mut end = (size_of::<RawHeader>() + size_of::<RawSection>() * sections.len()) as u64;
    let mut table = Vec::new();
    for (id, bytes) in sections.iter().copied() {
        let offset = end.next_multiple_of(SECTION_ALIGN);
        let length = bytes.len() as u64;
        end = offset + length;
        let raw = RawSection {
            id: id.into(),
            flags: FLAG_REQUIRED.into(),
            offset: offset.into(),
            bytes: length.into(),
            crc32: crc32fast::hash(bytes).into(),
            reserved: 0.into(),
        };
        table.push((raw, offset, bytes));
    }
    if end > INDEX_FILE_MAX_BYTES {
        return Err(IndexError::AboveCap {
            bytes: end,
            cap: INDEX_FILE_MAX_BYTES,
        });
    }
    let mut header = RawHeader {
        magic: MAGIC,
        version: VERSION.into(),
        section_count: u32::try_from(table.len())
            .map_err(|_| IndexError::TooLarge)?
            .into(),
        compatible: COMPATIBLE.into(),
        read_only: READ_ONLY.into(),
        incompatible: incompatible.into(),
        file_bytes: end.into(),
        reserved: [0; 12],
        crc32: 0.into(),
    };
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[..60]);
    table
        .iter()
        .for_each(|(raw, _, _)| hasher.update(raw.as_bytes()));
    header.crc32 = hasher.finalize().into();
    let mut file = Vec::with_capacity(usize::try_from(end).map_err(|_| IndexError::TooLarge)?);
    file.extend_from_slice(header.as_bytes());
    table
        .iter()
        .for_each(|(raw, _, _)| file.extend_from_slice(raw.as_bytes()));
    for (_, offset, bytes) in &table {
        file.resize(
            usize::try_from(*offset).map_err(|_| IndexError::TooLarge)?,
            0,
        );
        file.extend_from_slice(bytes);
    }
    Ok(file)
}

fn count(length: usize) -> Result<u32, IndexError> {
    u32::try_from(length).map_err(|_| IndexError::TooLarge)
}

fn writer(name: &str) -> [u8; 32] {
    let mut writer = [0; 32];
    for (at, byte) in writer.iter_mut().zip(name.bytes()) {
        *at = byte;
    }
    writer
}

/// Compresses an index file into the payload that a blob carries.
///
/// **Errors**: zstd has no memory.
pub fn compress_index(file: &[u8]) -> Result<Vec<u8>, IndexError> {
    zstd::bulk::compress(file, LEVEL).map_err(|error| IndexError::Zstd {
        reason: error.to_string(),
    })
}
