// SPDX-License-Identifier: Apache-2.0
//! Layer index: all that is needed to mount a layer with no data, in one file.
//!
//! Sections: the tree (an EROFS image), the chunk map, the table of file contents, and metadata. In a
//! blob the file stands compressed in a skippable frame; a node keeps it decompressed and maps it.
//!
//! Life of an index: [`decompress_index`] (with a cap) gives the bytes, [`UncheckedIndex::parse`]
//! checks the header and where the sections lie, [`UncheckedIndex::validate`] proves everything that
//! a mount or a fetch relies on and gives an [`Index`]. A file that was validated when it was stored
//! is opened again by [`UncheckedIndex::reopen`], which only skips the walk over the tree.
//!
//! An `Index` is proof: its chunk map and file table hold their rules, all its parts agree on the
//! device, and its tree was validated. Nothing here trusts a length before it is checked.
//!
//! The byte tables are in `docs/formats/layer-index.md`.

mod files;
mod format;
mod write;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};
use zstd::zstd_safe;

use crate::chunkmap::{ChunkMap, ChunkMapError};
use crate::digest::{DiffId, StrongAlgorithm};
use crate::erofs::{FileType, Nid, TreeError, TreeLimits, TreeReader, validate};
use crate::extent::{BlobSpace, Extent};
use crate::units::blocks_for;

pub use files::{FileContent, FileTable};
pub(crate) use write::device_tag;
pub use write::{IndexParts, SkeletonPin, compress_index, write_index};

use format::{
    FLAG_REQUIRED, INCOMPATIBLE, MAGIC, RawHeader, RawMetadata, RawSection, SECTION_ALIGN,
    SECTION_CHUNKS, SECTION_FILES, SECTION_METADATA, SECTION_TREE, SECTIONS_MAX, VERSION,
};

/// The largest index file, decompressed, that a reader accepts: 512 MiB, enough for some millions of
/// files. It bounds what a forged payload can make a node allocate.
pub const INDEX_FILE_MAX_BYTES: u64 = 512 * 1024 * 1024;

