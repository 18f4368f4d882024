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
//! An index of an unmodified blob ([`UncheckedIndex::parse_unmodified`]) says of which blob it is, has
//! chunks of other codecs, restart points where that blob is gzip, and no skeleton. Who expects an index
//! of Sluice's own blobs never gets one of these.
//!
//! The byte tables are in `docs/formats/layer-index.md`.

mod error;
mod files;
mod format;
mod sections;
mod write;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use zerocopy::FromBytes;
use zstd::zstd_safe;

use crate::chunkmap::{ChunkMap, DeviceForm, Rules};
use crate::digest::{BlobDigest, DIGEST_BYTES, DiffId, StrongAlgorithm};
use crate::erofs::{FileType, Nid, TreeError, TreeLimits, TreeReader, validate};
use crate::extent::{BlobSpace, Extent};
use crate::units::blocks_for;
use crate::windows::WINDOWS_MAX_BYTES;

pub use error::IndexError;
pub use files::{FileContent, FileTable};
pub(crate) use write::device_tag;
pub use write::{IndexParts, SkeletonPin, compress_index, write_index};
pub(crate) use write::{UnmodifiedParts, write_unmodified_index};

use format::{
    RawMetadata, SECTION_CHUNKS, SECTION_FILES, SECTION_METADATA, SECTION_RESTARTS, SECTION_TREE,
};
use sections::{Section, parse_sections, slice};

/// The largest index file, decompressed, that a reader accepts: 512 MiB, enough for some millions of
/// files. It bounds what a forged payload can make a node allocate.
pub const INDEX_FILE_MAX_BYTES: u64 = 512 * 1024 * 1024;

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
    /// The blob, if Sluice did not write it; the skeleton is empty then.
    pub unmodified: Option<UnmodifiedBlob>,
}

/// The blob of an index that is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnmodifiedBlob {
    /// Its digest.
    pub digest: BlobDigest,
    /// Its size.
    pub bytes: u64,
    /// The file of windows that goes with the index; none where no restart point has a window.
    pub windows: Option<WindowsPin>,
}

/// What the index says of its file of windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowsPin {
    /// Its size.
    pub bytes: u64,
    /// sha256 of it.
    pub digest: [u8; DIGEST_BYTES],
}

/// An index whose header and section table are sound, and nothing more.
#[derive(Debug)]
pub struct UncheckedIndex<B> {
    bytes: B,
    sections: Vec<Section>,
    unmodified: Option<DeviceForm>,
}

