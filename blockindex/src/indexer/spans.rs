// SPDX-License-Identifier: Apache-2.0
//! Where the device of an unmodified blob is cut into chunks: pure, whatever the compression.
//!
//! Frames begin at boundaries: clean ones, where decompression needs nothing (a gzip member, a zstd
//! frame), and others, which cost a window (two deflate blocks). Rules, with C the most bytes of a chunk:
//! - a clean boundary ends a chunk as soon as that has 128 KiB, since it costs nothing;
//! - else a chunk ends at the last boundary before it would have more than C, or a frame of more than C
//!   and a half;
//! - where there is none within C, the chunk ends at C and shares its frame with the next.
//!
//! The outcome depends on the bytes and the places of boundaries alone, not on how the bytes are cut.

use crate::gzip::sparse::LOOKAHEAD_BYTES;
use crate::gzip::{LeadingBits, WINDOW_MAX_BYTES};
use crate::units::CHUNK_TARGET_BYTES;

/// A place of the blob where decompression may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Boundary {
    /// First byte of the blob that belongs to what follows.
    pub(super) blob: u64,
    /// What a decoder must know there.
    pub(super) state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing.
    Clean,
    /// Bits of the byte before, and so much of the output before.
    Block {
        bits: LeadingBits,
        window_bytes: usize,
    },
}

/// A frame that is complete.
#[derive(Debug)]
pub(super) struct Frame {
    /// Where it begins.
    pub(super) start: Boundary,
    /// One past its last byte in the blob.
    pub(super) end: u64,
    /// The output before it, as long as its start asks for.
    pub(super) window: Vec<u8>,
    /// The first of its bytes in the blob, where a window is.
    pub(super) lookahead: Vec<u8>,
    /// How many chunks share it; at least one.
    pub(super) chunks: usize,
    /// Bytes of these.
    pub(super) device_bytes: u64,
}

/// Who takes what was cut.
pub(super) trait CutSink {
    /// Why it cannot go on.
    type Error;
    /// A chunk, in device order; its last byte came when the blob had been taken up to `taken`.
    fn chunk(&mut self, bytes: &[u8], taken: u64) -> Result<(), Self::Error>;
    /// The frame of the chunks since the last frame.
    fn frame(&mut self, frame: Frame) -> Result<(), Self::Error>;
}

#[derive(Debug)]
struct Candidate {
    /// Bytes of the open chunk before it.
    at: usize,
    boundary: Boundary,
    lookahead: Vec<u8>,
}

/// The open chunk and its frame.
#[derive(Debug)]
pub(super) struct Spans {
    chunk_max_bytes: usize,
    /// Up to 32 KiB of device before the open chunk, then the open chunk.
    bytes: Vec<u8>,
    history: usize,
    frame: Frame,
    /// The last boundary inside the open chunk.
    candidate: Option<Candidate>,
    taken: u64,
}

impl Spans {
    /// At the first byte of a blob, which is a clean boundary.
    pub(super) fn new(chunk_max_bytes: usize) -> Self {
        let start = Boundary {
            blob: 0,
            state: State::Clean,
        };
        Self {
            chunk_max_bytes,
            bytes: Vec::new(),
            history: 0,
            frame: Frame::begin(start, Vec::new(), Vec::new()),
            candidate: None,
            taken: 0,
        }
    }

    /// Where the next byte lies in the blob.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// The decoder took the next bytes of the blob; to be told before what they brought.
    pub(super) fn take(&mut self, blob: &[u8]) {
        self.taken += blob.len() as u64;
        let extend = |start: &Boundary, lookahead: &mut Vec<u8>| {
            if matches!(start.state, State::Block { .. }) {
                let room = LOOKAHEAD_BYTES.saturating_sub(lookahead.len());
                lookahead.extend_from_slice(&blob[..blob.len().min(room)]);
            }
        };
        extend(&self.frame.start, &mut self.frame.lookahead);
        if let Some(candidate) = &mut self.candidate {
            extend(&candidate.boundary, &mut candidate.lookahead);
        }
    }

    /// The next bytes of the device.
    pub(super) fn push<S: CutSink>(&mut self, bytes: &[u8], sink: &mut S) -> Result<(), S::Error> {
        self.bytes.extend_from_slice(bytes);
        while self.open_bytes() > self.chunk_max_bytes {
            match self.candidate.take() {
                Some(candidate) => self.cut(candidate, sink)?,
                None => self.chunk(self.chunk_max_bytes, sink)?,
            }
        }
        Ok(())
    }

    /// A boundary between the bytes pushed and those to come.
    pub(super) fn boundary<S: CutSink>(
        &mut self,
        boundary: Boundary,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        let long_frame = boundary.blob.saturating_sub(self.frame.start.blob)
            > (self.chunk_max_bytes + self.chunk_max_bytes / 2) as u64;
        if long_frame && let Some(candidate) = self.candidate.take() {
            self.cut(candidate, sink)?;
        }
        let here = Candidate {
            at: self.open_bytes(),
            boundary,
            lookahead: Vec::new(),
        };
        let clean = boundary.state == State::Clean;
        if here.at == 0 || clean && here.at as u64 >= CHUNK_TARGET_BYTES {
            self.candidate = None;
            self.cut(here, sink)
        } else {
            self.candidate = Some(here);
            Ok(())
        }
    }

    /// The content ends; its last frame ends at `end` in the blob.
    pub(super) fn finish<S: CutSink>(mut self, end: u64, sink: &mut S) -> Result<(), S::Error> {
        let open = self.open_bytes();
        if open > 0 {
            self.chunk(open, sink)?;
        }
        if self.frame.chunks > 0 {
            self.frame.end = end;
            sink.frame(self.frame)?;
        }
        Ok(())
    }

    fn open_bytes(&self) -> usize {
        self.bytes.len() - self.history
    }

    /// Ends frame and chunk at a boundary.
    fn cut<S: CutSink>(&mut self, at: Candidate, sink: &mut S) -> Result<(), S::Error> {
        if at.at > 0 {
            self.chunk(at.at, sink)?;
        }
        let window = match at.boundary.state {
            State::Clean => Vec::new(),
            // After an empty block it is what it was; a blob may have millions of these in a row.
            State::Block { window_bytes, .. }
                if at.at == 0
                    && self.frame.chunks == 0
                    && self.frame.window.len() == window_bytes =>
            {
                std::mem::take(&mut self.frame.window)
            }
            State::Block { window_bytes, .. } => {
                let from = self.history.saturating_sub(window_bytes);
                self.bytes[from..self.history].to_vec()
            }
        };
        let next = Frame::begin(at.boundary, window, at.lookahead);
        let mut frame = std::mem::replace(&mut self.frame, next);
        if frame.chunks == 0 {
            // Nothing came of these bytes: an empty block or member.
            return Ok(());
        }
        frame.end = at.boundary.blob;
        sink.frame(frame)
    }

    /// Ends the open chunk after `length` bytes.
    fn chunk<S: CutSink>(&mut self, length: usize, sink: &mut S) -> Result<(), S::Error> {
        let end = self.history + length;
        sink.chunk(&self.bytes[self.history..end], self.taken)?;
        self.frame.chunks += 1;
        self.frame.device_bytes += length as u64;
        let keep = end.min(WINDOW_MAX_BYTES);
        self.bytes.drain(..end - keep);
        self.history = keep;
        Ok(())
    }
}

impl Frame {
    fn begin(start: Boundary, window: Vec<u8>, lookahead: Vec<u8>) -> Self {
        Self {
            start,
            end: start.blob,
            window,
            lookahead,
            chunks: 0,
            device_bytes: 0,
        }
    }
}
