// SPDX-License-Identifier: Apache-2.0
//! A background process that does not outlive its guard.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running child; dropped, it is ended by SIGTERM, then SIGKILL.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output appended to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let file: File = OpenOptions::new().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self {
            child,
            name: name.to_owned(),
            log: log.to_owned(),
        })
    }

    /// The process ID.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// Waits until `ready` holds; an early end of the process or the deadline is an error with the log's tail.
    pub fn wait_ready(
        &mut self,
        deadline: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended early with {status}:\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            if start.elapsed() > deadline {
                bail!(
                    "{} was not ready after {deadline:?}:\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        kill(self.pid(), Signal::SIGKILL).ok();
        self.wait(Duration::from_secs(10))
    }

    /// SIGTERM; after ten seconds SIGKILL.
    pub fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        kill(self.pid(), Signal::SIGTERM).ok();
        if self.wait(Duration::from_secs(10)).is_err() {
            self.kill()?;
            bail!(
                "{} did not stop on SIGTERM within 10 s:\n{}",
                self.name,
                self.log_tail()
            );
        }
        Ok(())
    }

    /// Waits for the end; an error when it still runs at the deadline.
    pub fn wait(&mut self, deadline: Duration) -> Result<()> {
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            if start.elapsed() > deadline {
                bail!("{} still runs", self.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, 25)
    }
}

/// The last so many lines of a log; nothing of one that cannot be read.
pub(super) fn tail(log: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("harness: {e:#}");
        }
    }
}
