// SPDX-License-Identifier: Apache-2.0
//! Prewarming: bringing an image before anybody asks for it.
//!
//! ```text
//!   start ──> queued ──slot──> resolving ──> indexing ──> fetching ──> done
//!                │                 └────────────┴────────────┴───────> failed
//!                └─ the last watcher goes away, deadline, the daemon stops ──^
//! ```
//!
//! - `image`: what the reference stands for, asked of the registry with this node's credentials.
//! - `work`: indexes, layers, chunks.
//! - `progress`: how far it is.
//!
//! Indexes and devices are those of a pull, named by the same digests, so a pull that comes later finds
//! them. No snapshot has a prewarmed layer: it is a foster of the shelf, which the sweep leaves alone until
//! [`PrewarmOptions::grace`] is over; the store's budget evicts it like any layer that nobody uses.
//!
//! Who asks for what runs already watches the same work. It is cancelled when nobody watches it any more,
//! unless one who asked had it detached.
//!
//! **Bounds** [`RUNNING`] run, [`QUEUED`] wait, further ones are refused; each waits and runs for
//! [`PrewarmOptions::deadline`] at most. **Locks** the table is locked for map operations only. **Crash**
//! loses the work under way and the grace: a daemon that starts keeps of it what snapshots have got.

mod image;
mod progress;
mod work;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sluice_fetcher::registry::{ImageReference, RegistryClient};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use image::ImageError;
pub use progress::{LayerPhase, LayerProgress, Phase, Progress, Scope};

use crate::lazy::Lazy;
use work::Work;

/// Prewarms that run at once. One is enough to fill a line; two, so that a large one does not hold up a
/// small one.
const RUNNING: usize = 2;
/// Prewarms that wait. More would wait for hours.
const QUEUED: usize = 32;

/// What the configuration says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrewarmOptions {
    /// How long what was brought is kept without a snapshot.
    pub grace: Duration,
    /// How long one may wait for its turn, and then run.
    pub deadline: Duration,
}

/// Why a prewarm does not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrewarmRefused {
    /// The queue is full.
    #[error("{RUNNING} images are being prewarmed and {QUEUED} wait: try again later")]
    Full,
    /// The daemon stops.
    #[error("the daemon stops")]
    Stopping,
}

type JobKey = (ImageReference, Scope);

#[derive(Debug)]
struct Job {
    number: u64,
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
    watchers: usize,
    detached: bool,
}

#[derive(Debug, Default)]
struct Jobs {
    table: HashMap<JobKey, Job>,
    next: u64,
}

#[derive(Debug)]
struct Inner {
    work: Work,
    jobs: Mutex<Jobs>,
    slots: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The prewarms of this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Prewarms(Arc<Inner>);

/// A prewarm that is watched; dropped, it is not watched any more.
pub struct Watching {
    inner: Arc<Inner>,
    key: JobKey,
    number: u64,
    progress: watch::Receiver<Progress>,
}

impl fmt::Debug for Watching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (image, scope) = (&self.key.0, self.key.1);
        f.debug_struct("Watching")
            .field("image", image)
            .field("scope", &scope)
            .finish_non_exhaustive()
    }
}

impl Watching {
    /// How far it is; the last value has a last phase.
    pub fn progress(&mut self) -> &mut watch::Receiver<Progress> {
        &mut self.progress
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut jobs = self.inner.jobs();
        let job = jobs.table.get_mut(&self.key);
        if let Some(job) = job.filter(|job| job.number == self.number) {
            job.watchers -= 1;
            if job.watchers == 0 && !job.detached {
                job.cancel.cancel();
            }
        }
    }
}

impl Inner {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Every critical section leaves the table whole.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a slot and works, within the deadlines; what it says is the end of it.
    async fn run(&self, key: &JobKey, report: &watch::Sender<Progress>) {
        let (reference, scope) = key;
        let deadline = self.work.options.deadline;
        let seconds = deadline.as_secs();
        let Ok(slot) = tokio::time::timeout(deadline, self.slots.acquire()).await else {
            report.send_modify(|it| it.fail(format!("its turn did not come within {seconds} s")));
            return;
        };
        let work = self.work.run(reference, *scope, report);
        if tokio::time::timeout(deadline, work).await.is_err() {
            report.send_modify(|it| it.fail(format!("not done within {seconds} s")));
        }
        drop(slot);
    }

    async fn run_job(
        self: Arc<Self>,
        key: JobKey,
        number: u64,
        cancel: CancellationToken,
        report: watch::Sender<Progress>,
    ) {
        if cancel
            .run_until_cancelled(self.run(&key, &report))
            .await
            .is_none()
        {
            report.send_modify(|it| it.fail("cancelled"));
        }
        {
            let mut jobs = self.jobs();
            if jobs.table.get(&key).is_some_and(|it| it.number == number) {
                jobs.table.remove(&key);
            }
        }
        let ended = report.borrow();
        let (image, scope) = (&key.0, key.1.as_str());
        let (bytes, layers) = (ended.bytes().0, ended.layers.len());
        match ended.phase {
            Phase::Done => tracing::info!(%image, scope, layers, bytes, "image prewarmed"),
            _ => {
                tracing::warn!(%image, scope, layers, bytes, "image not prewarmed: {}", ended.error)
            }
        }
    }
}

impl Prewarms {
    /// Prewarms into the store below these layers, with this client.
    #[must_use]
    pub fn new(lazy: Lazy, client: RegistryClient, options: PrewarmOptions) -> Self {
        Self(Arc::new(Inner {
            work: Work {
                lazy,
                client,
                options,
            },
            jobs: Mutex::default(),
            slots: Semaphore::new(RUNNING),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Begins to prewarm an image, or joins those who wait for the same. Returns at once; a `detached` one
    /// goes on when nobody watches it.
    ///
    /// **Errors** [`PrewarmRefused`].
    pub fn start(
        &self,
        reference: ImageReference,
        scope: Scope,
        detached: bool,
    ) -> Result<Watching, PrewarmRefused> {
        let inner = &self.0;
        if inner.stop.is_cancelled() {
            return Err(PrewarmRefused::Stopping);
        }
        let key = (reference, scope);
        let mut jobs = inner.jobs();
        let known = jobs.table.get_mut(&key);
        if let Some(job) = known.filter(|job| !job.cancel.is_cancelled()) {
            job.watchers += 1;
            job.detached |= detached;
            return Ok(Watching {
                inner: Arc::clone(inner),
                key,
                number: job.number,
                progress: job.progress.clone(),
            });
        }
        // One that was cancelled and asked for again has its place already.
        if jobs.table.len() >= RUNNING + QUEUED && !jobs.table.contains_key(&key) {
            return Err(PrewarmRefused::Full);
        }
        let (report, progress) = watch::channel(Progress::default());
        let cancel = inner.stop.child_token();
        let number = jobs.next;
        jobs.next += 1;
        let job = Job {
            number,
            progress: progress.clone(),
            cancel: cancel.clone(),
            watchers: 1,
            detached,
        };
        jobs.table.insert(key.clone(), job);
        drop(jobs);
        let run = Arc::clone(inner).run_job(key.clone(), number, cancel, report);
        inner.tasks.spawn(run);
        Ok(Watching {
            inner: Arc::clone(inner),
            key,
            number,
            progress,
        })
    }

    /// Ends all and waits for it.
    pub async fn stop(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests;
