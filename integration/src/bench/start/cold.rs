// SPDX-License-Identifier: Apache-2.0
//! One cold start: nothing of the image, of containerd or of its snapshotter is left of an earlier one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
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

/// A node with nothing on it, until containers start. Fields drop in order.
#[derive(Debug)]
pub struct Node {
    attached: Vec<Attached>,
    /// Its processes.
    pub containers: Containers,
    /// containerd.
    pub containerd: Containerd,
    /// The snapshotter.
    pub service: Service,
    contender: Contender,
    root: Root,
}

impl Node {
    /// With containerd and the contender's snapshotter, both new.
    pub fn open(lab: &Lab, contender: Contender, setting: Setting<'_>) -> Result<Self> {
        let root = lab.root.part(setting.part)?;
        let service = contender.serve(&root, &lab.registry, setting)?;
        let containers = Containers::of(&root);
        let plugin = service
            .socket()
            .map(|socket| (contender.snapshotter(), socket));
        let plugins: Vec<(&str, &Path)> = plugin.into_iter().collect();
        let containerd = Containerd::start_with(&root, Release::V2, &plugins)?;
        Ok(Self {
            attached: Vec::new(),
            containers,
            containerd,
            service,
            contender,
            root,
        })
    }

    /// nerdctl with the contender's snapshotter.
    #[must_use]
    pub fn nerdctl(&self) -> Nerdctl<'_> {
        Nerdctl::new(
            &self.root,
            &self.containerd,
            NAMESPACE,
            self.contender.snapshotter(),
        )
    }

    /// Starts `nerdctl ARGUMENTS`, which stays as long as a container does.
    pub fn attach(&mut self, arguments: &[&str]) -> Result<&mut Attached> {
        let output = self.root.join(&format!("output{}", self.attached.len()))?;
        let mut command = self.nerdctl().command()?;
        let attached = Attached::start(command.args(arguments), output)?;
        self.attached.push(attached);
        self.attached.last_mut().context("it was just added")
    }

    /// All that [`Self::attach`] started, in order.
    pub fn attached(&mut self) -> &mut [Attached] {
        &mut self.attached
    }

    /// Pulls what `name` is called by in the lab, and starts it until it is ready as `image` is. The page cache is dropped
    /// before.
    pub fn start(&mut self, lab: &Lab, image: Image, name: &str) -> Result<Sample> {
        let reference = lab.reference(self.contender, name);
        let address = free_address()?;
        let port = format!("PORT={}", address.port());
        let create = ["create", "--name", name, "--net", "host", "--env", &port];
        drop_caches()?;
        // The registry's disk is another machine's.
        lab.warm(self.contender, name)?;
        let line = &lab.registry.line;
        let before = line.tally().total();
        let begun = Instant::now();
        let mut sample = Sample::default();
        let do_now = |node: &Self, arguments: &[&str]| {
            let done = node.nerdctl().ok(arguments);
            done.map_err(|error| node.explain(name, error))
        };
        do_now(self, &["pull", "--quiet", &reference])?;
        sample.pull_s = begun.elapsed().as_secs_f64();
        do_now(self, &[&create[..], &[&reference]].concat())?;
        sample.create_s = begun.elapsed().as_secs_f64();
        let attached = self.attach(&["start", "--attach", name])?;
        let ready = attached.wait_ready(image, address, begun, &mut sample);
        ready.map_err(|error| self.explain(name, error))?;
        let carried = line.tally().total().since(before);
        sample.bytes = carried.bytes;
        sample.requests = carried.requests;
        sample.peak_rss_bytes = self.service.peak_rss_bytes()?;
        Ok(sample)
    }

    /// The error with what is in the logs.
    #[must_use]
    pub fn explain(&self, image: &str, error: anyhow::Error) -> anyhow::Error {
        error.context(format!(
            "{} of {image}; its snapshotter says:\n{}\ncontainerd says:\n{}",
            self.contender.name(),
            self.service.log_tail(),
            self.containerd.log_tail()
        ))
    }
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

impl Default for Setting<'_> {
    fn default() -> Self {
        Self {
            part: "n",
            record: false,
            config: "",
        }
    }
}

/// Starts the image once; with `record`, the snapshotter notes what is read.
pub fn start(
    lab: &Lab,
    contender: Contender,
    image: Image,
    record: bool,
) -> Result<(Sample, Node)> {
    let setting = Setting {
        record,
        ..Setting::default()
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
    let mut node = Node::open(lab, contender, setting)?;
    let sample = node.start(lab, image, image.name())?;
    Ok((sample, node))
}

/// nerdctl, attached to the container; dropped, it is killed.
#[derive(Debug)]
pub struct Attached {
    child: Child,
    output: PathBuf,
    /// How long the output was when it was last asked for.
    seen: u64,
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
        Ok(Self {
            child,
            output,
            seen: 0,
        })
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Whether there is more output than at the last call.
    pub fn has_more(&mut self) -> bool {
        let bytes = std::fs::metadata(&self.output).map_or(0, |it| it.len());
        bytes > std::mem::replace(&mut self.seen, bytes)
    }

    /// What it and its container have printed.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.output).unwrap_or_default()
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
            let ended = self.ended()?;
            let output = self.output();
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
