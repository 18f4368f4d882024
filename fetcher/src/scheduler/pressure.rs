// SPDX-License-Identifier: Apache-2.0
//! Whether processors are what the node is short of, for work that nobody waits for.
//!
//! The kernel counts how long tasks have waited for a processor ("some",
//! <https://docs.kernel.org/accounting/psi.html>). Where many containers start at once that is nearly always; one
//! start, with completion beside it, stays below.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::store::lock;

const FILE: &str = "/proc/pressure/cpu";
/// The part of a time in which somebody waited that counts as pressure.
const HIGH: f64 = 0.65;
/// The shortest time that is judged.
const WINDOW: Duration = Duration::from_millis(100);

/// How long somebody has waited for a processor since the node came up; `None` where the kernel does not say it.
pub(super) fn processors_waited() -> Option<Duration> {
    parse(&std::fs::read_to_string(FILE).ok()?)
}

fn parse(text: &str) -> Option<Duration> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let mut words = some.split_whitespace();
    let total = words.find_map(|word| word.strip_prefix("total="))?;
    Some(Duration::from_micros(total.parse().ok()?))
}

/// The pressure on processors.
///
/// **Locks** for a comparison; the kernel is asked before.
#[derive(Debug)]
pub(crate) struct Pressure {
    waited: fn() -> Option<Duration>,
    seen: Mutex<Seen>,
}

impl Pressure {
    /// Of a node of which `waited` says how long tasks have waited in all.
    pub(super) fn new(waited: fn() -> Option<Duration>) -> Self {
        Self {
            waited,
            seen: Mutex::default(),
        }
    }

    /// Whether others wait for processors most of the time.
    pub(crate) fn is_high(&self, now: Instant) -> bool {
        if let Some(high) = lock(&self.seen).judged(now) {
            return high;
        }
        let waited = (self.waited)();
        lock(&self.seen).note(now, waited)
    }
}

/// What was seen last.
#[derive(Debug, Default)]
struct Seen {
    at: Option<(Instant, Duration)>,
    high: bool,
}

impl Seen {
    /// What was found a moment ago.
    fn judged(&self, now: Instant) -> Option<bool> {
        let (at, _) = self.at?;
        (now.saturating_duration_since(at) < WINDOW).then_some(self.high)
    }

    fn note(&mut self, now: Instant, waited: Option<Duration>) -> bool {
        let before = std::mem::replace(&mut self.at, waited.map(|waited| (now, waited)));
        self.high = before.zip(waited).is_some_and(|((at, before), waited)| {
            let passed = now.saturating_duration_since(at);
            !passed.is_zero() && waited.saturating_sub(before) >= passed.mul_f64(HIGH)
        });
        self.high
    }
}

/// How long a work rests at once.
const REST: Duration = Duration::from_millis(50);
/// How many times as long as it takes otherwise it rests at most: it keeps a ninth of a processor.
const REST_PARTS: u32 = 8;

/// How much a long work has rested because of the pressure: it goes on all the same, as a node may be busy for days.
#[derive(Debug)]
pub(super) struct Courtesy {
    began: Instant,
    rested: Duration,
}

impl Courtesy {
    /// Of work that begins now.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            rested: Duration::ZERO,
        }
    }

    /// How long to rest now, before asking again; `None` to work on.
    pub(super) fn rest(&mut self, now: Instant, pressed: bool) -> Option<Duration> {
        let worked = now
            .saturating_duration_since(self.began)
            .saturating_sub(self.rested);
        if !pressed || self.rested > worked * REST_PARTS {
            return None;
        }
        self.rested += REST;
        Some(REST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says() {
        let said =
            "some avg10=6.05 avg60=11.98 avg300=10.97 total=1500000\nfull avg10=0.00 total=7\n";
        let cases = [
            (said, Some(1500)),
            ("full avg10=0.00 total=7\n", None),
            ("some avg10=0.00\n", None),
            ("some total=-1\n", None),
            ("", None),
        ];
        for (text, ms) in cases {
            assert_eq!(parse(text), ms.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn it_is_high_where_somebody_waits_most_of_the_time() {
        let began = Instant::now();
        let mut seen = Seen::default();
        assert_eq!(seen.judged(began), None);
        // Looks: milliseconds after the first, waited so far, and what is found.
        let looks = [
            (0, Some(5000), false),
            (100, Some(5064), false),
            (200, Some(5129), true),
            (300, Some(5300), true),
            (400, Some(5300), false),
            (500, None, false),
            // What was before is not known.
            (600, Some(9000), false),
            (700, Some(9099), true),
        ];
        for (ms, waited, high) in looks {
            let now = began + Duration::from_millis(ms);
            assert_eq!(
                seen.note(now, waited.map(Duration::from_millis)),
                high,
                "{ms}"
            );
            let found = waited.map(|_| high);
            assert_eq!(seen.judged(now + WINDOW / 2), found, "{ms}");
            assert_eq!(seen.judged(now + WINDOW), None, "{ms}");
        }
    }

    #[test]
    fn long_work_goes_on_slowly_however_long_others_wait() {
        let (mut now, mut rested, mut worked) = (Instant::now(), Duration::ZERO, Duration::ZERO);
        let mut courtesy = Courtesy::new(now);
        for _ in 0..1000 {
            let rest = courtesy.rest(now, true);
            let step = Duration::from_millis(3);
            match rest {
                Some(rest) => rested += rest,
                None => worked += step,
            }
            now += rest.unwrap_or(step);
        }
        let parts = rested.as_secs_f64() / worked.as_secs_f64();
        assert!((7.5..8.5).contains(&parts), "{rested:?} {worked:?}");
        assert_eq!(courtesy.rest(now + worked, false), None);
    }
}
