// SPDX-License-Identifier: Apache-2.0
//! Reads of missing data: asked of the daemon, awaited beside the serving threads, answered from here.
//!
//! A thread that serves FUSE or events and finds data missing hands the reply over and serves on; so a
//! reader of present data never waits behind one of missing data, however many there are. Three kinds of thread work
//! here: the link (one) reads the daemon's answers and the clock (one) finds expired reads, both of
//! which only move reads to a channel; finishers (a few) read the data and answer the kernel.
//!
//! **Locks** one, around the register, held for map operations and for putting a message into the
//! link's queue.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fuser::{Errno, ReplyData};
use sluice_fetcher::steps::{StepGuard, StepKind, Steps};
use sluice_proto::shim as wire;
use sluice_proto::shim::envelope::Body;

use super::device::{DeviceRead, OpenDevice};
use super::fills::Fills;
use super::given_up::GivenUp;
use super::protocol;
use super::watch::EventReply;
use crate::mount::errno::FillErrno;

/// Threads that finish reads. They copy from the page cache; two keep a slow disk from stopping all.
const FINISHERS: usize = 2;

/// A reader of missing data: a tenth of the default read deadline.
const READER_STEP: StepKind = StepKind::new("reader", Duration::from_secs(30));
/// Reading what is present, and answering the kernel.
const FINISH_STEP: StepKind = StepKind::new("shim read", Duration::from_secs(5));

/// How often a read is asked again when the daemon says "present" and it is not, before it fails.
/// More than once happens only if chunks are taken away between answer and read.
const ATTEMPTS: u32 = 16;

/// Who waits for a read.
#[derive(Debug)]
pub enum Reply {
    /// A reader of a FUSE mount, who gets the bytes.
    Fuse(ReplyData),
    /// A reader of a device, who reads by himself when he may.
    Event(EventReply),
}

impl Reply {
    fn failed(self, failure: FillErrno) {
        match self {
            Reply::Fuse(reply) => reply.error(errno(failure)),
            Reply::Event(reply) => reply.failed(failure),
        }
    }
}

/// A read in flight.
#[derive(Debug)]
pub struct PendingRead {
    /// Where its bytes are.
    pub device: Arc<OpenDevice>,
    /// First byte on the device.
    pub start: u64,
    /// How many.
    pub length: usize,
    /// When it fails; `None`: never.
    pub deadline: Option<Instant>,
    /// Who waits.
    pub reply: Reply,
    attempts: u32,
    /// Stands from the first miss to the answer.
    step: Option<StepGuard>,
}

/// What a finisher is to do.
#[derive(Debug)]
enum Finish {
    /// The daemon says the data is there.
    Present(PendingRead),
    /// The store does not keep the data, which is here.
    Passed(PendingRead, Bytes),
    /// The read fails.
    Failed(PendingRead, FillErrno),
}

/// All reads of missing data of this process.
#[derive(Debug)]
pub struct WaitingReads {
    register: Mutex<Register>,
    /// Wakes the clock when an earlier deadline appears.
    earlier: Condvar,
    finish: Sender<Finish>,
    steps: Steps,
}

#[derive(Debug, Default)]
struct Register {
    fills: Fills<PendingRead>,
    given_up: GivenUp,
    /// Queue of the present link.
    link: Option<Sender<Vec<u8>>>,
}

impl PendingRead {
    fn range(&self) -> Range<u64> {
        let length = u64::try_from(self.length).unwrap_or(u64::MAX);
        self.start..self.start.saturating_add(length)
    }

    /// A read that has just found its data missing.
    pub fn new(
        device: Arc<OpenDevice>,
        start: u64,
        length: usize,
        deadline: Option<Instant>,
        reply: Reply,
    ) -> PendingRead {
        PendingRead {
            device,
            start,
            length,
            deadline,
            reply,
            attempts: 0,
            step: None,
        }
    }

    /// Answers with bytes that the daemon passed.
    fn passed(self, bytes: &[u8]) {
        match self.reply {
            Reply::Fuse(reply) if bytes.len() == self.length => reply.data(bytes),
            reply => {
                tracing::error!(device = %self.device.key(), start = self.start, "the daemon passes bytes that were not asked for");
                reply.failed(FillErrno::Io);
            }
        }
    }

