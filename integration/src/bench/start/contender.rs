// SPDX-License-Identifier: Apache-2.0
//! Who is compared: a snapshotter, and the image as that snapshotter wants it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::super::DEADLINE;
use super::super::process::peak_bytes;
use super::cold::Setting;
use crate::harness::daemon::{self, Daemon};
use crate::harness::process::Process;
use crate::harness::registry::Registry;
use crate::harness::root::Root;
use crate::harness::{command, tools};

/// How long a snapshotter may take to listen.
const LISTENS: Duration = Duration::from_secs(30);

/// A contender.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// containerd's own snapshotter: the whole image is downloaded and unpacked.
    Overlayfs,
    /// Sluice, the image converted.
    Sluice,
    /// The same with a boot list attached.
    SluiceBoot,
    /// The same, mounted by the kernel's EROFS alone.
    SluiceErofs,
    /// The same, over FUSE alone.
    SluiceFuse,
    /// Sluice, the image as it is, with an index beside it.
    SluiceIndex,
    /// stargz-snapshotter, the image converted to eStargz.
    Stargz,
    /// The same with the files first that a start was seen to read.
    StargzOptimized,
    /// The SOCI snapshotter, the image with an index of version 2.
    Soci,
    /// nydus-snapshotter.
    Nydus,
}

impl Contender {
    /// Its word on the command line and in documents.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Sluice => "sluice",
            Self::SluiceBoot => "sluice-boot",
            Self::SluiceErofs => "sluice-erofs",
            Self::SluiceFuse => "sluice-fuse",
            Self::SluiceIndex => "sluice-index",
            Self::Stargz => "stargz",
            Self::StargzOptimized => "stargz-optimized",
            Self::Soci => "soci",
            Self::Nydus => "nydus",
        }
    }

    /// What the report calls it.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Sluice => "Sluice, converted",
            Self::SluiceBoot => "Sluice, converted, boot list",
            Self::SluiceErofs => "Sluice, the same, EROFS alone",
            Self::SluiceFuse => "Sluice, the same, FUSE alone",
            Self::SluiceIndex => "Sluice, unmodified, index",
            Self::Stargz => "stargz, eStargz",
            Self::StargzOptimized => "stargz, eStargz optimized",
            Self::Soci => "SOCI, index v2",
            Self::Nydus => "nydus",
        }
    }

    /// Whether it is a form of Sluice.
    #[must_use]
    pub fn is_ours(self) -> bool {
        self.snapshotter() == "sluice"
    }

    /// Name of the snapshotter in containerd. nerdctl gives some of them labels by that name.
    #[must_use]
    pub fn snapshotter(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Sluice
            | Self::SluiceBoot
            | Self::SluiceErofs
            | Self::SluiceFuse
            | Self::SluiceIndex => "sluice",
            Self::Stargz | Self::StargzOptimized => "stargz",
            Self::Soci => "soci",
            Self::Nydus => "nydus",
        }
    }

    /// Where its form of an image stands below the image's name, and the tag.
    #[must_use]
    pub fn place(self) -> [&'static str; 2] {
        match self {
            Self::Overlayfs | Self::SluiceIndex => ["original", "latest"],
            Self::Sluice => ["sluice", "latest"],
            Self::SluiceBoot | Self::SluiceErofs | Self::SluiceFuse => ["sluice", "boot"],
            Self::Stargz => ["stargz", "latest"],
            Self::StargzOptimized => ["stargz-optimized", "latest"],
            Self::Soci => ["soci", "latest"],
            Self::Nydus => ["nydus", "latest"],
        }
    }

    /// The one backend that it keeps to, if there is one.
    fn backend(self) -> Option<&'static str> {
        match self {
            Self::SluiceErofs => Some("erofs"),
            Self::SluiceFuse => Some("fuse"),
            _ => None,
        }
    }

    /// Its version.
    ///
    /// **Errors** say why it cannot be had.
    pub fn version(self) -> Result<String> {
        match self {
            Self::Overlayfs => first_line(
                Command::new(tools::go_tool("containerd2")?).arg("--version"),
                |line| line.split(' ').nth(2).unwrap_or(line).to_owned(),
            ),
            Self::Sluice
            | Self::SluiceBoot
            | Self::SluiceErofs
            | Self::SluiceFuse
            | Self::SluiceIndex => first_line(
                Command::new(tools::binary("sluice")?).arg("--version"),
                |line| line.trim_start_matches("sluice ").to_owned(),
            ),
            Self::Stargz | Self::StargzOptimized => {
                peer_version("stargz", "github.com/containerd/stargz-snapshotter ")
            }
            Self::Soci => peer_version("soci", "github.com/awslabs/soci-snapshotter "),
            Self::Nydus => {
                for program in ["nydusd", "nydus-image"] {
                    if tools::on_path(program).is_err() {
                        bail!("{program} is not on PATH, and no package or module brings it");
                    }
                }
                bail!("the benchmark does not drive nydus yet")
            }
        }
    }

    /// Starts its snapshotter below `root`, with nothing in it.
    pub fn serve(self, root: &Root, registry: &Registry, setting: Setting<'_>) -> Result<Service> {
        let containerd = root.directory("c")?.join("c.sock");
        let peer = |program: &str, arguments: &dyn Fn(&mut Command)| {
            let socket = root.directory("run")?.join("peer.sock");
            let mut command = Command::new(tools::go_tool(program)?);
            command.arg("serve").arg(root.directory("peer")?);
            command.arg(&socket);
            arguments(&mut command);
            let log = root.join("peer.log")?;
            let mut process = Process::start(program, &mut command, &log)?;
            process.wait_ready(LISTENS, || socket.exists())?;
            Ok::<_, anyhow::Error>(Service::Peer {
                process,
                socket,
                log,
            })
        };
        match self {
            Self::Overlayfs => Ok(Service::None),
            Self::Sluice
            | Self::SluiceBoot
            | Self::SluiceErofs
            | Self::SluiceFuse
            | Self::SluiceIndex => {
                // Labels of containerd leave ports out, and an image that nobody converted has no hint.
                let host = registry.host();
                let mut config = format!("\n[registry.hosts.\"{host}\"]\n{}", setting.config);
                if let Some(backend) = self.backend() {
                    config += &format!("\n[mount]\nbackend = \"{backend}\"\n");
                }
                if setting.record {
                    config += "\n[boot]\nwindow = \"5s\"\n";
                }
                let daemon = Daemon::start(root, &containerd, &config)?;
                let socket = daemon.snapshots_socket();
                let daemon = Box::new(daemon);
                Ok(Service::Sluice { daemon, socket })
            }
            Self::Stargz | Self::StargzOptimized => peer("stargz-peer", &|command| {
                command.args(setting.record.then_some("record"));
            }),
            Self::Soci => peer("soci-peer", &|command| {
                command.arg(&containerd);
            }),
            Self::Nydus => bail!("the benchmark does not drive nydus yet"),
        }
    }
}

