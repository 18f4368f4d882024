// SPDX-License-Identifier: Apache-2.0
//! Windows: the up to 32 KiB of output that a part of a gzip blob may copy from.
//!
//! A frame that begins between two deflate blocks needs them, and who reads a blob from its front has
//! them: they are the device bytes right before. In this order they come from
//! 1. the decoder of the frame before, in the same request ([`Tail`]);
//! 2. the device, where the chunks before the frame are present ([`of_device`]);
//! 3. the file of windows, a source of its own ([`LayerWindows`]): one ranged read for all that a request
//!    lacks, and for some windows after these, which are kept for a while.
//!
//! Where no file of windows is known, a request ends before what could not be decoded, and waits until another
//! has brought what stands before.
//!
//! The file of windows is known by the digests of its payloads, device bytes by their crc32. So a wrong window
//! is never used; and if it were, the chunk's digest would tell.

mod file;

use bytes::Bytes;
use sluice_blockindex::chunkmap::{Chunk, ChunkMap, Codec, RestartState, WindowPin};
use sluice_blockindex::extent::Extent;
use sluice_blockindex::frames::is_kept_well;
use sluice_blockindex::gzip::WINDOW_MAX_BYTES;
use tokio::sync::oneshot;

use super::error::FetchFailure;
use super::plan::Piece;
use super::transfer::{Run, SOURCE_STEP};
use crate::clock;
use crate::store::Device;

pub(super) use file::{LayerWindows, Reader};

/// The device bytes right before a frame, as they come from the decoder of the frame before.
#[derive(Debug)]
pub(super) struct Tail {
    /// Where in the device they end.
    pub(super) end: u64,
    /// Up to 32 KiB; nothing when that frame was no good.
    pub(super) bytes: oneshot::Receiver<Bytes>,
}

/// The last device bytes of `before` and `out`, which follow each other: what a next frame may copy from.
pub(super) fn tail_of(before: &[u8], out: &[u8]) -> Bytes {
    let last = |bytes: &[u8], most: usize| bytes.len().saturating_sub(most);
    let own = &out[last(out, WINDOW_MAX_BYTES)..];
    let older = &before[last(before, WINDOW_MAX_BYTES - own.len())..];
    [older, own].concat().into()
}

/// The window that a frame of gzip has to be given; `None` when it needs none.
pub(super) fn pin_of(chunks: &ChunkMap, chunk: &Chunk) -> Option<WindowPin> {
    match chunks.restart(chunk)?.state {
        RestartState::Member => None,
        RestartState::Block { window, .. } => window,
    }
}

/// First device byte that a chunk's frame gives.
pub(super) fn frame_start(chunk: &Chunk) -> u64 {
    let skip = u64::from(chunk.skip_bytes);
    chunk.device.start().saturating_sub(skip)
}

/// The chunks that hold the `bytes` device bytes before `start`; `None` before the device's first byte.
fn before(chunks: &ChunkMap, start: u64, bytes: u32) -> Option<std::ops::Range<u32>> {
    let extent = Extent::new(start.checked_sub(bytes.into())?, start)?;
    Some(chunks.covering(extent))
}

/// Whether the window before `start` will be in the device once the chunks from `first` on have come.
pub(super) fn comes_by(device: &Device, start: u64, bytes: u32, first: u32) -> bool {
    before(device.chunks(), start, bytes).is_some_and(|mut chunks| {
        chunks.all(|ordinal| ordinal >= first || device.is_present(ordinal))
    })
}

/// The `bytes` device bytes before `start`, if they are present and did not rot. **Blocks**.
pub(super) fn of_device(device: &Device, start: u64, bytes: u32) -> Option<Vec<u8>> {
    let mut found = Vec::new();
    for ordinal in before(device.chunks(), start, bytes)? {
        let chunk = device.chunks().chunk(ordinal)?;
        if !device.is_present(ordinal) {
            return None;
        }
        let mut whole = vec![0; usize::try_from(chunk.device.len()).ok()?];
        device.read_at(chunk.device.start(), &mut whole).ok()?;
        if !is_kept_well(&whole, &chunk) {
            return None;
        }
        found.extend_from_slice(&whole);
    }
    let bytes = usize::try_from(bytes).ok()?;
    let skip = found.len().checked_sub(bytes)?;
    found.drain(..skip);
    Some(found)
}

/// A window that a chunk needs.
pub(super) type Lacking = Vec<(Chunk, WindowPin)>;

/// What of a request can be decoded.
pub(super) enum Decodable {
    /// This, with these windows from their file.
    Now(Piece, Lacking),
    /// The file of windows is left alone for now.
    Resting,
    /// Not even the first frame, that of this chunk: there is no file of windows.
    Stuck(Chunk),
}

