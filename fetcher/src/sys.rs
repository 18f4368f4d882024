// SPDX-License-Identifier: Apache-2.0
//! The only unsafe code of this crate: a file mapped shared and seen as atomic 64-bit words.
//!
//! The presence bitmap of a layer device is written by the daemon and read by the shim at the same
//! time. Both map the same file; every access is an atomic operation on a whole word, so there is no
//! data race whatever the other process does. The file must never be made shorter while it is mapped
//! (an access past its end raises SIGBUS); the store only ever replaces it by rename.

#![allow(
    unsafe_code,
    reason = "the one place where this crate maps shared memory"
)]

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

/// Bytes of one word.
const WORD_BYTES: usize = 8;

/// A file mapped `MAP_SHARED`, as atomic words in the byte order of this machine.
#[derive(Debug)]
pub(crate) struct SharedWords {
    map: MmapRaw,
    words: usize,
}

impl SharedWords {
    /// Maps all of `file`, whose length must be a positive multiple of eight.
    ///
    /// Without `writable` the mapping is read-only: only loads are allowed on the words.
    pub(crate) fn map(file: &File, writable: bool) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "file too large to map"))?;
        if bytes == 0 || bytes % WORD_BYTES != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "length is not whole words",
            ));
        }
        let mut options = MmapOptions::new();
        options.len(bytes);
        let map = if writable {
            options.map_raw(file)?
        } else {
            options.map_raw_read_only(file)?
        };
        Ok(Self {
            map,
            words: bytes / WORD_BYTES,
        })
    }

    /// The words of the file.
    ///
    /// Storing to the words of a read-only mapping raises SIGSEGV; the types above this one only
    /// offer stores where the mapping is writable.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words * 8` bytes long and lives as long as `self`.
        // `AtomicU64` has the layout of `u64`, every bit pattern is valid, and all access in this
        // process goes through these atomics. Other processes write whole aligned words. The file is
        // never made shorter while mapped (module documentation). Loads of a native atomic word are
        // allowed on read-only memory.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU64>(), self.words) }
    }

    /// Writes the words back to the disk and waits for it.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.map.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn two_mappings_see_each_others_words() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 8192]).unwrap();
        let writer = SharedWords::map(&file, true).unwrap();
        let reader = SharedWords::map(&file, false).unwrap();
        assert_eq!(reader.words().len(), 1024);
        writer.words()[1000].store(7, Ordering::Release);
        assert_eq!(reader.words()[1000].load(Ordering::Acquire), 7);
        writer.sync().unwrap();
    }

    #[test]
    fn odd_lengths_are_refused() {
        for bytes in [0, 7, 4097] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            assert!(SharedWords::map(&file, true).is_err(), "{bytes}");
        }
    }
}
