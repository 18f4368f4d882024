// SPDX-License-Identifier: Apache-2.0
//! `meter FILE COMMAND…`: runs the command to its end, with the exit code that it had, and writes seconds and the peak
//! resident memory of its largest process, in bytes, to FILE.
//!
//! A process of its own, because the kernel keeps one peak for all children that a process ever waited for, and because
//! a child starts with the peak of the one that forked it: this one is small.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: meter FILE COMMAND…";
    let report = PathBuf::from(arguments.next().context(usage)?);
    let program = arguments.next().context(usage)?;
    let begun = Instant::now();
    let status = Command::new(&program)
        .args(arguments)
        .status()
        .with_context(|| format!("run {}", program.display()))?;
    let seconds = begun.elapsed().as_secs_f64();
    // Linux counts in KiB.
    let peak = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss() * 1024;
    std::fs::write(&report, format!("{seconds:.6} {peak}\n"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(u8::MAX)))
}
