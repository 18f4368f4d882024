// SPDX-License-Identifier: Apache-2.0
//! Where the chunks of a TOC stand on the device and in the blob.
//!
//! Contents follow one another on the device in the order of the TOC, each from a block on. A chunk's frame begins
//! where the TOC says and ends where the next one begins, or before; small contents may share one.

use super::entries::{RawEntry, sha256_of};
use super::{TocError, TocFormat};
use crate::chunkmap::{Codec, PlacedChunk, Restart, RestartState};
use crate::digest::{ChunkDigest, DIGEST_BYTES, FileDigest};
use crate::extent::{BlobSpace, DeviceSpace, Extent};
use crate::index::{FileContent, INDEX_FILE_MAX_BYTES};
use crate::tar::shown;
use crate::units::{SPAN_FRAME_MAX_BYTES, SPAN_MAX_BYTES, TOC_CHUNK_MAX_BYTES, align_block};

/// Records beyond this would make an index larger than readers accept.
const CHUNKS_MAX: usize = (INDEX_FILE_MAX_BYTES / 64) as usize;

/// A chunk whose frame's end is not known yet.
#[derive(Debug, Clone, Copy)]
struct Draft {
    /// First byte of its frame.
    start: u64,
    /// Where the frame ends, by the TOC; 0 when it does not say.
    end: u64,
    skip_bytes: u32,
    content_bytes: u32,
    padding_bytes: u16,
    digest: [u8; DIGEST_BYTES],
}

/// A file whose chunks are coming.
#[derive(Debug)]
struct OpenFile {
    name: String,
    run: Extent<DeviceSpace>,
    digest: Option<[u8; DIGEST_BYTES]>,
    end: u64,
    /// Bytes of it that chunks were found for.
    at: u64,
    chunks: usize,
    /// A file of the tree, whose digest the index keeps.
    is_kept: bool,
}

impl OpenFile {
    fn error(&self, what: &'static str) -> TocError {
        TocError::Chunk {
            path: shown(self.name.as_bytes()),
            offset: self.at,
            what,
        }
    }
}

/// All chunks so far.
#[derive(Debug, Default)]
pub(super) struct Placement {
    drafts: Vec<Draft>,
    files: Vec<FileContent>,
    device_bytes: u64,
    open: Option<OpenFile>,
}

/// What becomes of them.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) chunks: Vec<PlacedChunk>,
    pub(super) restarts: Vec<Restart>,
    pub(super) files: Vec<FileContent>,
    pub(super) device_bytes: u64,
}

impl Placement {
    /// Bytes of the device so far, whole blocks.
    pub(super) fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// Where a content of this size will stand.
    pub(super) fn next_run(&self, bytes: u64) -> Option<Extent<DeviceSpace>> {
        Extent::from_length(self.device_bytes, bytes).filter(|run| align_block(run.end()).is_some())
    }

    /// Begins a file that is not empty, with its first chunk; `run` is [`Self::next_run`] of its size.
    pub(super) fn begin(
        &mut self,
        entry: &RawEntry,
        run: Extent<DeviceSpace>,
        is_kept: bool,
    ) -> Result<(), TocError> {
        self.open = Some(OpenFile {
            name: entry.name.clone(),
            run,
            digest: sha256_of(&entry.digest).map_err(|what| entry.error(what))?,
            end: u64::try_from(entry.end_offset).unwrap_or_default(),
            at: 0,
            chunks: 0,
            is_kept,
        });
        self.chunk(entry)
    }

