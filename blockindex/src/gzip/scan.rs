// SPDX-License-Identifier: Apache-2.0
//! One pass over a gzip blob: its content, and every place where decompression could begin again.
//!
//! ```text
//! Header --> Body --> Trailer --> After --(1f 8b)--> Header
//!             | ^                   |
//!             +-+ boundaries        +--(anything else)--> Trailing, to the end
//! ```

use super::header::HeaderParser;
use super::inflate::{Inflater, Stop};
use super::{GzipError, LeadingBits, MAGIC, TRAILER_BYTES, WINDOW_MAX_BYTES};

/// Output of at most so many bytes comes at a time. With the window it fits a core's second cache.
const OUTPUT_BYTES: usize = 128 * 1024;

/// What a step brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// Nothing but progress.
    Nothing,
    /// The next bytes of the content.
    Bytes(&'a [u8]),
    /// A member begins at this offset of the blob.
    Member {
        /// Its first byte.
        offset: u64,
    },
    /// Two blocks meet here; all output so far belongs to what is before.
    Block {
        /// Offset of the first byte that was not taken yet.
        offset: u64,
        /// Bits of the byte before it that belong to the second block.
        bits: LeadingBits,
        /// How far the second block may copy back.
        window_bytes: usize,
    },
}

/// Bytes after the last member, which are no part of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Trailing {
    /// How many.
    pub(crate) bytes: u64,
    /// Whether any of them is not zero.
    pub(crate) garbage: bool,
}

#[derive(Debug)]
enum State {
    Header(HeaderParser),
    Body,
    /// Up to the trailer's last byte.
    Trailer {
        bytes: [u8; TRAILER_BYTES],
        filled: usize,
    },
    After {
        magic_began: bool,
    },
    Trailing,
}

/// Reads a gzip blob from its first byte.
#[derive(Debug)]
pub(crate) struct GzipScanner {
    state: State,
    inflater: Inflater,
    /// A stop whose output was told of first.
    pending: Option<Stop>,
    /// Window and output. The member's output begins at `base`, or it began earlier and `base` is 0.
    buffer: Vec<u8>,
    base: usize,
    at: usize,
    /// Bytes of the blob taken.
    offset: u64,
    member_offset: u64,
    member_bytes: u64,
    crc: crc32fast::Hasher,
    trailing: Trailing,
}

impl GzipScanner {
    /// At the first byte of a blob.
    pub(crate) fn new() -> Self {
        Self {
            state: State::Header(HeaderParser::new()),
            inflater: Inflater::new(),
            pending: None,
            buffer: vec![0; WINDOW_MAX_BYTES + OUTPUT_BYTES],
            base: 0,
            at: 0,
            offset: 0,
            member_offset: 0,
            member_bytes: 0,
            crc: crc32fast::Hasher::new(),
            trailing: Trailing::default(),
        }
    }

    /// Takes bytes off the front of `input`; returns how many, and what they brought. Call it until it
    /// took all and brought nothing.
    ///
    /// **Errors**: no gzip; nothing more can be read then.
    pub(crate) fn step(&mut self, input: &[u8]) -> Result<(usize, Event<'_>), GzipError> {
        match self.pending.take() {
            Some(stop) => Ok((0, self.stopped(stop))),
            None => match &mut self.state {
                State::Header(_) => Ok((self.header(input)?, Event::Nothing)),
                State::Body => self.body(input),
                State::Trailer { .. } => Ok((self.trailer(input)?, Event::Nothing)),
                State::After { .. } => Ok(self.after(input)),
                State::Trailing => {
                    self.trailing.bytes += input.len() as u64;
                    self.trailing.garbage |= input.iter().any(|byte| *byte != 0);
                    self.offset += input.len() as u64;
                    Ok((input.len(), Event::Nothing))
                }
            },
        }
    }

    /// Ends the blob; returns what followed its last member.
    ///
    /// **Errors**: it ends inside a member.
    pub(crate) fn finish(self) -> Result<Trailing, GzipError> {
        match self.state {
            State::After { magic_began } => Ok(Trailing {
                bytes: magic_began.into(),
                garbage: magic_began,
            }),
            State::Trailing => Ok(self.trailing),
            _ => Err(GzipError::Truncated {
                offset: self.offset,
            }),
        }
    }

