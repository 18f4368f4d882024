// SPDX-License-Identifier: Apache-2.0
//! Between our records and the messages of containerd's snapshots service.

use std::collections::HashMap;

use containerd_snapshots::{Info, Kind, api};

use crate::snapshots::{Labels, Mount, SnapshotKind, SnapshotRecord, Usage};

pub(super) fn labels(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

pub(super) fn info(record: SnapshotRecord) -> Info {
    Info {
        kind: match record.kind {
            SnapshotKind::View => Kind::View,
            SnapshotKind::Active => Kind::Active,
            SnapshotKind::Committed => Kind::Committed,
        },
        name: record.name,
        parent: record.parent.unwrap_or_default(),
        labels: record.labels.into_iter().collect(),
        created_at: record.created,
        updated_at: record.updated,
    }
}

/// What exceeds the message's signed numbers is shown as their maximum.
pub(super) fn usage(usage: Usage) -> containerd_snapshots::Usage {
    containerd_snapshots::Usage {
        inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        size: i64::try_from(usage.size_bytes).unwrap_or(i64::MAX),
    }
}

pub(super) fn mounts(mounts: Vec<Mount>) -> Vec<api::types::Mount> {
    let convert = |mount: Mount| api::types::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(convert).collect()
}
