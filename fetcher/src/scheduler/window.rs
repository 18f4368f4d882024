// SPDX-License-Identifier: Apache-2.0
//! How far to read ahead of a reader: pure.
//!
//! The fetcher only sees reads of what is missing, or still on its way; reads of present chunks go past
//! it. A read that continues where an earlier one was (within the part fetched for it) belongs to the
//! same *stream*. A stream's window starts at what a round trip is worth, because most first reads of an
//! image are single small files. It doubles, up to a cap, while each read begins where the one before or
//! the last window ended; a reader that skips gets windows in proportion to the distance that it has come:
//! a program that imports files near each other gets a little more than it reads, a long file the full line.
//! The next window is asked for when the reader enters the present one, not when it reaches its end:
//! so the line does not idle for a round trip between two windows.

use std::collections::VecDeque;

use sluice_blockindex::extent::{DeviceSpace, Extent};

/// Streams remembered per device: a few readers at once, and a short list to search.
const STREAMS: usize = 16;

/// The window of a reader that skips is this part of the distance that it has come. Windows that double
/// at each step made starts of Python programs fetch a third more, and no faster
/// (docs/decisions/005-read-ahead.md).
const DISTANCE_PER_WINDOW: u64 = 4;

/// A read that begins so few bytes later goes on where another ended: between two files stands a header.
const SKIP_BYTES: u64 = 4 << 10;

/// The windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WindowLimits {
    /// What is read ahead of a reader that nothing is known of.
    pub(crate) initial_bytes: u64,
    /// The most that is read ahead at once; 0 turns reading ahead off.
    pub(crate) max_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// First byte of the first read.
    origin: u64,
    /// The latest read.
    start: u64,
    read_end: u64,
    /// A read that ends beyond this calls for the next window.
    marker: u64,
    /// End of what was read ahead.
    end: u64,
    window: u64,
}

/// The streams of one device, the latest used last.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    limits: WindowLimits,
    device_bytes: u64,
    streams: VecDeque<Stream>,
}

impl ReadAhead {
    /// No streams yet.
    pub(crate) fn new(limits: WindowLimits, device_bytes: u64) -> Self {
        Self {
            limits,
            device_bytes,
            streams: VecDeque::new(),
        }
    }

    /// Takes note of a read that had to wait, and says what to read ahead now, if anything.
    pub(crate) fn on_read(&mut self, read: Extent<DeviceSpace>) -> Option<Extent<DeviceSpace>> {
        if self.limits.max_bytes == 0 || read.is_empty() {
            return None;
        }
        let near = |stream: &Stream| {
            (stream.start..=stream.end.saturating_add(stream.window)).contains(&read.start())
        };
        let known = self
            .streams
            .iter()
            .position(near)
            .and_then(|at| self.streams.remove(at));
        let (stream, ahead) = match known {
            None => {
                let window = self.limits.initial_bytes.min(self.limits.max_bytes);
                let end = self.clip(read.end().saturating_add(window));
                let stream = Stream {
                    origin: read.start(),
                    start: read.start(),
                    read_end: read.end(),
                    marker: read.end(),
                    end,
                    window,
                };
                (stream, Extent::new(read.end(), end))
            }
            Some(mut stream) if read.end() <= stream.marker => {
                stream.start = stream.start.max(read.start());
                stream.read_end = stream.read_end.max(read.end());
                (stream, None)
            }
            Some(stream) => {
                let next =
                    |end: u64| (end..=end.saturating_add(SKIP_BYTES)).contains(&read.start());
                let window = if next(stream.read_end) || next(stream.end) {
                    stream.window.saturating_mul(2)
                } else {
                    let come = read.start().saturating_sub(stream.origin);
                    (come / DISTANCE_PER_WINDOW).max(self.limits.initial_bytes.saturating_mul(2))
                };
                let window = window.min(self.limits.max_bytes);
                let from = stream.end.max(read.end());
                let end = self.clip(from.saturating_add(window));
                (
                    Stream {
                        origin: stream.origin,
                        start: read.start(),
                        read_end: read.end(),
                        marker: from,
                        end,
                        window,
                    },
                    Extent::new(from, end),
                )
            }
        };
        if self.streams.len() == STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(stream);
        ahead.filter(|ahead| !ahead.is_empty())
    }

    /// So much behind what was read ahead of each reader, the latest reader first.
    pub(crate) fn beyond(&self, bytes: u64) -> Vec<Extent<DeviceSpace>> {
        let streams = self.streams.iter().rev();
        let places = streams.filter_map(|stream| {
            let end = self.clip(stream.end.saturating_add(bytes));
            Extent::new(stream.end, end)
        });
        places.filter(|place| !place.is_empty()).collect()
    }

