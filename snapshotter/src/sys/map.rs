// SPDX-License-Identifier: Apache-2.0
//! Read-only file mappings.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};

use memmap2::{Mmap, MmapOptions, UncheckedAdvice};
use sluice_blockindex::erofs::TreeReader;

/// A whole file, mapped for reading. Clones are the same mapping.
#[derive(Clone, Debug)]
pub struct MappedFile(Arc<Mmap>);

impl MappedFile {
    /// Takes the pages out of this process; the page cache keeps them, and they come back when read.
    /// After a pass over the whole file this keeps memory to what is really used.
    pub fn release_pages(&self) {
        // SAFETY: a shared mapping of a file, only read: a page taken away is read from the same
        // file again, with the same bytes.
        let released = unsafe { self.0.unchecked_advise(UncheckedAdvice::DontNeed) };
        if let Err(error) = released {
            tracing::debug!(%error, "release pages of a mapped file");
        }
    }

    /// To find it again for as long as somebody has it.
    #[must_use]
    pub fn downgrade(&self) -> WeakFile {
        WeakFile(Arc::downgrade(&self.0))
    }
}

/// A [`MappedFile`] that may be gone.
#[derive(Clone, Debug)]
pub struct WeakFile(Weak<Mmap>);

impl WeakFile {
    /// The file, while somebody has it.
    #[must_use]
    pub fn upgrade(&self) -> Option<MappedFile> {
        self.0.upgrade().map(MappedFile)
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps a whole file for reading; an empty file gives an empty mapping.
///
/// The file must not shrink while it is mapped. Ours never do: trees and indexes are written under a
/// temporary name, renamed, and from then on only ever unlinked, which leaves a mapping intact.
pub fn read_only(path: &Path) -> io::Result<MappedFile> {
    let file = File::open(path)?;
    // SAFETY: files mapped here are immutable once they have their name (see above), in directories
    // that only root may write.
    let map = unsafe { MmapOptions::new().map(&file) }?;
    Ok(MappedFile(Arc::new(map)))
}

/// A mapped EROFS tree, and the reader that borrows from the mapping.
///
/// Opened once: the reader checks the superblock, which a server should not repeat for each request.
pub struct MappedTree {
    /// Borrows from `map`; declared first, so dropped first.
    reader: TreeReader<'static>,
    /// Keeps the bytes where they are.
    map: MappedFile,
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

    /// As [`MappedFile::release_pages`].
    pub fn release_pages(&self) {
        self.map.release_pages();
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
