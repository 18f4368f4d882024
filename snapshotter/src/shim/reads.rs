// SPDX-License-Identifier: Apache-2.0
//! Which chunks of a mount were read first: the raw material of boot lists.
//!
//! A recording begins with the first read after the mount, because a container's process may start
//! long after its mount is made, and ends a window later, or when it is full; a start that is reading on then,
//! because it has much to wait for, is recorded until it pauses, three windows at most. It takes note of every
//! chunk that somebody reads, present or not, once, in order; what is fetched without being read
//! never comes here. On the read path it costs a look at the clock and an atomic bit, and a lock only
//! where a chunk is touched for the first time; after its end, one load.
//!
//! A worker that takes a mount over has no recording of it: it does not know what its predecessor saw.
//!
//! **Locks** `log`, for a push or a copy of a page.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::device::OpenDevice;
use crate::mount::{FirstRead, FirstReads};

/// The most chunks of a recording: four times what a boot list may have, and half a megabyte.
const RECORDED_CHUNKS: usize = 64 * 1024;
/// The most reads in one answer: as numbers of at most 5, 3 and 5 bytes far below the limit of a message.
const PAGE_READS: usize = 16 * 1024;
/// A recording may take so many windows, while chunks are read that were not before.
const MOST_WINDOWS: u32 = 3;
/// A part of the window in which no further chunk is read: the start is over.
const PAUSE_PARTS: u32 = 10;
/// Bits of a word.
const WORD_BITS: u32 = 64;

/// The recording of one mount.
#[derive(Debug)]
pub struct ReadRecorder {
    window: Duration,
    open: AtomicBool,
    began: OnceLock<Instant>,
    /// When a chunk was read that was not before, in microseconds from the beginning.
    latest: AtomicU64,
    /// By device: which chunks were touched.
    touched: Vec<Box<[AtomicU64]>>,
    /// `None` when nobody wants it any more.
    log: Mutex<Option<Vec<FirstRead>>>,
}