/// What of the program's output names its version.
fn first_line(command: &mut Command, version: impl Fn(&str) -> String) -> Result<String> {
    let output = command::run_ok(command, Duration::from_secs(20))?;
    let line = output.stdout.lines().next().context("a version")?;
    Ok(version(line))
}

/// The version of a module that a program of `integration/peers` is made of.
fn peer_version(name: &str, module: &str) -> Result<String> {
    tools::go_tool(&format!("{name}-peer")).with_context(|| {
        format!(
            "integration/scripts/go-tools.sh {} {name}",
            tools::target().join("tools").display()
        )
    })?;
    let modules = tools::workspace().join(format!("integration/peers/{name}/go.mod"));
    let text = std::fs::read_to_string(&modules)?;
    let mut lines = text.lines().map(str::trim);
    let version = lines.find_map(|line| line.trim_start_matches("require ").strip_prefix(module));
    Ok(version.context("the module's version")?.to_owned())
}

/// A snapshotter that runs; dropped, it is ended.
#[derive(Debug)]
pub enum Service {
    /// containerd needs none.
    None,
    /// sluiced and its shim.
    Sluice {
        /// The daemon.
        daemon: Box<Daemon>,
        /// Where containerd connects.
        socket: PathBuf,
    },
    /// Another one.
    Peer {
        /// Its only process.
        process: Process,
        /// Where containerd connects.
        socket: PathBuf,
        /// What it logs.
        log: PathBuf,
    },
}

impl Service {
    /// Where containerd connects.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::None => None,
            Self::Sluice { socket, .. } | Self::Peer { socket, .. } => Some(socket),
        }
    }

    /// Its processes.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        Ok(match self {
            Self::None => Vec::new(),
            Self::Sluice { daemon, .. } => {
                let mut pids = daemon::shim_pids(daemon.run_dir());
                pids.push(daemon.pid()?);
                pids
            }
            Self::Peer { process, .. } => vec![process.pid()],
        })
    }

    /// The most memory that each of its processes ever had in its page tables, added up: bytes.
    pub fn peak_rss_bytes(&self) -> Result<u64> {
        self.pids()?.into_iter().map(peak_bytes).sum()
    }

    /// Waits until every image is complete on its node, if it is Sluice; others do not say it.
    pub fn wait_sealed(&self) -> Result<()> {
        let Self::Sluice { daemon, .. } = self else {
            return Ok(());
        };
        let begun = Instant::now();
        while !daemon.is_sealed()? {
            if begun.elapsed() > DEADLINE {
                bail!("not sealed after {DEADLINE:?}: {}", daemon.log_tail());
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        Ok(())
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Sluice { daemon, .. } => daemon.log_tail(),
            Self::Peer { process, .. } => process.log_tail(),
        }
    }
}
