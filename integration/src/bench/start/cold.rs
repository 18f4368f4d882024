// SPDX-License-Identifier: Apache-2.0
//! One cold start: nothing of the image, of containerd or of its snapshotter is left of an earlier one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::super::files::drop_caches;
use super::super::{DEADLINE, NAMESPACE};
use super::contender::{Contender, Service};
use super::images::Image;
use super::lab::Lab;
use crate::harness::containerd::{Containerd, Release};
use crate::harness::containers::Containers;
use crate::harness::nerdctl::Nerdctl;
use crate::harness::registry::free_address;
use crate::harness::root::Root;

/// Between two looks whether the container is ready.
const LOOK: Duration = Duration::from_millis(4);
/// What each image's command prints first.
const FIRST_OUTPUT: &str = "starting";
/// How long a process may take to end when it is killed.
const DIES: Duration = Duration::from_secs(5);

/// What one cold start took. Times begin with the pull, and each contains those before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Until the pull has ended.
    pub pull_s: f64,
    /// Until the container is made.
    pub create_s: f64,
    /// Until its first output.
    pub output_s: f64,
    /// Until its probe has answered.
    pub ready_s: f64,
    /// What the line had carried by then.
    pub bytes: u64,
    /// Requests that had been answered by then.
    pub requests: u64,
    /// The most memory of the snapshotter's processes.
    pub peak_rss_bytes: u64,
}

/// A node whose container is ready. Fields drop in order.
#[derive(Debug)]
pub struct Node {
    _attached: Attached,
    /// Its processes.
    pub containers: Containers,
    /// containerd.
    pub containerd: Containerd,
    /// The snapshotter.
    pub service: Service,
    _root: Root,
}

/// What a node is beside its contender and image.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// The part of the lab's root where it lives: nodes that live at once have different ones.
    pub part: &'a str,
    /// Whether the snapshotter notes what is read.
    pub record: bool,
    /// Appended to sluiced's configuration.
    pub config: &'a str,
}

/// Starts the image once; with `record`, the snapshotter notes what is read.
pub fn start(
    lab: &Lab,
    contender: Contender,
    image: Image,
    record: bool,
) -> Result<(Sample, Node)> {
    let setting = Setting {
        part: "n",
        record,
        config: "",
    };
    start_in(lab, contender, image, setting)
}

/// Starts the image once, on such a node.
pub fn start_in(
    lab: &Lab,
    contender: Contender,
    image: Image,
    setting: Setting<'_>,
) -> Result<(Sample, Node)> {
    let root = lab.root.part(setting.part)?;
    let service = contender.serve(&root, &lab.registry, setting)?;
    let containers = Containers::of(&root);
    let plugin = service
        .socket()
        .map(|socket| (contender.snapshotter(), socket));
    let plugins: Vec<(&str, &Path)> = plugin.into_iter().collect();
    let containerd = Containerd::start_with(&root, Release::V2, &plugins)?;
    let reference = lab.reference(contender, image);
    let nerdctl = Nerdctl::new(&root, &containerd, NAMESPACE, contender.snapshotter());
    let address = free_address()?;
    let port = format!("PORT={}", address.port());
    let create = ["create", "--name", "start", "--net", "host", "--env", &port];

    drop_caches()?;
    // The registry's disk is another machine's.
    lab.warm(contender, image)?;
    let line = &lab.registry.line;
    let before = line.tally().total();
    let begun = Instant::now();
    let mut sample = Sample::default();
    let explained = |error: anyhow::Error| {
        error.context(format!(
            "{} of {}; its snapshotter says:\n{}\ncontainerd says:\n{}",
            contender.name(),
            image.name(),
            service.log_tail(),
            containerd.log_tail()
        ))
    };
    nerdctl
        .ok(&["pull", "--quiet", &reference])
        .map_err(explained)?;
    sample.pull_s = begun.elapsed().as_secs_f64();
    nerdctl
        .ok(&[&create[..], &[&reference]].concat())
        .map_err(explained)?;
    sample.create_s = begun.elapsed().as_secs_f64();
    let mut command = nerdctl.command()?;
    command.args(["start", "--attach", "start"]);
    let mut attached = Attached::start(&mut command, root.join("output")?)?;
    attached
        .wait_ready(image, address, begun, &mut sample)
        .map_err(explained)?;
    let carried = line.tally().total().since(before);
    sample.bytes = carried.bytes;
    sample.requests = carried.requests;
    sample.peak_rss_bytes = service.peak_rss_bytes()?;
    let node = Node {
        _attached: attached,
        containers,
        containerd,
        service,
        _root: root,
    };
    Ok((sample, node))
}

/// nerdctl, attached to the container; dropped, it is killed.
#[derive(Debug)]
struct Attached {
    child: Child,
    output: PathBuf,
}

impl Attached {
    fn start(command: &mut Command, output: PathBuf) -> Result<Self> {
        let file = std::fs::File::create(&output)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("start nerdctl")?;
        Ok(Self { child, output })
    }

    fn wait_ready(
        &mut self,
        image: Image,
        address: SocketAddr,
        begun: Instant,
        sample: &mut Sample,
    ) -> Result<()> {
        let probe = image.probe();
        loop {
            let ended = self.child.try_wait()?;
            let output = std::fs::read_to_string(&self.output).unwrap_or_default();
            let now = begun.elapsed();
            if sample.output_s == 0.0 && output.contains(FIRST_OUTPUT) {
                sample.output_s = now.as_secs_f64();
            }
            if sample.output_s > 0.0 && probe.holds(address, &output) {
                sample.ready_s = begun.elapsed().as_secs_f64();
                return Ok(());
            }
            if let Some(status) = ended {
                bail!("the container ended early with {status}: {output}");
            }
            if now > DEADLINE {
                bail!("not ready after {DEADLINE:?}: {output}");
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.child.kill().ok();
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < DIES {
            std::thread::sleep(LOOK);
        }
    }
}
