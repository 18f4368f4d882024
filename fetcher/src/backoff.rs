// SPDX-License-Identifier: Apache-2.0
//! How long something that failed is left alone. Pure.
//!
//! Each further failure doubles the pause, a success ends it. Requests that fail together are one failure:
//! what was begun before the latest one was counted tells nothing new. A pause that was asked for
//! (`Retry-After`) counts as far as it is bearable.

use std::time::Duration;

use tokio::time::Instant;

/// The longest pause that may be asked for: a mistaken or spiteful `Retry-After` must not outlast
/// readers' deadlines.
pub(crate) const LONGEST_ASKED_PAUSE: Duration = Duration::from_secs(60);

/// The failures of one thing, and when it may be tried again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    failures: u32,
    /// When a failure was last counted, or this began.
    counted: Instant,
    not_before: Option<Instant>,
}

impl Backoff {
    /// Without failures, from `now` on.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            failures: 0,
            counted: now,
            not_before: None,
        }
    }

    /// When it may be tried; `None` when it always might.
    pub(crate) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// Whether it failed since it last succeeded.
    pub(crate) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// It did what was asked of it.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
        self.not_before = None;
    }

    /// An attempt that was begun at `began` failed. The pause is `first`, doubled for each failure before,
    /// `longest` at most; at least what was `asked` for.
    pub(crate) fn failed(
        &mut self,
        first: Duration,
        longest: Duration,
        asked: Option<Duration>,
        began: Instant,
        now: Instant,
    ) {
        let mut pause = asked.unwrap_or_default().min(LONGEST_ASKED_PAUSE);
        if began >= self.counted {
            pause = pause.max(pause_after(first, longest, self.failures));
            self.failures = self.failures.saturating_add(1);
            self.counted = now;
        }
        if !pause.is_zero() {
            self.not_before = self.not_before.max(moment_after(now, pause));
        }
    }
}

/// The pause after one more of these failures.
pub(crate) fn pause_after(first: Duration, longest: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << failures.min(10)).min(longest)
}

/// `pause` from now; one that the clock cannot say is the longest that may be asked for.
pub(crate) fn moment_after(now: Instant, pause: Duration) -> Option<Instant> {
    now.checked_add(pause)
        .or_else(|| now.checked_add(LONGEST_ASKED_PAUSE))
}
