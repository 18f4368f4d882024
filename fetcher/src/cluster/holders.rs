// SPDX-License-Identifier: Apache-2.0
//! Whom to name instead when all upload slots are taken: pure.
//!
//! For each thing a node keeps a line of those that have it or will: whom it serves or served, whom it
//! sent on to others, and who told that it has it. When it is busy it names the head of the line. After a
//! few times (the degree of the tree) the head makes room for the next and goes to the end, to be named
//! again when all had their turn. So a home gives askers their place in a tree in the order in which they
//! come, without a word from the others: one busy answer each, and a tree that is as flat as can be. The
//! other names stand in for the first, should it be gone.
//!
//! What is named is a hint. Who is named may still be waiting for it: the asker then waits with it. It may
//! have lost it, or died: the asker then tries the next.
//!
//! Nodes that wait must not wait for each other in a circle. So an asker that is in line itself is only sent
//! to those before it.
//!
//! Invariants: at most so many places in all lines together; when there are more the line that was longest
//! unused is dropped, and the longest line takes nobody in.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use lru::LruCache;

use super::home::PieceKey;
use super::node::NodeId;

/// Places in all lines, unless said otherwise: a few hundred pieces that a thousand nodes want, or many
/// more that few want; some megabytes.
pub const PLACES: usize = 1 << 16;

/// Those that have one thing.
#[derive(Debug, Default)]
struct Line {
    /// When each came.
    came: HashMap<NodeId, u64>,
    /// Those whose turn is now or later, and how often each was named.
    waiting: VecDeque<(NodeId, usize)>,
    /// Those who had their turn, the longest ago first.
    had: VecDeque<NodeId>,
    next: u64,
}

impl Line {
    fn leave(&mut self, node: &NodeId) -> bool {
        self.waiting.retain(|(it, _)| it != node);
        self.had.retain(|it| it != node);
        self.came.remove(node).is_some()
    }

    fn name(&mut self, asker: &NodeId, count: usize, times: usize) -> Vec<NodeId> {
        let place = self.came.get(asker).copied();
        let before = |node: &NodeId| {
            let came = self.came.get(node).copied();
            node != asker && place.is_none_or(|place| came.is_some_and(|came| came < place))
        };
        let waiting = self.waiting.iter().map(|(node, _)| node);
        let named: Vec<NodeId> = waiting
            .chain(&self.had)
            .filter(|node| before(node))
            .take(count)
            .cloned()
            .collect();
        if let Some(first) = named.first() {
            self.was_named(first, times);
        }
        named
    }

    fn was_named(&mut self, node: &NodeId, times: usize) {
        let waiting = self.waiting.iter().position(|(it, _)| it == node);
        if let Some(at) = waiting {
            self.waiting[at].1 += 1;
            if self.waiting[at].1 >= times {
                let done = self.waiting.remove(at);
                self.had.extend(done.map(|(node, _)| node));
            }
        } else if let Some(at) = self.had.iter().position(|it| it == node) {
            let again = self.had.remove(at);
            self.had.extend(again);
        }
    }
}

/// Who has what, as far as this node knows. `K` names a thing: a piece, or a run of its chunks.
#[derive(Debug)]
pub struct Holders<K: Hash + Eq = PieceKey> {
    lines: LruCache<K, Line>,
    places: usize,
    taken: usize,
}

impl<K: Hash + Eq> Default for Holders<K> {
    fn default() -> Self {
        Self::new(PLACES)
    }
}

impl<K: Hash + Eq> Holders<K> {
    /// Nobody has anything yet; `places` is the most that is remembered.
    #[must_use]
    pub fn new(places: usize) -> Self {
        Holders {
            // Bounded below: the bounded kind allocates its table at once.
            lines: LruCache::unbounded(),
            places,
            taken: 0,
        }
    }

    /// Takes note that `node` has `key`, is receiving it, or was told where to get it.
    pub fn note(&mut self, key: K, node: &NodeId) {
        let line = self.lines.get_or_insert_mut(key, Line::default);
        if line.came.contains_key(node) || line.came.len() >= self.places {
            return;
        }
        line.came.insert(node.clone(), line.next);
        line.next += 1;
        line.waiting.push_back((node.clone(), 0));
        self.taken += 1;
        // The line of `key` is the latest used and not longer than the limit: it stays.
        while self.taken > self.places {
            let Some((_, dropped)) = self.lines.pop_lru() else {
                break;
            };
            self.taken -= dropped.came.len();
        }
    }

    /// Forgets a node: it left, lied, or lost what it had.
    pub fn forget(&mut self, node: &NodeId) {
        for (_, line) in self.lines.iter_mut() {
            self.taken -= usize::from(line.leave(node));
        }
    }

    /// Takes note that `node` does not have `key` after all.
    pub fn lost(&mut self, key: &K, node: &NodeId) {
        if let Some(line) = self.lines.peek_mut(key) {
            self.taken -= usize::from(line.leave(node));
        }
    }

    /// At most `count` that have `key`, or will: never `asker`, nor anybody behind it. The first of them is
    /// named first `times` times before the next is.
    #[must_use]
    pub fn name(&mut self, key: &K, asker: &NodeId, count: usize, times: usize) -> Vec<NodeId> {
        let line = self.lines.get_mut(key);
        line.map_or_else(Vec::new, |line| line.name(asker, count, times))
    }

