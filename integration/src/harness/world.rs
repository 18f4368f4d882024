// SPDX-License-Identifier: Apache-2.0
//! A machine of its own for what a reader of the documentation types: where files, sockets and ports are those that pages name.
//!
//! Namespaces of mounts, processes and network around a copy on write of this machine's root
//! (`integration/scripts/world.sh`). The steps run one after the other in one shell, as typed, until one fails. With the shell
//! everything ends that they started, and with it every mount.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::containerd::Release;
use super::process::{Process, tail};
use super::root::Root;
use super::tools;

/// The registry of a machine, at `registry.example`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// Everybody may read and write.
    Open,
    /// It wants to know who asks.
    Private,
    /// At port 5000, by a certificate that the machine does not trust.
    Authority,
    /// With a cache at `cache.example`.
    Cached,
}

impl Site {
    /// Its name in the script.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Private => "private",
            Self::Authority => "authority",
            Self::Cached => "cached",
        }
    }
}

/// Something that the reader does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Types this.
    Type(String),
    /// Writes this file, in a directory that is there.
    Write {
        /// Where.
        path: String,
        /// Its content.
        text: String,
    },
}

/// What became of the steps.
#[derive(Debug)]
pub struct Outcome {
    /// Of each step that was begun, what it printed: both outputs, as on a terminal.
    pub printed: Vec<String>,
    /// Whether the last of them failed, or did not come to an end.
    pub failed: bool,
    /// The last lines of what services and the machine itself logged.
    pub logs: String,
}

/// Makes a machine whose registry has the image of the layout `image` as `team/app:v1`, runs the steps, and ends it.
///
/// **Errors**: when it cannot be made. A step that fails, or still runs at the deadline, is an [`Outcome`].
pub fn run(
    root: &Root,
    release: Release,
    site: Site,
    image: impl FnOnce(&Path) -> Result<()>,
    steps: &[Step],
    deadline: Duration,
) -> Result<Outcome> {
    let machine = root.directory("machine")?;
    image(&root.directory("machine/image")?)?;
    let mut script = String::from("set -euo pipefail\n");
    for (at, step) in steps.iter().enumerate() {
        // What is typed is read as a file, so that a process in it cannot read what comes next as its input.
        let (name, text) = match step {
            Step::Type(text) => {
                writeln!(
                    script,
                    "echo {at} >/machine/begun; . /machine/{at}.sh >/machine/{at}.out 2>&1 </dev/null"
                )?;
                (format!("{at}.sh"), text)
            }
            Step::Write { path, text } => {
                writeln!(
                    script,
                    "echo {at} >/machine/begun; cat /machine/{at}.file >'{path}' 2>/machine/{at}.out"
                )?;
                (format!("{at}.file"), text)
            }
        };
        std::fs::write(machine.join(name), text)?;
    }
    script += "echo >/machine/all\n";
    std::fs::write(machine.join("steps.sh"), script)?;
    let program = tools::binary("sluiced")?;
    let built = program.parent().context("program has a directory")?;
    let version = match release {
        Release::V1 => "1",
        Release::V2 => "2",
    };
    let mut command = Command::new(tools::on_path("unshare")?);
    command
        .args(["--mount", "--pid", "--net", "--ipc", "--uts", "--fork"])
        .args(["--kill-child=SIGKILL", "--"])
        .arg(tools::workspace().join("integration/scripts/world.sh"))
        .arg(root.path())
        .arg(built)
        .arg(tools::target().join("tools"))
        .args([version, site.name()]);
    let log = root.join("machine/world.log")?;
    let mut process = Process::start("a machine", &mut command, &log)?;
    let ended = process.wait(deadline);
    if ended.is_err() {
        // The first process of a namespace heeds no SIGTERM of its parent; with this one it is killed.
        process.kill()?;
    }
    let read = |name: &str| std::fs::read_to_string(machine.join(name)).unwrap_or_default();
    let begun = read("begun");
    let begun: usize = begun.trim().parse().with_context(|| {
        format!(
            "the machine was not made: {}\n{}",
            process.log_tail(),
            logs(root)
        )
    })?;
    let failed = !machine.join("all").exists();
    Ok(Outcome {
        printed: (0..=begun).map(|at| read(&format!("{at}.out"))).collect(),
        failed,
        logs: format!("{}\n{}", process.log_tail(), logs(root)),
    })
}

/// The ends of the logs of services on the machine, and of its registries.
fn logs(root: &Root) -> String {
    let mut text = String::new();
    for directory in ["upper/var/log", "machine"] {
        let entries = std::fs::read_dir(root.path().join(directory));
        for path in entries.into_iter().flatten().flatten().map(|it| it.path()) {
            if path.extension().is_none_or(|it| it != "log") {
                continue;
            }
            text += &format!("-- {}\n{}\n", path.display(), tail(&path, 12));
        }
    }
    text
}
