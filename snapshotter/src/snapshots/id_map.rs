// SPDX-License-Identifier: Apache-2.0
//! The labels by which a client asks for a snapshot owned by a user namespace.
//!
//! `containerd.io/snapshot/uidmapping` and `…/gidmapping` hold mappings
//! `<in container>:<on host>:<count>[,…]`. As with the overlayfs snapshotter, the upper directory
//! belongs to the host IDs of the container's root; whether the mounts are idmapped too is up to
//! [`super::OverlayOptions`].

use super::{Labels, SnapshotError};

/// Label with the mapping of user IDs.
pub(super) const LABEL_UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Label with the mapping of group IDs.
pub(super) const LABEL_GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// Owner of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The host IDs of the container's root; `None` without mapping labels.
pub(super) fn mapped_root(labels: &Labels) -> Result<Option<Owner>, SnapshotError> {
    let (uids, gids) = (labels.get(LABEL_UID_MAPPING), labels.get(LABEL_GID_MAPPING));
    if uids.is_none() && gids.is_none() {
        return Ok(None);
    }
    Ok(Some(Owner {
        uid: root_of(LABEL_UID_MAPPING, uids)?,
        gid: root_of(LABEL_GID_MAPPING, gids)?,
    }))
}

/// The host ID that container ID 0 has.
fn root_of(label: &'static str, mapping: Option<&String>) -> Result<u32, SnapshotError> {
    let value = mapping.cloned().unwrap_or_default();
    let invalid = |reason| SnapshotError::InvalidLabel {
        label,
        value: value.clone(),
        reason,
    };
    if value.is_empty() {
        return Err(invalid("both mappings are needed"));
    }
    let mut root = None;
    for range in value.split(',') {
        let numbers: Option<Vec<u32>> = range.split(':').map(|part| part.parse().ok()).collect();
        let Some([container, host, count]) = numbers.as_deref() else {
            return Err(invalid("want <in container>:<on host>:<count>"));
        };
        if host.checked_add(*count).is_none() || container.checked_add(*count).is_none() {
            return Err(invalid("range exceeds 32 bits"));
        }
        if *container == 0 && *count > 0 {
            root = root.or(Some(*host));
        }
    }
    root.ok_or_else(|| invalid("does not map ID 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_mapped_or_refused() {
        for (uids, gids, expected) in [
            (None, None, Ok(None)),
            (
                Some("0:1000:65536"),
                Some("0:2000:65536"),
                Ok(Some((1000, 2000))),
            ),
            (Some("5:1:5,0:7:1"), Some("0:0:1"), Ok(Some((7, 0)))),
            (Some("0:1000:65536"), None, Err("both")),
            (None, Some("0:1000:65536"), Err("both")),
            (Some("1:1000:65536"), Some("0:1:1"), Err("does not map")),
            (Some("0:1000:0"), Some("0:1:1"), Err("does not map")),
            (Some("0:1000"), Some("0:1:1"), Err("want")),
            (Some("0:1000:1:1"), Some("0:1:1"), Err("want")),
            (Some("0:-1:1"), Some("0:1:1"), Err("want")),
            (Some("0:4294967295:2"), Some("0:1:1"), Err("exceeds")),
        ] {
            let mut labels = Labels::new();
            uids.map(|value: &str| labels.insert(LABEL_UID_MAPPING.into(), value.into()));
            gids.map(|value: &str| labels.insert(LABEL_GID_MAPPING.into(), value.into()));
            match (mapped_root(&labels), expected) {
                (Ok(got), Ok(expected)) => {
                    assert_eq!(got, expected.map(|(uid, gid)| Owner { uid, gid }));
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{uids:?} {gids:?}: {got:?}, expected {expected:?}"),
            }
        }
    }
}