    /// Takes a chunk of the file that was begun last.
    pub(super) fn chunk(&mut self, entry: &RawEntry) -> Result<(), TocError> {
        let Some(mut file) = self.open.take() else {
            return Err(entry.error("a chunk of no file"));
        };
        if !entry.name.is_empty() && entry.name != file.name {
            return Err(entry.error("a chunk of another file"));
        }
        let number = |number: i64| u64::try_from(number).map_err(|_| file.error("negative number"));
        let size = file.run.len();
        let (at, start) = (number(entry.chunk_offset)?, number(entry.offset)?);
        let inner = number(entry.inner_offset)?;
        let left = size
            .checked_sub(at)
            .filter(|left| at == file.at && *left > 0)
            .ok_or_else(|| file.error("not where the one before ends"))?;
        let content = match number(entry.chunk_size)? {
            0 => left,
            bytes if bytes <= left => bytes,
            _ => return Err(file.error("goes beyond its file")),
        };
        if content > TOC_CHUNK_MAX_BYTES {
            return Err(file.error("larger than 4 MiB"));
        }
        let digest = sha256_of(&entry.chunk_digest).map_err(|what| file.error(what))?;
        let whole = file.digest.filter(|_| content == size);
        let digest = digest.or(whole).ok_or_else(|| file.error("no digest"))?;
        let follows = match self.drafts.last() {
            None => inner == 0,
            Some(before) if before.start == start => {
                inner >= u64::from(before.skip_bytes) + u64::from(before.content_bytes)
            }
            Some(before) => start > before.start && inner == 0,
        };
        if !follows || inner + content > SPAN_MAX_BYTES {
            return Err(file.error("out of place in the blob"));
        }
        if self.drafts.len() >= CHUNKS_MAX {
            return Err(file.error("too many chunks"));
        }
        file.at += content;
        file.chunks += 1;
        let ends = file.at == size;
        let end = file.run.end();
        let padded = align_block(end).ok_or_else(|| file.error("device too large"))?;
        let narrow = |bytes: u64| u32::try_from(bytes).map_err(|_| file.error("too large"));
        self.drafts.push(Draft {
            start,
            end: if ends { file.end } else { 0 },
            skip_bytes: narrow(inner)?,
            content_bytes: narrow(content)?,
            padding_bytes: if ends {
                u16::try_from(padded - end).unwrap_or_default()
            } else {
                0
            },
            digest,
        });
        if ends {
            let digest = match (file.digest, file.chunks) {
                (Some(digest), _) => digest,
                (None, 1) => digest,
                (None, _) => return Err(file.error("no digest of the whole file")),
            };
            self.device_bytes = padded;
            if file.is_kept {
                let (run, digest) = (file.run, FileDigest(digest));
                self.files.push(FileContent { run, digest });
            }
        } else {
            self.open = Some(file);
        }
        Ok(())
    }

    /// That the file that was begun last is whole.
    pub(super) fn check_whole(&self) -> Result<(), TocError> {
        match &self.open {
            None => Ok(()),
            Some(file) => Err(file.error("missing")),
        }
    }

    /// Adds the pieces of a frame of its own, with a file in it from the byte `skip` on.
    pub(super) fn add_frame(
        &mut self,
        frame: Extent<BlobSpace>,
        pieces: &[&[u8]],
        file: FileContent,
    ) -> Result<(), TocError> {
        let mut skip_bytes = 0;
        let mut device_end = self.device_bytes;
        for (number, piece) in pieces.iter().enumerate() {
            let content_bytes = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            device_end += piece.len() as u64;
            let padded = align_block(device_end).unwrap_or(device_end);
            let last = number + 1 == pieces.len();
            self.drafts.push(Draft {
                start: frame.start(),
                end: frame.end(),
                skip_bytes,
                content_bytes,
                padding_bytes: if last {
                    u16::try_from(padded - device_end).unwrap_or_default()
                } else {
                    0
                },
                digest: ChunkDigest::of(crate::digest::StrongAlgorithm::Sha256, piece).0,
            });
            skip_bytes = skip_bytes.saturating_add(content_bytes);
            self.device_bytes = if last { padded } else { device_end };
        }
        self.files.push(file);
        Ok(())
    }

    /// All chunks; the last frame ends at `frames_end` at the latest.
    pub(super) fn finish(self, frames_end: u64, format: TocFormat) -> Result<Placed, TocError> {
        let codec = match format {
            TocFormat::Estargz => Codec::Deflate,
            TocFormat::ZstdChunked => Codec::ZstdFrames,
        };
        let mut chunks = Vec::with_capacity(self.drafts.len());
        let mut restarts = Vec::new();
        // What stands after a chunk, from the last one on.
        let (mut limit, mut shared) = (frames_end, None::<Extent<BlobSpace>>);
        for draft in self.drafts.iter().rev() {
            let blob = match shared.filter(|frame| frame.start() == draft.start) {
                Some(frame) => frame,
                None => {
                    let said = Some(draft.end).filter(|end| *end > draft.start);
                    let end = said.unwrap_or(limit).min(limit);
                    let end = end.min(draft.start.saturating_add(SPAN_FRAME_MAX_BYTES));
                    Extent::new(draft.start, end)
                        .filter(|frame| !frame.is_empty())
                        .ok_or(TocError::Chunk {
                            path: "blob".to_owned(),
                            offset: draft.start,
                            what: "outside of it",
                        })?
                }
            };
            (limit, shared) = (draft.start, Some(blob));
            chunks.push(PlacedChunk {
                device_bytes: draft.content_bytes + u32::from(draft.padding_bytes),
                blob,
                codec,
                skip_bytes: draft.skip_bytes,
                crc32: 0,
                padding_bytes: draft.padding_bytes,
                digest: ChunkDigest(draft.digest),
            });
            if codec == Codec::Deflate && draft.skip_bytes == 0 {
                restarts.push(Restart {
                    frame_start: draft.start,
                    state: RestartState::Member,
                });
            }
        }
        chunks.reverse();
        restarts.reverse();
        Ok(Placed {
            chunks,
            restarts,
            files: self.files,
            device_bytes: self.device_bytes,
        })
    }
}
