// SPDX-License-Identifier: Apache-2.0
//! Completing an image in the background.
//!
//! A job walks the missing chunks of its layers, layer by layer in the order given, in range requests of
//! its own; while readers are about, first what stands behind the places where they read. Chunks that a container
//! reads while it starts are loaded before, see [`crate::boot`]. It is the least urgent: while a reader's transfer is receiving, its bodies are not read and no request is opened;
//! while readers are about it keeps to little of the line (`manners`); and a reader that wants a chunk of its
//! makes that transfer urgent. A layer that is complete is sealed.
//!
//! A job can keep beside readers for a while: of an image whose start a boot list has foreseen it fetches only while a reader
//! waits for what is missing nevertheless. Such a start has the line for itself, and an application that has all
//! it reads costs no more; any other start waits, and has company from the beginning. Where containers start and
//! the node is short of processors, it takes little of them.
//!
//! A layer whose sources all back off is passed over until one may be asked again; the job has no
//! deadline. It ends when every layer is sealed or has failed its seal, or when it is cancelled or
//! dropped; transfers that a reader waits for then go on.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use sluice_blockindex::chunkmap::Chunk;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::clock;
use crate::cluster::home::PieceKey;
use crate::scheduler::{
    Choice, Core, FetchFailure, Fetcher, LayerHandle, Limits, Piece, Transfer, coalesce,
};
use crate::source::Priority;
use crate::store::{StoreError, lock};

mod manners;

use manners::{Carries, Manners, pressed_rest, rest_after};

/// How long a job waits when all it could do is done by others or cannot be done now.
const IDLE: Duration = Duration::from_millis(200);
/// How often a job that goes beside readers only looks whether there are any: what a miss costs.
const BESIDE_LOOK: Duration = Duration::from_millis(20);
/// For so long after an image's first container was prepared processors are left to what starts, if they are short:
/// where many containers start at once, most are done by then.
const STARTING: Duration = Duration::from_secs(30);
/// So much of a device behind the place of each reader comes before the rest.
const NEAR_BYTES: u64 = 2 << 20;
/// After a seal that could not be done for reasons of the disk, also before what it lost is fetched
/// again: a disk that loses everything must not cost the line.
const SEAL_PAUSE: Duration = Duration::from_secs(60);

/// How far a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefetchProgress {
    /// Layers of the job.
    pub layers: usize,
    /// Of these, sealed.
    pub sealed_layers: usize,
    /// Of these, given up: closed, or not what their diff ID says.
    pub failed_layers: usize,
    /// Device bytes of all layers.
    pub total_bytes: u64,
    /// Of these, present.
    pub present_bytes: u64,
}

/// A running job. Dropping it cancels it.
#[derive(Debug)]
pub struct PrefetchJob {
    progress: watch::Receiver<PrefetchProgress>,
    cancel: CancellationToken,
    task: JoinHandle<PrefetchProgress>,
    _guard: DropGuard,
}

impl PrefetchJob {
    /// How far it is; changes can be waited for.
    pub fn progress(&self) -> watch::Receiver<PrefetchProgress> {
        self.progress.clone()
    }

    /// Stops it soon; [`Self::join`] waits until it has.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits for its end and returns how far it came. **Cancel** the job is cancelled with the wait.
    pub async fn join(mut self) -> PrefetchProgress {
        match (&mut self.task).await {
            Ok(progress) => progress,
            Err(_) => *self.progress.borrow(),
        }
    }
}

impl Fetcher {
    /// Starts completing `layers`, in this order, in the background. See [`crate::prefetch`].
    pub fn prefetch(&self, layers: Vec<Arc<LayerHandle>>) -> PrefetchJob {
        self.complete(layers, Some(clock::now()), None)
    }

    /// As [`Self::prefetch`] of an image that starts. Where a boot list has loaded what that reads of these layers the job works
    /// for so long only while readers wait for what is missing of them nevertheless; and while the node is short of
    /// processors it takes little of them for half a minute.
    pub fn prefetch_beside_readers(
        &self,
        layers: Vec<Arc<LayerHandle>>,
        beside: Duration,
    ) -> PrefetchJob {
        let now = clock::now();
        let starting = now.checked_add(STARTING);
        self.complete(layers, now.checked_add(beside), starting)
    }

