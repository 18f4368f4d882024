// SPDX-License-Identifier: Apache-2.0
//! Errors of the life cycle.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::MountError;
use crate::filters::FilterError;
use crate::store::{ErrorClass, StoreError};

/// Why an operation on snapshots failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The metadata store refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The lower directories of a chain cannot be had.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The lower directories of a chain did not come in time.
    #[error("lower directories of {name:?} are not there after {} s", waited.as_secs_f32())]
    MountTimeout {
        /// Key of the snapshot.
        name: String,
        /// How long they were waited for.
        waited: Duration,
    },
    /// The operation goes on, and its caller has waited for long enough.
    #[error("not done after {} s; it goes on", waited.as_secs_f32())]
    Deadline {
        /// How long it was waited for.
        waited: Duration,
    },
    /// A directory cannot be made, read or moved.
    #[error("{action} {path:?}: {source}")]
    Directory {
        /// What was tried, in the present tense.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// A label has a value that cannot be used.
    #[error("label {label} has value {value:?}: {reason}")]
    InvalidLabel {
        /// Its key.
        label: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A name or key that is empty.
    #[error("{what} is empty")]
    Empty {
        /// Which argument.
        what: &'static str,
    },
    /// A filter cannot be read.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
    /// A task of the daemon broke off.
    #[error("internal task failed: {reason}")]
    Broken {
        /// How.
        reason: String,
    },
}

impl SnapshotError {
    /// What a caller can do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            SnapshotError::Store(error) => error.class(),
            SnapshotError::Mount(MountError::Unusable { .. }) => ErrorClass::Corrupt,
            SnapshotError::Mount(MountError::Unavailable { .. } | MountError::Io { .. })
            | SnapshotError::MountTimeout { .. }
            | SnapshotError::Deadline { .. }
            | SnapshotError::Directory { .. } => ErrorClass::Transient,
            SnapshotError::InvalidLabel { .. }
            | SnapshotError::Empty { .. }
            | SnapshotError::Filter(_)
            | SnapshotError::Broken { .. } => ErrorClass::Permanent,
            SnapshotError::Stopping => ErrorClass::Cancelled,
        }
    }

    pub(super) fn directory(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| SnapshotError::Directory {
            action,
            path,
            source,
        }
    }
}
