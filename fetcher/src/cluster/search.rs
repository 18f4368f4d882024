// SPDX-License-Identifier: Apache-2.0
//! How a node finds somebody who gives it a thing: pure.
//!
//! It asks the first home. A home that is busy names others; these are asked, the best first, and those
//! that they name before the rest: so the asker goes down the tree to where there is room. When nobody is
//! left it waits a little and begins again. A home that fails is followed by the next one, which fetches
//! in its place. When all homes failed, or after too many rounds, the origin is asked: that way always
//! remains.
//!
//! Only homes are asked to fetch what they lack, and a second one only after the first failed. A hedge
//! ([`Search::hedge`], which the simulator uses) is asked not to: the budget of one asker is small, but of a thousand askers some always have credit, and
//! each slow piece would be fetched twice.

use std::time::Duration;

use tokio::time::Instant;

use super::choice::Scores;
use super::node::{NodeId, View};

/// The wait before the second round; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(5);
/// So many rounds, about two seconds, then the origin is asked.
const ROUNDS: u32 = 9;
/// Nodes asked in one round: more than a tree of ten thousand is deep.
const ASKED_PER_ROUND: usize = 24;

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask this node.
    Ask {
        /// Whom.
        node: NodeId,
        /// Whether it is to fetch what it lacks, as a home.
        fetch: bool,
    },
    /// Fetch from the origin: as the home, or because nobody else can.
    Origin,
    /// Wait for so long, then call [`Search::again`].
    Wait(Duration),
}

/// The search for one thing.
///
/// Invariant: a node is asked once a round, and a round asks at most 24.
#[derive(Clone, Debug)]
pub struct Search {
    homes: Vec<NodeId>,
    /// Which of the homes it is at.
    home: usize,
    /// To be asked, the best last.
    named: Vec<NodeId>,
    asked: Vec<NodeId>,
    round: u32,
}

impl Search {
    /// Begins with the homes of the piece, in their order; these may contain the node itself.
    #[must_use]
    pub fn new(homes: Vec<NodeId>) -> Self {
        Search {
            homes,
            home: 0,
            named: Vec::new(),
            asked: Vec::new(),
            round: 0,
        }
    }

    /// Whom to ask now.
    pub fn step(&mut self, me: &NodeId, scores: &Scores, now: Instant) -> Step {
        if let Some(node) = self.next_named(scores, now) {
            return Step::Ask { node, fetch: false };
        }
        // An avoided home is passed over, unless there is no other.
        while let Some(home) = self.homes.get(self.home) {
            if home == me {
                return Step::Origin;
            }
            if !scores.is_avoided(home, now) {
                break;
            }
            self.home += 1;
        }
        let Some(home) = self.homes.get(self.home) else {
            return Step::Origin;
        };
        if !self.asked.contains(home) {
            let node = home.clone();
            self.asked.push(node.clone());
            return Step::Ask { node, fetch: true };
        }
        if self.round >= ROUNDS {
            return Step::Origin;
        }
        Step::Wait(FIRST_WAIT * (1 << self.round))
    }

    /// Somebody else who may have it, for a hedge: it is not to fetch.
    pub fn hedge(&mut self, me: &NodeId, scores: &Scores, now: Instant) -> Option<NodeId> {
        let other = self.next_named(scores, now);
        other.or_else(|| {
            let home = self.homes.get(self.home + 1)?;
            let fresh = !self.asked.contains(home) && !scores.is_avoided(home, now);
            (fresh && home != me).then(|| home.clone())
        })
    }

    fn next_named(&mut self, scores: &Scores, now: Instant) -> Option<NodeId> {
        while let Some(node) = self.named.pop() {
            let fresh = !self.asked.contains(&node) && !scores.is_avoided(&node, now);
            if fresh && self.asked.len() < ASKED_PER_ROUND {
                self.asked.push(node.clone());
                return Some(node);
            }
        }
        None
    }

    /// Takes the names of a busy answer.
    pub fn busy(&mut self, view: &View, scores: &Scores, names: &[NodeId], now: Instant) {
        let order = scores.order_named(view, names, now);
        self.named.extend(order.into_iter().rev());
    }

    /// Takes note that `node` failed or was silent: if it is the home, the next one is.
    pub fn failed(&mut self, node: &NodeId) {
        if self.homes.get(self.home) == Some(node) {
            self.home += 1;
        }
    }

    /// Begins another round after a wait, with the homes of now.
    pub fn again(&mut self, homes: Vec<NodeId>) {
        let round = self.round + 1;
        *self = Search::new(homes);
        self.round = round;
    }

