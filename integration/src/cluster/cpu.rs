// SPDX-License-Identifier: Apache-2.0
//! How busy the CPU is: a measurement of the network counts only while the CPU has time left.
//!
//! Two views. The whole machine's, from `/proc/stat`, also sees the kernel's own work and whatever else
//! runs. The set-up's own, from a control group that the test process enters and its children inherit,
//! says whether the links are slow enough, whatever else runs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

const CONTROLLER: &str = "/sys/fs/cgroup/cpuacct";

/// What the CPU did between two looks, in percent of all cores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Load {
    /// The whole machine.
    pub machine_percent: f64,
    /// The part of it by processes with a raised nice value, which give way.
    pub niced_percent: f64,
    /// The set-up: daemons, containerd, containers, registry and the test itself. `None` where the
    /// kernel does not account for it.
    pub own_percent: Option<f64>,
}

impl Load {
    /// The set-up's share if it is known, otherwise the machine's.
    #[must_use]
    pub fn percent(&self) -> f64 {
        self.own_percent.unwrap_or(self.machine_percent)
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (machine, niced) = (self.machine_percent, self.niced_percent);
        match self.own_percent {
            Some(own) => write!(
                f,
                "CPU {own:.0} % (machine {machine:.0} %, niced {niced:.0} %)"
            ),
            None => write!(f, "CPU of the machine {machine:.0} % (niced {niced:.0} %)"),
        }
    }
}

/// Accounts for the CPU time of this process and what it starts; dropped, the process leaves it.
#[derive(Debug)]
pub struct Account {
    /// The control group, where there is one.
    group: Option<PathBuf>,
    /// Where the process was before.
    before: PathBuf,
}

impl Account {
    /// Enters a control group `name` of cgroup v1's cpuacct; elsewhere only the whole machine is seen.
    #[must_use]
    pub fn open(name: &str) -> Self {
        let group = Path::new(CONTROLLER).join(name);
        let before = own_group().unwrap_or_else(|| PathBuf::from(CONTROLLER));
        let entered = Path::new(CONTROLLER)
            .exists()
            .then(|| std::fs::create_dir_all(&group).and_then(|()| enter(&group)));
        let group = match entered {
            Some(Ok(())) => Some(group),
            Some(Err(e)) => {
                eprintln!("harness: no account of CPU time: {e}");
                None
            }
            None => None,
        };
        Self { group, before }
    }

    /// A look at all counts.
    pub fn look(&self) -> Result<Cpu> {
        let text = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let machine = Machine::parse(&text).context("the first line of /proc/stat")?;
        let own = self.group.as_ref().and_then(|group| {
            let text = std::fs::read_to_string(group.join("cpuacct.usage")).ok()?;
            Some(Duration::from_nanos(text.trim().parse().ok()?))
        });
        Ok(Cpu {
            at: Instant::now(),
            machine,
            own,
        })
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            enter(&self.before).ok();
            if let Err(e) = std::fs::remove_dir(group) {
                eprintln!("harness: remove {}: {e}", group.display());
            }
        }
    }
}

/// Removes the control group of a test that is dead, whose processes are.
pub fn remove_leftover(name: &str) {
    std::fs::remove_dir(Path::new(CONTROLLER).join(name)).ok();
}

fn enter(group: &Path) -> std::io::Result<()> {
    std::fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

fn own_group() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers
            .split(',')
            .any(|it| it == "cpuacct")
            .then_some(path)
    })?;
    Some(Path::new(CONTROLLER).join(path.trim_start_matches('/')))
}

/// Counts at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    at: Instant,
    machine: Machine,
    own: Option<Duration>,
}

impl Cpu {
    /// What was done since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Load {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let time = (self.at - earlier.at).as_secs_f64().max(1e-3) * cores;
        let own = self.own.zip(earlier.own).map(|(now, then)| now - then);
        let (machine_percent, niced_percent) = self.machine.since(earlier.machine);
        Load {
            machine_percent,
            niced_percent,
            own_percent: own.map(|it| it.as_secs_f64() * 100.0 / time),
        }
    }
}

/// The machine's CPU time since boot, in ticks, all cores added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Machine {
    all: u64,
    busy: u64,
    niced: u64,
}

impl Machine {
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line
            .split_whitespace()
            .map(|it| it.parse().ok())
            .collect::<Option<_>>()?;
        // user nice system idle iowait irq softirq steal; guests are part of user and nice.
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else {
            return None;
        };
        let busy = user + nice + system + irq + softirq + steal;
        Some(Self {
            all: busy + idle + iowait,
            busy,
            niced: nice,
        })
    }

    /// Percent busy, and percent niced.
    fn since(self, earlier: Self) -> (f64, f64) {
        let all = self.all.saturating_sub(earlier.all).max(1) as f64;
        let percent = |part: u64| part as f64 * 100.0 / all;
        (
            percent(self.busy.saturating_sub(earlier.busy)),
            percent(self.niced.saturating_sub(earlier.niced)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_the_machines_time() {
        let before = Machine::parse("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2").unwrap();
        let after = Machine::parse("cpu  140 10 60 820 60 5 5 0 0 0\n").unwrap();
        let (busy, niced) = after.since(before);
        assert!((busy - 70.0).abs() < 1e-9, "{busy}");
        assert!((niced - 10.0).abs() < 1e-9, "{niced}");
        assert_eq!(after.since(after), (0.0, 0.0));
        assert_eq!(Machine::parse("cpu 1 2 3"), None);
        assert_eq!(Machine::parse(""), None);
    }
}
