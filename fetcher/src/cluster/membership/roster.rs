// SPDX-License-Identifier: Apache-2.0
//! What is made of claims that nodes live: a view. Pure.
//!
//! A claim is what somebody says over a network that nobody guards, so each is checked before it counts
//! ([`admit`]), and how many count is bounded. Claims of one name are settled by the newest generation:
//! a node that was started anew replaces itself. A claim of our own name changes nothing here; where it
//! lives on at another address, two nodes were given one name, which is an error that a human must mend.
//!
//! A new view is made when it differs in something else than load, or when a load differs noticeably
//! ([`Load::differs`]): who waits for a view has work to do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Load;
use crate::cluster::allow::Allow;
use crate::cluster::metrics::ClusterMetrics;
use crate::cluster::node::{Node, NodeId, View, check_name};

/// The most nodes of a view. Gossip ends far below; it bounds what a liar can make us hold.
pub(in crate::cluster) const NODES_MAX: usize = 20_000;
/// The longest version of a program.
const VERSION_MAX_BYTES: usize = 64;
/// How long another address may have our name: longer than what we were before a restart at another
/// address is believed to live.
const CLASH_AFTER: Duration = Duration::from_secs(30);

/// A node that is said to live.
#[derive(Clone, Debug)]
pub(in crate::cluster) struct Claim {
    /// What is said of it.
    pub node: Node,
    /// The larger, the later it was started.
    pub generation: u64,
}

impl Claim {
    /// A node as it was known before; whatever is heard of it now replaces it.
    pub(super) fn old(node: Node) -> Self {
        Claim {
            node,
            generation: 0,
        }
    }
}

/// Takes a claim, with what is only for people made harmless; `None` where it makes no sense, or is of
/// no network that peers may be in.
pub(super) fn admit(mut node: Node, allow: &Allow) -> Option<Node> {
    let address = node.address.ip();
    let reachable = node.address.port() != 0
        && !address.is_unspecified()
        && !address.is_multicast()
        && allow.permits(address);
    let named =
        check_name(&node.zone).is_ok() && (node.rack.is_empty() || check_name(&node.rack).is_ok());
    if !reachable || !named {
        return None;
    }
    let plain = node.version.bytes().all(|byte| byte.is_ascii_graphic());
    if !plain || node.version.len() > VERSION_MAX_BYTES {
        node.version = String::new();
    }
    node.load = node.load.min(100);
    Some(node)
}

/// The view, and what led to it.
#[derive(Debug)]
pub(super) struct Roster {
    view: Arc<View>,
    allow: Allow,
    /// Since when another address has our name.
    clash: Option<Instant>,
    clash_said: bool,
    overfull_said: bool,
    metrics: ClusterMetrics,
}

impl Roster {
    pub(super) fn new(me: Node, allow: Allow, metrics: ClusterMetrics) -> Self {
        let view = Arc::new(View::alone(me));
        metrics.know(&view, 0, 0);
        Roster {
            view,
            allow,
            clash: None,
            clash_said: false,
            overfull_said: false,
            metrics,
        }
    }

    pub(super) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Takes all claims that hold now, and what the node itself is; gives the new view, if it is one.
    pub(super) fn update(
        &mut self,
        claims: Vec<Claim>,
        me: Node,
        now: Instant,
    ) -> Option<Arc<View>> {
        let mut newest: BTreeMap<NodeId, Claim> = BTreeMap::new();
        let mut clash = None;
        for Claim { node, generation } in claims {
            let Some(node) = admit(node, &self.allow) else {
                continue;
            };
            if node.id == me.id {
                if node.address != me.address {
                    clash = Some(node.address);
                }
                continue;
            }
            let claim = Claim { node, generation };
            let rank = |claim: &Claim| (claim.generation, claim.node.address);
            match newest.get(&claim.node.id) {
                Some(known) if rank(known) >= rank(&claim) => {}
                Some(_) => drop(newest.insert(claim.node.id.clone(), claim)),
                None if newest.len() < NODES_MAX => {
                    newest.insert(claim.node.id.clone(), claim);
                }
                None if self.overfull_said => {}
                None => {
                    self.overfull_said = true;
                    tracing::warn!(most = NODES_MAX, "more nodes than a view holds");
                }
            }
        }
        self.judge_clash(clash, &me, now);

        let others = newest.into_values().map(|claim| claim.node).collect();
        let view = View { me, others };
        if !differs(&self.view, &view) {
            return None;
        }
        let (joined, left) = moves(&self.view.others, &view.others);
        if joined + left > 0 {
            let nodes = view.others.len() + 1;
            tracing::info!(joined, left, nodes, "the cluster changed");
        }
        self.metrics.know(&view, joined, left);
        self.view = Arc::new(view);
        Some(Arc::clone(&self.view))
    }

