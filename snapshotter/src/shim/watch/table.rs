// SPDX-License-Identifier: Apache-2.0
//! The watches of a worker: made, taken over, ended.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice_proto::shim as wire;

use super::events::{Channel, Devices};
use super::own::DaemonProcess;
use crate::mount::{FirstReads, MountSpec, UnmountOutcome};
use crate::shim::device::OpenDevices;
use crate::shim::keeper::Keeper;
use crate::shim::reads::ReadRecorder;
use crate::shim::record::{Record, RecordState};
use crate::shim::waiting::WaitingReads;
use crate::sys::fanotify::{self, EventSlots};
use crate::sys::lease;

/// Begins the names of watches with the holder: no mount's name has a slash.
pub const WATCH_PREFIX: &str = "watch/";

/// Events of one watch that may be unanswered at a time: each is a process that reads what is not
/// here yet. 64 KiB of memory; whoever comes on top gets an error.
const SLOTS: u32 = 1024;

/// How often it is looked whether devices have become sealed, or the file system is gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(1000);

/// Pause before a watch is tried again that could not be taken over. Its readers wait meanwhile, and
/// there is nothing better: without a watch they would read zeros.
const TAKE_OVER_PAUSE: Duration = Duration::from_millis(500);

/// One watch.
#[derive(Debug)]
struct Watch {
    spec: MountSpec,
    entry: String,
    record: Record,
    channel: Arc<Channel>,
    devices: Devices,
    leaving: AtomicBool,
    over: AtomicBool,
}

impl Watch {
    fn watched(&self) -> wire::Watched {
        wire::Watched {
            key: self.spec.key.clone(),
            entry: self.entry.clone(),
        }
    }

    /// Whether no event of it will ever come again.
    fn is_done(&self) -> bool {
        if !self.devices.unmark_sealed(&self.channel) {
            return self.channel.is_quiet();
        }
        if !self.leaving.load(Ordering::Acquire) {
            return false;
        }
        match lease::is_open_elsewhere(&self.spec.tree) {
            Ok(open) => !open,
            // A tree that was deleted is perhaps still mounted somewhere: until all is sealed it is watched.
            Err(error) => {
                tracing::debug!(key = self.spec.key, %error, "look who has the tree open");
                false
            }
        }
    }
}

/// All watches of this process.
#[derive(Debug)]
pub struct Watches {
    keeper: Arc<Keeper>,
    open: Arc<OpenDevices>,
    waiting: Arc<WaitingReads>,
    daemon: Arc<DaemonProcess>,
    /// By entry.
    table: Mutex<HashMap<String, Arc<Watch>>>,
    next_entry: AtomicU64,
}

/// What a dead worker left of a watch.
#[derive(Debug)]
struct Left {
    entry: String,
    fds: Vec<OwnedFd>,
}