    fn complete(
        &self,
        layers: Vec<Arc<LayerHandle>>,
        beside_until: Option<Instant>,
        starting_until: Option<Instant>,
    ) -> PrefetchJob {
        let cancel = self.core.cancel.child_token();
        let (report, progress) = watch::channel(PrefetchProgress::default());
        let job = Job {
            fetcher: self.clone(),
            cancel: cancel.clone(),
            layers: layers
                .into_iter()
                .map(|layer| Layer::new(layer, &self.core))
                .collect(),
            beside_until,
            starting_until,
            report,
        };
        let task = self.core.tasks.spawn(job.run());
        let guard = cancel.clone().drop_guard();
        PrefetchJob {
            progress,
            cancel,
            task,
            _guard: guard,
        }
    }
}

/// What remains to be done with a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Fetch,
    Sealing,
    Sealed,
    Failed,
}

/// Which chunks are walked. Each node brings those first whose home it is: the zone's nodes fetch each its
/// share of an image, and then give each other the rest. The second pass begins at another chunk on each
/// node, or all would ask the same home at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Own,
    Rest,
}

struct Layer {
    handle: Arc<LayerHandle>,
    pass: Pass,
    /// All chunks of this pass before it are present or in flight by this job, unless a transfer failed.
    cursor: u32,
    /// The chunk that the second pass begins with: another one on each node.
    start: u32,
    stage: Stage,
    not_before: Option<Instant>,
    running: usize,
}

impl Layer {
    fn new(handle: Arc<LayerHandle>, core: &Core) -> Self {
        let start = core.peers().map_or(0, |peers| {
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(peers.me().as_str().as_bytes());
            hasher.update(handle.key().index.as_bytes());
            hasher.finalize() % handle.chunks().count().max(1)
        });
        // Where each chunk needs those before it, nobody begins in the middle.
        let ordered = handle.is_ordered();
        let start = if ordered { 0 } else { start };
        let pass = match core.peers() {
            Some(_) if !ordered => Pass::Own,
            Some(_) | None => Pass::Rest,
        };
        let stage = if handle.device().is_sealed() {
            Stage::Sealed
        } else {
            Stage::Fetch
        };
        Self {
            handle,
            pass,
            cursor: 0,
            start,
            stage,
            not_before: None,
            running: 0,
        }
    }

    /// The chunk at a place of the present pass.
    fn chunk_at(&self, at: u32) -> u32 {
        let count = u64::from(self.handle.chunks().count().max(1));
        let start = match self.pass {
            Pass::Own => 0,
            Pass::Rest => u64::from(self.start),
        };
        u32::try_from((start + u64::from(at)) % count).unwrap_or(0)
    }

    /// Whether its requests go one after the other, so that each finds what stands before it.
    fn is_serial(&self, core: &Core) -> bool {
        let alone = core.peers().is_none();
        self.handle.is_ordered() || alone && self.handle.gains_by_order()
    }

    /// Whether `chunk` is to be fetched, and may be now; `resting` are those that may not.
    fn is_free(&self, chunk: u32, resting: &BTreeSet<u32>) -> bool {
        !self.handle.device().is_present(chunk)
            && !self.handle.flights.is_in_flight(chunk)
            && !self.handle.is_expected(chunk)
            && !resting.contains(&self.handle.judged_by(chunk))
    }

    /// The next request, and the chunks to fetch in it.
    fn next(&mut self, core: &Core, limits: &Limits, now: Instant) -> Option<Piece> {
        let resting = &self.handle.sources.resting(now);
        let count = self.handle.chunks().count();
        let mut home = HomeOf::new(core, &self.handle);
        let mut find = |layer: &Self| {
            (layer.cursor..count).find(|at| {
                let chunk = layer.chunk_at(*at);
                layer.is_free(chunk, resting) && (layer.pass == Pass::Rest || home.is_here(chunk))
            })
        };
        let mut at = find(self);
        if at.is_none() && self.pass == Pass::Own {
            (self.pass, self.cursor) = (Pass::Rest, 0);
            at = find(self);
        }
        let Some(at) = at else {
            self.cursor = count;
            return None;
        };
        let first = self.chunk_at(at);
        // Up to where the walk turns back to the first chunk.
        let end = count.min(first.saturating_add(count - at));
        let piece = self.piece(first..end, core, limits, resting)?;
        self.cursor = piece
            .chunks
            .last()
            .map_or(count, |last| at + (last - first) + 1);
        Some(piece)
    }

