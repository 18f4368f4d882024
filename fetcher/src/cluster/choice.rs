// SPDX-License-Identifier: Apache-2.0
//! Which nodes are left alone for a while, in which order those are asked that a busy node names, and when a
//! second one is asked.
//!
//! [`Scores`] keeps, for each node that was asked, its latest latencies to the first byte and what went wrong.
//! From these come a pause for who failed, and the moment to hedge.
//!
//! What is measured of nodes orders none of them ([`Scores::order_named`] says why): the homes of a piece are in
//! the order of [`homes`](super::home::homes), or a piece would have many, and names come nearest first.
//!
//! Pauses double while a node goes on failing, and end with an answer. A lie (bytes of another digest) is
//! remembered for longer than it is punished, and answers do not atone for it.
//!
//! Invariants: the table is bounded, the longest unused node is dropped; the order never names this
//! node, a leech, an avoided node, one that is not in the view, or one twice.

use std::time::Duration;

use lru::LruCache;
use tokio::time::Instant;

use super::node::{NodeId, Role, View};

/// Nodes remembered, unless said otherwise: those that a node asks in turn, not the whole cluster.
pub const NODES_REMEMBERED: usize = 1024;

/// Latencies kept per node: the second largest of them is their 95th percentile.
const WINDOW: usize = 20;
/// From so many latencies on their percentile means something.
const ENOUGH: usize = 8;
/// When to hedge while nothing is known: later than any healthy node in a zone, sooner than a person notices.
const HEDGE_DEFAULT: Duration = Duration::from_millis(250);
/// Never sooner: a garbage collection or a scheduler's slice must not double the traffic.
const HEDGE_MIN: Duration = Duration::from_millis(20);
/// Never later: who takes so long is the very node to hedge against.
const HEDGE_MAX: Duration = Duration::from_secs(2);
/// How long a node that is late is not asked, unless it answers, or a probe: until gossip has noticed.
const LATE_FOR: Duration = Duration::from_secs(10);
/// A lie is forgotten so long after the last one.
const LIES_REMEMBERED: Duration = Duration::from_secs(3600);
/// How often in a row a node may lack what it is said to have: an eviction is no fault.
const LACKS_EXCUSED: u32 = 2;

/// How a request to a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It answered in full.
    Answered {
        /// From the request to the first byte.
        first_byte: Duration,
    },
    /// It had no free slot: no fault.
    Busy,
    /// It did not have what it was said to have.
    Lacked,
    /// It could not be reached, or broke off.
    Failed,
    /// It gave no sign of life in a time in which nodes usually do, and is waited for still. Others are asked
    /// meanwhile, so that not each request finds that out anew.
    Late,
    /// It was given up as too slow.
    Slow,
    /// It answered a probe: it is there, whether or not it is quick. Ends the doubt that one silence makes;
    /// a node that is silent again in spite of it has its pause.
    Reached,
    /// It sent bytes of another digest.
    Lied,
}

/// A pause that doubles with each further fault.
struct Pause {
    first: Duration,
    max: Duration,
}

const FAILED: Pause = Pause {
    first: Duration::from_millis(500),
    max: Duration::from_secs(30),
};
/// Longer than the failure of a process that is started again: a host that is silent is mostly gone, each
/// further request to it costs a reader as much again, and the others need a while to notice.
const SLOW: Pause = Pause {
    first: Duration::from_secs(2),
    max: Duration::from_secs(60),
};
const LACKED: Pause = Pause {
    first: Duration::from_secs(1),
    max: Duration::from_secs(30),
};
const LIED: Pause = Pause {
    first: Duration::from_secs(60),
    max: Duration::from_secs(600),
};

impl Pause {
    /// The pause after fault number `count`, counted from 1.
    fn after(&self, count: u32) -> Duration {
        let doublings = count.saturating_sub(1).min(16);
        self.first.saturating_mul(1 << doublings).min(self.max)
    }
}

/// What a node was like.
#[derive(Clone, Debug, Default)]
struct Score {
    /// The latest latencies in microseconds, as a ring.
    latest: [u32; WINDOW],
    measured: usize,
    faults: u32,
    lacks: u32,
    lies: u32,
    last_lie: Option<Instant>,
    avoided_until: Option<Instant>,
    /// When anything came of it last.
    heard: Option<Instant>,
    /// As `avoided_until`, for silence: an answer ends it.
    doubted_until: Option<Instant>,
}

impl Score {
    fn answered(&mut self, first_byte: Duration) {
        let micros = u32::try_from(first_byte.as_micros()).unwrap_or(u32::MAX);
        self.latest[self.measured % WINDOW] = micros;
        self.measured += 1;
        self.faults = 0;
        self.lacks = 0;
        self.doubted_until = None;
    }

    fn avoid(&mut self, now: Instant, pause: Duration) {
        self.avoided_until = self.avoided_until.max(now.checked_add(pause));
    }

    fn doubt(&mut self, now: Instant, pause: Duration) {
        self.doubted_until = self.doubted_until.max(now.checked_add(pause));
    }

    fn is_avoided(&self, now: Instant) -> bool {
        later(self.avoided_until, now) || later(self.doubted_until, now)
    }

    fn p95(&self) -> Option<Duration> {
        let known = self.measured.min(WINDOW);
        if known < ENOUGH {
            return None;
        }
        let mut sorted = self.latest;
        let sorted = &mut sorted[..known];
        sorted.sort_unstable();
        // Nearest rank.
        let rank = (known * 95).div_ceil(100);
        Some(Duration::from_micros(sorted[rank - 1].into()))
    }
}

