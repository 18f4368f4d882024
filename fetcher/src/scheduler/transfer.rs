// SPDX-License-Identifier: Apache-2.0
//! One transfer: brings the chunks it claimed, from the store itself or from a source.
//!
//! It looks at the store first (chunks that wait for their check after a reboot, a sealed twin), then
//! makes range requests, one at a time, until all its chunks are present. A chunk lands, and its
//! waiters wake, as soon as its own bytes are there, verified and written. After a failure the chunks
//! that nobody waits for are given up; for the others another source is asked, for as long as somebody
//! waits. So every retry happens here, and waiters only watch their deadlines.
//!
//! When more comes than was asked (a source that ignores ranges), everything missing that passes is
//! claimed and committed: it is never asked for again, and never held. There is one such stream
//! per layer; others hand their claims over to it. So they do while a transfer passes over a frame that can
//! only be read from its front (`prefix`).
//!
//! `receive` reads the body, `decode` makes chunks of its frames.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

use super::Core;
use super::ask::{Asked, Way};
use super::error::FetchFailure;
use super::flight::Transfer;
use super::layer::LayerHandle;
use super::plan::{Piece, coalesce};
use super::receive::{Lent, Receiving};
use super::sources::{Choice, SourceId};
use super::volume::Room;
use super::windows::{Decodable, Lacking};
use crate::clock;
use crate::metrics::{FROM_STORE, priority_word};
use crate::peer::Reach;
use crate::source::{
    BlobSource, BlobStream, Priority, ReadContext, Served, SourceError, SourceKind,
};
use crate::steps::{StepGuard, StepKind};
use crate::store::{Rechecked, StoreError, lock};

/// A request that stalled is given at most eight times the first limit when it is made again.
const MOST_DOUBLINGS: u32 = 3;

/// A source that may be asked: failures rest it for less.
pub(super) const SOURCE_STEP: StepKind = StepKind::new("source", Duration::from_secs(30));
/// A reader's place among the requests to an origin, and his turn.
const SLOT_STEP: StepKind = StepKind::new("request slot", Duration::from_secs(30));
/// Runs `transfer`, which has claims in `layer`, until they all landed or nobody wants them.
///
/// `job` calls it off as soon as nobody waits for it. **Errors** why it ended without some chunks that
/// nobody waited for, or with a final failure.
pub(crate) async fn run(
    core: Arc<Core>,
    layer: Arc<LayerHandle>,
    transfer: Arc<Transfer>,
    job: CancellationToken,
) -> Result<(), FetchFailure> {
    let run = Run {
        core,
        layer,
        transfer,
        job,
        stalls: Mutex::default(),
        route: Mutex::default(),
    };
    let result = run.drive().await;
    if let Err(failure @ FetchFailure::Store(_)) = &result {
        run.layer.flights.finish_all(&run.transfer, Some(failure));
    }
    result
}

pub(super) struct Run {
    pub(super) core: Arc<Core>,
    pub(super) layer: Arc<LayerHandle>,
    pub(super) transfer: Arc<Transfer>,
    /// The way to the piece that is being fetched, where other nodes are asked.
    pub(super) route: Mutex<Option<Way>>,
    job: CancellationToken,
    /// Attempts that stalled, by source: each makes the next one there twice as patient. A source that
    /// is silent for good does not make others wait for longer.
    stalls: Mutex<HashMap<SourceId, u32>>,
}

/// The time in which others hand their claims over to a transfer, as far as they do; ends by being dropped.
struct Turn<'a>(&'a Run);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let transfer = &self.0.transfer;
        lock(&self.0.layer.whole).take_if(|it| Arc::ptr_eq(it, transfer));
    }
}

/// Whatever happens, no claim outlives its transfer: its waiters look again.
impl Drop for Run {
    fn drop(&mut self) {
        drop(Turn(self));
        self.transfer.urgency.receiving(&self.core.gate, false);
        self.layer.flights.finish_all(&self.transfer, None);
        if self.layer.device.is_complete() {
            self.layer.drop_twin();
            self.core.fronts.forget(&self.layer.key());
        }
    }
}