impl ReadRecorder {
    /// A recording of a mount with these numbers of chunks per device.
    pub fn new(window: Duration, chunk_counts: impl Iterator<Item = u32>) -> ReadRecorder {
        let words = |count: u32| (0..count.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0));
        ReadRecorder {
            window,
            open: AtomicBool::new(true),
            began: OnceLock::new(),
            latest: AtomicU64::new(0),
            touched: chunk_counts.map(|count| words(count).collect()).collect(),
            log: Mutex::new(Some(Vec::new())),
        }
    }

    /// Whether it is over so long after it began.
    fn is_over(&self, after: Duration) -> bool {
        let latest = Duration::from_micros(self.latest.load(Ordering::Relaxed));
        after >= self.window
            && (after >= self.window * MOST_WINDOWS
                || after.saturating_sub(latest) >= self.window / PAUSE_PARTS)
    }

    fn log(&self) -> MutexGuard<'_, Option<Vec<FirstRead>>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a read of `length` bytes at `start` of device `number`.
    pub fn note(&self, number: usize, device: &OpenDevice, start: u64, length: usize) {
        if !self.open.load(Ordering::Relaxed) {
            return;
        }
        self.note_at(Instant::now(), number, device.chunks(start, length));
    }

    fn note_at(&self, now: Instant, number: usize, chunks: impl Iterator<Item = u32>) {
        let after = now.saturating_duration_since(*self.began.get_or_init(|| now));
        if self.is_over(after) {
            self.open.store(false, Ordering::Relaxed);
            return;
        }
        let (Some(touched), Ok(device)) = (self.touched.get(number), u16::try_from(number)) else {
            return;
        };
        for chunk in chunks {
            let mask = 1_u64 << (chunk % WORD_BITS);
            let word = usize::try_from(chunk / WORD_BITS).ok();
            let Some(word) = word.and_then(|at| touched.get(at)) else {
                return;
            };
            // Most reads find the bit: a load does not take the line from other threads.
            if word.load(Ordering::Relaxed) & mask != 0
                || word.fetch_or(mask, Ordering::Relaxed) & mask != 0
            {
                continue;
            }
            let micros = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
            self.latest.fetch_max(micros, Ordering::Relaxed);
            let mut log = self.log();
            let Some(log) = log.as_mut() else { return };
            if log.len() >= RECORDED_CHUNKS {
                self.open.store(false, Ordering::Relaxed);
                return;
            }
            log.push(FirstRead {
                device,
                chunk,
                after,
            });
        }
    }

    /// The reads from number `from` on, as many as fit into an answer, of a recording that its mount has
    /// yet to name. `forget`: nobody asks again.
    pub fn page(&self, from: u32, forget: bool) -> FirstReads {
        self.page_at(Instant::now(), from, forget)
    }

    fn page_at(&self, now: Instant, from: u32, forget: bool) -> FirstReads {
        let over = |began: &Instant| self.is_over(now.saturating_duration_since(*began));
        if self.began.get().is_some_and(over) {
            self.open.store(false, Ordering::Relaxed);
        }
        let mut log = self.log();
        if forget {
            self.open.store(false, Ordering::Relaxed);
            *log = None;
        }
        let Some(log) = log.as_ref() else {
            return FirstReads::default();
        };
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let rest = log.get(from..).unwrap_or_default();
        let page = &rest[..rest.len().min(PAGE_READS)];
        FirstReads {
            recorded: true,
            recording: String::new(),
            // A read that is being noted at this moment may be left out.
            complete: !self.open.load(Ordering::Relaxed) && page.len() == rest.len(),
            reads: page.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn chunks(page: &FirstReads) -> Vec<(u16, u32)> {
        page.reads
            .iter()
            .map(|read| (read.device, read.chunk))
            .collect()
    }

    #[test]
    fn each_chunk_counts_once_in_its_order_from_the_first_read_on() {
        let recorder = ReadRecorder::new(10 * SECOND, [100, 3].into_iter());
        let mounted = Instant::now();
        assert!(!recorder.page_at(mounted + 60 * SECOND, 0, false).complete);
        let began = mounted + 60 * SECOND;
        recorder.note_at(began, 1, 2..3);
        recorder.note_at(began + SECOND, 0, 98..100);
        recorder.note_at(began + 2 * SECOND, 0, 97..100);
        // Beyond what there is, which a tree that was validated does not name.
        recorder.note_at(began, 0, 128..129);
        recorder.note_at(began, 2, 0..1);
        recorder.note_at(began + 9 * SECOND, 1, 0..3);
        let page = recorder.page_at(began + 9 * SECOND, 0, false);
        assert_eq!(
            chunks(&page),
            [(1, 2), (0, 98), (0, 99), (0, 97), (1, 0), (1, 1)]
        );
        assert_eq!((page.recorded, page.complete), (true, false));
        assert_eq!(page.reads[1].after, SECOND);
        let rest = recorder.page_at(began + 9 * SECOND, 4, false);
        assert_eq!(chunks(&rest), [(1, 0), (1, 1)]);
        // After the window nothing is added.
        recorder.note_at(began + 10 * SECOND, 0, 0..1);
        let page = recorder.page_at(began + 10 * SECOND, 6, false);
        assert_eq!((page.reads.len(), page.complete), (0, true));
        assert!(recorder.page_at(began, 7, false).complete);
        assert!(!recorder.page_at(began, 0, true).recorded);
        assert_eq!(recorder.page_at(began, 0, false), FirstReads::default());
    }

    #[test]
    fn a_start_that_reads_on_is_recorded_until_it_pauses() {
        // When chunks are read, in tenths of a second; when the recording is over.
        let cases: [(&[u32], u32); 5] = [
            (&[0], 100),
            (&[0, 50], 100),
            (&[0, 95], 105),
            (&[0, 95, 104, 113, 122], 132),
            (&[0, 95, 104, 115], 114),
        ];
        let began = Instant::now();
        let at = |part: u32| began + SECOND * part / 10;
        for (reads, end) in cases {
            let recorder = ReadRecorder::new(10 * SECOND, [1000].into_iter());
            let (during, later) = reads.split_at(reads.partition_point(|read| *read < end));
            let note = |read: &u32| recorder.note_at(at(*read), 0, *read..read + 1);
            during.iter().for_each(note);
            let page = |part| recorder.page_at(at(part), 0, false);
            assert!(!page(end - 1).complete, "{reads:?}");
            assert!(page(end).complete, "{reads:?}");
            later.iter().for_each(note);
            assert_eq!(page(end).reads.len(), during.len());
        }
        // One that never pauses; chunks that were read before are no sign of a start.
        let recorder = ReadRecorder::new(10 * SECOND, [1000].into_iter());
        (0..500).for_each(|part| recorder.note_at(at(part), 0, part..part + 1));
        assert_eq!(recorder.page_at(at(500), 0, false).reads.len(), 300);
        let recorder = ReadRecorder::new(10 * SECOND, [1000].into_iter());
        (0..500).for_each(|part| recorder.note_at(at(part), 0, 0..1));
        assert_eq!(recorder.page_at(at(100), 0, false).reads.len(), 1);
        recorder.note_at(at(101), 0, 5..6);
        assert_eq!(recorder.page_at(at(101), 0, false).reads.len(), 1);
    }

    #[test]
    fn a_recording_is_bounded_and_comes_in_pages() {
        let recorder = ReadRecorder::new(SECOND, [200_000].into_iter());
        let began = Instant::now();
        recorder.note_at(began, 0, 0..200_000);
        let (mut from, mut pages) = (0, 0);
        loop {
            let page = recorder.page_at(began, from, false);
            from += u32::try_from(page.reads.len()).unwrap();
            pages += 1;
            if page.complete {
                break;
            }
        }
        assert_eq!((from, pages), (65_536, 4));
    }
}
