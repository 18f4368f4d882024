// SPDX-License-Identifier: Apache-2.0
//! Chunks that can be had by prefix only: parts of one zstd frame that is too long to be decompressed
//! for each of them.

use std::fmt;

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::unmodified::decoder;
use super::{DecodeFrameError, verify_chunk};
use crate::chunkmap::{Chunk, ChunkMap, Codec};

/// Decodes the chunks of one long zstd frame, from the first on.
///
/// Memory: a chunk, and the window that the frame asks for, at most 128 MiB.
pub struct StreamDecoder {
    map: ChunkMap,
    /// The next chunk; none after the frame's last.
    next: Option<Chunk>,
    decoder: Decoder<'static>,
    open: Vec<u8>,
    made: usize,
}

impl StreamDecoder {
    /// A decoder at the first byte of the frame that has the chunk `ordinal`; see [`Self::chunk`].
    ///
    /// **Errors**: the chunk is not one that goes by prefix.
    pub fn of_chunk(map: &ChunkMap, ordinal: u32) -> Result<Self, DecodeFrameError> {
        let start = map.stream_start(ordinal);
        let wrong = |codec| DecodeFrameError::Codec { ordinal, codec };
        let next =
            start.ok_or_else(|| wrong(map.chunk(ordinal).map_or(Codec::Zstd, |it| it.codec)))?;
        let zstd = |error: std::io::Error| DecodeFrameError::Zstd {
            ordinal,
            reason: error.to_string(),
        };
        Ok(Self {
            map: map.clone(),
            next: Some(next),
            decoder: decoder().map_err(zstd)?,
            open: Vec::new(),
            made: 0,
        })
    }

    /// The chunk that comes next; none when the frame's last has come. Before the first push, its
    /// `blob.start()` is where the bytes to be pushed begin.
    pub fn chunk(&self) -> Option<Chunk> {
        self.next
    }

    /// Takes the next bytes of the blob and gives the chunks that they complete, verified. What follows
    /// the last chunk is ignored.
    ///
    /// **Errors**: the bytes are not those of the blob; all that was given before is right, and nothing
    /// follows.
    pub fn push(
        &mut self,
        blob: &[u8],
        chunks: &mut dyn FnMut(&Chunk, &[u8]),
    ) -> Result<(), DecodeFrameError> {
        let result = self.decode(blob, chunks);
        if result.is_err() {
            self.next = None;
        }
        result
    }

    fn decode(
        &mut self,
        blob: &[u8],
        chunks: &mut dyn FnMut(&Chunk, &[u8]),
    ) -> Result<(), DecodeFrameError> {
        let mut input = InBuffer::around(blob);
        while let Some(chunk) = self.next {
            let ordinal = chunk.ordinal;
            // A map's chunks are at most 1 MiB long.
            self.open
                .resize(usize::try_from(chunk.device.len()).unwrap_or(0), 0);
            let before = (input.pos(), self.made);
            let mut output = OutBuffer::around_pos(self.open.as_mut_slice(), self.made);
            let ended = self.decoder.run(&mut input, &mut output).map_err(|error| {
                DecodeFrameError::Zstd {
                    ordinal,
                    reason: error.to_string(),
                }
            })? == 0;
            self.made = output.pos();
            let progress = (input.pos(), self.made) != before;
            if self.made == self.open.len() {
                verify_chunk(&self.open, &chunk)?;
                chunks(&chunk, &self.open);
                self.made = 0;
                self.next = self
                    .map
                    .chunk(ordinal + 1)
                    .filter(|next| next.codec == Codec::ZstdNext);
            } else if ended && progress {
                let (expected, actual) = (chunk.device.len(), Some(self.made as u64));
                return Err(DecodeFrameError::ContentSize {
                    ordinal,
                    expected,
                    actual,
                });
            } else if input.pos() == blob.len() || !progress {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl fmt::Debug for StreamDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamDecoder")
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}
