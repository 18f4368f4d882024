// SPDX-License-Identifier: Apache-2.0
//! A named network namespace, and how threads and processes come to be in it.
//!
//! A thread enters; what it binds, connects and starts from then on is inside, child processes and
//! threads included. The mount namespace stays the caller's: `ip netns exec` would change that too,
//! and FUSE mounts made in there would be seen by nobody else.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command;
use super::tools;

const DEADLINE: Duration = Duration::from_secs(20);
const CONGESTION_CONTROL: &str = "ipv4/tcp_congestion_control";

/// A network namespace in `/run/netns`; dropped, its processes are ended and it is removed.
#[derive(Debug)]
pub struct Network {
    name: String,
}

impl Network {
    /// Makes it, with its loopback device up and no IPv6.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let network = Self {
            name: name.to_owned(),
        };
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        network.inside(|| {
            let write = |key: &str, value: &str| {
                std::fs::write(format!("/proc/sys/net/{key}"), value).is_ok()
            };
            // No router solicitations and address checks among what is measured.
            write("ipv6/conf/all/disable_ipv6", "1");
            // What most hosts have, whatever this one has. A namespace may be refused it, but not
            // what it comes from.
            let _ = write(CONGESTION_CONTROL, "cubic") || write(CONGESTION_CONTROL, "reno");
            Ok(())
        })?;
        Ok(network)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Moves the calling thread inside, for good.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(path(&self.name))
            .with_context(|| format!("open network namespace {}", self.name))?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter network namespace {}", self.name))
    }

    /// Does `work` on a thread of its own inside.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                work()
            });
            thread
                .join()
                .map_err(|_| anyhow!("a thread in {} panicked", self.name))?
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Runs `ip ARGS`.
pub fn ip(args: &[&str]) -> Result<()> {
    command::run_ok(Command::new(tools::on_path("ip")?).args(args), DEADLINE).map(|_| ())
}

/// Ends the processes of a namespace and removes it; says what fails.
pub fn remove(name: &str) {
    end_processes(name);
    if let Err(e) = ip(&["netns", "del", name]) {
        eprintln!("harness: {e:#}");
    }
}

/// SIGKILL to every process of a namespace.
pub fn end_processes(name: &str) {
    // Twice: one may have been starting another.
    for _ in 0..2 {
        let listed = tools::on_path("ip")
            .and_then(|ip| {
                command::run_ok(Command::new(ip).args(["netns", "pids", name]), DEADLINE)
            })
            .map_or_else(|_| String::new(), |output| output.stdout);
        let pids = listed.lines().filter_map(|line| line.trim().parse().ok());
        for pid in pids.map(Pid::from_raw).filter(|pid| *pid != Pid::this()) {
            kill(pid, Signal::SIGKILL).ok();
        }
    }
}

/// The names of all namespaces that begin with `prefix`.
#[must_use]
pub fn named(prefix: &str) -> Vec<String> {
    std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}
