// SPDX-License-Identifier: Apache-2.0
//! The life cycle of snapshots.

mod lazy;
mod record;

pub use lazy::{
    LazyDecision, LazyLayers, MountError, PrepareRequest, UnpackError, UnpackSource, UnpackTarget,
};
pub use record::{
    BlobOrigin, LABEL_SNAPSHOT_REF, Labels, LazyLayerRecord, SnapshotId, SnapshotKind,
    SnapshotRecord, Usage, namespace_of,
};
