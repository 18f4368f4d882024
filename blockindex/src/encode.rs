// SPDX-License-Identifier: Apache-2.0
//! Layer encoder: a layer's uncompressed tar in, a seekable blob with its layer index out, in one pass.
//!
//! The encoder is a state machine without threads. It scans the tar, cuts the device into chunks,
//! digests each file and the whole, and gathers the skeleton. What costs time, compressing the
//! chunks, comes out as jobs that any thread runs in any order:
//!
//! ```text
//! LayerEncoder::push ... -> ChunkJob::run -> frames, written to the blob in order of their ordinals
//! LayerEncoder::finish   -> LayerPlan
//! LayerPlan::assemble(records of all chunks) -> Trailer, written to the blob last
//!
//! blob = frames | skeleton (skippable) | layer index (skippable) | seek table (skippable)
//! ```
//!
//! The bytes depend on the tar, the options and the version of zstd alone. A tar that cannot be
//! lazy, even a malformed one, still becomes a blob of frames and a seek table, so that conversion
//! never makes an image worse; the reason is in the trailer.
//!
//! Memory: the open chunk, the tree, and the compressed skeleton, all of which have limits beyond
//! which a layer is not lazy; jobs are the caller's to bound.

mod cut;

use std::io;

use crate::annotations::INDEX_MAX_BYTES;
use crate::chunkmap::ChunkRecord;
use crate::digest::{DiffId, FileDigest, IndexDigest, Sha256Hasher, StrongAlgorithm, StrongHasher};
use crate::erofs::{DeviceSlot, write_tree};
use crate::extent::{BlobSpace, DeviceSpace, Extent};
use crate::frames::{DEFAULT_LEVEL, EncodeFrameError, EncodedChunk, encode_chunk};
use crate::index::{
    FileContent, IndexError, IndexParts, SkeletonPin, UncheckedIndex, compress_index, write_index,
};
use crate::seektable::{self, SKIPPABLE_HEADER_BYTES, SeekEntry, SeekTableError};
use crate::skeleton::SkeletonWriter;
use crate::tar::{ScanError, Scanner, TarSink};
use crate::tree::Tree;
use crate::units::{CHUNK_TARGET_BYTES, blocks_for};

use cut::Cutter;
pub use cut::{TARGET_MAX_BYTES, TARGET_MIN_BYTES};

/// Skippable magic of the frame that holds the skeleton.
pub const SKELETON_FRAME_MAGIC: u32 = 0x184D_2A57;
/// Skippable magic of the frame that holds the layer index.
pub const INDEX_FRAME_MAGIC: u32 = 0x184D_2A58;

/// The strong digest of new indexes; the measurement is in `docs/decisions/001-strong-digest.md`.
pub const DEFAULT_ALGORITHM: StrongAlgorithm = StrongAlgorithm::Blake3;

/// What may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeOptions {
    /// zstd level of the chunks.
    pub level: i32,
    /// About how many device bytes a chunk has, in [`TARGET_MIN_BYTES`]`..=`[`TARGET_MAX_BYTES`].
    pub chunk_bytes: u64,
    /// Algorithm of the strong digests.
    pub algorithm: StrongAlgorithm,
    /// Name of the program, for people who look into the index. Without a version, lest each release
    /// make other blobs of the same tars.
    pub writer: String,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            level: DEFAULT_LEVEL,
            chunk_bytes: CHUNK_TARGET_BYTES,
            algorithm: DEFAULT_ALGORITHM,
            writer: "sluice".to_owned(),
        }
    }
}

/// The most bytes of a compressed skeleton: twice what the most entries that a tree may have need.
/// It is held in memory, and it is what a layer stores besides the tar.
const SKELETON_MAX_BYTES: u64 = 256 * 1024 * 1024;