fn later(moment: Option<Instant>, now: Instant) -> bool {
    moment.is_some_and(|moment| moment > now)
}

/// What is known of the nodes that were asked.
#[derive(Debug)]
pub struct Scores {
    nodes: LruCache<NodeId, Score>,
    capacity: usize,
    /// When the last pause of all ends: mostly nobody is avoided, and nobody need be looked up.
    avoided_until: Option<Instant>,
}

impl Default for Scores {
    fn default() -> Self {
        Self::with_capacity(NODES_REMEMBERED)
    }
}

impl Scores {
    /// Nothing is known yet; at most `capacity` nodes are remembered.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Scores {
            // Bounded below: the bounded kind allocates its table at once.
            nodes: LruCache::unbounded(),
            capacity,
            avoided_until: None,
        }
    }

    /// Takes note of how a request to `node` ended.
    pub fn observe(&mut self, node: &NodeId, outcome: Outcome, now: Instant) {
        let score = self.nodes.get_or_insert_mut_ref(node, Score::default);
        match outcome {
            Outcome::Answered { first_byte } => score.answered(first_byte),
            Outcome::Busy => {}
            Outcome::Lacked => {
                score.lacks = score.lacks.saturating_add(1);
                if score.lacks > LACKS_EXCUSED {
                    score.avoid(now, LACKED.after(score.lacks - LACKS_EXCUSED));
                }
            }
            Outcome::Late => score.doubt(now, LATE_FOR),
            Outcome::Failed | Outcome::Slow => {
                // What was under way fails with the first: one misfortune, not many.
                if score.faults == 0 || !score.is_avoided(now) {
                    score.faults = score.faults.saturating_add(1);
                }
                match outcome {
                    Outcome::Slow => score.doubt(now, SLOW.after(score.faults)),
                    _ => score.avoid(now, FAILED.after(score.faults)),
                }
            }
            Outcome::Reached if score.faults > 1 => {}
            Outcome::Reached => score.doubted_until = None,
            Outcome::Lied => {
                let old = score.last_lie.is_none_or(|at| now - at > LIES_REMEMBERED);
                score.lies = if old { 1 } else { score.lies.saturating_add(1) };
                score.last_lie = Some(now);
                score.avoid(now, LIED.after(score.lies));
            }
        }
        let until = score.avoided_until.max(score.doubted_until);
        self.avoided_until = self.avoided_until.max(until);
        self.drop_surplus();
    }

    /// Whether `node` is left alone for the moment.
    #[must_use]
    pub fn is_avoided(&self, node: &NodeId, now: Instant) -> bool {
        let score = || self.nodes.peek(node);
        later(self.avoided_until, now) && score().is_some_and(|score| score.is_avoided(now))
    }

    /// Takes note that something came of a node, on whatever stream.
    pub fn heard(&mut self, node: &NodeId, now: Instant) {
        self.nodes.get_or_insert_mut_ref(node, Score::default).heard = Some(now);
        self.drop_surplus();
    }

    fn drop_surplus(&mut self) {
        while self.nodes.len() > self.capacity {
            self.nodes.pop_lru();
        }
    }

    /// When something came of a node last: one answer may be slow on a full line, but not all of them.
    #[must_use]
    pub fn last_heard(&self, node: &NodeId) -> Option<Instant> {
        self.nodes.peek(node)?.heard
    }

    /// Nodes that are avoided because they were silent: a probe would tell more.
    #[must_use]
    pub fn doubted(&self, now: Instant) -> Vec<NodeId> {
        if !later(self.avoided_until, now) {
            return Vec::new();
        }
        let doubted = |score: &Score| later(score.doubted_until, now);
        let nodes = self.nodes.iter().filter(|(_, score)| doubted(score));
        nodes.map(|(id, _)| id.clone()).collect()
    }

    /// The names of a busy answer that may be asked: nearest first, else in their order.
    ///
    /// Who named them gave each asker another first one, and so made a tree that is as flat as can be. An
    /// asker that put those first who look better to it would spoil that: in a burst all look alike, and what
    /// is known of them is older than the burst.
    #[must_use]
    pub fn order_named(&self, view: &View, names: &[NodeId], now: Instant) -> Vec<NodeId> {
        let mut ranked: Vec<_> = names
            .iter()
            .enumerate()
            .filter(|(_, id)| **id != view.me.id && !self.is_avoided(id, now))
            .filter_map(|(place, id)| Some((place, view.node(id)?)))
            .filter(|(_, node)| node.role != Role::Leech)
            .map(|(place, node)| (view.distance(node), place, &node.id))
            .collect();
        ranked.sort_unstable();
        let mut order: Vec<NodeId> = Vec::with_capacity(ranked.len());
        for (.., id) in ranked {
            if !order.contains(id) {
                order.push(id.clone());
            }
        }
        order
    }

    /// How long to wait for the first byte of `node` before a second one is asked.
    #[must_use]
    pub fn hedge_after(&self, node: &NodeId, _now: Instant) -> Duration {
        let known = self.nodes.peek(node).and_then(Score::p95);
        known.map_or(HEDGE_DEFAULT, |p95| p95.clamp(HEDGE_MIN, HEDGE_MAX))
    }

    /// How many nodes are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

#[cfg(test)]
mod tests;