impl Watches {
    /// None yet.
    pub fn new(
        keeper: Arc<Keeper>,
        open: Arc<OpenDevices>,
        waiting: Arc<WaitingReads>,
    ) -> Arc<Watches> {
        Arc::new(Watches {
            keeper,
            open,
            waiting,
            daemon: Arc::default(),
            table: Mutex::default(),
            next_entry: AtomicU64::new(1),
        })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Watch>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who the daemon is.
    pub fn daemon(&self) -> &DaemonProcess {
        &self.daemon
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.table().is_empty()
    }

    /// All of them.
    pub fn list(&self) -> Vec<wire::Watched> {
        self.table().values().map(|watch| watch.watched()).collect()
    }

    fn serving(&self, key: &str) -> Option<Arc<Watch>> {
        let table = self.table();
        let mut watches = table.values();
        watches
            .find(|watch| watch.spec.key == key && !watch.leaving.load(Ordering::Acquire))
            .cloned()
    }

    /// Watches the devices of a run; when it returns, whoever opens them is asked about. The same again
    /// is fine.
    pub fn watch(self: &Arc<Self>, spec: MountSpec) -> io::Result<wire::Watched> {
        if let Some(watch) = self.serving(&spec.key) {
            if watch.spec.devices != spec.devices || watch.spec.tree != spec.tree {
                return Err(io::Error::other("watched already, of other parts"));
            }
            return Ok(watch.watched());
        }
        let number = self.next_entry.fetch_add(1, Ordering::Relaxed);
        let entry = format!("{WATCH_PREFIX}{}#{}.{number}", spec.key, std::process::id());
        let channel = Channel::new(fanotify::group()?, EventSlots::create(SLOTS)?);
        let payload = wire::MountRecord {
            mount: Some((&spec).into()),
            connection: 0,
        };
        let record = Record::create(&payload)?;
        record.set_state(RecordState::Serving)?;
        let recorded = spec.record;
        let watch = Arc::new(Watch {
            devices: self.devices(&spec, recorded)?,
            entry,
            record,
            channel,
            leaving: AtomicBool::new(false),
            over: AtomicBool::new(false),
            spec,
        });
        let channel = &watch.channel;
        let fds = [
            channel.group().as_fd(),
            channel.slots.as_fd(),
            watch.record.as_fd(),
        ];
        // Before a device is marked: from then on somebody may wait for an answer.
        self.keeper.keep(&watch.entry, &fds)?;
        let started = watch
            .devices
            .mark(channel)
            .and_then(|()| self.serve(&watch));
        if let Err(error) = started {
            self.keeper.forget(&watch.entry);
            return Err(error);
        }
        tracing::info!(key = watch.spec.key, "watch");
        Ok(watch.watched())
    }

    fn devices(&self, spec: &MountSpec, recorded: Option<Duration>) -> io::Result<Devices> {
        let open = spec.devices.iter().map(|device| self.open.get(device));
        let devices = open.collect::<io::Result<Vec<_>>>()?;
        let counts = devices.iter().map(|device| device.chunk_count());
        let recorder = recorded.map(|window| Arc::new(ReadRecorder::new(window, counts)));
        let (waiting, daemon) = (Arc::clone(&self.waiting), Arc::clone(&self.daemon));
        Devices::new(devices, spec.read_deadline, recorder, waiting, daemon)
    }

    fn serve(self: &Arc<Self>, watch: &Arc<Watch>) -> io::Result<()> {
        self.table().insert(watch.entry.clone(), Arc::clone(watch));
        let (watches, serving) = (Arc::clone(self), Arc::clone(watch));
        let started = crate::shim::worker::thread("watch", move || watches.run(&serving));
        if started.is_err() {
            self.table().remove(&watch.entry);
        }
        started
    }

    fn run(&self, watch: &Watch) {
        let mut looked = Instant::now();
        let wait = PollTimeout::try_from(LOOK_INTERVAL).unwrap_or(PollTimeout::ZERO);
        while !watch.over.load(Ordering::Acquire) {
            let mut polls = [PollFd::new(
                watch.channel.group().as_fd(),
                PollFlags::POLLIN,
            )];
            let _interrupted = poll(&mut polls, wait);
            if let Err(error) = watch.devices.receive(&watch.channel) {
                tracing::error!(key = watch.spec.key, %error, "read events");
                std::thread::sleep(TAKE_OVER_PAUSE);
            }
            if looked.elapsed() >= LOOK_INTERVAL {
                looked = Instant::now();
                if watch.is_done() {
                    self.end(watch);
                }
            }
        }
    }

    fn end(&self, watch: &Watch) {
        if !watch.over.swap(true, Ordering::AcqRel) {
            tracing::info!(key = watch.spec.key, "nothing is left to watch");
            self.table().remove(&watch.entry);
            self.keeper.forget(&watch.entry);
        }
    }

    /// The mount of a run is gone from its place; says whether something still uses the file system.
    pub fn unwatch(&self, key: &str) -> UnmountOutcome {
        let watches: Vec<Arc<Watch>> = {
            let table = self.table();
            let same = table.values().filter(|watch| watch.spec.key == key);
            same.cloned().collect()
        };
        let mut outcome = UnmountOutcome::Done;
        for watch in watches {
            watch.leaving.store(true, Ordering::Release);
            if let Err(error) = watch.record.set_state(RecordState::Leaving) {
                tracing::error!(key, %error, "note that a watch is leaving");
            }
            if watch.is_done() {
                self.end(&watch);
            } else {
                outcome = UnmountOutcome::Busy;
            }
        }
        outcome
    }

    /// The next first reads of a run.
    pub fn first_reads(&self, key: &str, from: u32, forget: bool) -> FirstReads {
        let recorded = self
            .serving(key)
            .and_then(|watch| Some((watch.devices.recorder()?.clone(), watch)));
        let Some((recorder, watch)) = recorded else {
            return FirstReads::default();
        };
        FirstReads {
            recording: watch.entry.clone(),
            ..recorder.page(from, forget)
        }
    }

    /// Goes on with what the holder kept, and with the events whose numbers were [`reserve`]d.
    pub fn inherit(
        self: &Arc<Self>,
        entry: String,
        fds: Vec<OwnedFd>,
        reserved: &mut HashMap<RawFd, OwnedFd>,
    ) {
        let left = Left { entry, fds };
        let mut ours = HashMap::new();
        for number in left.numbers() {
            if let Some(descriptor) = reserved.remove(&number) {
                ours.insert(number, descriptor);
            }
        }
        if let Err(error) = self.take_over(&left, &mut ours) {
            tracing::error!(entry = left.entry, %error, "take over a watch");
            let watches = Arc::clone(self);
            let name = left.entry.clone();
            let trying = move || watches.keep_trying(&left, ours);
            if let Err(error) = crate::shim::worker::thread("take-over", trying) {
                tracing::error!(entry = name, %error, "start a take-over");
            }
        }
    }

    fn keep_trying(self: &Arc<Self>, left: &Left, mut reserved: HashMap<RawFd, OwnedFd>) {
        loop {
            std::thread::sleep(TAKE_OVER_PAUSE);
            match self.take_over(left, &mut reserved) {
                Ok(()) => return,
                Err(error) => tracing::error!(entry = left.entry, %error, "take over a watch"),
            }
        }
    }

    fn take_over(
        self: &Arc<Self>,
        left: &Left,
        reserved: &mut HashMap<RawFd, OwnedFd>,
    ) -> io::Result<()> {
        let begun = Instant::now();
        let [group, slots, record] = left.duplicates()?;
        let (record, state, payload) = Record::open(record)?;
        let mount = payload
            .mount
            .ok_or(io::Error::other("a record without a mount"))?;
        let spec = MountSpec::try_from(mount).map_err(io::Error::other)?;
        let channel = Channel::new(group, EventSlots::open(slots)?);
        let watch = Arc::new(Watch {
            devices: self.devices(&spec, None)?,
            entry: left.entry.clone(),
            record,
            channel,
            leaving: AtomicBool::new(state == RecordState::Leaving),
            over: AtomicBool::new(false),
            spec,
        });
        watch.devices.mark(&watch.channel)?;
        // Before new ones come.
        let slots = 0..watch.channel.slots.count();
        let old = slots.filter_map(|slot| Some((slot, watch.channel.slots.event(slot)?.number)));
        let old: Vec<(u32, RawFd)> = old.collect();
        self.serve(&watch)?;
        let events = old.len();
        for (slot, number) in old {
            let descriptor = reserved.remove(&number);
            watch.devices.resume(&watch.channel, slot, descriptor);
        }
        tracing::info!(key = watch.spec.key, events, took = ?begun.elapsed(), "watch taken over");
        Ok(())
    }
}

impl Left {
    fn duplicates(&self) -> io::Result<[OwnedFd; 3]> {
        let copies = self.fds.iter().map(OwnedFd::try_clone);
        let copies = copies.collect::<io::Result<Vec<_>>>()?;
        let wrong = |_| io::Error::new(io::ErrorKind::InvalidData, "descriptors are missing");
        copies.try_into().map_err(wrong)
    }

