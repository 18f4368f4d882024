// SPDX-License-Identifier: Apache-2.0
//! How much of the line a prefetch takes, by who else is about: pure.
//!
//! What is under way cannot be taken back: a reader who asks shares the line with it, or waits behind it. While readers
//! ask one time after the other, background requests are small and come at intervals, so that a reader finds one of them at most
//! in front of his answer. How much of the line they take follows from what that costs him beside his round trip: a twentieth of
//! a line that is narrow or near, and up to half of one that carries much in a round trip. In the pauses of readers
//! as much is under way as the line carries in a round trip: the reader's own request takes as long.

use std::time::Duration;

use tokio::time::Instant;

use crate::scheduler::{FetcherOptions, Quiet, between};

/// The least and the most parts of the line, one of so many, that are taken while readers are busy.
const BUSY_PARTS: (u64, u64) = (2, 20);
/// A request may be this part of what the line carries in a round trip, while readers are busy.
const BUSY_PIECE_PARTS: u64 = 10;
/// By one of twice so many parts a reader's round trip may be longer: of the share of the line that requests take he
/// meets one, and half of it is still to come.
const DELAY_PARTS: u64 = 20;
/// What a line is taken for that nothing is known of: bytes per second.
const SLOW_LINE: u64 = 1_000_000;
/// Round trips that requests beside each other fill: enough for the line to be full always.
const ROUND_TRIPS: u64 = 4;
/// They fill it for so long at least: where the line is near and wide each would else bring little for what it costs.
const FILLED_MICROS: u64 = 10_000;

/// What a request may bring in a second for each processor while others wait for them: decoding, verifying and writing a
/// compressed byte costs about 10 ns, so this is a fortieth of each.
const PRESSED_RATE: u64 = 2_500_000;

/// Towards readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manners {
    /// One asks, or did a moment ago.
    Busy,
    /// One did a while ago.
    Shy,
    /// Nobody is about.
    Free,
}

impl Manners {
    /// By how long it has been quiet; `None` says that it is not.
    pub(super) fn of(options: &FetcherOptions, quiet: Option<Quiet>, now: Instant) -> Self {
        match quiet {
            None => Self::Busy,
            Some(Quiet::Always) => Self::Free,
            Some(Quiet::Since(since)) => match now.duration_since(since) {
                quiet if quiet < options.busy => Self::Busy,
                quiet if quiet < options.shy => Self::Shy,
                _ => Self::Free,
            },
        }
    }

    /// The most requests at once, where the line is known to carry so many bytes in a round trip.
    pub(super) fn requests(self, options: &FetcherOptions, round_trip: Option<u64>) -> usize {
        match self {
            // One after the other they begin, and end a round trip later.
            Self::Busy => options.other_requests.max(1),
            Self::Shy => {
                let round_trip = round_trip.unwrap_or(0);
                let known = Carries {
                    round_trip,
                    second: 0,
                };
                let piece = self.piece_bytes(options, known).max(1);
                let fit = usize::try_from(round_trip / piece);
                fit.unwrap_or(usize::MAX)
                    .min(options.prefetch_requests)
                    .max(1)
            }
            Self::Free => options.prefetch_requests.max(1),
        }
    }

    /// The most bytes of one request.
    pub(super) fn piece_bytes(self, options: &FetcherOptions, line: Carries) -> u64 {
        self.piece_of(options, line, options.prefetch_requests)
    }

    /// The same of a layer that takes one request after the other.
    pub(super) fn serial_piece_bytes(self, options: &FetcherOptions, line: Carries) -> u64 {
        self.piece_of(options, line, 1)
    }

    fn piece_of(self, options: &FetcherOptions, line: Carries, requests: usize) -> u64 {
        let (least, most) = (options.shy_request_bytes_min, options.shy_request_bytes);
        let shy = between(line.round_trip, least, most);
        match self {
            Self::Busy => between(line.round_trip / BUSY_PIECE_PARTS, least, most),
            Self::Shy => shy,
            Self::Free => {
                let requests = u64::try_from(requests).unwrap_or(1).max(1);
                let trips = line.round_trip.saturating_mul(ROUND_TRIPS);
                let filled = line.second.saturating_mul(FILLED_MICROS) / 1_000_000;
                between(trips.max(filled) / requests, shy, options.request_bytes)
            }
        }
    }
}

/// What the line is known to carry.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Carries {
    /// Bytes in a round trip; before that is known, those that have come so far.
    pub(super) round_trip: u64,
    /// Bytes in a second; 0 before that is known.
    pub(super) second: u64,
}

/// How long a request of so many bytes rests others while readers are busy, by what the line carries in a second and in
/// a round trip.
pub(super) fn rest_after(
    bytes: u64,
    bytes_per_second: Option<u64>,
    round_trip: Option<u64>,
) -> Duration {
    let rate = bytes_per_second.unwrap_or(SLOW_LINE).max(1);
    let parts = bytes.saturating_mul(DELAY_PARTS) / round_trip.unwrap_or(1).max(1);
    let parts = parts.clamp(BUSY_PARTS.0, BUSY_PARTS.1);
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate)
        .saturating_mul(u32::try_from(parts).unwrap_or(u32::MAX))
}