/// Bytes of an index that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The payload is no single zstd frame that names its size.
    #[error("index payload is not one zstd frame with a size")]
    Payload,
    /// More decompressed bytes than the cap.
    #[error("index of {bytes} bytes, at most {cap} are accepted")]
    AboveCap {
        /// What the payload claims.
        bytes: u64,
        /// The cap.
        cap: u64,
    },
    /// zstd refused the payload.
    #[error("decompress index: {reason}")]
    Zstd {
        /// zstd's words.
        reason: String,
    },
    /// The magic is missing.
    #[error("not a layer index")]
    Magic,
    /// A version that this reader does not know.
    #[error("layer index of version {version}")]
    Version {
        /// The version.
        version: u32,
    },
    /// Features that a reader must know.
    #[error("layer index needs unknown features {features:#x}")]
    Features {
        /// Their bits.
        features: u64,
    },
    /// The file is not as long as its header says.
    #[error("layer index of {actual} bytes, want {expected}")]
    Length {
        /// What the header says.
        expected: u64,
        /// What there is.
        actual: u64,
    },
    /// Too many sections, or a section out of place.
    #[error("layer index: section {ordinal} at {offset}+{bytes} is out of place")]
    SectionPlace {
        /// Its place in the table.
        ordinal: u32,
        /// Its first byte.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// A section that is needed and missing, or there twice, or unknown and required.
    #[error("layer index: section {id} is missing, repeated or unknown")]
    Section {
        /// Its kind.
        id: u32,
    },
    /// A checksum does not match; `id` 0 is the header.
    #[error("layer index: section {id} has crc32 {actual:08x}, want {expected:08x}")]
    Crc32 {
        /// The section's kind.
        id: u32,
        /// What the table says.
        expected: u32,
        /// That of the bytes.
        actual: u32,
    },
    /// A reserved or padding byte is not zero.
    #[error("layer index: reserved byte set in {place}")]
    Reserved {
        /// Where.
        place: &'static str,
    },
    /// An unknown algorithm of strong digests.
    #[error("layer index: unknown strong digest algorithm {code}")]
    Algorithm {
        /// Its code.
        code: u8,
    },
    /// Two parts of the index contradict each other.
    #[error("layer index: parts disagree on {what}: {left} and {right}")]
    Disagree {
        /// On what.
        what: &'static str,
        /// What one says.
        left: u64,
        /// What the other says.
        right: u64,
    },
    /// The skeleton overlaps the frames, or runs backwards.
    #[error("layer index: skeleton at {start}+{bytes} is out of place")]
    Skeleton {
        /// Its first byte.
        start: u64,
        /// Its length.
        bytes: u64,
    },
    /// The file table is not as long as it says.
    #[error("layer index: file table of {actual} bytes, want {expected}")]
    FilesLength {
        /// What it says.
        expected: u64,
        /// What there is.
        actual: u64,
    },
    /// A content that is empty, off its block, out of order or outside the device.
    #[error("layer index: content {ordinal} at {start}+{bytes} is out of place")]
    FileContent {
        /// Its place in the table.
        ordinal: u32,
        /// Its first byte.
        start: u64,
        /// Its length.
        bytes: u64,
    },
    /// A file of the tree whose run is not in the file table, or there with another size.
    #[error("layer index: file at block {start_block} of {bytes} bytes has no digest")]
    FileDigest {
        /// First block of its run.
        start_block: u64,
        /// Its size.
        bytes: u64,
    },
    /// The chunk map breaks its rules.
    #[error("layer index: {0}")]
    ChunkMap(#[from] ChunkMapError),
    /// The tree breaks its rules.
    #[error("layer index: tree: {0}")]
    Tree(#[from] TreeError),
    /// More than 32-bit counts can hold.
    #[error("layer too large for an index")]
    TooLarge,
}

impl IndexError {
    /// Whether the layer has more of something than an index may have, though nothing is wrong.
    pub(crate) fn is_too_large(&self) -> bool {
        matches!(
            self,
            Self::AboveCap { .. }
                | Self::TooLarge
                | Self::ChunkMap(ChunkMapError::TooLarge)
                | Self::Tree(TreeError::Limit { .. })
        )
    }
}

/// Decompresses the payload that the annotations pin.
///
/// **Errors**: anything but one zstd frame of at most `cap` bytes; nothing is allocated before that
/// is known.
pub fn decompress_index(payload: &[u8], cap: u64) -> Result<Vec<u8>, IndexError> {
    if zstd_safe::find_frame_compressed_size(payload) != Ok(payload.len()) {
        return Err(IndexError::Payload);
    }
    let bytes = zstd_safe::get_frame_content_size(payload)
        .ok()
        .flatten()
        .ok_or(IndexError::Payload)?;
    let above_cap = IndexError::AboveCap { bytes, cap };
    if bytes > cap {
        return Err(above_cap);
    }
    let capacity = usize::try_from(bytes).map_err(|_| above_cap)?;
    let file = zstd::bulk::decompress(payload, capacity).map_err(|error| IndexError::Zstd {
        reason: error.to_string(),
    })?;
    if file.len() as u64 != bytes {
        return Err(IndexError::Length {
            expected: bytes,
            actual: file.len() as u64,
        });
    }
    Ok(file)
}

/// What an index says of its layer as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Diff ID of the layer: what its device must digest to.
    pub diff_id: DiffId,
    /// Bytes of the layer device, that is of the uncompressed tar.
    pub device_bytes: u64,
    /// Where the frames end in the blob.
    pub frames_bytes: u64,
    /// The skeleton in the blob.
    pub skeleton: SkeletonPin,
    /// How many chunks there are.
    pub chunk_count: u32,
    /// How many file contents there are.
    pub file_count: u32,
    /// Algorithm of all strong digests of the index.
    pub algorithm: StrongAlgorithm,
    /// Name of the program that wrote the index; for people only.
    pub writer: String,
}

/// An index whose header and section table are sound, and nothing more.
#[derive(Debug)]
pub struct UncheckedIndex<B> {
    bytes: B,
    sections: Vec<Section>,
}

#[derive(Debug, Clone)]
struct Section {
    id: u32,
    range: Range<usize>,
    crc32: u32,
}

impl<B: AsRef<[u8]> + Send + Sync + 'static> UncheckedIndex<B> {
    /// Reads the header and the section table; costs nothing beyond these.
    ///
    /// **Errors**: not an index of a version and with features that this reader knows, another
    /// length, or sections that overlap or leave the file.
    pub fn parse(bytes: B) -> Result<Self, IndexError> {
        let sections = parse_sections(bytes.as_ref())?;
        Ok(Self { bytes, sections })
    }

    /// Proves all rules and makes it an [`Index`].
    ///
    /// Costs a pass over every byte and a walk over the tree.
    pub fn validate(self) -> Result<Index<B>, IndexError> {
        let index = self.reopen()?;
        index.check_tree()?;
        Ok(index)
    }

    /// As [`Self::validate`], without the walk over the tree.
    ///
    /// Only for a file that this node validated before it stored it: its checksums still prove that
    /// it is the same.
    pub fn reopen(self) -> Result<Index<B>, IndexError> {
        self.check_crc32()?;
        let metadata = self.metadata()?;
        let tree = self.section(SECTION_TREE)?;
        let files = self.section(SECTION_FILES)?;
        let chunks = self.section(SECTION_CHUNKS)?;
        let bytes = Arc::new(self.bytes);
        let chunk_map = ChunkMap::parse_in(bytes.clone(), chunks)?;
        let index = Index {
            bytes,
            tree,
            files,
            chunk_map,
            metadata,
        };
        index.check_agreement()?;
        Ok(index)
    }

    fn section(&self, id: u32) -> Result<Range<usize>, IndexError> {
        let found = self.sections.iter().find(|section| section.id == id);
        found
            .map(|section| section.range.clone())
            .ok_or(IndexError::Section { id })
    }

    fn check_crc32(&self) -> Result<(), IndexError> {
        let bytes = self.bytes.as_ref();
        for section in &self.sections {
            let actual = crc32fast::hash(slice(bytes, &section.range));
            if actual != section.crc32 {
                return Err(IndexError::Crc32 {
                    id: section.id,
                    expected: section.crc32,
                    actual,
                });
            }
        }
        Ok(())
    }

    fn metadata(&self) -> Result<Metadata, IndexError> {
        let range = self.section(SECTION_METADATA)?;
        let raw =
            RawMetadata::ref_from_bytes(slice(self.bytes.as_ref(), &range)).map_err(|_| {
                IndexError::Section {
                    id: SECTION_METADATA,
                }
            })?;
        if raw.reserved != [0; 7] || raw.reserved_tail != [0; 112] {
            return Err(IndexError::Reserved { place: "metadata" });
        }
        let (start, bytes) = (raw.skeleton_start.get(), raw.skeleton_bytes.get());
        let extent: Extent<BlobSpace> = Extent::from_length(start, bytes)
            .filter(|extent| extent.start() >= raw.frames_bytes.get())
            .ok_or(IndexError::Skeleton { start, bytes })?;
        let writer = raw
            .writer
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        Ok(Metadata {
            diff_id: DiffId::from_bytes(raw.diff_id),
            device_bytes: raw.device_bytes.get(),
            frames_bytes: raw.frames_bytes.get(),
            skeleton: SkeletonPin {
                extent,
                digest: raw.skeleton_digest,
            },
            chunk_count: raw.chunk_count.get(),
            file_count: raw.file_count.get(),
            algorithm: StrongAlgorithm::from_code(raw.algorithm).ok_or(IndexError::Algorithm {
                code: raw.algorithm,
            })?,
            writer: String::from_utf8_lossy(writer).into_owned(),
        })
    }
}

