// SPDX-License-Identifier: Apache-2.0
//! Chunk map: which frame of the blob holds which bytes of the layer device.
//!
//! The section is a header and one fixed-size record per chunk, in ascending device order. A record
//! holds where its chunk starts; the chunk ends where the next one starts, the last one at the
//! device's end. So the chunks partition the device by construction, once the starts ascend.
//!
//! [`ChunkMap`] reads the records where they lie (a `Vec` or a mapped file) and can be cloned
//! cheaply. A map that comes from [`crate::index::Index`] is validated: starts ascend from 0, no
//! chunk is empty or above the cap, frames ascend without overlap inside the frame area.
//!
//! In a blob that Sluice wrote, each chunk has a zstd frame of its own. In an unmodified blob a frame is
//! whatever the blob allows to decompress alone ([`Codec`]): then neighbours may share a frame that is
//! longer than a chunk may be, and a frame of gzip begins at a [`Restart`] point.
//!
//! Of a blob with a table of contents that others made ([`DeviceForm::Contents`]) the device is no tar: no crc32
//! of a chunk is known, and what follows a content up to the next block is zeros that its digest does not cover.
//!
//! The byte tables are in `docs/formats/layer-index.md`.

mod check;
mod error;
mod format;
mod restart;
mod write;

use std::fmt;
use std::mem::size_of;
use std::ops::Range;
use std::sync::Arc;

use zerocopy::FromBytes;

use crate::digest::{ChunkDigest, StrongAlgorithm};
use crate::extent::{BlobSpace, DeviceSpace, Extent};
use crate::units::{CHUNK_MAX_BYTES, TOC_CHUNK_MAX_BYTES};

use check::{Kind, check_records};
use format::{RawChunk, RawHeader, RawRestart};

pub use error::ChunkMapError;
pub(crate) use restart::write_restarts;
pub use restart::{Restart, RestartState, WindowPin};
pub(crate) use write::write_unmodified;
pub use write::{PlacedChunk, write_chunk_map};

/// How a frame becomes the chunk's device bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// One zstd frame that names its content size: what Sluice itself writes.
    Zstd,
    /// One or more whole zstd frames of an unmodified blob.
    ZstdFrames,
    /// A part of a gzip blob, from a [`Restart`] point on.
    Deflate,
    /// The device bytes as they are.
    Raw,
    /// The first part of a zstd frame that is too long to be decompressed for one chunk. It, and the
    /// [`Codec::ZstdNext`] that follow, can only be had one after the other: by prefix.
    ZstdStream,
    /// Continues the frame of the chunk before.
    ZstdNext,
}

impl Codec {
    /// What the record holds for it.
    pub const fn code(self) -> u8 {
        match self {
            Self::Zstd => 1,
            Self::ZstdFrames => 2,
            Self::Deflate => 3,
            Self::Raw => 4,
            Self::ZstdStream => 5,
            Self::ZstdNext => 6,
        }
    }

    /// Reads what [`Self::code`] writes.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Zstd),
            2 => Some(Self::ZstdFrames),
            3 => Some(Self::Deflate),
            4 => Some(Self::Raw),
            5 => Some(Self::ZstdStream),
            6 => Some(Self::ZstdNext),
            _ => None,
        }
    }

    /// Whether a chunk needs nothing but its own frame (and, for gzip, its window).
    pub const fn is_random_access(self) -> bool {
        !matches!(self, Self::ZstdStream | Self::ZstdNext)
    }
}

/// What the bytes of a layer device are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceForm {
    /// The uncompressed tar: all of it together has the diff ID.
    Tar,
    /// The contents of the files one after the other, each from a block on: the chunks' digests are all the proof
    /// that there is.
    Contents,
}

/// In which order the chunks of a blob can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// In any.
    Random,
    /// Some only after all those before them in the same zstd frame: the layer is lazy by prefix, and
    /// another node that has the chunk is the only short way to it.
    Prefix,
}

