// SPDX-License-Identifier: Apache-2.0
//! Whom a transfer asks for a piece, and when it goes to the origin itself: pure.
//!
//! [`Search`] leads from a busy home down the tree of those that it serves, and to the next home when one
//! fails. Around it: a transfer that nobody waits for stays with a busy home for longer, because going to
//! the origin would cost a second fetch and gain nothing; a home that was busy for all of a transfer's
//! patience is reported once; and when this node, as a home, fails at the origin, the homes after it are
//! asked: they may reach it, or have the piece.
//!
//! How far a transfer may go is its [`Reach`]. A node that asks waits for the node that it asks, so who may
//! ask whom must not make a circle: whoever asks on behalf of a node of its zone asks other zones only, and
//! whoever asks on behalf of another zone, nobody. So no request goes further than node, home, home of
//! another zone, origin, whatever each of them believes of the others.

use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::choice::Scores;
use crate::cluster::node::{NodeId, View};
use crate::cluster::search::{Search, Step as SearchStep};
use crate::source::Priority;

/// The pause before a busy home is asked again on behalf of nobody.
const PATIENT_PAUSE: Duration = Duration::from_millis(300);

/// Which nodes a transfer may ask. Orders from none to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// None: a node of another zone waits for it, or two would wait for each other.
    Origin,
    /// Those of other zones: a node of this one waits for it.
    OtherZones,
    /// All.
    All,
}

/// How long a transfer stays with busy homes. A reader goes to the origin rather than wait longer than
/// requests there take.
pub(crate) const fn patience(priority: Priority) -> Duration {
    match priority {
        Priority::Foreground => Duration::from_secs(4),
        Priority::Boot => Duration::from_secs(10),
        Priority::Background => Duration::from_secs(60),
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask this node; `present_only`: it must not fetch.
    Ask {
        /// Whom.
        node: NodeId,
        /// Only what it has.
        present_only: bool,
    },
    /// Wait, then ask for the next step.
    Pause(Duration),
    /// Go to the origin.
    Origin,
}

/// The way of one piece.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    me: NodeId,
    /// Those that have not failed, best first.
    homes: Vec<NodeId>,
    search: Search,
    give_up: Instant,
    /// The home that was busy last.
    busy: Option<NodeId>,
    given_up: Option<NodeId>,
    at_origin: bool,
}

impl Route {
    /// A way to a piece with these homes, best first. `homes` may contain `me`.
    pub(crate) fn new(me: NodeId, homes: Vec<NodeId>, give_up: Instant) -> Self {
        Self {
            me,
            search: Search::new(homes.clone()),
            homes,
            give_up,
            busy: None,
            given_up: None,
            at_origin: false,
        }
    }

    /// What to do now.
    pub(crate) fn next(&mut self, scores: &Scores, now: Instant) -> Step {
        if self.at_origin {
            return Step::Origin;
        }
        let late = now >= self.give_up;
        if late && let Some(home) = self.busy.take() {
            self.failed(&home);
            self.given_up = Some(home);
        }
        match self.search.step(&self.me, scores, now) {
            SearchStep::Ask { node, fetch } => Step::Ask {
                node,
                present_only: !fetch,
            },
            SearchStep::Wait(wait) => {
                self.search.again(self.homes.clone());
                Step::Pause(wait)
            }
            // Too many rounds, and time left: from the beginning.
            SearchStep::Origin if self.busy.is_some() && !late => {
                self.search = Search::new(self.homes.clone());
                Step::Pause(PATIENT_PAUSE)
            }
            SearchStep::Origin => {
                self.at_origin = true;
                Step::Origin
            }
        }
    }

    /// A node had no slot and named others.
    pub(crate) fn busy(
        &mut self,
        node: &NodeId,
        named: &[NodeId],
        view: &View,
        scores: &Scores,
        now: Instant,
    ) {
        if self.homes.first() == Some(node) {
            self.busy = Some(node.clone());
        }
        self.search.busy(view, scores, named, now);
    }

    /// A home that was busy until the patience ended; said once. Others need not wait for it as long.
    pub(crate) fn given_up(&mut self) -> Option<NodeId> {
        self.given_up.take()
    }

    /// A node failed, was silent, lied, or does not have it.
    pub(crate) fn failed(&mut self, node: &NodeId) {
        self.homes.retain(|home| home != node);
        self.search.failed(node);
        if self.busy.as_ref() == Some(node) {
            self.busy = None;
        }
    }

