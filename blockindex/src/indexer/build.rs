// SPDX-License-Identifier: Apache-2.0
//! Makes the index of a blob that was read to its end.

use super::records::Records;
use super::{BlobFormat, IndexOptions, IndexerError};
use crate::annotations::INDEX_MAX_BYTES;
use crate::chunkmap::{Access, DeviceForm};
use crate::digest::{BlobDigest, DiffId, IndexDigest, Sha256Hasher};
use crate::erofs::{DeviceSlot, write_tree};
use crate::gzip::scan::Trailing;
use crate::index::{
    IndexError, UncheckedIndex, UnmodifiedBlob, UnmodifiedParts, WindowsPin, compress_index,
    device_tag, write_unmodified_index,
};
use crate::units::blocks_for;

/// A blob that was read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedLayer {
    /// How it is compressed.
    pub format: BlobFormat,
    /// Its digest: to be compared with the one that it was fetched by.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Diff ID of the layer: to be compared with the image config before the index is used.
    pub diff_id: DiffId,
    /// Bytes of the uncompressed tar.
    pub device_bytes: u64,
    /// Bytes after the last gzip member, which every tool ignores; in a sound blob there are none, or
    /// zeros.
    pub trailing_bytes: u64,
    /// Whether these are anything but zeros.
    pub trailing_garbage: bool,
    /// The index, or why the layer cannot be lazy.
    pub index: Result<BuiltIndex, String>,
}

/// An index of an unmodified blob, validated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltIndex {
    /// The index file.
    pub file: Vec<u8>,
    /// The same compressed, as it is stored and pushed.
    pub payload: Vec<u8>,
    /// sha256 of the payload.
    pub digest: IndexDigest,
    /// The file of windows; empty where no restart point has a window.
    pub windows: Vec<u8>,
    /// In which order the chunks can be had.
    pub access: Access,
}

impl IndexedLayer {
    pub(super) fn build(
        options: &IndexOptions,
        format: BlobFormat,
        blob: UnmodifiedBlob,
        records: Records,
        trailing: Trailing,
    ) -> Result<Self, IndexerError> {
        let device_bytes = records.layer.device_bytes();
        let Records {
            layer,
            chunks,
            restarts,
            windows,
            unfit,
            frames_bytes,
            ..
        } = records;
        let (diff_id, scanned) = layer.finish();
        let reason = |error: IndexError| match error {
            error if error.is_too_large() => Ok(Err(error.to_string())),
            error => Err(IndexerError::Index(error)),
        };
        let index = match (scanned, unfit) {
            (Err(error), _) => Err(error.to_string()),
            (Ok(_), Some(unfit)) => Err(unfit),
            (Ok((tree, files)), None) => {
                let device = DeviceSlot {
                    tag: *device_tag(diff_id),
                    blocks: blocks_for(device_bytes),
                };
                let windows = windows.finish();
                let parts = |tree| UnmodifiedParts {
                    form: DeviceForm::Tar,
                    tree,
                    chunks: &chunks,
                    restarts: &restarts,
                    files: &files,
                    diff_id,
                    blob: pin_windows(blob, &windows),
                    frames_bytes,
                    algorithm: options.algorithm,
                    writer: &options.writer,
                };
                match write_tree(&tree, &[device]) {
                    Err(error) => Err(error.to_string()),
                    Ok(tree) => match BuiltIndex::of(&parts(&tree)) {
                        Ok(index) => Ok(BuiltIndex { windows, ..index }),
                        Err(error) => reason(error)?,
                    },
                }
            }
        };
        Ok(Self {
            format,
            blob: blob.digest,
            blob_bytes: blob.bytes,
            diff_id,
            device_bytes,
            trailing_bytes: trailing.bytes,
            trailing_garbage: trailing.garbage,
            index,
        })
    }
}

fn pin_windows(blob: UnmodifiedBlob, windows: &[u8]) -> UnmodifiedBlob {
    let pin = |windows: &[u8]| {
        let mut hasher = Sha256Hasher::new();
        hasher.update(windows);
        WindowsPin {
            bytes: windows.len() as u64,
            digest: hasher.finish(),
        }
    };
    UnmodifiedBlob {
        windows: (!windows.is_empty()).then(|| pin(windows)),
        ..blob
    }
}

impl BuiltIndex {
    /// Writes an index, compresses it and proves what was written.
    pub(crate) fn of(parts: &UnmodifiedParts<'_>) -> Result<Self, IndexError> {
        let file = write_unmodified_index(parts)?;
        let payload = compress_index(&file)?;
        let (bytes, cap) = (payload.len() as u64, INDEX_MAX_BYTES);
        if bytes > cap {
            return Err(IndexError::AboveCap { bytes, cap });
        }
        let index = match parts.form {
            DeviceForm::Tar => UncheckedIndex::parse_unmodified(file)?,
            DeviceForm::Contents => UncheckedIndex::parse_contents(file)?,
        };
        let index = index.validate()?;
        let access = index.chunk_map().access();
        Ok(BuiltIndex {
            file: index.into_bytes().unwrap_or_default(),
            digest: IndexDigest::of(&payload),
            payload,
            windows: Vec::new(),
            access,
        })
    }
}
