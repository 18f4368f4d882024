// SPDX-License-Identifier: Apache-2.0
//! What processes take: memory, descriptors, threads.

use std::path::Path;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde::Serialize;

/// The most memory that a process ever had in its page tables.
pub fn peak_bytes(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = field(&status, "VmHWM").context("VmHWM")?;
    Ok(kib * 1024)
}

/// Ticks of a second in /proc: what the kernel shows there has been 100 on all machines that Sluice runs on, whatever it
/// counts with.
const TICKS: f64 = 100.0;

/// Seconds of CPU time that a process took, in user and kernel mode, with those of its children that have ended.
pub fn cpu_seconds(pid: Pid) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = cpu_ticks(&stat).with_context(|| format!("CPU time in {stat:?}"))?;
    Ok(ticks as f64 / TICKS)
}

/// utime, stime, cutime and cstime of proc_pid_stat(5), added up. The name in brackets may contain anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).take(4);
    (0..4).map(|_| ticks.next()?.parse::<u64>().ok()).sum()
}

/// What a process takes, or several together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Its share of the memory that it has in its page tables: what is mapped by n processes counts as an nth.
    pub pss_bytes: u64,
    /// Of that, what no other process maps.
    pub private_bytes: u64,
    /// Of that, what stands in no file: heap, stacks, buffers.
    pub anonymous_bytes: u64,
    /// All that it has in its page tables; of several, what they share counts for each.
    pub rss_bytes: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// Of a process that runs. It must not hang in a mount: to look at one that does would hang, too.
    pub fn of(pid: Pid) -> Result<Self> {
        let process = Path::new("/proc").join(pid.to_string());
        let read = |name: &str| {
            std::fs::read_to_string(process.join(name))
                .with_context(|| format!("read {name} of process {pid}"))
        };
        let descriptors = std::fs::read_dir(process.join("fd"))?.count();
        let mut usage = Self {
            descriptors: u64::try_from(descriptors)?,
            threads: field(&read("status")?, "Threads").context("threads")?,
            ..Self::default()
        };
        usage.take_memory(&read("smaps_rollup")?)?;
        Ok(usage)
    }

    fn take_memory(&mut self, rollup: &str) -> Result<()> {
        let bytes = |name: &str| {
            let kib = field(rollup, name).with_context(|| format!("{name} in {rollup:?}"))?;
            Ok::<u64, anyhow::Error>(kib * 1024)
        };
        self.pss_bytes = bytes("Pss")?;
        self.private_bytes = bytes("Private_Clean")? + bytes("Private_Dirty")?;
        self.anonymous_bytes = bytes("Anonymous")?;
        self.rss_bytes = bytes("Rss")?;
        Ok(())
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            pss_bytes: self.pss_bytes + other.pss_bytes,
            private_bytes: self.private_bytes + other.private_bytes,
            anonymous_bytes: self.anonymous_bytes + other.anonymous_bytes,
            rss_bytes: self.rss_bytes + other.rss_bytes,
            descriptors: self.descriptors + other.descriptors,
            threads: self.threads + other.threads,
        }
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "PSS {:6.1} MiB (private {:6.1}, anonymous {:6.1}), RSS {:6.1} MiB, {:5} descriptors, {:4} threads",
            mib(self.pss_bytes),
            mib(self.private_bytes),
            mib(self.anonymous_bytes),
            mib(self.rss_bytes),
            self.descriptors,
            self.threads
        )
    }
}

/// The number of the line `name: number`.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_of_a_rollup() {
        let rollup = "5598-7ffe ---p 00000000 00:00 0   [rollup]\nRss:    100 kB\nPss:     60 kB\n\
            Pss_Anon:  1 kB\nShared_Clean: 50 kB\nPrivate_Clean:  7 kB\nPrivate_Dirty:  8 kB\nAnonymous:  9 kB\n";
        let mut usage = Usage::default();
        usage.take_memory(rollup).unwrap();
        let expected = Usage {
            pss_bytes: 60 << 10,
            private_bytes: 15 << 10,
            anonymous_bytes: 9 << 10,
            rss_bytes: 100 << 10,
            ..Usage::default()
        };
        assert_eq!(usage, expected);
        assert_eq!(usage.and(usage).private_bytes, 30 << 10);
        assert!(usage.take_memory("Rss: 1 kB\n").is_err());
    }

    #[test]
    fn cpu_time_in_the_line_of_a_process() {
        let line = "7 (a) b) S 1 7 7 0 -1 4194560 9 8 0 0 100 20 3 0 20 0 4 0 55 1 2";
        assert_eq!(cpu_ticks(line), Some(123));
        assert_eq!(cpu_ticks("7 (a) S 1 2 3"), None);
        assert!(cpu_seconds(Pid::this()).unwrap() >= 0.0);
    }

    #[test]
    fn memory_and_descriptors_of_this_process_grow() {
        let before = Usage::of(Pid::this()).unwrap();
        let block = vec![1u8; 64 << 20];
        let files: Vec<_> = (0..50).map(|_| tempfile::tempfile().unwrap()).collect();
        let after = Usage::of(Pid::this()).unwrap();
        assert!(block.iter().all(|byte| *byte == 1) && files.len() == 50);
        // Other tests of this process run at the same time.
        assert!(
            after.anonymous_bytes > before.anonymous_bytes + (32 << 20),
            "{before} {after}"
        );
        assert!(
            after.descriptors > before.descriptors + 25,
            "{before} {after}"
        );
        assert!(after.threads >= 1 && after.pss_bytes <= after.rss_bytes);
    }
}