/// One chunk: all that is needed to fetch, decode and verify it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Chunk {
    /// Its place in the map, from 0.
    pub ordinal: u32,
    /// The device bytes that it holds.
    pub device: Extent<DeviceSpace>,
    /// Its frame in the blob. A frame may be that of the chunks before and after it, too.
    pub blob: Extent<BlobSpace>,
    /// How the frame becomes the device bytes.
    pub codec: Codec,
    /// Bytes that the frame gives before those of this chunk: those of the chunks that share it.
    pub skip_bytes: u32,
    /// CRC-32 (IEEE) of the device bytes; none where only the digest is known.
    pub crc32: Option<u32>,
    /// Zeros at the end of the device bytes that come from no frame and that the digest does not cover.
    pub padding_bytes: u16,
    /// Algorithm of `digest`.
    pub algorithm: StrongAlgorithm,
    /// Strong digest of the device bytes without the padding.
    pub digest: ChunkDigest,
}

impl Chunk {
    /// Bytes that its frame gives and its digest covers.
    pub fn content_bytes(&self) -> u64 {
        self.device.len().saturating_sub(self.padding_bytes.into())
    }
}

/// What the map's writer knows of a chunk; its device start follows from those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Its place in the map, from 0.
    pub ordinal: u32,
    /// Bytes of the device that it holds.
    pub device_bytes: u32,
    /// Bytes of its frame.
    pub frame_bytes: u32,
    /// CRC-32 (IEEE) of the device bytes.
    pub crc32: u32,
    /// Strong digest of the device bytes.
    pub digest: ChunkDigest,
}

/// Whose blob the map is of, which decides what it may hold.
#[derive(Debug, Clone)]
pub(crate) enum Rules {
    /// One that Sluice wrote.
    Own,
    /// Any other.
    Unmodified {
        /// What its device is.
        form: DeviceForm,
        /// Where the restart points stand; none is an empty table.
        restarts: Option<Range<usize>>,
        /// Size of the file of windows.
        windows_bytes: u64,
    },
}

/// A validated chunk map, read in place.
#[derive(Clone)]
pub struct ChunkMap {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    records: Range<usize>,
    restarts: Range<usize>,
    count: u32,
    algorithm: StrongAlgorithm,
    access: Access,
    form: DeviceForm,
    device_bytes: u64,
    frames_bytes: u64,
}

impl Rules {
    fn kind(&self) -> Kind {
        match self {
            Self::Own => Kind::Own,
            Self::Unmodified {
                form: DeviceForm::Tar,
                ..
            } => Kind::Unmodified,
            Self::Unmodified {
                form: DeviceForm::Contents,
                ..
            } => Kind::Contents,
        }
    }
}

