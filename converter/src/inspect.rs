// SPDX-License-Identifier: Apache-2.0
//! Looks into converted layers: what their indexes say, and whether it is true.
//!
//! Of an image in a store only the indexes are read (one range each) and validated. Of a blob in a
//! file everything is checked: each frame against its chunk, all of it against the diff ID.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use sluice_blockindex::annotations::{INDEX_MAX_BYTES, LayerAnnotations, LayerMark};
use sluice_blockindex::digest::{DiffId, IndexDigest, Sha256Hasher};
use sluice_blockindex::dump::dump;
use sluice_blockindex::encode::INDEX_FRAME_MAGIC;
use sluice_blockindex::erofs::{TreeLimits, validate};
use sluice_blockindex::frames::decode_chunk_into;
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, Index, UncheckedIndex, decompress_index};
use sluice_blockindex::seektable::{self, SKIPPABLE_HEADER_BYTES};

use crate::image::{Descriptor, ImageError, ImageReader};

#[cfg(test)]
mod tests;

/// The last bytes of a seek table, which tell how long it is.
const SEEK_FOOTER_BYTES: u64 = 9;

/// Why something cannot be inspected, or is not what it says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InspectError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The file could not be read.
    #[error("read file: {0}")]
    Io(#[from] io::Error),
    /// Its content is wrong or unknown.
    #[error("{0}")]
    Content(String),
}

fn wrong(what: impl ToString) -> InspectError {
    InspectError::Content(what.to_string())
}

/// What an index says, after validation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IndexReport {
    /// Diff ID of the layer.
    pub diff_id: String,
    /// Bytes of the uncompressed tar.
    pub device_bytes: u64,
    /// Frames, each of one chunk.
    pub frames: u64,
    /// Bytes of all frames.
    pub frames_bytes: u64,
    /// Bytes of the index as it is stored in the blob.
    pub index_bytes: u64,
    /// Bytes of the index as a node keeps it.
    pub index_file_bytes: u64,
    /// Inodes of the tree.
    pub inodes: u64,
    /// Regular files among them.
    pub files: u64,
    /// Directories among them.
    pub directories: u64,
    /// Bytes of the regular files.
    pub content_bytes: u64,
    /// Strong digest of chunks and files.
    pub algorithm: String,
    /// Who wrote it.
    pub writer: String,
}

/// A layer, lazy or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// Blob digest.
    pub blob: String,
    /// Its size.
    pub blob_bytes: u64,
    /// Its media type.
    pub media_type: String,
    /// What the index says, if there is one and it is sound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<IndexReport>,
    /// Why the layer is not lazy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the reason is damage, not choice.
    pub broken: bool,
    /// The files, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tree: Option<String>,
}

/// A validated index, what it says, and the listing of its files if that was asked for.
#[derive(Debug)]
pub struct InspectedIndex {
    index: Index<Vec<u8>>,
    report: IndexReport,
    listing: Option<String>,
}

/// Validates the bytes of an index file and counts what is in it; with the listing of its files if
/// `tree` is set.
pub fn inspect_index(
    file: Vec<u8>,
    payload_bytes: u64,
    tree: bool,
) -> Result<InspectedIndex, InspectError> {
    let index = UncheckedIndex::parse(file)
        .map_err(wrong)?
        .validate()
        .map_err(wrong)?;
    let limits = TreeLimits::default();
    let (summary, listing) = {
        let valid = validate(index.tree_bytes(), limits).map_err(wrong)?;
        let listing = tree
            .then(|| dump(valid.reader()))
            .transpose()
            .map_err(wrong)?;
        (valid.summary(), listing)
    };
    let metadata = index.metadata();
    let report = IndexReport {
        diff_id: metadata.diff_id.to_string(),
        device_bytes: metadata.device_bytes,
        frames: u64::from(metadata.chunk_count),
        frames_bytes: metadata.frames_bytes,
        index_bytes: payload_bytes,
        index_file_bytes: index.file_bytes(),
        inodes: summary.inodes,
        files: summary.files,
        directories: summary.directories,
        content_bytes: summary.content_bytes,
        algorithm: metadata.algorithm.to_string(),
        writer: metadata.writer.clone(),
    };
    Ok(InspectedIndex {
        index,
        report,
        listing,
    })
}

