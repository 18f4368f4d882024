// SPDX-License-Identifier: Apache-2.0
//! nerdctl against a private containerd.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::command::{self, Output};
use super::containerd::{Containerd, Release};
use super::root::Root;
use super::tools;

/// A way to call nerdctl in one namespace with one snapshotter.
#[derive(Debug)]
pub struct Nerdctl<'a> {
    root: &'a Root,
    containerd: &'a Containerd,
    namespace: String,
    snapshotter: String,
}

impl<'a> Nerdctl<'a> {
    /// For `containerd`, in `namespace`, with `--snapshotter snapshotter`.
    #[must_use]
    pub fn new(
        root: &'a Root,
        containerd: &'a Containerd,
        namespace: &str,
        snapshotter: &str,
    ) -> Self {
        Self {
            root,
            containerd,
            namespace: namespace.to_owned(),
            snapshotter: snapshotter.to_owned(),
        }
    }

    /// The command with all options that make it private.
    pub fn command(&self) -> Result<Command> {
        let program = match self.containerd.release() {
            Release::V1 => tools::go_tool("nerdctl1")?,
            Release::V2 => tools::go_tool("nerdctl2")?,
        };
        let mut command = Command::new(program);
        command
            .arg("--address")
            .arg(self.containerd.socket())
            .args([
                "--namespace",
                &self.namespace,
                "--snapshotter",
                &self.snapshotter,
            ])
            .args(["--cgroup-manager", "cgroupfs"])
            .arg("--data-root")
            .arg(self.root.directory("nerdctl")?)
            .env("NERDCTL_TOML", self.root.join("nerdctl.toml")?)
            .env("DOCKER_CONFIG", self.root.directory("docker")?);
        Ok(command)
    }

    /// Runs `nerdctl ARGS`; a failure is an error.
    pub fn ok(&self, args: &[&str]) -> Result<Output> {
        command::run_ok(self.command()?.args(args), Duration::from_secs(300))
    }

    /// Runs `nerdctl ARGS`, whatever its exit status.
    pub fn any(&self, args: &[&str]) -> Result<Output> {
        command::run(self.command()?.args(args), Duration::from_secs(300))
    }
}
