// SPDX-License-Identifier: Apache-2.0
//! A private containerd, 1.6 from Debian or 2.x built from its module.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;

use super::command::{self, Output};
use super::daemon::Daemon;
use super::process::Process;
use super::root::Root;
use super::tools;

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian 12's 1.6.
    V1,
    /// 2.x.
    V2,
}

impl Release {
    /// A word for names and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "containerd-1.6",
            Self::V2 => "containerd-2",
        }
    }
}

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    process: Process,
    release: Release,
    socket: PathBuf,
    root: PathBuf,
    config: PathBuf,
    log: PathBuf,
}

impl Containerd {
    /// Starts it below `root` with Sluice's snapshots socket as a proxy plugin.
    pub fn start(root: &Root, release: Release, snapshots_socket: &Path) -> Result<Self> {
        Self::start_with(root, release, &[("sluice", snapshots_socket)])
    }

    /// Starts it below `root` with these snapshotters, each with its socket, beside its own.
    pub fn start_with(root: &Root, release: Release, plugins: &[(&str, &Path)]) -> Result<Self> {
        let config = config_path(root)?;
        if !config.exists() {
            let mut text = config_text(release, root, None)?;
            for (name, socket) in plugins {
                let socket = socket.display();
                text += &format!(
                    "\n[proxy_plugins.{name}]\n  type = \"snapshot\"\n  address = \"{socket}\"\n"
                );
            }
            std::fs::write(&config, text)?;
        }
        Self::start_configured(root, release)
    }

    /// Starts it with Kubernetes' CRI plugin on its socket, whose pods have the image `pause`; its
    /// configuration is what `sluice setup containerd --cri` makes of one without Sluice.
    pub fn start_for_kubernetes(
        root: &Root,
        release: Release,
        daemon: &Daemon,
        pause: &str,
    ) -> Result<Self> {
        let config = config_path(root)?;
        std::fs::write(&config, config_text(release, root, Some(pause))?)?;
        let mut setup = daemon.sluice()?;
        setup.args(["setup", "containerd", "--cri", "--yes", "--config"]);
        setup.arg(&config).arg("--root").arg(daemon.state());
        setup.arg("--address").arg(daemon.snapshots_socket());
        setup.arg("--containerd").arg(program(release)?);
        command::run_ok(&mut setup, Duration::from_secs(20))?;
        Self::start_configured(root, release)
    }

    fn start_configured(root: &Root, release: Release) -> Result<Self> {
        let (config, base) = (config_path(root)?, root.directory("containerd")?);
        let socket = root.directory("c")?.join("c.sock");
        let log = root.join("containerd.log")?;
        let process = spawn(release, &config, &log)?;
        let mut containerd = Self {
            process,
            release,
            socket,
            root: base,
            config,
            log,
        };
        containerd.wait_ready()?;
        Ok(containerd)
    }

    /// Ends it and starts it again on the same state.
    pub fn restart(&mut self) -> Result<()> {
        self.process.stop()?;
        self.process = spawn(self.release, &self.config, &self.log)?;
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let (release, socket) = (self.release, self.socket.clone());
        self.process.wait_ready(Duration::from_secs(30), || {
            socket.exists()
                && ctr_command(release, &socket)
                    .and_then(|mut c| command::run(c.arg("version"), Duration::from_secs(5)))
                    .is_ok_and(|o| o.ok())
        })
    }

    /// Which release it is.
    #[must_use]
    pub fn release(&self) -> Release {
        self.release
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its persistent root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A `ctr` of its release, with the address set.
    pub fn ctr(&self) -> Result<Command> {
        ctr_command(self.release, &self.socket)
    }

    /// Runs `ctr ARGS` in `namespace`; a failure is an error.
    pub fn ctr_ok(&self, namespace: &str, args: &[&str]) -> Result<Output> {
        command::run_ok(
            self.ctr()?.args(["-n", namespace]).args(args),
            Duration::from_secs(180),
        )
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

fn ctr_command(release: Release, socket: &Path) -> Result<Command> {
    let program = match release {
        Release::V1 => tools::on_path("ctr")?,
        Release::V2 => tools::go_tool("ctr2")?,
    };
    let mut command = Command::new(program);
    command.arg("--address").arg(socket);
    Ok(command)
}

fn config_path(root: &Root) -> Result<PathBuf> {
    Ok(root.directory("containerd")?.join("config.toml"))
}

fn program(release: Release) -> Result<PathBuf> {
    match release {
        Release::V1 => tools::on_path("containerd"),
        Release::V2 => tools::go_tool("containerd2"),
    }
}

fn spawn(release: Release, config: &Path, log: &Path) -> Result<Process> {
    let program = program(release)?;
    let mut command = Command::new(&program);
    if release == Release::V2 {
        // Its own shim must be found before Debian's.
        let mut path =
            std::ffi::OsString::from(program.parent().context("program has a directory")?);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path);
    }
    Process::start(release.name(), command.arg("--config").arg(config), log)
}

/// What no test has use for.
const DISABLED: &[&str] = &[
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.nri.v1.nri",
];

/// The runtime of pods with users of their own: containerd wants idmapped mounts of it, which Debian's runc 1.1 cannot make.
pub const IDMAP: &str = "idmap";

/// Kubernetes' plugin, in all its names.
const CRI: &[&str] = &[
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.runtime",
    "io.containerd.cri.v1.images",
];

/// A configuration without Sluice; with the CRI plugin if `pause` is the image of its pods.
fn config_text(release: Release, root: &Root, pause: Option<&str>) -> Result<String> {
    let version = match release {
        Release::V1 => 2,
        Release::V2 => 3,
    };
    let mut disabled = DISABLED.to_vec();
    if pause.is_none() {
        disabled.extend(CRI);
    }
    let (base, state) = (root.directory("containerd")?, root.directory("c")?);
    let mut text = format!(
        r#"version = {version}
root = "{}"
state = "{}"
disabled_plugins = {disabled:?}

[grpc]
  address = "{}"

[plugins."io.containerd.gc.v1.scheduler"]
  schedule_delay = "0ms"
  startup_delay = "100ms"
"#,
        base.display(),
        state.display(),
        state.join("c.sock").display(),
    );
    if let Some(pause) = pause {
        // Pods are in the host's network, so nothing is wanted of CNI; the cgroups here have no systemd.
        text += &match release {
            Release::V1 => format!(
                r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/nonexistent"
    conf_dir = "/nonexistent"
"#
            ),
            Release::V2 => format!(
                r#"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/nonexistent"]
    conf_dir = "/nonexistent"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{IDMAP}]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{IDMAP}.options]
      BinaryName = "{}"
"#,
                tools::target().join("tools/runc-idmap").display()
            ),
        };
    }
    Ok(text)
}
