// SPDX-License-Identifier: Apache-2.0
//! Where the device is cut into chunks.
//!
//! A rebuilt image has new headers (they carry times) around old contents. So the content of a file
//! of 64 KiB or more always begins a chunk, and its chunks but the last depend on nothing else. Small
//! files are grouped up to about the target. What follows from the offsets and sizes of contents
//! alone is the same however the tar arrives.
//!
//! Rules, with T the target, 128 KiB unless somebody chose another:
//! - at a content of at least T/2: cut; it is split into `round(size / T)` equal pieces on multiples
//!   of 4 KiB, so that no page of a file spans two chunks; its last piece stays open;
//! - at a smaller content: cut when the open chunk is T or more, or would exceed 5/4 T with it;
//! - between contents: cut where the open chunk reaches 2 T.

use crate::extent::{DeviceSpace, Extent};
use crate::units::{CHUNK_MAX_BYTES, CHUNK_TARGET_BYTES as TARGET};

/// Pieces of a content are multiples of a page.
const PAGE_BYTES: u64 = 4096;

/// The smallest target: the longest piece, of a content just below 3/2 T, must leave room for what
/// follows it, and below this the index and the frames' own overhead outgrow what small reads save.
pub const TARGET_MIN_BYTES: u64 = 16 * 1024;
/// The largest: a chunk of structure has up to twice the target.
pub const TARGET_MAX_BYTES: u64 = CHUNK_MAX_BYTES / 2;

const _: () = assert!(TARGET_MIN_BYTES * 3 / 2 + PAGE_BYTES < TARGET_MIN_BYTES * 2);
const _: () = assert!(TARGET_MIN_BYTES <= TARGET && TARGET <= TARGET_MAX_BYTES);

/// State of the cutting: the open chunk and the content that is being split.
#[derive(Debug)]
pub(super) struct Cutter {
    target_bytes: u64,
    chunk_start: u64,
    content: Option<Split>,
}

#[derive(Debug)]
struct Split {
    start: u64,
    end: u64,
    piece: u64,
    pieces: u64,
    done: u64,
}

impl Default for Cutter {
    fn default() -> Self {
        Self::new(TARGET)
    }
}

impl Cutter {
    /// At the start of a device. `target_bytes` is in [`TARGET_MIN_BYTES`]`..=`[`TARGET_MAX_BYTES`].
    pub(super) fn new(target_bytes: u64) -> Self {
        Self {
            target_bytes: target_bytes.clamp(TARGET_MIN_BYTES, TARGET_MAX_BYTES),
            chunk_start: 0,
            content: None,
        }
    }

    /// Contents from here on begin a chunk of their own.
    fn large_bytes(&self) -> u64 {
        self.target_bytes / 2
    }

    /// An open chunk that a small content would make longer than this is cut before it.
    fn group_max_bytes(&self) -> u64 {
        self.target_bytes + self.target_bytes / 4
    }

    /// An open chunk without contents is cut here.
    fn structure_max_bytes(&self) -> u64 {
        2 * self.target_bytes
    }

    /// A content begins; returns whether the open chunk ends right before it.
    pub(super) fn content(&mut self, run: Extent<DeviceSpace>) -> bool {
        let (start, bytes) = (run.start(), run.len());
        let open = start - self.chunk_start;
        let (target, large_bytes) = (self.target_bytes, self.large_bytes());
        let large = bytes >= large_bytes;
        let cut = open > 0 && (large || open >= target || open + bytes > self.group_max_bytes());
        let pieces = if large {
            (bytes.saturating_add(large_bytes) / target).max(1)
        } else {
            1
        };
        self.content = Some(Split {
            start,
            end: run.end(),
            piece: bytes
                .div_ceil(pieces)
                .div_ceil(PAGE_BYTES)
                .saturating_mul(PAGE_BYTES),
            pieces,
            done: 1,
        });
        if cut {
            self.chunk_start = start;
        }
        cut
    }