    fn judge_clash(&mut self, clash: Option<std::net::SocketAddr>, me: &Node, now: Instant) {
        let Some(address) = clash else {
            self.clash = None;
            return;
        };
        let since = *self.clash.get_or_insert(now);
        if now.duration_since(since) >= CLASH_AFTER && !self.clash_said {
            self.clash_said = true;
            tracing::error!(
                name = %me.id,
                ours = %me.address,
                theirs = %address,
                "another node has the name of this one, and is ignored: give one another cluster.name"
            );
        }
    }
}

/// Whether two views, both sorted, differ in more than a little load.
fn differs(old: &View, new: &View) -> bool {
    let node_differs = |old: &Node, new: &Node| {
        let mut alike = new.clone();
        (alike.load, alike.free_slots) = (old.load, old.free_slots);
        alike != *old || Load::of(old).differs(Load::of(new))
    };
    old.others.len() != new.others.len()
        || node_differs(&old.me, &new.me)
        || std::iter::zip(&old.others, &new.others).any(|(old, new)| node_differs(old, new))
}

/// How many nodes came and went between two sorted lists.
fn moves(old: &[Node], new: &[Node]) -> (usize, usize) {
    let missing = |from: &[Node], of: &[Node]| {
        let known = |node: &&Node| of.binary_search_by(|other| other.id.cmp(&node.id)).is_ok();
        from.iter().filter(|node| !known(node)).count()
    };
    (missing(new, old), missing(old, new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::node::Role;

    fn node(id: &str) -> Node {
        Node {
            id: NodeId::parse(id).unwrap(),
            zone: "z".into(),
            rack: String::new(),
            role: Role::Node,
            address: ([10, 0, 0, 1], 9641).into(),
            version: "0.1.0".into(),
            protocol: 1,
            load: 0,
            free_slots: 16,
        }
    }

    fn claim(node: Node) -> Claim {
        Claim {
            node,
            generation: 1,
        }
    }

    fn roster() -> (Roster, Node) {
        let mut me = node("me");
        me.address = ([10, 0, 0, 9], 9641).into();
        let roster = Roster::new(me.clone(), Allow::default(), ClusterMetrics::new());
        (roster, me)
    }

    fn ids(view: &View) -> Vec<&str> {
        view.others.iter().map(|node| node.id.as_str()).collect()
    }

    #[test]
    fn claims_that_make_no_sense_do_not_count() {
        let allow = Allow::new(vec!["10.0.0.0/8".parse().unwrap()]);
        type Change = fn(&mut Node);
        let cases: [(&str, Change, bool); 12] = [
            ("good", |_| {}, true),
            ("rack", |node| node.rack = "r-1".into(), true),
            ("zone", |node| node.zone = String::new(), false),
            ("zone", |node| node.zone = "a b".into(), false),
            ("zone", |node| node.zone = "z".repeat(254), false),
            ("rack", |node| node.rack = "\n".into(), false),
            ("port", |node| node.address.set_port(0), false),
            ("any", |node| node.address = ([0, 0, 0, 0], 1).into(), false),
            (
                "multicast",
                |node| node.address = ([224, 0, 0, 1], 1).into(),
                false,
            ),
            (
                "network",
                |node| node.address = ([11, 0, 0, 1], 1).into(),
                false,
            ),
            ("version", |node| node.version = "x".repeat(65), true),
            ("version", |node| node.version = "1\n2".into(), true),
        ];
        for (case, change, good) in cases {
            let mut changed = node("a");
            change(&mut changed);
            changed.load = 200;
            let admitted = admit(changed, &allow);
            assert_eq!(admitted.is_some(), good, "{case}");
            if let Some(admitted) = admitted {
                assert_eq!(admitted.load, 100);
                let expected = if case == "version" { "" } else { "0.1.0" };
                assert_eq!(admitted.version, expected);
            }
        }
    }

    #[test]
    fn views_are_sorted_and_made_only_where_something_changed() {
        let (mut roster, me) = roster();
        let now = Instant::now();
        assert!(roster.update(vec![], me.clone(), now).is_none());
        let both = || vec![claim(node("b")), claim(node("a"))];
        let view = roster.update(both(), me.clone(), now).unwrap();
        assert_eq!(ids(&view), ["a", "b"]);
        assert_eq!(roster.metrics.moves(), (2, 0));
        assert!(roster.update(both(), me.clone(), now).is_none());

        // A little load is not worth a view; much is, and so is the last slot.
        let mut claims = both();
        claims[0].node.load = 5;
        assert!(roster.update(claims.clone(), me.clone(), now).is_none());
        claims[0].node.load = 10;
        let view = roster.update(claims.clone(), me.clone(), now).unwrap();
        assert_eq!(view.others[1].load, 10);
        claims[1].node.free_slots = 0;
        assert!(roster.update(claims.clone(), me.clone(), now).is_some());

        // Drift adds up: it is the last view that counts.
        for (load, published) in [(14, false), (18, false), (20, true)] {
            claims[0].node.load = load;
            let view = roster.update(claims.clone(), me.clone(), now);
            assert_eq!(view.is_some(), published, "{load}");
        }

        claims[0].node.rack = "r".into();
        assert!(roster.update(claims, me.clone(), now).is_some());
        let view = roster.update(vec![claim(node("c"))], me.clone(), now);
        assert_eq!(ids(&view.unwrap()), ["c"]);
        assert_eq!(roster.metrics.moves(), (3, 2));
        let mut busy = me;
        busy.load = 60;
        let view = roster.update(vec![claim(node("c"))], busy, now).unwrap();
        assert_eq!(view.me.load, 60);
        assert_eq!(roster.view().me.load, 60);
    }

    #[test]
    fn the_newest_of_a_name_counts_in_any_order() {
        let (old, mut new) = (claim(node("a")), claim(node("a")));
        new.generation = 2;
        new.node.address = ([10, 0, 0, 2], 9641).into();
        for claims in [vec![old.clone(), new.clone()], vec![new.clone(), old]] {
            let (mut roster, me) = roster();
            let view = roster.update(claims, me, Instant::now()).unwrap();
            assert_eq!(view.others, [new.node.clone()]);
        }
    }

    #[test]
    fn our_own_name_is_ours() {
        let (mut roster, me) = roster();
        let begin = Instant::now();
        let mut thief = claim(node("me"));
        thief.generation = 9;
        let at = |roster: &mut Roster, claims: &[&Claim], seconds: u64| {
            let claims = claims.iter().map(|claim| (*claim).clone()).collect();
            let now = begin + Duration::from_secs(seconds);
            assert!(roster.update(claims, me.clone(), now).is_none());
            roster.clash_said
        };
        // What we were a moment ago, at the same address or at another, is no clash.
        assert!(!at(&mut roster, &[&claim(me.clone())], 0));
        assert!(!at(&mut roster, &[&thief], 1));
        assert!(!at(&mut roster, &[&thief], 30));
        assert!(!at(&mut roster, &[], 31));
        assert!(!at(&mut roster, &[&thief], 32));
        assert!(!at(&mut roster, &[&thief], 61));
        // One that stays is.
        assert!(at(&mut roster, &[&thief], 62));
        assert_eq!(roster.view().me, me);
    }

    #[test]
    fn a_view_is_bounded() {
        let (mut roster, me) = roster();
        let claims = (0..NODES_MAX + 5).map(|number| claim(node(&format!("n{number}"))));
        let view = roster.update(claims.collect(), me, Instant::now()).unwrap();
        assert_eq!(view.others.len(), NODES_MAX);
        assert!(roster.overfull_said);
    }
}
