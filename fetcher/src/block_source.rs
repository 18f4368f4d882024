// SPDX-License-Identifier: Apache-2.0
//! Reading a layer device: bytes equal the uncompressed layer, or an error; never zeros for "not yet".

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::extent::{DeviceSpace, Extent};

use crate::scheduler::{Fetcher, FillError, LayerHandle};
use crate::source::{Class, Priority};
use crate::store::StoreError;

/// Why a device could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The bytes could not be brought into the store.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The extent ends beyond the device, or is too long for one read.
    #[error("cannot read {extent} of a device of {device_bytes} bytes")]
    OutOfRange {
        /// What was asked for.
        extent: Extent<DeviceSpace>,
        /// Size of the device.
        device_bytes: u64,
    },
}

impl BlockError {
    /// What a caller may do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Fill(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::OutOfRange { .. } => Class::Permanent,
        }
    }
}

/// Reads a layer device.
#[async_trait]
pub trait BlockSource: Send + Sync + std::fmt::Debug {
    /// Size of the device in bytes.
    fn device_bytes(&self) -> u64;

    /// Reads exactly the bytes of `extent`.
    ///
    /// **Errors** [`BlockError`]; there are no short reads. **Cancel** safe.
    async fn read(&self, extent: Extent<DeviceSpace>) -> Result<Bytes, BlockError>;
}

/// A layer in the store, filled as it is read.
#[derive(Clone, Debug)]
pub struct FilledLayer {
    fetcher: Fetcher,
    layer: Arc<LayerHandle>,
    priority: Priority,
    deadline: Option<Duration>,
}

impl FilledLayer {
    /// Reads `layer` at this priority; each read waits for at most `deadline`.
    pub fn new(
        fetcher: Fetcher,
        layer: Arc<LayerHandle>,
        priority: Priority,
        deadline: Option<Duration>,
    ) -> Self {
        Self {
            fetcher,
            layer,
            priority,
            deadline,
        }
    }
}

#[async_trait]
impl BlockSource for FilledLayer {
    fn device_bytes(&self) -> u64 {
        self.layer.device().device_bytes()
    }

    async fn read(&self, extent: Extent<DeviceSpace>) -> Result<Bytes, BlockError> {
        let length = length_within(extent, self.device_bytes())?;
        self.fetcher
            .fill(&self.layer, extent, self.priority, self.deadline)
            .await?;
        let device = Arc::clone(self.layer.device());
        let read = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; length];
            device
                .read_at(extent.start(), &mut buffer)
                .map(|()| Bytes::from(buffer))
        });
        Ok(read.await.map_err(|_| StoreError::Cancelled)??)
    }
}

/// A device that is wholly in memory: the model that others are compared with.
#[derive(Clone, Debug)]
pub struct PlainLayer(Bytes);

impl PlainLayer {
    /// A device of these bytes.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }
}

#[async_trait]
impl BlockSource for PlainLayer {
    fn device_bytes(&self) -> u64 {
        u64::try_from(self.0.len()).unwrap_or(u64::MAX)
    }

    async fn read(&self, extent: Extent<DeviceSpace>) -> Result<Bytes, BlockError> {
        let length = length_within(extent, self.device_bytes())?;
        let start = usize::try_from(extent.start()).unwrap_or(usize::MAX);
        Ok(self.0.slice(start..start + length))
    }
}

fn length_within(extent: Extent<DeviceSpace>, device_bytes: u64) -> Result<usize, BlockError> {
    let length = usize::try_from(extent.len())
        .ok()
        .filter(|_| extent.end() <= device_bytes);
    length.ok_or(BlockError::OutOfRange {
        extent,
        device_bytes,
    })
}

#[cfg(test)]
mod tests;
