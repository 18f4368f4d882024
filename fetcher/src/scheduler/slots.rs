// SPDX-License-Identifier: Apache-2.0
//! How many requests run at once: per origin on the network, and decodings per machine.
//!
//! Readers have slots of their own, so a miss starts at once whatever else runs. Who finds no slot
//! waits, in the order of coming; the number who can wait is bounded by the readers, and by the few
//! requests of each prefetch.
//!
//! A transfer keeps a reader's slot after its readers are served, for what it reads ahead. When it is
//! paused and a reader finds no slot, it is asked to give its own up ([`Slots::plea`]).

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::gate::Urgency;
use crate::source::Priority;
use crate::store::lock;

/// A pool for readers and one for all others.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    foreground: Arc<Semaphore>,
    rest: Arc<Semaphore>,
    plea: Arc<Plea>,
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
    _permit: OwnedSemaphorePermit,
    /// It is one that is kept for readers.
    pub(crate) of_readers: bool,
}

impl Slots {
    /// At least one slot of each kind.
    pub(crate) fn new(foreground: usize, rest: usize) -> Self {
        Self {
            foreground: Arc::new(Semaphore::new(foreground.max(1))),
            rest: Arc::new(Semaphore::new(rest.max(1))),
            plea: Arc::default(),
        }
    }

    /// Waits for a slot as urgent as `urgency` says, which may change meanwhile. Cancel-safe.
    pub(crate) async fn take(&self, urgency: &Urgency) -> Slot {
        loop {
            let priority = urgency.effective();
            let of_readers = priority == Priority::Foreground;
            let pool = if of_readers {
                &self.foreground
            } else {
                &self.rest
            };
            let slot = |_permit| Slot {
                _permit,
                of_readers,
            };
            if let Ok(permit) = Arc::clone(pool).try_acquire_owned() {
                return slot(permit);
            }
            let _waiting = of_readers.then(|| Waiting::new(&self.plea));
            tokio::select! {
                biased;
                permit = Arc::clone(pool).acquire_owned() => match permit {
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
    foreground: usize,
    rest: usize,
    by_host: Mutex<HashMap<String, Slots>>,
}

impl OriginSlots {
    pub(crate) fn new(foreground: usize, rest: usize) -> Self {
        Self {
            foreground,
            rest,
            by_host: Mutex::default(),
        }
    }

    /// The slots of the host that a source's label begins with.
    pub(crate) fn of(&self, label: &str) -> Slots {
        let host = label.split('/').next().unwrap_or(label);
        let mut by_host = lock(&self.by_host);
        if let Some(slots) = by_host.get(host) {
            return slots.clone();
        }
        let slots = Slots::new(self.foreground, self.rest);
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
        let slots = OriginSlots::new(1, 1);
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
}
