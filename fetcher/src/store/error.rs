// SPDX-License-Identifier: Apache-2.0
//! What can go wrong in the store.

use std::io;
use std::path::PathBuf;

use super::meta::FailureRecord;
use crate::source::Class;

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The disk or the file system refused.
    #[error("failed to {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is full, and nothing could be freed. Present chunks stay readable.
    #[error("store is full: no room for {needed_bytes} bytes")]
    Full {
        /// Bytes that were to be written.
        needed_bytes: u64,
    },
    /// Another process has the store.
    #[error("store {} is in use by another process", path.display())]
    Locked {
        /// Its directory.
        path: PathBuf,
    },
    /// The chunk is not present: fill it first.
    #[error("chunk {chunk} is not present")]
    NotPresent {
        /// The first such chunk.
        chunk: u32,
    },
    /// The device has no such chunk.
    #[error("no chunk {chunk} in the device")]
    NoSuchChunk {
        /// Its ordinal.
        chunk: u32,
    },
    /// The bytes asked for end beyond the device.
    #[error("read at {offset} ends beyond the device of {device_bytes} bytes")]
    OutOfRange {
        /// Where the read starts.
        offset: u64,
        /// Size of the device.
        device_bytes: u64,
    },
    /// The bytes are not those of the chunk.
    #[error("bytes are not those of chunk {chunk}")]
    Mismatch {
        /// The chunk.
        chunk: u32,
    },
    /// The complete device is not what its diff ID or its index says.
    #[error("device is not what is said of it: its bytes have {}", .0.actual)]
    Failed(FailureRecord),
    /// A device cannot be sealed before all chunks are present.
    #[error("{missing_chunks} chunks are missing")]
    Incomplete {
        /// How many.
        missing_chunks: u32,
    },
    /// Chunks that were present are not what the index says: they were dropped, and must be fetched
    /// again.
    #[error("{rotten_chunks} chunks rotted and were dropped")]
    Rotten {
        /// How many.
        rotten_chunks: u32,
    },
    /// The caller gave up, or the same work already runs.
    #[error("cancelled")]
    Cancelled,
    /// The store is stopping.
    #[error("store is stopping")]
    Stopped,
    /// The device was removed.
    #[error("device was removed")]
    Removed,
    /// A flush to the disk failed before; nothing is added to this device any more.
    #[error("an earlier flush of this device failed")]
    PreviousIo,
    /// A device is open with another chunk map under the same name.
    #[error("device is open with another chunk map")]
    OtherChunkMap,
}

impl StoreError {
    /// Wraps what the system said about `action`.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }

    /// Whether the disk takes nothing, so that only memory is left for what comes.
    pub(crate) const fn keeps_nothing(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Io { .. } | Self::PreviousIo)
    }

    /// The word for it in metrics.
    pub(crate) const fn word(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            _ => "store",
        }
    }

    /// What a caller may do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Full { .. } | Self::Locked { .. } | Self::NotPresent { .. } => Class::Transient,
            Self::Incomplete { .. } | Self::Rotten { .. } => Class::Transient,
            Self::Io { .. }
            | Self::NoSuchChunk { .. }
            | Self::OutOfRange { .. }
            | Self::PreviousIo
            | Self::OtherChunkMap => Class::Permanent,
            Self::Mismatch { .. } | Self::Failed(_) => Class::Corrupt,
            Self::Cancelled | Self::Stopped | Self::Removed => Class::Cancelled,
        }
    }
}