    /// The next request behind where readers are: who reads on finds it there.
    fn next_near_readers(&self, core: &Core, limits: &Limits, now: Instant) -> Option<Piece> {
        if self.is_serial(core) {
            return None;
        }
        let resting = &self.handle.sources.resting(now);
        let places = lock(&self.handle.ahead).beyond(NEAR_BYTES);
        let first = places.into_iter().find_map(|place| {
            let mut missing = self.handle.device().missing(place);
            missing.find(|chunk| self.is_free(*chunk, resting))
        })?;
        self.piece(first..self.handle.chunks().count(), core, limits, resting)
    }

    /// One request, from the first of `chunks` on.
    fn piece(
        &self,
        chunks: Range<u32>,
        core: &Core,
        limits: &Limits,
        resting: &BTreeSet<u32>,
    ) -> Option<Piece> {
        let first = chunks.start;
        let mut bytes = 0;
        let within = |chunk: &Chunk| {
            bytes += chunk.blob.len();
            bytes <= limits.piece_bytes || chunk.ordinal == first
        };
        let chunks = chunks.map_while(|chunk| self.handle.chunks().chunk(chunk));
        let free = chunks
            .take_while(within)
            .filter(|chunk| self.is_free(chunk.ordinal, resting));
        let apart = |left: &Chunk, right: &Chunk| core.apart(&self.handle, left, right);
        coalesce(free, limits, apart).into_iter().next()
    }
}

/// Whether this node is the home of chunks, remembered for the piece that was asked for last.
struct HomeOf<'a> {
    core: &'a Core,
    layer: Arc<LayerHandle>,
    last: Option<(PieceKey, bool)>,
}

impl<'a> HomeOf<'a> {
    fn new(core: &'a Core, layer: &Arc<LayerHandle>) -> Self {
        Self {
            core,
            layer: Arc::clone(layer),
            last: None,
        }
    }

    fn is_here(&mut self, chunk: u32) -> bool {
        let Some(peers) = self.core.peers() else {
            return true;
        };
        let Some(chunk) = self.layer.chunks().chunk(chunk) else {
            return true;
        };
        let piece = self.layer.piece(&chunk);
        match self.last {
            Some((known, here)) if known == piece => here,
            _ => {
                let here = peers.is_home(&piece);
                self.last = Some((piece, here));
                here
            }
        }
    }
}

/// Something that a job waits for.
enum Event {
    Fetched {
        layer: usize,
        result: Result<(), FetchFailure>,
    },
    Sealed {
        layer: usize,
        result: Result<(), StoreError>,
    },
}

struct Job {
    fetcher: Fetcher,
    cancel: CancellationToken,
    layers: Vec<Layer>,
    /// Until then only while readers wait, if a boot list was loaded; `None`: for good.
    beside_until: Option<Instant>,
    /// Until then processors are left to what starts.
    starting_until: Option<Instant>,
    report: watch::Sender<PrefetchProgress>,
}

impl Job {
    async fn run(mut self) -> PrefetchProgress {
        let mut events: FuturesUnordered<BoxFuture<'static, Event>> = FuturesUnordered::new();
        loop {
            self.seal_complete(&mut events);
            let wake = self.fetch_more(&mut events);
            let progress = self.progress();
            if progress.sealed_layers + progress.failed_layers == progress.layers {
                return progress;
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => break,
                Some(event) = events.next() => self.note(event),
                () = clock::sleep_until(wake) => {}
            }
        }
        // Seals stop by being dropped; transfers stop themselves, and the fetcher joins them.
        self.progress()
    }

