// SPDX-License-Identifier: Apache-2.0
//! One layer device in the store: what is present, what may be trusted, and the order of writes.
//!
//! # Life of a chunk
//! ```text
//!            commit (length and crc32 checked)
//!   absent ------------------------------------> present --- seal ---> sealed with all others
//!     ^                                             |
//!     |  crc32 differs, or unreadable               | opened in another run of the kernel,
//!     +------------------- suspect <----------------+ and that run did not stop cleanly
//!                             |   crc32 is right
//!                             +--------------------> present
//! ```
//! Where the index has no crc32 of a chunk its strong digest takes that place.
//!
//! The one rule that settles races: a reader looks at the bit, and the bit is set last.
//!
//! # What a crash leaves
//! A killed process loses nothing: bytes and bits are in the page cache, bytes first. A power cut
//! keeps any mixture of old and new sectors of `data` and words of `present`; every bit found under
//! another boot ID is therefore suspect, unless the record says that the kernel's caches were
//! flushed after the last commit (`clean`). A seal is written only after the data is durable.
//!
//! # Locks
//! `admission` is held shared while a chunk is written and exclusively to end writing (stop, removal,
//! failure); `meta` is taken inside it. No lock is held while another device's is taken.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use sluice_blockindex::chunkmap::{Chunk, ChunkMap, DeviceForm};
use sluice_blockindex::digest::{DiffId, Sha256Hasher};
use sluice_blockindex::extent::{DeviceSpace, Extent};
use sluice_blockindex::frames::{is_kept_well, verify_chunk};

use super::error::StoreError;
use super::media::DeviceMedia;
use super::mem::lock;
use super::meta::{BootId, FailureRecord, Meta, SealProof, SealRecord};
use super::presence::DeviceState;
use super::witness::{Objection, SealWitness};
use super::{DeviceKey, Shared};
use crate::clock;

mod audit;

pub use audit::{Audit, OnRot};

/// Bytes hashed between two looks at whether to go on: a few milliseconds of work.
const SEAL_STEP_BYTES: usize = 1 << 20;

/// What [`Device::commit`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// The chunk is present now and was not before.
    Stored,
    /// It was present already; nothing was written.
    Already,
}

/// What [`Device::recheck`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rechecked {
    /// The chunk does not wait for a check.
    NotSuspect,
    /// Its crc32 is right: it is present again.
    Trusted,
    /// Its crc32 is wrong, or it cannot be read: it is absent and must be fetched again.
    Dropped,
}

/// What the caller of [`Device::seal`] wants, asked between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealStep {
    /// Hash on.
    Continue,
    /// Give up; the device stays as it is.
    Cancel,
}

/// Why a device takes no more chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closed {
    Failed(FailureRecord),
    Stopped,
    Removed,
    /// An fsync failed: the kernel may have dropped writes, so nothing is added any more.
    PreviousIo,
}

impl From<Closed> for StoreError {
    fn from(closed: Closed) -> Self {
        match closed {
            Closed::Failed(record) => StoreError::Failed(record),
            Closed::Stopped => StoreError::Stopped,
            Closed::Removed => StoreError::Removed,
            Closed::PreviousIo => StoreError::PreviousIo,
        }
    }
}

/// A layer device in the store.
///
/// Methods that say **Blocks** touch the disk and belong on a blocking thread.
#[derive(Debug)]
pub struct Device {
    key: DeviceKey,
    chunks: ChunkMap,
    media: Arc<dyn DeviceMedia>,
    shared: Arc<Shared>,
    admission: RwLock<Option<Closed>>,
    meta: Mutex<Meta>,
    /// Set once, and before anything else happens to a device that is not what it claims.
    failure: OnceLock<FailureRecord>,
    present_bytes: AtomicU64,
    sealing: AtomicBool,
}