impl Run {
    async fn drive(&self) -> Result<(), FetchFailure> {
        self.take_from_store().await?;
        loop {
            self.land_present();
            if self.layer.flights.is_done(&self.transfer) {
                return Ok(());
            }
            let Err(failure) = self.attempt().await else {
                continue;
            };
            if matches!(failure, FetchFailure::Store(_) | FetchFailure::Cancelled) {
                return Err(failure);
            }
            self.transfer.note(&failure);
            self.layer.flights.finish_unwanted(&self.transfer);
            if self.layer.flights.is_done(&self.transfer) {
                return Err(failure);
            }
        }
    }

    /// Ends when the layer is closed, or when the job is called off and nobody waits.
    pub(super) async fn called_off(&self) {
        let job = async {
            self.job.cancelled().await;
            while self.transfer.urgency.waiters() > 0 {
                let priority = self.transfer.urgency.effective();
                self.transfer.urgency.differs(priority).await;
            }
        };
        tokio::select! {
            () = self.layer.cancel.cancelled() => {}
            () = job => {}
        }
    }

    /// How long a request may be without a byte. It doubles with each stall of the source, or one that
    /// is always slower than the first limit would never give anything.
    pub(super) fn patience(&self, id: SourceId) -> Duration {
        let stalls = lock(&self.stalls).get(&id).copied().unwrap_or(0);
        let doublings = stalls.min(MOST_DOUBLINGS);
        self.core.options.stall.saturating_mul(1 << doublings)
    }

    pub(super) fn stalled(&self, id: SourceId, kind: SourceKind) {
        *lock(&self.stalls).entry(id).or_default() += 1;
        self.core.metrics.stalled(kind);
    }

    /// Runs `work` unless it is called off.
    pub(super) async fn unless_called_off<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, FetchFailure> {
        tokio::select! {
            biased;
            () = self.called_off() => Err(FetchFailure::Cancelled),
            value = work => Ok(value),
        }
    }

    /// Lands chunks that became present by another way.
    pub(super) fn land_present(&self) {
        for chunk in self.layer.flights.claims(&self.transfer) {
            if self.layer.device.is_present(chunk) {
                self.layer.flights.finish(chunk, None);
            }
        }
    }

    /// Checks chunks of before a reboot, and copies from a sealed twin.
    async fn take_from_store(&self) -> Result<(), FetchFailure> {
        let device = &self.layer.device;
        let twins = self.layer.has_twins(&self.core.store);
        if !twins && !device.any_suspect() {
            return Ok(());
        }
        for ordinal in self.layer.flights.claims(&self.transfer) {
            if self.layer.cancel.is_cancelled() {
                return Err(FetchFailure::Cancelled);
            }
            let _slot = self.core.decodes.take(&self.transfer.urgency).await;
            let (core, layer) = (Arc::clone(&self.core), Arc::clone(&self.layer));
            let taken = tokio::task::spawn_blocking(move || from_store(&core, &layer, ordinal));
            if joined(taken.await)?.map_err(|error| FetchFailure::Store(Arc::new(error)))? {
                self.layer.flights.finish(ordinal, None);
            }
        }
        Ok(())
    }