    /// Begins anew because what was being received broke off.
    pub fn anew(&mut self, homes: Vec<NodeId>) {
        *self = Search::new(homes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::cluster::choice::Outcome;
    use crate::cluster::node::{Node, Role};

    fn id(name: &str) -> NodeId {
        NodeId::parse(name).unwrap()
    }

    fn ids(names: &[&str]) -> Vec<NodeId> {
        names.iter().map(|name| id(name)).collect()
    }

    /// Names sort by rack: those that begin with `r` are near.
    fn view() -> View {
        let node = |name: &str| Node {
            id: id(name),
            zone: "z".into(),
            rack: name[..1].into(),
            role: Role::Node,
            address: ([127, 0, 0, 1], 1).into(),
            version: String::new(),
            protocol: 1,
            load: 0,
            free_slots: 1,
        };
        View {
            me: node("r0"),
            others: ["r1", "s1", "s2", "h1", "h2"].map(node).to_vec(),
        }
    }

    struct Rig {
        view: View,
        scores: Scores,
        search: Search,
        now: Instant,
    }

    impl Rig {
        fn new(homes: &[&str]) -> Self {
            Rig {
                view: view(),
                scores: Scores::default(),
                search: Search::new(ids(homes)),
                now: clock::now(),
            }
        }

        fn step(&mut self) -> Step {
            self.search.step(&self.view.me.id, &self.scores, self.now)
        }

        fn busy(&mut self, names: &[&str]) {
            self.search
                .busy(&self.view, &self.scores, &ids(names), self.now);
        }
    }

    fn ask(name: &str, fetch: bool) -> Step {
        Step::Ask {
            node: id(name),
            fetch,
        }
    }

    #[test]
    fn down_the_tree_then_a_wait_then_again() {
        let mut rig = Rig::new(&["h1", "h2"]);
        assert_eq!(rig.step(), ask("h1", true));
        rig.busy(&["s1", "r1"]);
        assert_eq!(rig.step(), ask("r1", false));
        // Deeper before the rest, and nobody twice.
        rig.busy(&["s2", "h1"]);
        assert_eq!(rig.step(), ask("s2", false));
        assert_eq!(rig.step(), ask("s1", false));
        assert_eq!(rig.step(), Step::Wait(FIRST_WAIT));
        rig.search.again(ids(&["h1", "h2"]));
        assert_eq!(rig.step(), ask("h1", true));
        assert_eq!(rig.step(), Step::Wait(2 * FIRST_WAIT));
    }

    #[test]
    fn a_failed_home_is_followed_by_the_next_and_then_by_the_origin() {
        let mut rig = Rig::new(&["h1", "h2"]);
        assert_eq!(rig.step(), ask("h1", true));
        rig.search.failed(&id("h1"));
        assert_eq!(rig.step(), ask("h2", true));
        // Others that fail change nothing.
        rig.search.failed(&id("s1"));
        assert_eq!(rig.step(), Step::Wait(FIRST_WAIT));
        rig.search.failed(&id("h2"));
        assert_eq!(rig.step(), Step::Origin);
    }

    #[test]
    fn an_avoided_home_is_passed_over() {
        let mut rig = Rig::new(&["h1", "h2"]);
        rig.scores.observe(&id("h1"), Outcome::Failed, rig.now);
        assert_eq!(rig.step(), ask("h2", true));
        rig.scores.observe(&id("h2"), Outcome::Lied, rig.now);
        assert_eq!(rig.step(), Step::Origin);
    }

    #[test]
    fn a_hedge_goes_to_who_was_named_or_to_the_next_home() {
        let mut rig = Rig::new(&["h1", "h2"]);
        rig.step();
        let hedge = |rig: &mut Rig| rig.search.hedge(&rig.view.me.id, &rig.scores, rig.now);
        assert_eq!(hedge(&mut rig), Some(id("h2")));
        // It may still be asked to fetch, should the first home fail.
        rig.search.failed(&id("h1"));
        assert_eq!(rig.step(), ask("h2", true));
        rig.busy(&["s1", "s2"]);
        assert!(matches!(rig.step(), Step::Ask { fetch: false, .. }));
        assert!(hedge(&mut rig).is_some_and(|node| node.as_str().starts_with('s')));
        assert_eq!(hedge(&mut rig), None);
    }

    #[test]
    fn a_home_fetches_itself_and_so_does_who_is_alone() {
        for homes in [&["r0", "h1"][..], &[]] {
            assert_eq!(Rig::new(homes).step(), Step::Origin);
        }
        let mut rig = Rig::new(&["h1", "r0"]);
        assert_eq!(rig.step(), ask("h1", true));
        rig.search.failed(&id("h1"));
        assert_eq!(rig.step(), Step::Origin);
    }

    #[test]
    fn waits_end_at_the_origin() {
        let mut rig = Rig::new(&["h1"]);
        let mut waited = Duration::ZERO;
        loop {
            assert_eq!(rig.step(), ask("h1", true));
            match rig.step() {
                Step::Wait(wait) => waited += wait,
                step => {
                    assert_eq!(step, Step::Origin);
                    break;
                }
            }
            rig.search.again(ids(&["h1"]));
        }
        assert!((1..4).contains(&waited.as_secs()), "{waited:?}");
    }
}
