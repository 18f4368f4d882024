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

use prost::Message as _;
use sluice_proto::shim as wire;

use super::keeper::Keeper;
use super::record::RecordState;
use super::session::{self, KIND, Left, Ready, Served, Serving};
use crate::mount::{FirstReads, MountSpec, UnmountMode, UnmountOutcome};
use crate::sys::mountpoint::{self, MountLine, Unmounted};

/// How long an unmount waits for the connection to end. It ends at once when nothing holds the file
/// system; a container that still does may do so for days.
const END_WAIT: Duration = Duration::from_millis(300);

/// Pause before a take-over is tried again.
const TAKE_OVER_PAUSE: Duration = Duration::from_millis(500);

/// How long take-over of a mount is tried. Its readers wait all that time.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(300);

/// Most bytes of mounts in one answer: far below the limit of a message, and 20 images of 40 layers.
const PAGE_BYTES: usize = 256 << 10;

/// Tag and length before a listed mount.
const FIELD_BYTES: usize = 6;

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

    /// How many are mounted.
    pub fn count(&self) -> usize {
        self.table().serving.len()
    }

    /// What is mounted and what is leaving, after the entry with this name, as much as fits.
    pub fn page(&self, after: &str) -> io::Result<wire::ListReply> {
        let lines = mountpoint::mounts()?;
        let table = self.table();
        let serving = table.serving.values().map(|served| (served, false));
        let leaving = table.leaving.values().map(|served| (served, true));
        let mut all: Vec<_> = serving.chain(leaving).collect();
        all.sort_by(|(a, _), (b, _)| a.entry.cmp(&b.entry));
        let rest = all.into_iter().filter(|(served, _)| *served.entry > *after);
        let listed = rest.map(|(served, leaving)| {
            let mount = wire::ListedMount {
                mount: Some((&served.spec).into()),
                leaving: leaving || !is_in_place(served, &lines),
            };
            (served.entry.as_str(), mount)
        });
        Ok(page_of(listed, PAGE_BYTES))
    }

    /// Whether a mount is served where it should be.
    pub fn is_serving(&self, key: &str) -> io::Result<bool> {
        let served = self.table().serving.get(key).cloned();
        Ok(match served {
            Some(served) => is_in_place(&served, &mountpoint::mounts()?),
            None => false,
        })
    }

    /// The next first reads of a mount.
    pub fn first_reads(&self, key: &str, from: u32, forget: bool) -> FirstReads {
        let served = self.table().serving.get(key).cloned();
        let recorded = served.and_then(|served| Some((served.recorder.clone()?, served)));
        let Some((recorder, served)) = recorded else {
            return FirstReads::default();
        };
        FirstReads {
            recording: served.entry.clone(),
            ..recorder.page(from, forget)
        }
    }

    /// Whether nothing is served, not even what is only leaving.
    pub fn is_empty(&self) -> bool {
        let table = self.table();
        table.serving.is_empty() && table.leaving.is_empty()
    }

    /// Makes a mount. The same one again is fine.
    pub fn mount(self: &Arc<Mounts>, mut spec: MountSpec) -> io::Result<()> {
        spec.mountpoint = resolve(&spec.mountpoint)?;
        let served = self.table().serving.get(&spec.key).cloned();
        if let Some(served) = served {
            // The read deadline and what is recorded may change with the daemon's configuration; they
            // apply to new mounts, and are no reason to refuse.
            let ours = MountSpec {
                read_deadline: spec.read_deadline,
                record: spec.record,
                ..served.spec.clone()
            };
            if ours != spec {
                return Err(io::Error::other(
                    "mounted already, of other parts or elsewhere",
                ));
            }
            if is_in_place(&served, &mountpoint::mounts()?) {
                return Ok(());
            }
            // Somebody took it away behind our back, and somebody else still uses it.
            tracing::warn!(key = spec.key, "the mountpoint is bare, mount again");
            self.leave(&served)?;
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
            // First, so that a worker that takes over now does not take it for mounted.
            self.leave(&served)?;
            if served.wait_end(END_WAIT) {
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

    /// From now on the mount is only waited for to end.
    fn leave(&self, served: &Arc<Served>) -> io::Result<()> {
        served.record.set_state(RecordState::Leaving)?;
        let mut table = self.table();
        let key = &served.spec.key;
        if table
            .serving
            .get(key)
            .is_some_and(|s| s.entry == served.entry)
        {
            table.serving.remove(key);
        }
        table.leaving.insert(served.entry.clone(), served.clone());
        drop(table);
        if served.wait_end(Duration::ZERO) {
            // It may have ended before it was in the table of those that leave.
            self.table().leaving.remove(&served.entry);
        }
        Ok(())
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

/// Whether the topmost mount at the mountpoint is this one.
fn is_in_place(served: &Served, lines: &[MountLine]) -> bool {
    let mut lines = lines.iter().rev();
    let top = lines.find(|line| line.mountpoint == served.spec.mountpoint);
    top.is_some_and(|line| line.kind == KIND && line.device.1 == served.connection)
}

/// The first of these, with the name of each, whose messages together are below `limit_bytes`; at
/// least one.
fn page_of<'a>(
    listed: impl Iterator<Item = (&'a str, wire::ListedMount)>,
    limit_bytes: usize,
) -> wire::ListReply {
    let mut reply = wire::ListReply::default();
    let (mut bytes, mut last) = (0, "");
    for (entry, mount) in listed {
        bytes += mount.encoded_len() + FIELD_BYTES;
        if bytes > limit_bytes && !reply.mounts.is_empty() {
            reply.next = last.to_owned();
            break;
        }
        reply.mounts.push(mount);
        last = entry;
    }
    reply
}

/// The mountpoint without symbolic links, as the mount table will show it. The last component is not
/// looked at: a dead mount may be there.
fn resolve(mountpoint: &std::path::Path) -> io::Result<PathBuf> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "not a mountpoint");
    let parent = mountpoint.parent().ok_or_else(invalid)?;
    let name = mountpoint.file_name().ok_or_else(invalid)?;
    Ok(parent.canonicalize()?.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_all_mounts_once_and_stay_small() {
        let mounts: Vec<(String, wire::ListedMount)> = (0..250)
            .map(|number| {
                let mount = wire::Mount {
                    key: format!("{number:03}"),
                    devices: vec![wire::Device::default(); 20],
                    tree: "t".repeat(number * 4),
                    ..Default::default()
                };
                let mount = wire::ListedMount {
                    mount: Some(mount),
                    leaving: number % 2 == 1,
                };
                (format!("entry{number:03}"), mount)
            })
            .collect();
        let limit = 4000;
        for count in [0, 1, mounts.len()] {
            let (mut after, mut seen, mut pages) = (String::new(), Vec::new(), 0);
            loop {
                let rest = mounts[..count].iter().filter(|(entry, _)| *entry > after);
                let listed = rest.map(|(entry, mount)| (entry.as_str(), mount.clone()));
                let reply = page_of(listed, limit);
                assert!(reply.encoded_len() <= limit + 100 && pages <= count);
                pages += 1;
                seen.extend(reply.mounts);
                if reply.next.is_empty() {
                    break;
                }
                after = reply.next;
            }
            assert!(
                seen.iter()
                    .eq(mounts[..count].iter().map(|(_, mount)| mount))
            );
            assert_eq!(pages > 1, count > 1);
        }
        // What is larger than a page comes alone.
        let listed = mounts
            .iter()
            .map(|(entry, mount)| (entry.as_str(), mount.clone()));
        let reply = page_of(listed, 1);
        assert_eq!((reply.mounts.len(), &*reply.next), (1, "entry000"));
    }
}
