// SPDX-License-Identifier: Apache-2.0
//! Ranges whose readers have waited in vain, until just now: pure.
//!
//! The kernel reads ahead first, and when that fails it reads the page that is wanted once more: without this, its
//! reader would wait for two deadlines.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use sluice_fetcher::store::DeviceKey;

/// For how long such a range is not waited for again: the kernel comes back at once, others find the source as it is.
const MEMORY: Duration = Duration::from_millis(100);
/// How many are remembered.
const RANGES: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub struct GivenUp(VecDeque<(Instant, DeviceKey, Range<u64>)>);

impl GivenUp {
    /// A read of `range` failed at `now`; it counts if it had waited to its deadline.
    pub fn note(
        &mut self,
        key: DeviceKey,
        range: Range<u64>,
        deadline: Option<Instant>,
        now: Instant,
    ) {
        // The daemon's answer comes a little before the reader's own clock.
        if deadline.is_none_or(|deadline| deadline > now + MEMORY) {
            return;
        }
        if self.0.len() >= RANGES {
            self.0.pop_front();
        }
        self.0.push_back((now, key, range));
    }

    /// Whether all of `wanted` was waited for in vain just now.
    pub fn has(&mut self, key: DeviceKey, wanted: &Range<u64>, now: Instant) -> bool {
        let old = |at: Instant| now.saturating_duration_since(at) >= MEMORY;
        while self.0.front().is_some_and(|(at, ..)| old(*at)) {
            self.0.pop_front();
        }
        let within = |range: &Range<u64>| range.start <= wanted.start && wanted.end <= range.end;
        self.0
            .iter()
            .any(|(_, of, range)| *of == key && within(range))
    }
}

#[cfg(test)]
mod tests {
    use sluice_blockindex::digest::{DiffId, IndexDigest};

    use super::*;

    #[test]
    fn what_was_waited_for_in_vain_counts_for_a_moment() {
        let key = |index: &[u8]| DeviceKey {
            diff_id: DiffId::of(b"d"),
            index: IndexDigest::of(index),
        };
        let (ours, other) = (key(b"a"), key(b"b"));
        let start = Instant::now();
        let mut given_up = GivenUp::default();
        given_up.note(ours, 0..100, Some(start), start);
        // These failed before their time, or had no end to wait for.
        given_up.note(ours, 200..300, Some(start + Duration::from_secs(1)), start);
        given_up.note(ours, 400..500, None, start);
        let cases = [
            (ours, 0..100, 0, true),
            (ours, 96..100, 99, true),
            (ours, 96..101, 0, false),
            (other, 0..100, 0, false),
            (ours, 200..300, 0, false),
            (ours, 400..500, 0, false),
            (ours, 0..100, 100, false),
        ];
        for (key, wanted, ms, expected) in cases {
            let now = start + Duration::from_millis(ms);
            assert_eq!(given_up.has(key, &wanted, now), expected, "{wanted:?} {ms}");
        }
        for at in 0..1000 {
            given_up.note(ours, at..at + 1, Some(start), start);
        }
        assert_eq!(given_up.0.len(), RANGES);
    }
}
