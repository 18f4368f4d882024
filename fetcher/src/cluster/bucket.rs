// SPDX-License-Identifier: Apache-2.0
//! Bytes per second: pure.
//!
//! A [`TokenBucket`] lets everybody take what they need at once and says how long they must then sleep:
//! whoever overdraws it pays with time, and whoever comes next queues behind that debt. So a request larger
//! than the burst is possible, order is kept without a queue, and no timer runs while nobody waits.

use std::time::Duration;

use tokio::time::Instant;

use super::home::{HomeLimit, eligible};
use super::node::View;

/// Nanoseconds of a second: the balance is counted in bytes times these, so that nothing is lost in rounding.
const NANOS: i128 = 1_000_000_000;

/// Of a budget of the whole zone, what is left to those that are no homes, as 1 / this. They go to the
/// origin only when no home answers.
const OTHERS_PART: u64 = 10;

/// A limit of bytes per second.
///
/// Invariant: who sleeps as told has, by any moment, moved at most burst + rate x time.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// 0: no limit.
    rate: u64,
    burst: u64,
    /// Bytes times [`NANOS`]; negative while there is a debt.
    balance: i128,
    at: Instant,
}

impl TokenBucket {
    /// A full bucket: `rate` in bytes per second, 0 for no limit; `burst` bytes are free after a rest.
    #[must_use]
    pub fn new(rate: u64, burst: u64, now: Instant) -> Self {
        TokenBucket {
            rate,
            burst,
            balance: i128::from(burst) * NANOS,
            at: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_nanos();
        let earned = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.rate.into());
        self.balance = self.balance.saturating_add(earned);
        self.cap();
        self.at = self.at.max(now);
    }

    fn cap(&mut self) {
        self.balance = self.balance.min(i128::from(self.burst) * NANOS);
    }

    /// Takes `bytes`, and says how long to sleep before they are moved.
    #[must_use]
    pub fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        self.refill(now);
        self.balance = self.balance.saturating_sub(i128::from(bytes) * NANOS);
        self.debt()
    }

    /// How long somebody who takes nothing would have to wait for the debt to be paid.
    #[must_use]
    pub fn wait(&mut self, now: Instant) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        self.refill(now);
        self.debt()
    }

    fn debt(&self) -> Duration {
        let owed = self.balance.min(0).unsigned_abs();
        let nanos = owed.div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `bytes` if nobody would have to wait now; says whether it did.
    #[must_use]
    pub fn try_take(&mut self, bytes: u64, now: Instant) -> bool {
        let free = self.wait(now).is_zero();
        if free {
            let _debt = self.take(bytes, now);
        }
        free
    }

    /// Gives back `bytes` that were taken and not moved.
    pub fn refund(&mut self, bytes: u64) {
        self.balance = self
            .balance
            .saturating_add(i128::from(bytes).saturating_mul(NANOS));
        self.cap();
    }

    /// Changes the rate from now on; what is saved or owed stays.
    pub fn set_rate(&mut self, rate: u64, now: Instant) {
        if self.rate == 0 {
            self.at = now;
        }
        self.refill(now);
        self.rate = rate;
    }
}

