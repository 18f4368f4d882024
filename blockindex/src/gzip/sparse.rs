// SPDX-License-Identifier: Apache-2.0
//! Which bytes of a window are ever copied.
//!
//! No block reaches back farther than 32 KiB, so only the first 32 KiB after a restart point can copy
//! from its window. They are decompressed three times, with windows whose bytes tell their own
//! positions: low bits, high bits, and the low bits inverted. Where the first and the last output
//! differ, the byte came from the window, and from which place of it. All other places of the window
//! can as well be zeros, and zeros compress well: windows become a fifth as large
//! (`docs/decisions/040-gzip-restarts.md`).

use super::inflate::{Inflater, Stop};
use super::{LeadingBits, WINDOW_MAX_BYTES};

/// The most compressed bytes after a restart point that are looked at. 32 KiB of output take hardly
/// more than that unless a stream is made of empty blocks; what is not seen counts as copied.
pub(crate) const LOOKAHEAD_BYTES: usize = 64 * 1024;

/// Clears the bytes of `window` that nothing copies, and drops those at its front.
///
/// **Shape**: `after` is what follows the restart point in the blob, at most [`LOOKAHEAD_BYTES`] of it,
/// less only if that gives `limit` bytes of output; of more output than `limit` nobody will need any.
pub(crate) fn thin(window: &mut Vec<u8>, bits: LeadingBits, after: &[u8], limit: usize) {
    let copied = copied(window.len(), bits, after, limit.min(WINDOW_MAX_BYTES));
    for (byte, copied) in window.iter_mut().zip(&copied) {
        if !copied {
            *byte = 0;
        }
    }
    let front = copied.iter().take_while(|copied| !**copied).count();
    window.drain(..front);
}

fn copied(window_bytes: usize, bits: LeadingBits, after: &[u8], limit: usize) -> Vec<bool> {
    let place = |at: usize| {
        // At most 32 KiB: 15 bits.
        let [low, high, ..] = at.to_le_bytes();
        (low, high)
    };
    let run = |byte: &dyn Fn(usize) -> u8| {
        let mut out: Vec<u8> = (0..window_bytes).map(byte).collect();
        out.resize(window_bytes + limit, 0);
        let seen = inflate(bits, after, &mut out, window_bytes);
        (out.split_off(window_bytes), seen)
    };
    let (low, seen) = run(&|at| place(at).0);
    let (high, _) = run(&|at| place(at).1);
    let (inverted, _) = run(&|at| !place(at).0);
    let mut copied = vec![false; window_bytes];
    let made = seen.made;
    for ((low, high), inverted) in low[..made].iter().zip(&high).zip(&inverted) {
        if low != inverted
            && let Some(copied) = copied.get_mut(usize::from(u16::from_le_bytes([*low, *high])))
        {
            *copied = true;
        }
    }
    if !seen.to_end {
        // What comes after the output seen reaches this far back at most.
        let from = (window_bytes + made).saturating_sub(WINDOW_MAX_BYTES);
        copied
            .iter_mut()
            .skip(from)
            .for_each(|copied| *copied = true);
    }
    copied
}

struct Seen {
    made: usize,
    /// Whether nothing that follows can copy from the window.
    to_end: bool,
}

fn inflate(bits: LeadingBits, mut after: &[u8], out: &mut [u8], window_bytes: usize) -> Seen {
    let mut inflater = Inflater::between_blocks(bits);
    let mut at = window_bytes;
    loop {
        let Some(step) = inflater.step(after, out, at) else {
            // The caller has decompressed these bytes, so it does not happen; all of the window is safe.
            return Seen {
                made: 0,
                to_end: false,
            };
        };
        at += step.made;
        after = &after[step.taken..];
        let made = at - window_bytes;
        match step.stop {
            Stop::Boundary(_) if at < out.len() => {}
            Stop::Boundary(_) | Stop::Output | Stop::End => return Seen { made, to_end: true },
            Stop::Input => {
                let to_end = at == out.len();
                return Seen { made, to_end };
            }
        }
    }
}
