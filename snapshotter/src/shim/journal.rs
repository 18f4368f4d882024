// SPDX-License-Identifier: Apache-2.0
//! The requests of a mount that were read and not answered, in memory that outlives the worker.
//!
//! Kernels before 6.9 hand a request out once. There the worker reads each one straight into a slot of this
//! journal, a memfd that the holder keeps beside `/dev/fuse`; what a dead worker had read, its successor finds
//! there and answers under the same `unique`. Bytes (docs/formats/shim.md has the same table):
//!
//! ```text
//!  0  magic "SLUJOURN"   8  version u32, 1   12  slots u32   16  bytes of a slot u32   20  0 to 4096
//! 4096 the slots: each a request as the kernel wrote it, beginning with its length; length 0: free
//! ```
//!
//! A slot is free again when its answer has been written. A worker that dies between the two leaves an
//! answered request: it is answered once more, and the kernel, which does not know its `unique` any more, says
//! ENOENT, which means nothing.
//!
//! **Bounds** a worker that has [`SLOTS`] requests unanswered reads no more: the rest waits in the kernel.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys::slots::SharedSlots;

const MAGIC: &[u8; 8] = b"SLUJOURN";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 4096;
/// What the kernel wants to be offered at least (`FUSE_MIN_READ_BUFFER`), if no write is larger than a page.
const SLOT_BYTES: usize = 8192;
/// Far above what readers of one mount wait for at once. Memory is taken by those that were ever used, the
/// lowest first.
pub const SLOTS: u32 = 4096;

/// Bytes of a request's header (`struct fuse_in_header`).
const HEADER_BYTES: usize = 40;
/// Requests that have no answer.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_le_bytes(bytes))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?.try_into().ok()?;
    Some(u64::from_le_bytes(bytes))
}

/// The `unique` of an answer (`struct fuse_out_header`); `None` if it is shorter than its header.
#[must_use]
pub fn unique_of_answer(answer: &[u8]) -> Option<u64> {
    long(answer, 8)
}

/// The length of the request in a slot; 0 where there is none.
fn length_in(slots: &SharedSlots, slot: u32) -> u32 {
    slots.half(slot, 0).load(Ordering::Acquire)
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    slot: u32,
    /// As the kernel wrote it.
    pub bytes: Vec<u8>,
}

impl Request {
    fn unique(&self) -> Option<u64> {
        long(&self.bytes, 8)
    }

    /// Whether the kernel waits for an answer.
    fn is_answered(&self) -> bool {
        let opcode = word(&self.bytes, 4);
        opcode.is_some_and(|it| ![FORGET, INTERRUPT, BATCH_FORGET].contains(&it))
    }
}

/// A journal.
#[derive(Debug)]
pub struct Journal {
    memory: File,
    slots: SharedSlots,
    table: Mutex<Table>,
    freed: Condvar,
}

#[derive(Debug)]
struct Table {
    free: BTreeSet<u32>,
    /// Slots of requests that are being answered, by `unique`.
    held: HashMap<u64, u32>,
}

impl Journal {
    /// A new one, empty.
    pub fn create() -> io::Result<Journal> {
        let memory = File::from(memfd_create("sluice-journal", MFdFlags::MFD_CLOEXEC)?);
        let bytes = HEAD_BYTES + SLOTS as usize * SLOT_BYTES;
        memory.set_len(u64::try_from(bytes).map_err(io::Error::other)?)?;
        let slot_bytes = u32::try_from(SLOT_BYTES).map_err(io::Error::other)?;
        let mut head = MAGIC.to_vec();
        for word in [VERSION, SLOTS, slot_bytes] {
            head.extend_from_slice(&word.to_le_bytes());
        }
        memory.write_all_at(&head, 0)?;
        Journal::over(memory, SLOTS, SLOT_BYTES)
    }

