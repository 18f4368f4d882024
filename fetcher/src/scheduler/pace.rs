// SPDX-License-Identifier: Apache-2.0
//! What the line to the origins carries, and how far away they are: measured by what transfers receive.
//!
//! Both bound what is asked for while nobody knows whether it is wanted: as much as a line carries in one round trip
//! costs a reader next to nothing, because his own request takes that long in any case.
//!
//! Two looks make the rate. What comes in a tenth of a second is a bound from below that nothing but the line can reach;
//! it is the rate where something fills the line for so long. Requests of readers never do: each is a round trip and a short
//! body. So the speed within bodies that come without a pause counts too (a *train*): the median of the last ones,
//! since what buffers held back for a moment comes faster than the line.

use std::collections::VecDeque;
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
/// Trains whose median is taken.
const TRAINS: usize = 15;
/// The shortest train that says something, and the longest that is looked at in one piece.
const TRAIN_BYTES: (u64, u64) = (48 << 10, 1 << 20);
/// A train is taken to last so long at least: what comes faster may have waited in a buffer. So the larger a body
/// the faster a line it can tell of: 128 KiB of 1 Gbit/s.
const TRAIN_TIME_MIN: Duration = Duration::from_millis(1);

/// What is known of the line. Nothing is, before the first answers.
#[derive(Debug, Default)]
pub(crate) struct Pace(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Bytes of all bodies.
    total: u64,
    span: Option<Span>,
    /// Bytes of all trains.
    carried: u64,
    /// What the last trains told, bytes per second.
    trains: VecDeque<u64>,
    /// The most that came in a span lately.
    filled: Extreme<u64>,
    round_trip: Extreme<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    began: Instant,
    last: Instant,
    bytes: u64,
}

/// A part of a body that comes without a pause.
#[derive(Debug, Default)]
pub(crate) struct Train(Option<Mark>);

#[derive(Clone, Copy, Debug)]
struct Mark {
    began: Instant,
    last: Instant,
    /// Bytes of this body since.
    own: u64,
    /// Bytes of all trains when it began.
    carried: u64,
}

impl Train {
    /// The body was not read for a while: what comes next waited.
    pub(crate) fn pause(&mut self) {
        self.0 = None;
    }
}

impl Pace {
    /// Takes note of bytes of a body that came.
    pub(crate) fn arrived(&self, train: &mut Train, bytes: u64, now: Instant) {
        let mut state = lock(&self.0);
        state.total = state.total.saturating_add(bytes);
        match &mut train.0 {
            // Bytes that begin a train came before it.
            None => {
                train.0 = Some(Mark {
                    began: now,
                    last: now,
                    own: 0,
                    carried: state.carried,
                });
            }
            Some(mark) => {
                state.carried = state.carried.wrapping_add(bytes);
                (mark.last, mark.own) = (now, mark.own.saturating_add(bytes));
                if mark.own >= TRAIN_BYTES.1 {
                    state.passed(*mark);
                    train.0 = Some(Mark {
                        began: now,
                        last: now,
                        own: 0,
                        carried: state.carried,
                    });
                }
            }
        }
        state.spanned(bytes, now);
    }

    /// Takes note that a body has come, as far as it was wanted.
    pub(crate) fn ended(&self, train: Train) {
        if let Some(mark) = train.0 {
            lock(&self.0).passed(mark);
        }
    }

    /// Takes note of an answer that began so long after it was asked for.
    pub(crate) fn answered(&self, after: Duration, now: Instant) {
        lock(&self.0).round_trip.note(after, now, Duration::min);
    }

    /// What has come in all: who knows nothing of a line does not ask it for more at once.
    pub(crate) fn total_bytes(&self) -> u64 {
        lock(&self.0).total
    }

    /// What the line carries.
    pub(crate) fn bytes_per_second(&self) -> Option<u64> {
        lock(&self.0).bytes_per_second()
    }

    /// What the line carries in a round trip, once both are known.
    pub(crate) fn bytes_per_round_trip(&self) -> Option<u64> {
        let state = lock(&self.0);
        let (rate, round_trip) = (state.bytes_per_second()?, state.round_trip.value()?);
        let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
        Some(rate.saturating_mul(micros) / 1_000_000)
    }
}

