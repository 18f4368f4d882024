// SPDX-License-Identifier: Apache-2.0
//! Errors of the metadata store.

use crate::snapshots::SnapshotKind;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The same call may work later.
    Transient,
    /// The same call fails again.
    Permanent,
    /// The caller or the daemon stopped the work.
    Cancelled,
    /// What is stored is wrong.
    Corrupt,
}

/// Why a metadata transaction failed. Nothing of it was stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No snapshot has this key or name.
    #[error("snapshot {name:?} does not exist")]
    NotFound {
        /// Key or name asked for.
        name: String,
    },
    /// The parent named does not exist.
    #[error("parent snapshot {parent:?} does not exist")]
    ParentNotFound {
        /// Name of the parent.
        parent: String,
    },
    /// The key or name is taken.
    #[error("snapshot {name:?} already exists")]
    AlreadyExists {
        /// Key or name asked for.
        name: String,
    },
    /// Only committed snapshots can be parents.
    #[error("parent snapshot {parent:?} is {kind}, not committed")]
    ParentNotCommitted {
        /// Name of the parent.
        parent: String,
        /// What it is.
        kind: SnapshotKind,
    },
    /// Only active snapshots can be committed.
    #[error("snapshot {name:?} is {kind}, not active")]
    NotActive {
        /// Key given.
        name: String,
        /// What it is.
        kind: SnapshotKind,
    },
    /// Only active snapshots and views have mounts.
    #[error("snapshot {name:?} is committed and has no mounts")]
    NotMountable {
        /// Name given.
        name: String,
    },
    /// A snapshot with children cannot be removed.
    #[error("cannot remove snapshot {name:?}: it has children")]
    HasChildren {
        /// Name given.
        name: String,
    },
    /// Only labels can be updated.
    #[error("cannot update field {field:?} of snapshot {name:?}")]
    ImmutableField {
        /// Key or name given.
        name: String,
        /// Path from the field mask.
        field: String,
    },
    /// The file was written by a later version.
    #[error(
        "metadata has schema version {found} and features {features:#x}, this program knows versions up to {} and no features; nothing was changed: start the newer sluiced",
        super::SCHEMA_VERSION
    )]
    Schema {
        /// Version of the file.
        found: u64,
        /// Feature bits of the file.
        features: u64,
    },
    /// A row cannot be read, or contradicts another.
    #[error("metadata of {name:?} is damaged: {reason}")]
    Corrupt {
        /// The row.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The database failed.
    #[error("metadata store: {0}")]
    Redb(#[source] Box<redb::Error>),
}

impl StoreError {
    /// What a caller can do about it.
    pub fn class(&self) -> ErrorClass {
        match self {
            StoreError::NotFound { .. }
            | StoreError::ParentNotFound { .. }
            | StoreError::AlreadyExists { .. }
            | StoreError::ParentNotCommitted { .. }
            | StoreError::NotActive { .. }
            | StoreError::NotMountable { .. }
            | StoreError::HasChildren { .. }
            | StoreError::ImmutableField { .. }
            | StoreError::Schema { .. } => ErrorClass::Permanent,
            StoreError::Corrupt { .. } => ErrorClass::Corrupt,
            StoreError::Redb(error) => match **error {
                redb::Error::Corrupted(_) => ErrorClass::Corrupt,
                _ => ErrorClass::Transient,
            },
        }
    }

    pub(super) fn corrupt(name: impl Into<String>, reason: impl ToString) -> Self {
        StoreError::Corrupt {
            name: name.into(),
            reason: reason.to_string(),
        }
    }
}

/// Each of redb's error types converts by way of its union.
macro_rules! from_redb {
    ($($source:ty),*) => {
        $(impl From<$source> for StoreError {
            fn from(error: $source) -> Self {
                StoreError::Redb(Box::new(error.into()))
            }
        })*
    };
}
impl From<std::io::Error> for StoreError {
    fn from(error: std::io::Error) -> Self {
        StoreError::Redb(Box::new(error.into()))
    }
}

from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);
