// SPDX-License-Identifier: Apache-2.0
//! The last bound in time: a set-up that is not over by its deadline loses its processes and mounts,
//! so that every wait in it ends with an error; if even that does not help, the test process ends.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::harness::{mounts, network};

/// For clearing up after the deadline.
const GRACE: Duration = Duration::from_secs(60);

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches over the files below `root` and the namespaces that begin with `prefix`.
    #[must_use]
    pub fn start(deadline: Duration, root: &Path, prefix: &str) -> Self {
        let (done, watched) = channel::<()>();
        let (root, prefix): (PathBuf, String) = (root.to_owned(), prefix.to_owned());
        let thread = std::thread::spawn(move || {
            let over = |time| !matches!(watched.recv_timeout(time), Err(RecvTimeoutError::Timeout));
            if over(deadline) {
                return;
            }
            eprintln!("harness: the cluster still stands after {deadline:?}: it is taken down");
            let clear = || {
                network::named(&prefix)
                    .iter()
                    .for_each(|name| network::end_processes(name));
                mounts::abort_fuse(&root);
            };
            clear();
            if over(GRACE) {
                return;
            }
            clear();
            mounts::unmount_all(&root);
            network::named(&prefix)
                .iter()
                .for_each(|name| network::remove(name));
            eprintln!("harness: the test hangs: its process ends");
            std::process::exit(101);
        });
        Self {
            done: Some(done),
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.done.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