    /// How many requests may run now, of which size: of most layers, and of those that take one after the other.
    fn allowance(&self, now: Instant, pressed: bool) -> (Manners, usize, [Limits; 2]) {
        let core = &self.fetcher.core;
        let options = &core.options;
        let manners = if pressed {
            Manners::Busy
        } else {
            Manners::of(options, core.gate.quiet_since(), now)
        };
        let round_trip = core.pace.bytes_per_round_trip();
        let most = match manners {
            Manners::Busy if core.background_rests(now).is_some() => 0,
            _ if self.is_beside(now) && !self.is_missed(now) => 0,
            _ => manners.requests(options, round_trip),
        };
        let known = Carries {
            round_trip: round_trip.unwrap_or_else(|| core.pace.total_bytes()),
            second: core.pace.bytes_per_second().unwrap_or(0),
        };
        let pieces = [
            manners.piece_bytes(options, known),
            manners.serial_piece_bytes(options, known),
        ];
        let limits = pieces.map(|piece_bytes| Limits {
            first_bytes: piece_bytes,
            piece_bytes,
            ..options.limits()
        });
        (manners, most, limits)
    }

    /// Whether processors are to be left to what starts.
    fn is_pressed(&self, now: Instant) -> bool {
        let pressure = &self.fetcher.core.pressure;
        self.starting_until.is_some_and(|until| now < until) && pressure.is_high(now.into_std())
    }

    /// Whether it only goes beside readers still.
    fn is_beside(&self, now: Instant) -> bool {
        self.beside_until.is_none_or(|until| now < until)
            && self.layers.iter().any(|it| it.handle.is_foreseen())
    }

    /// Whether a reader has lately missed something of its layers.
    fn is_missed(&self, now: Instant) -> bool {
        let shy = self.fetcher.core.options.shy;
        let mut last = self.layers.iter().filter_map(|it| it.handle.last_miss());
        last.any(|at| now.duration_since(at) < shy)
    }

    /// The layers in the order of their turns: while readers are about first what is near them, where they were last;
    /// then each from its front.
    fn order(&self, manners: Manners) -> Vec<(usize, bool)> {
        let mut read: Vec<(Instant, usize)> = Vec::new();
        if manners != Manners::Free {
            let last = |(at, layer): (usize, &Layer)| Some((layer.handle.last_miss()?, at));
            read.extend(self.layers.iter().enumerate().filter_map(last));
        }
        read.sort_unstable_by(|one, other| other.cmp(one));
        let near = read.into_iter().map(|(_, at)| (at, true));
        near.chain((0..self.layers.len()).map(|at| (at, false)))
            .collect()
    }

    /// Starts requests up to the present limit. Returns when to look again even if nothing happens.
    fn fetch_more(
        &mut self,
        events: &mut FuturesUnordered<BoxFuture<'static, Event>>,
    ) -> Option<Instant> {
        let now = clock::now();
        let pressed = self.is_pressed(now);
        let (manners, mut most, [limits, serial_limits]) = self.allowance(now, pressed);
        let mut running: usize = self.layers.iter().map(|layer| layer.running).sum();
        let core = Arc::clone(&self.fetcher.core);
        let look = match manners {
            _ if self.is_beside(now) => BESIDE_LOOK,
            Manners::Busy => core.options.busy.min(IDLE),
            Manners::Shy | Manners::Free => IDLE,
        };
        let mut wake = clock::moment_after(look);
        for (at, near) in self.order(manners) {
            while running < most {
                let layer = &mut self.layers[at];
                if layer.stage != Stage::Fetch || layer.not_before.is_some_and(|at| at > now) {
                    break;
                }
                // What another transfer passes over would only be handed over to it, and be as urgent.
                let taken = layer.running > 0 || layer.handle.is_passed_over();
                let serial = layer.is_serial(&core);
                if taken && serial {
                    break;
                }
                let limits = if serial { &serial_limits } else { &limits };
                layer.not_before = match layer.handle.sources.choose(None, now) {
                    Choice::Use(..) => None,
                    Choice::Wait(until) => Some(until),
                    Choice::Nobody => now.checked_add(core.options.lookout),
                };
                // A sealed twin or chunks of before a reboot need no source.
                let local = layer.handle.device().any_suspect()
                    || layer.handle.has_twins(self.fetcher.store());
                if layer.not_before.is_some() && !local {
                    break;
                }
                let piece = if near {
                    layer.next_near_readers(&core, limits, now)
                } else {
                    layer.next(&core, limits, now)
                };
                let Some(piece) = piece else {
                    if !near && layer.running == 0 {
                        // What is missing still is in flight elsewhere, or failed: look again.
                        layer.cursor = 0;
                    }
                    break;
                };
                let transfer = Transfer::new(Priority::Background);
                if layer.handle.claim(&transfer, piece.chunks) == 0 {
                    continue;
                }
                if manners == Manners::Busy {
                    let (bytes, rate) = (piece.extent.len(), core.pace.bytes_per_second());
                    let mut rest = rest_after(bytes, rate, core.pace.bytes_per_round_trip());
                    if pressed {
                        rest = rest.max(pressed_rest(bytes, core.processors));
                    }
                    core.rest_background(now, rest);
                    most = 0;
                }
                layer.running += 1;
                running += 1;
                let task = self
                    .fetcher
                    .start(&layer.handle, transfer, self.cancel.clone());
                events.push(Box::pin(async move {
                    let result = task.await.unwrap_or(Err(FetchFailure::Cancelled));
                    Event::Fetched { layer: at, result }
                }));
            }
            if let Some(until) = self.layers[at].not_before {
                wake = wake.map(|wake| wake.min(until.max(now)));
            }
        }
        let rests = core
            .background_rests(now)
            .filter(|_| manners == Manners::Busy);
        rests.map_or(wake, |until| wake.map(|wake| wake.min(until)))
    }

