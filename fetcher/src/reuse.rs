// SPDX-License-Identifier: Apache-2.0
//! Chunks of files that the node has already, under any name, in any layer.
//!
//! A layer that was built anew has other modification times, and so other chunks and another diff ID, while most of its
//! files are what they were. Its index names a strong digest of each file; the caller finds the files with these digests
//! on the devices of other layers ([`FileCopy`]). What stands between the files, the headers, is the layer's
//! *skeleton*, a small part of its blob, which is fetched once. Both together make chunks ([`plan`], [`assemble`]),
//! each of which is verified against its own strong digest like one that was fetched.
//!
//! While that goes on boot lists and completion leave these chunks alone; a reader who wants one of them fetches
//! it, because he waits.
//!
//! **Bounds** one layer at a time, one chunk in memory, the skeleton's payload: [`SKELETON_BYTES_MAX`].

mod assemble;
mod plan;
mod work;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sluice_blockindex::digest::Sha256Hasher;
use sluice_blockindex::extent::{DeviceSpace, Extent};
use sluice_blockindex::index::SkeletonPin;
use sluice_blockindex::skeleton::SkeletonError;

use crate::clock;
use crate::scheduler::{Choice, Fetcher, LayerHandle};
use crate::source::{Priority, ReadContext, SourceError, read_checked};
use crate::store::{DeviceKey, StoreError, lock};
use work::Work;

/// The largest skeleton that is fetched: of some millions of files.
const SKELETON_BYTES_MAX: u64 = 64 << 20;
/// A skeleton is worth so many times its own bytes: it is fetched now, what it saves maybe never.
const WORTH: u64 = 2;
/// How long a skeleton may take; then the layer is fetched as if the node had nothing of it.
const SKELETON_DEADLINE: Duration = Duration::from_secs(30);

/// A file of a layer that another device has.
#[derive(Clone, Debug)]
pub struct FileCopy {
    /// The layer that has it.
    pub donor: Arc<LayerHandle>,
    /// Where it begins on that layer's device.
    pub start: u64,
}

/// A file of the layer.
#[derive(Clone, Debug)]
pub struct ReusedFile {
    /// Where it stands on the layer's device.
    pub run: Extent<DeviceSpace>,
    /// Another place that has the same bytes.
    pub copy: Option<FileCopy>,
}

/// What of a layer can be made of what the node has.
#[derive(Debug)]
pub struct ReusePlan {
    layer: Arc<LayerHandle>,
    files: Vec<ReusedFile>,
    skeleton: Option<SkeletonPin>,
    chunks: Vec<u32>,
    bytes: u64,
}

/// From then on others fetch what it did not bring.
impl Drop for ReusePlan {
    fn drop(&mut self) {
        lock(&self.layer.expected).clear();
    }
}

impl ReusePlan {
    /// What can be made of `files`, which are all contents of the layer in device order. From now on these chunks are
    /// expected, until the plan is dropped; `None` where it is not worth it.
    #[must_use]
    pub fn new(
        layer: Arc<LayerHandle>,
        files: Vec<ReusedFile>,
        skeleton: Option<SkeletonPin>,
    ) -> Option<Self> {
        let skeleton = skeleton.filter(|pin| {
            let bytes = pin.extent.len();
            (1..=SKELETON_BYTES_MAX).contains(&bytes)
        });
        let makeable = |between: bool| {
            let runs = files.iter().map(|file| (file.run, file.copy.is_some()));
            let chunks = plan::makeable(layer.chunks(), runs, between, |chunk| {
                layer.device().is_present(chunk)
            });
            let bytes = plan::frame_bytes(layer.chunks(), &chunks);
            (chunks, bytes)
        };
        let with = skeleton.map(|pin| (makeable(true), pin));
        let (chunks, bytes, skeleton) = match with {
            Some(((chunks, bytes), pin)) if bytes >= pin.extent.len().saturating_mul(WORTH) => {
                (chunks, bytes, Some(pin))
            }
            _ => {
                let (chunks, bytes) = makeable(false);
                (chunks, bytes, None)
            }
        };
        if chunks.is_empty() {
            return None;
        }
        *lock(&layer.expected) = chunks.iter().copied().collect::<HashSet<u32>>();
        Some(Self {
            layer,
            files,
            skeleton,
            chunks,
            bytes,
        })
    }

    /// The layer's name in the store.
    #[must_use]
    pub fn key(&self) -> DeviceKey {
        self.layer.key()
    }

    /// How many chunks it is about, and their bytes in the blob.
    #[must_use]
    pub fn size(&self) -> (usize, u64) {
        (self.chunks.len(), self.bytes)
    }
}

/// Why a plan came to nothing, in part or whole. What it did not bring is fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReuseError {
    /// No source gives the skeleton.
    #[error("no skeleton: {0}")]
    Source(#[from] SourceError),
    /// No source can be asked.
    #[error("no skeleton: no source can be asked now")]
    NoSource,
    /// It did not come in time.
    #[error("no skeleton within {SKELETON_DEADLINE:?}")]
    Deadline,
    /// It is not what the index pins.
    #[error("the skeleton has another digest than the index says")]
    Digest,
    /// It is damaged.
    #[error(transparent)]
    Skeleton(#[from] SkeletonError),
    /// The store takes nothing.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The layer is closed.
    #[error("the layer is closed")]
    Closed,
}

/// What came of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reused {
    /// Chunks that were made.
    pub chunks: usize,
    /// Their bytes on the device.
    pub device_bytes: u64,
    /// Chunks that were put together, and are not what the index says.
    pub wrong: usize,
}

impl Fetcher {
    /// Makes the chunks of a plan.
    ///
    /// **Errors** see [`ReuseError`]: what was made stays. **Cancel** stops with the next chunk.
    pub async fn reuse(&self, plan: ReusePlan) -> Result<Reused, ReuseError> {
        let skeleton = match plan.skeleton {
            Some(pin) => Some(self.skeleton(&plan.layer, pin).await?),
            None => None,
        };
        let stop = plan.layer.cancel.child_token();
        let _stops = stop.clone().drop_guard();
        let core = Arc::clone(&self.core);
        let runtime = tokio::runtime::Handle::current();
        let work = self
            .core
            .tasks
            .spawn_blocking(move || Work::new(&core, &plan, &stop, &runtime).run(skeleton));
        match work.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(ReuseError::Closed),
        }
    }

    async fn skeleton(
        &self,
        layer: &Arc<LayerHandle>,
        pin: SkeletonPin,
    ) -> Result<Bytes, ReuseError> {
        let Choice::Use(_, source) = layer.sources.choose(None, clock::now()) else {
            return Err(ReuseError::NoSource);
        };
        let context = ReadContext::new(Priority::Boot).with_cancel(layer.cancel.clone());
        let check = |bytes: &[u8]| {
            let mut hasher = Sha256Hasher::new();
            hasher.update(bytes);
            match hasher.finish() == pin.digest {
                true => Ok(()),
                false => Err(ReuseError::Digest),
            }
        };
        let read = read_checked(&*source, &context, pin.extent, check);
        let read = tokio::time::timeout(SKELETON_DEADLINE, read);
        read.await.map_err(|_| ReuseError::Deadline)??
    }
}

#[cfg(test)]
mod tests;
