// SPDX-License-Identifier: Apache-2.0
//! Which reads wait for missing data: a pure register.
//!
//! A read that misses enters with a deadline and leaves exactly once: answered, or expired. Which
//! requests the daemon has seen is not kept: after a new connection all that wait are asked for
//! again, and the daemon lets equal requests share one fetch.
//!
//! Its length is bounded by the kernel: each waiting read holds a request of a process that waits, or
//! of readahead within the connection's limit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// Reads that wait; `W` is what a read needs to be answered.
#[derive(Debug)]
pub struct Fills<W> {
    next_id: u64,
    waiting: BTreeMap<u64, (W, Option<Instant>)>,
    deadlines: BTreeSet<(Instant, u64)>,
}

impl<W> Default for Fills<W> {
    fn default() -> Fills<W> {
        Fills {
            next_id: 1,
            waiting: BTreeMap::new(),
            deadlines: BTreeSet::new(),
        }
    }
}

impl<W> Fills<W> {
    /// A read begins to wait; gives its id, which no other ever has.
    pub fn enter(&mut self, waiter: W, deadline: Option<Instant>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.insert(id, (waiter, deadline));
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, id));
        }
        id
    }

    /// Takes out the read that was answered; `None` when it had expired.
    pub fn answered(&mut self, id: u64) -> Option<W> {
        let (waiter, deadline) = self.waiting.remove(&id)?;
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, id));
        }
        Some(waiter)
    }

    /// Takes out all whose deadline is not after `now`.
    pub fn expired(&mut self, now: Instant) -> Vec<W> {
        let later = self.deadlines.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut self.deadlines, later);
        due.into_iter()
            .filter_map(|(_, id)| Some(self.waiting.remove(&id)?.0))
            .collect()
    }

    /// The next moment at which something expires.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// The read that waits under an id.
    pub fn get(&self, id: u64) -> Option<&W> {
        Some(&self.waiting.get(&id)?.0)
    }

    /// All that wait: id, read, deadline.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &W, Option<Instant>)> {
        self.waiting
            .iter()
            .map(|(&id, (waiter, deadline))| (id, waiter, *deadline))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_read_leaves_once() {
        let start = Instant::now();
        let at = |ms| Some(start + Duration::from_millis(ms));
        let mut fills = Fills::default();
        let a = fills.enter('a', at(10));
        let b = fills.enter('b', at(20));
        let c = fills.enter('c', None);
        assert_eq!(fills.next_deadline(), at(10));
        assert_eq!(fills.answered(b), Some('b'));
        assert_eq!(fills.answered(b), None);
        assert_eq!(fills.expired(start + Duration::from_millis(10)), ['a']);
        assert_eq!(fills.answered(a), None);
        assert_eq!(fills.next_deadline(), None);
        assert_eq!(
            fills.iter().map(|(id, &w, _)| (id, w)).collect::<Vec<_>>(),
            [(c, 'c')]
        );
        assert_eq!(fills.answered(c), Some('c'));
        assert!(fills.is_empty());
    }

    proptest! {
        /// Against a plain list of (id, deadline).
        #[test]
        fn behaves_as_a_list(steps in prop::collection::vec((0u8..3, 0u64..50), 1..200)) {
            let start = Instant::now();
            let at = |ms| start + Duration::from_millis(ms);
            let mut fills = Fills::default();
            let mut model: Vec<(u64, Option<u64>)> = Vec::new();
            for (step, value) in steps {
                match step {
                    0 => {
                        let deadline = (value % 5 != 0).then_some(value);
                        let id = fills.enter(value, deadline.map(at));
                        model.push((id, deadline));
                    }
                    1 if !model.is_empty() => {
                        let (id, _) = model.remove(usize::try_from(value).unwrap() % model.len());
                        prop_assert!(fills.answered(id).is_some());
                        prop_assert!(fills.answered(id).is_none());
                    }
                    _ => {
                        let gone = fills.expired(at(value)).len();
                        let before = model.len();
                        model.retain(|(_, deadline)| deadline.is_none_or(|d| d > value));
                        prop_assert_eq!(gone, before - model.len());
                    }
                }
                prop_assert_eq!(fills.len(), model.len());
                let first = model.iter().filter_map(|(_, d)| *d).min().map(at);
                prop_assert_eq!(fills.next_deadline(), first);
            }
        }
    }
}