    fn header(&mut self, input: &[u8]) -> Result<usize, GzipError> {
        let State::Header(parser) = &mut self.state else {
            return Ok(0);
        };
        let taken = parser.push(input).map_err(|what| GzipError::Header {
            offset: self.member_offset,
            what,
        })?;
        self.offset += taken as u64;
        if parser.is_done() {
            self.state = State::Body;
            self.inflater.begin_again();
            self.base = self.at;
            self.member_bytes = 0;
            self.crc = crc32fast::Hasher::new();
        }
        Ok(taken)
    }

    fn body(&mut self, input: &[u8]) -> Result<(usize, Event<'_>), GzipError> {
        self.make_room();
        let (from, out) = (self.at, &mut self.buffer[self.base..]);
        let step =
            self.inflater
                .step(input, out, self.at - self.base)
                .ok_or(GzipError::Deflate {
                    offset: self.offset,
                })?;
        self.at += step.made;
        self.offset += step.taken as u64;
        self.member_bytes += step.made as u64;
        if step.made == 0 {
            return Ok((step.taken, self.stopped(step.stop)));
        }
        self.pending = match step.stop {
            Stop::Boundary(_) | Stop::End => Some(step.stop),
            Stop::Input | Stop::Output => None,
        };
        let made = &self.buffer[from..self.at];
        self.crc.update(made);
        Ok((step.taken, Event::Bytes(made)))
    }

    /// Moves the window to the front when the buffer is full.
    fn make_room(&mut self) {
        if self.at < self.buffer.len() {
            return;
        }
        let keep = (self.at - self.base).min(WINDOW_MAX_BYTES);
        self.buffer.copy_within(self.at - keep..self.at, 0);
        (self.base, self.at) = (0, keep);
    }

    fn stopped(&mut self, stop: Stop) -> Event<'_> {
        match stop {
            Stop::Input | Stop::Output => Event::Nothing,
            Stop::Boundary(bits) => Event::Block {
                offset: self.offset,
                bits,
                window_bytes: usize::try_from(self.member_bytes)
                    .map_or(WINDOW_MAX_BYTES, |bytes| bytes.min(WINDOW_MAX_BYTES)),
            },
            Stop::End => {
                self.state = State::Trailer {
                    bytes: [0; TRAILER_BYTES],
                    filled: 0,
                };
                Event::Nothing
            }
        }
    }

    fn trailer(&mut self, input: &[u8]) -> Result<usize, GzipError> {
        let State::Trailer { bytes, filled } = &mut self.state else {
            return Ok(0);
        };
        let taken = input.len().min(TRAILER_BYTES - *filled);
        bytes[*filled..*filled + taken].copy_from_slice(&input[..taken]);
        *filled += taken;
        self.offset += taken as u64;
        if *filled < TRAILER_BYTES {
            return Ok(taken);
        }
        let [c0, c1, c2, c3, length @ ..] = *bytes;
        let wrong = |what| GzipError::Trailer {
            offset: self.offset,
            what,
        };
        if u32::from_le_bytes([c0, c1, c2, c3]) != self.crc.clone().finalize() {
            return Err(wrong("crc32"));
        }
        // Only the low 32 bits stand there.
        let low = self.member_bytes & u64::from(u32::MAX);
        if u64::from(u32::from_le_bytes(length)) != low {
            return Err(wrong("length"));
        }
        self.state = State::After { magic_began: false };
        Ok(taken)
    }

    fn after(&mut self, input: &[u8]) -> (usize, Event<'_>) {
        let State::After { magic_began } = &mut self.state else {
            return (0, Event::Nothing);
        };
        let Some(byte) = input.first() else {
            return (0, Event::Nothing);
        };
        match (*magic_began, *byte) {
            (false, first) if first == MAGIC[0] => {
                *magic_began = true;
                self.offset += 1;
                (1, Event::Nothing)
            }
            (true, second) if second == MAGIC[1] => {
                self.offset += 1;
                self.member_offset = self.offset - MAGIC.len() as u64;
                self.state = State::Header(HeaderParser::after_magic());
                let offset = self.member_offset;
                (1, Event::Member { offset })
            }
            (began, _) => {
                self.trailing = Trailing {
                    bytes: began.into(),
                    garbage: began,
                };
                self.state = State::Trailing;
                (0, Event::Nothing)
            }
        }
    }
}
