// SPDX-License-Identifier: Apache-2.0
//! The events of one watch: received, looked at, answered.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::own::DaemonProcess;
use crate::mount::errno::FillErrno;
use crate::shim::device::{DeviceRead, OpenDevice};
use crate::shim::reads::ReadRecorder;
use crate::shim::waiting::{PendingRead, Reply, WaitingReads};
use crate::sys::fanotify::{self, Answer, Event, EventSlots};

/// What the answers of a watch need; lives until the last event is answered.
#[derive(Debug)]
pub(super) struct Channel {
    group: OwnedFd,
    pub(super) slots: EventSlots,
    free: Mutex<Vec<u32>>,
}

impl Channel {
    /// Over a group and slots, of which those with an event are not free.
    pub(super) fn new(group: OwnedFd, slots: EventSlots) -> Arc<Channel> {
        let free = (0..slots.count()).filter(|slot| slots.event(*slot).is_none());
        let free = Mutex::new(free.collect());
        Arc::new(Channel { group, slots, free })
    }

    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no event is unanswered.
    pub(super) fn is_quiet(&self) -> bool {
        let count = usize::try_from(self.slots.count()).unwrap_or(usize::MAX);
        self.free().len() == count
    }

    /// The group.
    pub(super) fn group(&self) -> &OwnedFd {
        &self.group
    }
}

/// An event that is not answered yet. Dropped, it is: allowed if no part has failed.
#[derive(Debug)]
struct Ticket {
    channel: Arc<Channel>,
    slot: u32,
    /// Who waits for the answer.
    pid: i32,
    number: RawFd,
    /// Came with the event, or keeps its number.
    descriptor: Option<OwnedFd>,
    failure: Mutex<Option<FillErrno>>,
}

/// The kernel takes only some errors from us, and shows a reader of EROFS mostly EIO.
fn denial(failure: FillErrno) -> Answer {
    match failure {
        FillErrno::NoSpace => Answer::Deny(libc::ENOSPC),
        FillErrno::Deadline | FillErrno::Io | FillErrno::Stale => Answer::Deny(libc::EIO),
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let failure = *self
            .failure
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let answer = failure.map_or(Answer::Allow, denial);
        match fanotify::answer(self.channel.group.as_fd(), self.number, answer) {
            // Who waited was killed meanwhile, or its worker died after it had answered.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => tracing::error!(number = self.number, %error, "answer an event"),
            Ok(()) => {}
        }
        // In this order: see the module's rules.
        self.channel.slots.clear(self.slot);
        drop(self.descriptor.take());
        self.channel.free().push(self.slot);
    }
}

/// What one of the reads that an event waits for is to be answered with. Dropped without an answer it
/// is a failure.
#[derive(Debug)]
pub struct EventReply {
    ticket: Arc<Ticket>,
    answered: bool,
}

impl EventReply {
    fn new(ticket: &Arc<Ticket>) -> EventReply {
        EventReply {
            ticket: Arc::clone(ticket),
            answered: false,
        }
    }

    /// Who waits for the answer.
    pub fn pid(&self) -> i32 {
        self.ticket.pid
    }

    /// The range is present.
    pub fn present(mut self) {
        self.answered = true;
    }

    /// It is not, and will not be in time.
    pub fn failed(mut self, failure: FillErrno) {
        self.fail(failure);
    }

    fn fail(&mut self, failure: FillErrno) {
        self.answered = true;
        let mut known = self
            .ticket
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert(failure);
    }
}

impl Drop for EventReply {
    fn drop(&mut self) {
        if !self.answered {
            self.fail(FillErrno::Io);
        }
    }
}

/// A device of a watch.
#[derive(Debug)]
pub(super) struct Marked {
    pub(super) device: Arc<OpenDevice>,
    /// Whether events of it come.
    marked: AtomicBool,
}

/// The devices of a watch, and what is done with their events.
#[derive(Debug)]
pub(super) struct Devices {
    devices: Vec<Marked>,
    by_file: HashMap<(u64, u64), u16>,
    deadline: Option<Duration>,
    recorder: Option<Arc<ReadRecorder>>,
    waiting: Arc<WaitingReads>,
    daemon: Arc<DaemonProcess>,
}

impl Devices {
    pub(super) fn new(
        devices: Vec<Arc<OpenDevice>>,
        deadline: Option<Duration>,
        recorder: Option<Arc<ReadRecorder>>,
        waiting: Arc<WaitingReads>,
        daemon: Arc<DaemonProcess>,
    ) -> io::Result<Devices> {
        let mut by_file = HashMap::new();
        for (number, device) in (0u16..).zip(&devices) {
            by_file.insert(file_of(device.data())?, number);
        }
        let marked = |device| Marked {
            device,
            marked: AtomicBool::new(false),
        };
        Ok(Devices {
            devices: devices.into_iter().map(marked).collect(),
            by_file,
            deadline,
            recorder,
            waiting,
            daemon,
        })
    }

    /// What is read first, if that is recorded.
    pub(super) fn recorder(&self) -> Option<&Arc<ReadRecorder>> {
        self.recorder.as_ref()
    }

