// SPDX-License-Identifier: Apache-2.0
//! Writes eStargz and zstd:chunked layers: a layer's uncompressed tar in, the blob and what pins its TOC out, in
//! one pass.
//!
//! As [`crate::encode`] this is a state machine without threads. What costs time comes out as jobs:
//!
//! ```text
//! TocEncoder::push ... -> TocJob::run -> frames, written to the blob in the order of the jobs,
//!                                        noted in TocRecords in the same order
//! TocEncoder::finish   -> TocPlan
//! TocPlan::assemble(records) -> TocTrailer, written to the blob last
//!
//! zstd:chunked = frames | TOC (skippable) | headers of the tar (skippable) | footer (skippable)
//! eStargz      = gzip members | member with the TOC | footer (empty member)
//! ```
//!
//! Every chunk of a content begins a frame. Of zstd:chunked what stands between contents has frames of its own, because
//! some readers take a content's frames whole; of eStargz it follows in the member of the content before it.
//!
//! **zstd:chunked keeps the tar**, byte for byte. **eStargz does not**: its TOC is the last file of the tar. It takes
//! the place of the blocks that end the tar, and of a file of its name; all else stays as it is.
//!
//! A tar that such a TOC cannot describe becomes an ordinary blob of the same compression with the tar unchanged, and
//! the trailer has the reason: among them a path that is named twice, which readers of these formats understand in
//! different ways, and names that are no UTF-8, which JSON cannot hold. So nothing is ever listed otherwise than it is
//! unpacked.
//!
//! The bytes depend on the tar, the options and the versions of the compressors alone.
//!
//! Memory: the open job, the tree, the text of the TOC and 64 bytes per chunk; beyond limits the layer gets no TOC.

mod headers;
mod listing;
mod pieces;
mod trailer;

use std::io;

use crate::digest::{DiffId, Sha256Hasher};
use crate::encode::{TARGET_MAX_BYTES, TARGET_MIN_BYTES};
use crate::extent::{DeviceSpace, Extent};
use crate::frames::EncodeFrameError;
use crate::tar::{Entry, Scanner, TarSink};
use crate::units::align_block;

use super::TocFormat;
use headers::HeadersWriter;
use listing::{Content, Listing};
use pieces::Pieces;
pub use pieces::{TocFrames, TocJob, TocRecords};
pub use trailer::{TocPlan, TocTrailer};

/// The most bytes between the headers of two entries, or after the last: names and attributes may take some MiB, and
/// what ends a tar is some KiB.
const PENDING_MAX_BYTES: usize = 8 * 1024 * 1024;

/// Levels above it make zstd hold hundreds of MiB for what comes in one piece, and gain little on it.
const LISTS_LEVEL_MAX: i32 = 9;

/// What may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocOptions {
    /// Which format.
    pub format: TocFormat,
    /// Level of zstd or gzip.
    pub level: i32,
    /// About how many bytes a chunk of a large content has, in [`TARGET_MIN_BYTES`]`..=`[`TARGET_MAX_BYTES`].
    pub chunk_bytes: u64,
}

