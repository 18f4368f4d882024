// SPDX-License-Identifier: Apache-2.0
//! Looks into converted layers: what their indexes say, and whether it is true.
//!
//! Of an image in a store only the indexes are read (one range each) and validated. Of a blob in a
//! file everything is checked: each frame against its chunk, all of it against the diff ID.

use std::io;

use serde::Serialize;
use sluice_blockindex::annotations::{LayerAnnotations, LayerMark};
use sluice_blockindex::digest::IndexDigest;
use sluice_blockindex::dump::dump;
use sluice_blockindex::erofs::{TreeLimits, validate};
use sluice_blockindex::index::{INDEX_FILE_MAX_BYTES, Index, UncheckedIndex, decompress_index};
use sluice_blockindex::toc::TocPin;

use crate::image::{Descriptor, ImageError, ImageReader};

mod file;

pub use file::{FileReport, NotLazyReport, inspect_file};

#[cfg(test)]
mod tests;

/// Why something cannot be inspected, or is not what it says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InspectError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The file could not be read.
    #[error("read file")]
    Io(#[from] io::Error),
    /// Its content is wrong or unknown.
    #[error("{0}")]
    Content(String),
}

pub(crate) fn wrong(what: impl ToString) -> InspectError {
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
    /// Whether the index could not be read, so that nobody knows.
    pub unread: bool,
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
        unread: false,
        tree: None,
    };
    match LayerMark::parse(|name| layer.annotations.get(name).map(String::as_str)) {
        Ok(LayerMark::Unmarked) => {
            let (reason, broken) = without_mark(layer);
            (report.reason, report.broken) = (Some(reason), broken);
        }
        Ok(LayerMark::NotLazy(reason)) => report.reason = Some(reason),
        Err(e) => (report.reason, report.broken) = (Some(e.to_string()), true),
        Ok(LayerMark::Lazy(annotations)) => {
            match read_index(reader, layer, &annotations, tree).await {
                Ok(found) => (report.index, report.tree) = (Some(found.report), found.listing),
                Err(e) => {
                    report.unread = matches!(
                        e,
                        InspectError::Image(
                            ImageError::Failed { .. } | ImageError::NotFound { .. }
                        )
                    );
                    report.broken = !report.unread;
                    report.reason = Some(e.to_string());
                }
            }
        }
    }
    report
}

/// What there is to say of a layer that Sluice has no index of, and whether it is damage.
fn without_mark(layer: &Descriptor) -> (String, bool) {
    let get = |name: &str| layer.annotations.get(name).map(String::as_str);
    let format = match TocPin::of_annotations(get) {
        Ok(None) => return ("not converted".to_owned(), false),
        Ok(Some(TocPin::Footer { .. })) => "eStargz",
        Ok(Some(TocPin::Position { .. })) => "zstd:chunked",
        Err(error) => return (error.to_string(), true),
    };
    let reason = format!("lazy by its own table of contents ({format}), where [index] toc is on");
    (reason, false)
}

/// Reads the index that the annotations of a layer pin, and proves that it is sound and theirs.
///
/// **Errors**: [`InspectError::Image`] if it cannot be read, [`InspectError::Content`] if it is not
/// what it should be.
pub async fn read_index(
    reader: &dyn ImageReader,
    layer: &Descriptor,
    annotations: &LayerAnnotations,
    tree: bool,
) -> Result<InspectedIndex, InspectError> {
    let annotated = annotations.clone();
    let blob_bytes = layer.size;
    if (annotated.blob, annotated.blob_bytes) != (layer.digest, blob_bytes) {
        let other = annotated.blob;
        return Err(wrong(format!("annotations are of another blob, {other}")));
    }
    let payload = reader
        .range(layer.digest, blob_bytes, annotated.index_extent)
        .await?;
    // An index may have hundreds of megabytes.
    let inspecting = tokio::task::spawn_blocking(move || {
        let actual = IndexDigest::of(&payload);
        if actual != annotated.index_digest {
            let expected = annotated.index_digest;
            return Err(wrong(format!(
                "index has digest {actual}, annotated is {expected}"
            )));
        }
        let file = decompress_index(&payload, INDEX_FILE_MAX_BYTES).map_err(wrong)?;
        let inspected = inspect_index(file, payload.len() as u64, tree)?;
        let (actual, expected) = (inspected.index.diff_id(), annotated.diff_id);
        if actual != expected {
            return Err(wrong(format!(
                "index is of {actual}, annotated is {expected}"
            )));
        }
        match inspected.index.fits_blob(blob_bytes) {
            true => Ok(inspected),
            false => Err(beyond_the_end()),
        }
    });
    let failed = |e| ImageError::failed("run", "inspection", e);
    inspecting.await.map_err(failed)?
}

fn beyond_the_end() -> InspectError {
    wrong("the index names bytes beyond the end of the blob")
}
