// SPDX-License-Identifier: Apache-2.0
//! Which of the nodes that could have something is asked first, and when a second one is asked.
//!
//! [`Scores`] keeps, for each node that was asked, what it was like: smoothed latency to the first byte
//! and throughput (exponential averages), the latest latencies for their 95th percentile, and what went
//! wrong. From these come an order of candidates, a pause for who failed, and the moment to hedge.
//!
//! Order: nearest first (rack, zone, elsewhere); at one distance who has free slots, then the expected time
//! of a small answer in powers of two, then who told a load of less than half. Steps instead of exact values
//! keep noise from deciding: load is told once a second and is old news in a burst, and a thousand nodes
//! that decide alike make one node slow. Between equals a hash with the node's own seed decides. The names of
//! a busy answer are put in order by distance only ([`Scores::order_named`]). The homes of a piece are not
//! candidates in this sense: their order is the order of [`homes`](super::home::homes), or a piece would have
//! many.
//!
//! Pauses double while a node goes on failing, and end with an answer. A lie (bytes of another digest) is
//! remembered for longer than it is punished, and answers do not atone for it.
//!
//! Invariants: the table is bounded, the longest unused node is dropped; the order never names this
//! node, a leech, an avoided node, one that is not in the view, or one twice.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use lru::LruCache;
use tokio::time::Instant;

use super::node::{Distance, Node, NodeId, Role, View};

/// Nodes remembered, unless said otherwise: those that a node asks in turn, not the whole cluster.
pub const NODES_REMEMBERED: usize = 1024;

/// Weight of the newest measurement in the averages, in percent: about the last ten count.
const NEWEST_PERCENT: u64 = 20;
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
/// A full node is not asked first again for so long: a few uploads end meanwhile.
const BUSY_FOR: Duration = Duration::from_millis(100);
/// How long a node that is late is not asked, unless it answers, or a probe: until gossip has noticed.
const LATE_FOR: Duration = Duration::from_secs(10);
/// Half of the slots: the finer steps are, the more nodes decide alike.
const CROWDED_PERCENT: u8 = 50;
/// Bytes of the answer whose time is compared: a few chunks.
const TYPICAL_BYTES: u64 = 256 << 10;
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
        /// Bytes of the answer.
        bytes: u64,
        /// From the request to the last byte.
        took: Duration,
    },
    /// It had no free slot. No fault, but it is not asked first for a moment.
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
    /// Smoothed, in microseconds.
    first_byte: Option<u64>,
    /// Smoothed, in bytes per second; only answers that took measurable time.
    throughput: Option<u64>,
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
    busy_until: Option<Instant>,
}

