// SPDX-License-Identifier: Apache-2.0
//! One flight per chunk.
//!
//! A chunk that is being fetched is *claimed* by one transfer. Whoever else wants it joins the flight
//! as a waiter, and makes the transfer as urgent as itself. The store stays the truth: a woken waiter
//! looks again. A waiter that goes away does not end the transfer; a transfer nobody waits for may end
//! itself when it meets a failure.
//!
//! ```text
//!   (no flight) -- claim --> claimed -- finish(None): the chunk is present, or no longer tried
//!                             |    \--- finish(Some(failure)): final for those who wait
//!                             +-- hand over --> claimed by another transfer
//! ```

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, watch};

use super::error::FetchFailure;
use super::gate::{Gate, Urgency, rank};
use super::plan::Limits;
use crate::peer::Reach;
use crate::source::Priority;
use crate::store::lock;

/// A transfer, as those see it who wait for its chunks.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) urgency: Urgency,
    /// Bytes are on their way, from the origin or from a node that is being fed itself: others may wait
    /// for this transfer. One that only asks would have them wait for each other.
    fed: watch::Sender<bool>,
    /// Which nodes may be asked; becomes less when others wait for the transfer, and all when the origin fails.
    reach: watch::Sender<Reach>,
    /// If it brings chunks of a boot list: how its requests are cut, else as those of readers; and its number there.
    pub(crate) listed: Option<(Limits, u64)>,
    last_failure: Mutex<Option<FetchFailure>>,
}

impl Transfer {
    pub(crate) fn new(base: Priority) -> Arc<Self> {
        Self::within(base, Reach::All)
    }

    /// One that may ask the nodes within `reach`.
    pub(crate) fn within(base: Priority, reach: Reach) -> Arc<Self> {
        Arc::new(Self::with(base, reach, None))
    }

    /// One that brings chunks of a boot list, in requests within `limits`; of lower `number` is what goes first.
    pub(crate) fn of_list(limits: Limits, number: u64) -> Arc<Self> {
        let listed = Some((limits, number));
        Arc::new(Self::with(Priority::Boot, Reach::All, listed))
    }

    fn with(base: Priority, reach: Reach, listed: Option<(Limits, u64)>) -> Self {
        Self {
            urgency: Urgency::new(base),
            fed: watch::Sender::new(false),
            reach: watch::Sender::new(reach),
            listed,
            last_failure: Mutex::new(None),
        }
    }

    /// Takes note of whether bytes are on their way.
    pub(crate) fn fed(&self, fed: bool) {
        self.fed
            .send_if_modified(|before| std::mem::replace(before, fed) != fed);
    }

    /// Which nodes may be asked.
    pub(crate) fn reach(&self) -> Reach {
        *self.reach.borrow()
    }

    /// The origin failed: other nodes may be asked, also by one that went there on behalf of a node.
    pub(crate) fn reask(&self) {
        self.reach
            .send_if_modified(|reach| std::mem::replace(reach, Reach::All) != Reach::All);
    }

    /// Waits until nodes within `reach` may not be asked any more. Cancel-safe.
    pub(crate) async fn diverted(&self, reach: Reach) {
        let mut now = self.reach.subscribe();
        // The sender is in `self`: it cannot be closed.
        let _ = now.wait_for(|now| *now < reach).await;
    }

    /// Remembers why an attempt failed, for those whose deadline passes.
    pub(crate) fn note(&self, failure: &FetchFailure) {
        *lock(&self.last_failure) = Some(failure.clone());
    }

    /// Why the latest attempt failed.
    pub(crate) fn last_failure(&self) -> Option<FetchFailure> {
        lock(&self.last_failure).clone()
    }
}

/// What the waiters of one flight share.
#[derive(Debug, Default)]
struct Landing {
    notify: Arc<Notify>,
    failure: OnceLock<FetchFailure>,
}

#[derive(Debug)]
struct Flight {
    transfer: Arc<Transfer>,
    landing: Arc<Landing>,
    /// Waiters by rank.
    waiters: [u32; 3],
}

/// The flights of one layer.
#[derive(Debug)]
pub(crate) struct Flights {
    gate: Arc<Gate>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    flights: HashMap<u32, Flight>,
    /// By the address of the transfer, which is alive while it has claims.
    claims: HashMap<usize, BTreeSet<u32>>,
}

fn name(transfer: &Arc<Transfer>) -> usize {
    Arc::as_ptr(transfer).addr()
}

