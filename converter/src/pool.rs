// SPDX-License-Identifier: Apache-2.0
//! Threads that compress, and the budget of bytes that may be on their way through them.
//!
//! One pool serves all layers of a conversion, so that a single large layer uses all cores and many
//! small ones do not use more. Its queue is bounded: a submitter waits. Bytes are reserved before a job
//! is made and released when its frame is written or dropped ([`Reservation`]), so memory is bounded
//! whatever the number of layers. A layer's frames are written in order; that cannot deadlock, because a
//! frame waits only for earlier frames of the same layer, and these have their reservations already.
//!
//! What a layer gathers until its end, its tree above all, cannot be reserved piece by piece: several
//! half-read layers would wait for each other. So every layer may hold up to [`LARGE_BYTES`] of it, and
//! beyond that one layer at a time ([`ByteBudget::claim_large`]); the others wait between two parts
//! of their tars, while their frames are still written.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of threads that run jobs. Dropping it runs what is queued, then joins them.
#[derive(Debug)]
pub struct Pool {
    queue: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads` threads, at least one.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        // Two jobs per thread: one runs, one waits, so that no thread idles between two.
        let (queue, jobs) = sync_channel::<Job>(threads * 2);
        let jobs = Arc::new(Mutex::new(jobs));
        let threads = (0..threads)
            .map(|n| {
                let jobs = Arc::clone(&jobs);
                std::thread::Builder::new()
                    .name(format!("compress-{n}"))
                    .spawn(move || work(&jobs))
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Self {
            queue: Some(queue),
            threads,
        })
    }

    /// Queues a job; waits while the queue is full. A job that panics is only dropped.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let queue = self
            .queue
            .as_ref()
            .expect("the queue lives as long as the pool");
        // Fails only if every thread is gone; then the job's channel closes, which its owner sees.
        let _ = queue.send(Box::new(job));
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        let _ = catch_unwind(AssertUnwindSafe(job));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What each layer may gather while others do as well: the trees of some 80 000 files, which is more
/// than most layers have.
pub const LARGE_BYTES: u64 = 32 * 1024 * 1024;

/// How many bytes may be in flight.
#[derive(Debug)]
pub struct ByteBudget {
    free_bytes: Mutex<u64>,
    released: Condvar,
    total_bytes: u64,
    large_bytes: u64,
    large: Mutex<()>,
}

/// The right to gather much, which one layer has at a time.
pub type LargeClaim<'a> = MutexGuard<'a, ()>;

impl ByteBudget {
    /// A budget of `total_bytes`.
    pub fn new(total_bytes: u64) -> Arc<Self> {
        Self::with_large_bytes(total_bytes, LARGE_BYTES)
    }

    /// A budget with another limit than [`LARGE_BYTES`].
    pub fn with_large_bytes(total_bytes: u64, large_bytes: u64) -> Arc<Self> {
        let free_bytes = Mutex::new(total_bytes);
        Arc::new(Self {
            free_bytes,
            released: Condvar::new(),
            total_bytes,
            large_bytes,
            large: Mutex::default(),
        })
    }

    /// Whether a layer that has gathered so much needs a [`LargeClaim`].
    pub fn is_large(&self, gathered_bytes: u64) -> bool {
        gathered_bytes > self.large_bytes
    }

    /// Waits until no other layer has the claim.
    pub fn claim_large(&self) -> LargeClaim<'_> {
        self.large.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `bytes` are free. More than the whole budget takes all of it.
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Reservation {
        let bytes = bytes.min(self.total_bytes);
        let mut free = self
            .free_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while *free < bytes {
            free = self
                .released
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        Reservation {
            budget: Arc::clone(self),
            bytes,
        }
    }
}

/// Bytes taken from a [`ByteBudget`]; given back on drop.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<ByteBudget>,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        *self
            .budget
            .free_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += self.bytes;
        self.budget.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn all_jobs_run_and_a_panic_kills_no_thread() {
        let pool = Pool::new(1).unwrap();
        let sum = Arc::new(AtomicU64::new(0));
        for n in 0..100_u64 {
            let sum = Arc::clone(&sum);
            pool.run(move || {
                assert_ne!(n, 3, "this panic is part of the test");
                sum.fetch_add(n, Ordering::Relaxed);
            });
        }
        drop(pool);
        assert_eq!(sum.load(Ordering::Relaxed), 4950 - 3);
    }

    #[test]
    fn reservations_never_exceed_the_budget() {
        let budget = ByteBudget::new(100);
        let used = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for bytes in [60_u64, 50, 1000, 1, 99, 100] {
                let (budget, used) = (&budget, &used);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let held = budget.reserve(bytes);
                        let now = used.fetch_add(held.bytes, Ordering::SeqCst) + held.bytes;
                        assert!(now <= 100, "{now} bytes in flight");
                        used.fetch_sub(held.bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(*budget.free_bytes.lock().unwrap(), 100);
    }
}