    /// The home after `node`, which is silent: it may be asked besides.
    pub(crate) fn spare(&self, node: &NodeId) -> Option<NodeId> {
        let first = self.homes.first() == Some(node);
        let next = first.then(|| self.homes.get(1)).flatten();
        next.filter(|id| **id != self.me).cloned()
    }

    /// The origin failed: those homes that were not asked may do better.
    pub(crate) fn origin_failed(&mut self) {
        self.at_origin = false;
        let me = self.me.clone();
        self.failed(&me);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::choice::Outcome;
    use crate::cluster::node::{Node, Role};

    fn id(name: &str) -> NodeId {
        NodeId::parse(name).unwrap()
    }

    fn ids(names: &[&str]) -> Vec<NodeId> {
        names.iter().map(|name| id(name)).collect()
    }

    fn ask(name: &str, present_only: bool) -> Step {
        Step::Ask {
            node: id(name),
            present_only,
        }
    }

    struct Rig {
        route: Route,
        view: View,
        scores: Scores,
        now: Instant,
    }

    impl Rig {
        fn new(homes: &[&str]) -> Self {
            let node = |name: &str| Node {
                id: id(name),
                zone: "z".into(),
                rack: String::new(),
                role: Role::Node,
                address: ([127, 0, 0, 1], 1).into(),
                version: String::new(),
                protocol: 1,
                load: 0,
                free_slots: 1,
            };
            let now = Instant::now();
            let give_up = now + Duration::from_secs(10);
            Rig {
                route: Route::new(id("me"), ids(homes), give_up),
                view: View {
                    me: node("me"),
                    others: ["a", "b", "x", "y"].map(node).to_vec(),
                },
                scores: Scores::default(),
                now,
            }
        }

        fn next(&mut self) -> Step {
            self.route.next(&self.scores, self.now)
        }

        fn busy(&mut self, node: &str, named: &[&str]) {
            let (view, scores) = (&self.view, &self.scores);
            self.route
                .busy(&id(node), &ids(named), view, scores, self.now);
        }
    }

    #[test]
    fn a_home_goes_to_the_origin_and_others_ask_it() {
        for (homes, expected) in [
            (&[][..], Step::Origin),
            (&["me", "b"], Step::Origin),
            (&["a", "me"], ask("a", false)),
        ] {
            assert_eq!(Rig::new(homes).next(), expected, "{homes:?}");
        }
    }

    #[test]
    fn the_second_home_follows_the_first_and_then_the_origin() {
        let mut rig = Rig::new(&["a", "b"]);
        assert_eq!(rig.next(), ask("a", false));
        assert_eq!(rig.route.spare(&id("a")), Some(id("b")));
        rig.route.failed(&id("a"));
        assert_eq!(rig.next(), ask("b", false));
        rig.route.failed(&id("b"));
        assert_eq!(rig.next(), Step::Origin);
        rig.route.origin_failed();
        assert_eq!(rig.next(), Step::Origin);
    }

    #[test]
    fn a_busy_home_is_asked_again_until_the_patience_ends() {
        let mut rig = Rig::new(&["a", "b"]);
        let mut pauses = Duration::ZERO;
        let mut asked = 0;
        loop {
            match rig.next() {
                Step::Ask { node, present_only } if node == id("a") => {
                    assert!(!present_only);
                    asked += 1;
                    rig.busy("a", &["x", "me"]);
                    assert_eq!(rig.next(), ask("x", true));
                    rig.route.failed(&id("x"));
                }
                Step::Pause(pause) => {
                    pauses += pause;
                    rig.now += pause;
                }
                other => {
                    assert_eq!(other, ask("b", false));
                    break;
                }
            }
        }
        assert!(asked > 10, "{asked}");
        assert!((10..12).contains(&pauses.as_secs()), "{pauses:?}");
        assert_eq!(rig.route.given_up(), Some(id("a")));
        assert_eq!(rig.route.given_up(), None);
    }

    #[test]
    fn when_the_origin_fails_other_homes_are_asked() {
        let mut rig = Rig::new(&["me", "b"]);
        assert_eq!(rig.next(), Step::Origin);
        rig.route.origin_failed();
        assert_eq!(rig.next(), ask("b", false));
        rig.scores.observe(&id("b"), Outcome::Failed, rig.now);
        rig.route.failed(&id("b"));
        assert_eq!(rig.next(), Step::Origin);
    }
}
