// SPDX-License-Identifier: Apache-2.0
//! Whom to name instead when all upload slots are taken: pure.
//!
//! A node remembers to whom it gave what, and who told that it has it. When it is busy it names a few of
//! these, the longest not named first: so each of them is sent about as many askers as any other, they in
//! turn send the next ones on to those that they served, and the load spreads as a tree.
//!
//! What is named is a hint. Who is named may have lost it, or died: the asker then tries the next.

use std::collections::VecDeque;
use std::hash::Hash;

use lru::LruCache;

use super::home::PieceKey;
use super::node::NodeId;

/// Things remembered, unless said otherwise: the pieces of a few large images.
pub const KEYS_REMEMBERED: usize = 4096;
/// Holders remembered of each: more than are named while these are still receiving.
const HOLDERS_PER_KEY: usize = 32;

/// Who has what, as far as this node knows. `K` names a thing: a piece, or a run of chunks.
///
/// Invariant: at most so many things, the longest unused is dropped; at most 32 holders of each, of which
/// the most often named is dropped.
#[derive(Debug)]
pub struct Holders<K: Hash + Eq = PieceKey> {
    /// The longest not named first.
    holders: LruCache<K, VecDeque<NodeId>>,
    capacity: usize,
}

impl<K: Hash + Eq> Default for Holders<K> {
    fn default() -> Self {
        Self::new(KEYS_REMEMBERED)
    }
}

impl<K: Hash + Eq> Holders<K> {
    /// Nobody has anything yet; at most `capacity` things are remembered.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Holders {
            // Bounded below: the bounded kind allocates its table at once.
            holders: LruCache::unbounded(),
            capacity,
        }
    }

    /// Takes note that `node` has `key`, or has begun to receive it: it sends on what it has.
    pub fn note(&mut self, key: K, node: &NodeId) {
        let holders = self.holders.get_or_insert_mut(key, VecDeque::new);
        if !holders.contains(node) {
            if holders.len() == HOLDERS_PER_KEY {
                holders.pop_back();
            }
            holders.push_front(node.clone());
        }
        while self.holders.len() > self.capacity {
            self.holders.pop_lru();
        }
    }

    /// Forgets a node: it left, lied, or lost what it had.
    pub fn forget(&mut self, node: &NodeId) {
        for (_, holders) in self.holders.iter_mut() {
            holders.retain(|holder| holder != node);
        }
    }

    /// Takes note that `node` does not have `key` after all.
    pub fn lost(&mut self, key: &K, node: &NodeId) {
        if let Some(holders) = self.holders.peek_mut(key) {
            holders.retain(|holder| holder != node);
        }
    }

    /// At most `count` that have `key`, never `asker`; they are named last next time.
    #[must_use]
    pub fn name(&mut self, key: &K, asker: &NodeId, count: usize) -> Vec<NodeId> {
        let Some(holders) = self.holders.get_mut(key) else {
            return Vec::new();
        };
        let (mut named, mut others) = (Vec::new(), VecDeque::with_capacity(holders.len()));
        for holder in holders.drain(..) {
            if named.len() < count && holder != *asker {
                named.push(holder);
            } else {
                others.push_back(holder);
            }
        }
        others.extend(named.iter().cloned());
        *holders = others;
        named
    }

    /// How many things are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn id(number: usize) -> NodeId {
        NodeId::parse(&format!("n{number}")).unwrap()
    }

    fn ids(numbers: &[usize]) -> Vec<NodeId> {
        numbers.iter().map(|number| id(*number)).collect()
    }

    #[test]
    fn the_longest_not_named_first_and_never_the_asker() {
        let mut holders = Holders::default();
        for number in 0..4 {
            holders.note(7, &id(number));
        }
        holders.note(7, &id(3));
        let mut name = |asker, count| holders.name(&7, &id(asker), count);
        assert_eq!(name(9, 2), ids(&[3, 2]));
        assert_eq!(name(1, 2), ids(&[0, 3]));
        assert_eq!(name(9, 9), ids(&[1, 2, 0, 3]));
        assert_eq!(name(9, 0), ids(&[]));
        assert_eq!(holders.name(&8, &id(9), 2), ids(&[]));
    }

    #[test]
    fn new_ones_before_named_ones_and_the_forgotten_never() {
        let mut holders = Holders::default();
        holders.note(1, &id(0));
        holders.note(2, &id(0));
        assert_eq!(holders.name(&1, &id(9), 1), ids(&[0]));
        holders.note(1, &id(1));
        assert_eq!(holders.name(&1, &id(9), 1), ids(&[1]));
        holders.forget(&id(0));
        assert_eq!(holders.name(&1, &id(9), 5), ids(&[1]));
        assert_eq!(holders.name(&2, &id(9), 5), ids(&[]));
    }

    #[test]
    fn bounded() {
        let mut holders = Holders::new(2);
        for key in [1, 2, 1, 3] {
            holders.note(key, &id(key));
        }
        assert_eq!(holders.len(), 2);
        assert_eq!(holders.name(&2, &id(9), 1), ids(&[]));
        assert_eq!(holders.name(&1, &id(9), 1), ids(&[1]));
        for number in 0..HOLDERS_PER_KEY + 10 {
            holders.note(1, &id(number));
        }
        let named = holders.name(&1, &id(99), 100);
        assert_eq!(named.len(), HOLDERS_PER_KEY);
        assert_eq!(named[0], id(HOLDERS_PER_KEY + 9));
    }

    proptest! {
        /// Askers are spread: whatever the count, no holder is named twice more often than another.
        #[test]
        fn the_load_is_spread(known in 1usize..HOLDERS_PER_KEY, counts in prop::collection::vec(0usize..6, 0..80)) {
            let mut holders = Holders::default();
            for number in 0..known {
                holders.note((), &id(number));
            }
            let mut times: BTreeMap<NodeId, usize> = (0..known).map(|number| (id(number), 0)).collect();
            for count in counts {
                let named = holders.name(&(), &id(99), count);
                prop_assert_eq!(named.len(), count.min(known));
                for node in named {
                    *times.get_mut(&node).unwrap() += 1;
                }
                let (least, most) = (times.values().min().unwrap(), times.values().max().unwrap());
                prop_assert!(most - least <= 1, "{times:?}");
            }
        }
    }
}
