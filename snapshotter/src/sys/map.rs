// SPDX-License-Identifier: Apache-2.0
//! Read-only file mappings.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

/// Maps a whole file for reading; an empty file gives an empty mapping.
///
/// The file must not shrink while it is mapped. Ours never do: trees and indexes are written under a
/// temporary name, renamed, and from then on only ever unlinked, which leaves a mapping intact.
pub fn read_only(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: files mapped here are immutable once they have their name (see above), in directories
    // that only root may write.
    unsafe { MmapOptions::new().map(&file) }
}
