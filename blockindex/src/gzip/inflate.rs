// SPDX-License-Identifier: Apache-2.0
//! Raw deflate in steps that end at block boundaries.
//!
//! The library decompresses into a slice whose bytes before the position are the window, and refuses
//! copies from before the slice. So the slice must begin where the member's output begins, or 32 KiB back.

use std::fmt;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_IGNORE_ADLER32, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY,
    TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{BlockBoundaryState, DecompressorOxide, decompress};

use super::LeadingBits;

/// One deflate stream that is being decompressed.
pub(super) struct Inflater(Box<DecompressorOxide>);

/// Why a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// All input was taken.
    Input,
    /// The output is full.
    Output,
    /// Between two blocks, the second of which begins with these bits.
    Boundary(LeadingBits),
    /// After the last block.
    End,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Bytes of input taken.
    pub(super) taken: usize,
    /// Bytes of output made.
    pub(super) made: usize,
    /// Why it ended.
    pub(super) stop: Stop,
}

impl Inflater {
    /// At the first block of a stream.
    pub(super) fn new() -> Self {
        Self(Box::default())
    }

    /// Begins the first block of another stream. Cheaper than a new one, which has 10 KiB to clear: a blob
    /// may have millions of small members.
    pub(super) fn begin_again(&mut self) {
        self.0.init();
    }

    /// Between two blocks, the second of which begins with `bits`.
    pub(super) fn between_blocks(bits: LeadingBits) -> Self {
        Self(Box::new(DecompressorOxide::from_block_boundary_state(
            &BlockBoundaryState {
                num_bits: bits.count(),
                bit_buf: bits.value(),
                ..BlockBoundaryState::default()
            },
        )))
    }

    /// Decompresses into `out` from `at` on; what stands before is the window. `None`: an invalid stream.
    pub(super) fn step(&mut self, input: &[u8], out: &mut [u8], at: usize) -> Option<Step> {
        let flags = TINFL_FLAG_HAS_MORE_INPUT
            | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF
            | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY
            | TINFL_FLAG_IGNORE_ADLER32;
        let (status, taken, made) = decompress(&mut self.0, input, out, at, flags);
        let stop = match status {
            TINFLStatus::Done => Stop::End,
            TINFLStatus::NeedsMoreInput => Stop::Input,
            TINFLStatus::HasMoreOutput => Stop::Output,
            TINFLStatus::BlockBoundary => {
                let state = self.0.block_boundary_state()?;
                Stop::Boundary(LeadingBits::new(state.num_bits, state.bit_buf)?)
            }
            _ => return None,
        };
        Some(Step { taken, made, stop })
    }
}

impl fmt::Debug for Inflater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflater").finish_non_exhaustive()
    }
}
