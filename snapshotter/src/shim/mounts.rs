// SPDX-License-Identifier: Apache-2.0
//! The mounts of a worker: making, taking over, taking away.
//!
//! Operations of the daemon run one after another on one thread; each is local and short. What a
//! session's end does (forget the descriptors) runs on the session's own thread.
//!
//! **Locks** `table`, for map operations only.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::keeper::Keeper;
use super::record::RecordState;
use super::session::{self, KIND, Left, Ready, Served, Serving};
use crate::mount::{MountSpec, UnmountMode, UnmountOutcome};
use crate::sys::mountpoint::{self, Unmounted};

/// How long an unmount waits for the connection to end. It ends at once when nothing holds the file
/// system; a container that still does may do so for days.
const END_WAIT: Duration = Duration::from_millis(300);

/// Pause before a take-over is tried again.
const TAKE_OVER_PAUSE: Duration = Duration::from_millis(500);

/// How long take-over of a mount is tried. Its readers wait all that time.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(300);

/// All mounts of this process.
#[derive(Debug)]
pub struct Mounts {
    keeper: Arc<Keeper>,
    serving: Serving,
    table: Mutex<Table>,
    next_entry: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    /// Mounted, by key.
    serving: HashMap<String, Arc<Served>>,
    /// Unmounted and still used, by entry.
    leaving: HashMap<String, Arc<Served>>,
}