impl Device {
    /// Opens the device on `media` and decides what of it is trusted. **Blocks**.
    pub(crate) fn open(
        key: DeviceKey,
        chunks: ChunkMap,
        media: Arc<dyn DeviceMedia>,
        fresh: bool,
        shared: Arc<Shared>,
    ) -> Result<Self, StoreError> {
        let stored = media
            .load_meta()
            .map_err(StoreError::io("read record of device"))?;
        let stored = stored.as_deref().and_then(Meta::decode).filter(|_| !fresh);
        let presence = media.presence();
        let mut closed = None;
        match stored {
            Some(Meta {
                failed: Some(failure),
                ..
            }) => {
                presence.set_state(DeviceState::Failed);
                presence.clear_all();
                closed = Some(Closed::Failed(failure));
            }
            Some(Meta {
                sealed: Some(_), ..
            }) => {
                presence.set_all();
                presence.set_state(DeviceState::Sealed);
            }
            // Bits of this run of the kernel, or flushed before the last one ended.
            Some(stored) if stored.boot == shared.boot || stored.clean => {
                presence.set_state(DeviceState::Open);
            }
            Some(_) | None => {
                presence.distrust_all();
                presence.set_state(DeviceState::Open);
            }
        }
        // From here on bits may be set that are not durable: a record that vouches for bits must be
        // gone from the disk before. A new device has none, and losing it loses nothing. What is sealed
        // or failed gets no more bits, whatever kernel runs: its record is not written again, so that
        // it can be opened on a full disk.
        let meta = match stored {
            Some(last) if last.sealed.is_some() || last.failed.is_some() => last,
            Some(_) | None => Meta::fresh(shared.boot),
        };
        if stored != Some(meta) {
            let written = media.replace_meta(&meta.encode(), !fresh);
            written.map_err(StoreError::io("write record of device"))?;
        }
        let present_bytes = (0..chunks.count())
            .filter(|chunk| presence.is_present(*chunk))
            .filter_map(|chunk| presence.extent(chunk))
            .map(Extent::len)
            .sum();
        Ok(Self {
            key,
            chunks,
            shared,
            admission: RwLock::new(closed),
            meta: Mutex::new(meta),
            failure: meta.failed.map(OnceLock::from).unwrap_or_default(),
            present_bytes: AtomicU64::new(present_bytes),
            sealing: AtomicBool::new(false),
            media,
        })
    }

    /// Its name.
    pub fn key(&self) -> DeviceKey {
        self.key
    }

    /// Its chunks.
    pub fn chunks(&self) -> &ChunkMap {
        &self.chunks
    }

    /// Whether `chunk` may be read.
    pub fn is_present(&self, chunk: u32) -> bool {
        self.media.presence().is_present(chunk)
    }

    /// Whether `chunk` waits to be checked after an unclean stop; see [`Self::recheck`].
    pub fn is_suspect(&self, chunk: u32) -> bool {
        self.media.presence().is_suspect(chunk)
    }

    /// Whether any chunk waits to be checked.
    pub fn any_suspect(&self) -> bool {
        self.media.presence().any_suspect()
    }

