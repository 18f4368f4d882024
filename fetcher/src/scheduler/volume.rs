// SPDX-License-Identifier: Apache-2.0
//! How many bytes of boot lists are under way at once.
//!
//! A list is many small requests. Few of them beside each other leave the line idle for round trips; many that are large
//! share it, so what is read first comes late, and fill buffers in front of a reader who wants something else. So their
//! bytes are counted, not their number: some round trips of the line, which is measured meanwhile.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::pace::Pace;
use crate::store::lock;

/// What is under way on a line that nothing is known of, or that is slow or near.
const BYTES_MIN: u64 = 1 << 20;
/// The most that ever is.
const BYTES_MAX: u64 = 16 << 20;
/// One to wait for the first byte, one to receive, and one because requests are not of one size.
const ROUND_TRIPS: u64 = 3;

/// All requests of a list are made at once, on several threads: so long they come together, that the first of them goes
/// first.
const GATHERS: Duration = Duration::from_millis(2);

/// The bytes that are under way.
#[derive(Debug, Default)]
pub(crate) struct Volume(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// Those that wait, by their numbers.
    waiting: BTreeMap<u64, Arc<Notify>>,
    next: u64,
}

impl State {
    fn wake_first(&self) {
        if let Some((_, first)) = self.waiting.first_key_value() {
            first.notify_one();
        }
    }
}

/// One that waits for room; it does not any more once it is dropped.
struct Place<'a> {
    volume: &'a Volume,
    number: u64,
    woken: Arc<Notify>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.volume.0);
        state.waiting.remove(&self.number);
        state.wake_first();
    }
}

/// Room for a request; given back as its bytes come, and by being dropped.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    volume: &'a Volume,
    /// What has not come of it.
    bytes: AtomicU64,
}

impl Room<'_> {
    /// Takes note of bytes that came: they are under way no more. Were room given back at the end only, requests that
    /// share the line would end together, and the line would idle until the next are answered.
    pub(crate) fn received(&self, bytes: u64) {
        let left = self.bytes.load(Ordering::Relaxed);
        let came = bytes.min(left);
        self.bytes.store(left - came, Ordering::Relaxed);
        self.volume.give_back(came);
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.volume.give_back(*self.bytes.get_mut());
    }
}

impl Volume {
    /// A number for a request: lower ones go first.
    pub(crate) fn number(&self) -> u64 {
        let mut state = lock(&self.0);
        state.next += 1;
        state.next
    }

    /// Waits for room for a request of so many bytes; one that is larger than all room goes alone. A number is in
    /// use once at a time. Cancel-safe.
    pub(crate) async fn take(&self, number: u64, bytes: u64, pace: &Pace) -> Room<'_> {
        let place = Place {
            volume: self,
            number,
            woken: Arc::default(),
        };
        let woken = Arc::clone(&place.woken);
        lock(&self.0).waiting.insert(number, woken);
        tokio::time::sleep(GATHERS).await;
        loop {
            {
                let mut state = lock(&self.0);
                let first = state.waiting.keys().next() == Some(&number);
                let used = state.used.saturating_add(bytes);
                if first && (state.used == 0 || used <= room(pace.bytes_per_round_trip())) {
                    state.used = used;
                    break;
                }
            }
            place.woken.notified().await;
        }
        Room {
            volume: self,
            bytes: AtomicU64::new(bytes),
        }
    }

    fn give_back(&self, bytes: u64) {
        let mut state = lock(&self.0);
        state.used = state.used.saturating_sub(bytes);
        state.wake_first();
    }
}

fn room(round_trip: Option<u64>) -> u64 {
    let bytes = round_trip.map_or(0, |bytes| bytes.saturating_mul(ROUND_TRIPS));
    bytes.clamp(BYTES_MIN, BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::time::Instant;

    use super::*;
    use crate::scheduler::pace::Train;

    const KIB: u64 = 1 << 10;

    /// The next one takes its place.
    async fn next<'a>(volume: &'a Volume, kib: u64, pace: &Pace) -> Room<'a> {
        volume.take(volume.number(), kib * KIB, pace).await
    }

    async fn gathered() {
        tokio::time::sleep(2 * GATHERS).await;
    }

    fn used(volume: &Volume) -> u64 {
        lock(&volume.0).used
    }

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

    #[tokio::test(start_paused = true)]
    async fn requests_wait_for_room_in_the_order_of_their_numbers() {
        let (volume, pace) = (Volume::default(), Pace::default());
        let numbers = [(); 4].map(|()| volume.number());
        // The last comes first.
        let mut small = Box::pin(volume.take(numbers[3], KIB, &pace));
        assert!((&mut small).now_or_never().is_none());
        let mut large = Box::pin(volume.take(numbers[2], 800 * KIB, &pace));
        assert!((&mut large).now_or_never().is_none());
        let first = volume.take(numbers[0], 700 * KIB, &pace).await;
        let second = volume.take(numbers[1], 300 * KIB, &pace).await;
        gathered().await;
        // It would fit, and is not its turn.
        assert!((&mut large).now_or_never().is_none());
        assert!((&mut small).now_or_never().is_none());
        drop(second);
        assert!((&mut large).now_or_never().is_none());
        drop(first);
        let large = large.await;
        let small = small.await;
        drop((large, small));
        assert_eq!(used(&volume), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_makes_room_and_takes_none() {
        let (volume, pace) = (Volume::default(), Pace::default());
        // Larger than all room: alone.
        let huge = next(&volume, 2 * (BYTES_MAX >> 10), &pace).await;
        let mut gone = Box::pin(next(&volume, 1, &pace));
        assert!((&mut gone).now_or_never().is_none());
        let mut after = Box::pin(next(&volume, 1, &pace));
        assert!((&mut after).now_or_never().is_none());
        drop(gone);
        drop(huge);
        drop(after.await);
        assert_eq!(used(&volume), 0);
        assert!(lock(&volume.0).waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_come_makes_room() {
        let (volume, pace) = (Volume::default(), Pace::default());
        let first = next(&volume, 900, &pace).await;
        let mut second = Box::pin(next(&volume, 500, &pace));
        assert!((&mut second).now_or_never().is_none());
        gathered().await;
        first.received(300 * KIB);
        assert!((&mut second).now_or_never().is_none());
        first.received(100 * KIB);
        let second = (&mut second).now_or_never().unwrap();
        // More than was asked for, where a whole blob comes.
        first.received(BYTES_MAX);
        assert_eq!(used(&volume), 500 * KIB);
        drop((first, second));
        assert_eq!(used(&volume), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_turns_out_wide_has_room_for_more() {
        let (volume, pace) = (Volume::default(), Pace::default());
        let held = next(&volume, 1023, &pace).await;
        let second = next(&volume, 1, &pace).await;
        let mut more = Box::pin(next(&volume, 2048, &pace));
        assert!((&mut more).now_or_never().is_none());
        gathered().await;
        let now = Instant::now();
        (0..200).for_each(|ms| {
            let now = now + Duration::from_millis(ms);
            pace.arrived(&mut Train::default(), 125_000, now);
        });
        pace.answered(Duration::from_millis(20), now);
        drop(second);
        assert!((&mut more).now_or_never().is_some());
        drop(held);
    }
}
