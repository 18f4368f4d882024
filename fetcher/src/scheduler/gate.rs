// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is on the line.
//!
//! A transfer is *receiving* from its first byte until nothing more is wanted of it, or until no byte
//! came for a short lull. While a transfer of a higher priority is receiving, those below it do
//! not read their bodies and open no requests. While it only waits for its first byte, or stalls,
//! they go on: the line must not idle as long as anything is missing.
//!
//! Reading on is what fills the line, so not reading empties it: bodies in flight are bounded by the
//! size of a background request and by socket buffers.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock;
use crate::source::Priority;
use crate::store::lock;

/// All priorities, the most urgent first.
pub(crate) const PRIORITIES: [Priority; 3] =
    [Priority::Foreground, Priority::Boot, Priority::Background];

/// The place of a priority in [`PRIORITIES`].
pub(crate) const fn rank(priority: Priority) -> usize {
    match priority {
        Priority::Foreground => 0,
        Priority::Boot => 1,
        Priority::Background => 2,
    }
}

/// Since when there was no reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quiet {
    Always,
    Since(Instant),
}

/// How many transfers are receiving, by rank.
type Receiving = [u32; 3];

/// The gate that all transfers of a fetcher pass.
#[derive(Debug)]
pub(crate) struct Gate {
    receiving: watch::Sender<Receiving>,
    /// Requests of readers that are not answered yet.
    asking: AtomicUsize,
    last_foreground: Mutex<Option<Instant>>,
}

/// A reader's request that is not answered; dropped, it is, or has failed.
#[derive(Debug)]
pub(crate) struct Asking<'a>(&'a Gate);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        *lock(&self.0.last_foreground) = Some(clock::now());
        self.0.asking.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Gate {
    /// Nobody is receiving.
    pub(crate) fn new() -> Self {
        Self {
            receiving: watch::Sender::new([0; 3]),
            asking: AtomicUsize::new(0),
            last_foreground: Mutex::new(None),
        }
    }

    /// Whether a transfer of `priority` may read now.
    pub(crate) fn may_run(&self, priority: Priority) -> bool {
        turn(&self.receiving.borrow(), priority)
    }

    /// Waits until a transfer of the urgency `urgency` may read; it may change meanwhile. Cancel-safe.
    pub(crate) async fn turn(&self, urgency: &Urgency) {
        let mut receiving = self.receiving.subscribe();
        loop {
            let priority = urgency.effective();
            tokio::select! {
                biased;
                // The sender is in `self`: it cannot be closed.
                _ = receiving.wait_for(|receiving| turn(receiving, priority)) => return,
                // Who waits counts as nothing at the gate, so its promotion changes nothing there.
                () = urgency.differs(priority) => {}
            }
        }
    }

    /// Takes note that a reader's request goes out.
    pub(crate) fn asks(&self) -> Asking<'_> {
        self.asking.fetch_add(1, Ordering::AcqRel);
        Asking(self)
    }

    /// Since when no reader has asked for anything, nor was receiving; `None` if one does now.
    pub(crate) fn quiet_since(&self) -> Option<Quiet> {
        let busy = self.receiving.borrow()[0] > 0 || self.asking.load(Ordering::Acquire) > 0;
        (!busy).then(|| lock(&self.last_foreground).map_or(Quiet::Always, Quiet::Since))
    }

    fn shift(&self, from: Option<Priority>, to: Option<Priority>) {
        if [from, to].contains(&Some(Priority::Foreground)) {
            *lock(&self.last_foreground) = Some(clock::now());
        }
        self.receiving.send_modify(|receiving| {
            if let Some(from) = from {
                receiving[rank(from)] = receiving[rank(from)].saturating_sub(1);
            }
            if let Some(to) = to {
                receiving[rank(to)] += 1;
            }
        });
    }
}

fn turn(receiving: &Receiving, priority: Priority) -> bool {
    receiving[..rank(priority)].iter().all(|count| *count == 0)
}

