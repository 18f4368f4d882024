// SPDX-License-Identifier: Apache-2.0
//! Indexes a layer blob as it is: the bytes of any blob in, its device and its layer index out, in one
//! pass.
//!
//! ```text
//! LayerIndexer::push(blob bytes) ... -> chunks, in device order: to be stored, unpacked, or dropped
//! LayerIndexer::finish               -> IndexedLayer: diff ID, blob digest, index, file of windows
//! ```
//!
//! | blob | frames | any chunk alone |
//! | --- | --- | --- |
//! | gzip | between restart points, up to 512 KiB of device each | yes |
//! | zstd of several frames | groups of whole frames, 128 KiB of device or more | yes |
//! | zstd with a frame above 16 MiB of device or 8 MiB | parts of that frame | no: by prefix ([`crate::chunkmap::Access::Prefix`]) |
//! | plain tar | 128 KiB of it | yes |
//!
//! A zstd frame cannot be entered in the middle: each block relies on tables of those before it. The
//! blob is therefore known by its first bytes, not by its media type, and nothing in it is changed.
//!
//! The outcome depends on the bytes, the options and the versions of the libraries alone: input is cut
//! anew into slices of 64 KiB before anything looks at it. A tar that cannot be lazy has a diff ID and a
//! reason; a blob that ordinary tools could not decompress is an error.
//!
//! Memory: about 3 MiB, the tree and the records (see [`LayerIndexer::held_bytes`]), and windows up to
//! 256 MiB, beyond all of which the layer is not lazy.

mod build;
mod decode;
mod layer;
mod records;
mod spans;
mod tree_proof;

use crate::digest::{BlobDigest, Sha256Hasher, StrongAlgorithm};
use crate::encode::DEFAULT_ALGORITHM;
use crate::extent::{DeviceSpace, Extent};
use crate::gzip::GzipError;
use crate::index::{IndexError, UnmodifiedBlob};
use crate::units::CHUNK_MAX_BYTES;
use crate::windows::WindowError;

pub use build::{BuiltIndex, IndexedLayer};
use decode::Decode;
use records::{Passing, Records};
use spans::Spans;
pub use tree_proof::{TreeFault, TreeProof};

/// The decoder sees slices of this size, however the blob arrives.
const SLICE_BYTES: usize = 64 * 1024;

/// How a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlobFormat {
    /// Gzip, of one or more members.
    Gzip,
    /// Zstandard, of one or more frames.
    Zstd,
    /// Not at all.
    Tar,
}

impl BlobFormat {
    /// Tells by the first four bytes; media types lie too often. A skippable zstd frame may come first.
    pub fn detect(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Tar,
        }
    }
}

/// What may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexOptions {
    /// The most device bytes of a chunk, 1 byte to 1 MiB. Smaller chunks of gzip are cheaper to read alone,
    /// and need more windows.
    pub chunk_max_bytes: u32,
    /// The most bytes of the uncompressed tar: what a decompression bomb is stopped at.
    pub device_max_bytes: u64,
    /// Algorithm of the strong digests.
    pub algorithm: StrongAlgorithm,
    /// Name of the program, for people who look into the index.
    pub writer: String,
}

impl Default for IndexOptions {
    fn default() -> Self {
        Self {
            // Index and windows are about 2 % of a gzip blob then; with 256 KiB they are 3 %, and with 1 MiB a
            // small read costs twice as much (docs/decisions/040-gzip-restarts.md).
            chunk_max_bytes: 512 * 1024,
            device_max_bytes: u64::MAX,
            algorithm: DEFAULT_ALGORITHM,
            writer: "sluice".to_owned(),
        }
    }
}

