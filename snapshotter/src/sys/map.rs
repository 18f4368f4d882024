// SPDX-License-Identifier: Apache-2.0
//! Read-only file mappings.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{Mmap, MmapOptions, UncheckedAdvice};
use sluice_blockindex::erofs::TreeReader;

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

/// A mapped EROFS tree, and the reader that borrows from the mapping.
///
/// Opened once: the reader checks the superblock, which a server should not repeat for each request.
pub struct MappedTree {
    /// Borrows from `map`; declared first, so dropped first.
    reader: TreeReader<'static>,
    /// Keeps the bytes where they are.
    map: Mmap,
}

impl MappedTree {
    /// Maps the tree at `path` and checks its superblock.
    pub fn open(path: &Path) -> io::Result<MappedTree> {
        let map = read_only(path)?;
        // SAFETY: the bytes live as long as the mapping, which does not move when `map` does and is
        // dropped after the reader; `reader()` hands out no borrow longer than that of `self`.
        let bytes: &'static [u8] = unsafe { std::slice::from_raw_parts(map.as_ptr(), map.len()) };
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let reader = TreeReader::open(bytes).map_err(invalid)?;
        Ok(MappedTree { reader, map })
    }

    /// Takes the pages out of this process; the page cache keeps them, and they come back when read.
    /// After a walk over the whole tree this keeps memory to what is really used.
    pub fn release_pages(&self) -> io::Result<()> {
        // SAFETY: a shared mapping of a file, only read: a page taken away is read from the same
        // file again, with the same bytes.
        unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) }
    }

    /// The reader.
    pub fn reader(&self) -> TreeReader<'_> {
        self.reader
    }
}

impl std::fmt::Debug for MappedTree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MappedTree")
            .field("root", &self.reader.root())
            .finish_non_exhaustive()
    }
}