    /// Marks what is not sealed.
    pub(super) fn mark(&self, channel: &Channel) -> io::Result<()> {
        for it in &self.devices {
            if !it.device.is_sealed() {
                fanotify::mark(channel.group.as_fd(), it.device.data())?;
                it.marked.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Takes the marks from what has become sealed; says whether any is left.
    pub(super) fn unmark_sealed(&self, channel: &Channel) -> bool {
        let mut left = false;
        for it in self
            .devices
            .iter()
            .filter(|it| it.marked.load(Ordering::Relaxed))
        {
            if !it.device.is_sealed() {
                left = true;
                continue;
            }
            match fanotify::unmark(channel.group.as_fd(), it.device.data()) {
                Ok(()) => it.marked.store(false, Ordering::Relaxed),
                Err(error) => {
                    left = true;
                    tracing::error!(device = %it.device.key(), %error, "unmark a sealed device");
                }
            }
        }
        left
    }

    /// Takes all events that are there; **errors** of the group mean that none will come any more.
    pub(super) fn receive(&self, channel: &Arc<Channel>) -> io::Result<()> {
        loop {
            let (slot, last) = {
                let mut free = channel.free();
                // None: the one who is asked at the moment gives it back in a moment.
                let Some(slot) = free.pop() else {
                    drop(free);
                    std::thread::sleep(Duration::from_millis(1));
                    return Ok(());
                };
                (slot, free.is_empty())
            };
            match channel.slots.receive(channel.group.as_fd(), slot) {
                Ok(true) => {
                    let descriptor = channel.slots.take(slot);
                    self.begin(channel, slot, descriptor, last);
                }
                Ok(false) => {
                    channel.free().push(slot);
                    return Ok(());
                }
                Err(error) => {
                    channel.free().push(slot);
                    return Err(error);
                }
            }
        }
    }

    /// Goes on with an event that a dead worker left in a slot, its number occupied by `descriptor`.
    pub(super) fn resume(&self, channel: &Arc<Channel>, slot: u32, descriptor: Option<OwnedFd>) {
        self.begin(channel, slot, descriptor, false);
    }

    fn begin(&self, channel: &Arc<Channel>, slot: u32, descriptor: Option<OwnedFd>, last: bool) {
        let Some(event) = channel.slots.event(slot) else {
            channel.free().push(slot);
            return;
        };
        let ours = descriptor.as_ref().and_then(|fd| self.device_of(fd));
        let device = event.device.or(ours);
        if let Some(device) = device {
            channel.slots.note_device(slot, device);
        }
        let ticket = Arc::new(Ticket {
            channel: Arc::clone(channel),
            slot,
            pid: event.pid,
            number: event.number,
            descriptor,
            failure: Mutex::default(),
        });
        self.look(&ticket, &event, device, last);
    }

    fn device_of(&self, fd: &OwnedFd) -> Option<u16> {
        let stat = nix::sys::stat::fstat(fd).ok()?;
        self.by_file.get(&(stat.st_dev, stat.st_ino)).copied()
    }

    fn look(&self, ticket: &Arc<Ticket>, event: &Event, device: Option<u16>, last: bool) {
        if !event.asks {
            tracing::error!(?event, "an event that nobody asked for");
            return EventReply::new(ticket).failed(FillErrno::Io);
        }
        if self.daemon.is_ours(event.pid) {
            return EventReply::new(ticket).present();
        }
        let numbers = match device {
            Some(number) => usize::from(number)..usize::from(number) + 1,
            // Its worker died in between. When the range is present everywhere, it is so where it counts.
            None => 0..self.devices.len(),
        };
        for number in numbers {
            self.look_at(ticket, event, number, last);
        }
        // A daemon that connected meanwhile may have looked at what waits before this event did.
        if self.daemon.is_ours(event.pid) {
            self.waiting.release(|pid| pid == event.pid);
        }
    }

    /// One device's part of an event.
    fn look_at(&self, ticket: &Arc<Ticket>, event: &Event, number: usize, last: bool) {
        let reply = EventReply::new(ticket);
        let Some(it) = self.devices.get(number) else {
            return reply.failed(FillErrno::Io);
        };
        let device = &it.device;
        // The kernel names whole pages, also beyond the end.
        let end = event
            .offset
            .saturating_add(event.length)
            .min(device.device_bytes());
        let bytes = end.saturating_sub(event.offset);
        let Some(length) = usize::try_from(bytes).ok().filter(|length| *length > 0) else {
            return reply.present();
        };
        if let Some(recorder) = &self.recorder {
            recorder.note(number, device, event.offset, length);
        }
        match device.look(event.offset, length) {
            DeviceRead::Done => reply.present(),
            DeviceRead::Failed(failure) => reply.failed(failure),
            DeviceRead::Missing if last => {
                tracing::error!(device = %device.key(), "too many readers wait: one fails");
                reply.failed(FillErrno::Io);
            }
            DeviceRead::Missing => {
                let deadline = self.deadline.and_then(|it| Instant::now().checked_add(it));
                let (device, reply) = (Arc::clone(device), Reply::Event(reply));
                let read = PendingRead::new(device, event.offset, length, deadline, reply);
                self.waiting.enter(read);
            }
        }
    }
}

fn file_of(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
