// SPDX-License-Identifier: Apache-2.0
//! A cache that is bounded by bytes; the least recently used go.

use std::hash::Hash;
use std::sync::Mutex;

use lru::LruCache;

use crate::store::lock;

/// What is counted for an entry besides its bytes.
const ENTRY_BYTES: usize = 128;

/// Values, each of which counts for so many bytes.
#[derive(Debug)]
pub(crate) struct ByteLru<K: Hash + Eq, V> {
    budget_bytes: usize,
    state: Mutex<State<K, V>>,
}

#[derive(Debug)]
struct State<K: Hash + Eq, V> {
    held_bytes: usize,
    entries: LruCache<K, (usize, V)>,
}

impl<K: Hash + Eq, V: Clone> ByteLru<K, V> {
    pub(crate) fn new(budget_bytes: usize) -> Self {
        let state = State {
            held_bytes: 0,
            entries: LruCache::unbounded(),
        };
        Self {
            budget_bytes,
            state: Mutex::new(state),
        }
    }

    /// Keeps `value`, which has so many bytes; not if it is larger than all that may be held.
    pub(crate) fn put(&self, key: K, value: V, bytes: usize) {
        let size = bytes + ENTRY_BYTES;
        if size > self.budget_bytes {
            return;
        }
        let mut state = lock(&self.state);
        state.held_bytes += size;
        if let Some((old, _)) = state.entries.put(key, (size, value)) {
            state.held_bytes -= old;
        }
        while state.held_bytes > self.budget_bytes {
            let Some((_, (old, _))) = state.entries.pop_lru() else {
                break;
            };
            state.held_bytes -= old;
        }
    }

    /// Forgets all.
    #[cfg(test)]
    pub(crate) fn clear(&self) {
        let mut state = lock(&self.state);
        state.entries.clear();
        state.held_bytes = 0;
    }

    /// The value, if it is here.
    pub(crate) fn get(&self, key: &K) -> Option<V> {
        let mut state = lock(&self.state);
        state.entries.get(key).map(|(_, value)| value.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_go() {
        let cache = ByteLru::new(3 * (100 + ENTRY_BYTES));
        for n in 0..3 {
            cache.put(n, n, 100);
        }
        assert_eq!(cache.get(&0), Some(0));
        cache.put(3, 3, 100);
        let there: Vec<bool> = (0..4).map(|n| cache.get(&n).is_some()).collect();
        assert_eq!(there, [true, false, true, true]);
        // Replaced and not counted twice; too large for it all.
        cache.put(3, 33, 0);
        cache.put(9, 9, 1000);
        assert_eq!((cache.get(&3), cache.get(&9)), (Some(33), None));
        let held = lock(&cache.state).held_bytes;
        assert_eq!(held, 2 * (100 + ENTRY_BYTES) + ENTRY_BYTES);
    }
}
