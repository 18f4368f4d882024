// SPDX-License-Identifier: Apache-2.0
//! Ends the processes of a set-up's containers, also when containerd cannot be asked any more.

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::root::Root;

/// What must be known to end containers when a test fails half-way; dropped, it ends them.
#[derive(Debug)]
pub struct Containers {
    state: PathBuf,
}

impl Containers {
    /// Those of the containerd that [`super::containerd::Containerd::start`] starts below `root`.
    #[must_use]
    pub fn of(root: &Root) -> Self {
        Self {
            state: root.path().join("c"),
        }
    }

    /// Ends all their processes at once, as a power cut would.
    pub fn kill(&self) {
        let bundles = self.state.join("io.containerd.runtime.v2.task");
        let mut pids: Vec<Pid> = files_of_pids(&bundles).collect();
        pids.extend(shims(&bundles));
        for pid in pids {
            kill(pid, Signal::SIGKILL).ok();
        }
    }
}

/// What shims of containerd 1 write into the bundles, and what runc does.
fn files_of_pids(bundles: &Path) -> impl Iterator<Item = Pid> {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let bundles: Vec<PathBuf> = entries(bundles)
        .flat_map(|namespace| entries(&namespace.path()))
        .map(|bundle| bundle.path())
        .collect();
    bundles.into_iter().flat_map(|bundle| {
        ["init.pid", "shim.pid"]
            .into_iter()
            .filter_map(move |name| {
                let text = std::fs::read_to_string(bundle.join(name)).ok()?;
                let pid = text.trim().parse().ok().filter(|pid| *pid > 1)?;
                Some(Pid::from_raw(pid))
            })
    })
}

/// Shims work in their bundle; those of containerd 2 write their process ID nowhere.
fn shims(bundles: &Path) -> impl Iterator<Item = Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(move |process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        let name = std::fs::read_to_string(process.path().join("comm")).ok()?;
        let directory = std::fs::read_link(process.path().join("cwd")).ok()?;
        let ours = name.starts_with("containerd-shim") && directory.starts_with(bundles);
        ours.then(|| Pid::from_raw(pid))
    })
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.kill();
    }
}
