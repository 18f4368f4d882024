// SPDX-License-Identifier: Apache-2.0
//! How many requests run at once: per origin on the network, and decodings per machine.
//!
//! Readers have slots of their own, so a miss starts at once whatever else runs; so have boot lists,
//! which would else wait for background requests that stand still for them. Who finds no slot waits, in
//! the order of coming; the number who can wait is bounded by the readers, by the length of boot lists,
//! and by the few requests of each prefetch.
//!
//! A transfer keeps a reader's slot after its readers are served, for what it reads ahead. When it is
//! paused and a reader finds no slot, it is asked to give its own up ([`Slots::plea`]).

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::gate::{Urgency, rank};
use crate::source::Priority;
use crate::store::lock;

/// How many slots there are of each kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotCounts {
    pub(crate) foreground: usize,
    pub(crate) boot: usize,
    pub(crate) background: usize,
}

/// A pool for each priority.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    pools: [Arc<Pool>; 3],
    plea: Arc<Plea>,
}

/// Slots of one kind, whose number may change.
#[derive(Debug)]
struct Pool {
    free: Arc<Semaphore>,
    size: Mutex<Size>,
}

#[derive(Debug)]
struct Size {
    slots: usize,
    /// Slots that are no more, and in use still.
    surplus: usize,
}

impl Pool {
    fn new(slots: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(slots)),
            size: Mutex::new(Size { slots, surplus: 0 }),
        }
    }

    fn resize(&self, slots: usize) {
        let mut size = lock(&self.size);
        if slots > size.slots {
            let more = slots - size.slots;
            let reused = more.min(size.surplus);
            size.surplus -= reused;
            self.free.add_permits(more - reused);
        } else {
            let fewer = size.slots - slots;
            size.surplus += fewer - self.free.forget_permits(fewer);
        }
        size.slots = slots;
    }

    /// A slot is not in use any more.
    fn give_back(&self, permit: OwnedSemaphorePermit) {
        let mut size = lock(&self.size);
        if size.surplus > 0 {
            size.surplus -= 1;
            permit.forget();
        }
    }
}

/// Readers that find no slot.
#[derive(Debug, Default)]
struct Plea {
    waiting: AtomicUsize,
    /// One is woken for each of them.
    made: Notify,
}

/// Counts a reader that waits for a slot.
struct Waiting<'a>(&'a Plea);

impl<'a> Waiting<'a> {
    fn new(plea: &'a Plea) -> Self {
        plea.waiting.fetch_add(1, Ordering::AcqRel);
        plea.made.notify_one();
        Self(plea)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The right to run; given back by being dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    pool: Arc<Pool>,
    /// It is one that is kept for readers.
    pub(crate) of_readers: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.pool.give_back(permit);
        }
    }
}

impl Slots {
    /// At least one slot of each kind.
    pub(crate) fn new(counts: SlotCounts) -> Self {
        // In the order of their ranks.
        let counts = [counts.foreground, counts.boot, counts.background];
        Self {
            pools: counts.map(|count| Arc::new(Pool::new(count.max(1)))),
            plea: Arc::default(),
        }
    }

    /// Changes how many there are, at least one of each kind. Those in use stay so.
    fn resize(&self, counts: SlotCounts) {
        let counts = [counts.foreground, counts.boot, counts.background];
        for (pool, count) in self.pools.iter().zip(counts) {
            pool.resize(count.max(1));
        }
    }

    /// Waits for a slot as urgent as `urgency` says, which may change meanwhile. Cancel-safe.
    pub(crate) async fn take(&self, urgency: &Urgency) -> Slot {
        loop {
            let priority = urgency.effective();
            let of_readers = priority == Priority::Foreground;
            let pool = &self.pools[rank(priority)];
            let slot = |permit| Slot {
                permit: Some(permit),
                pool: Arc::clone(pool),
                of_readers,
            };
            if let Ok(permit) = Arc::clone(&pool.free).try_acquire_owned() {
                return slot(permit);
            }
            let _waiting = of_readers.then(|| Waiting::new(&self.plea));
            tokio::select! {
                biased;
                permit = Arc::clone(&pool.free).acquire_owned() => match permit {
                    Ok(permit) => return slot(permit),
                    // The pools are never closed.
                    Err(_) => std::future::pending().await,
                },
                () = urgency.differs(priority) => {}
            }
        }
    }

