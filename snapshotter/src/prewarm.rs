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
//! - `work`: indexes, layers, chunks; `lists`: those of boot lists alone.
//! - `progress`: how far it is.
//! - `others`: the same on other nodes of the cluster.
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
mod lists;
pub mod others;
mod progress;
mod watching;
mod work;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use sluice_fetcher::registry::{ImageReference, RegistryClient, RegistryError};
use sluice_fetcher::source::{Priority, ReadContext};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use image::ImageError;
pub use progress::{LayerPhase, LayerProgress, Phase, Progress, Scope};
pub use watching::Watching;

use crate::lazy::Lazy;
use work::Work;

/// Prewarms that run at once. One is enough to fill a line; two, so that a large one does not hold up a
/// small one.
const RUNNING: usize = 2;
/// Prewarms that wait. More would wait for hours.
const QUEUED: usize = 32;

/// How long the registry may take to say what a tag stands for.
const PIN_DEADLINE: Duration = Duration::from_secs(30);
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

/// [`Prewarms`], as long as somebody else keeps them.
#[derive(Clone, Debug)]
pub struct WeakPrewarms(Weak<Inner>);

impl WeakPrewarms {
    /// The prewarms, if they are there still.
    #[must_use]
    pub fn get(&self) -> Option<Prewarms> {
        self.0.upgrade().map(Prewarms)
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
                tracing::info!(%image, scope, layers, bytes, "image not prewarmed: {}", ended.error)
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

    /// The same, for who must not keep them alive.
    #[must_use]
    pub fn downgrade(&self) -> WeakPrewarms {
        WeakPrewarms(Arc::downgrade(&self.0))
    }

    /// What a reference stands for now, for nodes that are to bring the same.
    ///
    /// **Errors** [`RegistryError`], within a deadline. **Cancel** safe.
    pub async fn pin(&self, reference: &ImageReference) -> Result<ImageReference, RegistryError> {
        if reference.digest().is_some() {
            return Ok(reference.clone());
        }
        let context = ReadContext::new(Priority::Foreground).with_timeout(PIN_DEADLINE);
        let resolved = self.0.work.client.resolve(&context, reference).await?;
        Ok(reference.place().with_digest(resolved.digest))
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