impl State {
    fn spanned(&mut self, bytes: u64, now: Instant) {
        let fresh = Span {
            began: now,
            last: now,
            bytes: 0,
        };
        let idle = |span: &Span| now.duration_since(span.last) > SPAN;
        let Some(mut span) = self.span.filter(|span| !idle(span)) else {
            // Bytes that begin a span came before it.
            self.span = Some(fresh);
            return;
        };
        (span.last, span.bytes) = (now, span.bytes.saturating_add(bytes));
        let elapsed = now.duration_since(span.began);
        if elapsed < SPAN {
            self.span = Some(span);
            return;
        }
        if span.bytes >= SPAN_BYTES_MIN {
            let rate = rate(span.bytes, elapsed);
            self.filled.note(rate, now, u64::max);
        }
        self.span = Some(fresh);
    }

    fn passed(&mut self, mark: Mark) {
        if mark.own < TRAIN_BYTES.0 {
            return;
        }
        // Bodies beside each other share the line.
        let bytes = self.carried.wrapping_sub(mark.carried);
        let took = mark.last.duration_since(mark.began).max(TRAIN_TIME_MIN);
        if self.trains.len() == TRAINS {
            self.trains.pop_front();
        }
        self.trains.push_back(rate(bytes, took));
    }

    fn bytes_per_second(&self) -> Option<u64> {
        let mut trains: Vec<u64> = self.trains.iter().copied().collect();
        let middle = trains.len() / 2;
        let median = (!trains.is_empty()).then(|| *trains.select_nth_unstable(middle).1);
        median.max(self.filled.value())
    }
}

/// Bytes per second.
fn rate(bytes: u64, took: Duration) -> u64 {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    bytes.saturating_mul(1_000_000) / micros
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
        // Each from a body of its own.
        (0..ms).for_each(|past| pace.arrived(&mut Train::default(), bytes, at + past * MS));
        at + ms * MS
    }

    /// Bodies whose parts come so many microseconds apart.
    fn bodies(pace: &Pace, bodies: &[&[(u64, u64)]]) -> Option<u64> {
        let mut now = Instant::now();
        for body in bodies {
            let mut train = Train::default();
            for (micros, bytes) in *body {
                now += Duration::from_micros(*micros);
                pace.arrived(&mut train, *bytes, now);
            }
            pace.ended(train);
            now += 20 * MS;
        }
        pace.bytes_per_second()
    }

    #[test]
    fn readers_tell_of_a_line_that_they_never_fill() {
        const KIB: u64 = 1 << 10;
        let steady: &[_] = &[(0, 16 * KIB), (2_000, 64 * KIB), (2_000, 64 * KIB)];
        let held: &[_] = &[(0, 16 * KIB), (2_000, 128 * KIB)];
        let burst: &[_] = &[(0, 16 * KIB), (10, 64 * KIB), (10, 64 * KIB)];
        let short: &[_] = &[(0, 64 * KIB), (1, 40 * KIB)];
        let whole: &[_] = &[(0, 500 * KIB)];
        // Bodies; MiB in a second.
        let cases: [(&[&[_]], Option<u64>); 6] = [
            (&[steady], Some(32_000 * KIB)),
            // Few that waited in a buffer say nothing beside others.
            (&[steady, held, steady, steady, held], Some(32_000 * KIB)),
            // All at once: it may have waited.
            (&[burst], Some(128_000 * KIB)),
            (&[short], None),
            (&[whole], None),
            (&[], None),
        ];
        for (at, (parts, expected)) in cases.into_iter().enumerate() {
            assert_eq!(bodies(&Pace::default(), parts), expected, "{at}");
        }
        // Few of late count.
        let pace = Pace::default();
        bodies(&pace, &[held; 40]);
        assert_eq!(bodies(&pace, &[steady; 8]), Some(32_000 * KIB));
    }

    #[test]
    fn bodies_beside_each_other_share_the_line_and_pauses_end_a_train() {
        let (pace, now) = (Pace::default(), Instant::now());
        let mut trains = [Train::default(), Train::default(), Train::default()];
        for part in 0..20_u32 {
            for (at, train) in trains.iter_mut().enumerate() {
                pace.arrived(train, 10_000, now + part * MS);
                if at == 2 {
                    train.pause();
                }
            }
        }
        let [one, two, paused] = trains;
        [one, two, paused].into_iter().for_each(|it| pace.ended(it));
        // What comes of the third may have waited.
        assert_eq!(pace.bytes_per_second(), Some(20_000_000));
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
