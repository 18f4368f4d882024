// SPDX-License-Identifier: Apache-2.0
//! Gathers what the index says of chunks and frames.

use super::layer::Layer;
use super::spans::{CutSink, Frame, State};
use super::{BlobFormat, ChunkBytes, IndexerError};
use crate::chunkmap::{Codec, PlacedChunk, Restart, RestartState};
use crate::digest::{ChunkDigest, StrongAlgorithm};
use crate::extent::Extent;
use crate::gzip::sparse::thin;
use crate::index::INDEX_FILE_MAX_BYTES;
use crate::units::{SPAN_FRAME_MAX_BYTES, SPAN_MAX_BYTES};
use crate::windows::{WINDOWS_MAX_BYTES, WindowsWriter};

/// Records beyond this would make an index larger than readers accept.
const CHUNKS_MAX: usize = (INDEX_FILE_MAX_BYTES / 64) as usize;

/// Chunks, restart points and windows of a blob.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) layer: Layer,
    pub(super) chunks: Vec<PlacedChunk>,
    pub(super) restarts: Vec<Restart>,
    pub(super) windows: WindowsWriter,
    /// Why the blob cannot be lazy, if it cannot.
    pub(super) unfit: Option<String>,
    pub(super) frames_bytes: u64,
    algorithm: StrongAlgorithm,
    format: BlobFormat,
    device_max_bytes: u64,
    /// Where the blob was when each chunk of the open frame was complete.
    open: Vec<u64>,
}

/// The records, and who wants to see the bytes.
pub(super) struct Passing<'a> {
    pub(super) records: &'a mut Records,
    pub(super) chunks: &'a mut dyn FnMut(ChunkBytes<'_>),
}

impl Records {
    pub(super) fn new(
        algorithm: StrongAlgorithm,
        format: BlobFormat,
        device_max_bytes: u64,
    ) -> Result<Self, IndexerError> {
        Ok(Self {
            layer: Layer::new(algorithm),
            chunks: Vec::new(),
            restarts: Vec::new(),
            windows: WindowsWriter::new(algorithm)?,
            unfit: None,
            frames_bytes: 0,
            algorithm,
            format,
            device_max_bytes,
            open: Vec::new(),
        })
    }

    /// About how many bytes it holds.
    pub(super) fn held_bytes(&self) -> u64 {
        let chunks = self.chunks.len() * size_of::<PlacedChunk>();
        let restarts = self.restarts.len() * size_of::<Restart>();
        self.layer.held_bytes() + (chunks + restarts) as u64 + self.windows.bytes()
    }

    fn give_up(&mut self, why: String) {
        self.unfit.get_or_insert(why);
        self.chunks = Vec::new();
        self.restarts = Vec::new();
    }

    /// Completes the records of the open frame's chunks.
    fn close(&mut self, frame: Frame) -> Result<(), IndexerError> {
        let taken = std::mem::take(&mut self.open);
        self.frames_bytes = frame.end;
        if self.unfit.is_some() {
            return Ok(());
        }
        let blob = Extent::new(frame.start.blob, frame.end).ok_or(IndexerError::TooLarge)?;
        let alone = blob.len() <= SPAN_FRAME_MAX_BYTES && frame.device_bytes <= SPAN_MAX_BYTES;
        let from = self.chunks.len().saturating_sub(frame.chunks);
        match self.format {
            BlobFormat::Gzip if !alone => {
                let (compressed, device) = (blob.len(), frame.device_bytes);
                self.give_up(format!(
                    "deflate block of {device} bytes, {compressed} compressed, is too long to begin at"
                ));
            }
            BlobFormat::Zstd if !alone => stream(&mut self.chunks[from..], &frame, &taken)?,
            format => {
                let codec = match format {
                    BlobFormat::Gzip => Codec::Deflate,
                    BlobFormat::Zstd => Codec::ZstdFrames,
                    BlobFormat::Tar => Codec::Raw,
                };
                let mut skip_bytes = 0;
                for chunk in &mut self.chunks[from..] {
                    (chunk.blob, chunk.codec, chunk.skip_bytes) = (blob, codec, skip_bytes);
                    skip_bytes += chunk.device_bytes;
                }
                if format == BlobFormat::Gzip {
                    self.restart(frame)?;
                }
            }
        }
        Ok(())
    }

    fn restart(&mut self, mut frame: Frame) -> Result<(), IndexerError> {
        let state = match frame.start.state {
            State::Clean => RestartState::Member,
            State::Block { bits, .. } => {
                let limit = usize::try_from(frame.device_bytes).unwrap_or(usize::MAX);
                thin(&mut frame.window, bits, &frame.lookahead, limit);
                let window = self.windows.add(&frame.window)?;
                RestartState::Block { bits, window }
            }
        };
        self.restarts.push(Restart {
            frame_start: frame.start.blob,
            state,
        });
        if self.windows.bytes() > WINDOWS_MAX_BYTES {
            self.give_up(format!("windows of more than {WINDOWS_MAX_BYTES} bytes"));
        }
        Ok(())
    }
}

/// Chunks of a frame that is too long to be decompressed for one of them.
fn stream(chunks: &mut [PlacedChunk], frame: &Frame, taken: &[u64]) -> Result<(), IndexerError> {
    let mut start = frame.start.blob;
    let last = chunks.len().saturating_sub(1);
    for (at, (chunk, taken)) in chunks.iter_mut().zip(taken).enumerate() {
        let end = if at == last { frame.end } else { *taken };
        chunk.blob = Extent::new(start, end).ok_or(IndexerError::TooLarge)?;
        chunk.codec = if at == 0 {
            Codec::ZstdStream
        } else {
            Codec::ZstdNext
        };
        start = end;
    }
    Ok(())
}

impl CutSink for Passing<'_> {
    type Error = IndexerError;

    fn chunk(&mut self, bytes: &[u8], taken: u64) -> Result<(), IndexerError> {
        let records = &mut *self.records;
        let device = Extent::from_length(records.layer.device_bytes(), bytes.len() as u64)
            .ok_or(IndexerError::TooLarge)?;
        let limit_bytes = records.device_max_bytes;
        if device.end() > limit_bytes {
            return Err(IndexerError::DeviceTooLarge { limit_bytes });
        }
        records.layer.push(bytes);
        if records.unfit.is_none() {
            records.chunks.push(PlacedChunk {
                device_bytes: u32::try_from(bytes.len()).map_err(|_| IndexerError::TooLarge)?,
                blob: Extent::empty(),
                codec: Codec::Raw,
                skip_bytes: 0,
                crc32: crc32fast::hash(bytes),
                padding_bytes: 0,
                digest: ChunkDigest::of(records.algorithm, bytes),
            });
            records.open.push(taken);
            if records.chunks.len() > CHUNKS_MAX {
                records.give_up(format!("more than {CHUNKS_MAX} chunks"));
            }
        }
        (self.chunks)(ChunkBytes { device, bytes });
        Ok(())
    }

    fn frame(&mut self, frame: Frame) -> Result<(), IndexerError> {
        self.records.close(frame)
    }
}
