// SPDX-License-Identifier: Apache-2.0
//! When the store keeps nothing, because its disk is full or fails: readers get their bytes past it.
//!
//! A chunk that was fetched and verified and could not be written waits in memory for those who asked for
//! it, and a little longer for who reads on. It is not present: no bit says so, nothing is mapped, and
//! whoever needs it in the store (the kernel's EROFS, a seal) gets the store's error as before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::digest::ChunkDigest;
use sluice_blockindex::extent::{DeviceSpace, Extent};

use super::decode::DecodeFailure;
use super::layer::LayerHandle;
use super::transfer::Run;
use super::{FetchFailure, Fetcher, FillError};
use crate::byte_lru::ByteLru;
use crate::source::Priority;
use crate::store::{Committed, Device, StoreError};

/// What is held for readers: a few of the largest reads with what is read ahead of them.
const HELD_BYTES: usize = 32 << 20;

/// What came of a fill that may pass the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filled {
    /// Every chunk of the range is present.
    Present,
    /// The bytes of the range, not all of which could be kept.
    Passed(Bytes),
}

/// Chunks of a range that are not in the store and never were, by ordinal.
pub(super) type Held = BTreeMap<u32, Bytes>;

/// Verified chunks that the store did not take.
#[derive(Debug)]
pub(crate) struct Passing {
    chunks: ByteLru<ChunkDigest, Bytes>,
    /// The last chunk was not taken.
    refused: AtomicBool,
}

impl Default for Passing {
    fn default() -> Self {
        Self {
            chunks: ByteLru::new(HELD_BYTES),
            refused: AtomicBool::new(false),
        }
    }
}

impl Passing {
    /// Commits a verified chunk, or holds it for its readers. **Blocks**.
    pub(super) fn keep(
        &self,
        device: &Device,
        chunk: &Chunk,
        bytes: Vec<u8>,
    ) -> Result<Committed, DecodeFailure> {
        match device.commit(chunk.ordinal, &bytes) {
            Ok(committed) => {
                // Loaded first: all threads that commit share the line.
                if self.refused.load(Ordering::Relaxed)
                    && self.refused.swap(false, Ordering::Relaxed)
                {
                    tracing::info!(device = %device.key(), "the store takes chunks again");
                }
                Ok(committed)
            }
            Err(error) if error.keeps_nothing() => {
                if !self.refused.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        device = %device.key(),
                        "the store takes no chunks, readers get them past it: {error}"
                    );
                }
                let size = bytes.len();
                self.chunks.put(chunk.digest, bytes.into(), size);
                Err(DecodeFailure::NotKept(Arc::new(error)))
            }
            Err(error) => Err(DecodeFailure::Store(Arc::new(error))),
        }
    }

    /// Takes over what is held of `missing`; what is left of it was never fetched, or is gone again. Who was not
    /// `refused` a chunk himself looks only while the store takes none.
    pub(super) fn take(
        &self,
        layer: &LayerHandle,
        missing: &mut Vec<u32>,
        held: &mut Held,
        refused: bool,
    ) {
        let look = refused || self.refused.load(Ordering::Relaxed);
        missing.retain(|&ordinal| {
            if held.contains_key(&ordinal) {
                return false;
            }
            if !look {
                return true;
            }
            let chunk = layer.chunks().chunk(ordinal);
            // The same content may stand elsewhere with another padding.
            let found = chunk.and_then(|chunk| {
                let bytes = self.chunks.get(&chunk.digest)?;
                (bytes.len() as u64 == chunk.device.len()).then_some(bytes)
            });
            match found {
                Some(bytes) => {
                    held.insert(ordinal, bytes);
                    false
                }
                None => true,
            }
        });
    }
}

impl Run {
    /// A chunk could not be kept. Its readers take it from memory; what nobody waits for is not fetched
    /// to be thrown away: **Errors** then.
    pub(super) fn not_kept(&self, chunk: u32, error: Arc<StoreError>) -> Result<(), FetchFailure> {
        self.core.metrics.passed(error.word());
        let failure = FetchFailure::Store(error);
        self.transfer.note(&failure);
        let wanted = self.transfer.urgency.waiters() > 0;
        self.layer.flights.finish(chunk, Some(&failure));
        match wanted {
            true => Ok(()),
            false => Err(failure),
        }
    }
}

impl Fetcher {
    /// As [`Self::fill`], for a reader who takes the bytes themselves where the store does not keep them.
    ///
    /// **Errors** as [`Self::fill`], without [`FillError::NoSpace`] and the store's failures to write.
    /// **Cancel** safe.
    pub async fn fill_or_pass(
        &self,
        layer: &Arc<LayerHandle>,
        extent: Extent<DeviceSpace>,
        priority: Priority,
        deadline: Option<Duration>,
    ) -> Result<Filled, FillError> {
        let mut held = Held::new();
        self.fill_measured(layer, extent, priority, deadline, Some(&mut held))
            .await?;
        if held.is_empty() {
            return Ok(Filled::Present);
        }
        let device = Arc::clone(&layer.device);
        let reading = tokio::task::spawn_blocking(move || assemble(&device, extent, &held));
        let bytes = reading.await.map_err(|_| FillError::Closed)?;
        bytes
            .map(Filled::Passed)
            .map_err(|error| FillError::of_store(&Arc::new(error)))
    }
}

/// The bytes of `extent`, from what is held and what is present. **Blocks**.
fn assemble(
    device: &Device,
    extent: Extent<DeviceSpace>,
    held: &Held,
) -> Result<Bytes, StoreError> {
    let length = usize::try_from(extent.len()).unwrap_or(usize::MAX);
    let mut bytes = BytesMut::with_capacity(length);
    for ordinal in device.chunks().covering(extent) {
        let chunk = device.chunks().chunk(ordinal);
        let chunk = chunk.ok_or(StoreError::NoSuchChunk { chunk: ordinal })?;
        let start = chunk.device.start().max(extent.start());
        let end = chunk.device.end().min(extent.end());
        let length = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        match held.get(&ordinal) {
            Some(whole) => {
                let skip = usize::try_from(start - chunk.device.start()).unwrap_or(usize::MAX);
                let part = whole.get(skip..).and_then(|rest| rest.get(..length));
                let lacks = StoreError::Mismatch { chunk: ordinal };
                bytes.extend_from_slice(part.ok_or(lacks)?);
            }
            None => {
                let at = bytes.len();
                bytes.resize(at + length, 0);
                device.read_at(start, &mut bytes[at..])?;
            }
        }
    }
    Ok(bytes.freeze())
}