/// A blob that cannot be read to its end, or indexed at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexerError {
    /// An option out of its range.
    #[error("chunks of at most {chunk_max_bytes} bytes: want 1 to {CHUNK_MAX_BYTES}")]
    ChunkSize {
        /// What was asked for.
        chunk_max_bytes: u32,
    },
    /// The blob is no gzip.
    #[error("{0}")]
    Gzip(#[from] GzipError),
    /// The blob is no zstd.
    #[error("decompress zstd: {reason}")]
    Zstd {
        /// zstd's words.
        reason: String,
    },
    /// The blob ends inside a zstd frame.
    #[error("blob of {blob_bytes} bytes ends inside a zstd frame")]
    Truncated {
        /// Its size.
        blob_bytes: u64,
    },
    /// More device bytes than allowed.
    #[error("layer of more than {limit_bytes} bytes")]
    DeviceTooLarge {
        /// What is allowed.
        limit_bytes: u64,
    },
    /// Sizes above what the formats can say.
    #[error("layer too large for an index")]
    TooLarge,
    /// The indexer failed before, and takes nothing more.
    #[error("indexer has failed before")]
    Failed,
    /// A window cannot be written.
    #[error("{0}")]
    Window(#[from] WindowError),
    /// The index cannot be written, or does not pass its own validation.
    #[error("write layer index: {0}")]
    Index(#[from] IndexError),
}

/// A chunk as it was cut.
#[derive(Debug, Clone, Copy)]
pub struct ChunkBytes<'a> {
    /// Its place in the device.
    pub device: Extent<DeviceSpace>,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Indexes one blob.
#[derive(Debug)]
pub struct LayerIndexer {
    options: IndexOptions,
    slice: Vec<u8>,
    blob: Sha256Hasher,
    blob_bytes: u64,
    work: Option<Work>,
    failed: bool,
}

/// What needs to know the blob's format.
#[derive(Debug)]
struct Work {
    format: BlobFormat,
    decode: Decode,
    spans: Spans,
    records: Records,
}

impl LayerIndexer {
    /// An indexer at the first byte of a blob.
    ///
    /// **Errors**: an option out of its range.
    pub fn new(options: IndexOptions) -> Result<Self, IndexerError> {
        let chunk_max_bytes = options.chunk_max_bytes;
        if chunk_max_bytes == 0 || u64::from(chunk_max_bytes) > CHUNK_MAX_BYTES {
            return Err(IndexerError::ChunkSize { chunk_max_bytes });
        }
        Ok(Self {
            options,
            slice: Vec::with_capacity(SLICE_BYTES),
            blob: Sha256Hasher::new(),
            blob_bytes: 0,
            work: None,
            failed: false,
        })
    }

    /// Bytes of the blob taken so far.
    pub fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// About how many bytes tree, contents, chunks and windows take by now.
    pub fn held_bytes(&self) -> u64 {
        self.work
            .as_ref()
            .map_or(0, |work| work.records.held_bytes())
    }

    /// Takes the next bytes of the blob. The chunks that they complete go to `chunks`, in device order and
    /// without gaps; they lag behind by up to a chunk.
    ///
    /// **Errors**: the blob is damaged, or its content above the limit; nothing more is taken then.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        chunks: &mut dyn FnMut(ChunkBytes<'_>),
    ) -> Result<(), IndexerError> {
        if self.failed {
            return Err(IndexerError::Failed);
        }
        while !bytes.is_empty() {
            if self.slice.is_empty() && bytes.len() >= SLICE_BYTES {
                let (slice, later) = bytes.split_at(SLICE_BYTES);
                self.slice(slice, chunks)?;
                bytes = later;
                continue;
            }
            let length = bytes.len().min(SLICE_BYTES - self.slice.len());
            let (now, later) = bytes.split_at(length);
            self.slice.extend_from_slice(now);
            bytes = later;
            if self.slice.len() == SLICE_BYTES {
                self.kept_slice(chunks)?;
            }
        }
        Ok(())
    }

    fn kept_slice(&mut self, chunks: &mut dyn FnMut(ChunkBytes<'_>)) -> Result<(), IndexerError> {
        let mut slice = std::mem::take(&mut self.slice);
        let result = self.slice(&slice, chunks);
        slice.clear();
        self.slice = slice;
        result
    }

    fn slice(
        &mut self,
        slice: &[u8],
        chunks: &mut dyn FnMut(ChunkBytes<'_>),
    ) -> Result<(), IndexerError> {
        self.blob.update(slice);
        self.blob_bytes += slice.len() as u64;
        let work = match &mut self.work {
            Some(work) => work,
            None => self.work.insert(Work::new(slice, &self.options)?),
        };
        let mut sink = Passing {
            records: &mut work.records,
            chunks,
        };
        let result = work.decode.push(slice, &mut work.spans, &mut sink);
        self.failed = result.is_err();
        result
    }

    /// Ends the blob; the last chunks go to `chunks`.
    ///
    /// **Errors**: the blob ends in the middle, or its index cannot be written.
    pub fn finish(
        mut self,
        chunks: &mut dyn FnMut(ChunkBytes<'_>),
    ) -> Result<IndexedLayer, IndexerError> {
        if self.failed {
            return Err(IndexerError::Failed);
        }
        self.kept_slice(chunks)?;
        let Some(work) = self.work else {
            return Err(IndexerError::Failed);
        };
        let Work {
            format,
            decode,
            spans,
            mut records,
        } = work;
        let trailing = decode.finish(self.blob_bytes)?;
        let mut sink = Passing {
            records: &mut records,
            chunks,
        };
        spans.finish(self.blob_bytes - trailing.bytes, &mut sink)?;
        let blob = UnmodifiedBlob {
            digest: BlobDigest::from_bytes(self.blob.finish()),
            bytes: self.blob_bytes,
            windows: None,
        };
        IndexedLayer::build(&self.options, format, blob, records, trailing)
    }
}

impl Work {
    fn new(head: &[u8], options: &IndexOptions) -> Result<Self, IndexerError> {
        let format = BlobFormat::detect(head);
        let chunk_max_bytes = usize::try_from(options.chunk_max_bytes).unwrap_or(usize::MAX);
        Ok(Self {
            format,
            decode: Decode::new(format, chunk_max_bytes)?,
            spans: Spans::new(chunk_max_bytes),
            records: Records::new(options.algorithm, format, options.device_max_bytes)?,
        })
    }
}

/// Indexes a blob that is in memory: for small layers and for tests.
///
/// **Errors**: as [`LayerIndexer`].
pub fn index_blob(blob: &[u8], options: IndexOptions) -> Result<IndexedLayer, IndexerError> {
    let mut indexer = LayerIndexer::new(options)?;
    indexer.push(blob, &mut |_| {})?;
    indexer.finish(&mut |_| {})
}

#[cfg(test)]
mod tests;