impl Table {
    fn unclaim(&mut self, transfer: &Arc<Transfer>, chunk: u32) {
        if let Some(claims) = self.claims.get_mut(&name(transfer)) {
            claims.remove(&chunk);
            if claims.is_empty() {
                self.claims.remove(&name(transfer));
            }
        }
    }
}

impl Flights {
    pub(crate) fn new(gate: Arc<Gate>) -> Self {
        Self {
            gate,
            table: Mutex::default(),
        }
    }

    /// Claims those of `chunks` that are not in flight for `transfer`; returns how many.
    pub(crate) fn claim(
        &self,
        transfer: &Arc<Transfer>,
        chunks: impl IntoIterator<Item = u32>,
    ) -> usize {
        let mut table = lock(&self.table);
        let mut claimed = 0;
        for chunk in chunks {
            if table.flights.contains_key(&chunk) {
                continue;
            }
            let flight = Flight {
                transfer: Arc::clone(transfer),
                landing: Arc::default(),
                waiters: [0; 3],
            };
            table.flights.insert(chunk, flight);
            table
                .claims
                .entry(name(transfer))
                .or_default()
                .insert(chunk);
            claimed += 1;
        }
        claimed
    }

    /// Whether somebody fetches `chunk`.
    pub(crate) fn is_in_flight(&self, chunk: u32) -> bool {
        lock(&self.table).flights.contains_key(&chunk)
    }

    /// Has the transfer that fetches `chunk` ask no node beyond `reach`: another node asks this one for it,
    /// and two nodes that ask each other would both wait.
    pub(crate) fn divert(&self, chunk: u32, reach: Reach) {
        if let Some(flight) = lock(&self.table).flights.get(&chunk) {
            let lower = |now: &mut Reach| std::mem::replace(now, reach.min(*now)) > reach;
            flight.transfer.reach.send_if_modified(lower);
        }
    }

    /// Whether `chunk` is on its way.
    pub(crate) fn is_being_fed(&self, chunk: u32) -> bool {
        let table = lock(&self.table);
        let flight = table.flights.get(&chunk);
        flight.is_some_and(|flight| *flight.transfer.fed.borrow())
    }

    /// Waits until `chunk` is on its way, or nobody fetches it. Cancel-safe.
    pub(crate) async fn comes_to_be_fed(&self, chunk: u32) {
        let watched = {
            let table = lock(&self.table);
            let flight = table.flights.get(&chunk);
            flight.map(|flight| {
                let landing = Arc::clone(&flight.landing.notify).notified_owned();
                (flight.transfer.fed.subscribe(), landing)
            })
        };
        if let Some((mut fed, landing)) = watched {
            tokio::select! {
                // A transfer that is gone feeds nobody.
                _ = fed.wait_for(|fed| *fed) => {}
                () = landing => {}
            }
        }
    }

    /// Whether a boot list brings `chunk`.
    pub(crate) fn is_listed(&self, chunk: u32) -> bool {
        let table = lock(&self.table);
        let flight = table.flights.get(&chunk);
        flight.is_some_and(|flight| flight.transfer.listed.is_some())
    }

    /// Joins the flight of `chunk`; `None` when there is none.
    pub(crate) fn join(self: &Arc<Self>, chunk: u32, priority: Priority) -> Option<Waiter> {
        let mut table = lock(&self.table);
        let flight = table.flights.get_mut(&chunk)?;
        flight.waiters[rank(priority)] += 1;
        flight
            .transfer
            .urgency
            .waiting(&self.gate, one(priority), true);
        Some(Waiter {
            notified: Box::pin(Arc::clone(&flight.landing.notify).notified_owned()),
            landing: Arc::clone(&flight.landing),
            transfer: Arc::clone(&flight.transfer),
            flights: Arc::clone(self),
            chunk,
            priority,
        })
    }

    /// The chunks that `transfer` still has to bring, ascending.
    pub(crate) fn claims(&self, transfer: &Arc<Transfer>) -> Vec<u32> {
        let table = lock(&self.table);
        table
            .claims
            .get(&name(transfer))
            .map_or_else(Vec::new, |set| set.iter().copied().collect())
    }

    /// Whether `transfer` has nothing left to bring.
    pub(crate) fn is_done(&self, transfer: &Arc<Transfer>) -> bool {
        !lock(&self.table).claims.contains_key(&name(transfer))
    }

