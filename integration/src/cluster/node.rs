// SPDX-License-Identifier: Apache-2.0
//! One node: containerd, `sluiced` and its shim, and containers, in a network of their own.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::fabric::Port;
use super::image::Published;
use super::registry_address;
use crate::harness::command::{self, Output};
use crate::harness::containerd::{Containerd, Release};
use crate::harness::containers::Containers;
use crate::harness::daemon::Daemon;
use crate::harness::root::Root;

const NAMESPACE: &str = "cluster";
const PULL_DEADLINE: Duration = Duration::from_secs(120);

/// A running node. Fields drop in order: containers, containerd, the daemon with its shim, files, network.
#[derive(Debug)]
pub struct Node {
    _containers: Containers,
    containerd: Containerd,
    daemon: Daemon,
    root: Root,
    port: Port,
}

impl Node {
    /// Starts it below `root`, with nothing in it; `config` is appended to the daemon's configuration.
    pub fn start(root: &Root, port: Port, config: &str) -> Result<Self> {
        let root = root.part(port.name())?;
        let socket = root.directory("c")?.join("c.sock");
        let (daemon, containerd) = port.network().inside(|| {
            let daemon = Daemon::start(&root, &socket, config)?;
            let containerd = Containerd::start(&root, Release::V1, &daemon.snapshots_socket())?;
            Ok((daemon, containerd))
        })?;
        Ok(Self {
            _containers: Containers::of(&root),
            containerd,
            daemon,
            root,
            port,
        })
    }

    /// Its name, that of its link.
    #[must_use]
    pub fn name(&self) -> &str {
        self.port.name()
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.port.address().into()
    }

    /// Moves the calling thread into its network.
    pub(super) fn enter(&self) -> Result<()> {
        self.port.network().enter()
    }

    /// The value of its daemon's metric; see [`Daemon::metric`].
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        self.port
            .network()
            .inside(|| self.daemon.metric(name, labels))
    }

    /// Runs `sluice ARGS` against its daemon, in its network; a failure is an error.
    pub fn sluice_ok(&self, args: &[&str]) -> Result<Output> {
        self.port.network().inside(|| self.daemon.sluice_ok(args))
    }

    /// Whether everything it knows of is here and sealed.
    pub fn is_sealed(&self) -> Result<bool> {
        self.daemon.is_sealed()
    }

    /// Its daemon's log.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// The last lines of it.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.daemon.log_tail()
    }

    /// What it says about itself, for the message of a test that fails: the last lines of the log, its
    /// status, and those of its metrics that are not zero.
    #[must_use]
    pub fn describe(&self) -> String {
        let status = self
            .daemon
            .status()
            .map_or_else(|e| format!("{e:#}"), |status| status.to_string());
        let metrics = self
            .port
            .network()
            .inside(|| self.daemon.metrics())
            .unwrap_or_else(|e| format!("{e:#}"));
        let counts = metrics
            .lines()
            .filter(|l| !l.starts_with('#') && !l.contains("_bucket{") && !l.ends_with(" 0"));
        let counts: Vec<&str> = counts.collect();
        format!(
            "{}:\n{}\n{status}\n{}",
            self.name(),
            self.log_tail(),
            counts.join("\n")
        )
    }

    /// SIGKILL to the daemon; shim, mounts and containers stay.
    pub(super) fn kill_daemon(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// Starts the daemon again. The calling thread is in the node's network.
    pub(super) fn start_daemon(&mut self) -> Result<()> {
        self.daemon.start_again()
    }

    /// Pulls lazily. The calling thread is in the node's network.
    pub(super) fn pull(&self, image: &Published) -> Result<()> {
        let address = self.containerd.socket().display().to_string();
        let mut pull = self.daemon.sluice()?;
        pull.args(["pull", "--address", &address, "--namespace", NAMESPACE])
            .args(["--plain-http", &registry_address().to_string()])
            .arg(&image.reference);
        command::run_ok(&mut pull, PULL_DEADLINE)
            .map(|_| ())
            .with_context(|| format!("{}: {}", self.name(), self.daemon.log_tail()))
    }

    /// Runs the image's program in a container.
    pub(super) fn run(&self, image: &Published) -> Result<Running> {
        // runc keeps the containers of all containerds in one place.
        let container = &format!("{}-{}", std::process::id(), self.name());
        let mut run = self.containerd.ctr()?;
        run.args(["-n", NAMESPACE, "run", "--rm", "--net-host"])
            // No group of its own: its CPU time is the set-up's.
            .args(["--cgroup", ""])
            .args(["--snapshotter", "sluice", &image.reference, container]);
        Running::spawn(&mut run, &self.root.join("run.log")?)
    }
}

/// A container's output, line by line, each with the moment at which it came.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    lines: Receiver<(Instant, String)>,
    log: std::path::PathBuf,
}

impl Running {
    fn spawn(command: &mut Command, log: &std::path::Path) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(log)?)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let output = child.stdout.take().context("the output was piped")?;
        let (sender, lines) = channel();
        // Ends with the pipe, at the latest when the child is killed: nobody inherits it.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            child,
            lines,
            log: log.to_owned(),
        })
    }

    /// The next line, which begins with `word`: when it came, and its rest.
    pub(super) fn expect(&mut self, word: &str, deadline: Duration) -> Result<(Instant, String)> {
        match self.lines.recv_timeout(deadline) {
            Ok((at, line)) => match line.strip_prefix(word) {
                Some(rest) => Ok((at, rest.trim().to_owned())),
                None => bail!("`{word}` was expected, not `{line}`"),
            },
            Err(RecvTimeoutError::Timeout) => {
                bail!("no `{word}` within {deadline:?}; {}", self.errors())
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the container ended without `{word}`: {}", self.errors())
            }
        }
    }

    /// Waits for its end, which is a good one.
    pub(super) fn finish(mut self, deadline: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(
                    status.success(),
                    "the container ended with {status}: {}",
                    self.errors()
                );
                return Ok(());
            }
            ensure!(
                start.elapsed() < deadline,
                "the container still ran after {deadline:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn errors(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}
