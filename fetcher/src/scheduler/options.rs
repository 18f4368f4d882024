// SPDX-License-Identifier: Apache-2.0
//! How the scheduler behaves.

use std::time::Duration;

use super::plan::{Limits, between};
use super::pressure::processors_waited;

/// How the scheduler behaves. The defaults are meant for a registry 1 to 50 ms away.
#[derive(Clone, Debug)]
pub struct FetcherOptions {
    /// The most bytes between two missing chunks that are fetched with them to save a request: what a
    /// line of 100 Mbit/s carries in a round trip of 5 ms.
    pub gap_bytes: u64,
    /// The most compressed bytes of the first request of a fill; later ones run beside it.
    pub first_request_bytes: u64,
    /// The most compressed bytes of one request.
    pub request_bytes: u64,
    /// The same of a boot list on a wide or long line, see [`Self::boot_limits`].
    pub boot_gap_bytes: u64,
    /// The most compressed bytes of one request of a boot list on a wide or long line: what a reader who wants
    /// the last chunk of it may have to wait for. See docs/decisions/006-boot-lists.md.
    pub boot_request_bytes: u64,
    /// The most compressed bytes of a background request while readers are about: what a reader's
    /// request may have to share the line with. It is less on lines that carry less in a round trip.
    pub shy_request_bytes: u64,
    /// The least that such a request brings.
    pub shy_request_bytes_min: u64,
    /// Device bytes read ahead of a reader that nothing is known of: about 200 kB of a blob, what a line of
    /// 100 Mbit/s carries in a round trip of 20 ms. See docs/decisions/005-read-ahead.md.
    pub read_ahead_initial_bytes: u64,
    /// The most device bytes read ahead of a sequential reader at once; 0 turns reading ahead off.
    pub read_ahead_max_bytes: u64,
    /// A transfer on which no byte came for so long is given up, and another source asked.
    pub stall: Duration,
    /// A transfer on which no byte came for so long does not hold back those below it.
    pub lull: Duration,
    /// How often a transfer without any source looks for one.
    pub lookout: Duration,
    /// Requests of readers that run at once at one origin.
    pub foreground_requests: usize,
    /// Requests of boot lists, and for what is read ahead, that run at once at one origin. Fewer do where they are
    /// large (`volume`).
    pub boot_requests: usize,
    /// Background requests that run at once at one origin.
    pub other_requests: usize,
    /// Requests that one prefetch runs at once while no reader is about; one otherwise.
    pub prefetch_requests: usize,
    /// How long after a reader's last transfer a prefetch stays shy.
    pub shy: Duration,
    /// A reader who asked so short a time ago is about to ask again: a prefetch takes a twentieth of a
    /// line that carries little in a round trip, and half of one that carries much.
    pub busy: Duration,
    /// Chunks decoded and verified at once; 0 means as many as there are processors.
    pub decodes: usize,
    /// How long tasks of this node have waited for a processor, in all; `None` where nobody knows.
    pub processors_waited: fn() -> Option<Duration>,
}

impl Default for FetcherOptions {
    fn default() -> Self {
        Self {
            gap_bytes: 64 << 10,
            first_request_bytes: 1 << 20,
            request_bytes: 4 << 20,
            boot_gap_bytes: 256 << 10,
            boot_request_bytes: 2 << 20,
            shy_request_bytes: 1 << 20,
            shy_request_bytes_min: 128 << 10,
            read_ahead_initial_bytes: 512 << 10,
            read_ahead_max_bytes: 8 << 20,
            stall: Duration::from_secs(10),
            lull: Duration::from_millis(100),
            lookout: Duration::from_secs(1),
            foreground_requests: 32,
            boot_requests: 16,
            other_requests: 6,
            prefetch_requests: 4,
            shy: Duration::from_secs(1),
            busy: Duration::from_millis(100),
            decodes: 0,
            processors_waited,
        }
    }
}

impl FetcherOptions {
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            gap_bytes: self.gap_bytes,
            first_bytes: self.first_request_bytes,
            piece_bytes: self.request_bytes,
        }
    }

    /// How the requests of a boot list are cut, where the line is known to carry so many bytes in a round trip.
    /// They run beside each other, so that a request more costs its share of one.
    pub(crate) fn boot_limits(&self, round_trip: Option<u64>) -> Limits {
        let requests = u64::try_from(self.boot_requests).unwrap_or(1).max(1);
        let round_trip = round_trip.unwrap_or(BOOT_ROUND_TRIP_BYTES);
        let request_bytes = between(round_trip, BOOT_ROUND_TRIP_BYTES, self.boot_request_bytes);
        Limits {
            gap_bytes: between(
                round_trip / requests,
                BOOT_GAP_BYTES_MIN,
                self.boot_gap_bytes,
            ),
            first_bytes: request_bytes,
            piece_bytes: request_bytes,
        }
    }
}

/// What a line is taken to carry in a round trip before it is known: 200 Mbit/s, 20 ms.
const BOOT_ROUND_TRIP_BYTES: u64 = 512 << 10;
/// A gap of the size of a request's headers is never worth a request.
const BOOT_GAP_BYTES_MIN: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_boot_lists_grow_with_the_line() {
        const KIB: u64 = 1 << 10;
        let options = FetcherOptions::default();
        // What the line carries in a round trip; the gap and the request.
        let cases = [
            (None, 32 * KIB, 512 * KIB),
            (Some(0), 16 * KIB, 512 * KIB),
            (Some(250_000), 16 * KIB, 512 * KIB),
            (Some(1 << 20), 64 * KIB, 1 << 20),
            (Some(2_500_000), 156_250, 2 << 20),
            (Some(u64::MAX), 256 * KIB, 2 << 20),
        ];
        for (round_trip, gap_bytes, piece_bytes) in cases {
            let expected = Limits {
                gap_bytes,
                first_bytes: piece_bytes,
                piece_bytes,
            };
            assert_eq!(options.boot_limits(round_trip), expected, "{round_trip:?}");
        }
        // An operator's own bounds hold; a request has one chunk at least.
        let none = FetcherOptions {
            boot_requests: 0,
            boot_gap_bytes: 0,
            boot_request_bytes: 0,
            ..options
        };
        let limits = none.boot_limits(Some(1 << 20));
        assert_eq!((limits.gap_bytes, limits.piece_bytes), (0, 0));
    }
}