impl Run {
    /// The windows that `piece` needs and that neither the device has nor the frames before will give, ascending.
    fn lacking(&self, piece: &Piece) -> Lacking {
        let (layer, device) = (&self.layer, &self.layer.device);
        let first = piece.chunks.first().copied().unwrap_or(0);
        let mut frame = None;
        let mut lacking = Lacking::new();
        let chunks = layer.chunks_in(piece.extent);
        for chunk in chunks.filter(|it| it.codec == Codec::Deflate) {
            let known = frame == Some(chunk.blob);
            if known || device.is_present(chunk.ordinal) {
                continue;
            }
            frame = Some(chunk.blob);
            let pin = pin_of(layer.chunks(), &chunk);
            let start = frame_start(&chunk);
            lacking.extend(
                pin.filter(|pin| !comes_by(device, start, pin.bytes, first))
                    .map(|pin| (chunk, pin)),
            );
        }
        lacking
    }

    /// Cuts a request down to what can be decoded.
    pub(super) fn decodable(&self, mut piece: Piece) -> Decodable {
        let lacking = self.lacking(&piece);
        let Some((stuck, _)) = lacking.first() else {
            return Decodable::Now(piece, lacking);
        };
        let windows = &self.layer.windows;
        if windows.has_source() {
            let all_kept = lacking.iter().all(|(_, pin)| windows.has(pin));
            return match windows.rests(clock::now()) {
                Some(_) if !all_kept => Decodable::Resting,
                _ => Decodable::Now(piece, lacking),
            };
        }
        piece.chunks.retain(|ordinal| *ordinal < stuck.ordinal);
        let last = piece.chunks.last();
        let last = last.and_then(|ordinal| self.layer.chunks().chunk(*ordinal));
        let extent = last.and_then(|last| Extent::new(piece.extent.start(), last.blob.end()));
        match extent {
            Some(extent) => Decodable::Now(Piece { extent, ..piece }, Lacking::new()),
            None => Decodable::Stuck(*stuck),
        }
    }

    /// Waits until the file of windows may be read again.
    ///
    /// **Errors** [`FetchFailure::Cancelled`]; the last failure when nobody waits.
    pub(super) async fn rest_for_windows(&self) -> Result<(), FetchFailure> {
        let windows = &self.layer.windows;
        // From before the look: nothing that is set meanwhile is missed.
        let mut changed = windows.watch();
        let until = windows.rests(clock::now());
        if self.transfer.urgency.waiters() == 0 {
            let last = self.transfer.last_failure();
            return Err(last.unwrap_or(FetchFailure::NoSource));
        }
        let resting = async {
            tokio::select! {
                () = clock::sleep_until(until) => {}
                // The sender is in the layer: it cannot be closed.
                _ = changed.changed() => {}
            }
        };
        if until.is_some() {
            let key = self.layer.key();
            let subject = std::fmt::from_fn(move |f| write!(f, "windows of {key}"));
            let _step = self.enter(SOURCE_STEP, subject);
            self.unless_called_off(resting).await?;
        }
        Ok(())
    }

    /// Waits for whoever brings what stands before `chunk`; then all is to be looked at anew.
    ///
    /// Only for the first chunk of a transfer: so who waits waits for a lower one, and nobody for each other.
    ///
    /// **Errors** [`FetchFailure::NoWindows`]: nobody does. Its readers are told.
    pub(super) async fn wait_for_before(&self, chunk: &Chunk) -> Result<(), FetchFailure> {
        let layer = &self.layer;
        let last = frame_start(chunk).checked_sub(1);
        let last = last.and_then(|offset| layer.chunks().at(offset));
        let priority = self.transfer.urgency.effective();
        let flight = last.and_then(|last| layer.flights.join(last.ordinal, priority));
        if let Some(mut flight) = flight {
            // Whether it came is seen in the device.
            let _landed = self.unless_called_off(flight.landed()).await?;
            return Ok(());
        }
        // It may have landed since.
        if last.is_some_and(|last| layer.device.is_present(last.ordinal))
            && pin_of(layer.chunks(), chunk)
                .is_some_and(|pin| comes_by(&layer.device, frame_start(chunk), pin.bytes, u32::MAX))
        {
            return Ok(());
        }
        let failure = FetchFailure::NoWindows {
            chunk: chunk.ordinal,
        };
        for ordinal in layer.sharing(chunk.ordinal) {
            if !layer.device.is_present(ordinal) {
                layer.flights.finish(ordinal, Some(&failure));
            }
        }
        Err(failure)
    }
}