    fn numbers(&self) -> Vec<RawFd> {
        match self
            .duplicates()
            .and_then(|[_, slots, _]| EventSlots::open(slots))
        {
            Ok(slots) => slots.numbers(),
            Err(error) => {
                tracing::error!(entry = self.entry, %error, "read what a dead worker left");
                Vec::new()
            }
        }
    }
}

/// Occupies the numbers of all events that a dead worker left unanswered, so that no descriptor of ours
/// and no new event gets one. To be called before anything else is opened, by the only thread.
pub fn reserve(entries: &BTreeMap<String, Vec<OwnedFd>>) -> HashMap<RawFd, OwnedFd> {
    let mut reserved = HashMap::new();
    for (entry, fds) in entries
        .iter()
        .filter(|(name, _)| name.starts_with(WATCH_PREFIX))
    {
        let copies = fds
            .iter()
            .map(OwnedFd::try_clone)
            .collect::<io::Result<Vec<_>>>();
        let left = match copies {
            Ok(fds) => Left {
                entry: entry.clone(),
                fds,
            },
            Err(error) => {
                tracing::error!(entry, %error, "look at what a dead worker left");
                continue;
            }
        };
        for number in left.numbers() {
            match fanotify::occupy(number) {
                Ok(Some(descriptor)) => {
                    reserved.insert(number, descriptor);
                }
                // Something of ours that was open before us has it for good.
                Ok(None) => tracing::debug!(number, "the number of an event is taken"),
                Err(error) => tracing::error!(number, %error, "occupy the number of an event"),
            }
        }
    }
    reserved
}
