// SPDX-License-Identifier: Apache-2.0
//! Errors as containerd gets them: the only place that makes a gRPC status.

use containerd_snapshots::tonic::{Code, Status};

use crate::snapshots::{MountError, SnapshotError};
use crate::store::StoreError;

/// Why a request gets no ordinary answer.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The operation failed.
    Failed(SnapshotError),
    /// A Prepare is answered by a committed snapshot, which containerd looks up by its label.
    Exists { name: String },
}

impl Refusal {
    /// Its gRPC code.
    pub(super) fn code(&self) -> Code {
        match self {
            Refusal::Failed(error) => code(error),
            Refusal::Exists { .. } => Code::AlreadyExists,
        }
    }
}

impl From<SnapshotError> for Refusal {
    fn from(error: SnapshotError) -> Self {
        Refusal::Failed(error)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Failed(error) => Status::new(code(&error), describe(&error)),
            Refusal::Exists { name } => {
                Status::already_exists(format!("target snapshot is {name:?}"))
            }
        }
    }
}

/// The error with all its causes.
fn describe(error: &SnapshotError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn code(error: &SnapshotError) -> Code {
    match error {
        SnapshotError::Store(error) => store_code(error),
        SnapshotError::Mount(error) => match error {
            MountError::Unusable { .. } => Code::DataLoss,
            MountError::Unavailable { .. } => Code::Unavailable,
            MountError::Io { .. } => Code::Internal,
        },
        SnapshotError::MountTimeout { .. } | SnapshotError::Deadline { .. } => {
            Code::DeadlineExceeded
        }
        SnapshotError::Directory { source, .. } => match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Code::ResourceExhausted
            }
            _ => Code::Internal,
        },
        SnapshotError::InvalidLabel { .. }
        | SnapshotError::Empty { .. }
        | SnapshotError::Filter(_) => Code::InvalidArgument,
        SnapshotError::Stopping => Code::Unavailable,
        SnapshotError::Broken { .. } => Code::Internal,
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::NotFound { .. } | StoreError::ParentNotFound { .. } => Code::NotFound,
        StoreError::AlreadyExists { .. } => Code::AlreadyExists,
        StoreError::ParentNotCommitted { .. } | StoreError::ImmutableField { .. } => {
            Code::InvalidArgument
        }
        StoreError::NotActive { .. }
        | StoreError::NotMountable { .. }
        | StoreError::HasChildren { .. }
        | StoreError::Schema { .. } => Code::FailedPrecondition,
        StoreError::Corrupt { .. } => Code::DataLoss,
        StoreError::Redb(_) => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Duration;

    use sluice_blockindex::digest::ChainId;

    use super::*;
    use crate::filters::Filters;
    use crate::snapshots::SnapshotKind;

    /// Every variant; a new one fails to compile in `code` and belongs here too.
    fn every_error() -> Vec<(SnapshotError, Code)> {
        let name = || "n".to_owned();
        let reason = || "r".to_owned();
        let chain_id = ChainId::of(b"");
        let kind = SnapshotKind::Active;
        let directory = |source| SnapshotError::Directory {
            action: "make",
            path: "/p".into(),
            source,
        };
        vec![
            (StoreError::NotFound { name: name() }.into(), Code::NotFound),
            (
                StoreError::ParentNotFound { parent: name() }.into(),
                Code::NotFound,
            ),
            (
                StoreError::AlreadyExists { name: name() }.into(),
                Code::AlreadyExists,
            ),
            (
                StoreError::ParentNotCommitted {
                    parent: name(),
                    kind,
                }
                .into(),
                Code::InvalidArgument,
            ),
            (
                StoreError::NotActive { name: name(), kind }.into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::NotMountable { name: name() }.into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::HasChildren { name: name() }.into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::ImmutableField {
                    name: name(),
                    field: name(),
                }
                .into(),
                Code::InvalidArgument,
            ),
            (
                StoreError::Schema {
                    found: 2,
                    features: 0,
                }
                .into(),
                Code::FailedPrecondition,
            ),
            (
                StoreError::Corrupt {
                    name: name(),
                    reason: reason(),
                }
                .into(),
                Code::DataLoss,
            ),
            (
                StoreError::from(io::Error::other("disk")).into(),
                Code::Internal,
            ),
            (
                MountError::Unusable {
                    chain_id,
                    reason: reason(),
                }
                .into(),
                Code::DataLoss,
            ),
            (
                MountError::Unavailable {
                    chain_id,
                    reason: reason(),
                }
                .into(),
                Code::Unavailable,
            ),
            (
                MountError::Io {
                    action: name(),
                    source: io::Error::other("mount"),
                }
                .into(),
                Code::Internal,
            ),
            (
                SnapshotError::MountTimeout {
                    name: name(),
                    waited: Duration::from_secs(1),
                },
                Code::DeadlineExceeded,
            ),
            (
                SnapshotError::Deadline {
                    waited: Duration::from_secs(1),
                },
                Code::DeadlineExceeded,
            ),
            (directory(io::Error::other("disk")), Code::Internal),
            (
                directory(io::ErrorKind::StorageFull.into()),
                Code::ResourceExhausted,
            ),
            (
                directory(io::ErrorKind::QuotaExceeded.into()),
                Code::ResourceExhausted,
            ),
            (
                SnapshotError::InvalidLabel {
                    label: "l",
                    value: name(),
                    reason: "r",
                },
                Code::InvalidArgument,
            ),
            (SnapshotError::Empty { what: "key" }, Code::InvalidArgument),
            (
                Filters::parse(&["="]).unwrap_err().into(),
                Code::InvalidArgument,
            ),
            (SnapshotError::Stopping, Code::Unavailable),
            (SnapshotError::Broken { reason: reason() }, Code::Internal),
        ]
    }

    #[test]
    fn every_error_has_its_code_and_says_why() {
        for (error, expected) in every_error() {
            let text = error.to_string();
            let status = Status::from(Refusal::from(error));
            assert_eq!(status.code(), expected, "{text}");
            assert!(
                status.message().starts_with(&text),
                "{} / {text}",
                status.message()
            );
        }
        let exists = Status::from(Refusal::Exists {
            name: "sluice/1".into(),
        });
        assert_eq!(exists.code(), Code::AlreadyExists);
        assert!(exists.message().contains("sluice/1"));
    }
}
