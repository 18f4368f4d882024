// SPDX-License-Identifier: Apache-2.0
//! The scheduler: brings missing chunks into the store, the most urgent first.
//!
//! [`Fetcher::fill`] makes a range of a layer device present. Missing chunks are claimed, one flight
//! per chunk (`flight`), put into as few range requests as possible (`plan`), with some of what
//! follows them (`window`), and brought by transfers (`transfer`), which outlive the callers that
//! started them. A transfer is as urgent as its most urgent waiter (`gate`); foreground goes before
//! boot before background, each in slots of its own (`slots`). Sources back off and are tried again for as
//! long as somebody waits (`sources`).
//!
//! # Rules
//! - The store is the truth: a woken waiter looks again.
//! - A caller that goes away does not end a transfer that others wait for.
//! - A fill fails only at its deadline, or for what no source can mend: the store cannot be written,
//!   the layer is not what it claims, the layer is closed.
//! - Every task is tracked and joined by [`Fetcher::shutdown`].
//!
//! Planning is pure and apart from the I/O. No lock is held across an await.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::extent::{DeviceSpace, Extent};
use tokio::sync::{OwnedMutexGuard, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod ask;
mod decode;
mod error;
mod evict;
mod flight;
mod gate;
mod layer;
mod options;
mod pace;
mod pass;
mod plan;
mod prefix;
mod pressure;
mod receive;
mod seal;
mod slots;
mod sources;
mod transfer;
mod volume;
mod window;
mod windows;

pub use error::{FetchFailure, FillError, WindowsFailure};
pub use evict::{Room, RoomReport};
pub use layer::{LayerHandle, LayerSpec, LayerTraffic};
pub use options::FetcherOptions;
pub use pass::Filled;

pub(crate) use decode::WRITE_STEP;
pub(crate) use flight::Transfer;
pub(crate) use gate::{Quiet, Urgency};
pub(crate) use plan::{Limits, Piece, between, coalesce};
pub(crate) use sources::Choice;

use crate::clock;
use crate::metrics::{FROM_STORE, Metrics, priority_word};
use crate::peer::{Peers, Reach};
use crate::source::Priority;
use crate::steps::StepKind;
use crate::store::{DeviceKey, Store, StoreError, lock};
use flight::{Flights, Waiter};
use gate::Gate;
use pace::Pace;
use pass::{Held, Passing};
use prefix::Fronts;
use pressure::Pressure;
use slots::{OriginSlots, SlotCounts, Slots};
use volume::Volume;
use window::{ReadAhead, WindowLimits};

/// What all transfers of a fetcher share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) options: FetcherOptions,
    pub(crate) store: Arc<Store>,
    pub(crate) metrics: Metrics,
    pub(crate) gate: Arc<Gate>,
    pub(crate) pace: Pace,
    /// Until then no background request is opened beside readers who are busy.
    background_rests: Mutex<Option<Instant>>,
    pub(crate) pressure: Pressure,
    /// How many of them are used.
    pub(crate) processors: usize,
    /// Bytes of boot lists that are under way from origins.
    pub(crate) listed: Volume,
    pub(crate) origins: OriginSlots,
    pub(crate) decodes: Slots,
    pub(crate) passing: Passing,
    fronts: Fronts,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
    /// One layer is hashed at a time: it is the least urgent work there is.
    sealing: Semaphore,
    /// The other nodes, where there are any.
    peers: OnceLock<Arc<Peers>>,
}

impl Core {
    pub(crate) fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.get()
    }

    /// Until when background requests beside busy readers have had their share of the line; `None` when they have not.
    pub(crate) fn background_rests(&self, now: Instant) -> Option<Instant> {
        lock(&self.background_rests).filter(|until| now < *until)
    }

    /// Has them wait for so long.
    pub(crate) fn rest_background(&self, now: Instant, pause: Duration) {
        *lock(&self.background_rests) = now.checked_add(pause);
    }

    /// Whether two chunks, neighbours in the blob, are better fetched by requests of their own: other
    /// nodes are asked for them.
    pub(crate) fn apart(&self, layer: &LayerHandle, left: &Chunk, right: &Chunk) -> bool {
        let Some(peers) = self.peers() else {
            return false;
        };
        let (left, right) = (layer.piece(left), layer.piece(right));
        left != right && !(peers.is_origin_home(&left) && peers.is_origin_home(&right))
    }
}

