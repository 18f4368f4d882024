// SPDX-License-Identifier: Apache-2.0
//! Drives the decoder of a blob: compressed slices in, device bytes and boundaries out.

use std::fmt;

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::spans::{Boundary, CutSink, Spans, State};
use super::{BlobFormat, IndexerError};
use crate::frames::unmodified_decoder;
use crate::gzip::scan::{Event, GzipScanner, Trailing};
use crate::units::CHUNK_TARGET_BYTES;

/// Output of zstd comes in such pieces: its largest block.
const OUTPUT_BYTES: usize = 128 * 1024;

/// The decoder of one blob.
pub(super) enum Decode {
    Gzip(Box<GzipScanner>),
    Zstd {
        decoder: Decoder<'static>,
        /// Whether a frame has begun and not ended.
        in_frame: bool,
        output: Vec<u8>,
    },
    /// Cut anywhere: each chunk is its own frame.
    Tar {
        /// Bytes of a chunk.
        chunk: usize,
        /// Bytes until the next cut.
        left: usize,
    },
}

impl Decode {
    /// At the first byte of a blob whose chunks have at most so many bytes.
    pub(super) fn new(format: BlobFormat, chunk_max_bytes: usize) -> Result<Self, IndexerError> {
        let target = usize::try_from(CHUNK_TARGET_BYTES).unwrap_or(usize::MAX);
        let chunk = chunk_max_bytes.min(target);
        Ok(match format {
            BlobFormat::Gzip => Self::Gzip(Box::new(GzipScanner::new())),
            BlobFormat::Zstd => Self::Zstd {
                decoder: unmodified_decoder().map_err(zstd)?,
                in_frame: false,
                output: vec![0; OUTPUT_BYTES],
            },
            BlobFormat::Tar => Self::Tar { chunk, left: chunk },
        })
    }

    /// Takes the next bytes of the blob, all of them.
    pub(super) fn push<S>(
        &mut self,
        blob: &[u8],
        spans: &mut Spans,
        sink: &mut S,
    ) -> Result<(), IndexerError>
    where
        S: CutSink<Error = IndexerError>,
    {
        match self {
            Self::Gzip(scanner) => gzip(scanner, blob, spans, sink),
            Self::Zstd {
                decoder,
                in_frame,
                output,
            } => frames(decoder, in_frame, output, blob, spans, sink),
            Self::Tar { chunk, left } => tar(*chunk, left, blob, spans, sink),
        }
    }

    /// Ends the blob; returns what followed its content.
    pub(super) fn finish(self, blob_bytes: u64) -> Result<Trailing, IndexerError> {
        match self {
            Self::Gzip(scanner) => Ok(scanner.finish()?),
            Self::Zstd { in_frame: true, .. } => Err(IndexerError::Truncated { blob_bytes }),
            Self::Zstd { .. } | Self::Tar { .. } => Ok(Trailing::default()),
        }
    }
}

impl fmt::Debug for Decode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip(_) => "Gzip",
            Self::Zstd { .. } => "Zstd",
            Self::Tar { .. } => "Tar",
        })
    }
}

fn zstd(error: std::io::Error) -> IndexerError {
    IndexerError::Zstd {
        reason: error.to_string(),
    }
}

fn gzip<S: CutSink<Error = IndexerError>>(
    scanner: &mut GzipScanner,
    mut blob: &[u8],
    spans: &mut Spans,
    sink: &mut S,
) -> Result<(), IndexerError> {
    loop {
        let (taken, event) = scanner.step(blob)?;
        let (now, later) = blob.split_at(taken);
        spans.take(now);
        blob = later;
        match event {
            Event::Nothing if taken == 0 && blob.is_empty() => return Ok(()),
            Event::Nothing => {}
            Event::Bytes(bytes) => spans.push(bytes, sink)?,
            Event::Member { offset } => {
                let boundary = Boundary {
                    blob: offset,
                    state: State::Clean,
                };
                spans.boundary(boundary, sink)?;
            }
            Event::Block {
                offset,
                bits,
                window_bytes,
            } => {
                let boundary = Boundary {
                    blob: offset,
                    state: State::Block { bits, window_bytes },
                };
                spans.boundary(boundary, sink)?;
            }
        }
    }
}

fn frames<S: CutSink<Error = IndexerError>>(
    decoder: &mut Decoder<'static>,
    in_frame: &mut bool,
    output: &mut [u8],
    blob: &[u8],
    spans: &mut Spans,
    sink: &mut S,
) -> Result<(), IndexerError> {
    let mut input = InBuffer::around(blob);
    loop {
        let from = input.pos();
        let mut out = OutBuffer::around(&mut *output);
        // Zero: a frame has just ended and all of it is out.
        let hint = decoder.run(&mut input, &mut out).map_err(zstd)?;
        let (taken, made) = (input.pos() - from, out.pos());
        spans.take(&blob[from..input.pos()]);
        spans.push(&output[..made], sink)?;
        if taken > 0 || made > 0 {
            *in_frame = hint != 0;
            if hint == 0 {
                let boundary = Boundary {
                    blob: spans.taken(),
                    state: State::Clean,
                };
                spans.boundary(boundary, sink)?;
            }
        }
        let all_out = made < output.len();
        if input.pos() == blob.len() && (all_out || hint == 0) {
            return Ok(());
        }
    }
}

/// A plain tar is cut wherever we like: every 128 KiB.
fn tar<S: CutSink<Error = IndexerError>>(
    chunk: usize,
    left: &mut usize,
    mut blob: &[u8],
    spans: &mut Spans,
    sink: &mut S,
) -> Result<(), IndexerError> {
    while !blob.is_empty() {
        let length = blob.len().min(*left);
        let (now, later) = blob.split_at(length);
        spans.take(now);
        spans.push(now, sink)?;
        *left -= length;
        if *left == 0 {
            *left = chunk;
            let boundary = Boundary {
                blob: spans.taken(),
                state: State::Clean,
            };
            spans.boundary(boundary, sink)?;
        }
        blob = later;
    }
    Ok(())
}
