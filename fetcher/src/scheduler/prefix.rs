// SPDX-License-Identifier: Apache-2.0
//! Chunks that can be had by prefix only: parts of a zstd frame that is too long to be decompressed for each.
//!
//! To get one, all bytes of the frame up to it go through one decoder, and every missing chunk on the way is
//! stored. Such a *pass* is made by one transfer of a layer at a time; others hand their chunks over to it, as
//! they do where a source sends the whole blob. So readers behind its front have theirs as it comes by, and
//! those ahead of it when it gets there. Between two requests its decoder is kept ([`Fronts`]): the next
//! one goes on where it stopped, also for another transfer, and no byte comes twice. What is missing behind
//! the front (it rotted, or the store did not take it) costs a new pass from the frame's first byte.
//!
//! **Bounds** decoders that are kept: [`FRONTS`], each a chunk and the window that its frame asks for (8 MiB at
//! the levels in use, 128 MiB at most).

use std::collections::VecDeque;
use std::num::NonZero;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lru::LruCache;
use sluice_blockindex::chunkmap::{ChunkMap, Codec};
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_blockindex::frames::StreamDecoder;

use super::Core;
use super::decode::{DecodeFailure, Decoded, WRITE_STEP};
use super::flight::Transfer;
use super::layer::LayerHandle;
use super::plan::Piece;
use super::transfer::Run;
use crate::metrics::priority_word;
use crate::store::{Committed, DeviceKey, lock};

/// Decoders kept, of all layers: as many layers may be completed beside each other. Beyond, the one that was used
/// longest ago goes, and its layer begins anew.
const FRONTS: usize = 8;

/// Bytes of the blob that go through the decoder at once: chunks land after each.
const STEP_BYTES: usize = 64 << 10;

/// How far a pass has come in a frame.
#[derive(Debug)]
pub(super) struct Front {
    decoder: StreamDecoder,
    /// The next byte of the blob.
    at: u64,
}

impl Front {
    fn next(&self) -> Option<u32> {
        self.decoder.chunk().map(|chunk| chunk.ordinal)
    }
}

/// Decoders of passes that are not finished, the latest of each layer.
#[derive(Debug)]
pub(super) struct Fronts(Mutex<LruCache<DeviceKey, Front>>);

impl Default for Fronts {
    fn default() -> Self {
        let most = NonZero::new(FRONTS).unwrap_or(NonZero::<usize>::MIN);
        Self(Mutex::new(LruCache::new(most)))
    }
}

impl Fronts {
    /// Where a pass may go on for chunks of `stream` from `first` on.
    fn place(&self, key: &DeviceKey, stream: &Range<u32>, first: u32) -> Option<u64> {
        let mut fronts = lock(&self.0);
        let front = fronts.get(key)?;
        let next = front.next()?;
        (stream.contains(&next) && next <= first).then_some(front.at)
    }

    fn take(&self, key: &DeviceKey) -> Option<Front> {
        lock(&self.0).pop(key)
    }

    /// Keeps the front of a layer, unless one that is farther is kept.
    fn keep(&self, key: DeviceKey, front: Front) {
        let mut fronts = lock(&self.0);
        let farther = |other: &Front| other.next() > front.next();
        if front.next().is_some() && !fronts.peek(&key).is_some_and(farther) {
            fronts.put(key, front);
        }
    }

    /// Forgets the layer's.
    pub(super) fn forget(&self, key: &DeviceKey) {
        lock(&self.0).pop(key);
    }
}

/// The long zstd frames of a layer, as the chunks of each.
pub(super) fn streams_of(chunks: &ChunkMap) -> Vec<Range<u32>> {
    let mut streams: Vec<Range<u32>> = Vec::new();
    for chunk in chunks.chunks().flatten() {
        match (chunk.codec, streams.last_mut()) {
            (Codec::ZstdStream, _) => streams.push(chunk.ordinal..chunk.ordinal + 1),
            (Codec::ZstdNext, Some(stream)) => stream.end = chunk.ordinal + 1,
            _ => {}
        }
    }
    streams
}