/// The scheduler. Cheap to clone; clones are the same one.
#[derive(Clone, Debug)]
pub struct Fetcher {
    pub(crate) core: Arc<Core>,
    layers: Arc<Mutex<BTreeMap<DeviceKey, Arc<LayerHandle>>>>,
    turns: Arc<Turns>,
}

impl Fetcher {
    /// A scheduler that fills `store`.
    pub fn new(options: FetcherOptions, store: Arc<Store>, metrics: Metrics) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let decodes = if options.decodes == 0 {
            processors
        } else {
            options.decodes
        };
        // Readers have slots of their own.
        let others = (decodes.saturating_sub(1)).max(DECODES_OF_OTHERS.min(2 * decodes));
        let core = Core {
            origins: OriginSlots::new(SlotCounts {
                foreground: options.foreground_requests,
                boot: options.boot_requests,
                background: options.other_requests,
            }),
            decodes: Slots::new(SlotCounts {
                foreground: decodes,
                boot: others,
                background: others,
            }),
            passing: Passing::default(),
            fronts: Fronts::default(),
            store,
            metrics,
            pressure: Pressure::new(options.processors_waited),
            processors: decodes,
            options,
            gate: Arc::new(Gate::new()),
            pace: Pace::default(),
            listed: Volume::default(),
            background_rests: Mutex::default(),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            sealing: Semaphore::new(1),
            peers: OnceLock::new(),
        };
        Self {
            core: Arc::new(core),
            layers: Arc::default(),
            turns: Arc::default(),
        }
    }

    /// Has it ask other nodes before the origin, from now on; once.
    pub fn attach_peers(&self, peers: Arc<Peers>) {
        // A second time would be a mistake of the caller, and changes nothing.
        let _ = self.core.peers.set(peers);
    }

    /// The store that it fills.
    pub fn store(&self) -> &Arc<Store> {
        &self.core.store
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.core.metrics
    }

    /// Opens a layer's device and makes it fillable. A layer that is open already gets the sources
    /// that it does not have, and its handle is returned.
    ///
    /// Chunks from before an unclean reboot are checked in the background, or when they are wanted.
    ///
    /// **Errors** those of [`Store::device`]; [`StoreError::Stopped`] after a shutdown.
    /// **Cancel** safe.
    pub async fn add_layer(&self, spec: LayerSpec) -> Result<Arc<LayerHandle>, StoreError> {
        if self.core.cancel.is_cancelled() {
            return Err(StoreError::Stopped);
        }
        if let Some(known) = self.join_layer(&spec) {
            return Ok(known);
        }
        // A removal of it comes to its end before, or begins afterwards.
        let _turn = self.turns.take(spec.key).await;
        if let Some(known) = self.join_layer(&spec) {
            return Ok(known);
        }
        let store = Arc::clone(&self.core.store);
        let (key, chunks) = (spec.key, spec.chunks.clone());
        let opening = tokio::task::spawn_blocking(move || store.device(key, &chunks));
        let device = opening.await.map_err(|_| StoreError::Cancelled)??;
        let flights = Arc::new(Flights::new(Arc::clone(&self.core.gate)));
        let limits = WindowLimits {
            initial_bytes: self.core.options.read_ahead_initial_bytes,
            max_bytes: self.core.options.read_ahead_max_bytes,
        };
        let ahead = ReadAhead::new(limits, device.device_bytes());
        let cancel = self.core.cancel.child_token();
        let layer = Arc::new(LayerHandle::new(spec, device, flights, ahead, cancel));
        lock(&self.layers).insert(key, Arc::clone(&layer));
        if layer.device.any_suspect() {
            self.core
                .tasks
                .spawn(recheck(Arc::clone(&self.core), Arc::clone(&layer)));
        }
        Ok(layer)
    }

    /// The layer that is open under this name, with the sources of `spec` added.
    fn join_layer(&self, spec: &LayerSpec) -> Option<Arc<LayerHandle>> {
        let known = self.layer(&spec.key)?;
        for source in &spec.sources {
            known.add_source(Arc::clone(source));
        }
        if let Some(windows) = &spec.windows {
            known.set_windows(Arc::clone(windows));
        }
        Some(known)
    }

    /// The layer of this name, if it is open.
    ///
    /// **Locks** its last use is noted under the lock of the table: an eviction sees it, or has taken
    /// it out before.
    pub fn layer(&self, key: &DeviceKey) -> Option<Arc<LayerHandle>> {
        let layers = lock(&self.layers);
        let layer = layers.get(key)?;
        layer.touch();
        Some(Arc::clone(layer))
    }

    /// All open layers.
    pub fn layers(&self) -> Vec<Arc<LayerHandle>> {
        lock(&self.layers).values().cloned().collect()
    }

    /// Closes a layer: its transfers end, its fills fail with [`FillError::Closed`], its data stays.
    pub fn close_layer(&self, key: &DeviceKey) {
        if let Some(layer) = lock(&self.layers).remove(key) {
            layer.cancel.cancel();
            layer.drop_twin();
            self.core.fronts.forget(key);
        }
    }

    /// Closes what copies from a device that was removed: its bytes are free when nobody has them
    /// open. From its removal on nobody opens them.
    fn drop_twins_of(&self, key: &DeviceKey) {
        for layer in self.layers() {
            layer.drop_twin_of(key);
        }
    }

    /// Closes a layer and deletes its device. Everything that reads its files is unmounted before.
    ///
    /// **Cancel** a deletion that has begun goes on.
    pub async fn remove_layer(&self, key: &DeviceKey) -> Result<(), StoreError> {
        let turn = self.turns.take(*key).await;
        self.close_layer(key);
        let (fetcher, key) = (self.clone(), *key);
        let removal = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let removed = fetcher.core.store.remove_device(&key);
            fetcher.drop_twins_of(&key);
            removed
        });
        removal.await.map_err(|_| StoreError::Cancelled)?
    }

    /// Makes every byte of `extent` present. Returns at once when it is.
    ///
    /// **Units** `deadline` bounds the whole wait; `None` waits for as long as it takes.
    /// **Errors** see [`FillError`]. **Cancel** safe: what was started goes on while others wait.
    pub async fn fill(
        &self,
        layer: &Arc<LayerHandle>,
        extent: Extent<DeviceSpace>,
        priority: Priority,
        deadline: Option<Duration>,
    ) -> Result<(), FillError> {
        self.fill_measured(layer, extent, priority, deadline, None)
            .await
    }

    /// With `held`, what the store does not keep goes there.
    async fn fill_measured(
        &self,
        layer: &Arc<LayerHandle>,
        extent: Extent<DeviceSpace>,
        priority: Priority,
        deadline: Option<Duration>,
        held: Option<&mut Held>,
    ) -> Result<(), FillError> {
        layer.check_open()?;
        if layer.device.missing(extent).next().is_none() {
            return Ok(());
        }
        let started = clock::now();
        let until = deadline.and_then(|deadline| started.checked_add(deadline));
        let key = layer.key();
        let subject = std::fmt::from_fn(move |f| write!(f, "{extent} of {key}"));
        let steps = self.core.metrics.steps();
        let _step = steps.enter(FILL_STEP, priority_word(priority), subject);
        let result = self
            .fill_missing(layer, extent, priority, Reach::All, until, held)
            .await;
        match &result {
            Ok(()) => self.core.metrics.filled(priority, clock::now() - started),
            Err(FillError::Closed) => {}
            Err(error) => {
                self.core.metrics.fill_failed(error.word());
                tracing::error!(
                    device = %layer.key(), %extent, priority = priority_word(priority),
                    "failed to fill: {error}"
                );
            }
        }
        result
    }

    async fn fill_missing(
        &self,
        layer: &Arc<LayerHandle>,
        extent: Extent<DeviceSpace>,
        priority: Priority,
        reach: Reach,
        until: Option<Instant>,
        mut held: Option<&mut Held>,
    ) -> Result<(), FillError> {
        let started = clock::now();
        // Who waits for a boot list alone gets what it lists next, which beats a guess.
        let listed = || {
            let mut missing = layer.device.missing(extent);
            missing.all(|chunk| layer.flights.is_listed(chunk))
        };
        let mut ahead = match priority {
            // What another node reads it reads ahead of by itself.
            Priority::Foreground if reach == Reach::All && !listed() => layer.missed(extent),
            Priority::Foreground | Priority::Boot | Priority::Background => None,
        };
        let mut refused = false;
        'look: loop {
            layer.check_open()?;
            let mut missing: Vec<u32> = layer.device.missing(extent).collect();
            if let Some(held) = &mut held {
                self.core.passing.take(layer, &mut missing, held, refused);
            }
            if missing.is_empty() {
                // A device that failed meanwhile has no present chunk.
                return layer.check_open();
            }
            let mut waiters = self.launch(layer, &missing, ahead.take(), priority, reach);
            if waiters.is_empty() {
                // What cannot be claimed, because the chunk map does not have it, nobody will bring.
                let nowhere = |chunk: &&u32| layer.chunks().chunk(**chunk).is_none();
                if let Some(chunk) = missing.iter().find(nowhere).copied() {
                    let error = StoreError::NoSuchChunk { chunk };
                    return Err(FillError::Store(Arc::new(error)));
                }
                if until.is_some_and(|until| clock::now() >= until) {
                    let waited = clock::now() - started;
                    return Err(FillError::Deadline { waited, last: None });
                }
                // All flights landed between two looks; never spin without letting others run.
                tokio::task::yield_now().await;
            }
            for waiter in &mut waiters {
                loop {
                    let expired = |last| FillError::Deadline {
                        waited: clock::now() - started,
                        last,
                    };
                    tokio::select! {
                        biased;
                        landed = waiter.landed() => match landed {
                            Ok(()) => break,
                            // It waits in memory, or is fetched once more.
                            Err(FetchFailure::Store(error))
                                if held.is_some() && error.keeps_nothing() =>
                            {
                                refused = true;
                                continue 'look;
                            }
                            Err(failure) => {
                                let last = FillError::final_of(&failure);
                                return Err(last.unwrap_or(FillError::Closed));
                            }
                        },
                        () = layer.cancel.cancelled() => return Err(FillError::Closed),
                        () = clock::sleep_until(until) => {
                            return Err(expired(waiter.last_failure()));
                        }
                        // A node that cannot fetch says so soon: the asker has other ways.
                        () = tokio::time::sleep(REFUSAL_LOOK), if reach < Reach::All => {
                            if let Some(last) = waiter.last_failure() {
                                return Err(expired(Some(last)));
                            }
                        }
                    }
                }
            }
        }
    }

    /// As [`Self::fill`], for another node that asks this one: nothing is read ahead, and no third node
    /// beyond `reach` is asked.
    pub(crate) async fn fill_for_peer(
        &self,
        layer: &Arc<LayerHandle>,
        extent: Extent<DeviceSpace>,
        priority: Priority,
        reach: Reach,
        deadline: Duration,
    ) -> Result<(), FillError> {
        layer.check_open()?;
        let until = clock::now().checked_add(deadline);
        self.fill_missing(layer, extent, priority, reach, until, None)
            .await
    }

    /// Waits for a chunk that is present or on its way; false when it is neither, or did not come.
    pub(crate) async fn await_flight(
        &self,
        layer: &Arc<LayerHandle>,
        chunk: u32,
        priority: Priority,
        deadline: Duration,
    ) -> bool {
        if layer.device.is_present(chunk) {
            return true;
        }
        if let Some(mut waiter) = layer.flights.join(chunk, priority) {
            tokio::select! {
                _ = waiter.landed() => {}
                () = layer.cancel.cancelled() => {}
                () = tokio::time::sleep(deadline) => {}
            }
        }
        layer.device.is_present(chunk)
    }

    /// Begins to fetch these chunks from the origin, or from nodes within `reach`, neighbours together; while
    /// the waiters are held they are as urgent as `priority`.
    pub(crate) fn launch_for_peer(
        &self,
        layer: &Arc<LayerHandle>,
        chunks: &[u32],
        priority: Priority,
        reach: Reach,
    ) -> Vec<Waiter> {
        let missing = chunks.iter().copied();
        let missing: Vec<u32> = missing
            .filter(|chunk| !layer.device.is_present(*chunk))
            .collect();
        self.launch(layer, &missing, None, priority, reach)
    }

    /// Starts transfers for those chunks that nobody fetches, and for what is to be read ahead, and
    /// joins the flights of `missing`.
    fn launch(
        &self,
        layer: &Arc<LayerHandle>,
        missing: &[u32],
        ahead: Option<Extent<DeviceSpace>>,
        priority: Priority,
        reach: Reach,
    ) -> Vec<Waiter> {
        let further = ahead
            .into_iter()
            .flat_map(|ahead| layer.device.missing(ahead));
        let mut wanted: Vec<u32> = missing.iter().copied().chain(further).collect();
        wanted.dedup();
        let transfers = self.claim(layer, &wanted, transfer::base_of(priority), reach);
        if reach < Reach::All {
            missing
                .iter()
                .for_each(|chunk| layer.flights.divert(*chunk, reach));
        }
        let waiters = missing
            .iter()
            .filter_map(|chunk| layer.flights.join(*chunk, priority))
            .collect();
        // Only now: with its waiters it is as urgent as they are from its first step.
        for transfer in transfers {
            let cancel = layer.cancel.clone();
            self.start(layer, transfer, cancel);
        }
        waiters
    }

    /// Claims those of `chunks` (ascending) that are not in flight, one transfer per request.
    fn claim(
        &self,
        layer: &Arc<LayerHandle>,
        chunks: &[u32],
        base: Priority,
        reach: Reach,
    ) -> Vec<Arc<Transfer>> {
        let free = chunks
            .iter()
            .copied()
            .filter(|chunk| !layer.flights.is_in_flight(*chunk));
        let free = free.filter_map(|chunk| layer.chunks().chunk(chunk));
        let mut transfers = Vec::new();
        let apart = |left: &Chunk, right: &Chunk| {
            reach > Reach::Origin && self.core.apart(layer, left, right)
        };
        for piece in coalesce(free, &self.core.options.limits(), apart) {
            let transfer = Transfer::within(base, reach);
            // Another caller may have been faster with some of them.
            if layer.claim(&transfer, piece.chunks) > 0 {
                transfers.push(transfer);
            }
        }
        transfers
    }

    /// Runs a transfer as a task of the fetcher; the receiver gets how it ended.
    pub(crate) fn start(
        &self,
        layer: &Arc<LayerHandle>,
        transfer: Arc<Transfer>,
        job: CancellationToken,
    ) -> tokio::task::JoinHandle<Result<(), FetchFailure>> {
        let run = transfer::run(Arc::clone(&self.core), Arc::clone(layer), transfer, job);
        self.core.tasks.spawn(run)
    }

    /// Ends all transfers and waits for every task. Fills fail with [`FillError::Closed`]. The store
    /// stays open: stop it afterwards.
    pub async fn shutdown(&self) {
        self.core.cancel.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
        lock(&self.layers).clear();
    }
}

