// SPDX-License-Identifier: Apache-2.0
//! What a set-up shows of an image: its files, and what is said of its layers.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::command;
use super::rootfs::Rootfs;
use super::site::Site;
use super::tools;

/// What `sluice why` says of a layer.
#[derive(Debug, Clone)]
pub struct Why {
    /// Whether it is lazy.
    pub lazy: bool,
    /// By which index, or why not.
    pub reason: String,
    /// Where it is asked for first.
    pub place: String,
}

/// All files below a directory, a line each, with the times of directories if wanted. By a child with a deadline: it
/// may be a mount that hangs.
pub fn walk(directory: &Path, directory_times: bool) -> Result<Vec<String>> {
    let mut walk = Command::new(tools::binary("treewalk")?);
    if directory_times {
        walk.arg("--directory-times");
    }
    let walked = command::run_ok(walk.arg(directory), Duration::from_secs(240))?;
    Ok(walked.stdout.lines().map(str::to_owned).collect())
}

impl Site {
    /// All files of a chain as a snapshotter shows them to a container, as [`walk`] lists them.
    pub fn files(
        &self,
        namespace: &str,
        snapshotter: &str,
        chain_id: &str,
        directory_times: bool,
    ) -> Result<Vec<String>> {
        let target = self
            .root
            .directory(&format!("look-{namespace}-{snapshotter}"))?;
        let containerd = &self.containerd;
        let rootfs = Rootfs::mount(containerd, namespace, snapshotter, chain_id, &target)?;
        walk(rootfs.path(), directory_times)
    }

    /// What `sluice why` says of each layer of an image, the lowest first.
    pub fn why(&self, namespace: &str, reference: &str) -> Result<Vec<Why>> {
        let why = ["why", "--namespace", namespace, reference, "--json"];
        let output = self.daemon.sluice_ok(&why)?;
        let why: serde_json::Value = serde_json::from_str(&output.stdout)?;
        let layers = why["layers"].as_array().context("layers")?.iter();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let layers = layers.map(|layer| Why {
            lazy: layer["lazy"] == true,
            reason: text(&layer["reason"]),
            place: text(&layer["place"]),
        });
        Ok(layers.collect())
    }
}