/// Inspects one layer of an image. Damage is part of the report, not an error: the other layers are
/// of interest too.
pub async fn inspect_layer(
    reader: &dyn ImageReader,
    layer: &Descriptor,
    tree: bool,
) -> LayerReport {
    let mut report = LayerReport {
        blob: layer.digest.to_string(),
        blob_bytes: layer.size,
        media_type: layer.media_type.clone(),
        index: None,
        reason: None,
        broken: false,
        tree: None,
    };
    match LayerMark::parse(|name| layer.annotations.get(name).map(String::as_str)) {
        Ok(LayerMark::Unmarked) => report.reason = Some("not converted".to_owned()),
        Ok(LayerMark::NotLazy(reason)) => report.reason = Some(reason),
        Err(e) => (report.reason, report.broken) = (Some(e.to_string()), true),
        Ok(LayerMark::Lazy(annotations)) => {
            match read_index(reader, layer, &annotations, tree).await {
                Ok((index, listing)) => (report.index, report.tree) = (Some(index), listing),
                Err(e) => (report.reason, report.broken) = (Some(e.to_string()), true),
            }
        }
    }
    report
}

async fn read_index(
    reader: &dyn ImageReader,
    layer: &Descriptor,
    annotations: &LayerAnnotations,
    tree: bool,
) -> Result<(IndexReport, Option<String>), InspectError> {
    if (annotations.blob, annotations.blob_bytes) != (layer.digest, layer.size) {
        return Err(wrong(format!(
            "annotations are of another blob, {}",
            annotations.blob
        )));
    }
    let payload = reader
        .range(layer.digest, layer.size, annotations.index_extent)
        .await?;
    let actual = IndexDigest::of(&payload);
    if actual != annotations.index_digest {
        let expected = annotations.index_digest;
        return Err(wrong(format!(
            "index has digest {actual}, annotated is {expected}"
        )));
    }
    let file = decompress_index(&payload, INDEX_FILE_MAX_BYTES).map_err(wrong)?;
    let InspectedIndex {
        index,
        report,
        listing,
    } = inspect_index(file, payload.len() as u64, tree)?;
    if index.diff_id() != annotations.diff_id {
        let expected = annotations.diff_id;
        return Err(wrong(format!(
            "index is of {}, annotated is {expected}",
            index.diff_id()
        )));
    }
    Ok((report, listing))
}

/// Inspects a file that is a blob with an index, an index file, or the compressed index of a blob.
pub fn inspect_file(
    file: &File,
    tree: bool,
) -> Result<(IndexReport, Option<String>), InspectError> {
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
    Ok((inspected.report, inspected.listing))
}

fn read_at(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Reads the index of a blob, then checks every frame and the diff ID.
fn inspect_blob(
    file: &File,
    blob_bytes: u64,
    table_bytes: u64,
    tree: bool,
) -> Result<(IndexReport, Option<String>), InspectError> {
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
    let payload = payload.ok_or_else(|| wrong("seekable zstd without a layer index: not lazy"))?;
    let content = decompress_index(&payload, INDEX_FILE_MAX_BYTES).map_err(wrong)?;
    let InspectedIndex {
        index,
        report,
        listing,
    } = inspect_index(content, payload.len() as u64, tree)?;
    if !index.fits_blob(blob_bytes) {
        return Err(wrong("the index names bytes beyond the end of the blob"));
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
    match actual == index.diff_id() {
        true => Ok((report, listing)),
        false => Err(wrong(format!(
            "diff ID is {actual}, the index says {}",
            index.diff_id()
        ))),
    }
}
