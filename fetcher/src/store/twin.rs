// SPDX-License-Identifier: Apache-2.0
//! A sealed device of the same layer under another index: its bytes are the layer's, at the same
//! offsets, so chunks can be copied instead of fetched. They are verified like any others.

use std::sync::Arc;

use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::frames::verify_chunk;

use super::media::SealedBytes;
use super::{Device, DeviceKey, StoreError};

/// The twin.
#[derive(Debug)]
pub(crate) struct Twin {
    key: DeviceKey,
    bytes: Arc<dyn SealedBytes>,
}

impl Twin {
    pub(crate) fn new(key: DeviceKey, bytes: Arc<dyn SealedBytes>) -> Self {
        Self { key, bytes }
    }

    /// Its name.
    pub(crate) fn key(&self) -> DeviceKey {
        self.key
    }

    /// Copies `chunk` into `device`; false when the twin does not have its bytes. **Blocks**.
    ///
    /// **Errors** those of [`Device::commit`].
    pub(crate) fn copy(&self, device: &Device, chunk: &Chunk) -> Result<bool, StoreError> {
        let Ok(length) = usize::try_from(chunk.device.len()) else {
            return Ok(false);
        };
        let mut bytes = vec![0; length];
        let read = self.bytes.read_sealed_at(chunk.device.start(), &mut bytes);
        if read.is_err() || verify_chunk(&bytes, chunk).is_err() {
            tracing::warn!(twin = %self.key, chunk = chunk.ordinal, "sealed twin lacks a chunk");
            return Ok(false);
        }
        device.commit(chunk.ordinal, &bytes).map(|_| true)
    }
}
