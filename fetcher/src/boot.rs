// SPDX-License-Identifier: Apache-2.0
//! Loading a boot list: what a container reads while it starts, in one burst.
//!
//! All missing chunks of the list are claimed at once, over all layers, and put into few range requests
//! ([`plan`]), which run beside each other at boot priority: not throttled as the background is while
//! readers read, in slots of their own, and still behind every reader at the gate. A reader that wants
//! a chunk of the list joins its flight, which makes that request foreground, also one that has not
//! begun; and nothing is read ahead for it, because the list knows better what comes next.
//!
//! In a cluster a list goes the way of every fetch: each request is for one home ([`crate::peer`]).
//!
//! Chunks that are just being made of files that the node has ([`crate::reuse`]) are left out.
//!
//! A request that fails is given up unless a reader waits for it: the list is a hint, and whatever it
//! did not bring is fetched as if there were none.

mod pages;
mod plan;

use std::sync::Arc;

use sluice_blockindex::chunkmap::Chunk;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::scheduler::{Fetcher, LayerHandle, Transfer};
use plan::{Listed, Piece, burst};

pub use pages::whole_pages;

/// A chunk of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootRead {
    /// Which of the layers.
    pub layer: usize,
    /// The chunk.
    pub chunk: u32,
}

/// A list that is being loaded. Dropping it cancels what no reader waits for.
#[derive(Debug)]
pub struct BootBurst {
    claimed: Vec<BootRead>,
    requests: usize,
    task: JoinHandle<()>,
    cancel: CancellationToken,
    _guard: DropGuard,
}

impl BootBurst {
    /// The chunks that it set out to bring: those of the list that were missing, and that nobody
    /// brought already, in the list's order.
    #[must_use]
    pub fn claimed(&self) -> &[BootRead] {
        &self.claimed
    }

    /// In how many requests, if none fails.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.requests
    }

    /// Stops what no reader waits for.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits until every request has ended, well or not. **Cancel** the burst is cancelled.
    pub async fn join(mut self) -> Vec<BootRead> {
        // It fails only by a panic of a transfer, which was reported where it happened.
        let _ended = (&mut self.task).await;
        std::mem::take(&mut self.claimed)
    }
}

impl Fetcher {
    /// Starts loading `list`, the most urgent chunk first, of `layers`. What is present, on its way, or
    /// not in the layer is passed over. See [`crate::boot`].
    pub fn load_boot_list(&self, layers: &[Arc<LayerHandle>], list: &[BootRead]) -> BootBurst {
        let cancel = self.core.cancel.child_token();
        // One request per transfer: a reader that joins it waits for no more than that.
        let round_trip = self.core.pace.bytes_per_round_trip();
        let limits = self.core.options.boot_limits(round_trip);
        let wanted = list.iter().filter_map(|read| {
            let handle = layers.get(read.layer)?;
            let chunk = handle.chunks().chunk(read.chunk)?;
            let free = handle.check_open().is_ok()
                && !handle.device().is_present(read.chunk)
                && !handle.flights.is_in_flight(read.chunk)
                && !handle.is_expected(read.chunk);
            free.then_some(Listed {
                layer: read.layer,
                chunk,
            })
        });
        let mut claimed = Vec::new();
        let mut transfers = Vec::new();
        let apart = |layer: usize, left: &Chunk, right: &Chunk| {
            let handle = layers.get(layer);
            handle.is_some_and(|handle| self.core.apart(handle, left, right))
        };
        for Piece { layer, chunks } in burst(wanted, &limits, apart) {
            let handle = &layers[layer];
            let transfer = Transfer::of_list(limits, self.core.listed.number());
            // A reader may have been faster with some of them.
            if handle.claim(&transfer, chunks) > 0 {
                let ours = handle.flights.claims(&transfer).into_iter();
                claimed.extend(ours.map(|chunk| BootRead { layer, chunk }));
                handle.foresee();
                transfers.push((Arc::clone(handle), transfer));
            }
        }
        let requests = transfers.len();
        let mut tasks = Vec::with_capacity(requests);
        for (handle, transfer) in transfers {
            tasks.push(self.start(&handle, transfer, cancel.clone()));
        }
        let task = self.core.tasks.spawn(async move {
            for task in tasks {
                if let Ok(Err(failure)) = task.await {
                    tracing::debug!("a part of a boot list is given up: {failure}");
                }
            }
        });
        let guard = cancel.clone().drop_guard();
        BootBurst {
            claimed,
            requests,
            task,
            cancel,
            _guard: guard,
        }
    }
}

#[cfg(test)]
mod tests;