/// Who opens or removes a layer, one at a time each: so no handle of a removed device stays behind.
#[derive(Debug, Default)]
struct Turns(Mutex<BTreeMap<DeviceKey, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn of(&self, key: DeviceKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = lock(&self.0);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(key).or_default())
    }

    /// The turn, if nobody has it.
    fn try_take(&self, key: DeviceKey) -> Option<OwnedMutexGuard<()>> {
        self.of(key).try_lock_owned().ok()
    }

    /// Waits for the turn. Cancel-safe.
    async fn take(&self, key: DeviceKey) -> OwnedMutexGuard<()> {
        self.of(key).lock_owned().await
    }
}

/// Chunks that are decoded at once of boot lists, and as many in the background: as there are processors but one, which
/// is left to readers; where those are few, so many, up to two for each. A chunk takes no longer than to hand the slot over to the
/// next: with one slot for two processors both were idle half of the time.
const DECODES_OF_OTHERS: usize = 8;

/// What a reader, a boot list or a prefetch waits for: a tenth of the default read deadline.
const FILL_STEP: StepKind = StepKind::new("fill", Duration::from_secs(30));

/// How often a fill on behalf of another node looks whether the origin failed.
const REFUSAL_LOOK: Duration = Duration::from_millis(100);

/// Checks, in the background, the chunks that were present before an unclean reboot.
async fn recheck(core: Arc<Core>, layer: Arc<LayerHandle>) {
    let urgency = gate::Urgency::new(Priority::Background);
    for chunk in 0..layer.chunks().count() {
        if !layer.device.is_suspect(chunk) {
            continue;
        }
        let turn = async {
            core.gate.turn(&urgency).await;
            core.decodes.take(&urgency).await
        };
        let _slot = tokio::select! {
            slot = turn => slot,
            () = layer.cancel.cancelled() => return,
        };
        let device = Arc::clone(&layer.device);
        let checked = tokio::task::spawn_blocking(move || device.recheck(chunk)).await;
        match checked {
            Ok(Ok(crate::store::Rechecked::Dropped)) => {
                core.metrics.corrupt(FROM_STORE);
                let device = layer.key();
                tracing::warn!(%device, chunk, "drop chunk that fails its check");
            }
            // A chunk map that was damaged meanwhile concerns that chunk only.
            Ok(Ok(_) | Err(StoreError::NoSuchChunk { .. })) => {}
            Ok(Err(error)) => {
                tracing::warn!(device = %layer.key(), "failed to check chunks: {error}");
                return;
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
