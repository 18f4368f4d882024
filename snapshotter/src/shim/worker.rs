// SPDX-License-Identifier: Apache-2.0
//! The worker: serves all mounts. It opens no file on any mount of its own, ever: it would wait for
//! itself.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::device::OpenDevices;
use super::holder::LOCK_ENTRY;
use super::keeper::{Inheritance, Keeper};
use super::link::Link;
use super::mounts::Mounts;
use super::session::Serving;
use super::waiting::WaitingReads;
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

/// Runs the worker whose holder is at the other end of standard input.
///
/// Returns only when it cannot start; its holder then tries again.
pub fn run(run_dir: &Path) -> io::Result<std::convert::Infallible> {
    process::keep_allocator_small();
    process::spare_from_oom();
    if let Err(error) = process::raise_open_files() {
        tracing::warn!(%error, "raise the limit of open files");
    }
    let (keeper, inheritance) = Keeper::inherit(run_dir)?;
    let Inheritance {
        entries,
        holder_pid,
    } = inheritance;
    tracing::info!(
        entries = entries.len(),
        holder = holder_pid,
        "worker starts"
    );
    let keeper = Arc::new(keeper);
    let watching = keeper.clone();
    thread("holder", move || watching.replace_dead_holders())?;
    let waiting = WaitingReads::start()?;
    let serving = Serving {
        devices: OpenDevices::default(),
        waiting: waiting.clone(),
    };
    let mounts = Mounts::new(keeper.clone(), serving);
    for (entry, fds) in entries {
        if entry != LOCK_ENTRY {
            mounts.inherit(entry, fds);
        }
    }
    Link::new(run_dir, keeper, mounts, waiting)?.run()
}