fn slice<'a>(bytes: &'a [u8], range: &Range<usize>) -> &'a [u8] {
    bytes.get(range.clone()).unwrap_or_default()
}

fn parse_sections(bytes: &[u8]) -> Result<Vec<Section>, IndexError> {
    let (header, rest) = RawHeader::ref_from_prefix(bytes).map_err(|_| IndexError::Magic)?;
    if header.magic != MAGIC {
        return Err(IndexError::Magic);
    }
    if header.version.get() != VERSION {
        return Err(IndexError::Version {
            version: header.version.get(),
        });
    }
    let features = header.incompatible.get() & !INCOMPATIBLE;
    if features != 0 {
        return Err(IndexError::Features { features });
    }
    let (expected, actual) = (header.file_bytes.get(), bytes.len() as u64);
    if expected != actual {
        return Err(IndexError::Length { expected, actual });
    }
    let count = header.section_count.get();
    let table_bytes = usize::try_from(count)
        .ok()
        .filter(|_| count <= SECTIONS_MAX)
        .and_then(|count| count.checked_mul(size_of::<RawSection>()))
        .filter(|bytes| *bytes <= rest.len())
        .ok_or(IndexError::SectionPlace {
            ordinal: count,
            offset: 0,
            bytes: 0,
        })?;
    let (table, _) = rest.split_at(table_bytes);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.as_bytes()[..60]);
    hasher.update(table);
    let (expected, actual) = (header.crc32.get(), hasher.finalize());
    if expected != actual {
        return Err(IndexError::Crc32 {
            id: 0,
            expected,
            actual,
        });
    }
    if header.reserved != [0; 12] {
        return Err(IndexError::Reserved { place: "header" });
    }
    let table = <[RawSection]>::ref_from_bytes(table).map_err(|_| IndexError::Magic)?;
    let mut end = size_of::<RawHeader>() + table_bytes;
    let mut sections: Vec<Section> = Vec::new();
    for (ordinal, raw) in (0..).zip(table) {
        let section = place(raw, bytes, end).ok_or(IndexError::SectionPlace {
            ordinal,
            offset: raw.offset.get(),
            bytes: raw.bytes.get(),
        })?;
        let unknown_flags = raw.flags.get() & !FLAG_REQUIRED != 0;
        if unknown_flags
            || raw.reserved.get() != 0
            || bytes[end..section.range.start].iter().any(|b| *b != 0)
        {
            return Err(IndexError::Reserved {
                place: "section table or padding",
            });
        }
        end = section.range.end;
        let id = section.id;
        let known = matches!(
            id,
            SECTION_TREE | SECTION_CHUNKS | SECTION_FILES | SECTION_METADATA
        );
        let refused = !known && raw.flags.get() & FLAG_REQUIRED != 0;
        if refused || sections.iter().any(|earlier| earlier.id == id) {
            return Err(IndexError::Section { id });
        }
        sections.push(section);
    }
    if end != bytes.len() {
        return Err(IndexError::Length {
            expected: end as u64,
            actual: bytes.len() as u64,
        });
    }
    Ok(sections)
}

