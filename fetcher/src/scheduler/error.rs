// SPDX-License-Identifier: Apache-2.0
//! Why a fill fails, and why an attempt of a transfer does.

use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::frames::DecodeFrameError;
use sluice_blockindex::windows::WindowError;

use crate::source::{Class, SourceError};
use crate::store::{FailureRecord, StoreError};

/// Why windows could not be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WindowsFailure {
    /// The source of the file failed.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// It sent something that is not what the index says.
    #[error("{0}")]
    Window(#[from] WindowError),
}

/// Why one attempt to fetch chunks did not bring them. Another attempt may.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchFailure {
    /// The source failed.
    #[error("{label}: {error}")]
    Source {
        /// Its name.
        label: Arc<str>,
        /// What it said.
        error: SourceError,
    },
    /// The source sent bytes that are not what the index says.
    #[error("{label}: {error}")]
    Corrupt {
        /// Its name.
        label: Arc<str>,
        /// What is wrong.
        error: DecodeFrameError,
    },
    /// The layer has no source.
    #[error("no source is known")]
    NoSource,
    /// What gzip needs before the chunk could not be read from the file of windows.
    #[error("windows from {label}: {error}")]
    Windows {
        /// Name of the source.
        label: Arc<str>,
        /// What it said, or what is wrong with what it sent.
        error: WindowsFailure,
    },
    /// What gzip needs before the chunk is neither in the device nor in any file of windows that is known.
    #[error("chunk {chunk} needs what stands before it, and there is no file of windows")]
    NoWindows {
        /// The chunk.
        chunk: u32,
    },
    /// The chunk could not be written to the store.
    #[error("{0}")]
    Store(Arc<StoreError>),
    /// The transfer was called off before it reached the chunk.
    #[error("cancelled")]
    Cancelled,
}

impl FetchFailure {
    /// What may be done about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Source { error, .. } => error.class(),
            Self::Corrupt { .. } => Class::Corrupt,
            Self::NoSource => Class::Transient,
            Self::Windows { error, .. } => match error {
                WindowsFailure::Source(error) => error.class(),
                WindowsFailure::Window(_) => Class::Corrupt,
            },
            Self::NoWindows { .. } => Class::Permanent,
            Self::Store(error) => error.class(),
            Self::Cancelled => Class::Cancelled,
        }
    }

    /// How long the source asked to be left alone, if it did.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Source { error, .. }
            | Self::Windows {
                error: WindowsFailure::Source(error),
                ..
            } => error.retry_after(),
            _ => None,
        }
    }
}

/// Why a fill failed. Every one of these is an error at a reader.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// Every source failed, or none answered, for all the time there was.
    #[error("no source gave it within {waited:?}{}", last.as_ref().map(|last| format!(", the last one: {last}")).unwrap_or_default())]
    Deadline {
        /// How long the fill waited.
        waited: Duration,
        /// The latest failure, if any attempt came to an end.
        last: Option<FetchFailure>,
    },
    /// The layer is not what its diff ID or its index says; nothing of it may be read.
    #[error("layer is not what is said of it: its bytes have {}", .0.actual)]
    Failed(FailureRecord),
    /// The store is full, and nothing could be freed.
    #[error("store is full: no room for {needed_bytes} bytes")]
    NoSpace {
        /// Bytes that were to be written.
        needed_bytes: u64,
    },
    /// The store cannot be written.
    #[error("{0}")]
    Store(Arc<StoreError>),
    /// A chunk of a gzip blob needs what stands before it, which is neither present nor in any file of
    /// windows that is known.
    #[error("chunk {chunk} needs what stands before it, and there is no file of windows")]
    NoWindows {
        /// The chunk.
        chunk: u32,
    },
    /// The layer was removed, or the fetcher stops.
    #[error("the layer is closed")]
    Closed,
}

impl FillError {
    /// What may be done about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Deadline { .. } | Self::NoSpace { .. } => Class::Transient,
            Self::Failed(_) => Class::Corrupt,
            Self::Store(error) => error.class(),
            Self::NoWindows { .. } => Class::Permanent,
            Self::Closed => Class::Cancelled,
        }
    }

    /// The word for it in metrics.
    pub(crate) const fn word(&self) -> &'static str {
        match self {
            Self::Deadline { .. } => "deadline",
            Self::Failed(_) => "diff_id",
            Self::NoSpace { .. } => "full",
            Self::Store(_) => "store",
            Self::NoWindows { .. } => "windows",
            Self::Closed => "closed",
        }
    }

    /// What a failure that no other attempt can mend means to who waits; `None` for one that may be
    /// mended.
    pub(crate) fn final_of(failure: &FetchFailure) -> Option<Self> {
        match failure {
            FetchFailure::Store(error) => Some(Self::of_store(error)),
            FetchFailure::NoWindows { chunk } => Some(Self::NoWindows { chunk: *chunk }),
            FetchFailure::Windows { .. }
            | FetchFailure::Source { .. }
            | FetchFailure::Corrupt { .. }
            | FetchFailure::NoSource
            | FetchFailure::Cancelled => None,
        }
    }

    pub(crate) fn of_store(error: &Arc<StoreError>) -> Self {
        match **error {
            StoreError::Failed(record) => Self::Failed(record),
            StoreError::Full { needed_bytes } => Self::NoSpace { needed_bytes },
            StoreError::Stopped | StoreError::Removed | StoreError::Cancelled => Self::Closed,
            _ => Self::Store(Arc::clone(error)),
        }
    }
}
