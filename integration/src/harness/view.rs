// SPDX-License-Identifier: Apache-2.0
//! An image's files as a snapshotter shows them: a view of its topmost snapshot, mounted.
//!
//! Not by `ctr images mount`: that of containerd 1.6 unpacks into its default snapshotter, whatever it
//! is told.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::containerd::Containerd;

/// A mounted view; dropped, it is unmounted and removed.
#[derive(Debug)]
pub struct View<'a> {
    containerd: &'a Containerd,
    namespace: String,
    snapshotter: String,
    key: String,
    target: PathBuf,
}

impl<'a> View<'a> {
    /// Makes a view of the committed snapshot `chain_id` and mounts it at `target`, which exists.
    pub fn mount(
        containerd: &'a Containerd,
        namespace: &str,
        snapshotter: &str,
        chain_id: &str,
        target: &Path,
    ) -> Result<Self> {
        let key = format!("view-{snapshotter}");
        let target_text = target.display().to_string();
        let output = containerd.ctr_ok(
            namespace,
            &[
                "snapshots",
                "--snapshotter",
                snapshotter,
                "view",
                "--target",
                &target_text,
                &key,
                chain_id,
            ],
        )?;
        let view = Self {
            containerd,
            namespace: namespace.to_owned(),
            snapshotter: snapshotter.to_owned(),
            key,
            target: target.to_owned(),
        };
        let line = output.stdout.trim();
        // mount -t TYPE SOURCE TARGET -o OPTIONS
        let words: Vec<&str> = line.split(' ').collect();
        let [_, _, kind, source, _, _, options] = words[..] else {
            anyhow::bail!("one mount was expected: {line}");
        };
        ensure!(options.split(',').any(|it| it == "ro") || kind == "overlay");
        let (kind, flags, data) = match kind {
            "bind" => (None, MsFlags::MS_BIND | MsFlags::MS_REC, None),
            kind => {
                let data: Vec<&str> = options.split(',').filter(|it| *it != "ro").collect();
                (Some(kind), MsFlags::MS_RDONLY, Some(data.join(",")))
            }
        };
        mount(Some(source), target, kind, flags, data.as_deref())
            .with_context(|| format!("do what containerd says: {line}"))?;
        Ok(view)
    }

    /// Where its files are.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        umount2(&self.target, MntFlags::MNT_DETACH).ok();
        let remove = [
            "snapshots",
            "--snapshotter",
            &self.snapshotter,
            "rm",
            &self.key,
        ];
        if let Err(e) = self.containerd.ctr_ok(&self.namespace, &remove) {
            eprintln!("harness: {e:#}");
        }
    }
}
