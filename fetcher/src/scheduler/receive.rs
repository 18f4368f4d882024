// SPDX-License-Identifier: Apache-2.0
//! The body of one request of a transfer: read as the gate allows, cut into frames, each decoded as it is complete.
//!
//! **Bounds** frames that are decoded or wait for it: [`DECODES`], and [`QUEUED_BYTES`] of them and one more;
//! decoders' output: that of one frame, at most 16 MiB, for each slot of the fetcher.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use sluice_blockindex::chunkmap::Codec;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};

use super::decode::{Decode, DecodeFailure, Decoded, Unpacked};
use super::error::FetchFailure;
use super::pace::Train;
use super::plan::{CutFrame, FrameCutter};
use super::prefix::{Pass, Step};
use super::slots::{Slot, Slots};
use super::sources::SourceId;
use super::transfer::{Run, joined};
use super::volume::Room;
use super::windows::{Tail, frame_start};
use crate::clock;
use crate::source::{BlobStream, Served, SourceError, SourceKind};
use crate::store::Committed;

/// Frames of one transfer that are decoded or wait for it; beyond it the body is not read on.
pub(super) const DECODES: usize = 8;

/// The same in bytes: the largest frame of an unmodified blob. Those that Sluice writes stay far below it.
const QUEUED_BYTES: usize = 8 << 20;

/// What must come within a body's patience, or it has stalled: a source that trickles would pin its
/// chunks for ever. At 4 KiB in 10 s the frame of a chunk, some 64 KiB, takes half of the default
/// read deadline; below it asking another source is the better chance. A line of 64 kbit/s carries
/// 20 such bodies at once, and on a slower one patience doubles.
const PROGRESS_BYTES: usize = 4 << 10;

/// Work on bytes of the body that is done.
enum Done {
    Frame(Unpacked),
    Step(Box<Step>),
}

/// The slot of an attempt, and where it is from.
pub(super) struct Lent<'a> {
    pub(super) slots: Slots,
    pub(super) slot: Slot,
    /// Its share of what is under way of boot lists.
    pub(super) room: Option<Room<'a>>,
}

/// The body of one request.
pub(super) struct Receiving<'a> {
    pub(super) run: &'a Run,
    pub(super) id: SourceId,
    /// What kind of place gives it, which may be a mirror of the source.
    pub(super) kind: SourceKind,
    pub(super) served: Option<Served>,
    pub(super) lent: &'a Lent<'a>,
    pub(super) label: Arc<str>,
    /// What ended the flight of no chunk: another attempt may bring it.
    failed: Option<FetchFailure>,
    /// Bytes of frames that are decoded or wait for it.
    queued_bytes: usize,
    /// Of the last frame of gzip.
    tail: Option<Tail>,
    /// Decodes what can be had by prefix only, when it is this transfer's turn.
    pass: Option<Pass>,
}

impl<'a> Receiving<'a> {
    /// The body of a request for `run` to the source `id`, which this kind of place gives.
    pub(super) fn new(
        run: &'a Run,
        id: SourceId,
        (kind, label): (SourceKind, Arc<str>),
        served: Option<Served>,
        lent: &'a Lent<'a>,
    ) -> Self {
        Self {
            run,
            id,
            kind,
            served,
            lent,
            label,
            failed: None,
            queued_bytes: 0,
            tail: None,
            pass: None,
        }
    }

