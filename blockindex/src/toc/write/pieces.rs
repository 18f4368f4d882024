// SPDX-License-Identifier: Apache-2.0
//! The tar in pieces, each of which becomes a frame, and the jobs that compress some of them at once: a layer of small
//! files has far more frames than it is worth to hand to threads one by one.

use std::cell::RefCell;

use flate2::{Compress, Compression, FlushCompress, Status};

use super::{TocOptions, TocWriteError};
use crate::digest::{DIGEST_BYTES, Sha256Hasher};
use crate::frames::{EncodeFrameError, compress};
use crate::toc::TocFormat;

/// Bytes from which on a job is full.
const JOB_BYTES: usize = 256 * 1024;
/// Bytes of a piece besides a content, from which on another one begins.
const STRUCTURE_MAX_BYTES: usize = 256 * 1024;

/// Bytes of the tar that become one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    bytes: usize,
    /// How many of them, from the first on, are a chunk of a content.
    content_bytes: usize,
}

/// Cuts the tar.
#[derive(Debug)]
pub(super) struct Pieces {
    options: TocOptions,
    /// The open job.
    open: Vec<u8>,
    pieces: Vec<Piece>,
    /// Where the open piece begins.
    start: usize,
    content_bytes: usize,
    chunk_is_open: bool,
    full: Vec<TocJob>,
    tar_bytes: u64,
    /// Of eStargz, whose tar changes.
    tar: Option<Sha256Hasher>,
}

impl Pieces {
    pub(super) fn new(options: TocOptions) -> Self {
        Self {
            options,
            open: Vec::new(),
            pieces: Vec::new(),
            start: 0,
            content_bytes: 0,
            chunk_is_open: false,
            full: Vec::new(),
            tar_bytes: 0,
            tar: (options.format == TocFormat::Estargz).then(Sha256Hasher::new),
        }
    }

    /// Takes bytes between contents.
    pub(super) fn structure(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let used = self.open.len() - self.start - self.content_bytes;
            let room = STRUCTURE_MAX_BYTES - used.min(STRUCTURE_MAX_BYTES);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.open.extend_from_slice(now);
            bytes = later;
            if room == now.len() {
                self.end_piece();
            }
        }
    }

    /// Takes bytes of the open chunk, which the first of them begins.
    pub(super) fn content(&mut self, bytes: &[u8]) {
        if !self.chunk_is_open {
            self.end_piece();
            self.chunk_is_open = true;
        }
        self.open.extend_from_slice(bytes);
        self.content_bytes += bytes.len();
    }

    /// Ends the open chunk.
    pub(super) fn end_chunk(&mut self) {
        self.chunk_is_open = false;
        if self.options.format == TocFormat::ZstdChunked {
            self.end_piece();
        }
    }

    fn end_piece(&mut self) {
        let bytes = self.open.len() - self.start;
        if bytes == 0 {
            return;
        }
        let content_bytes = std::mem::take(&mut self.content_bytes);
        self.pieces.push(Piece {
            bytes,
            content_bytes,
        });
        self.start = self.open.len();
        if self.start >= JOB_BYTES {
            self.end_job();
        }
    }

    fn end_job(&mut self) {
        if self.open.is_empty() {
            return;
        }
        self.tar_bytes += self.open.len() as u64;
        if let Some(tar) = &mut self.tar {
            tar.update(&self.open);
        }
        self.start = 0;
        self.full.push(TocJob {
            bytes: std::mem::take(&mut self.open),
            pieces: std::mem::take(&mut self.pieces),
            options: self.options,
        });
    }

    pub(super) fn take_jobs(&mut self, jobs: &mut Vec<TocJob>) {
        jobs.append(&mut self.full);
    }

    /// Ends it all; gives the bytes of the tar so far, and their digest where it is kept.
    pub(super) fn finish(mut self, jobs: &mut Vec<TocJob>) -> (u64, Option<Sha256Hasher>) {
        self.end_piece();
        self.end_job();
        jobs.append(&mut self.full);
        (self.tar_bytes, self.tar)
    }
}

/// Pieces to be compressed, by any thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocJob {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
    options: TocOptions,
}