    /// Waits until a reader needs a slot that this caller, and nobody else, is asked for. Cancel-safe.
    pub(crate) async fn plea(&self) {
        loop {
            self.plea.made.notified().await;
            // It may have found one meanwhile.
            if self.plea.waiting.load(Ordering::Acquire) > 0 {
                return;
            }
        }
    }
}

/// The slots of every origin.
#[derive(Debug)]
pub(crate) struct OriginSlots {
    counts: SlotCounts,
    by_host: Mutex<HashMap<String, Slots>>,
}

impl OriginSlots {
    pub(crate) fn new(counts: SlotCounts) -> Self {
        Self {
            counts,
            by_host: Mutex::default(),
        }
    }

    /// The slots of the host that a source's label begins with: `most` together, a third of each kind, where
    /// less than usual is allowed; but one of each at least.
    pub(crate) fn at_most(&self, label: &str, most: Option<usize>) -> Slots {
        let slots = self.of(label);
        if let Some(most) = most {
            let third = most / 3;
            slots.resize(SlotCounts {
                foreground: (most - 2 * third).min(self.counts.foreground),
                boot: third.min(self.counts.boot),
                background: third.min(self.counts.background),
            });
        }
        slots
    }

    /// The slots of the host that a source's label begins with.
    pub(crate) fn of(&self, label: &str) -> Slots {
        let host = label.split('/').next().unwrap_or(label);
        let mut by_host = lock(&self.by_host);
        if let Some(slots) = by_host.get(host) {
            return slots.clone();
        }
        let slots = Slots::new(self.counts);
        by_host.insert(host.to_owned(), slots.clone());
        slots
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::scheduler::gate::Gate;

    #[tokio::test(start_paused = true)]
    async fn readers_do_not_wait_for_the_rest() {
        let slots = OriginSlots::new(SlotCounts {
            foreground: 1,
            boot: 1,
            background: 1,
        });
        let gate = Gate::new();
        let soon = Duration::from_millis(1);
        let background = Urgency::new(Priority::Background);
        let here = slots.of("registry.example/a");
        let _held = here.take(&background).await;
        let same_host = slots.of("registry.example/b");
        assert!(
            tokio::time::timeout(soon, same_host.take(&background))
                .await
                .is_err()
        );
        let boot = Urgency::new(Priority::Boot);
        let _list = tokio::time::timeout(soon, same_host.take(&boot))
            .await
            .unwrap();
        let other_host = slots.of("other.example/b");
        let _other = tokio::time::timeout(soon, other_host.take(&background))
            .await
            .unwrap();
        // Promoted while it waits, it takes a reader's slot.
        let promotion = async {
            tokio::time::sleep(soon / 2).await;
            background.waiting(&gate, [1, 0, 0], true);
        };
        let (permit, ()) = tokio::join!(
            tokio::time::timeout(soon, same_host.take(&background)),
            promotion
        );
        assert!(permit.unwrap().of_readers);
    }

    #[tokio::test(start_paused = true)]
    async fn slots_become_fewer_and_more() {
        let origins = OriginSlots::new(SlotCounts {
            foreground: 4,
            boot: 4,
            background: 4,
        });
        let background = Urgency::new(Priority::Background);
        let soon = Duration::from_millis(1);
        let free = |slots: &Slots| slots.pools[2].free.available_permits();
        let slots = origins.at_most("r/a", None);
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(slots.take(&background).await);
        }
        let slots = origins.at_most("r/b", Some(6));
        assert_eq!(free(&slots), 0);
        let waits = |slots: &Slots| {
            let (slots, urgency) = (slots.clone(), Urgency::new(Priority::Background));
            async move {
                tokio::time::timeout(soon, slots.take(&urgency))
                    .await
                    .is_err()
            }
        };
        held.pop();
        assert!(waits(&slots).await, "two are in use, and there are no more");
        held.pop();
        assert!(!waits(&slots).await);
        // In use beyond their number, then allowed again.
        held.push(slots.take(&background).await);
        let slots = origins.at_most("r/a", Some(3));
        let slots_of_three = origins.at_most("r/a", Some(9));
        assert_eq!(free(&slots_of_three), 1);
        held.clear();
        assert_eq!(free(&slots), 3);
        assert_eq!(slots.pools[0].free.available_permits(), 3, "in thirds");
        let slots = origins.at_most("r/a", Some(100));
        for pool in &slots.pools {
            assert_eq!(pool.free.available_permits(), 4, "never more than usual");
        }
    }
}
