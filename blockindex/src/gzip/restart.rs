// SPDX-License-Identifier: Apache-2.0
//! Decompresses a part of a gzip blob from a restart point.
//!
//! Checksums of members are not looked at: what begins in the middle cannot have one, and the caller
//! verifies the chunk by its own digest.

use super::header::HeaderParser;
use super::inflate::{Inflater, Stop};
use super::{GzipError, LeadingBits, TRAILER_BYTES};

/// How decompression begins at a restart point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartAt<'a> {
    /// With the header of a member.
    Member,
    /// Between two blocks of a member.
    Block {
        /// Bits of the byte before that belong to the second block.
        bits: LeadingBits,
        /// The output before, or so much of its end as is ever copied.
        window: &'a [u8],
    },
}

/// Decompresses `frame`, which begins at a restart point, up to `bytes` bytes, into `out`, whose former
/// content is dropped. Member boundaries inside the frame are passed over.
///
/// Allocates the window and `bytes`, which the caller bounds; never more.
///
/// **Errors**: the frame gives fewer bytes, or is damaged, or the restart point is another's. `out`
/// has no defined content then.
pub fn inflate_into(
    frame: &[u8],
    at: RestartAt<'_>,
    bytes: usize,
    out: &mut Vec<u8>,
) -> Result<(), GzipError> {
    let mut position = 0;
    let (mut inflater, window) = match at {
        RestartAt::Member => {
            position = header(frame, 0)?;
            (Inflater::new(), &[][..])
        }
        RestartAt::Block { bits, window } => (Inflater::between_blocks(bits), window),
    };
    out.clear();
    out.extend_from_slice(window);
    let end = window.len() + bytes;
    out.resize(end, 0);
    // Where the current member's output, or its window, begins.
    let (mut base, mut made) = (0, window.len());
    while made < end {
        let step = inflater
            .step(&frame[position..], &mut out[base..], made - base)
            .ok_or(GzipError::Deflate {
                offset: position as u64,
            })?;
        position += step.taken;
        made += step.made;
        match step.stop {
            Stop::Boundary(_) | Stop::Output => {}
            Stop::Input if made == end => {}
            Stop::Input => {
                return Err(GzipError::Truncated {
                    offset: position as u64,
                });
            }
            Stop::End if made == end => {}
            Stop::End => {
                position = header(frame, position + TRAILER_BYTES)?;
                inflater.begin_again();
                base = made;
            }
        }
    }
    out.drain(..window.len());
    Ok(())
}

/// Reads the header of a member at `start`; returns where its deflate stream begins.
fn header(frame: &[u8], start: usize) -> Result<usize, GzipError> {
    let truncated = GzipError::Truncated {
        offset: frame.len() as u64,
    };
    let bytes = frame.get(start..).ok_or(truncated)?;
    let mut parser = HeaderParser::new();
    let taken = parser.push(bytes).map_err(|what| GzipError::Header {
        offset: start as u64,
        what,
    })?;
    if parser.is_done() {
        Ok(start + taken)
    } else {
        Err(truncated)
    }
}