/// This node's share of a limit that is meant for its whole zone; 0 (no limit) stays 0.
///
/// The homes share it alike. Where there are others than homes, these share a small part, because a way to
/// the origin always remains. All shares together are the limit at most, but for the least share of 1.
#[must_use]
pub fn share(total: u64, view: &View, limit: HomeLimit) -> u64 {
    if total == 0 {
        return 0;
    }
    let count = |nodes: usize| u64::try_from(nodes).unwrap_or(u64::MAX);
    let homes = eligible(view, &view.me.zone, limit);
    let is_home = homes.iter().any(|home| home.id == view.me.id);
    let homes = count(homes.len());
    let all = count(view.in_zone(&view.me.zone).count());
    let others = all.saturating_sub(homes);
    let (part, among) = match (homes, others) {
        (0, _) => (total, all),
        (_, 0) => (total, homes),
        _ if is_home => (total - total / OTHERS_PART, homes),
        _ => (total / OTHERS_PART, others),
    };
    (part / among.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock;
    use crate::cluster::node::{Node, NodeId, Role};

    const MB: u64 = 1_000_000;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn burst_then_rate_then_rest() {
        let start = clock::now();
        let mut bucket = TokenBucket::new(MB, MB / 2, start);
        // When, how much, and the sleep that follows.
        let steps = [
            (0, 500_000, 0),
            (0, 100_000, 100),
            (0, 100_000, 200),
            (200, 50_000, 50),
            (250, 0, 0),
            // After a long rest: the burst and no more.
            (60_000, 600_000, 100),
            // Far above the burst.
            (60_100, 10_000_000, 10_000),
        ];
        for (at, bytes, sleep) in steps {
            assert_eq!(
                bucket.take(bytes, start + ms(at)),
                ms(sleep),
                "{bytes} bytes at {at}"
            );
        }
        assert_eq!(bucket.wait(start + ms(60_100)), ms(10_000));
        bucket.refund(5_000_000);
        assert_eq!(bucket.wait(start + ms(60_100)), ms(5_000));
        bucket.refund(u64::MAX);
        assert_eq!(bucket.take(600_000, start + ms(60_100)), ms(100));
    }

    #[test]
    fn no_limit_and_a_limit_that_changes() {
        let start = clock::now();
        let mut bucket = TokenBucket::new(0, MB, start);
        assert_eq!(bucket.take(u64::MAX, start), ms(0));
        let later = start + ms(1000);
        bucket.set_rate(MB, later);
        assert_eq!(bucket.take(2 * MB, later), ms(1000));
        bucket.set_rate(2 * MB, later);
        assert_eq!(bucket.wait(later), ms(500));
        bucket.set_rate(0, later);
        assert_eq!(bucket.take(MB, later), ms(0));
    }

    #[test]
    fn time_that_goes_backwards_earns_nothing() {
        let start = clock::now() + ms(1000);
        let mut bucket = TokenBucket::new(MB, 0, start);
        assert_eq!(bucket.take(MB, start - ms(500)), ms(1000));
        assert_eq!(bucket.take(0, start), ms(1000));
    }

    fn node(name: usize, role: Role) -> Node {
        Node {
            id: NodeId::parse(&format!("n{name}")).unwrap(),
            zone: "z".into(),
            rack: String::new(),
            role,
            address: ([127, 0, 0, 1], 1).into(),
            version: String::new(),
            protocol: 1,
            load: 0,
            free_slots: 1,
        }
    }

    fn shares(total: u64, roles: &[Role]) -> Vec<u64> {
        let nodes: Vec<Node> = roles
            .iter()
            .enumerate()
            .map(|(at, role)| node(at, *role))
            .collect();
        let share_of = |at: usize| {
            let mut others = nodes.clone();
            let me = others.remove(at);
            let mut view = View { me, others };
            // Other zones do not count.
            let mut elsewhere = node(99, Role::Supernode);
            elsewhere.zone = "y".into();
            view.others.push(elsewhere);
            share(total, &view, HomeLimit::NONE)
        };
        (0..nodes.len()).map(share_of).collect()
    }

    #[test]
    fn homes_share_and_others_get_little() {
        use Role::{Leech, Node, Supernode};
        let cases: [(u64, &[Role], &[u64]); 7] = [
            (0, &[Node, Leech], &[0, 0]),
            (1000, &[Node], &[1000]),
            (1000, &[Node; 4], &[250; 4]),
            (1000, &[Node, Node, Leech], &[450, 450, 100]),
            (1000, &[Supernode, Node, Node], &[900, 50, 50]),
            (1000, &[Leech, Leech], &[500, 500]),
            (2, &[Node; 3], &[1; 3]),
        ];
        for (total, roles, expected) in cases {
            assert_eq!(shares(total, roles), expected, "{total} {roles:?}");
        }
    }

    fn any_role() -> impl Strategy<Value = Role> {
        prop_oneof![Just(Role::Node), Just(Role::Supernode), Just(Role::Leech)]
    }

    proptest! {
        #[test]
        fn shares_stay_within_the_limit(total in 1u64.., roles in prop::collection::vec(any_role(), 1..12)) {
            let shares = shares(total, &roles);
            prop_assert!(shares.iter().all(|share| *share > 0));
            let sum: u128 = shares.iter().map(|share| u128::from(*share)).sum();
            prop_assert!(sum <= u128::from(total) + shares.len() as u128);
        }

        /// Sleepers are served in order, and by any moment no more was moved than the limit allows.
        #[test]
        fn never_above_the_limit(
            rate in 1u64..1_000_000,
            burst in 0u64..1_000_000,
            takes in prop::collection::vec((0u64..400_000, 0u64..2000), 1..60),
        ) {
            let start = clock::now();
            let mut bucket = TokenBucket::new(rate, burst, start);
            let (mut now, mut moved, mut last) = (start, 0u128, start);
            for (bytes, pause) in takes {
                now += ms(pause);
                let at = now + bucket.take(bytes, now);
                prop_assert!(at >= last);
                last = at;
                moved += u128::from(bytes);
                let elapsed = (at - start).as_nanos();
                let allowed = u128::from(burst) + u128::from(rate) * elapsed / 1_000_000_000;
                prop_assert!(moved <= allowed, "{moved} of {allowed}");
            }
        }
    }
}
