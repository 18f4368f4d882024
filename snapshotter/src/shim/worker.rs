// SPDX-License-Identifier: Apache-2.0
//! The worker: serves all mounts. It opens no file on any mount of its own, ever: it would wait for
//! itself.

use std::io;
use std::path::Path;
use std::sync::Arc;

use sluice_fetcher::steps::{Steps, Watchdog};

use super::device::OpenDevices;
use super::holder::LOCK_ENTRY;
use super::keeper::{Inheritance, Keeper};
use super::link::Link;
use super::mounts::Mounts;
use super::session::Serving;
use super::waiting::WaitingReads;
use super::watch::{self, WATCH_PREFIX, Watches};
use crate::sys::privileges::{self, Kept};
use crate::sys::process;

/// Stack of our threads. They recurse nowhere; what logging needs fits many times.
const STACK_BYTES: usize = 256 * 1024;

/// Starts a named thread that ends with the process or on its own.
pub(super) fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES);
    builder.spawn(body).map(drop)
}

/// Whether the kernel can hand out requests again that a dead server had read: from Linux 6.9.
fn kernel_resends() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.is_ok_and(|release| resends(&release))
}

/// Whether the requests of this mount are kept: its third descriptor is their journal.
fn is_journaled(name: &str, fds: &[std::os::fd::OwnedFd]) -> bool {
    !name.starts_with(WATCH_PREFIX) && fds.len() > 2
}

fn resends(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|text| text.parse::<u32>().ok());
    let version = (number(), number());
    matches!(version, (Some(major), Some(minor)) if (major, minor) >= (6, 9))
}

/// Runs the worker whose holder is at the other end of standard input.
///
/// Returns only when it cannot start; its holder then tries again.
///
/// `journal`: keep the requests of new mounts in memory that outlives it also where the kernel could hand them
/// out again.
pub fn run(run_dir: &Path, journal: bool) -> io::Result<std::convert::Infallible> {
    process::keep_memory_small(process::WORKER_ALLOCATOR);
    process::spare_from_oom();
    if let Err(error) = process::raise_open_files() {
        tracing::warn!(%error, "raise the limit of open files");
    }
    let (keeper, inheritance) = Keeper::inherit(run_dir, journal)?;
    let Inheritance {
        entries,
        holder_pid,
    } = inheritance;
    let mut reserved = watch::reserve(&entries);
    let journaled = journal || !kernel_resends();
    let kept = match journaled || entries.iter().any(|(name, fds)| is_journaled(name, fds)) {
        true => Kept::JournaledMounts,
        false => Kept::Mounts,
    };
    if let Err(error) = privileges::keep_only(kept) {
        tracing::warn!(%error, ?kept, "give up privileges");
    }
    tracing::info!(
        entries = entries.len(),
        holder = holder_pid,
        "worker starts"
    );
    let steps = Steps::new();
    // Lives as long as the process, and is not stopped by what hangs.
    let _watchdog = Watchdog::start(steps.clone())?;
    let keeper = Arc::new(keeper.watched_by(steps.clone()));
    let watching = keeper.clone();
    thread("holder", move || watching.replace_dead_holders())?;
    let waiting = WaitingReads::start(steps)?;
    let devices = Arc::new(OpenDevices::default());
    let watches = Watches::new(keeper.clone(), devices.clone(), waiting.clone());
    let serving = Serving {
        devices,
        waiting: waiting.clone(),
        journaled,
    };
    let mounts = Mounts::new(keeper.clone(), serving);
    for (entry, fds) in entries {
        if entry.starts_with(WATCH_PREFIX) {
            watches.inherit(entry, fds, &mut reserved);
        } else if entry != LOCK_ENTRY {
            mounts.inherit(entry, fds);
        }
    }
    Link::new(run_dir, keeper, mounts, watches, waiting)?.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_resend_are_told_by_their_release() {
        for (release, expected) in [
            ("6.9.0\n", true),
            ("6.10-rc1", true),
            ("6.18.44+deb13", true),
            ("7.0.0", true),
            ("6.8.12-generic", false),
            ("5.14.0-503.el9", false),
            ("6", false),
            ("", false),
            ("x.y", false),
        ] {
            assert_eq!(resends(release), expected, "{release:?}");
        }
    }
}