impl Score {
    fn answered(&mut self, first_byte: Duration, bytes: u64, took: Duration) {
        let micros = u64::try_from(first_byte.as_micros()).unwrap_or(u64::MAX);
        self.first_byte = Some(smooth(self.first_byte, micros));
        self.latest[self.measured % WINDOW] = u32::try_from(micros).unwrap_or(u32::MAX);
        self.measured += 1;
        let streamed = took.saturating_sub(first_byte).as_micros();
        let rate = u128::from(bytes)
            .saturating_mul(1_000_000)
            .checked_div(streamed);
        if let Some(rate) = rate {
            let rate = u64::try_from(rate).unwrap_or(u64::MAX);
            self.throughput = Some(smooth(self.throughput, rate));
        }
        self.faults = 0;
        self.lacks = 0;
        self.busy_until = None;
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

fn smooth(before: Option<u64>, newest: u64) -> u64 {
    let Some(before) = before else { return newest };
    let [before, newest, part] = [before, newest, NEWEST_PERCENT].map(u128::from);
    let mean = (before * (100 - part) + newest * part) / 100;
    u64::try_from(mean).unwrap_or(u64::MAX)
}

fn later(moment: Option<Instant>, now: Instant) -> bool {
    moment.is_some_and(|moment| moment > now)
}

/// What is known of the nodes that were asked.
#[derive(Debug)]
pub struct Scores {
    nodes: LruCache<NodeId, Score>,
    capacity: usize,
    seed: u64,
    /// When the last pause of all ends: mostly nobody is avoided, and nobody need be looked up.
    avoided_until: Option<Instant>,
}

impl Scores {
    /// Nothing is known yet. `seed` decides between equals; let it differ from node to node.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with_capacity(seed, NODES_REMEMBERED)
    }

    /// As [`Scores::new`], remembering at most `capacity` nodes.
    #[must_use]
    pub fn with_capacity(seed: u64, capacity: usize) -> Self {
        Scores {
            // Bounded below: the bounded kind allocates its table at once.
            nodes: LruCache::unbounded(),
            capacity,
            seed,
            avoided_until: None,
        }
    }

    /// Takes note of how a request to `node` ended.
    pub fn observe(&mut self, node: &NodeId, outcome: Outcome, now: Instant) {
        let score = self.nodes.get_or_insert_mut_ref(node, Score::default);
        match outcome {
            Outcome::Answered {
                first_byte,
                bytes,
                took,
            } => score.answered(first_byte, bytes, took),
            Outcome::Busy => score.busy_until = now.checked_add(BUSY_FOR),
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

    /// The candidates that may be asked, the best first; which of equals is first depends on the seed.
    #[must_use]
    pub fn order(&self, view: &View, candidates: &[NodeId], now: Instant) -> Vec<NodeId> {
        self.order_by(view, candidates, now, |_, node| {
            let mut tie = DefaultHasher::new();
            (self.seed, &node.id).hash(&mut tie);
            (self.rank(view.distance(node), node, now), tie.finish())
        })
    }

    /// The names of a busy answer that may be asked: nearest first, else in their order.
    ///
    /// Who named them gave each asker another first one, and so made a tree that is as flat as can be. An
    /// asker that put those first who look better to it would spoil that: in a burst all look alike, and what
    /// is known of them is older than the burst.
    #[must_use]
    pub fn order_named(&self, view: &View, names: &[NodeId], now: Instant) -> Vec<NodeId> {
        self.order_by(view, names, now, |place, node| (view.distance(node), place))
    }

    fn order_by<R: Ord>(
        &self,
        view: &View,
        candidates: &[NodeId],
        now: Instant,
        rank: impl Fn(usize, &Node) -> R,
    ) -> Vec<NodeId> {
        let mut ranked: Vec<_> = candidates
            .iter()
            .enumerate()
            .filter(|(_, id)| **id != view.me.id && !self.is_avoided(id, now))
            .filter_map(|(place, id)| Some((place, view.node(id)?)))
            .filter(|(_, node)| node.role != Role::Leech)
            .map(|(place, node)| (rank(place, node), &node.id))
            .collect();
        ranked.sort_unstable();
        let mut order: Vec<NodeId> = Vec::with_capacity(ranked.len());
        for (_, id) in ranked {
            if !order.contains(id) {
                order.push(id.clone());
            }
        }
        order
    }

    /// What a node is ordered by, the best least.
    fn rank(&self, distance: Distance, node: &Node, now: Instant) -> impl Ord + use<> {
        let score = self.nodes.peek(&node.id);
        let full = node.free_slots == 0 || score.is_some_and(|score| later(score.busy_until, now));
        // Who was never asked is taken for a healthy node at its distance, so that it is tried.
        let usual = match distance {
            Distance::Rack => 500,
            Distance::Zone => 1_000,
            Distance::Elsewhere => 20_000,
        };
        let micros = score.and_then(|score| score.first_byte).unwrap_or(usual);
        let streaming = score.and_then(|score| score.throughput).map_or(0, |rate| {
            TYPICAL_BYTES.saturating_mul(1_000_000) / rate.max(1)
        });
        let time = micros.saturating_add(streaming);
        (
            distance,
            full,
            u64::BITS - time.leading_zeros(),
            node.load / CROWDED_PERCENT,
        )
    }

    /// How long to wait for the first byte of `node` before a second one is asked.
    #[must_use]
    pub fn hedge_after(&self, node: &NodeId, _now: Instant) -> Duration {
        let known = self.nodes.peek(node).and_then(Score::p95);
        known.map_or(HEDGE_DEFAULT, |p95| p95.clamp(HEDGE_MIN, HEDGE_MAX))
    }

    /// Smoothed latency to the first byte of `node`, once it has answered.
    #[must_use]
    pub fn latency(&self, node: &NodeId) -> Option<Duration> {
        let micros = self.nodes.peek(node)?.first_byte?;
        Some(Duration::from_micros(micros))
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