    /// The chunks that hold any byte of `extent` and are not present, ascending.
    pub fn missing(&self, extent: Extent<DeviceSpace>) -> impl Iterator<Item = u32> + '_ {
        self.chunks
            .covering(extent)
            .filter(|chunk| !self.is_present(*chunk))
    }

    /// Device bytes that may be read.
    pub fn present_bytes(&self) -> u64 {
        self.present_bytes.load(Ordering::Relaxed)
    }

    /// Size of the device.
    pub fn device_bytes(&self) -> u64 {
        self.chunks.device_bytes()
    }

    /// Whether all chunks are present.
    pub fn is_complete(&self) -> bool {
        self.media.presence().present_chunks() == self.chunks.count()
    }

    /// Whether it was found complete and right: equal to its diff ID, or, of [`DeviceForm::Contents`], each chunk
    /// what the manifest pins.
    pub fn is_sealed(&self) -> bool {
        self.media.presence().state() == DeviceState::Sealed
    }

    /// That it was found to be something else; then nothing of it can be read.
    pub fn failure(&self) -> Option<FailureRecord> {
        self.failure.get().copied()
    }

    /// Bytes that it really takes in the store. **Blocks** (shortly).
    pub fn held_bytes(&self) -> Result<u64, StoreError> {
        self.media
            .held_bytes()
            .map_err(StoreError::io("stat device"))
    }

    /// Makes the bytes of a chunk present. **Blocks**.
    ///
    /// The caller has verified them against the strong digest; length and crc32 are checked here
    /// once more, so that no mistake above can make wrong bytes visible.
    ///
    /// **Errors**: [`StoreError::Mismatch`] for other bytes; [`StoreError::Full`] when the disk is full
    /// and nothing could be freed (reads of present chunks go on); those of a closed device.
    pub fn commit(&self, chunk: u32, bytes: &[u8]) -> Result<Committed, StoreError> {
        let admitted = self.admit()?;
        let expect = self.chunk(chunk)?;
        if self.is_present(chunk) {
            return Ok(Committed::Already);
        }
        check(&expect, bytes)?;
        self.write(&expect, bytes)?;
        let stored = self.reveal(&expect);
        drop(admitted);
        Ok(if stored {
            Committed::Stored
        } else {
            Committed::Already
        })
    }

    fn write(&self, chunk: &Chunk, bytes: &[u8]) -> Result<(), StoreError> {
        let write = || self.media.write_at(chunk.device.start(), bytes);
        let full = |error: &std::io::Error| {
            matches!(
                error.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
            )
        };
        let mut result = write();
        if result.as_ref().is_err_and(full) && self.shared.reclaim(chunk.device.len()) {
            result = write();
        }
        result.map_err(|error| {
            if full(&error) {
                StoreError::Full {
                    needed_bytes: chunk.device.len(),
                }
            } else {
                StoreError::io("write chunk")(error)
            }
        })
    }

    fn reveal(&self, chunk: &Chunk) -> bool {
        let presence = self.media.presence();
        let new = presence.set(chunk.ordinal);
        presence.clear_suspect(chunk.ordinal);
        if new {
            self.present_bytes
                .fetch_add(chunk.device.len(), Ordering::Relaxed);
        }
        new
    }

    /// Compares a chunk that waits for it with its crc32, and trusts or drops it. **Blocks**.
    ///
    /// A chunk that cannot be read is dropped as well: a fetch brings it again, written anew.
    pub fn recheck(&self, chunk: u32) -> Result<Rechecked, StoreError> {
        let admitted = self.admit()?;
        if !self.is_suspect(chunk) {
            return Ok(Rechecked::NotSuspect);
        }
        let expect = self.chunk(chunk)?;
        let mut bytes = vec![0; length(&expect)];
        match self.media.read_at(expect.device.start(), &mut bytes) {
            Ok(()) if check(&expect, &bytes).is_ok() => {
                self.reveal(&expect);
                drop(admitted);
                return Ok(Rechecked::Trusted);
            }
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(device = %self.key, chunk, "failed to read chunk: {error}");
            }
        }
        self.media.presence().clear_suspect(chunk);
        drop(admitted);
        Ok(Rechecked::Dropped)
    }

    /// Reads device bytes, all of which must be present. **Blocks**.
    ///
    /// **Errors**: [`StoreError::NotPresent`] (fill first, then come again),
    /// [`StoreError::Failed`], [`StoreError::OutOfRange`].
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        if let Some(failure) = self.failure() {
            return Err(StoreError::Failed(failure));
        }
        let extent = u64::try_from(buffer.len())
            .ok()
            .and_then(|bytes| Extent::from_length(offset, bytes))
            .filter(|extent| extent.end() <= self.device_bytes())
            .ok_or(StoreError::OutOfRange {
                offset,
                device_bytes: self.device_bytes(),
            })?;
        if let Some(chunk) = self.missing(extent).next() {
            return Err(StoreError::NotPresent { chunk });
        }
        self.media
            .read_at(offset, buffer)
            .map_err(StoreError::io("read device"))
    }

    /// Hashes the complete device, and records that it is what its diff ID says. **Blocks** for long:
    /// give it a thread of its own; `step` is asked before each [`SEAL_STEP_BYTES`].
    ///
    /// A device that is [`DeviceForm::Contents`] cannot have a diff ID: it is sealed when every chunk has its digest, and
    /// the record says so.
    ///
    /// Fine when it is sealed already. One seal of a device runs at a time.
    ///
    /// **Errors**: [`StoreError::Incomplete`]; [`StoreError::Cancelled`]; when the digest differs,
    /// [`StoreError::Rotten`] if some chunks are not what the index says any more, which are absent from
    /// then on and must be fetched again, and [`StoreError::Failed`] if all are: it is the image that
    /// lies, and from then on nothing of it can be read.
    pub fn seal(&self, step: &mut dyn FnMut() -> SealStep) -> Result<(), StoreError> {
        self.seal_before(None, step)
    }

    /// As [`Device::seal`], before a witness who sees every byte, and whose objection counts as a digest that differs.
    /// Only a tar has witnesses: contents say nothing of the tree.
    ///
    /// **Errors** also [`StoreError::Io`], when the witness cannot tell.
    pub fn seal_before(
        &self,
        mut witness: Option<Box<dyn SealWitness>>,
        step: &mut dyn FnMut() -> SealStep,
    ) -> Result<(), StoreError> {
        if self.is_sealed() {
            return Ok(());
        }
        drop(self.admit()?);
        if self.sealing.swap(true, Ordering::AcqRel) {
            return Err(StoreError::Cancelled);
        }
        let result = match self.chunks.form() {
            DeviceForm::Tar => self
                .digest(&mut witness, step)
                .and_then(|found| match found {
                    Some(actual) if actual == self.key.diff_id => {
                        self.hear(witness)?;
                        self.conclude(SealProof::DiffId)
                    }
                    found => self.blame(found, step),
                }),
            DeviceForm::Contents => self.seal_contents(step),
        };
        self.sealing.store(false, Ordering::Release);
        result
    }

    /// Seals a device of which only the chunks' digests are known.
    fn seal_contents(&self, step: &mut dyn FnMut() -> SealStep) -> Result<(), StoreError> {
        self.check_complete()?;
        match self.drop_rotten(step)? {
            0 => self.conclude(SealProof::Chunks),
            rotten_chunks => Err(StoreError::Rotten { rotten_chunks }),
        }
    }

    fn check_complete(&self) -> Result<(), StoreError> {
        let total = self.chunks.count();
        let present = self.media.presence().present_chunks();
        if present != total {
            return Err(StoreError::Incomplete {
                missing_chunks: total.saturating_sub(present),
            });
        }
        Ok(())
    }

    /// Asks the witness of a device that has its diff ID.
    fn hear(&self, witness: Option<Box<dyn SealWitness>>) -> Result<(), StoreError> {
        match witness.map_or(Ok(()), SealWitness::finish) {
            Ok(()) => Ok(()),
            Err(Objection::Unknown(reason)) => {
                let unknown = io::Error::other(reason);
                Err(StoreError::io("hear the witness of a seal")(unknown))
            }
            Err(Objection::Forged(reason)) => {
                tracing::error!(
                    device = %self.key,
                    "layer is not what its index says: {reason}; it is not readable any more"
                );
                Err(self.fail(FailureRecord {
                    at_unix_seconds: clock::unix_seconds(),
                    actual: self.key.diff_id,
                }))
            }
        }
    }

    /// What the device digests to; `None` when it cannot be read.
    fn digest(
        &self,
        witness: &mut Option<Box<dyn SealWitness>>,
        step: &mut dyn FnMut() -> SealStep,
    ) -> Result<Option<DiffId>, StoreError> {
        self.check_complete()?;
        let mut hasher = Sha256Hasher::new();
        let mut buffer = vec![0; SEAL_STEP_BYTES];
        let mut at = 0;
        while at < self.device_bytes() {
            if step() == SealStep::Cancel {
                return Err(StoreError::Cancelled);
            }
            let left = usize::try_from(self.device_bytes() - at).unwrap_or(usize::MAX);
            let part = &mut buffer[..left.min(SEAL_STEP_BYTES)];
            if let Err(error) = self.media.read_at(at, part) {
                tracing::warn!(device = %self.key, offset = at, "failed to read device: {error}");
                return Ok(None);
            }
            hasher.update(part);
            if let Some(witness) = witness {
                witness.push(part);
            }
            at += u64::try_from(part.len()).unwrap_or(u64::MAX);
        }
        Ok(Some(DiffId::from_bytes(hasher.finish())))
    }

    /// Finds out whether the disk or the image is to blame for a device that is not its diff ID.
    fn blame(
        &self,
        found: Option<DiffId>,
        step: &mut dyn FnMut() -> SealStep,
    ) -> Result<(), StoreError> {
        let rotten_chunks = self.drop_rotten(step)?;
        match found {
            Some(actual) if rotten_chunks == 0 => {
                tracing::error!(
                    device = %self.key, %actual,
                    "layer does not have its diff ID; it is not readable any more"
                );
                Err(self.fail(FailureRecord {
                    at_unix_seconds: clock::unix_seconds(),
                    actual,
                }))
            }
            // Also of none, where what could not be read a moment ago now could: look again.
            Some(_) | None => Err(StoreError::Rotten { rotten_chunks }),
        }
    }

    /// Compares every chunk with its digest; those that differ are absent from then on. Returns how many.
    fn drop_rotten(&self, step: &mut dyn FnMut() -> SealStep) -> Result<u32, StoreError> {
        let mut rotten_chunks = 0;
        for ordinal in 0..self.chunks.count() {
            if step() == SealStep::Cancel {
                return Err(StoreError::Cancelled);
            }
            let admitted = self.admit()?;
            let expect = self.chunk(ordinal)?;
            let mut bytes = vec![0; length(&expect)];
            let read = self.media.read_at(expect.device.start(), &mut bytes);
            let sound = read.is_ok() && verify_chunk(&bytes, &expect).is_ok();
            if !sound {
                tracing::warn!(device = %self.key, chunk = ordinal, "drop chunk that rotted");
                rotten_chunks += 1;
                if self.media.presence().clear(ordinal) {
                    self.present_bytes
                        .fetch_sub(expect.device.len(), Ordering::Relaxed);
                }
            }
            drop(admitted);
        }
        Ok(rotten_chunks)
    }

    fn conclude(&self, proof: SealProof) -> Result<(), StoreError> {
        let at_unix_seconds = clock::unix_seconds();
        let admitted = self.admit()?;
        if let Err(error) = self.media.sync() {
            drop(admitted);
            self.close(Closed::PreviousIo);
            // The kernel may have dropped writes whose bits it keeps: under no kernel, this one
            // included, are they trusted again without a check.
            if let Err(error) = self.record(|meta| meta.boot = BootId::NONE) {
                tracing::error!(device = %self.key, %error, "failed to record the failed sync");
            }
            return Err(StoreError::io("sync device")(error));
        }
        let seal = SealRecord {
            at_unix_seconds,
            proof,
        };
        self.record(|meta| meta.sealed = Some(seal))?;
        self.media.presence().set_state(DeviceState::Sealed);
        drop(admitted);
        if proof == SealProof::DiffId {
            self.shared.add_sealed(self.key);
        }
        Ok(())
    }

    /// Makes the device unreadable at once, and then durably.
    fn fail(&self, failure: FailureRecord) -> StoreError {
        let failure = *self.failure.get_or_init(|| failure);
        self.close(Closed::Failed(failure));
        let presence = self.media.presence();
        presence.set_state(DeviceState::Failed);
        presence.clear_all();
        self.present_bytes.store(0, Ordering::Relaxed);
        // A crash before the record is durable leaves an empty device, which will fail again.
        if let Err(error) = self.record(|meta| meta.failed = Some(failure)) {
            tracing::error!(device = %self.key, %error, "failed to record the failed seal");
        }
        StoreError::Failed(failure)
    }

    /// Changes the record, durably and then in memory.
    fn record(&self, change: impl FnOnce(&mut Meta)) -> Result<(), StoreError> {
        let mut meta = lock(&self.meta);
        let mut next = *meta;
        change(&mut next);
        let written = self.media.replace_meta(&next.encode(), true);
        if written.is_ok() {
            *meta = next;
        }
        written.map_err(StoreError::io("write record of device"))
    }

    /// Takes no more chunks, because the daemon stops.
    pub(crate) fn stop(&self) {
        self.close(Closed::Stopped);
    }

    /// Takes no more chunks, because it is being removed.
    pub(crate) fn mark_removed(&self) {
        self.close(Closed::Removed);
    }

    /// Records, after the store was flushed, that every bit can be trusted under any kernel.
    pub(crate) fn mark_clean(&self) -> Result<(), StoreError> {
        let lost = matches!(
            *self.admission_read(),
            Some(Closed::PreviousIo | Closed::Removed)
        );
        if lost || self.is_sealed() || self.failure().is_some() {
            return Ok(());
        }
        self.record(|meta| meta.clean = true)
    }

    /// Waits for running writes and lets no more begin. The first reason stays, except that a
    /// removal outranks all.
    fn close(&self, reason: Closed) {
        let mut admission = self.admission_write();
        if admission.is_none() || reason == Closed::Removed {
            *admission = Some(reason);
        }
    }

    fn admit(&self) -> Result<RwLockReadGuard<'_, Option<Closed>>, StoreError> {
        let admission = self.admission_read();
        match *admission {
            None => Ok(admission),
            Some(closed) => Err(closed.into()),
        }
    }

    fn admission_read(&self) -> RwLockReadGuard<'_, Option<Closed>> {
        self.admission
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn admission_write(&self) -> RwLockWriteGuard<'_, Option<Closed>> {
        self.admission
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn chunk(&self, ordinal: u32) -> Result<Chunk, StoreError> {
        self.chunks
            .chunk(ordinal)
            .ok_or(StoreError::NoSuchChunk { chunk: ordinal })
    }
}

fn length(chunk: &Chunk) -> usize {
    // Chunks are at most CHUNK_MAX_BYTES long; the map was validated.
    usize::try_from(chunk.device.len()).unwrap_or(0)
}

fn check(expect: &Chunk, bytes: &[u8]) -> Result<(), StoreError> {
    if is_kept_well(bytes, expect) {
        Ok(())
    } else {
        Err(StoreError::Mismatch {
            chunk: expect.ordinal,
        })
    }
}