    fn request(&self, id: u64, now: Instant) -> Vec<u8> {
        let key = self.device.key();
        let range = self.range();
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now));
        protocol::frame(
            id,
            Body::Fill(wire::Fill {
                diff_id: key.diff_id.to_string(),
                index_digest: key.index.to_string(),
                start: range.start,
                end: range.end,
                deadline_ms: protocol::deadline_to_wire(left),
                // Who waits for an event reads from the store by himself.
                takes_bytes: matches!(self.reply, Reply::Fuse(_)),
            }),
        )
    }
}

thread_local! {
    /// One buffer per serving thread: as large as the largest read it has seen, at most a megabyte.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Reads into this thread's buffer, and gives what came of it with the bytes.
pub fn with_read<T>(
    device: &OpenDevice,
    start: u64,
    length: usize,
    then: impl FnOnce(DeviceRead, &[u8]) -> T,
) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let read = device.read(start, &mut buffer[..length]);
        then(read, &buffer[..length])
    })
}

/// The kernel's number as fuser has it.
pub fn errno(failure: FillErrno) -> Errno {
    Errno::from_i32(failure.number())
}

impl WaitingReads {
    /// Starts the clock and the finishers, which live as long as the process. Reads are entered into `steps`.
    pub fn start(steps: Steps) -> std::io::Result<Arc<WaitingReads>> {
        let (finish, todo) = channel();
        let waiting = Arc::new(WaitingReads {
            register: Mutex::default(),
            earlier: Condvar::new(),
            finish,
            steps,
        });
        let todo = Arc::new(Mutex::new(todo));
        for _ in 0..FINISHERS {
            let (waiting, todo) = (waiting.clone(), todo.clone());
            super::worker::thread("finish", move || waiting.finish_all(&todo))?;
        }
        let clock = waiting.clone();
        super::worker::thread("clock", move || clock.watch_deadlines())?;
        Ok(waiting)
    }

    /// What is under way in this process.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    fn register(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a read over: it will be answered, with data or an error, not before its data is there
    /// or its deadline has passed. Returns at once.
    pub fn enter(&self, mut read: PendingRead) {
        read.step.get_or_insert_with(|| {
            let (key, start, length) = (read.device.key(), read.start, read.length);
            let subject =
                std::fmt::from_fn(move |f| write!(f, "{length} bytes from {start} of {key}"));
            self.steps.enter(READER_STEP, "a reader", subject)
        });
        let mut register = self.register();
        let (key, range) = (read.device.key(), read.range());
        if register.given_up.has(key, &range, Instant::now()) {
            drop(register);
            self.hand_to_finishers(Finish::Failed(read, FillErrno::Deadline));
            return;
        }
        let deadline = read.deadline;
        let earlier = match (deadline, register.fills.next_deadline()) {
            (Some(ours), Some(first)) => ours < first,
            (Some(_), None) => true,
            (None, _) => false,
        };
        let id = register.fills.enter(read, deadline);
        register.ask(id);
        if earlier {
            self.earlier.notify_one();
        }
    }

    /// Answers the events of these processes: they write what others wait for, and ask the presence map by themselves.
    /// A daemon may do so before it has connected, and nobody but it could bring what it would wait for.
    pub fn release(&self, is_ours: impl Fn(i32) -> bool) {
        let mut register = self.register();
        let waiting = register.fills.iter();
        let ours = waiting.filter_map(|(id, read, _)| match &read.reply {
            Reply::Event(reply) if is_ours(reply.pid()) => Some(id),
            _ => None,
        });
        let ours: Vec<u64> = ours.collect();
        let reads = ours.into_iter().map(|id| register.fills.answered(id));
        let reads: Vec<PendingRead> = reads.flatten().collect();
        drop(register);
        for read in reads {
            if let Reply::Event(reply) = read.reply {
                reply.present();
            }
        }
    }