/// Why a layer cannot be written at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TocWriteError {
    /// A piece cannot be compressed.
    #[error("{0}")]
    Frame(#[from] EncodeFrameError),
    /// The compressor failed.
    #[error("compress table of contents: {0}")]
    Compress(#[from] io::Error),
    /// The records given do not belong to this layer.
    #[error("{actual} chunk records, want {expected}")]
    Records {
        /// Chunks that were cut.
        expected: u64,
        /// Records given.
        actual: u64,
    },
}

/// Encodes one layer.
#[derive(Debug)]
pub struct TocEncoder {
    /// Gone once there will be no TOC.
    scanner: Option<Scanner>,
    assembly: Assembly,
    diff: Sha256Hasher,
}

/// What the scanner's bytes are made into.
#[derive(Debug)]
struct Assembly {
    options: TocOptions,
    pieces: Pieces,
    /// Or why there will be no TOC.
    lists: Result<Lists, String>,
    /// What has come since the last header or content.
    pending: Vec<u8>,
    /// How much of that belongs to the content before it, by its size.
    padding_bytes: usize,
    content: Option<Content>,
    /// An entry with a content came last.
    awaits_content: bool,
    /// What comes is the content of a TOC that was there before, which this one replaces.
    drops_content: bool,
    /// How many of the bytes that come are the padding of such a content.
    drops_bytes: usize,
}

#[derive(Debug)]
struct Lists {
    listing: Listing,
    /// Of zstd:chunked, unless a reader would find that they and the TOC differ.
    headers: Option<HeadersWriter>,
}

impl TocEncoder {
    /// An encoder at the start of a tar.
    ///
    /// **Errors**: the compressor has no memory.
    pub fn new(options: TocOptions) -> Result<Self, TocWriteError> {
        let chunk_bytes = options
            .chunk_bytes
            .clamp(TARGET_MIN_BYTES, TARGET_MAX_BYTES);
        let options = TocOptions {
            chunk_bytes,
            ..options
        };
        let headers = match options.format {
            TocFormat::Estargz => None,
            TocFormat::ZstdChunked => Some(HeadersWriter::new(options.level.min(LISTS_LEVEL_MAX))?),
        };
        let listing = Listing::default();
        Ok(Self {
            scanner: Some(Scanner::new()),
            assembly: Assembly {
                options,
                pieces: Pieces::new(options),
                lists: Ok(Lists { listing, headers }),
                pending: Vec::new(),
                padding_bytes: 0,
                content: None,
                awaits_content: false,
                drops_content: false,
                drops_bytes: 0,
            },
            diff: Sha256Hasher::new(),
        })
    }

    /// About how many bytes tree and lists take by now.
    pub fn held_bytes(&self) -> u64 {
        let tree = self.scanner.as_ref().map_or(0, Scanner::held_bytes);
        let lists = self.assembly.lists.as_ref();
        tree + lists.map_or(0, |lists| {
            let headers = lists.headers.as_ref();
            lists.listing.held_bytes() + headers.map_or(0, HeadersWriter::held_bytes)
        })
    }

    /// Takes the next bytes of the tar and adds the jobs that they complete to `jobs`.
    ///
    /// **Errors**: only what makes a blob impossible; a tar that cannot have a TOC is no error here.
    pub fn push(&mut self, bytes: &[u8], jobs: &mut Vec<TocJob>) -> Result<(), TocWriteError> {
        self.diff.update(bytes);
        let mut rest = bytes;
        if let Some(scanner) = &mut self.scanner {
            let before = scanner.offset();
            let scanned = scanner.push(bytes, &mut self.assembly);
            let taken = usize::try_from(scanner.offset() - before).unwrap_or(bytes.len());
            rest = &bytes[taken..];
            if let Err(error) = scanned {
                self.assembly.refuse(error.to_string());
            }
            if self.assembly.lists.is_err() {
                self.scanner = None;
            }
        }
        self.assembly.pieces.structure(rest);
        self.assembly.pieces.take_jobs(jobs);
        Ok(())
    }

    /// Ends the tar; the last jobs go to `jobs`.
    pub fn finish(mut self, jobs: &mut Vec<TocJob>) -> Result<TocPlan, TocWriteError> {
        if let Some(scanner) = self.scanner.take() {
            if scanner.has_global_records()
                && let Ok(lists) = &mut self.assembly.lists
            {
                lists.headers = None;
            }
            if let Err(error) = scanner.finish() {
                self.assembly.refuse(error.to_string());
            }
        }
        let diff_id = DiffId::from_bytes(self.diff.finish());
        self.assembly.finish(diff_id, jobs)
    }
}

impl Assembly {
    /// There will be no TOC, and all that follows is only compressed.
    fn refuse(&mut self, reason: String) {
        if self.lists.is_ok() {
            self.lists = Err(reason);
            let pending = std::mem::take(&mut self.pending);
            self.pieces.structure(&pending);
        }
    }

    /// What makes the entry impossible in a TOC.
    fn objection(&self, entry: &Entry, again: bool) -> Option<String> {
        if again {
            return Some(format!("{}: named twice", crate::tar::shown(&entry.name)));
        }
        let lists = self.lists.as_ref().ok()?;
        lists.listing.objection(entry)
    }

    fn take_entry(&mut self, entry: &Entry) -> io::Result<()> {
        let Ok(lists) = &mut self.lists else {
            return Ok(());
        };
        lists.listing.entry(entry);
        if entry.other_fields || !listing::time_is_written(entry.mtime) {
            lists.headers = None;
        }
        if let Some(headers) = &mut lists.headers {
            headers.segment(&self.pending)?;
            if !self.awaits_content {
                headers.file(&entry.name, 0, None)?;
            }
        }
        Ok(())
    }

    fn finish(mut self, diff_id: DiffId, jobs: &mut Vec<TocJob>) -> Result<TocPlan, TocWriteError> {
        let estargz = self.options.format == TocFormat::Estargz;
        if estargz && self.pending.len() < self.padding_bytes {
            self.refuse("the tar ends within its last block".to_owned());
        }
        let mut end = std::mem::take(&mut self.pending);
        let mut headers = None;
        if let Ok(lists) = &mut self.lists
            && let Some(mut writer) = lists.headers.take()
            && end.len() >= self.padding_bytes
        {
            writer.segment(&end)?;
            headers = Some(writer.finish()?);
        }
        if !estargz {
            self.pieces.structure(&std::mem::take(&mut end));
        } else if self.lists.is_ok() {
            let tail = end.split_off(self.padding_bytes);
            self.pieces.structure(&std::mem::replace(&mut end, tail));
        }
        let (tar_bytes, before_end) = self.pieces.finish(jobs);
        Ok(TocPlan {
            options: self.options,
            diff_id,
            tar_bytes,
            before_end,
            end,
            headers,
            listing: self.lists.map(|lists| lists.listing),
        })
    }
}

impl TarSink for Assembly {
    fn structure(&mut self, bytes: &[u8]) {
        let dropped = self.drops_bytes.min(bytes.len());
        self.drops_bytes -= dropped;
        let bytes = &bytes[dropped..];
        if self.lists.is_err() {
            return self.pieces.structure(bytes);
        }
        self.pending.extend_from_slice(bytes);
        if self.awaits_content {
            self.refuse("a content that belongs to no file".to_owned());
        } else if self.pending.len() > PENDING_MAX_BYTES {
            let most = PENDING_MAX_BYTES;
            self.refuse(format!(
                "more than {most} bytes between two entries or after the last"
            ));
        }
    }

    fn entry(&mut self, entry: &Entry, again: bool) {
        if self.lists.is_err() {
            return;
        }
        if let Some(reason) = self.objection(entry, again) {
            return self.refuse(reason);
        }
        self.awaits_content = entry.kind == b'0' && entry.size > 0;
        if self.options.format == TocFormat::Estargz && listing::is_toc_name(&entry.name) {
            self.pending.truncate(self.padding_bytes);
            self.drops_content = self.awaits_content;
            return;
        }
        if let Err(error) = self.take_entry(entry) {
            return self.refuse(error.to_string());
        }
        self.padding_bytes = 0;
        let pending = std::mem::take(&mut self.pending);
        self.pieces.structure(&pending);
        self.pending = pending;
        self.pending.clear();
    }

    fn content_start(&mut self, run: Extent<DeviceSpace>) {
        self.awaits_content = false;
        if self.drops_content {
            self.drops_bytes = padding_of(run.len());
        } else if self.lists.is_ok() {
            self.content = Some(Content::new(run.len(), self.options.chunk_bytes));
        }
    }

    fn content(&mut self, mut bytes: &[u8]) {
        if self.drops_content {
            return;
        }
        let Some(content) = &mut self.content else {
            return self.pieces.structure(bytes);
        };
        content.update(bytes);
        while !bytes.is_empty() {
            let taken = usize::try_from(content.left_of_chunk()).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(taken.min(bytes.len()));
            self.pieces.content(now);
            if content.advance(now.len() as u64) {
                self.pieces.end_chunk();
            }
            bytes = later;
        }
    }

    fn content_end(&mut self) {
        self.drops_content = false;
        let Some(content) = self.content.take() else {
            return;
        };
        self.padding_bytes = padding_of(content.bytes());
        let Ok(lists) = &mut self.lists else { return };
        let (bytes, crc64) = (content.bytes(), content.crc64());
        lists.listing.content(content);
        if let Some(headers) = &mut lists.headers {
            let name = lists.listing.last_name().as_bytes();
            if let Err(error) = headers.file(name, bytes, Some(crc64)) {
                self.refuse(error.to_string());
            }
        }
    }
}

/// What follows a content of so many bytes, up to the next block.
fn padding_of(bytes: u64) -> usize {
    let padded = align_block(bytes).unwrap_or(bytes);
    usize::try_from(padded - bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests;