    /// That of a dead worker.
    ///
    /// **Errors** `InvalidData`: it is none of ours.
    pub fn open(fd: OwnedFd) -> io::Result<Journal> {
        let memory = File::from(fd);
        let mut head = [0; 20];
        memory.read_exact_at(&mut head, 0)?;
        let number = |at| word(&head, at).unwrap_or(0);
        let slot_bytes = usize::try_from(number(16)).map_err(io::Error::other)?;
        if &head[..8] != MAGIC || number(8) != VERSION || slot_bytes < SLOT_BYTES {
            let what = "a journal of requests that we do not know";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Journal::over(memory, number(12), slot_bytes)
    }

    fn over(memory: File, count: u32, slot_bytes: usize) -> io::Result<Journal> {
        let slots = SharedSlots::map(&memory, HEAD_BYTES, slot_bytes, count)?;
        let free = (0..count).filter(|slot| length_in(&slots, *slot) == 0);
        let table = Table {
            free: free.collect(),
            held: HashMap::new(),
        };
        Ok(Journal {
            memory,
            slots,
            table: Mutex::new(table),
            freed: Condvar::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every critical section leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The requests that its last user had read and not answered; from now on they are held.
    #[must_use]
    pub fn unanswered(&self) -> Vec<Request> {
        let mut requests = Vec::new();
        for slot in 0..self.slots.count() {
            if length_in(&self.slots, slot) == 0 {
                continue;
            }
            match self.request(slot) {
                Some(request) => requests.push(request),
                None => self.free(slot),
            }
        }
        requests
    }

    /// Reads the next request of the kernel, and holds it until it is answered. **Blocks**: while there is none,
    /// and while no slot is free. `None`: one that has no answer, and needs none of us.
    ///
    /// **Errors** those of the read.
    pub fn read_from(&self, fuse: BorrowedFd<'_>) -> io::Result<Option<Request>> {
        let slot = {
            let mut table = self.table();
            loop {
                match table.free.pop_first() {
                    Some(slot) => break slot,
                    None => {
                        let woken = self.freed.wait(table);
                        table = woken.unwrap_or_else(PoisonError::into_inner);
                    }
                }
            }
        };
        let read = self.slots.read_into(slot, fuse, usize::MAX);
        let request = match read {
            Ok(_) => self.request(slot),
            Err(_) => None,
        };
        if request.is_none() {
            self.free(slot);
        }
        read.map(|_| request)
    }

    /// The request in a slot, which is held from now on; `None` if it has no answer.
    fn request(&self, slot: u32) -> Option<Request> {
        let length = usize::try_from(length_in(&self.slots, slot)).ok()?;
        let bytes = self.slots.copy(slot, length);
        let request = Request { slot, bytes };
        let whole = request.bytes.len() == length && length >= HEADER_BYTES;
        let unique = request
            .unique()
            .filter(|_| whole && request.is_answered())?;
        self.table().held.insert(unique, slot);
        Some(request)
    }

    fn free(&self, slot: u32) {
        self.slots.half(slot, 0).store(0, Ordering::Release);
        self.table().free.insert(slot);
        self.freed.notify_one();
    }

    /// Whether a request with this `unique` is held.
    #[must_use]
    pub fn holds(&self, unique: u64) -> bool {
        self.table().held.contains_key(&unique)
    }

    /// A request was answered: its slot is free. Fine when none is held.
    pub fn answered(&self, unique: u64) {
        let slot = self.table().held.remove(&unique);
        if let Some(slot) = slot {
            self.free(slot);
        }
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::sys::fdpass::PacketSocket;

    fn request(unique: u64, opcode: u32, extra: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; HEADER_BYTES + extra];
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        bytes
    }

    fn reopen(journal: &Journal) -> Journal {
        Journal::open(journal.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn what_was_read_and_not_answered_is_found_by_the_next() {
        let (kernel, fuse) = PacketSocket::pair().unwrap();
        let journal = Journal::create().unwrap();
        let sent = [
            request(2, 15, 40),
            request(4, FORGET, 8),
            request(6, 1, 10),
            request(8, INTERRUPT, 8),
        ];
        let mut read = Vec::new();
        for bytes in &sent {
            kernel.send(bytes, &[]).unwrap();
            read.extend(journal.read_from(fuse.as_fd()).unwrap());
        }
        let of = |requests: &[Request]| -> Vec<Vec<u8>> {
            requests.iter().map(|it| it.bytes.clone()).collect()
        };
        assert_eq!(of(&read), [sent[0].clone(), sent[2].clone()]);
        // The worker dies.
        let next = reopen(&journal);
        assert!(!next.holds(2));
        let found = next.unanswered();
        assert_eq!(of(&found), of(&read));
        assert!(next.holds(2) && next.holds(6) && !next.holds(4));
        next.answered(2);
        next.answered(2);
        next.answered(99);
        assert_eq!(of(&reopen(&next).unanswered()), [sent[2].clone()]);
    }

    #[test]
    fn slots_are_used_again_and_a_full_journal_reads_no_more() {
        let (kernel, fuse) = PacketSocket::pair().unwrap();
        let journal = Journal::create().unwrap();
        let read = |unique| {
            kernel.send(&request(unique, 15, 40), &[]).unwrap();
            journal.read_from(fuse.as_fd()).unwrap().unwrap().slot
        };
        assert_eq!(read(1), 0);
        journal.answered(1);
        let all: BTreeSet<u32> = (0..u64::from(SLOTS)).map(read).collect();
        assert_eq!(all.len(), SLOTS as usize);
        kernel.send(&request(1 << 40, 15, 40), &[]).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| journal.read_from(fuse.as_fd()).unwrap().unwrap().slot);
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!waiting.is_finished());
            journal.answered(7);
            assert_eq!(waiting.join().unwrap(), 7);
        });
    }

    #[test]
    fn what_is_damaged_is_refused_or_dropped() {
        let journal = Journal::create().unwrap();
        // A length beyond the slot, one below a header.
        for (slot, length) in [(3u64, u32::MAX), (5, 7)] {
            let at = HEAD_BYTES as u64 + slot * SLOT_BYTES as u64;
            journal
                .memory
                .write_all_at(&length.to_le_bytes(), at)
                .unwrap();
        }
        let next = reopen(&journal);
        assert_eq!(next.unanswered(), []);
        assert_eq!(next.table().free.len(), SLOTS as usize);
        for (at, bytes) in [
            (0, &b"X"[..]),
            (8, &[2]),
            (16, &[0, 1]),
            (12, &[255, 255, 255]),
        ] {
            let journal = Journal::create().unwrap();
            journal.memory.write_all_at(bytes, at).unwrap();
            let fd = journal.as_fd().try_clone_to_owned().unwrap();
            assert!(Journal::open(fd).is_err(), "{at}");
        }
        let mut short = tempfile::tempfile().unwrap();
        short.write_all(b"SLUJOURN").unwrap();
        assert!(Journal::open(short.into()).is_err());
    }
}