    /// A link is there: asks it for all that waits.
    pub fn connected(&self, link: Sender<Vec<u8>>) {
        let mut register = self.register();
        register.link = Some(link);
        let ids: Vec<u64> = register.fills.iter().map(|(id, ..)| id).collect();
        if !ids.is_empty() {
            tracing::info!(fills = ids.len(), "ask again for what readers wait for");
        }
        for id in ids {
            register.ask(id);
        }
    }

    /// The link is gone; what waits goes on waiting.
    pub fn disconnected(&self) {
        self.register().link = None;
    }

    /// The daemon's answer to a fill.
    pub fn answered(&self, id: u64, reply: wire::FillReply) {
        // A read that expired meanwhile has had its answer.
        let Some(read) = self.register().fills.answered(id) else {
            return;
        };
        let finish = match i32::try_from(reply.errno) {
            Ok(0) if reply.bytes.is_empty() => Finish::Present(read),
            Ok(0) => Finish::Passed(read, reply.bytes),
            Ok(number) => {
                tracing::warn!(device = %read.device.key(), start = read.start, error = reply.error, "fill fails");
                Finish::Failed(read, FillErrno::from_number(number))
            }
            Err(_) => Finish::Failed(read, FillErrno::Io),
        };
        self.hand_to_finishers(finish);
    }

    fn hand_to_finishers(&self, finish: Finish) {
        // The finishers live as long as the process; if they were gone, dropping the read would
        // still answer it with EIO.
        let _gone = self.finish.send(finish);
    }

    fn finish_all(&self, todo: &Mutex<Receiver<Finish>>) {
        loop {
            let next = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let _step = self
                .steps
                .enter(FINISH_STEP, "a reader", "the store and the kernel");
            match next {
                Ok(Finish::Present(read)) => self.finish(read),
                Ok(Finish::Passed(read, bytes)) => read.passed(&bytes),
                Ok(Finish::Failed(read, failure)) => {
                    let (key, range) = (read.device.key(), read.range());
                    let mut register = self.register();
                    register
                        .given_up
                        .note(key, range, read.deadline, Instant::now());
                    drop(register);
                    read.reply.failed(failure);
                }
                Err(_) => return,
            }
        }
    }

    fn finish(&self, read: PendingRead) {
        let (device, start, length) = (read.device.clone(), read.start, read.length);
        if matches!(read.reply, Reply::Event(_)) {
            self.conclude(read, device.look(start, length), &[]);
        } else {
            with_read(&device, start, length, |outcome, bytes| {
                self.conclude(read, outcome, bytes);
            });
        }
    }

    fn conclude(&self, mut read: PendingRead, outcome: DeviceRead, bytes: &[u8]) {
        match outcome {
            DeviceRead::Done => match read.reply {
                Reply::Fuse(reply) => reply.data(bytes),
                Reply::Event(reply) => reply.present(),
            },
            DeviceRead::Failed(failure) => read.reply.failed(failure),
            DeviceRead::Missing if read.attempts < ATTEMPTS => {
                read.attempts += 1;
                self.enter(read);
            }
            DeviceRead::Missing => {
                tracing::error!(device = %read.device.key(), start = read.start, "the daemon says present, the store says missing");
                read.reply.failed(FillErrno::Io);
            }
        }
    }

    fn watch_deadlines(&self) {
        let mut register = self.register();
        loop {
            let now = Instant::now();
            for read in register.fills.expired(now) {
                tracing::error!(device = %read.device.key(), start = read.start, length = read.length, "read deadline passed");
                self.hand_to_finishers(Finish::Failed(read, FillErrno::Deadline));
            }
            let idle = Duration::from_secs(3600);
            let next = register.fills.next_deadline();
            let wait = next.map_or(idle, |at| at.saturating_duration_since(now));
            let woken = self.earlier.wait_timeout(register, wait);
            register = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Register {
    /// Puts the request of `id` into the link's queue; without a link it is asked for later.
    fn ask(&mut self, id: u64) {
        let Some(link) = &self.link else { return };
        let now = Instant::now();
        let Some(request) = self.fills.get(id).map(|read| read.request(id, now)) else {
            return;
        };
        if link.send(request).is_err() {
            self.link = None;
        }
    }
}