/// Why a layer cannot be encoded at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// More chunks than a seek table can list: above some 16 TiB.
    #[error("layer too large for one blob")]
    TooLarge,
    /// The records given do not belong to this layer.
    #[error("{actual} chunk records, want {expected} in order")]
    Records {
        /// Chunks that were cut.
        expected: u32,
        /// Records given.
        actual: u64,
    },
    /// A chunk cannot be compressed.
    #[error("{0}")]
    Frame(#[from] EncodeFrameError),
    /// The compressor of the skeleton failed.
    #[error("write skeleton: {0}")]
    Skeleton(#[from] io::Error),
    /// The index cannot be written, or does not pass its own validation.
    #[error("write layer index: {0}")]
    Index(#[from] IndexError),
    /// The seek table cannot be written.
    #[error("write seek table: {0}")]
    SeekTable(#[from] SeekTableError),
}

/// One chunk to be compressed, by any thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkJob {
    /// Its place among the chunks, from 0.
    pub ordinal: u32,
    /// Its device bytes.
    pub bytes: Vec<u8>,
    level: i32,
    algorithm: StrongAlgorithm,
}

impl ChunkJob {
    /// Compresses the chunk and computes its digests.
    ///
    /// **Errors**: an invalid level, or zstd has no memory.
    pub fn run(&self) -> Result<EncodedChunk, EncodeFrameError> {
        encode_chunk(self.ordinal, &self.bytes, self.level, self.algorithm)
    }
}

/// Encodes one layer.
#[derive(Debug)]
pub struct LayerEncoder {
    options: EncodeOptions,
    scanner: Result<Scanner, ScanError>,
    gather: Gather,
    diff: Sha256Hasher,
    position: u64,
    cutter: Cutter,
    open: Vec<u8>,
    next_ordinal: u32,
}

/// What the scanner's bytes are made into.
#[derive(Debug)]
struct Gather {
    /// Gone once the layer cannot be lazy.
    skeleton: Option<SkeletonWriter>,
    skeleton_max_bytes: u64,
    /// Whether it is gone because it was larger than that.
    skeleton_too_large: bool,
    files: Vec<FileContent>,
    hasher: StrongHasher,
    /// Contents that began in the bytes pushed last.
    started: Vec<Extent<DeviceSpace>>,
    current: Option<Extent<DeviceSpace>>,
    failed: Option<io::Error>,
}

impl Gather {
    /// Adds to the skeleton, if there still is one.
    fn write(&mut self, add: impl FnOnce(&mut SkeletonWriter) -> io::Result<()>) {
        let Some(skeleton) = &mut self.skeleton else {
            return;
        };
        if let Err(error) = add(skeleton) {
            self.failed.get_or_insert(error);
        } else if skeleton.payload_bytes() > self.skeleton_max_bytes {
            self.skeleton_too_large = true;
            self.give_up();
        }
    }

    /// Frees what only a lazy layer needs.
    fn give_up(&mut self) {
        self.skeleton = None;
        self.files = Vec::new();
    }

    /// The skeleton and the contents; `None` if one of them is gone.
    fn finish(self) -> io::Result<Option<(Vec<u8>, Vec<FileContent>)>> {
        let payload = self.skeleton.map(SkeletonWriter::finish).transpose()?;
        let fits = |payload: &Vec<u8>| payload.len() as u64 <= self.skeleton_max_bytes;
        Ok(payload.filter(fits).map(|payload| (payload, self.files)))
    }
}

impl TarSink for Gather {
    fn structure(&mut self, bytes: &[u8]) {
        self.write(|skeleton| skeleton.literal(bytes));
    }

    fn content_start(&mut self, run: Extent<DeviceSpace>) {
        self.write(|skeleton| skeleton.content(run.len()));
        self.started.push(run);
        self.current = Some(run);
    }

    fn content(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    fn content_end(&mut self) {
        let digest = FileDigest(self.hasher.finish_reset());
        if let Some(run) = self.current.take()
            && self.skeleton.is_some()
        {
            self.files.push(FileContent { run, digest });
        }
    }
}

impl LayerEncoder {
    /// An encoder at the start of a tar.
    ///
    /// **Errors**: zstd has no memory.
    pub fn new(options: EncodeOptions) -> Result<Self, EncodeError> {
        let gather = Gather {
            skeleton: Some(SkeletonWriter::new()?),
            skeleton_max_bytes: SKELETON_MAX_BYTES,
            skeleton_too_large: false,
            files: Vec::new(),
            hasher: options.algorithm.hasher(),
            started: Vec::new(),
            current: None,
            failed: None,
        };
        let cutter = Cutter::new(options.chunk_bytes);
        Ok(Self {
            options,
            scanner: Ok(Scanner::new()),
            gather,
            diff: Sha256Hasher::new(),
            position: 0,
            cutter,
            open: Vec::new(),
            next_ordinal: 0,
        })
    }

    /// Bytes of the tar taken so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// About how many bytes tree, contents and skeleton take by now; never less than before while the
    /// layer may be lazy, and little once it cannot.
    pub fn held_bytes(&self) -> u64 {
        let tree = self.scanner.as_ref().map_or(0, Scanner::held_bytes);
        let skeleton = self.gather.skeleton.as_ref();
        let skeleton = skeleton.map_or(0, SkeletonWriter::payload_bytes);
        let files = self.gather.files.len() * size_of::<FileContent>();
        tree + skeleton + files as u64
    }

    /// Takes the next bytes of the tar and adds the chunks that they complete to `jobs`.
    ///
    /// **Errors**: only what makes a blob impossible; a tar that cannot be lazy is no error here.
    pub fn push(&mut self, bytes: &[u8], jobs: &mut Vec<ChunkJob>) -> Result<(), EncodeError> {
        self.diff.update(bytes);
        if let Ok(scanner) = &mut self.scanner {
            if let Err(error) = scanner.push(bytes, &mut self.gather) {
                self.scanner = Err(error);
                self.gather.give_up();
            }
            if let Some(error) = self.gather.failed.take() {
                return Err(error.into());
            }
        }
        let mut rest = bytes;
        for run in std::mem::take(&mut self.gather.started) {
            rest = self.advance(rest, run.start(), jobs)?;
            if self.cutter.content(run) {
                self.emit(jobs)?;
            }
        }
        self.advance(rest, u64::MAX, jobs)?;
        Ok(())
    }

    /// Moves bytes into chunks up to the device offset `to`; returns those beyond it.
    fn advance<'a>(
        &mut self,
        mut bytes: &'a [u8],
        to: u64,
        jobs: &mut Vec<ChunkJob>,
    ) -> Result<&'a [u8], EncodeError> {
        while !bytes.is_empty() && self.position < to {
            let (next, cuts_there) = self.cutter.next(self.position);
            if next <= self.position && cuts_there {
                self.cutter.cut(self.position);
                self.emit(jobs)?;
                continue;
            }
            let limit = next.min(to) - self.position;
            let taken = usize::try_from(limit).map_or(bytes.len(), |limit| bytes.len().min(limit));
            let (now, later) = bytes.split_at(taken);
            self.open.extend_from_slice(now);
            self.position += now.len() as u64;
            bytes = later;
        }
        Ok(bytes)
    }

    fn emit(&mut self, jobs: &mut Vec<ChunkJob>) -> Result<(), EncodeError> {
        if self.open.is_empty() {
            return Ok(());
        }
        // Three further frames stand in the seek table.
        if self.next_ordinal >= seektable::FRAMES_MAX - 3 {
            return Err(EncodeError::TooLarge);
        }
        jobs.push(ChunkJob {
            ordinal: self.next_ordinal,
            bytes: std::mem::take(&mut self.open),
            level: self.options.level,
            algorithm: self.options.algorithm,
        });
        self.next_ordinal += 1;
        Ok(())
    }

    /// Ends the tar; the last chunk goes to `jobs`.
    pub fn finish(mut self, jobs: &mut Vec<ChunkJob>) -> Result<LayerPlan, EncodeError> {
        self.emit(jobs)?;
        let too_large = format!(
            "skeleton of more than {} bytes",
            self.gather.skeleton_max_bytes
        );
        let lazy = match self.gather.skeleton_too_large {
            true => Err(too_large),
            false => match self.scanner.and_then(Scanner::finish) {
                Ok(tree) => self
                    .gather
                    .finish()?
                    .map_or(Err(too_large), |(skeleton, files)| {
                        Ok(LazyParts {
                            tree,
                            skeleton,
                            files,
                        })
                    }),
                Err(error) => Err(error.to_string()),
            },
        };
        Ok(LayerPlan {
            options: self.options,
            diff_id: DiffId::from_bytes(self.diff.finish()),
            device_bytes: self.position,
            chunks: self.next_ordinal,
            lazy,
            index_max_bytes: INDEX_MAX_BYTES,
        })
    }
}

/// A layer whose tar has been read to its end.
#[derive(Debug)]
pub struct LayerPlan {
    options: EncodeOptions,
    diff_id: DiffId,
    device_bytes: u64,
    chunks: u32,
    /// Or why there are none.
    lazy: Result<LazyParts, String>,
    index_max_bytes: u64,
}

/// What a lazy layer has besides its chunks.
#[derive(Debug)]
struct LazyParts {
    tree: Tree,
    skeleton: Vec<u8>,
    files: Vec<FileContent>,
}

/// What follows the frames, and what the annotations say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trailer {
    /// The rest of the blob.
    pub bytes: Vec<u8>,
    /// Size of the whole blob.
    pub blob_bytes: u64,
    /// Diff ID of the layer.
    pub diff_id: DiffId,
    /// Bytes of the uncompressed tar.
    pub device_bytes: u64,
    /// The layer index in the blob, or why there is none.
    pub index: Result<IndexPin, String>,
}

