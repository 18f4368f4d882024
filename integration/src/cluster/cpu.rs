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

const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: [&str; 2] = ["cpuacct", "cpu"];
/// The most that the kernel takes; a process without a group counts 1024.
const MOST_SHARES: &str = "262144";

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

/// Accounts for the CPU time of this process and what it starts, and puts it before all else that runs
/// on the machine, so that a build beside the test does not count as a late start.
#[derive(Debug)]
pub struct Account {
    usage: Option<Group>,
    _precedence: Option<Group>,
}

impl Account {
    /// Enters control groups `name` of cgroup v1's cpuacct and cpu; where they are not, only the whole
    /// machine is seen and nothing takes precedence.
    #[must_use]
    pub fn open(name: &str) -> Self {
        let open = |controller| match Group::enter(controller, name) {
            Ok(group) => group,
            Err(e) => {
                eprintln!("harness: control group {name} of {controller}: {e:#}");
                None
            }
        };
        let precedence = open("cpu");
        if let Some(group) = &precedence {
            std::fs::write(group.path.join("cpu.shares"), MOST_SHARES).ok();
        }
        Self {
            usage: open("cpuacct"),
            _precedence: precedence,
        }
    }

    /// A look at all counts.
    pub fn look(&self) -> Result<Cpu> {
        let text = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let machine = Machine::parse(&text).context("the first line of /proc/stat")?;
        let own = self.usage.as_ref().and_then(|group| {
            let text = std::fs::read_to_string(group.path.join("cpuacct.usage")).ok()?;
            Some(Duration::from_nanos(text.trim().parse().ok()?))
        });
        Ok(Cpu {
            at: Instant::now(),
            machine,
            own,
        })
    }
}

/// Removes the control groups of a test that is dead, whose processes are.
pub fn remove_leftover(name: &str) {
    for controller in CONTROLLERS {
        std::fs::remove_dir(Path::new(CGROUPS).join(controller).join(name)).ok();
    }
}

/// A control group that this process is in; dropped, the process goes back where it was.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    before: PathBuf,
}

impl Group {
    /// Makes and enters it; nothing where the controller is not mounted.
    fn enter(controller: &str, name: &str) -> Result<Option<Self>> {
        let mounted = Path::new(CGROUPS).join(controller);
        if !mounted.join("cgroup.procs").exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string("/proc/self/cgroup")?;
        let own = own_group(&text, controller).context("no line in /proc/self/cgroup")?;
        let group = Self {
            path: mounted.join(name),
            before: mounted.join(own),
        };
        std::fs::create_dir_all(&group.path)?;
        move_to(&group.path)?;
        Ok(Some(group))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        move_to(&self.before).ok();
        match std::fs::remove_dir(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                eprintln!("harness: remove {}: {e}", self.path.display());
            }
            _ => {}
        }
    }
}

fn move_to(group: &Path) -> std::io::Result<()> {
    std::fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}

/// The group of a process below the controller's mount, by its `/proc/PID/cgroup`.
fn own_group<'a>(text: &'a str, controller: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers
            .split(',')
            .any(|it| it == controller)
            .then_some(path.trim_start_matches('/'))
    })
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
    fn groups_of_a_process() {
        let text = "4:memory:/process/1\n2:cpu,cpuacct:/a/b\n1:cpuset:/\n0::/x\n";
        assert_eq!(own_group(text, "cpu"), Some("a/b"));
        assert_eq!(own_group(text, "cpuset"), Some(""));
        assert_eq!(own_group(text, "pids"), None);
    }

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