    /// One range request for the first of the claimed chunks.
    async fn attempt(&self) -> Result<(), FetchFailure> {
        let urgency = &self.transfer.urgency;
        let Some(piece) = self.first_piece()? else {
            return Ok(());
        };
        if let Some(peers) = self.core.peers()
            && self.transfer.reach() > Reach::Origin
            && matches!(self.ask_peers(peers).await?, Asked::Again)
        {
            return Ok(());
        }
        let (id, source) = self.choose(self.layer.judged_by(piece.chunks[0])).await?;
        let passes = self.layer.stream_of(piece.chunks[0]).is_some();
        if (source.whole_blob_only() || passes) && self.hand_over_to_whole() {
            return Ok(());
        }
        // Its turn ends before `drive` looks at the claims again: what was handed over until then is seen.
        let _turn = Turn(self);
        if passes && !self.become_whole() {
            return Ok(());
        }
        let bytes = piece.extent.len();
        // Where all of the blob comes, all windows come by.
        if !source.whole_blob_only() {
            match self.decodable(piece) {
                Decodable::Now(..) => {}
                Decodable::Resting => return self.rest_for_windows().await,
                Decodable::Stuck(chunk) => return self.wait_for_before(&chunk).await,
            }
        }
        let most = self.core.peers().and_then(|peers| peers.origin_requests());
        let slots = self.core.origins.at_most(source.label(), most);
        let room = self.room_of_list(bytes).await?;
        let step = (urgency.effective() == Priority::Foreground)
            .then(|| self.enter(SLOT_STEP, source.label().to_owned()));
        let slot = self.unless_called_off(slots.take(urgency)).await?;
        self.unless_called_off(self.core.gate.turn(urgency)).await?;
        drop(step);
        // It may have waited long: what landed meanwhile is not asked for.
        self.land_present();
        let Some(piece) = self.first_piece()? else {
            return Ok(());
        };
        let decodable = match source.whole_blob_only() {
            true => Decodable::Now(piece, Lacking::new()),
            false => self.decodable(piece),
        };
        let (piece, lacking) = match decodable {
            Decodable::Now(piece, lacking) => (piece, lacking),
            // It is waited for without a slot.
            Decodable::Resting | Decodable::Stuck(_) => return Ok(()),
        };
        let began = clock::now();
        let lent = Lent { slots, slot, room };
        self.transfer.fed(true);
        let result = self.request(id, &source, (&piece, &lacking), &lent).await;
        self.transfer.fed(false);
        drop(lent);
        urgency.receiving(&self.core.gate, false);
        match &result {
            Ok(()) => self.layer.sources.succeeded(id),
            Err((_, FetchFailure::Store(_) | FetchFailure::Cancelled)) => {}
            Err((by, failure)) => {
                // What a mirror did says nothing of the source: it asks others at once.
                if *by == source.kind() {
                    if let Some(known) = &mut *lock(&self.route) {
                        known.way.origin_failed();
                    }
                    self.transfer.reask();
                    self.layer.sources.failed(id, failure, began, clock::now());
                }
                tracing::warn!(
                    device = %self.layer.key(), source = source.label(), %by,
                    extent = %piece.extent, "failed to fetch chunks: {failure}"
                );
            }
        }
        result.map_err(|(_, failure)| failure)
    }