/// Where the layer index lies in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexPin {
    /// Its compressed payload, without the header of the skippable frame.
    pub extent: Extent<BlobSpace>,
    /// sha256 of that payload.
    pub digest: IndexDigest,
    /// Bytes of the index file, decompressed.
    pub file_bytes: u64,
}

impl LayerPlan {
    /// Diff ID of the layer: to be compared with the image config before anything is published.
    pub fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    /// Bytes of the uncompressed tar.
    pub fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// How many chunks were cut.
    pub fn chunk_count(&self) -> u32 {
        self.chunks
    }

    /// Writes what follows the frames.
    ///
    /// `records` are those of all chunks in order of their ordinals; their frames stand in the blob
    /// in the same order from its first byte on. The index is validated before it is returned. A
    /// layer whose index would be larger than readers accept gets none.
    ///
    /// **Errors**: records of another layer, or a layer too large for the format.
    pub fn assemble(self, records: &[ChunkRecord]) -> Result<Trailer, EncodeError> {
        let in_order = (0..)
            .zip(records)
            .all(|(ordinal, record)| record.ordinal == ordinal);
        let device_bytes: u64 = records
            .iter()
            .map(|record| u64::from(record.device_bytes))
            .sum();
        let whole = records.len() as u64 == u64::from(self.chunks);
        if !in_order || !whole || device_bytes != self.device_bytes {
            let (expected, actual) = (self.chunks, records.len() as u64);
            return Err(EncodeError::Records { expected, actual });
        }
        let frames_bytes: u64 = records
            .iter()
            .map(|record| u64::from(record.frame_bytes))
            .sum();
        let mut blob = Tail {
            start: frames_bytes,
            bytes: Vec::new(),
            entries: Vec::new(),
        };
        let (diff_id, device_bytes) = (self.diff_id, self.device_bytes);
        let index = self.index_or_reason(records, &mut blob)?;
        if index.is_err() {
            // A skeleton without an index would be of no use to anybody.
            blob.bytes.clear();
            blob.entries.clear();
        }
        let entries = records.iter().map(|record| SeekEntry {
            compressed_bytes: record.frame_bytes,
            decompressed_bytes: record.device_bytes,
        });
        let entries: Vec<SeekEntry> = entries.chain(blob.entries).collect();
        blob.bytes.extend(seektable::write(entries.into_iter())?);
        Ok(Trailer {
            blob_bytes: frames_bytes + blob.bytes.len() as u64,
            bytes: blob.bytes,
            diff_id,
            device_bytes,
            index,
        })
    }

