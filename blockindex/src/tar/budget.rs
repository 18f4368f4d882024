// SPDX-License-Identifier: Apache-2.0
//! What one scan may keep in memory and how long it may work, whatever the tar says.
//!
//! A small blob can decompress to millions of entries, or to attributes that fill memory. A tar
//! that exceeds an allowance is [`NotLazy`]. The allowances are constants, not options: what a
//! layer becomes must depend on its tar alone. What is counted depends on the bytes of the tar
//! alone, not on how it was cut into pieces.

use super::NotLazy;

/// The most entries, implied directories included. With names as long as they may be, a layer of so many files takes
/// 0.5 GB while its index is written, and no conversion shall take more.
const ENTRIES_MAX: u64 = 3 << 18;
/// The most bytes of names, targets and extended attributes: 64 for each of [`ENTRIES_MAX`].
const TREE_BYTES_MAX: u64 = 48 * 1024 * 1024;
/// The most bytes, zeros not counted, that belong to no file and are no header: contents of
/// whiteouts, and whatever follows the end. They are stored twice, in frames and in the skeleton;
/// in ordinary tars there are none.
const LOOSE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Components that symlinks may make a scan visit, besides [`STEPS_PER_ENTRY`] for each entry.
const STEPS_FREE: u64 = 1 << 20;
/// Components per entry: several times the depth of real paths, so that the time of a scan is
/// linear in the tar.
const STEPS_PER_ENTRY: u64 = 64;

/// About what an entry takes in memory besides its bytes: an inode and its place in a directory.
const ENTRY_BYTES: u64 = 320;

/// How much of something is left.
#[derive(Debug, Clone)]
pub(super) struct Allowance {
    what: &'static str,
    limit: u64,
    left: u64,
}

impl Allowance {
    pub(super) fn new(what: &'static str, limit: u64) -> Self {
        Self {
            what,
            limit,
            left: limit,
        }
    }

    fn used(&self) -> u64 {
        self.limit - self.left
    }

    pub(super) fn take(&mut self, count: usize) -> Result<(), NotLazy> {
        let exceeded = NotLazy::Limit {
            what: self.what,
            limit: self.limit,
        };
        let left = self.left.checked_sub(count as u64);
        self.left = left.ok_or(exceeded)?;
        Ok(())
    }
}

/// The allowances of a scan.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    pub entries: Allowance,
    pub tree_bytes: Allowance,
    pub loose_bytes: Allowance,
    /// Components that may still be visited for the sake of symlinks.
    pub steps: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            entries: Allowance::new("entries", ENTRIES_MAX),
            tree_bytes: Allowance::new(
                "bytes of names, targets and extended attributes",
                TREE_BYTES_MAX,
            ),
            loose_bytes: Allowance::new("bytes that belong to no file", LOOSE_BYTES_MAX),
            steps: STEPS_FREE,
        }
    }
}

impl Budget {
    /// Accounts for one more entry of the tar.
    pub(super) fn entry(&mut self) -> Result<(), NotLazy> {
        self.steps = self.steps.saturating_add(STEPS_PER_ENTRY);
        self.entries.take(1)
    }

    /// About how many bytes the tree takes.
    pub(super) fn held_bytes(&self) -> u64 {
        self.entries.used() * ENTRY_BYTES + self.tree_bytes.used()
    }

    /// Accounts for bytes of the tar that belong to no file.
    pub(super) fn loose(&mut self, bytes: &[u8]) -> Result<(), NotLazy> {
        self.loose_bytes
            .take(bytes.iter().filter(|byte| **byte != 0).count())
    }
}