impl Mounts {
    /// None yet.
    pub fn new(keeper: Arc<Keeper>, serving: Serving) -> Arc<Mounts> {
        let (table, next_entry) = (Mutex::default(), AtomicU64::new(1));
        Arc::new(Mounts {
            keeper,
            serving,
            table,
            next_entry,
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is mounted.
    pub fn specs(&self) -> Vec<MountSpec> {
        self.table()
            .serving
            .values()
            .map(|served| served.spec.clone())
            .collect()
    }

    /// Whether nothing is served, not even what is only leaving.
    pub fn is_empty(&self) -> bool {
        let table = self.table();
        table.serving.is_empty() && table.leaving.is_empty()
    }

    /// Makes a mount. The same one again is fine.
    pub fn mount(self: &Arc<Mounts>, mut spec: MountSpec) -> io::Result<()> {
        spec.mountpoint = resolve(&spec.mountpoint)?;
        if let Some(served) = self.table().serving.get(&spec.key) {
            // The read deadline may change with the daemon's configuration; it applies to new
            // mounts, and is no reason to refuse.
            let ours = MountSpec {
                read_deadline: spec.read_deadline,
                ..served.spec.clone()
            };
            return match ours == spec {
                true => Ok(()),
                false => Err(io::Error::other(
                    "mounted already, of other parts or elsewhere",
                )),
            };
        }
        self.clear(&spec)?;
        let number = self.next_entry.fetch_add(1, Ordering::Relaxed);
        let entry = format!("{}#{}.{number}", spec.key, std::process::id());
        let keep = |fds: &[std::os::fd::BorrowedFd<'_>]| self.keeper.keep(&entry, fds);
        match session::make(spec, entry.clone(), &self.serving, keep) {
            Ok(ready) => self.serve(ready),
            Err(error) => {
                self.keeper.forget(&entry);
                Err(error)
            }
        }
    }

    /// Removes what dead shims left at the mountpoint; anything else there is an error.
    fn clear(&self, spec: &MountSpec) -> io::Result<()> {
        while let Some(line) = mountpoint::mount_at(&spec.mountpoint)? {
            let ours = self
                .table()
                .serving
                .values()
                .any(|s| s.connection == line.device.1);
            if line.kind != KIND || ours {
                return Err(io::Error::other(format!("{} is mounted there", line.kind)));
            }
            tracing::warn!(
                key = spec.key,
                connection = line.device.1,
                "remove a dead mount"
            );
            mountpoint::detach(&spec.mountpoint, true)?;
        }
        Ok(())
    }

    fn serve(self: &Arc<Mounts>, ready: Ready) -> io::Result<()> {
        let served = ready.served.clone();
        self.table()
            .serving
            .insert(served.spec.key.clone(), served.clone());
        let mounts = self.clone();
        let run = ready.run(move |served| mounts.ended(served));
        if let Err(error) = &run {
            tracing::error!(key = served.spec.key, %error, "start a session");
            let _gone = mountpoint::detach(&served.spec.mountpoint, true);
            self.ended(&served);
        }
        run
    }

    /// A connection has ended: unmounted for good, or aborted from outside.
    fn ended(&self, served: &Arc<Served>) {
        let aborted = {
            let mut table = self.table();
            table.leaving.remove(&served.entry);
            let ours = table
                .serving
                .get(&served.spec.key)
                .is_some_and(|s| s.entry == served.entry);
            if ours {
                table.serving.remove(&served.spec.key);
            }
            ours
        };
        self.keeper.forget(&served.entry);
        if !aborted {
            return;
        }
        // Unless an unmount is just under way, a dead mount would be left in the way.
        let at = mountpoint::mount_at(&served.spec.mountpoint);
        if let Ok(Some(line)) = at
            && line.kind == KIND
            && line.device.1 == served.connection
        {
            tracing::error!(key = served.spec.key, "connection aborted, mount removed");
            let _gone = mountpoint::detach(&served.spec.mountpoint, true);
        }
    }

    /// Takes a mount away.
    pub fn unmount(&self, key: &str, mode: UnmountMode) -> io::Result<UnmountOutcome> {
        let serving = self.table().serving.get(key).cloned();
        if let Some(served) = serving {
            let detach = mode == UnmountMode::Detach;
            match mountpoint::detach(&served.spec.mountpoint, detach)? {
                Unmounted::Busy => return Ok(UnmountOutcome::Busy),
                Unmounted::Done | Unmounted::Absent => {}
            }
            if !served.wait_end(END_WAIT) {
                served.record.set_state(RecordState::Leaving)?;
                let mut table = self.table();
                table.serving.remove(key);
                table.leaving.insert(served.entry.clone(), served.clone());
            }
            if served.wait_end(Duration::ZERO) {
                // It may have ended before it was in the table of those that leave.
                self.table().leaving.remove(&served.entry);
            }
        }
        let table = self.table();
        let mut leaving = table.leaving.values();
        Ok(match leaving.any(|served| served.spec.key == key) {
            true => UnmountOutcome::Busy,
            false => UnmountOutcome::Done,
        })
    }

    /// Goes on with what the holder kept.
    pub fn inherit(self: &Arc<Mounts>, entry: String, fds: Vec<std::os::fd::OwnedFd>) {
        let left = match Left::read(entry.clone(), fds) {
            Ok(left) => left,
            Err(error) => {
                // Its worker died while it wrote it: nobody uses it. Closing the descriptors ends
                // the connection if there is one.
                tracing::error!(entry, %error, "forget what cannot be read");
                self.keeper.forget(&entry);
                return;
            }
        };
        if left.state == RecordState::Prepared {
            if let Err(error) = left.take_down() {
                tracing::error!(entry, %error, "take down an unfinished mount");
            }
            self.keeper.forget(&entry);
            return;
        }
        if let Some(left) = self.take_over(left) {
            // Readers of other mounts must not wait for this one.
            let mounts = self.clone();
            let started = super::worker::thread("take-over", move || mounts.keep_trying(left));
            if let Err(error) = started {
                tracing::error!(entry, %error, "start a take-over");
            }
        }
    }

    /// Gives back what could not be taken over.
    fn take_over(self: &Arc<Mounts>, left: Left) -> Option<Left> {
        let state = left.state;
        match left.take_over(&self.serving) {
            Ok(ready) if state == RecordState::Leaving => {
                let served = ready.served.clone();
                self.table()
                    .leaving
                    .insert(served.entry.clone(), served.clone());
                let mounts = self.clone();
                if let Err(error) = ready.run(move |served| mounts.ended(served)) {
                    tracing::error!(key = served.spec.key, %error, "start a session");
                }
                None
            }
            Ok(ready) => {
                let _logged = self.serve(ready);
                None
            }
            Err((left, error)) => {
                tracing::error!(key = left.spec.key, %error, "take over a mount");
                Some(*left)
            }
        }
    }

    fn keep_trying(self: Arc<Mounts>, mut left: Left) {
        let begun = Instant::now();
        while begun.elapsed() < TAKE_OVER_LIMIT {
            std::thread::sleep(TAKE_OVER_PAUSE);
            match self.take_over(left) {
                None => return,
                Some(again) => left = again,
            }
        }
        tracing::error!(
            key = left.spec.key,
            "give a mount up: its readers get an error"
        );
        let _gone = mountpoint::detach(&left.spec.mountpoint, true);
        self.keeper.forget(&left.entry);
    }
}

/// The mountpoint without symbolic links, as the mount table will show it. The last component is not
/// looked at: a dead mount may be there.
fn resolve(mountpoint: &std::path::Path) -> io::Result<PathBuf> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "not a mountpoint");
    let parent = mountpoint.parent().ok_or_else(invalid)?;
    let name = mountpoint.file_name().ok_or_else(invalid)?;
    Ok(parent.canonicalize()?.join(name))
}
