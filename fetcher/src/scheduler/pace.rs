// SPDX-License-Identifier: Apache-2.0
//! What the line to the origins carries, and how far away they are: measured by what transfers receive.
//!
//! Both bound what is asked for while nobody knows whether it is wanted: as much as a line carries in one round trip
//! costs a reader next to nothing, because his own request takes that long in any case.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::store::lock;

/// The rate is that of a span of this length. What socket buffers kept of a body that was paused comes at once,
/// and is a small part of what a line carries in it.
const SPAN: Duration = Duration::from_millis(100);
/// How long an extreme is remembered at least; twice that at most.
const MEMORY: Duration = Duration::from_secs(10);
/// Requests under way at once share the line: the rate of what is less than this says nothing of it.
const SPAN_BYTES_MIN: u64 = 16 << 10;

/// What is known of the line. Nothing is, before the first answers.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    span: Option<Span>,
    bytes_per_second: Extreme<u64>,
    round_trip: Extreme<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    began: Instant,
    last: Instant,
    bytes: u64,
}

impl Pace {
    /// Takes note of bytes of a body that came.
    pub(crate) fn arrived(&self, bytes: u64, now: Instant) {
        let mut state = lock(&self.0);
        let fresh = Span {
            began: now,
            last: now,
            bytes: 0,
        };
        let idle = |span: &Span| now.duration_since(span.last) > SPAN;
        let Some(mut span) = state.span.filter(|span| !idle(span)) else {
            // Bytes that begin a span came before it.
            state.span = Some(fresh);
            return;
        };
        (span.last, span.bytes) = (now, span.bytes.saturating_add(bytes));
        let elapsed = now.duration_since(span.began);
        if elapsed < SPAN {
            state.span = Some(span);
            return;
        }
        if span.bytes >= SPAN_BYTES_MIN {
            let micros = u64::try_from(elapsed.as_micros())
                .unwrap_or(u64::MAX)
                .max(1);
            let rate = span.bytes.saturating_mul(1_000_000) / micros;
            state.bytes_per_second.note(rate, now, u64::max);
        }
        state.span = Some(fresh);
    }

    /// Takes note of an answer that began so long after it was asked for.
    pub(crate) fn answered(&self, after: Duration, now: Instant) {
        lock(&self.0).round_trip.note(after, now, Duration::min);
    }

    /// The most that came lately.
    pub(crate) fn bytes_per_second(&self) -> Option<u64> {
        lock(&self.0).bytes_per_second.value()
    }

    /// What the line carries in a round trip, once both are known.
    pub(crate) fn bytes_per_round_trip(&self) -> Option<u64> {
        let state = lock(&self.0);
        let (rate, round_trip) = (state.bytes_per_second.value()?, state.round_trip.value()?);
        let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
        Some(rate.saturating_mul(micros) / 1_000_000)
    }
}

/// The most extreme of the values of late.
#[derive(Debug, Default)]
struct Extreme<T> {
    began: Option<Instant>,
    present: Option<T>,
    before: Option<T>,
}

impl<T: Copy> Extreme<T> {
    fn note(&mut self, value: T, now: Instant, more_extreme: impl Fn(T, T) -> T) {
        if self
            .began
            .is_none_or(|began| now.duration_since(began) >= MEMORY)
        {
            (self.began, self.before) = (Some(now), self.present.take());
        }
        let present = self
            .present
            .map_or(value, |known| more_extreme(known, value));
        self.present = Some(present);
        self.before = self.before.map(|known| more_extreme(known, present));
    }

    fn value(&self) -> Option<T> {
        self.before.or(self.present)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Bytes that come each ms from `at` on.
    fn flow(pace: &Pace, at: Instant, ms: u32, bytes: u64) -> Instant {
        (0..ms).for_each(|past| pace.arrived(bytes, at + past * MS));
        at + ms * MS
    }

    #[test]
    fn nothing_is_known_before_the_first_span_ends() {
        let (pace, now) = (Pace::default(), Instant::now());
        assert_eq!(pace.bytes_per_second(), None);
        flow(&pace, now, 50, 12_500);
        assert_eq!(pace.bytes_per_second(), None);
        pace.answered(20 * MS, now);
        assert_eq!(pace.bytes_per_round_trip(), None);
    }

    #[test]
    fn the_line_and_the_distance_make_what_is_under_way() {
        let (pace, now) = (Pace::default(), Instant::now());
        let then = flow(&pace, now, 500, 12_500);
        for ms in [60, 20, 35] {
            pace.answered(ms * MS, then);
        }
        assert_eq!(pace.bytes_per_second(), Some(12_500_000));
        assert_eq!(pace.bytes_per_round_trip(), Some(250_000));
    }

    #[test]
    fn pauses_and_trickles_say_nothing_of_the_line() {
        let (pace, now) = (Pace::default(), Instant::now());
        let mut then = flow(&pace, now, 300, 1_000);
        for _ in 0..20 {
            then = flow(&pace, then + 200 * MS, 150, 1_000);
        }
        assert_eq!(pace.bytes_per_second(), Some(1_000_000));
        flow(&pace, then + 200 * MS, 300, 10);
        assert_eq!(pace.bytes_per_second(), Some(1_000_000));
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let (pace, mut now) = (Pace::default(), Instant::now());
        now = flow(&pace, now, 500, 10_000);
        pace.answered(5 * MS, now);
        for second in 0..40_u32 {
            now = flow(&pace, now, 1_000, 1_000);
            pace.answered(50 * MS, now);
            let known = (pace.bytes_per_second(), pace.bytes_per_round_trip());
            if second < 9 {
                assert_eq!(known, (Some(10_000_000), Some(50_000)), "{second}");
            }
        }
        assert_eq!(pace.bytes_per_second(), Some(1_000_000));
        assert_eq!(pace.bytes_per_round_trip(), Some(50_000));
    }
}