    /// Waits for room among what is under way of boot lists, if it is of one and no reader waits for it.
    async fn room_of_list(&self, bytes: u64) -> Result<Option<Room<'_>>, FetchFailure> {
        let urgency = &self.transfer.urgency;
        let Some((_, number)) = self.transfer.listed else {
            return Ok(None);
        };
        if urgency.effective() != Priority::Boot {
            return Ok(None);
        }
        self.unless_called_off(async {
            tokio::select! {
                biased;
                room = self.core.listed.take(number, bytes, &self.core.pace) => Some(room),
                () = urgency.differs(Priority::Boot) => None,
            }
        })
        .await
    }

    /// Enters a step of this transfer.
    pub(super) fn enter(
        &self,
        kind: StepKind,
        subject: impl Display + Send + 'static,
    ) -> StepGuard {
        let whom = priority_word(self.transfer.urgency.effective());
        self.core.metrics.steps().enter(kind, whom, subject)
    }

    /// What to ask for next; `None` when nothing is left to bring.
    fn first_piece(&self) -> Result<Option<Piece>, FetchFailure> {
        let claims = self.layer.flights.claims(&self.transfer);
        let Some(first) = claims.first().copied() else {
            return Ok(None);
        };
        let piece = match self.layer.stream_of(first) {
            Some(_) => self.pass_piece(&claims),
            None => {
                let chunks = claims
                    .into_iter()
                    .map_while(|chunk| self.layer.chunks().chunk(chunk))
                    .take_while(|chunk| chunk.codec.is_random_access());
                let listed = self.transfer.listed.map(|(limits, _)| limits);
                let limits = listed.unwrap_or_else(|| self.core.options.limits());
                let pieces = coalesce(chunks, &limits, |_, _| false);
                pieces.into_iter().next()
            }
        };
        match piece {
            Some(piece) => Ok(Some(piece)),
            // The chunk map was damaged since the chunk was claimed.
            None => Err(FetchFailure::Store(Arc::new(StoreError::NoSuchChunk {
                chunk: first,
            }))),
        }
    }

    /// The source to ask now; waits for one while somebody waits for the transfer.
    async fn choose(&self, chunk: u32) -> Result<(SourceId, Arc<dyn BlobSource>), FetchFailure> {
        // From before the first look: nothing that is added meanwhile is missed.
        let mut changed = self.layer.sources.watch();
        let key = self.layer.key();
        let subject = std::fmt::from_fn(move |f| write!(f, "chunk {chunk} of {key}"));
        let _step = self.enter(SOURCE_STEP, subject);
        loop {
            let until = match self.layer.sources.choose(Some(chunk), clock::now()) {
                Choice::Use(id, source) => return Ok((id, source)),
                Choice::Wait(until) => Some(until),
                Choice::Nobody => {
                    self.transfer.note(&FetchFailure::NoSource);
                    clock::moment_after(self.core.options.lookout)
                }
            };
            if self.transfer.urgency.waiters() == 0 {
                return Err(self
                    .transfer
                    .last_failure()
                    .unwrap_or(FetchFailure::NoSource));
            }
            self.unless_called_off(async {
                tokio::select! {
                    () = clock::sleep_until(until) => {}
                    // The sender is in the set: it cannot be closed.
                    _ = changed.changed() => {}
                }
            })
            .await?;
        }
    }

    /// Gives all claims to the stream on which the whole blob comes, if there is one.
    fn hand_over_to_whole(&self) -> bool {
        let whole = lock(&self.layer.whole);
        match &*whole {
            Some(other) if !Arc::ptr_eq(other, &self.transfer) => {
                self.layer.flights.hand_over(&self.transfer, other);
                true
            }
            _ => false,
        }
    }

    /// Becomes the stream on which the whole blob comes; false when another is it, which then has
    /// all claims.
    fn become_whole(&self) -> bool {
        let mut whole = lock(&self.layer.whole);
        match &*whole {
            Some(other) if !Arc::ptr_eq(other, &self.transfer) => {
                self.layer.flights.hand_over(&self.transfer, other);
                false
            }
            _ => {
                *whole = Some(Arc::clone(&self.transfer));
                true
            }
        }
    }

    /// Whether it is this transfer's turn, and there is anything that can be had by prefix only.
    pub(super) fn holds_pass(&self) -> bool {
        let whole = lock(&self.layer.whole);
        let ours = |it: &Arc<Transfer>| Arc::ptr_eq(it, &self.transfer);
        !self.layer.streams().is_empty() && whole.as_ref().is_some_and(ours)
    }

    /// **Errors** with the kind of place that failed, which may be a mirror of the source.
    async fn request(
        &self,
        id: SourceId,
        source: &Arc<dyn BlobSource>,
        (piece, lacking): (&Piece, &Lacking),
        lent: &Lent<'_>,
    ) -> Result<(), (SourceKind, FetchFailure)> {
        let priority = self.transfer.urgency.effective();
        let context = ReadContext::new(priority).with_cancel(self.layer.cancel.clone());
        let stall = self.patience(id);
        let label: Arc<str> = source.label().into();
        let opening = async {
            let _asking = (priority == Priority::Foreground).then(|| self.core.gate.asks());
            let began = clock::now();
            let opening = source.open(&context, piece.extent);
            let in_time = tokio::time::timeout(stall, opening).await;
            let opened = in_time.unwrap_or_else(|_| {
                self.stalled(id, source.kind());
                Err(SourceError::Stalled {
                    after: stall,
                    offset: piece.extent.start(),
                })
            });
            // Who gives the bytes says how far away they are.
            let given = |stream: &BlobStream| served_by(stream, source.kind());
            if opened
                .as_ref()
                .is_ok_and(|it| given(it) == SourceKind::Origin)
            {
                let now = clock::now();
                self.core.pace.answered(now - began, now);
            }
            let label = Arc::clone(&label);
            opened.map_err(|error| FetchFailure::Source { label, error })
        };
        // Beside it: what is lacking costs no round trip.
        let reader = self.layer.window_reader(&self.core, &self.transfer);
        let preparing = self.layer.windows.prepare(&reader, lacking);
        let both = async { tokio::try_join!(opening, preparing) };
        let opened = self.unless_called_off(both).await.flatten();
        let metrics = &self.core.metrics;
        let stream = match opened {
            Ok((stream, ())) => stream,
            Err(failure) => {
                // What mirrors failed to give is counted where they are asked.
                metrics.requested(source.kind(), priority);
                if is_of_source(&failure) {
                    metrics.failed(source.kind(), failure.class());
                }
                return Err((source.kind(), failure));
            }
        };
        let kind = served_by(&stream, source.kind());
        let served = stream.served.clone();
        metrics.requested(kind, priority);
        let whole = stream.extent != piece.extent;
        if whole && !self.become_whole() {
            return Ok(());
        }
        let receiving = Receiving::new(self, id, (kind, label), served, lent);
        let result = receiving.receive(stream).await;
        if let Err(failure) = &result
            && is_of_source(failure)
        {
            metrics.failed(kind, failure.class());
        }
        result.map_err(|failure| (kind, failure))
    }
}

