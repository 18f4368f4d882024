// SPDX-License-Identifier: Apache-2.0
//! How many bytes of boot lists are under way at once.
//!
//! A list is many small requests. Few of them beside each other leave the line idle for round trips; many that are large
//! share it, so what is read first comes late, and fill buffers in front of a reader who wants something else. So their
//! bytes are counted, not their number: some round trips of the line, which is measured meanwhile.

use std::sync::Mutex;

use tokio::sync::{Notify, Semaphore};

use super::pace::Pace;
use crate::store::lock;

/// What is under way on a line that nothing is known of, or that is slow or near.
const BYTES_MIN: u64 = 1 << 20;
/// The most that ever is.
const BYTES_MAX: u64 = 16 << 20;
/// One to wait for the first byte, one to receive, and one because requests are not of one size.
const ROUND_TRIPS: u64 = 3;

/// The bytes that are under way.
#[derive(Debug)]
pub(crate) struct Volume {
    /// Whoever is first waits for room; the others wait for their turn, in the order of coming.
    turn: Semaphore,
    used: Mutex<u64>,
    freed: Notify,
}

/// Room for a request; given back by being dropped.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    volume: &'a Volume,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        {
            let mut used = lock(&self.volume.used);
            *used = used.saturating_sub(self.bytes);
        }
        self.volume.freed.notify_one();
    }
}

impl Volume {
    pub(crate) fn new() -> Self {
        Self {
            turn: Semaphore::new(1),
            used: Mutex::default(),
            freed: Notify::new(),
        }
    }

    /// Waits for room for a request of so many bytes; one that is larger than all room goes alone. Cancel-safe.
    pub(crate) async fn take(&self, bytes: u64, pace: &Pace) -> Room<'_> {
        // It is never closed.
        let _turn = self.turn.acquire().await;
        loop {
            // Before the look: nothing that is given back meanwhile is missed.
            let freed = self.freed.notified();
            {
                let mut used = lock(&self.used);
                if *used == 0 || used.saturating_add(bytes) <= room(pace.bytes_per_round_trip()) {
                    *used = used.saturating_add(bytes);
                    return Room {
                        volume: self,
                        bytes,
                    };
                }
            }
            freed.await;
        }
    }
}

fn room(round_trip: Option<u64>) -> u64 {
    let bytes = round_trip.map_or(0, |bytes| bytes.saturating_mul(ROUND_TRIPS));
    bytes.clamp(BYTES_MIN, BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt as _;
    use tokio::time::Instant;

    use super::*;

    const KIB: u64 = 1 << 10;

    #[test]
    fn room_grows_with_the_line() {
        let cases = [
            (None, BYTES_MIN),
            (Some(250_000), BYTES_MIN),
            (Some(2_500_000), 7_500_000),
            (Some(u64::MAX), BYTES_MAX),
        ];
        for (round_trip, expected) in cases {
            assert_eq!(room(round_trip), expected, "{round_trip:?}");
        }
    }

    #[tokio::test]
    async fn requests_wait_for_room_in_their_order() {
        let (volume, pace) = (Volume::new(), Pace::default());
        let first = volume.take(700 * KIB, &pace).await;
        let second = volume.take(300 * KIB, &pace).await;
        let mut large = Box::pin(volume.take(800 * KIB, &pace));
        assert!((&mut large).now_or_never().is_none());
        // It would fit, and is not its turn.
        let mut small = Box::pin(volume.take(KIB, &pace));
        assert!((&mut small).now_or_never().is_none());
        drop(second);
        assert!((&mut large).now_or_never().is_none());
        drop(first);
        let large = large.await;
        let small = small.await;
        drop((large, small));
        assert_eq!(*lock(&volume.used), 0);
    }

    #[tokio::test]
    async fn who_goes_away_makes_room_and_takes_none() {
        let (volume, pace) = (Volume::new(), Pace::default());
        // Larger than all room: alone.
        let huge = volume.take(BYTES_MAX * 2, &pace).await;
        let mut gone = Box::pin(volume.take(KIB, &pace));
        let mut next = Box::pin(volume.take(KIB, &pace));
        assert!((&mut gone).now_or_never().is_none());
        assert!((&mut next).now_or_never().is_none());
        drop(gone);
        drop(huge);
        drop(next.await);
        assert_eq!(*lock(&volume.used), 0);
    }

    #[tokio::test]
    async fn a_line_that_turns_out_wide_has_room_for_more() {
        let (volume, pace) = (Volume::new(), Pace::default());
        let held = volume.take(1023 * KIB, &pace).await;
        let second = volume.take(KIB, &pace).await;
        let mut more = Box::pin(volume.take(2048 * KIB, &pace));
        assert!((&mut more).now_or_never().is_none());
        let now = Instant::now();
        (0..200).for_each(|ms| pace.arrived(125_000, now + Duration::from_millis(ms)));
        pace.answered(Duration::from_millis(20), now);
        drop(second);
        assert!((&mut more).now_or_never().is_some());
        drop(held);
    }
}