/// A section that is aligned, begins at `end` or later, and lies inside the file.
fn place(raw: &RawSection, bytes: &[u8], end: usize) -> Option<Section> {
    let offset = raw.offset.get();
    let start = usize::try_from(offset).ok()?;
    let stop = start.checked_add(usize::try_from(raw.bytes.get()).ok()?)?;
    let sound = start >= end && stop <= bytes.len() && offset.is_multiple_of(SECTION_ALIGN);
    sound.then(|| Section {
        id: raw.id.get(),
        range: start..stop,
        crc32: raw.crc32.get(),
    })
}

/// A validated layer index over bytes of any kind: a `Vec`, or a mapped file.
pub struct Index<B> {
    bytes: Arc<B>,
    tree: Range<usize>,
    files: Range<usize>,
    chunk_map: ChunkMap,
    metadata: Metadata,
}

impl<B> fmt::Debug for Index<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Index")
            .field("metadata", &self.metadata)
            .field("tree_bytes", &self.tree.len())
            .finish_non_exhaustive()
    }
}

impl<B> Clone for Index<B> {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes.clone(),
            tree: self.tree.clone(),
            files: self.files.clone(),
            chunk_map: self.chunk_map.clone(),
            metadata: self.metadata.clone(),
        }
    }
}

impl<B: AsRef<[u8]> + Send + Sync + 'static> Index<B> {
    /// What holds its bytes.
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// The tree: an EROFS image whose one device is the layer device.
    ///
    /// **Errors**: only when a mapped file was damaged after its validation.
    pub fn tree(&self) -> Result<TreeReader<'_>, TreeError> {
        TreeReader::open(self.tree_bytes())
    }

    /// The bytes of that image.
    pub fn tree_bytes(&self) -> &[u8] {
        slice((*self.bytes).as_ref(), &self.tree)
    }

    /// The chunk map; a clone of it shares the index's bytes.
    pub fn chunk_map(&self) -> &ChunkMap {
        &self.chunk_map
    }

    /// The table of file contents.
    ///
    /// **Errors**: only when a mapped file was damaged after its validation.
    pub fn files(&self) -> Result<FileTable<'_>, IndexError> {
        FileTable::open(slice((*self.bytes).as_ref(), &self.files))
    }

    /// What the index says of the layer as a whole.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Diff ID of the layer.
    pub fn diff_id(&self) -> DiffId {
        self.metadata.diff_id
    }

    /// Bytes of the layer device.
    pub fn device_bytes(&self) -> u64 {
        self.metadata.device_bytes
    }

    /// Bytes of the whole index file.
    pub fn file_bytes(&self) -> u64 {
        (*self.bytes).as_ref().len() as u64
    }

    /// Whether everything that the index names lies inside a blob of `blob_bytes`.
    pub fn fits_blob(&self, blob_bytes: u64) -> bool {
        self.metadata.frames_bytes <= blob_bytes
            && self.metadata.skeleton.extent.end() <= blob_bytes
    }

    /// That all parts speak of the same device and count alike.
    fn check_agreement(&self) -> Result<(), IndexError> {
        let (metadata, map, files) = (&self.metadata, &self.chunk_map, self.files()?);
        let code = |algorithm: StrongAlgorithm| u64::from(algorithm.code());
        let tree = self.tree()?;
        let mut devices = tree.devices();
        let device = devices.next().filter(|_| devices.next().is_none());
        for (what, left, right) in [
            ("device bytes", metadata.device_bytes, map.device_bytes()),
            ("frame bytes", metadata.frames_bytes, map.frames_bytes()),
            ("chunks", metadata.chunk_count.into(), map.count().into()),
            ("files", metadata.file_count.into(), files.len() as u64),
            (
                "strong algorithm",
                code(metadata.algorithm),
                code(map.algorithm()),
            ),
            (
                "strong algorithm",
                code(metadata.algorithm),
                code(files.algorithm()),
            ),
            ("devices of the tree", 1, tree.devices().len() as u64),
            (
                "device blocks",
                blocks_for(metadata.device_bytes),
                device.as_ref().map_or(0, |device| device.blocks),
            ),
        ] {
            if left != right {
                return Err(IndexError::Disagree { what, left, right });
            }
        }
        if device.is_none_or(|device| device.tag != *write::device_tag(metadata.diff_id)) {
            return Err(IndexError::Disagree {
                what: "diff ID",
                left: 0,
                right: 1,
            });
        }
        files.check(metadata.device_bytes)
    }
}

impl<B: AsRef<[u8]> + Send + Sync + 'static> Index<B> {
    /// That the tree holds its rules and each of its files has a digest of its very run.
    fn check_tree(&self) -> Result<(), IndexError> {
        let tree = validate(self.tree_bytes(), TreeLimits::default())?.reader();
        let files = self.files()?;
        let mut directories = vec![tree.root()];
        while let Some(directory) = directories.pop() {
            for entry in tree.read_dir(directory, 0)? {
                let entry = entry?;
                if matches!(entry.name, b"." | b"..") {
                    continue;
                }
                match entry.file_type {
                    FileType::Directory => directories.push(entry.nid),
                    FileType::Regular => check_file(&tree, entry.nid, &files)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn check_file(tree: &TreeReader<'_>, nid: Nid, files: &FileTable<'_>) -> Result<(), IndexError> {
    let inode = tree.inode(nid)?;
    let Some(run) = tree.run_of(&inode)? else {
        return Ok(());
    };
    let bytes = inode.size_bytes;
    match files.at_block(run.start_block) {
        Some(content) if content.run.len() == bytes => Ok(()),
        _ => Err(IndexError::FileDigest {
            start_block: run.start_block,
            bytes,
        }),
    }
}

#[cfg(test)]
mod tests;