    /// How many places are taken.
    #[must_use]
    pub fn len(&self) -> usize {
        self.taken
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.taken == 0
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
    fn each_has_its_turn_and_then_again() {
        let mut holders = Holders::default();
        for number in [0, 1, 2, 1] {
            holders.note(7, &id(number));
        }
        let mut name = |count| holders.name(&7, &id(9), count, 2);
        let turns = [
            [0, 1],
            [0, 1],
            [1, 2],
            [1, 2],
            [2, 0],
            [2, 0],
            [0, 1],
            [1, 2],
        ];
        for turn in turns {
            assert_eq!(name(2), ids(&turn));
        }
        assert_eq!(name(0), ids(&[]));
        assert_eq!(name(9), ids(&[2, 0, 1]));
        assert_eq!(holders.name(&8, &id(9), 2, 2), ids(&[]));
    }

    #[test]
    fn who_came_is_sent_only_to_those_before() {
        let mut holders = Holders::default();
        for number in 0..4 {
            holders.note(7, &id(number));
        }
        for (asker, named) in [(0, vec![]), (1, vec![0]), (3, vec![0, 1, 2])] {
            assert_eq!(holders.name(&7, &id(asker), 9, 9), ids(&named), "{asker}");
        }
    }

    #[test]
    fn the_lost_and_the_forgotten_are_not_named() {
        let mut holders = Holders::default();
        for key in [1, 2] {
            holders.note(key, &id(0));
            holders.note(key, &id(1));
        }
        assert_eq!(holders.name(&1, &id(9), 1, 1), ids(&[0]));
        holders.lost(&1, &id(0));
        assert_eq!(holders.name(&1, &id(9), 5, 1), ids(&[1]));
        assert_eq!(holders.name(&2, &id(9), 5, 1), ids(&[0, 1]));
        holders.forget(&id(1));
        assert_eq!(holders.name(&1, &id(9), 5, 1), ids(&[]));
        assert_eq!(holders.name(&2, &id(9), 5, 1), ids(&[0]));
        assert_eq!(holders.len(), 1);
        // It comes back at the end.
        holders.note(2, &id(3));
        holders.forget(&id(0));
        holders.note(2, &id(0));
        assert_eq!(holders.name(&2, &id(9), 5, 1), ids(&[3, 0]));
    }

    #[test]
    fn bounded() {
        let mut holders = Holders::new(5);
        for (key, node) in [(1, 0), (1, 1), (2, 0), (2, 1), (1, 2), (3, 0), (3, 1)] {
            holders.note(key, &id(node));
        }
        assert_eq!(holders.len(), 5);
        assert_eq!(holders.name(&2, &id(9), 9, 1), ids(&[]));
        assert_eq!(holders.name(&1, &id(9), 9, 1), ids(&[0, 1, 2]));
        for node in 0..20 {
            holders.note(4, &id(node));
        }
        assert_eq!(holders.len(), 5);
        assert_eq!(holders.name(&4, &id(9), 9, 1), ids(&[0, 1, 2, 3, 4]));
    }

    proptest! {
        /// A burst: each asker is sent to the first of its names and stands in line itself. The tree that
        /// comes of it has no node of more than `times` children, and is as flat as can be.
        #[test]
        fn a_burst_becomes_a_flat_tree(nodes in 2usize..400, times in 1usize..5) {
            let mut holders = Holders::default();
            holders.note((), &id(0));
            let mut depths = BTreeMap::from([(id(0), 0u32)]);
            let mut children = BTreeMap::new();
            for number in 1..nodes {
                let asker = id(number);
                let first = holders.name(&(), &asker, 3, times)[0].clone();
                holders.note((), &asker);
                let depth = depths[&first] + 1;
                depths.insert(asker, depth);
                *children.entry(first).or_insert(0) += 1;
            }
            prop_assert!(children.values().all(|count| *count <= times));
            let (mut room, mut level, mut flattest) = (1, 1, 0);
            while room < nodes {
                level *= times;
                room += level;
                flattest += 1;
            }
            prop_assert_eq!(depths.values().max(), Some(&flattest));
        }

        /// Whoever comes, goes and asks: the count of places is right, nobody is named to itself or twice.
        #[test]
        fn counts_what_it_keeps(events in prop::collection::vec((0u8..4, 0u32..3, 0usize..8), 0..200)) {
            let mut holders = Holders::new(10);
            for (what, key, node) in events {
                let node = id(node);
                match what {
                    0 => holders.note(key, &node),
                    1 => holders.lost(&key, &node),
                    2 => holders.forget(&node),
                    _ => {
                        let mut named = holders.name(&key, &node, 5, 2);
                        prop_assert!(!named.contains(&node));
                        let all = named.len();
                        named.sort();
                        named.dedup();
                        prop_assert_eq!(named.len(), all);
                    }
                }
                let places: usize = (0..3).map(|key| holders.name(&key, &id(99), 99, 2).len()).sum();
                prop_assert_eq!(holders.len(), places);
                prop_assert!(places <= 10);
            }
        }
    }
}
