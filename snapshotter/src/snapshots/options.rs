// SPDX-License-Identifier: Apache-2.0
//! Mounts as containerd gets them, in the form that the overlayfs snapshotter gives.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::id_map::{LABEL_GID_MAPPING, LABEL_UID_MAPPING};
use super::{SnapshotDirectories, SnapshotKind, SnapshotRecord};

/// A mount that containerd is asked to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    /// Directory to bind, or `overlay`.
    pub source: String,
    /// Options in containerd's form.
    pub options: Vec<String>,
}

/// Options that all overlay mounts get.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions {
    /// Appended to each overlay mount, after the directories.
    pub extra: Vec<String>,
    /// Answer `uidmap=` and `gidmap=` for snapshots with mapping labels. containerd 1.6 and 1.7
    /// know no idmapped rootfs mounts and would hand the options to the kernel, which refuses
    /// them; so it changes with what containerd is found to be.
    pub idmapped: Arc<AtomicBool>,
}

impl OverlayOptions {
    /// Adds what this kernel needs: `index=off` where overlayfs has an index (on by default it
    /// makes mounts of shared lowers fail), `userxattr` inside a user namespace.
    pub fn detect(mut self) -> Self {
        let has = |options: &[String], key: &str| {
            options
                .iter()
                .any(|option| option.split('=').next() == Some(key))
        };
        let in_user_namespace = std::fs::read_to_string("/proc/self/uid_map")
            .is_ok_and(|map| map.split_whitespace().ne(["0", "0", "4294967295"]));
        if in_user_namespace && !has(&self.extra, "userxattr") {
            self.extra.push("userxattr".into());
        }
        if Path::new("/sys/module/overlay/parameters/index").exists() && !has(&self.extra, "index")
        {
            self.extra.push("index=off".into());
        }
        self
    }

    /// The mounts of an active snapshot or a view that stands on `lowers`, highest first.
    pub(super) fn mounts(
        &self,
        record: &SnapshotRecord,
        lowers: &[PathBuf],
        directories: &SnapshotDirectories,
    ) -> Vec<Mount> {
        let mut options = Vec::new();
        if self.idmapped.load(Ordering::Relaxed) {
            for (name, label) in [("uidmap", LABEL_UID_MAPPING), ("gidmap", LABEL_GID_MAPPING)] {
                options.extend(
                    record
                        .labels
                        .get(label)
                        .map(|value| format!("{name}={value}")),
                );
            }
        }
        let writable = record.kind == SnapshotKind::Active;
        let bind = |source: &Path, access: &str, mut options: Vec<String>| {
            options.extend([access.to_owned(), "rbind".to_owned()]);
            vec![Mount {
                kind: "bind",
                source: text(source),
                options,
            }]
        };
        match lowers {
            [] => bind(
                &directories.fs(record.id),
                if writable { "rw" } else { "ro" },
                options,
            ),
            [only] if !writable => bind(only, "ro", options),
            lowers => {
                if writable {
                    options.push(format!("workdir={}", text(&directories.work(record.id))));
                    options.push(format!("upperdir={}", text(&directories.fs(record.id))));
                }
                let lowers: Vec<String> = lowers.iter().map(|lower| text(lower)).collect();
                options.push(format!("lowerdir={}", lowers.join(":")));
                options.extend(self.extra.iter().cloned());
                vec![Mount {
                    kind: "overlay",
                    source: "overlay".into(),
                    options,
                }]
            }
        }
    }
}

/// Paths are below the root, which the configuration restricts to plain text.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
