// SPDX-License-Identifier: Apache-2.0
//! Ends the processes of a set-up's containers, also when containerd cannot be asked any more.

use std::path::PathBuf;

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
        // Each shim of containerd leads its own process group and writes its pid into its bundle.
        let Ok(namespaces) = std::fs::read_dir(self.state.join("io.containerd.runtime.v2.task"))
        else {
            return;
        };
        for bundle in namespaces
            .flatten()
            .filter_map(|n| std::fs::read_dir(n.path()).ok())
            .flatten()
            .flatten()
        {
            for file in ["init.pid", "shim.pid"] {
                let text = std::fs::read_to_string(bundle.path().join(file)).unwrap_or_default();
                if let Some(pid) = text.trim().parse().ok().filter(|p| *p > 1) {
                    kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
                }
            }
        }
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.kill();
    }
}