    /// Where to stop next when bytes follow at `position`, and whether the open chunk ends there.
    ///
    /// The caller takes bytes up to that place and asks again; when it stands there and more bytes
    /// come, it calls [`Self::cut`].
    pub(super) fn next(&mut self, position: u64) -> (u64, bool) {
        if let Some(split) = &self.content {
            let at = split
                .start
                .saturating_add(split.piece.saturating_mul(split.done));
            if split.done < split.pieces && at < split.end {
                return (at, true);
            }
            if position < split.end {
                // The last piece ends with whatever follows it.
                return (split.end, false);
            }
            self.content = None;
        }
        let end = self.chunk_start.saturating_add(self.structure_max_bytes());
        (end, true)
    }

    /// Ends the open chunk at `position`.
    pub(super) fn cut(&mut self, position: u64) {
        self.chunk_start = position;
        if let Some(split) = &mut self.content {
            split.done += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    /// Chunk lengths of a device where contents of these sizes follow one another, each after a
    /// header, as the encoder cuts it.
    fn lengths(contents: &[u64], trailer: u64) -> Vec<u64> {
        lengths_by(Cutter::default(), contents, trailer)
    }

    fn lengths_by(mut cutter: Cutter, contents: &[u64], trailer: u64) -> Vec<u64> {
        let mut cuts = vec![0];
        let mut position = 0;
        let advance = |cutter: &mut Cutter, cuts: &mut Vec<u64>, position: &mut u64, to| {
            while *position < to {
                let (next, cuts_there) = cutter.next(*position);
                if next == *position && cuts_there {
                    cutter.cut(next);
                    cuts.push(next);
                } else {
                    *position = next.min(to);
                }
            }
        };
        for bytes in contents {
            let start = position + 512;
            advance(&mut cutter, &mut cuts, &mut position, start);
            let run = Extent::from_length(position, *bytes).unwrap();
            if cutter.content(run) {
                cuts.push(position);
            }
            advance(&mut cutter, &mut cuts, &mut position, run.end());
            advance(
                &mut cutter,
                &mut cuts,
                &mut position,
                run.end().next_multiple_of(512),
            );
        }
        let end = position + trailer;
        advance(&mut cutter, &mut cuts, &mut position, end);
        cuts.push(end);
        cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    #[test]
    fn small_files_are_grouped() {
        let lengths = lengths(&[1000; 1000], 1024);
        assert!(
            lengths[..lengths.len() - 1]
                .iter()
                .all(|n| (TARGET..TARGET + 2048).contains(n))
        );
    }

    #[test]
    fn large_files_begin_chunks_and_are_split_on_pages() {
        assert_eq!(
            lengths(&[100 * KIB, 300 * KIB, 10], 1024),
            [512, 100 * KIB + 512, 152 * KIB, 148 * KIB + 512, 512 + 1024,]
        );
        let lengths = lengths(&[10 * 1024 * KIB], 0);
        assert_eq!(lengths.len(), 81);
        assert!(lengths[1..].iter().all(|n| *n == TARGET));
    }

    #[test]
    fn nothing_but_structure_is_cut_too() {
        assert_eq!(lengths(&[], 600 * KIB), [256 * KIB, 256 * KIB, 88 * KIB]);
        assert_eq!(lengths(&[], 256 * KIB), [256 * KIB]);
        assert_eq!(
            lengths(&[100 * KIB], 300 * KIB),
            [512, 256 * KIB, 144 * KIB]
        );
    }

    #[test]
    fn no_chunk_is_too_long_or_empty() {
        for target in [TARGET_MIN_BYTES, 20_480, TARGET, TARGET_MAX_BYTES] {
            for bytes in (0..400).map(|n| n * 1021 + 1) {
                let contents = [bytes, 70_000, bytes, 10, bytes];
                let lengths = lengths_by(Cutter::new(target), &contents, 700_000);
                assert!(
                    lengths.iter().all(|n| (1..=2 * target).contains(n)),
                    "{target}: {lengths:?}"
                );
            }
        }
    }

    #[test]
    fn chunks_are_about_as_long_as_chosen() {
        for target in [TARGET_MIN_BYTES, 64 * KIB, TARGET_MAX_BYTES] {
            let lengths = lengths_by(Cutter::new(target), &[64 * target], 0);
            assert!(lengths[1..].iter().all(|n| *n == target), "{target}");
        }
    }
}
