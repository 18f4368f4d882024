// SPDX-License-Identifier: Apache-2.0
//! Runs a child to its end under a deadline and keeps what it printed.
//!
//! Output goes to files, not pipes: a grandchild that holds a pipe open (a container, a shim) would
//! otherwise keep the caller waiting after the child itself has ended.

use std::fs::File;
use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a finished command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
    /// Wall time from start to end.
    pub elapsed: Duration,
    /// Time from start until standard output was first seen not to be empty (2 ms resolution).
    pub first_output: Option<Duration>,
}

impl Output {
    /// Whether it ended with status 0.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.status.success()
    }
}

/// Runs `command` until it ends.
///
/// **Errors**: when it cannot be started, or is still running after `deadline`; then it is killed
/// (not waited for without bound: a process stuck in the kernel cannot be reaped).
pub fn run(command: &mut Command, deadline: Duration) -> Result<Output> {
    run_observed(command, deadline, |_| ())
}

/// Like [`run`]; calls `on_first_output` once, when the first byte of standard output is there.
pub fn run_observed(
    command: &mut Command,
    deadline: Duration,
    mut on_first_output: impl FnMut(Duration),
) -> Result<Output> {
    let name = format!("{command:?}");
    let mut out = tempfile::tempfile().context("create output file")?;
    let mut err = tempfile::tempfile().context("create output file")?;
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let mut first_output = None;
    loop {
        if first_output.is_none() && out.metadata()?.len() > 0 {
            let elapsed = start.elapsed();
            first_output = Some(elapsed);
            on_first_output(elapsed);
        }
        if let Some(status) = child.try_wait()? {
            let elapsed = start.elapsed();
            let stdout = read_back(&mut out)?;
            if first_output.is_none() && !stdout.is_empty() {
                first_output = Some(elapsed);
                on_first_output(elapsed);
            }
            return Ok(Output {
                status,
                stdout,
                stderr: read_back(&mut err)?,
                elapsed,
                first_output,
            });
        }
        if start.elapsed() > deadline {
            child.kill().ok();
            bail!(
                "{name} still ran after {deadline:?}: {} {}",
                read_back(&mut out)?,
                read_back(&mut err)?
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Like [`run`], and an exit status other than 0 is an error that shows what was printed.
pub fn run_ok(command: &mut Command, deadline: Duration) -> Result<Output> {
    let output = run(command, deadline)?;
    if !output.ok() {
        bail!(
            "{command:?} ended with {}:\n{}{}",
            output.status,
            output.stdout,
            output.stderr
        );
    }
    Ok(output)
}

fn read_back(file: &mut File) -> Result<String> {
    use std::io::Seek;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