    /// Starts the seals of layers that are complete.
    fn seal_complete(&mut self, events: &mut FuturesUnordered<BoxFuture<'static, Event>>) {
        for (at, layer) in self.layers.iter_mut().enumerate() {
            if layer.stage != Stage::Fetch {
                continue;
            }
            if layer.handle.check_open().is_err() {
                layer.stage = Stage::Failed;
            } else if layer.handle.device().is_sealed() {
                layer.stage = Stage::Sealed;
            } else if layer.handle.device().is_complete()
                && layer.not_before.is_none_or(|at| at <= clock::now())
            {
                layer.stage = Stage::Sealing;
                let (fetcher, handle) = (self.fetcher.clone(), Arc::clone(&layer.handle));
                events.push(Box::pin(async move {
                    Event::Sealed {
                        layer: at,
                        result: fetcher.seal(&handle).await,
                    }
                }));
            }
        }
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Fetched { layer: at, result } => {
                let layer = &mut self.layers[at];
                layer.running = layer.running.saturating_sub(1);
                if let Err(failure) = result {
                    // Its chunks are missing still: walk again, once the store or a source may mend it.
                    layer.cursor = 0;
                    layer.not_before = match failure {
                        FetchFailure::Store(_) => clock::moment_after(SEAL_PAUSE),
                        FetchFailure::Windows { .. } => layer.handle.windows_rest(),
                        FetchFailure::NoWindows { .. } => {
                            clock::moment_after(self.fetcher.core.options.lookout)
                        }
                        _ => layer.not_before,
                    };
                    tracing::debug!(device = %layer.handle.key(), "prefetch paused: {failure}");
                }
            }
            Event::Sealed { layer: at, result } => {
                let layer = &mut self.layers[at];
                layer.stage = match result {
                    Ok(()) => Stage::Sealed,
                    Err(StoreError::Failed(_)) => Stage::Failed,
                    // Another seal of it runs, or the layer is being closed: look again.
                    Err(StoreError::Cancelled) => {
                        layer.not_before = clock::moment_after(IDLE);
                        Stage::Fetch
                    }
                    Err(error) => {
                        tracing::warn!(device = %layer.handle.key(), "failed to seal: {error}");
                        layer.not_before = clock::moment_after(SEAL_PAUSE);
                        Stage::Fetch
                    }
                };
            }
        }
    }

    fn progress(&self) -> PrefetchProgress {
        let stage = |stage| {
            self.layers
                .iter()
                .filter(|layer| layer.stage == stage)
                .count()
        };
        let devices = || self.layers.iter().map(|layer| layer.handle.device());
        let progress = PrefetchProgress {
            layers: self.layers.len(),
            sealed_layers: stage(Stage::Sealed),
            failed_layers: stage(Stage::Failed),
            total_bytes: devices().map(|device| device.device_bytes()).sum(),
            present_bytes: devices().map(|device| device.present_bytes()).sum(),
        };
        self.report
            .send_if_modified(|last| std::mem::replace(last, progress) != progress);
        progress
    }
}

#[cfg(test)]
mod tests;
