// SPDX-License-Identifier: Apache-2.0
//! What kubelet does to containerd, by `crictl`: pulls and pods over CRI.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::command::{self, Output};
use super::containerd::{Containerd, IDMAP};
use super::images;
use super::layout::{self, Attributes, Layer};
use super::registry::Registry;
use super::root::Root;
use super::tools;

/// The namespace of containerd in which Kubernetes' images and containers are.
pub const NAMESPACE: &str = "k8s.io";

/// A way to call `crictl`.
#[derive(Debug)]
pub struct Kubernetes<'a> {
    root: &'a Root,
    containerd: &'a Containerd,
}

impl<'a> Kubernetes<'a> {
    pub(super) fn new(root: &'a Root, containerd: &'a Containerd) -> Self {
        Self { root, containerd }
    }

    /// The command with its options that say where containerd is.
    pub fn command(&self) -> Result<Command> {
        let endpoint = format!("unix://{}", self.containerd.socket().display());
        let mut command = Command::new(tools::go_tool("crictl")?);
        command.args([
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
        ]);
        // A file that says nothing keeps it from looking for others.
        let config = self.root.join("crictl.yaml")?;
        std::fs::write(&config, "timeout: 60\n")?;
        command.arg("--config").arg(config);
        Ok(command)
    }

    /// Runs `crictl ARGS`; a failure is an error.
    pub fn ok(&self, args: &[&str]) -> Result<Output> {
        command::run_ok(self.command()?.args(args), Duration::from_secs(180))
    }

    /// Pulls an image.
    pub fn pull(&self, reference: &str) -> Result<()> {
        self.ok(&["pull", reference])?;
        Ok(())
    }

    /// Runs an image's own command to its end in a pod of its own, in the host's network; gives what it wrote to
    /// its output. The image is there already.
    pub fn run(&self, name: &str, reference: &str) -> Result<String> {
        self.run_with(name, reference, &json!([]), None)
    }

    /// The same, with these mounts in CRI's form, and if `first_user` is there, with 65536 users of its own from that one on (in
    /// a pod's words: `hostUsers: false`).
    pub fn run_with(
        &self,
        name: &str,
        reference: &str,
        mounts: &serde_json::Value,
        first_user: Option<u32>,
    ) -> Result<String> {
        let logs = self.root.directory(&format!("pods/{name}"))?;
        let write = |what: &str, text: &serde_json::Value| -> Result<String> {
            let path = self.root.join(&format!("pods/{name}.{what}.json"))?;
            std::fs::write(&path, text.to_string())?;
            Ok(path.display().to_string())
        };
        // 2 is the node's own.
        let mut namespaces = json!({"network": 2});
        if let Some(first) = first_user {
            let map = json!([{"host_id": first, "container_id": 0, "length": 65536}]);
            namespaces["userns_options"] = json!({"mode": 0, "uids": map, "gids": map});
        }
        let linux = json!({"security_context": {"namespace_options": namespaces}});
        let pod = write(
            "pod",
            &json!({
                "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
                "log_directory": logs, "linux": linux,
            }),
        )?;
        // Where users are those of the pod, both must say so.
        let container = first_user.map_or_else(|| json!({}), |_| linux.clone());
        let container = write(
            "container",
            &json!({
                "metadata": {"name": "main"}, "image": {"image": reference},
                "log_path": "main.log", "linux": container, "mounts": mounts,
            }),
        )?;
        let runtime: &[&str] = match first_user {
            Some(_) => &["--runtime", IDMAP],
            None => &[],
        };
        let sandbox = self.ok(&[&["runp"], runtime, &[&pod]].concat())?;
        let sandbox = sandbox.stdout.trim().to_owned();
        let ran = self.run_in(&sandbox, &container, &pod);
        self.ok(&["rmp", "-f", &sandbox])?;
        ran?;
        let log = std::fs::read_to_string(logs.join("main.log")).context("read the pod's log")?;
        Ok(output_of(&log))
    }

    fn run_in(&self, sandbox: &str, container: &str, pod: &str) -> Result<()> {
        let created = self.ok(&["create", "--no-pull", sandbox, container, pod])?;
        let id = created.stdout.trim();
        self.ok(&["start", id])?;
        let start = Instant::now();
        loop {
            let status: serde_json::Value =
                serde_json::from_str(&self.ok(&["inspect", "--output", "json", id])?.stdout)?;
            if status["status"]["state"] == "CONTAINER_EXITED" {
                let code = &status["status"]["exitCode"];
                ensure!(code == 0, "the container ended with {code}: {status:#}");
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(120) {
                bail!("the container does not end: {status:#}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Standard output from a log in CRI's format: `TIME STREAM F|P TEXT`.
fn output_of(log: &str) -> String {
    let mut out = String::new();
    for line in log.lines() {
        let mut fields = line.splitn(4, ' ').skip(1);
        let (stream, tag, text) = (fields.next(), fields.next(), fields.next());
        if stream == Some("stdout") {
            out += text.unwrap_or_default();
            if tag == Some("F") {
                out.push('\n');
            }
        }
    }
    out
}

/// Pushes the image that holds a pod's namespaces; gives its reference.
pub(super) fn push_pause(root: &Root, registry: &Registry) -> Result<String> {
    let mut layer = Layer::new();
    layer.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?;
    let directory = root.directory("pause")?;
    let layout = layout::write(
        &directory,
        &mut [layer],
        &["/bin/busybox", "sleep", "86400"],
    )?;
    images::push_layout(&layout, &format!("{}/pause:1", registry.direct()))?;
    Ok(format!("{}/pause:1", registry.host()))
}
