// SPDX-License-Identifier: Apache-2.0
//! Slots of equal size in shared memory, into which the kernel writes what a process reads.
//!
//! A process that is killed between a `read` and the note of what it had read loses it. One that reads straight
//! into memory that others hold too loses nothing: the kernel itself has written it down.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

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

    /// Keeps the slots in memory for as long as they are mapped.
    pub fn lock_in_memory(&self) -> io::Result<()> {
        self.map.lock()
    }

    /// Where a slot's byte is. Panics for one that there is not: a mistake of the caller.
    fn at(&self, slot: u32, offset: usize) -> *mut u8 {
        assert!(
            slot < self.count && offset < self.slot_bytes,
            "byte {offset} of slot {slot}, of {} slots",
            self.count
        );
        let start = self.head_bytes + slot as usize * self.slot_bytes;
        // SAFETY: the mapping has `head_bytes + count * slot_bytes` bytes.
        unsafe { self.map.as_mut_ptr().add(start + offset) }
    }

    /// One `read` of at most `most` bytes into a slot that is nobody's; how many it gave.
    pub fn read_into(&self, slot: u32, from: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        // The page is ours before the kernel writes to it: one that it had to wait for could be refused to a
        // process that is being killed, and what it writes would be lost.
        self.half(slot, 0).store(0, Ordering::Relaxed);
        let most = most.min(self.slot_bytes);
        // SAFETY: `slot_bytes` from there on are ours and mapped, and no reference to them exists.
        let read = unsafe { libc::read(from.as_raw_fd(), self.at(slot, 0).cast(), most) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Eight bytes of a slot, at a multiple of 8.
    #[must_use]
    pub fn word(&self, slot: u32, offset: usize) -> &AtomicU64 {
        let place = self.at(slot, offset);
        assert!(offset.is_multiple_of(8), "a word that is not aligned");
        // SAFETY: mapped for as long as `self` lives, within its slot (slots are multiples of 8), aligned (head,
        // slots and offset are), and only ever accessed as an atomic or by the kernel.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }

    /// Four bytes of a slot, at a multiple of 4; not also accessed as a part of a word at the same time.
    #[must_use]
    pub fn half(&self, slot: u32, offset: usize) -> &AtomicU32 {
        let place = self.at(slot, offset);
        assert!(offset.is_multiple_of(4), "a half that is not aligned");
        // SAFETY: as for `word`, with multiples of 4.
        unsafe { AtomicU32::from_ptr(place.cast()) }
    }

    /// The first `length` bytes of a slot, at most all of it.
    #[must_use]
    pub fn copy(&self, slot: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length.min(self.slot_bytes)];
        // SAFETY: both are that long, and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(slot, 0), bytes.as_mut_ptr(), bytes.len());
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
        let read = |from: &File, most| slots.read_into(1, from.as_fd(), most).unwrap();
        assert_eq!(read(&source.reopen().unwrap(), 16), 16);
        assert_eq!(read(&source.reopen().unwrap(), 100), 64);
        // Another mapping of the same file sees it.
        let other = SharedSlots::map(&file, 8, 64, 3).unwrap();
        let first = |slot| other.half(slot, 0).load(Ordering::Acquire);
        assert_eq!(first(1), 0x0707_0707);
        assert_eq!(
            other.word(1, 56).load(Ordering::Relaxed),
            0x0707_0707_0707_0707
        );
        assert_eq!(other.copy(1, 1000), [7; 64]);
        assert_eq!((first(0), first(2)), (0, 0));
        slots.half(1, 0).store(0, Ordering::Release);
        assert_eq!(first(1), 0);
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
