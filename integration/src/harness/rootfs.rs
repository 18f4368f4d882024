// SPDX-License-Identifier: Apache-2.0
//! An image's files as a container sees them: a snapshot prepared on its topmost one, mounted.
//!
//! Not by `ctr images mount`: that of containerd 1.6 unpacks into its default snapshotter, whatever it
//! is told. And no view: `ctr` lets containerd's collector take it away while it is mounted.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::containerd::Containerd;

/// A mounted snapshot; dropped, it is unmounted and removed.
#[derive(Debug)]
pub struct Rootfs<'a> {
    containerd: &'a Containerd,
    namespace: String,
    snapshotter: String,
    key: String,
    target: PathBuf,
}

impl<'a> Rootfs<'a> {
    /// Prepares a snapshot on the committed `chain_id` and mounts it at `target`, which exists.
    pub fn mount(
        containerd: &'a Containerd,
        namespace: &str,
        snapshotter: &str,
        chain_id: &str,
        target: &Path,
    ) -> Result<Self> {
        let image = chain_id.trim_start_matches("sha256:");
        let key = format!("rootfs-{snapshotter}-{image:.16}");
        let target_text = target.display().to_string();
        let output = containerd.ctr_ok(
            namespace,
            &[
                "snapshots",
                "--snapshotter",
                snapshotter,
                "prepare",
                "--target",
                &target_text,
                &key,
                chain_id,
            ],
        )?;
        let rootfs = Self {
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
        // What overlayfs of a container needs, and nothing that mount(8) alone understands.
        ensure!(
            kind == "overlay",
            "a container's mount is an overlay: {line}"
        );
        mount(
            Some(source),
            target,
            Some(kind),
            MsFlags::empty(),
            Some(options),
        )
        .with_context(|| format!("do what containerd says: {line}"))?;
        Ok(rootfs)
    }

    /// Where its files are.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Rootfs<'_> {
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