/// A part of the body that goes through one decoder.
#[derive(Debug)]
struct Section {
    extent: Extent<BlobSpace>,
    /// None while it works, and when the bytes were no good.
    front: Option<Front>,
}

/// The pass of one request: takes its bytes and decodes what of them is in long zstd frames, one step at a time.
#[derive(Debug)]
pub(super) struct Pass {
    /// The next byte of the body.
    at: u64,
    sections: VecDeque<Section>,
    /// Bytes of sections that wait for their decoder, by their places.
    queue: VecDeque<(u64, Bytes)>,
    queued_bytes: usize,
    busy: bool,
}

impl Pass {
    /// The pass over the body that is `extent`, for the transfer whose turn it is.
    pub(super) fn new(run: &Run, extent: Extent<BlobSpace>) -> Self {
        let (layer, fronts) = (&run.layer, &run.core.fronts);
        let mut kept = fronts.take(&layer.key());
        let mut sections = VecDeque::new();
        for stream in layer.streams() {
            let chunks = stream.clone().filter_map(|it| layer.chunks().chunk(it));
            let mut missing = chunks.filter(|chunk| {
                chunk.blob.end() > extent.start()
                    && chunk.blob.end() <= extent.end()
                    && !layer.device.is_present(chunk.ordinal)
            });
            let Some(first) = missing.next() else {
                continue;
            };
            let end = missing.next_back().unwrap_or(first).blob.end();
            // What the request was made for begins at the front, whatever is missing behind it.
            let usable = |front: &mut Front| {
                let next = front.next().filter(|next| stream.contains(next));
                next.is_some_and(|next| next <= first.ordinal || front.at == extent.start())
                    && (extent.start()..end).contains(&front.at)
            };
            let front = kept.take_if(usable);
            let front = front.or_else(|| fresh(layer.chunks(), stream.start));
            let Some(front) = front.filter(|front| front.at >= extent.start()) else {
                continue;
            };
            if let Some(extent) = Extent::new(front.at, end) {
                let front = Some(front);
                sections.push_back(Section { extent, front });
            }
        }
        if let Some(kept) = kept {
            fronts.keep(layer.key(), kept);
        }
        Self {
            at: extent.start(),
            sections,
            queue: VecDeque::new(),
            queued_bytes: 0,
            busy: false,
        }
    }

    /// Bytes that wait to be decoded, or are.
    pub(super) fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Takes the next bytes of the body; those of no section are dropped.
    pub(super) fn push(&mut self, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let at = self.at;
            let section = self.sections.iter().find(|it| it.extent.end() > at);
            let until = match section.map(|section| section.extent) {
                Some(extent) if at < extent.start() => extent.start(),
                Some(extent) => extent.end(),
                None => u64::MAX,
            };
            let length = usize::try_from(until - at).map_or(bytes.len(), |it| it.min(bytes.len()));
            let part = bytes.split_to(length);
            if section.is_some_and(|section| section.extent.contains(at)) {
                self.queued_bytes += part.len();
                self.queue.push_back((at, part));
            }
            self.at = at.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
        }
    }

    /// The next step, unless one is being done or there is none.
    pub(super) fn step(&mut self, run: &Run) -> Option<impl Future<Output = Step> + use<>> {
        if self.busy {
            return None;
        }
        let (mut parts, mut bytes) = (Vec::new(), 0);
        while bytes < STEP_BYTES
            && let Some((at, part)) = self.queue.pop_front()
        {
            while let Some(over) = self.sections.pop_front_if(|it| it.extent.end() <= at) {
                Self::keep(run, over);
            }
            match self.sections.front() {
                Some(Section { front: Some(_), .. }) => {
                    bytes += part.len();
                    parts.push(part);
                }
                // What follows bytes that were no good.
                _ => self.queued_bytes -= part.len(),
            }
        }
        let front = self.sections.front_mut()?.front.take_if(|_| bytes > 0)?;
        self.busy = true;
        Some(step(
            Arc::clone(&run.core),
            Arc::clone(&run.layer),
            Arc::clone(&run.transfer),
            front,
            parts,
        ))
    }

    /// A step is done.
    pub(super) fn done(&mut self, bytes: usize, front: Option<Front>) {
        self.busy = false;
        self.queued_bytes = self.queued_bytes.saturating_sub(bytes);
        if let Some(section) = self.sections.front_mut() {
            section.front = front;
        }
    }

    /// The body is over, and all steps are done.
    pub(super) fn end(mut self, run: &Run) {
        if let Some(section) = self.sections.pop_front() {
            Self::keep(run, section);
        }
    }

    fn keep(run: &Run, section: Section) {
        let over = run.layer.cancel.is_cancelled() || run.layer.device.is_complete();
        if let Some(front) = section.front.filter(|_| !over) {
            run.core.fronts.keep(run.layer.key(), front);
        }
    }
}

