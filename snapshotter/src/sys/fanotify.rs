// SPDX-License-Identifier: Apache-2.0
//! Pre-content events of fanotify: the kernel asks before somebody reads a range of a marked file.
//!
//! Who reads waits until the event is answered by the NUMBER of the descriptor that came with it. The
//! events are read straight into shared memory ([`EventSlots`]), so that they outlive who reads them.
//!
//! **Source** fanotify_init(2), fanotify_mark(2), fanotify(7); fs/notify/fanotify/. Whether a file
//! description has events is decided when it is opened: one that was opened before the file was marked
//! has none, ever; one that was opened while it was marked has them whenever there is a mark.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::slots::SharedSlots;

/// An event before a read or write of a range. **Source** include/uapi/linux/fanotify.h.
const FAN_PRE_ACCESS: u64 = 0x0010_0000;
/// Type of the information record that names the range.
const INFO_RANGE: u8 = 6;
/// Bytes of the event's head, and of the head with the range behind it.
const HEAD_BYTES: u16 = 24;
const EVENT_BYTES: usize = 48;

/// Bytes of a slot: an event, and what we add.
const SLOT_BYTES: usize = 64;
/// What the kernel may write of a slot. Room for one event and not for two.
const READ_BYTES: usize = 56;
const AT_MASK: usize = 8;
const AT_FD: usize = 16;
const AT_PID: usize = 20;
const AT_RANGE: usize = 24;
const AT_OFFSET: usize = 32;
const AT_COUNT: usize = 40;
/// Ours: the number of the device, plus one; zero while it is not known.
const AT_DEVICE: usize = 56;

/// First bytes of the shared memory, in the place of a slot.
const MAGIC: u64 = u64::from_le_bytes(*b"SLUSLOTS");
const VERSION: u32 = 1;
const AT_VERSION: usize = 8;
const AT_SLOTS: usize = 12;
/// More than a reader of such memory would ever be given.
const MOST_SLOTS: u32 = 1 << 16;

const _: () = assert!(cfg!(target_endian = "little") && READ_BYTES < 2 * EVENT_BYTES);

/// What a reader is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Read on.
    Allow,
    /// Fail with this error: the kernel takes EPERM, EIO, EBUSY, ETXTBSY, EAGAIN, ENOSPC and EDQUOT.
    Deny(i32),
}