/// How urgent a transfer is at the moment: as its most urgent waiter, or as it was started.
///
/// Locks: `state`, and inside it the gate's; the effective priority is read without a lock.
#[derive(Debug)]
pub(crate) struct Urgency {
    base: Priority,
    effective: AtomicU8,
    state: Mutex<UrgencyState>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct UrgencyState {
    /// Waiters by rank.
    wanted: [u32; 3],
    receiving: bool,
    /// What the gate counts it as.
    counted: Option<Priority>,
}

impl Urgency {
    /// Nobody waits yet.
    pub(crate) fn new(base: Priority) -> Self {
        let effective = AtomicU8::new(code(base));
        Self {
            base,
            effective,
            state: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// The priority at the moment.
    pub(crate) fn effective(&self) -> Priority {
        PRIORITIES[usize::from(self.effective.load(Ordering::Acquire))]
    }

    /// How many wait for it.
    pub(crate) fn waiters(&self) -> u32 {
        lock(&self.state).wanted.iter().sum()
    }

    /// Takes note of waiters that came (`true`) or went, by rank.
    pub(crate) fn waiting(&self, gate: &Gate, by_rank: [u32; 3], came: bool) {
        self.change(gate, |state| {
            for (wanted, count) in state.wanted.iter_mut().zip(by_rank) {
                *wanted = if came {
                    *wanted + count
                } else {
                    wanted.saturating_sub(count)
                };
            }
        });
    }

    /// Takes note that bytes flow, or do not.
    pub(crate) fn receiving(&self, gate: &Gate, receiving: bool) {
        self.change(gate, |state| state.receiving = receiving);
    }

    fn change(&self, gate: &Gate, change: impl FnOnce(&mut UrgencyState)) {
        let mut state = lock(&self.state);
        change(&mut state);
        let urgent = PRIORITIES
            .into_iter()
            .find(|priority| state.wanted[rank(*priority)] > 0);
        let effective = urgent.unwrap_or(self.base);
        let before = self.effective.swap(code(effective), Ordering::AcqRel);
        let counted = state.receiving.then_some(effective);
        if counted != state.counted {
            gate.shift(state.counted, counted);
            state.counted = counted;
        }
        if before != code(effective) {
            self.changed.send_replace(());
        }
    }

    /// Waits until the priority differs from `from`. Cancel-safe.
    pub(crate) async fn differs(&self, from: Priority) {
        let mut changed = self.changed.subscribe();
        while self.effective() == from {
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

const fn code(priority: Priority) -> u8 {
    match priority {
        Priority::Foreground => 0,
        Priority::Boot => 1,
        Priority::Background => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_more_urgent_goes_first() {
        let gate = Gate::new();
        let reader = Urgency::new(Priority::Foreground);
        let boot = Urgency::new(Priority::Boot);
        assert!(PRIORITIES.iter().all(|priority| gate.may_run(*priority)));
        boot.receiving(&gate, true);
        assert!(gate.may_run(Priority::Boot) && !gate.may_run(Priority::Background));
        reader.receiving(&gate, true);
        assert!(gate.may_run(Priority::Foreground) && !gate.may_run(Priority::Boot));
        reader.receiving(&gate, false);
        reader.receiving(&gate, false);
        boot.receiving(&gate, false);
        assert!(gate.may_run(Priority::Background));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_promotes_a_paused_transfer_and_lets_it_go_again() {
        let gate = Gate::new();
        let other = Urgency::new(Priority::Foreground);
        other.receiving(&gate, true);
        let paused = Urgency::new(Priority::Background);
        paused.receiving(&gate, true);
        let soon = Duration::from_millis(1);
        assert!(
            tokio::time::timeout(soon, gate.turn(&paused))
                .await
                .is_err()
        );
        paused.waiting(&gate, [1, 0, 0], true);
        assert_eq!(
            (paused.effective(), paused.waiters()),
            (Priority::Foreground, 1)
        );
        tokio::time::timeout(soon, gate.turn(&paused))
            .await
            .unwrap();
        paused.waiting(&gate, [1, 0, 0], false);
        assert!(
            tokio::time::timeout(soon, gate.turn(&paused))
                .await
                .is_err()
        );
        other.receiving(&gate, false);
        tokio::time::timeout(soon, gate.turn(&paused))
            .await
            .unwrap();
        let now = clock::now();
        assert_eq!(gate.quiet_since(), Some(Quiet::Since(now)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(gate.quiet_since(), Some(Quiet::Since(now)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_waits_for_an_answer_is_about() {
        let gate = Gate::new();
        assert_eq!(gate.quiet_since(), Some(Quiet::Always));
        let asking = gate.asks();
        let second = gate.asks();
        drop(asking);
        assert_eq!(gate.quiet_since(), None);
        tokio::time::advance(Duration::from_secs(2)).await;
        drop(second);
        assert_eq!(gate.quiet_since(), Some(Quiet::Since(clock::now())));
    }
    #[tokio::test(start_paused = true)]
    async fn a_reader_promotes_a_transfer_that_waits_already() {
        let gate = Gate::new();
        let other = Urgency::new(Priority::Foreground);
        other.receiving(&gate, true);
        // It has no byte yet: the gate does not count it.
        let waits = Urgency::new(Priority::Background);
        let second = Duration::from_secs(1);
        let promotion = async {
            tokio::time::sleep(second).await;
            waits.waiting(&gate, [1, 0, 0], true);
        };
        let turn = tokio::time::timeout(2 * second, gate.turn(&waits));
        let (turn, ()) = tokio::join!(turn, promotion);
        turn.unwrap();
    }
}
