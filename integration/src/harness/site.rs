// SPDX-License-Identifier: Apache-2.0
//! A whole set-up: registry behind a line, `sluiced`, containerd.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::containerd::{Containerd, Release};
use super::containers::Containers;
use super::daemon::{Daemon, Surroundings};
use super::images;
use super::kubernetes::{self, Kubernetes};
use super::nerdctl::Nerdctl;
use super::proxy::Line;
use super::registry::Registry;
use super::root::Root;
use super::service_manager::ServiceManager;

/// Stands for the registry's `host:port` in what a set-up appends to sluiced's config.
pub const REGISTRY: &str = "@REGISTRY@";

/// Fields drop in order: containers first, then containerd, the daemon with its shim, the registry,
/// and last the root with what is still mounted.
#[derive(Debug)]
pub struct Site {
    containers: Containers,
    /// containerd.
    pub containerd: Containerd,
    /// sluiced.
    pub daemon: Daemon,
    /// The registry and its line.
    pub registry: Registry,
    /// Where all of it lives.
    pub root: Root,
}

impl Site {
    /// Starts everything below a new root named after `name`, with `extra` appended to sluiced's config.
    pub fn start(name: &str, release: Release, line: Line, extra: &str) -> Result<Self> {
        let surroundings = Surroundings::default();
        Self::start_within(Root::new(name)?, surroundings, release, line, extra)
    }

    /// As [`Self::start`]; a service manager starts sluiced, and keeps descriptors for it.
    pub fn start_managed(name: &str, release: Release, line: Line, extra: &str) -> Result<Self> {
        let root = Root::new(name)?;
        let surroundings = Surroundings {
            manager: Some(ServiceManager::start(&root)?),
            ..Surroundings::default()
        };
        Self::start_within(root, surroundings, release, line, extra)
    }

    /// As [`Self::start`]; containerd serves Kubernetes too, as `sluice setup containerd --cri` sets it up.
    pub fn start_for_kubernetes(
        name: &str,
        release: Release,
        line: Line,
        extra: &str,
    ) -> Result<Self> {
        let (root, around) = (Root::new(name)?, Surroundings::default());
        Self::assemble(root, around, release, line, extra, true)
    }

    /// As [`Self::start`], below `root`, with the daemon in these surroundings.
    pub fn start_within(
        root: Root,
        surroundings: Surroundings,
        release: Release,
        line: Line,
        extra: &str,
    ) -> Result<Self> {
        Self::assemble(root, surroundings, release, line, extra, false)
    }

    fn assemble(
        root: Root,
        surroundings: Surroundings,
        release: Release,
        line: Line,
        extra: &str,
        kubernetes: bool,
    ) -> Result<Self> {
        let registry = Registry::start(&root, line)?;
        let socket = root.directory("c")?.join("c.sock");
        let extra = extra.replace(REGISTRY, &registry.host());
        let daemon = Daemon::start_within(surroundings, &root, &socket, &extra)?;
        let containers = Containers::of(&root);
        let containerd = if kubernetes {
            let pause = kubernetes::push_pause(&root, &registry)?;
            Containerd::start_for_kubernetes(&root, release, &daemon, &pause)?
        } else {
            Containerd::start(&root, release, &daemon.snapshots_socket())?
        };
        Ok(Self {
            containers,
            containerd,
            daemon,
            registry,
            root,
        })
    }

    /// Pushes a layout as `repository:original`, past the line, and converts it to `repository:sluice`.
    /// Returns both references, which go over the line.
    pub fn push_and_convert(&self, layout: &Path, repository: &str) -> Result<[String; 2]> {
        let (host, direct) = (self.registry.host(), self.registry.direct());
        images::push_layout(layout, &format!("{direct}/{repository}:original"))?;
        let references = ["original", "sluice"].map(|tag| format!("{host}/{repository}:{tag}"));
        let [original, converted] = references.each_ref().map(|it| format!("docker://{it}"));
        self.daemon.sluice_ok(&["convert", &original, &converted])?;
        Ok(references)
    }

    /// `sluice pull REFERENCE` into a namespace of containerd.
    pub fn pull_lazily(&self, namespace: &str, reference: &str) -> Result<()> {
        let address = self.containerd.socket().display().to_string();
        let options = ["--address", &address, "--namespace", namespace];
        self.daemon
            .sluice_ok(&[&["pull"], &options[..], &[reference]].concat())?;
        Ok(())
    }

    /// Has containerd pull it and unpack its layers for overlayfs.
    pub fn pull_ordinarily(&self, namespace: &str, reference: &str) -> Result<()> {
        let pull = ["images", "pull", "--plain-http"];
        let unpack = ["--snapshotter", "overlayfs", reference];
        let options = [&pull[..], &unpack[..]].concat();
        self.containerd.ctr_ok(namespace, &options)?;
        Ok(())
    }

    /// nerdctl with Sluice's snapshotter.
    #[must_use]
    pub fn nerdctl(&self, namespace: &str) -> Nerdctl<'_> {
        Nerdctl::new(&self.root, &self.containerd, namespace, "sluice")
    }

    /// Kubernetes' view of a site of [`Self::start_for_kubernetes`].
    #[must_use]
    pub fn kubernetes(&self) -> Kubernetes<'_> {
        Kubernetes::new(&self.root, &self.containerd)
    }

    /// nerdctl with another snapshotter.
    #[must_use]
    pub fn nerdctl_with(&self, namespace: &str, snapshotter: &str) -> Nerdctl<'_> {
        Nerdctl::new(&self.root, &self.containerd, namespace, snapshotter)
    }

    /// Starts the daemon again and waits until containerd has found it: its connection backs off for up to 3 s.
    pub fn daemon_again(&mut self) -> Result<()> {
        self.daemon.start_again()?;
        let start = Instant::now();
        // Listing would not do: containerd answers that from its own metadata when it has none.
        let probe = |args: &[&str]| {
            let args = [&["snapshots", "--snapshotter", "sluice"], args].concat();
            self.containerd.ctr_ok("probe", &args)
        };
        loop {
            match probe(&["prepare", "probe"]) {
                Ok(_) => break,
                Err(e) if start.elapsed() > Duration::from_secs(15) => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
        probe(&["rm", "probe"])?;
        Ok(())
    }

    /// `sluice status --json`.
    pub fn status(&self) -> Result<serde_json::Value> {
        self.daemon.status()
    }

    /// Waits until the store holds at least one layer and every layer is sealed.
    pub fn wait_sealed(&self, deadline: Duration) -> Result<()> {
        let start = Instant::now();
        while !self.daemon.is_sealed()? {
            if start.elapsed() > deadline {
                bail!(
                    "not sealed after {deadline:?}: {:#}\n{}",
                    self.status()?,
                    self.daemon.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        Ok(())
    }

    /// Ends all containers' processes at once, as a power cut would.
    pub fn kill_containers(&self) {
        self.containers.kill();
    }
}