/// A group for pre-content events, close-on-exec, reads of it do not wait.
///
/// Without a limit of its queue: an event that finds a queue full is not asked about, and its reader
/// would see a hole as zeros. What waits is bounded by the processes that read.
pub fn group() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_PRE_CONTENT
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_UNLIMITED_MARKS;
    let of_events = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE;
    // SAFETY: takes two integers.
    let fd = unsafe { libc::fanotify_init(flags, of_events.cast_unsigned()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just installed this number for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has the group asked before the file is read; again is fine.
pub fn mark(group: BorrowedFd<'_>, file: &File) -> io::Result<()> {
    change_mark(group, file, libc::FAN_MARK_ADD)
}

/// Takes the mark away; fine when there is none. Who waits goes on waiting for the answer.
pub fn unmark(group: BorrowedFd<'_>, file: &File) -> io::Result<()> {
    match change_mark(group, file, libc::FAN_MARK_REMOVE) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    }
}

fn change_mark(group: BorrowedFd<'_>, file: &File, change: u32) -> io::Result<()> {
    // SAFETY: both numbers are open and borrowed for the call; no path means the file itself.
    let done = unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            change,
            FAN_PRE_ACCESS,
            file.as_raw_fd(),
            std::ptr::null(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Answers the event that came with the descriptor of this number.
///
/// **Errors** `ENOENT` when nobody waits for it.
pub fn answer(group: BorrowedFd<'_>, number: RawFd, answer: Answer) -> io::Result<()> {
    let response = match answer {
        Answer::Allow => libc::FAN_ALLOW,
        Answer::Deny(errno) => libc::FAN_DENY | (errno.cast_unsigned() & 0xff) << 24,
    };
    let mut bytes = [0u8; 8];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[4..].copy_from_slice(&response.to_le_bytes());
    nix::unistd::write(group, &bytes)?;
    Ok(())
}

/// An event as it stands in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Whether it is asked before a range is read; else it is nothing that we know.
    pub asks: bool,
    /// Number of the descriptor that it came with, by which it is answered.
    pub number: RawFd,
    /// Who waits.
    pub pid: i32,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub length: u64,
    /// The device, when it has been noted.
    pub device: Option<u16>,
}

/// Events in shared memory: those that were read and not answered.
#[derive(Debug)]
pub struct EventSlots {
    file: File,
    slots: SharedSlots,
    count: u32,
}

impl EventSlots {
    /// New memory for so many events.
    pub fn create(count: u32) -> io::Result<EventSlots> {
        let file = File::from(memfd_create("sluice-events", MFdFlags::MFD_CLOEXEC)?);
        let bytes = SLOT_BYTES as u64 * (u64::from(count) + 1);
        file.set_len(bytes)?;
        let slots = EventSlots::map(file, count)?;
        slots.half(0, AT_VERSION).store(VERSION, Ordering::Relaxed);
        slots.half(0, AT_SLOTS).store(count, Ordering::Relaxed);
        slots.word(0, 0).store(MAGIC, Ordering::Release);
        Ok(slots)
    }

    /// Takes over memory that somebody else has made.
    ///
    /// **Errors** `InvalidData`: it is none, or of another version.
    pub fn open(fd: OwnedFd) -> io::Result<EventSlots> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let file = File::from(fd);
        let length = file.metadata()?.len();
        let count = (length / SLOT_BYTES as u64).checked_sub(1);
        let count = count.and_then(|count| u32::try_from(count).ok());
        let count = count.filter(|count| *count <= MOST_SLOTS);
        let count = count.ok_or(invalid("event slots: wrong size"))?;
        let slots = EventSlots::map(file, count)?;
        if slots.word(0, 0).load(Ordering::Acquire) != MAGIC
            || slots.half(0, AT_VERSION).load(Ordering::Relaxed) != VERSION
            || slots.half(0, AT_SLOTS).load(Ordering::Relaxed) != count
        {
            return Err(invalid("event slots: wrong head"));
        }
        Ok(slots)
    }

    fn map(file: File, count: u32) -> io::Result<EventSlots> {
        let slots = SharedSlots::map(&file, 0, SLOT_BYTES, count + 1)?;
        if let Err(error) = slots.lock_in_memory() {
            tracing::debug!(%error, "lock event slots into memory");
        }
        Ok(EventSlots { file, slots, count })
    }

    /// How many events it holds.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Eight bytes of a slot; slot 0 is the head. Slots of callers are counted from 0, one less.
    fn word(&self, slot: u32, offset: usize) -> &AtomicU64 {
        self.slots.word(slot, offset)
    }

    fn half(&self, slot: u32, offset: usize) -> &AtomicU32 {
        self.slots.half(slot, offset)
    }

    /// Reads the next event into a slot that is free; false when there is none. The descriptor that
    /// came with it is [`EventSlots::take`]n next.
    pub fn receive(&self, group: BorrowedFd<'_>, slot: u32) -> io::Result<bool> {
        match self.slots.read_into(slot + 1, group, READ_BYTES) {
            Ok(read) => Ok(read > 0),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// What stands in a slot; `None` when it is free.
    pub fn event(&self, slot: u32) -> Option<Event> {
        let slot = slot + 1;
        if self.half(slot, 0).load(Ordering::Acquire) == 0 {
            return None;
        }
        let word = |offset| self.word(slot, offset).load(Ordering::Relaxed);
        let half = |offset| self.half(slot, offset).load(Ordering::Relaxed);
        let [kind, ..] = half(AT_RANGE).to_le_bytes();
        let [_, _, head @ ..] = half(4).to_le_bytes();
        let plain = u16::from_le_bytes(head) == HEAD_BYTES && kind == INFO_RANGE;
        Some(Event {
            asks: plain && word(AT_MASK) & FAN_PRE_ACCESS != 0,
            number: half(AT_FD).cast_signed(),
            pid: half(AT_PID).cast_signed(),
            offset: word(AT_OFFSET),
            length: word(AT_COUNT),
            device: half(AT_DEVICE)
                .checked_sub(1)
                .and_then(|it| u16::try_from(it).ok()),
        })
    }

    /// The descriptor of an event that this process has just received; `None` for one without.
    pub fn take(&self, slot: u32) -> Option<OwnedFd> {
        let number = self.event(slot)?.number;
        // SAFETY: the kernel has installed this number for us with the event in the slot, and callers
        // take it once, before anything else can.
        (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Notes which device an event is about, for who may come after us.
    pub fn note_device(&self, slot: u32, device: u16) {
        let place = self.half(slot + 1, AT_DEVICE);
        place.store(u32::from(device) + 1, Ordering::Release);
    }

    /// Makes a slot free. Not before its event was answered, and before its descriptor is closed: the
    /// number of a closed one may belong to the next event.
    pub fn clear(&self, slot: u32) {
        self.half(slot + 1, AT_DEVICE).store(0, Ordering::Relaxed);
        self.half(slot + 1, 0).store(0, Ordering::Release);
    }

    /// The numbers of all descriptors by which events here are to be answered.
    pub fn numbers(&self) -> Vec<RawFd> {
        let events = (0..self.count).filter_map(|slot| self.event(slot));
        events
            .map(|event| event.number)
            .filter(|it| *it >= 0)
            .collect()
    }
}

impl AsFd for EventSlots {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens something at a number that is free, so that nothing else gets that number; `None` when it is
/// taken already.
pub fn occupy(number: RawFd) -> io::Result<Option<OwnedFd>> {
    // SAFETY: asks for the flags of a number, open or not.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0 {
        return Ok(None);
    }
    let null = File::open("/dev/null")?;
    if null.as_raw_fd() == number {
        return Ok(Some(null.into()));
    }
    // SAFETY: the number is free; before other threads run nobody else takes it.
    let done = unsafe { libc::dup3(null.as_raw_fd(), number, libc::O_CLOEXEC) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: installed just now, for us.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(done) }))
}

/// Moves a descriptor to a number of at least `lowest`, out of the way of those that events need.
pub fn move_up(fd: OwnedFd, lowest: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: duplicates an open descriptor.
    let moved = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) };
    if moved < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: installed just now, for us.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    /// Writes an event as the kernel does.
    fn write_event(slots: &EventSlots, slot: u32, number: i32, pid: i32, range: (u64, u64)) {
        let mut bytes = [0u8; EVENT_BYTES];
        bytes[..4].copy_from_slice(&48u32.to_le_bytes());
        bytes[4] = 3;
        bytes[6..8].copy_from_slice(&HEAD_BYTES.to_le_bytes());
        bytes[8..16].copy_from_slice(&FAN_PRE_ACCESS.to_le_bytes());
        bytes[16..20].copy_from_slice(&number.to_le_bytes());
        bytes[20..24].copy_from_slice(&pid.to_le_bytes());
        bytes[24] = INFO_RANGE;
        bytes[26] = 24;
        bytes[32..40].copy_from_slice(&range.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&range.1.to_le_bytes());
        let at = SLOT_BYTES as u64 * (u64::from(slot) + 1);
        slots.file.write_all_at(&bytes, at).unwrap();
    }

    #[test]
    fn events_outlive_who_read_them() {
        let slots = EventSlots::create(4).unwrap();
        assert_eq!((slots.event(0), slots.numbers()), (None, vec![]));
        write_event(&slots, 2, 77, 1234, (4096, 8192));
        slots.note_device(2, 5);
        write_event(&slots, 3, 78, 1, (0, 1));
        let kept = slots.as_fd().try_clone_to_owned().unwrap();
        drop(slots);
        let slots = EventSlots::open(kept).unwrap();
        let expected = Event {
            asks: true,
            number: 77,
            pid: 1234,
            offset: 4096,
            length: 8192,
            device: Some(5),
        };
        assert_eq!((slots.count(), slots.event(2)), (4, Some(expected)));
        assert_eq!(slots.event(3).unwrap().device, None);
        assert_eq!(slots.numbers(), [77, 78]);
        slots.clear(2);
        assert_eq!((slots.event(2), slots.numbers()), (None, vec![78]));
    }

    #[test]
    fn other_memory_is_refused() {
        let slots = EventSlots::create(2).unwrap();
        for (at, bytes) in [(0u64, &[0xff][..]), (8, &[9]), (12, &[3])] {
            let copy = File::from(memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap());
            let mut whole = vec![0; 3 * SLOT_BYTES];
            slots.file.read_exact_at(&mut whole, 0).unwrap();
            copy.write_all_at(&whole, 0).unwrap();
            assert!(EventSlots::open(copy.try_clone().unwrap().into()).is_ok());
            copy.write_all_at(bytes, at).unwrap();
            assert!(EventSlots::open(copy.into()).is_err());
        }
        let empty = File::from(memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap());
        assert!(EventSlots::open(empty.into()).is_err());
    }

    #[test]
    fn numbers_are_kept_free_for_events() {
        let file = File::open("/dev/null").unwrap();
        let moved = move_up(file.into(), 500).unwrap();
        assert!(moved.as_raw_fd() >= 500);
        let number = 499;
        let placed = occupy(number).unwrap().unwrap();
        assert_eq!(placed.as_raw_fd(), number);
        assert!(occupy(number).unwrap().is_none());
        drop(placed);
        assert!(occupy(number).unwrap().is_some());
    }
}
