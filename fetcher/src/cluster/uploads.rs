// SPDX-License-Identifier: Apache-2.0
//! Whom a node serves, and whom it sends on: pure.
//!
//! An upload begins while a slot is free and the same thing is not being sent to `fanout` others already.
//! Beyond that the answer is "busy, ask these". So one thing that everybody wants at once spreads as a
//! tree of that degree: a line that few share is quick for each of them, and they serve the next while
//! they are still receiving. A degree of 16 (all slots) makes eight nodes on 100 Mbit/s start in 1.5 times
//! the time of one, a degree of 2 in 1.1 times (docs/cluster-simulation.md).
//!
//! Who is asked *as the home* also stands askers that it sends on in line, so that the next are sent to
//! them: they will have it. The others name only whom they serve.
//!
//! Two rules keep it moving. Who asks for what nobody else has is served beyond the slots, up to twice
//! their number, for turning it away would help nobody. And background takes only a part of the slots, so
//! that a reader finds one.
//!
//! The key should name what is asked for in one request, not more: who is sent to a node that has another
//! part of the same piece asks in vain.

use std::hash::Hash;

use super::holders::Holders;
use super::home::PieceKey;
use super::node::NodeId;

/// What a node gives at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadLimits {
    /// Uploads at once.
    pub slots: usize,
    /// Of these, for askers that nobody waits for.
    pub background: usize,
    /// Uploads of the same thing at once.
    pub fanout: usize,
    /// Holders named in a busy answer.
    pub named: usize,
}