    /// Reads it as far as anything of it is wanted.
    ///
    /// **Errors** of the source; those of chunks that did not become present. **Cancel** loses what was not decoded.
    pub(super) async fn receive(mut self, stream: BlobStream) -> Result<(), FetchFailure> {
        let mut decodes = JoinSet::new();
        let run = self.run;
        self.pass = run.holds_pass().then(|| Pass::new(run, stream.extent));
        let read = self.read_body(stream, &mut decodes).await;
        // What was read is decoded in any case: it is paid for.
        while let Some(done) = decodes.join_next().await {
            self.settle(done, &mut decodes)?;
        }
        if let Some(pass) = self.pass.take() {
            pass.end(run);
        }
        read?;
        match self.failed {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    async fn read_body(
        &mut self,
        stream: BlobStream,
        decodes: &mut JoinSet<Done>,
    ) -> Result<(), FetchFailure> {
        let (run, layer) = (self.run, &self.run.layer);
        let (gate, urgency) = (&run.core.gate, &run.transfer.urgency);
        let (stall, lull) = (run.patience(self.id), run.core.options.lull);
        let BlobStream {
            extent, mut body, ..
        } = stream;
        let passes = self.pass.is_some();
        let coming = layer.chunks_in(extent);
        let coming = coming.filter(|chunk| passes || chunk.codec.is_random_access());
        let missing = coming.filter(|chunk| !layer.device.is_present(chunk.ordinal));
        let missing = missing.map(|chunk| chunk.ordinal);
        layer.flights.claim(&run.transfer, missing);
        let alone = layer.chunks_in(extent);
        let alone = alone.filter(|chunk| chunk.codec.is_random_access());
        let mut cutter = FrameCutter::new(extent.start(), alone);
        let mut called_off = pin!(run.called_off());
        // When a byte came, and when the last of enough bytes came.
        let mut last_byte = clock::now();
        let mut quiet_since = clock::now();
        let mut progress_bytes = 0;
        let mut paused = false;
        let mut flowing = false;
        let mut train = Train::default();
        loop {
            // At its very end the body is read to its end, so that its connection can be used again.
            let rest = cutter.at() < extent.end();
            if rest && decodes.is_empty() && layer.flights.is_done(&run.transfer) {
                return Ok(());
            }
            let queued_bytes = self.queued_bytes + self.pass.as_ref().map_or(0, Pass::queued_bytes);
            let reading = !paused && decodes.len() < DECODES && queued_bytes < QUEUED_BYTES;
            tokio::select! {
                biased;
                () = &mut called_off => return Err(FetchFailure::Cancelled),
                Some(done) = decodes.join_next() => {
                    self.settle(done, decodes)?;
                    if !reading {
                        train.pause();
                        (last_byte, quiet_since) = (clock::now(), clock::now());
                    }
                }
                // Nobody waits for it, it stands still, and a reader needs its slot.
                () = self.lent.slots.plea(),
                    if paused && self.lent.slot.of_readers && urgency.waiters() == 0 =>
                {
                    return Err(FetchFailure::Cancelled);
                }
                () = gate.turn(urgency), if paused => {
                    paused = false;
                    train.pause();
                    (last_byte, quiet_since) = (clock::now(), clock::now());
                }
                part = body.next(), if reading => match part {
                    None => {
                        run.core.pace.ended(train);
                        return Ok(());
                    }
                    Some(Err(error)) => {
                        return Err(FetchFailure::Source { label: self.label.clone(), error });
                    }
                    Some(Ok(bytes)) => {
                        last_byte = clock::now();
                        progress_bytes += bytes.len();
                        if progress_bytes >= PROGRESS_BYTES {
                            (quiet_since, progress_bytes) = (last_byte, 0);
                        }
                        let count = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                        if self.kind == SourceKind::Origin {
                            run.core.pace.arrived(&mut train, count, last_byte);
                        }
                        self.take(bytes, &mut cutter, decodes);
                        if let Some(peers) = run.core.peers() {
                            peers.downloaded(count, true).await;
                        }
                        flowing = true;
                        urgency.receiving(gate, true);
                        paused = !gate.may_run(urgency.effective());
                    }
                },
                () = tokio::time::sleep_until(last_byte + lull), if reading && flowing => {
                    flowing = false;
                    urgency.receiving(gate, false);
                }
                () = tokio::time::sleep_until(quiet_since + stall), if reading => {
                    run.stalled(self.id, self.kind);
                    let error = SourceError::Stalled { after: stall, offset: cutter.at() };
                    return Err(FetchFailure::Source { label: self.label.clone(), error });
                }
            }
        }
    }

    /// Takes bytes of the body and starts decoding what they complete.
    fn take(&mut self, bytes: Bytes, cutter: &mut FrameCutter, decodes: &mut JoinSet<Done>) {
        let run = self.run;
        let count = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let priority = run.transfer.urgency.effective();
        run.core.metrics.arrived(self.kind, priority, count);
        run.layer.arrived(self.kind, count);
        if let Some(room) = &self.lent.room {
            room.received(count);
        }
        if let Some(pass) = &mut self.pass {
            pass.push(bytes.clone());
        }
        self.step(decodes);
        let device = &run.layer.device;
        for frame in cutter.push(bytes, |chunk| !device.is_present(chunk.ordinal)) {
            self.queued_bytes += frame.bytes.len();
            let (before, tail) = self.link(&frame);
            let decode = Decode {
                core: Arc::clone(&run.core),
                layer: Arc::clone(&run.layer),
                transfer: Arc::clone(&run.transfer),
                frame,
                before,
                tail,
            };
            decodes.spawn(async move { Done::Frame(decode.run().await) });
        }
    }

    /// Has the pass go on, where there is one.
    fn step(&mut self, decodes: &mut JoinSet<Done>) {
        let pass = self.pass.as_mut();
        if let Some(step) = pass.and_then(|pass| pass.step(self.run)) {
            decodes.spawn(async move { Done::Step(Box::new(step.await)) });
        }
    }

    /// Links a frame of gzip to the one before, if that is being decoded, and to the one after.
    fn link(
        &mut self,
        frame: &CutFrame,
    ) -> (
        Option<oneshot::Receiver<Bytes>>,
        Option<oneshot::Sender<Bytes>>,
    ) {
        let (Some(first), Some(last)) = (frame.chunks.first(), frame.chunks.last()) else {
            return (None, None);
        };
        if first.codec != Codec::Deflate {
            return (None, None);
        }
        let before = self.tail.take();
        let before = before.filter(|tail| tail.end == frame_start(first));
        let (sender, bytes) = oneshot::channel();
        let end = last.device.end();
        self.tail = Some(Tail { end, bytes });
        (before.map(|tail| tail.bytes), Some(sender))
    }

    /// Takes note of what came of a frame, or of a step of the pass.
    fn settle(
        &mut self,
        done: Result<Done, JoinError>,
        decodes: &mut JoinSet<Done>,
    ) -> Result<(), FetchFailure> {
        let chunks = match joined(done)? {
            Done::Frame(unpacked) => {
                self.queued_bytes = self.queued_bytes.saturating_sub(unpacked.frame_bytes);
                unpacked.chunks
            }
            Done::Step(step) => {
                if let Some(pass) = &mut self.pass {
                    pass.done(step.bytes, step.front);
                }
                self.step(decodes);
                step.chunks
            }
        };
        chunks.into_iter().try_for_each(|chunk| self.land(chunk))
    }

    fn land(&mut self, (chunk, result): Decoded) -> Result<(), FetchFailure> {
        let run = self.run;
        match result {
            Ok(committed) => {
                if committed == Committed::Stored {
                    run.core.metrics.committed(self.kind.as_str());
                }
                run.layer.flights.finish(chunk, None);
            }
            Err(DecodeFailure::Store(error)) => return Err(FetchFailure::Store(error)),
            Err(DecodeFailure::NotKept(error)) => return run.not_kept(chunk, error),
            // Not of this source.
            Err(DecodeFailure::Window(failure)) => {
                run.transfer.note(&failure);
                self.failed = Some(failure);
            }
            Err(DecodeFailure::Corrupt(error)) => {
                tracing::warn!(
                    device = %run.layer.key(), source = %self.label, given_by = %self.kind, chunk,
                    "drop corrupt chunk: {error}"
                );
                run.core.metrics.corrupt(self.kind.as_str());
                match &self.served {
                    // The next attempt asks another place.
                    Some(served) => served.blame(),
                    None => {
                        let chunk = run.layer.judged_by(chunk);
                        run.layer.sources.sent_corrupt(self.id, chunk, clock::now());
                    }
                }
                let failure = FetchFailure::Corrupt {
                    label: self.label.clone(),
                    error,
                };
                run.transfer.note(&failure);
                self.failed = Some(failure);
            }
        }
        Ok(())
    }
}
