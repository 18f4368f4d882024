// SPDX-License-Identifier: Apache-2.0
//! Why a fill fails, and why an attempt of a transfer does.

use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::frames::DecodeFrameError;

use crate::source::{Class, SourceError};
use crate::store::{FailureRecord, StoreError};

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
            Self::Store(error) => error.class(),
            Self::Cancelled => Class::Cancelled,
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
    /// The layer is not what its diff ID says; nothing of it may be read.
    #[error("layer does not have its diff ID: its bytes have {}", .0.actual)]
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
            Self::Closed => "closed",
        }
    }

    /// What a failure that no other attempt can mend means to who waits; `None` for one that may be
    /// mended.
    pub(crate) fn final_of(failure: &FetchFailure) -> Option<Self> {
        match failure {
            FetchFailure::Store(error) => Some(Self::of_store(error)),
            FetchFailure::Source { .. }
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