impl UploadLimits {
    /// The limits for so many slots (`upload_slots`).
    #[must_use]
    pub fn of_slots(slots: usize) -> Self {
        UploadLimits {
            slots,
            background: slots - slots / 4,
            fanout: 2,
            named: 3,
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// Its name.
    pub node: &'a NodeId,
    /// Nobody waits for it there.
    pub background: bool,
    /// It serves others too: it is no leech.
    pub gives: bool,
    /// It asks this node as the home: to fetch what it lacks.
    pub as_home: bool,
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Serve it, and say so with [`Uploads::ended`] when it is over.
    Serve,
    /// Ask these; when they are none, again a little later.
    Busy(Vec<NodeId>),
}

#[derive(Debug)]
struct Upload<K> {
    key: K,
    node: NodeId,
    background: bool,
}

/// The uploads of a node, and who holds what it gave.
///
/// Invariant: never more than twice the slots.
#[derive(Debug)]
pub struct Uploads<K: Hash + Eq = PieceKey> {
    limits: UploadLimits,
    active: Vec<Upload<K>>,
    holders: Holders<K>,
}

impl<K: Hash + Eq + Clone> Uploads<K> {
    /// No uploads yet; `holders` may know some already.
    #[must_use]
    pub fn new(limits: UploadLimits, holders: Holders<K>) -> Self {
        Uploads {
            limits,
            active: Vec::new(),
            holders,
        }
    }

    /// Decides on a request.
    #[must_use]
    pub fn admit(&mut self, key: &K, asker: Asker<'_>) -> Admission {
        let same = self.active.iter().filter(|it| it.key == *key).count();
        if same >= self.limits.fanout || !self.has_room(asker.background) {
            let named = self.named(key, asker.node);
            let sent_on = !named.is_empty();
            if sent_on && asker.as_home && asker.gives {
                self.holders.note(key.clone(), asker.node);
            }
            if sent_on || self.active.len() >= 2 * self.limits.slots {
                return Admission::Busy(named);
            }
        }
        self.active.push(Upload {
            key: key.clone(),
            node: asker.node.clone(),
            background: asker.background,
        });
        if asker.gives {
            self.holders.note(key.clone(), asker.node);
        }
        Admission::Serve
    }

    /// Whom to ask instead of this node.
    #[must_use]
    pub fn named(&mut self, key: &K, asker: &NodeId) -> Vec<NodeId> {
        let UploadLimits { named, fanout, .. } = self.limits;
        self.holders.name(key, asker, named, fanout)
    }

    fn has_room(&self, background: bool) -> bool {
        let of_background = || self.active.iter().filter(|it| it.background).count();
        self.active.len() < self.limits.slots
            && (!background || of_background() < self.limits.background)
    }

    /// Takes note that an upload is over; one that is not `complete` left no holder.
    pub fn ended(&mut self, key: &K, node: &NodeId, complete: bool) {
        let found = self
            .active
            .iter()
            .position(|it| it.key == *key && it.node == *node);
        if let Some(at) = found {
            self.active.swap_remove(at);
        }
        if !complete {
            self.holders.lost(key, node);
        }
    }

    /// Who holds what.
    pub fn holders(&mut self) -> &mut Holders<K> {
        &mut self.holders
    }

    /// Slots that are free.
    #[must_use]
    pub fn free_slots(&self) -> u16 {
        let free = self.limits.slots.saturating_sub(self.active.len());
        u16::try_from(free).unwrap_or(u16::MAX)
    }

    /// How many of the slots are taken, in percent.
    #[must_use]
    pub fn load(&self) -> u8 {
        let percent = self.active.len() * 100 / self.limits.slots.max(1);
        u8::try_from(percent.min(100)).unwrap_or(100)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: UploadLimits = UploadLimits {
        slots: 4,
        background: 3,
        fanout: 2,
        named: 2,
    };

    fn id(number: usize) -> NodeId {
        NodeId::parse(&format!("n{number}")).unwrap()
    }

    fn busy(numbers: &[usize]) -> Admission {
        Admission::Busy(numbers.iter().map(|number| id(*number)).collect())
    }

    fn ask(uploads: &mut Uploads<u32>, key: u32, node: usize, background: bool) -> Admission {
        let node = id(node);
        let asker = Asker {
            node: &node,
            background,
            gives: true,
            as_home: false,
        };
        uploads.admit(&key, asker)
    }

    fn ask_home(uploads: &mut Uploads<u32>, key: u32, node: usize) -> Admission {
        let node = id(node);
        let asker = Asker {
            node: &node,
            background: false,
            gives: true,
            as_home: true,
        };
        uploads.admit(&key, asker)
    }

    #[test]
    fn one_thing_spreads_as_a_tree() {
        let mut uploads = Uploads::new(LIMITS, Holders::default());
        assert_eq!(ask_home(&mut uploads, 1, 0), Admission::Serve);
        assert_eq!(ask_home(&mut uploads, 1, 1), Admission::Serve);
        for (asker, named) in [
            (2, [0, 1]),
            (3, [0, 1]),
            (4, [1, 2]),
            (5, [1, 2]),
            (6, [2, 3]),
        ] {
            assert_eq!(ask_home(&mut uploads, 1, asker), busy(&named), "{asker}");
        }
        // Another thing has its own tree.
        assert_eq!(ask_home(&mut uploads, 2, 2), Admission::Serve);
        uploads.ended(&1, &id(0), true);
        assert_eq!(ask_home(&mut uploads, 1, 7), Admission::Serve);
        assert_eq!((uploads.free_slots(), uploads.load()), (1, 75));
        // One that broke off holds nothing.
        uploads.ended(&1, &id(1), false);
        uploads.ended(&1, &id(7), false);
        ask(&mut uploads, 1, 8, false);
        ask(&mut uploads, 1, 9, false);
        let all: Vec<NodeId> = uploads.holders().name(&1, &id(99), 99, 1);
        let expected = [2, 3, 4, 5, 6, 8, 9, 0].map(id);
        assert_eq!(all, expected);
    }

    #[test]
    fn who_is_no_home_names_only_whom_it_serves() {
        let mut uploads = Uploads::new(LIMITS, Holders::default());
        ask(&mut uploads, 1, 0, false);
        ask(&mut uploads, 1, 1, false);
        for asker in 2..20 {
            let named = match asker % 4 {
                2 | 3 if asker < 6 => [0, 1],
                0 | 1 if asker < 6 => [1, 0],
                even if even % 2 == 0 => [0, 1],
                _ => [1, 0],
            };
            assert_eq!(ask(&mut uploads, 1, asker, false), busy(&named), "{asker}");
        }
    }

    #[test]
    fn what_nobody_has_is_served_beyond_the_slots() {
        let mut uploads = Uploads::new(LIMITS, Holders::default());
        for node in 0..8 {
            let key = u32::try_from(node).unwrap();
            assert_eq!(ask(&mut uploads, key, node, false), Admission::Serve);
        }
        assert_eq!((uploads.free_slots(), uploads.load()), (0, 100));
        assert_eq!(ask(&mut uploads, 8, 8, false), busy(&[]));
        assert_eq!(ask(&mut uploads, 7, 8, false), busy(&[7]));
    }

    #[test]
    fn background_leaves_slots_to_readers() {
        let mut uploads = Uploads::new(LIMITS, Holders::default());
        uploads.holders().note(9, &id(50));
        for node in 0..3 {
            let key = u32::try_from(node).unwrap();
            assert_eq!(ask(&mut uploads, key, node, true), Admission::Serve);
        }
        assert_eq!(ask(&mut uploads, 9, 8, true), busy(&[50]));
        assert_eq!(ask(&mut uploads, 9, 8, false), Admission::Serve);
        assert_eq!(ask(&mut uploads, 9, 9, false), busy(&[50, 8]));
    }

    #[test]
    fn a_leech_is_never_named() {
        let mut uploads = Uploads::<u32>::new(LIMITS, Holders::default());
        for node in 0..3 {
            let node = id(node);
            let asker = Asker {
                node: &node,
                background: false,
                gives: false,
                as_home: true,
            };
            // There is nobody to send the third on to.
            assert_eq!(uploads.admit(&1, asker), Admission::Serve);
        }
    }

    proptest! {
        /// Never more than twice the slots, and nobody is turned away without a name before that.
        #[test]
        fn bounded_and_helpful(asks in prop::collection::vec((0u32..5, 0usize..30, any::<bool>(), any::<bool>()), 0..200)) {
            let mut uploads = Uploads::new(LIMITS, Holders::default());
            let mut active = Vec::new();
            for (key, node, background, ends) in asks {
                if ends && !active.is_empty() {
                    let (key, node) = active.swap_remove(node % active.len());
                    uploads.ended(&key, &id(node), background);
                    continue;
                }
                match ask(&mut uploads, key, node, background) {
                    Admission::Serve => active.push((key, node)),
                    Admission::Busy(names) => {
                        prop_assert!(!names.is_empty() || active.len() == 8);
                        prop_assert!(names.len() <= 2 && !names.contains(&id(node)));
                    }
                }
                prop_assert!(active.len() <= 8);
                prop_assert_eq!(usize::from(uploads.free_slots()), 4usize.saturating_sub(active.len()));
            }
        }
    }
}