    fn clip(&self, end: u64) -> u64 {
        end.min(self.device_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(start: u64, end: u64) -> Extent<DeviceSpace> {
        Extent::new(start, end).unwrap()
    }

    fn windows(initial_bytes: u64, max_bytes: u64) -> ReadAhead {
        ReadAhead::new(
            WindowLimits {
                initial_bytes,
                max_bytes,
            },
            10_000,
        )
    }

    #[test]
    fn sequential_reads_double_the_window() {
        let mut ahead = windows(20, 100);
        let cases = [
            // A first read: the initial window.
            (device(0, 10), Some(device(10, 30))),
            // Into the window: the next one, twice as large, behind it.
            (device(10, 20), Some(device(30, 70))),
            // Still in the first window: nothing new.
            (device(20, 30), None),
            // Into the second.
            (device(30, 40), Some(device(70, 150))),
            // What came between was there already: from where the last window ended.
            (device(150, 160), Some(device(160, 260))),
        ];
        for (read, expected) in cases {
            assert_eq!(ahead.on_read(read), expected, "{read}");
        }
    }

    #[test]
    fn a_reader_that_skips_gets_windows_by_the_distance_come() {
        const KIB: u64 = 1 << 10;
        let limits = WindowLimits {
            initial_bytes: 20 * KIB,
            max_bytes: 100 * KIB,
        };
        let mut ahead = ReadAhead::new(limits, 10_000 * KIB);
        let cases = [
            ((0, 10), Some((10, 30))),
            // Twice the first window at least.
            ((25, 35), Some((35, 75))),
            ((60, 80), Some((80, 120))),
            // A quarter of the distance, once that is more.
            ((150, 160), Some((160, 200))),
            ((192, 204), Some((204, 252))),
            // As long as the reader stays near, up to the cap.
            ((280, 290), Some((290, 360))),
            ((420, 430), Some((430, 530))),
            ((600, 610), Some((610, 710))),
        ];
        for ((start, end), expected) in cases {
            let read = Extent::new(start * KIB, end * KIB).unwrap();
            let expected =
                expected.map(|(start, end)| Extent::new(start * KIB, end * KIB).unwrap());
            assert_eq!(ahead.on_read(read), expected, "{read}");
        }
    }

    #[test]
    fn far_reads_start_anew_and_streams_do_not_mix() {
        let mut ahead = windows(20, 100);
        assert_eq!(ahead.on_read(device(0, 10)), Some(device(10, 30)));
        assert_eq!(ahead.on_read(device(5000, 5010)), Some(device(5010, 5030)));
        assert_eq!(ahead.on_read(device(10, 20)), Some(device(30, 70)));
        assert_eq!(ahead.on_read(device(5010, 5020)), Some(device(5030, 5070)));
    }

    #[test]
    fn what_stands_behind_readers_begins_with_the_latest() {
        let mut ahead = windows(20, 100);
        assert_eq!(ahead.beyond(500), []);
        for read in [device(0, 10), device(9_700, 9_710), device(9_985, 10_000)] {
            ahead.on_read(read);
        }
        let expected = [device(9_730, 10_000), device(30, 530)];
        assert_eq!(ahead.beyond(500), expected);
        ahead.on_read(device(10, 20));
        assert_eq!(ahead.beyond(100)[0], device(70, 170));
    }

    #[test]
    fn the_device_ends_it_and_zero_turns_it_off() {
        assert_eq!(
            windows(20, 100).on_read(device(9_985, 9_990)),
            Some(device(9_990, 10_000))
        );
        assert_eq!(windows(20, 100).on_read(device(9_990, 10_000)), None);
        assert_eq!(windows(20, 0).on_read(device(0, 10)), None);
    }

    proptest! {
        /// Whatever is read: what is asked for lies behind the read, in the device, within the cap.
        #[test]
        fn windows_stay_within_their_bounds(reads in prop::collection::vec((0_u64..9_999, 1_u64..200), 1..200)) {
            let mut ahead = windows(64, 512);
            for (start, length) in reads {
                let read = device(start, (start + length).min(10_000));
                if let Some(window) = ahead.on_read(read) {
                    prop_assert!(window.start() >= read.end() && window.end() <= 10_000);
                    prop_assert!(window.len() <= 512);
                }
                prop_assert!(ahead.streams.len() <= STREAMS);
            }
        }
    }
}
