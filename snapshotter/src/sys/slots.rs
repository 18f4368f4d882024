// SPDX-License-Identifier: Apache-2.0
//! Slots of equal size in shared memory, into which the kernel writes what a process reads.
//!
//! A process that is killed between a `read` and the note of what it had read loses it. One that reads straight
//! into memory that others hold too loses nothing: the kernel itself has written it down.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// The slots of a memory file.
///
/// Each slot is used by one thread at a time: whose it is, the caller keeps count of.
#[derive(Debug)]
pub struct SharedSlots {
    map: MmapRaw,
    head_bytes: usize,
    slot_bytes: usize,
    count: u32,
}

impl SharedSlots {
    /// Maps `count` slots of `slot_bytes` (a multiple of 8), after `head_bytes` (a multiple of 8) of something
    /// else. The file must not become smaller while it is mapped.
    ///
    /// **Errors** `InvalidData`: the file is shorter than that.
    pub fn map(
        file: &File,
        head_bytes: usize,
        slot_bytes: usize,
        count: u32,
    ) -> io::Result<SharedSlots> {
        let slots = usize::try_from(count).map_err(io::Error::other)?;
        let bytes = slots.checked_mul(slot_bytes);
        let bytes = bytes.and_then(|bytes| bytes.checked_add(head_bytes));
        let aligned =
            slot_bytes.is_multiple_of(8) && head_bytes.is_multiple_of(8) && slot_bytes > 0;
        let bytes = bytes.filter(|_| aligned);
        let bytes = bytes.ok_or(io::Error::other("no layout of slots"))?;
        if file.metadata()?.len() < u64::try_from(bytes).map_err(io::Error::other)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the slots are cut off",
            ));
        }
        Ok(SharedSlots {
            map: MmapOptions::new().len(bytes).map_raw(file)?,
            head_bytes,
            slot_bytes,
            count,
        })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Where a slot is. Panics for one that there is not: a mistake of the caller.
    fn at(&self, slot: u32) -> *mut u8 {
        assert!(slot < self.count, "slot {slot} of {}", self.count);
        let offset = self.head_bytes + slot as usize * self.slot_bytes;
        // SAFETY: the mapping has `head_bytes + count * slot_bytes` bytes.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// One `read` into a slot; how many bytes it gave.
    pub fn read_into(&self, slot: u32, from: BorrowedFd<'_>) -> io::Result<usize> {
        let to = self.at(slot);
        // SAFETY: `slot_bytes` from `to` on are ours and mapped, and no reference to them exists.
        let read = unsafe { libc::read(from.as_raw_fd(), to.cast(), self.slot_bytes) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// The first word of a slot.
    #[must_use]
    pub fn first_word(&self, slot: u32) -> u32 {
        self.atomic(slot).load(Ordering::Acquire)
    }

    /// Sets the first word of a slot.
    pub fn set_first_word(&self, slot: u32, word: u32) {
        self.atomic(slot).store(word, Ordering::Release);
    }

    fn atomic(&self, slot: u32) -> &AtomicU32 {
        // SAFETY: mapped for as long as `self` lives, and aligned to 8 bytes: the mapping is aligned to a page,
        // head and slots are multiples of 8.
        unsafe { AtomicU32::from_ptr(self.at(slot).cast()) }
    }

    /// The first `length` bytes of a slot, at most all of it.
    #[must_use]
    pub fn copy(&self, slot: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length.min(self.slot_bytes)];
        // SAFETY: both are that long, and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(slot), bytes.as_mut_ptr(), bytes.len());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn what_is_read_stands_in_the_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 + 3 * 64).unwrap();
        let slots = SharedSlots::map(&file, 8, 64, 3).unwrap();
        let mut source = tempfile::NamedTempFile::new().unwrap();
        source.write_all(&[7; 100]).unwrap();
        let read = |from: &File| slots.read_into(1, from.as_fd()).unwrap();
        assert_eq!(read(&source.reopen().unwrap()), 64);
        // Another mapping of the same file sees it.
        let other = SharedSlots::map(&file, 8, 64, 3).unwrap();
        assert_eq!(other.first_word(1), 0x0707_0707);
        assert_eq!(other.copy(1, 1000), [7; 64]);
        assert_eq!((other.first_word(0), other.first_word(2)), (0, 0));
        slots.set_first_word(1, 0);
        assert_eq!(other.first_word(1), 0);
        assert_eq!(other.count(), 3);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        assert!(SharedSlots::map(&file, 0, 64, 2).is_err());
        assert!(SharedSlots::map(&file, 0, 10, 2).is_err(), "not aligned");
        assert!(SharedSlots::map(&file, 4, 32, 2).is_err(), "not aligned");
        assert!(SharedSlots::map(&file, 0, usize::MAX - 7, 2).is_err());
    }
}