fn fresh(chunks: &ChunkMap, first: u32) -> Option<Front> {
    let decoder = StreamDecoder::of_chunk(chunks, first).ok()?;
    let at = decoder.chunk()?.blob.start();
    Some(Front { decoder, at })
}

/// What came of a step.
pub(super) struct Step {
    pub(super) bytes: usize,
    pub(super) chunks: Vec<Decoded>,
    /// None when the bytes were no good.
    pub(super) front: Option<Front>,
}

async fn step(
    core: Arc<Core>,
    layer: Arc<LayerHandle>,
    transfer: Arc<Transfer>,
    front: Front,
    parts: Vec<Bytes>,
) -> Step {
    let slots = Arc::clone(&core);
    let slot = slots.decodes.take(&transfer.urgency).await;
    let work = move || {
        let (key, next) = (layer.key(), front.next().unwrap_or(0));
        let subject = std::fmt::from_fn(move |f| write!(f, "chunk {next} of {key}"));
        let whom = priority_word(transfer.urgency.effective());
        let _step = core.metrics.steps().enter(WRITE_STEP, whom, subject);
        advance(&core, &layer, front, &parts)
    };
    let done = tokio::task::spawn_blocking(work).await;
    drop(slot);
    match done {
        Ok(step) => step,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// **Blocks**.
fn advance(core: &Core, layer: &LayerHandle, mut front: Front, parts: &[Bytes]) -> Step {
    let mut chunks = Vec::new();
    let mut next = front.next().unwrap_or(0);
    let bytes = parts.iter().map(Bytes::len).sum();
    for part in parts {
        let pushed = front.decoder.push(part, &mut |chunk, device_bytes| {
            next = chunk.ordinal + 1;
            let kept = match layer.device.is_present(chunk.ordinal) {
                true => Ok(Committed::Already),
                false => core
                    .passing
                    .keep(&layer.device, chunk, device_bytes.to_vec()),
            };
            chunks.push((chunk.ordinal, kept));
        });
        if let Err(error) = pushed {
            chunks.push((next, Err(DecodeFailure::Corrupt(error))));
            return Step {
                bytes,
                chunks,
                front: None,
            };
        }
        front.at = front.at.saturating_add(part.len() as u64);
    }
    Step {
        bytes,
        chunks,
        front: Some(front),
    }
}

impl Run {
    /// What to ask for, when the first of `claims` is one of a long frame: from where a pass can begin, or go on, to
    /// the last of them.
    pub(super) fn pass_piece(&self, claims: &[u32]) -> Option<Piece> {
        let (layer, first) = (&self.layer, *claims.first()?);
        let stream = layer.stream_of(first)?;
        let ours = claims.iter().copied();
        let chunks: Vec<u32> = ours.take_while(|it| stream.contains(it)).collect();
        let end = layer.chunks().chunk(*chunks.last()?)?.blob.end();
        let begin = layer.chunks().chunk(stream.start)?.blob.start();
        let place = self.core.fronts.place(&layer.key(), &stream, first);
        let start = place.filter(|at| *at < end).unwrap_or(begin);
        let extent = Extent::new(start, end)?;
        Some(Piece { extent, chunks })
    }
}
