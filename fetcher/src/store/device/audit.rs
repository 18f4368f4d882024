// SPDX-License-Identifier: Apache-2.0
//! Reading a device again, to find what rotted on the disk.
//!
//! Every chunk that is present is read and compared with its strong digest, and a sealed device with its
//! diff ID as well, where that is what its bytes have. A rotten chunk is dropped only where the caller wants that: its bit is cleared, and it
//! is fetched again like one that never came. Nothing is punched: the bytes stay until the fetch writes
//! over them, so whoever reads the file past the bitmap sees wrong bytes or right ones, never a hole.
//!
//! A sealed device that loses a chunk is durably no seal any more before the bit is cleared: otherwise the
//! next opening would say of all chunks that they are present.
//!
//! A chunk that is written or dropped while it is read here is looked at under `admission`, like in a
//! failed seal; there is no lock between two chunks.

use sluice_blockindex::chunkmap::{Chunk, DeviceForm};
use sluice_blockindex::digest::{DiffId, Sha256Hasher};
use sluice_blockindex::frames::verify_chunk;

use super::{Device, DeviceState, Meta, SealStep, StoreError, clock, length};
use crate::store::meta::FailureRecord;

/// What becomes of a chunk that is not what its index says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRot {
    /// It stays as it is, and is only told of.
    Keep,
    /// It is absent from then on.
    Drop,
}

/// What [`Device::audit`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Chunks that were present, and read.
    pub checked_chunks: u32,
    /// Their bytes.
    pub checked_bytes: u64,
    /// Of these chunks, those that are not what the index says, ascending.
    pub rotten: Vec<u32>,
    /// Whether these were dropped.
    pub dropped: bool,
    /// What a device digests to that is sealed as something else though every chunk is sound; with
    /// [`OnRot::Drop`] nothing of it can be read any more.
    pub other_diff_id: Option<DiffId>,
}

impl Device {
    /// Reads all that is present and compares it with the index. **Blocks** for long: give it a thread of
    /// its own; `step` is asked before each chunk.
    ///
    /// **Errors**: [`StoreError::Cancelled`]; [`StoreError::Failed`] for a device that failed its seal;
    /// those of a closed device; those of writing its record. A chunk that cannot be read counts as
    /// rotten. Chunks dropped before an error stay dropped.
    pub fn audit(
        &self,
        on_rot: OnRot,
        step: &mut dyn FnMut() -> SealStep,
    ) -> Result<Audit, StoreError> {
        let is_tar = self.chunks.form() == DeviceForm::Tar;
        let mut whole = (is_tar && self.is_sealed()).then(Sha256Hasher::new);
        let mut audit = Audit::default();
        for ordinal in 0..self.chunks.count() {
            if step() == SealStep::Cancel {
                return Err(StoreError::Cancelled);
            }
            let admitted = self.admit()?;
            if !self.is_present(ordinal) {
                whole = None;
                continue;
            }
            let expect = self.chunk(ordinal)?;
            let mut bytes = vec![0; length(&expect)];
            let read = self.media.read_at(expect.device.start(), &mut bytes);
            let sound = read.is_ok() && verify_chunk(&bytes, &expect).is_ok();
            audit.checked_chunks += 1;
            audit.checked_bytes += expect.device.len();
            if sound {
                if let Some(hasher) = &mut whole {
                    hasher.update(&bytes);
                }
                continue;
            }
            tracing::warn!(device = %self.key, chunk = ordinal, ?on_rot, "found chunk that rotted");
            whole = None;
            audit.rotten.push(ordinal);
            if on_rot == OnRot::Drop {
                self.unseal()?;
                self.hide(&expect);
                audit.dropped = true;
            }
            drop(admitted);
        }
        let digest = whole.map(|hasher| DiffId::from_bytes(hasher.finish()));
        audit.other_diff_id = digest.filter(|actual| *actual != self.key.diff_id);
        if let (Some(actual), OnRot::Drop) = (audit.other_diff_id, on_rot) {
            tracing::error!(device = %self.key, %actual, "layer does not have its diff ID; it is not readable any more");
            self.shared.drop_sealed(&self.key);
            self.fail(FailureRecord {
                at_unix_seconds: clock::unix_seconds(),
                actual,
            });
        }
        Ok(audit)
    }

    /// Records durably that the device is not sealed; fine when it is not.
    fn unseal(&self) -> Result<(), StoreError> {
        if !self.is_sealed() {
            return Ok(());
        }
        // Its other bits are those of this run of the kernel, so they may be trusted in it only.
        let boot = self.shared.boot;
        self.record(|meta| *meta = Meta::fresh(boot))?;
        self.shared.drop_sealed(&self.key);
        self.media.presence().set_state(DeviceState::Open);
        Ok(())
    }

    fn hide(&self, chunk: &Chunk) {
        if self.media.presence().clear(chunk.ordinal) {
            let bytes = chunk.device.len();
            self.present_bytes
                .fetch_sub(bytes, super::Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