    /// Adds the index to `blob`, or says why the layer cannot be lazy. A layer may have a million files: each form of the
    /// tree is gone before the next but one is made.
    fn index_or_reason(
        self,
        records: &[ChunkRecord],
        blob: &mut Tail,
    ) -> Result<Result<IndexPin, String>, EncodeError> {
        let LazyParts {
            tree,
            skeleton,
            files,
        } = match self.lazy {
            Ok(parts) => parts,
            Err(reason) => return Ok(Err(reason)),
        };
        let device = DeviceSlot {
            tag: *crate::index::device_tag(self.diff_id),
            blocks: blocks_for(self.device_bytes),
        };
        let image = write_tree(&tree, &[device]);
        drop(tree);
        let image = match image {
            Ok(image) => image,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let extent = blob.skippable(SKELETON_FRAME_MAGIC, &skeleton)?;
        let mut hasher = Sha256Hasher::new();
        hasher.update(&skeleton);
        drop(skeleton);
        let file = write_index(&IndexParts {
            tree: &image,
            chunks: records,
            files: &files,
            diff_id: self.diff_id,
            skeleton: SkeletonPin {
                extent,
                digest: hasher.finish(),
            },
            algorithm: self.options.algorithm,
            writer: &self.options.writer,
        });
        drop((image, files));
        match file
            .map_err(EncodeError::from)
            .and_then(|file| index(file, self.index_max_bytes, blob))
        {
            Ok(pin) => Ok(Ok(pin)),
            Err(EncodeError::Index(error)) if error.is_too_large() => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }
}

/// Adds an index file to `blob`.
fn index(file: Vec<u8>, cap: u64, blob: &mut Tail) -> Result<IndexPin, EncodeError> {
    let payload = compress_index(&file)?;
    let bytes = payload.len() as u64;
    if bytes > cap {
        return Err(IndexError::AboveCap { bytes, cap }.into());
    }
    let file_bytes = file.len() as u64;
    UncheckedIndex::parse(file)?.validate()?;
    let extent = blob.skippable(INDEX_FRAME_MAGIC, &payload)?;
    Ok(IndexPin {
        extent,
        digest: IndexDigest::of(&payload),
        file_bytes,
    })
}

/// Encodes a layer that is in memory, on this thread: for small layers and for tests.
///
/// **Errors**: as [`LayerEncoder`] and [`ChunkJob::run`].
pub fn encode_layer(tar: &[u8], options: EncodeOptions) -> Result<(Vec<u8>, Trailer), EncodeError> {
    let mut encoder = LayerEncoder::new(options)?;
    let mut jobs = Vec::new();
    encoder.push(tar, &mut jobs)?;
    let plan = encoder.finish(&mut jobs)?;
    let (mut blob, mut records) = (Vec::new(), Vec::new());
    for job in jobs {
        let chunk = job.run()?;
        blob.extend_from_slice(&chunk.frame);
        records.push(chunk.record);
    }
    let trailer = plan.assemble(&records)?;
    blob.extend_from_slice(&trailer.bytes);
    Ok((blob, trailer))
}

/// The end of a blob while it grows.
struct Tail {
    start: u64,
    bytes: Vec<u8>,
    entries: Vec<SeekEntry>,
}

impl Tail {
    /// Adds a skippable frame; returns where its payload lies in the blob.
    fn skippable(&mut self, magic: u32, payload: &[u8]) -> Result<Extent<BlobSpace>, EncodeError> {
        let content = u32::try_from(payload.len()).map_err(|_| EncodeError::TooLarge)?;
        let compressed_bytes = u64::from(content) + SKIPPABLE_HEADER_BYTES;
        self.entries.push(SeekEntry {
            compressed_bytes: u32::try_from(compressed_bytes).map_err(|_| EncodeError::TooLarge)?,
            decompressed_bytes: 0,
        });
        self.bytes.extend_from_slice(&magic.to_le_bytes());
        self.bytes.extend_from_slice(&content.to_le_bytes());
        let start = self.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(payload);
        Extent::from_length(start, content.into()).ok_or(EncodeError::TooLarge)
    }
}

#[cfg(test)]
mod tests;