/// What kind of place gives the bytes of a stream that a source of this kind opened.
fn served_by(stream: &BlobStream, asked: SourceKind) -> SourceKind {
    stream.served.as_ref().map_or(asked, Served::kind)
}

/// Whether a failure counts as one of the source that was asked.
const fn is_of_source(failure: &FetchFailure) -> bool {
    matches!(
        failure,
        FetchFailure::Source { .. } | FetchFailure::Corrupt { .. } | FetchFailure::NoSource
    )
}

/// Makes a chunk present from what the store has; false when it does not have it.
fn from_store(core: &Core, layer: &LayerHandle, ordinal: u32) -> Result<bool, StoreError> {
    let device = &layer.device;
    if device.is_present(ordinal) {
        return Ok(true);
    }
    let Some(chunk) = layer.chunks().chunk(ordinal) else {
        return Ok(false);
    };
    match device.recheck(ordinal)? {
        Rechecked::Trusted => {}
        Rechecked::Dropped => {
            core.metrics.corrupt(FROM_STORE);
            tracing::warn!(device = %device.key(), chunk = ordinal, "drop chunk that fails its check");
        }
        Rechecked::NotSuspect => {}
    }
    if !device.is_present(ordinal) {
        match layer.twin(&core.store) {
            Some(twin) if twin.copy(device, &chunk)? => {}
            _ => return Ok(false),
        }
    }
    core.metrics.committed(FROM_STORE);
    layer.found_in_store(chunk.device.len());
    Ok(true)
}

/// The result of a task that is never aborted; its panic goes on here.
pub(super) fn joined<T>(result: Result<T, JoinError>) -> Result<T, FetchFailure> {
    match result {
        Ok(value) => Ok(value),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(FetchFailure::Cancelled),
    }
}

/// How urgent the transfer of a fill is once its waiters are served: what it read ahead.
pub(crate) const fn base_of(priority: Priority) -> Priority {
    match priority {
        Priority::Foreground | Priority::Boot => Priority::Boot,
        Priority::Background => Priority::Background,
    }
}
