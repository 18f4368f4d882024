// SPDX-License-Identifier: Apache-2.0
//! A command, what it takes of time and memory.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::harness::command::Output;
use crate::harness::{command, tools};

/// What a command took.
#[derive(Debug, Clone)]
pub struct Metered {
    /// From its start to its end.
    pub seconds: f64,
    /// The most memory that its largest process ever had in its page tables.
    pub peak_rss_bytes: u64,
    /// What it printed.
    pub output: Output,
}

/// Runs it to its end, by the program `meter`, which leaves a file in `directory` for a moment.
///
/// **Errors**: as [`command::run_ok`]. After the deadline what the command started may go on for a while.
pub fn run(command: &Command, directory: &Path, deadline: Duration) -> Result<Metered> {
    let report = directory.join("meter");
    let mut meter = Command::new(tools::binary("meter")?);
    meter.arg(&report).arg(command.get_program());
    meter.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => meter.env(name, value),
            None => meter.env_remove(name),
        };
    }
    // What others wrote is on the disk, and its way there is not measured with this.
    nix::unistd::sync();
    let output = command::run_ok(&mut meter, deadline)?;
    let text = std::fs::read_to_string(&report).context("read what the meter says")?;
    std::fs::remove_file(&report)?;
    let (seconds, peak) = parse(&text).with_context(|| format!("what the meter says: {text:?}"))?;
    Ok(Metered {
        seconds,
        peak_rss_bytes: peak,
        output,
    })
}

fn parse(text: &str) -> Option<(f64, u64)> {
    let (seconds, peak) = text.trim().split_once(' ')?;
    Some((seconds.parse().ok()?, peak.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_meter_says() {
        assert_eq!(parse("1.250000 4096\n"), Some((1.25, 4096)));
        assert_eq!(parse(""), None);
        assert_eq!(parse("1.2 x"), None);
    }
}
