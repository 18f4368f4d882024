// SPDX-License-Identifier: Apache-2.0
//! Encoding of a snapshot's row: JSON with fixed field names, see `docs/formats/metadata.md`.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::snapshots::{Labels, LazyLayerRecord, SnapshotId, SnapshotKind, SnapshotRecord, Usage};

/// Time as (seconds since the epoch, nanoseconds).
type Instant = (u64, u32);

/// A row of the table `snapshots`; its key is the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Row {
    pub(super) id: SnapshotId,
    pub(super) kind: SnapshotKind,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) parent: Option<String>,
    pub(super) labels: Labels,
    created: Instant,
    updated: Instant,
    pub(super) usage: Usage,
    /// The layer is in the table `layers`, and there is no directory.
    pub(super) lazy: bool,
    /// Chain ID under which the table `targets` has this snapshot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) target: Option<String>,
}

impl Row {
    /// An ordinary row with no usage, created now.
    pub(super) fn new(
        id: SnapshotId,
        kind: SnapshotKind,
        parent: Option<String>,
        labels: Labels,
        now: SystemTime,
    ) -> Self {
        Row {
            id,
            kind,
            parent,
            labels: without_empty(labels),
            created: to_instant(now),
            updated: to_instant(now),
            usage: Usage::default(),
            lazy: false,
            target: None,
        }
    }

    pub(super) fn set_created(&mut self, now: SystemTime) {
        self.created = to_instant(now);
        self.updated = self.created;
    }

    pub(super) fn set_labels(&mut self, labels: Labels, now: SystemTime) {
        self.labels = without_empty(labels);
        self.updated = to_instant(now);
    }

    pub(super) fn encode(&self, name: &str) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(self).map_err(|error| StoreError::corrupt(name, error))
    }

    pub(super) fn decode(name: &str, bytes: &[u8]) -> Result<Self, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt(name, error))
    }

    pub(super) fn into_record(self, name: &str, layer: Option<LazyLayerRecord>) -> SnapshotRecord {
        SnapshotRecord {
            id: self.id,
            name: name.to_owned(),
            kind: self.kind,
            parent: self.parent,
            labels: self.labels,
            created: to_time(self.created),
            updated: to_time(self.updated),
            usage: self.usage,
            layer,
        }
    }
}

/// containerd's own store cannot hold an empty label value: setting one removes the label.
fn without_empty(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}

/// A clock before 1970 counts as 1970.
fn to_instant(time: SystemTime) -> Instant {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    (since.as_secs(), since.subsec_nanos())
}

fn to_time((seconds, nanoseconds): Instant) -> SystemTime {
    // A damaged row may hold any number; what the clock cannot show becomes the epoch.
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds.into()))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