    /// Ends the flight of `chunk`, whoever claimed it, and wakes its waiters to look again, or to
    /// take `failure` as final. Fine when there is none.
    pub(crate) fn finish(&self, chunk: u32, failure: Option<&FetchFailure>) {
        let mut table = lock(&self.table);
        let Some(flight) = table.flights.remove(&chunk) else {
            return;
        };
        table.unclaim(&flight.transfer, chunk);
        flight
            .transfer
            .urgency
            .waiting(&self.gate, flight.waiters, false);
        if let Some(failure) = failure {
            let _ = flight.landing.failure.set(failure.clone());
        }
        flight.landing.notify.notify_waiters();
    }

    /// Ends the flights of all chunks that `transfer` still has.
    pub(crate) fn finish_all(&self, transfer: &Arc<Transfer>, failure: Option<&FetchFailure>) {
        for chunk in self.claims(transfer) {
            self.finish(chunk, failure);
        }
    }

    /// Ends the flights of those chunks of `transfer` that nobody waits for.
    pub(crate) fn finish_unwanted(&self, transfer: &Arc<Transfer>) {
        let unwanted: Vec<u32> = {
            let table = lock(&self.table);
            let claims = table.claims.get(&name(transfer)).into_iter().flatten();
            let waited = |chunk: &&u32| table.flights[*chunk].waiters == [0; 3];
            claims.filter(waited).copied().collect()
        };
        for chunk in unwanted {
            self.finish(chunk, None);
        }
    }

    /// Gives all claims of `from` to `to`, with their waiters.
    pub(crate) fn hand_over(&self, from: &Arc<Transfer>, to: &Arc<Transfer>) {
        let mut table = lock(&self.table);
        let Some(claims) = table.claims.remove(&name(from)) else {
            return;
        };
        let mut moved = [0; 3];
        for chunk in &claims {
            if let Some(flight) = table.flights.get_mut(chunk) {
                flight.transfer = Arc::clone(to);
                moved
                    .iter_mut()
                    .zip(flight.waiters)
                    .for_each(|(sum, count)| *sum += count);
            }
        }
        table.claims.entry(name(to)).or_default().extend(claims);
        // As far as both may go: those who wait for `from` must not wait for whom it may not ask.
        let lower = |now: &mut Reach| std::mem::replace(now, from.reach().min(*now)) > from.reach();
        to.reach.send_if_modified(lower);
        from.urgency.waiting(&self.gate, moved, false);
        to.urgency.waiting(&self.gate, moved, true);
    }

    /// How many chunks are in flight.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.table).flights.len()
    }
}

fn one(priority: Priority) -> [u32; 3] {
    let mut by_rank = [0; 3];
    by_rank[rank(priority)] = 1;
    by_rank
}

/// Someone who waits for one chunk. Dropping it withdraws its urgency, and nothing else.
#[derive(Debug)]
pub(crate) struct Waiter {
    /// Made while the table was locked: no landing is missed.
    notified: Pin<Box<OwnedNotified>>,
    landing: Arc<Landing>,
    transfer: Arc<Transfer>,
    flights: Arc<Flights>,
    chunk: u32,
    priority: Priority,
}

impl Waiter {
    /// Waits for the end of the flight; then the store must be looked at again.
    ///
    /// **Errors** a failure that no other attempt can mend. **Cancel** safe.
    pub(crate) async fn landed(&mut self) -> Result<(), FetchFailure> {
        self.notified.as_mut().await;
        match self.landing.failure.get() {
            Some(failure) => Err(failure.clone()),
            None => Ok(()),
        }
    }

    /// Why the latest attempt to bring the chunk failed.
    pub(crate) fn last_failure(&self) -> Option<FetchFailure> {
        let table = lock(&self.flights.table);
        let now = table
            .flights
            .get(&self.chunk)
            .map(|flight| flight.transfer.last_failure());
        now.flatten().or_else(|| self.transfer.last_failure())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut table = lock(&self.flights.table);
        let Some(flight) = table.flights.get_mut(&self.chunk) else {
            return;
        };
        // A later flight of the same chunk is not the one that was joined.
        if Arc::ptr_eq(&flight.landing, &self.landing) {
            let waiters = &mut flight.waiters[rank(self.priority)];
            *waiters = waiters.saturating_sub(1);
            flight
                .transfer
                .urgency
                .waiting(&self.flights.gate, one(self.priority), false);
        }
    }
}

#[cfg(test)]
mod tests;