impl<B: AsRef<[u8]> + Send + Sync + 'static> UncheckedIndex<B> {
    /// Reads the header and the section table of the index of a blob that Sluice wrote; costs nothing
    /// beyond these.
    ///
    /// **Errors**: not an index of a version and with features that this reader knows, another
    /// length, sections that overlap or leave the file, or the index of an unmodified blob.
    pub fn parse(bytes: B) -> Result<Self, IndexError> {
        Self::parse_kind(bytes, None)
    }

    /// As [`Self::parse`], for the index of a blob that Sluice did not write.
    pub fn parse_unmodified(bytes: B) -> Result<Self, IndexError> {
        Self::parse_kind(bytes, Some(DeviceForm::Tar))
    }

    /// As [`Self::parse`], for the index that was made of the table of contents of a blob that others wrote.
    pub fn parse_contents(bytes: B) -> Result<Self, IndexError> {
        Self::parse_kind(bytes, Some(DeviceForm::Contents))
    }

    /// As [`Self::parse`], for the index of a blob of either kind: [`Metadata::unmodified`] tells which.
    pub fn parse_either(bytes: B) -> Result<Self, IndexError> {
        let (sections, unmodified) = parse_sections(bytes.as_ref())?;
        Ok(Self {
            bytes,
            sections,
            unmodified,
        })
    }

    fn parse_kind(bytes: B, unmodified: Option<DeviceForm>) -> Result<Self, IndexError> {
        let index = Self::parse_either(bytes)?;
        if index.unmodified != unmodified {
            return Err(IndexError::Kind {
                expected: kind_name(unmodified),
                actual: kind_name(index.unmodified),
            });
        }
        Ok(index)
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
        let rules = match &metadata.unmodified {
            None => Rules::Own,
            Some(blob) => Rules::Unmodified {
                form: self.unmodified.unwrap_or(DeviceForm::Tar),
                restarts: self.section(SECTION_RESTARTS).ok(),
                windows_bytes: blob.windows.map_or(0, |pin| pin.bytes),
            },
        };
        let bytes = Arc::new(self.bytes);
        let chunk_map = ChunkMap::parse_in(bytes.clone(), chunks, rules)?;
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
        if raw.reserved != [0; 7] || raw.reserved_tail != [0; 32] {
            return Err(IndexError::Reserved { place: "metadata" });
        }
        let unmodified = self.unmodified_blob(raw)?;
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
            unmodified,
        })
    }

    /// What the metadata says of a blob that Sluice did not write.
    fn unmodified_blob(&self, raw: &RawMetadata) -> Result<Option<UnmodifiedBlob>, IndexError> {
        let (windows, blob) = (raw.windows_bytes.get(), raw.blob_bytes.get());
        let no_windows = windows == 0 && raw.windows_digest == [0; DIGEST_BYTES];
        let Some(form) = self.unmodified else {
            let zeros = no_windows && blob == 0 && raw.blob_digest == [0; DIGEST_BYTES];
            return match zeros {
                true => Ok(None),
                false => Err(IndexError::Reserved { place: "metadata" }),
            };
        };
        if form == DeviceForm::Contents && !no_windows {
            return Err(IndexError::Reserved { place: "metadata" });
        }
        if raw.frames_bytes.get() > blob {
            let (left, right) = (raw.frames_bytes.get(), blob);
            let what = "frames and blob";
            return Err(IndexError::Disagree { what, left, right });
        }
        if raw.skeleton_bytes.get() != 0 || raw.skeleton_digest != [0; DIGEST_BYTES] {
            return Err(IndexError::Skeleton {
                start: raw.skeleton_start.get(),
                bytes: raw.skeleton_bytes.get(),
            });
        }
        if windows > WINDOWS_MAX_BYTES {
            let (bytes, cap) = (windows, WINDOWS_MAX_BYTES);
            return Err(IndexError::AboveCap { bytes, cap });
        }
        let pin = WindowsPin {
            bytes: windows,
            digest: raw.windows_digest,
        };
        Ok(Some(UnmodifiedBlob {
            digest: BlobDigest::from_bytes(raw.blob_digest),
            bytes: blob,
            windows: (!no_windows).then_some(pin),
        }))
    }
}

fn kind_name(unmodified: Option<DeviceForm>) -> &'static str {
    match unmodified {
        None => "a blob that Sluice wrote",
        Some(DeviceForm::Tar) => "an unmodified blob",
        Some(DeviceForm::Contents) => "a blob with another's table of contents",
    }
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

    /// The index file; `None` while somebody has a clone of the index or of its chunk map.
    pub(crate) fn into_bytes(self) -> Option<B> {
        drop(self.chunk_map);
        Arc::try_unwrap(self.bytes).ok()
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

    /// What its device is: what the seal of it proves.
    pub fn form(&self) -> DeviceForm {
        self.chunk_map.form()
    }

    /// That the index is of this blob, which Sluice did not write.
    ///
    /// **Errors**: it is of another.
    pub fn check_blob(&self, digest: BlobDigest, blob_bytes: u64) -> Result<(), IndexError> {
        let Some(blob) = &self.metadata.unmodified else {
            return Err(IndexError::Kind {
                expected: "an unmodified blob",
                actual: "a blob that Sluice wrote",
            });
        };
        if blob.digest != digest {
            return Err(IndexError::OtherBlob {
                expected: digest,
                actual: blob.digest,
            });
        }
        if blob.bytes != blob_bytes {
            return Err(IndexError::Disagree {
                what: "bytes of the blob",
                left: blob.bytes,
                right: blob_bytes,
            });
        }
        Ok(())
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
#[cfg(test)]
mod unmodified_tests;