/// How long a request of so many bytes rests others while so many processors are what the node is short of.
pub(super) fn pressed_rest(bytes: u64, processors: usize) -> Duration {
    let processors = u64::try_from(processors).unwrap_or(1).max(1);
    let rate = PRESSED_RATE.saturating_mul(processors);
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_it_is_quiet_the_more_is_taken() {
        let (options, began) = (FetcherOptions::default(), Instant::now());
        let cases = [
            (None, Manners::Busy),
            (Some(0), Manners::Busy),
            (Some(99), Manners::Busy),
            (Some(100), Manners::Shy),
            (Some(999), Manners::Shy),
            (Some(1000), Manners::Free),
        ];
        for (quiet_ms, expected) in cases {
            let now = began + Duration::from_millis(quiet_ms.unwrap_or(0));
            let quiet = quiet_ms.map(|_| Quiet::Since(began));
            assert_eq!(Manners::of(&options, quiet, now), expected, "{quiet_ms:?}");
        }
        let always = Manners::of(&options, Some(Quiet::Always), began);
        assert_eq!(always, Manners::Free);
    }

    #[test]
    fn requests_are_of_what_the_line_carries_meanwhile() {
        let options = FetcherOptions::default();
        let (kib, mib) = (1_u64 << 10, 1_u64 << 20);
        // Bytes in a round trip; of a request while busy, shy, free; requests at once.
        let cases = [
            (None, [128 * kib, 128 * kib, 128 * kib], [6, 1, 4]),
            (Some(10_000), [128 * kib, 128 * kib, 128 * kib], [6, 1, 4]),
            (Some(250_000), [128 * kib, 250_000, 250_000], [6, 1, 4]),
            (Some(2_500_000), [250_000, mib, 2_500_000], [6, 2, 4]),
            (Some(100_000_000), [mib, mib, 4 * mib], [6, 4, 4]),
        ];
        for (round_trip, bytes, requests) in cases {
            let all = [Manners::Busy, Manners::Shy, Manners::Free];
            let known = Carries {
                round_trip: round_trip.unwrap_or(0),
                second: 0,
            };
            let pieces = all.map(|manners| manners.piece_bytes(&options, known));
            assert_eq!(pieces, bytes, "{round_trip:?}");
            let serial = all.map(|it| it.serial_piece_bytes(&options, known));
            let free = between(4 * known.round_trip, bytes[1], 4 * mib);
            assert_eq!(serial, [bytes[0], bytes[1], free], "{round_trip:?}");
            let most = all.map(|manners| manners.requests(&options, round_trip));
            assert_eq!(most, requests, "{round_trip:?}");
        }
        // 10 Gbit/s next door: what comes in a hundredth of a second, in requests beside each other.
        let near = Carries {
            round_trip: 300_000,
            second: 1_200_000_000,
        };
        let free = Manners::Free;
        assert_eq!(free.piece_bytes(&options, near), 3_000_000);
        assert_eq!(free.serial_piece_bytes(&options, near), 4 * mib);
        assert_eq!(Manners::Shy.piece_bytes(&options, near), 300_000);
    }

    #[test]
    fn processors_are_left_to_those_who_wait_for_them() {
        let cases = [
            (250_000, 2, 50),
            (250_000, 100, 1),
            (250_000, 0, 100),
            (0, 2, 0),
        ];
        for (bytes, processors, ms) in cases {
            let rest = pressed_rest(bytes, processors);
            assert_eq!(rest, Duration::from_millis(ms), "{bytes} {processors}");
        }
    }

    #[test]
    fn busy_readers_leave_what_costs_them_little() {
        // Bytes; of the line in a second and in a round trip; pause in milliseconds.
        let cases = [
            (125_000, Some(12_500_000), None, 200),
            // 10 ms: as if it were unknown.
            (125_000, Some(12_500_000), Some(125_000), 200),
            (125_000, Some(12_500_000), Some(250_000), 100),
            // 1 Gbit/s; 2, 20 and 100 ms.
            (125_000, Some(125_000_000), Some(250_000), 10),
            (125_000, Some(125_000_000), Some(2_500_000), 2),
            (250_000, Some(125_000_000), Some(2_500_000), 4),
            (125_000, Some(125_000_000), Some(12_500_000), 2),
            (500_000, Some(125_000_000), Some(2_500_000), 16),
            (100_000, None, None, 2000),
        ];
        for (bytes, second, round_trip, ms) in cases {
            let rest = rest_after(bytes, second, round_trip);
            assert_eq!(rest, Duration::from_millis(ms), "{bytes} {round_trip:?}");
        }
        assert!(rest_after(u64::MAX, Some(0), Some(0)) > Duration::from_secs(1));
    }
}