impl ChunkMap {
    /// Reads and validates the section that is the whole of `bytes`, of a blob that Sluice wrote.
    ///
    /// **Errors**: any rule that the section breaks.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, ChunkMapError> {
        let range = 0..bytes.len();
        Self::parse_in(Arc::new(bytes), range, Rules::Own)
    }

    /// Reads and validates the sections of an unmodified blob: chunk map and restart points.
    ///
    /// **Errors**: any rule that they break.
    pub fn parse_unmodified(
        mut chunks: Vec<u8>,
        restarts: &[u8],
        windows_bytes: u64,
    ) -> Result<Self, ChunkMapError> {
        let range = 0..chunks.len();
        chunks.extend_from_slice(restarts);
        let rules = Rules::Unmodified {
            form: DeviceForm::Tar,
            restarts: Some(range.end..chunks.len()),
            windows_bytes,
        };
        Self::parse_in(Arc::new(chunks), range, rules)
    }

    /// As [`Self::parse_unmodified`], of a device that is [`DeviceForm::Contents`].
    pub fn parse_contents(mut chunks: Vec<u8>, restarts: &[u8]) -> Result<Self, ChunkMapError> {
        let range = 0..chunks.len();
        chunks.extend_from_slice(restarts);
        let rules = Rules::Unmodified {
            form: DeviceForm::Contents,
            restarts: Some(range.end..chunks.len()),
            windows_bytes: 0,
        };
        Self::parse_in(Arc::new(chunks), range, rules)
    }

    /// Reads and validates the section at `range` of `bytes`. Costs one pass over the records.
    pub(crate) fn parse_in(
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
        rules: Rules,
    ) -> Result<Self, ChunkMapError> {
        let all = (*bytes).as_ref();
        let section = all.get(range.clone()).ok_or(ChunkMapError::Length {
            expected: range.end as u64,
            actual: all.len() as u64,
        })?;
        let (header, rest) =
            RawHeader::ref_from_prefix(section).map_err(|_| ChunkMapError::Length {
                expected: size_of::<RawHeader>() as u64,
                actual: section.len() as u64,
            })?;
        let count = header.chunk_count.get();
        let expected = u64::from(count) * size_of::<RawChunk>() as u64;
        if rest.len() as u64 != expected {
            return Err(ChunkMapError::Length {
                expected: expected + size_of::<RawHeader>() as u64,
                actual: section.len() as u64,
            });
        }
        let algorithm =
            StrongAlgorithm::from_code(header.algorithm).ok_or(ChunkMapError::Algorithm {
                code: header.algorithm,
            })?;
        if header.reserved != [0; 11] {
            return Err(ChunkMapError::Reserved { ordinal: None });
        }
        let (device_bytes, frames_bytes) = (header.device_bytes.get(), header.frames_bytes.get());
        let chunks = as_records(rest);
        let access = check_records(chunks, device_bytes, frames_bytes, rules.kind())?;
        let form = match rules {
            Rules::Own => DeviceForm::Tar,
            Rules::Unmodified { form, .. } => form,
        };
        let restarts = match rules {
            Rules::Own => 0..0,
            Rules::Unmodified {
                restarts,
                windows_bytes,
                ..
            } => {
                let restarts = restarts.unwrap_or(0..0);
                restart::check(as_table(all, &restarts)?, chunks, windows_bytes)?;
                restarts
            }
        };
        let records = range.start + size_of::<RawHeader>()..range.end;
        Ok(Self {
            bytes,
            records,
            restarts,
            count,
            algorithm,
            access,
            form,
            device_bytes,
            frames_bytes,
        })
    }

    fn records(&self) -> &[RawChunk] {
        as_records(
            (*self.bytes)
                .as_ref()
                .get(self.records.clone())
                .unwrap_or_default(),
        )
    }

    /// How many chunks there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of the layer device, that is of the uncompressed tar.
    pub fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// Where the frames end in the blob.
    pub fn frames_bytes(&self) -> u64 {
        self.frames_bytes
    }

    /// Algorithm of the chunks' digests.
    pub fn algorithm(&self) -> StrongAlgorithm {
        self.algorithm
    }

    /// In which order the chunks can be had.
    pub fn access(&self) -> Access {
        self.access
    }

    /// What the device is, and with it what proves that it is complete and right.
    pub fn form(&self) -> DeviceForm {
        self.form
    }

    /// The restart point of a chunk's frame; `None` for codecs without (or when a mapped file was
    /// damaged after its validation).
    pub fn restart(&self, chunk: &Chunk) -> Option<Restart> {
        if chunk.codec != Codec::Deflate {
            return None;
        }
        let table = as_table((*self.bytes).as_ref(), &self.restarts).ok()?;
        let start = chunk.blob.start();
        let found = table.binary_search_by_key(&start, |raw| raw.frame_start.get());
        restart::read(table.get(found.ok()?)?)
    }

    /// The first chunk of the long zstd frame that the chunk is a part of; `None` for chunks that can be
    /// had alone.
    pub fn stream_start(&self, ordinal: u32) -> Option<Chunk> {
        let mut chunk = self.chunk(ordinal)?;
        while chunk.codec == Codec::ZstdNext {
            chunk = self.chunk(chunk.ordinal.checked_sub(1)?)?;
        }
        (chunk.codec == Codec::ZstdStream).then_some(chunk)
    }

    /// How many restart points there are.
    pub fn restart_count(&self) -> usize {
        self.restarts.len() / size_of::<RawRestart>()
    }

    /// The chunk at `ordinal`; `None` from [`Self::count`] on (or when a mapped file was damaged
    /// after its validation).
    pub fn chunk(&self, ordinal: u32) -> Option<Chunk> {
        let records = self.records();
        let index = usize::try_from(ordinal).ok()?;
        let record = records.get(index)?;
        let end = match records.get(index + 1) {
            Some(next) => next.device_start.get(),
            None => self.device_bytes,
        };
        let most = match self.form {
            DeviceForm::Tar => CHUNK_MAX_BYTES,
            DeviceForm::Contents => TOC_CHUNK_MAX_BYTES,
        };
        Some(Chunk {
            ordinal,
            device: Extent::new(record.device_start.get(), end)
                .filter(|device| device.len() <= most)?,
            blob: Extent::from_length(record.frame_start.get(), record.frame_bytes.get().into())?,
            codec: Codec::from_code(record.codec)?,
            skip_bytes: record.skip_bytes.get(),
            crc32: (self.form == DeviceForm::Tar).then(|| record.crc32.get()),
            padding_bytes: record.padding_bytes.get(),
            algorithm: self.algorithm,
            digest: ChunkDigest(record.digest),
        })
    }

    /// All chunks in device order.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = Option<Chunk>> + '_ {
        (0..self.count).map(|ordinal| self.chunk(ordinal))
    }

    /// The ordinals of the chunks that hold any byte of `extent`, by binary search.
    ///
    /// **Shape**: half-open; empty for an empty extent and for one beyond the device.
    pub fn covering(&self, extent: Extent<DeviceSpace>) -> Range<u32> {
        let device = Extent::from_length(0, self.device_bytes).unwrap_or(Extent::empty());
        let Some(extent) = extent.intersect(device) else {
            return 0..0;
        };
        let records = self.records();
        let after = |offset: u64| {
            let index = records.partition_point(|record| record.device_start.get() <= offset);
            u32::try_from(index).unwrap_or(self.count)
        };
        after(extent.start()).saturating_sub(1)..after(extent.end() - 1)
    }

    /// The chunk that holds the device byte at `offset`; `None` beyond the device.
    pub fn at(&self, offset: u64) -> Option<Chunk> {
        let range = self.covering(Extent::from_length(offset, 1)?);
        if range.is_empty() {
            None
        } else {
            self.chunk(range.start)
        }
    }
}

impl fmt::Debug for ChunkMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkMap")
            .field("count", &self.count)
            .field("algorithm", &self.algorithm)
            .field("access", &self.access)
            .field("form", &self.form)
            .field("restart_count", &self.restart_count())
            .field("device_bytes", &self.device_bytes)
            .field("frames_bytes", &self.frames_bytes)
            .finish_non_exhaustive()
    }
}

fn as_records(bytes: &[u8]) -> &[RawChunk] {
    <[RawChunk]>::ref_from_bytes(bytes).unwrap_or_default()
}

fn as_table<'a>(bytes: &'a [u8], range: &Range<usize>) -> Result<&'a [RawRestart], ChunkMapError> {
    let section = bytes.get(range.clone()).unwrap_or_default();
    <[RawRestart]>::ref_from_bytes(section).map_err(|_| ChunkMapError::Length {
        expected: (section.len() as u64).next_multiple_of(size_of::<RawRestart>() as u64),
        actual: section.len() as u64,
    })
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod unmodified_tests;