/// What a job has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocFrames {
    /// To be written to the blob behind those of the jobs before it.
    pub bytes: Vec<u8>,
    /// Bytes of each frame, and of a chunk its digest.
    frames: Vec<(u64, Option<[u8; DIGEST_BYTES]>)>,
}

impl TocJob {
    /// Bytes of the tar.
    pub fn tar_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Compresses the pieces and computes the digests of chunks.
    ///
    /// **Errors**: an invalid level, or no memory.
    pub fn run(&self) -> Result<TocFrames, TocWriteError> {
        let mut out = TocFrames {
            bytes: Vec::with_capacity(self.bytes.len() / 2),
            frames: Vec::with_capacity(self.pieces.len()),
        };
        let mut rest = self.bytes.as_slice();
        for piece in &self.pieces {
            let (bytes, later) = rest.split_at(piece.bytes);
            rest = later;
            let before = out.bytes.len();
            match self.options.format {
                TocFormat::ZstdChunked => {
                    let frame = compress(bytes, self.options.level)?;
                    out.bytes.extend_from_slice(&frame);
                }
                TocFormat::Estargz => gzip_member(bytes, self.options.level, &mut out.bytes)?,
            }
            let chunk = Some(&bytes[..piece.content_bytes]).filter(|chunk| !chunk.is_empty());
            let digest = chunk.map(|chunk| {
                let mut hasher = Sha256Hasher::new();
                hasher.update(chunk);
                hasher.finish()
            });
            out.frames.push(((out.bytes.len() - before) as u64, digest));
        }
        Ok(out)
    }
}

/// Where a chunk stands in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkPlace {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) digest: [u8; DIGEST_BYTES],
}

/// Where all chunks stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TocRecords {
    pub(super) chunks: Vec<ChunkPlace>,
    /// Bytes of all frames.
    pub(super) blob_bytes: u64,
}

impl TocRecords {
    /// Takes note of the frames of the next job.
    pub fn add(&mut self, frames: &TocFrames) {
        for (bytes, digest) in &frames.frames {
            let start = self.blob_bytes;
            self.blob_bytes += bytes;
            if let Some(digest) = *digest {
                let end = self.blob_bytes;
                self.chunks.push(ChunkPlace { start, end, digest });
            }
        }
    }
}

thread_local! {
    static DEFLATER: RefCell<Option<(i32, Compress)>> = const { RefCell::new(None) };
}

/// Appends one gzip member. Compressors are kept per thread, as those of zstd are.
pub(super) fn gzip_member(
    bytes: &[u8],
    level: i32,
    out: &mut Vec<u8>,
) -> Result<(), TocWriteError> {
    let failed = |reason: String| EncodeFrameError::Gzip { reason };
    out.extend_from_slice(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff]);
    DEFLATER.with_borrow_mut(|slot| {
        let deflater = match slot {
            Some((kept, deflater)) if *kept == level => {
                deflater.reset();
                deflater
            }
            _ => {
                let wanted = u32::try_from(level).ok().filter(|level| *level <= 9);
                let wanted = wanted.ok_or_else(|| failed(format!("level {level}")))?;
                let deflater = Compress::new(Compression::new(wanted), false);
                &mut slot.insert((level, deflater)).1
            }
        };
        let mut rest = bytes;
        loop {
            out.reserve(rest.len() / 2 + 1024);
            let before = deflater.total_in();
            let status = deflater.compress_vec(rest, out, FlushCompress::Finish);
            let status = status.map_err(|error| failed(error.to_string()))?;
            let taken = usize::try_from(deflater.total_in() - before).unwrap_or(rest.len());
            rest = &rest[taken..];
            if status == Status::StreamEnd {
                return Ok::<(), EncodeFrameError>(());
            }
        }
    })?;
    // The size is that modulo 2^32, as the format has it.
    let size = u32::try_from(bytes.len() as u64 & u64::from(u32::MAX)).unwrap_or_default();
    out.extend_from_slice(&crc32fast::hash(bytes).to_le_bytes());
    out.extend_from_slice(&size.to_le_bytes());
    Ok(())
}
