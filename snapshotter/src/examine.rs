// SPDX-License-Identifier: Apache-2.0
//! The daemon's half of `sluice doctor`: its own state, looked at from inside.
//!
//! One file per check; each looks, tells of what is wrong, and repairs it where it was asked to and can do so
//! safely. What needs no daemon (containerd's configuration, the kernel, FUSE connections) is looked at by the
//! command line itself, which must work when no daemon runs.
//!
//! - `steps`: what is stuck now; first, for it may be what holds the others up.
//! - `metadata`: the invariants of the metadata store.
//! - `shim`: the shim that serves against the one that is installed.
//! - `mounts`: the kernel's mounts against what the shim serves.
//! - `layers`: an index for each layer, and seals that failed.
//! - `leftovers`: devices and trees that no snapshot needs.
//! - `content`: with `deep`, every byte of the store against its digest.
//! - `budget`: pins and use against the budget, and the disk.
//! - `registry`: whether the registry of an image answers, and lets this node in.
//!
//! **Bounds** findings go through a queue of [`QUEUED`]; a client that does not read holds the examination
//! up and nothing else. Every check but `content` has [`DEADLINE`]; while one runs, [`BEAT`] passes at most
//! without a word. **Cancel** safe: a repair that has begun is finished.

mod budget;
mod content;
mod layers;
mod leftovers;
mod metadata;
mod mounts;
mod registry;
mod shim;
mod steps;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sluice_fetcher::registry::RegistryClient;
use sluice_fetcher::store::DeviceKey;
use tokio::sync::mpsc;

use crate::layers::device_key;
use crate::lazy::Lazy;
use crate::mount::attached::AttachedMount;
use crate::snapshots::{BlobOrigin, LazyLayerRecord};
use crate::store::StoreError;

/// Events that wait for the client.
pub const QUEUED: usize = 64;
/// How long a check may take that does not read the whole store.
const DEADLINE: Duration = Duration::from_secs(60);
/// The longest silence while a check runs. `sluice doctor` takes a longer one for a daemon that hangs.
const BEAT: Duration = Duration::from_secs(5);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Works, but not as it should, or not for long.
    Warning,
    /// Something does not work.
    Error,
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub subject: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
    /// Whether a repair is known.
    pub repairable: bool,
    /// Whether it was repaired just now.
    pub repaired: bool,
}

impl Finding {
    fn new(severity: Severity, subject: impl ToString, problem: impl ToString) -> Self {
        Self {
            severity,
            subject: subject.to_string(),
            problem: problem.to_string(),
            advice: String::new(),
            repairable: false,
            repaired: false,
        }
    }

    fn advice(mut self, advice: impl ToString) -> Self {
        self.advice = advice.to_string();
        self
    }

    fn repairable(mut self, repaired: bool) -> Self {
        self.repairable = true;
        self.repaired = repaired;
        self
    }
}

/// What the client hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something was found.
    Finding(&'static str, Finding),
    /// A check is done, and looked at so many things.
    Done(&'static str, u64),
    /// A check goes on.
    Progress(&'static str, String, u64),
}

/// What is to be done.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Read the whole store.
    pub deep: bool,
    /// Repair.
    pub fix: bool,
    /// Whose registry to ask.
    pub image: Option<WantedImage>,
}

/// An image whose registry is asked.
#[derive(Clone, Debug, Default)]
pub struct WantedImage {
    /// As it was named.
    pub name: String,
    /// Repositories that are known to have it, and the digest of a manifest there.
    pub known: Vec<(BlobOrigin, String)>,
}

/// Looks at the daemon's state.
#[derive(Debug)]
pub struct Examiner {
    lazy: Lazy,
    shim: Arc<AttachedMount>,
    client: RegistryClient,
    wanted: Wanted,
    /// The names of images by the chain IDs of their layers.
    names: BTreeMap<String, Vec<String>>,
    events: mpsc::Sender<Event>,
}

/// What one check tells of.
struct Report<'a> {
    check: &'static str,
    events: &'a mpsc::Sender<Event>,
    looked_at: AtomicU64,
    subject: Mutex<String>,
}

impl Report<'_> {
    async fn finding(&self, finding: Finding) {
        tracing::info!(
            check = self.check,
            subject = finding.subject,
            problem = finding.problem,
            repaired = finding.repaired,
            "examination found something"
        );
        // A client that went away is noticed by who runs the examination.
        let _ = self.events.send(Event::Finding(self.check, finding)).await;
    }

    /// Looks at something else now.
    fn looks_at(&self, subject: impl ToString) {
        self.looked_at.fetch_add(1, Ordering::Relaxed);
        *self.subject.lock().unwrap_or_else(PoisonError::into_inner) = subject.to_string();
    }

    fn progress(&self) -> Event {
        let subject = self.subject.lock().unwrap_or_else(PoisonError::into_inner);
        let looked_at = self.looked_at.load(Ordering::Relaxed);
        Event::Progress(self.check, subject.clone(), looked_at)
    }

    async fn failed(&self, subject: &str, error: impl ToString) {
        let finding = Finding::new(Severity::Error, subject, error)
            .advice("look at the log of sluiced and at the disk");
        self.finding(finding).await;
    }
}

impl Examiner {
    /// Examines on behalf of a client that reads `events`.
    #[must_use]
    pub fn new(
        (lazy, shim): (Lazy, Arc<AttachedMount>),
        client: RegistryClient,
        wanted: Wanted,
        names: BTreeMap<String, Vec<String>>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        Self {
            lazy,
            shim,
            client,
            wanted,
            names,
            events,
        }
    }

    /// Runs all checks, one after the other: the node has other work to do.
    pub async fn run(&self) {
        let limit = Some(DEADLINE);
        self.check("steps", limit, |it| self.steps(it)).await;
        self.check("metadata", limit, |it| self.metadata(it)).await;
        self.check("shim", limit, |it| self.shim(it)).await;
        self.check("mounts", limit, |it| self.mounts(it)).await;
        self.check("layers", limit, |it| self.layers(it)).await;
        self.check("leftovers", limit, |it| self.leftovers(it))
            .await;
        if self.wanted.deep {
            self.check("content", None, |it| self.content(it)).await;
        }
        self.check("budget", limit, |it| self.budget(it)).await;
        if let Some(image) = &self.wanted.image {
            self.check("registry", limit, |it| self.registry(it, image))
                .await;
        }
    }

    /// Runs one check within its deadline, and says now and then that it goes on.
    async fn check<'a, W: Future<Output = ()> + 'a>(
        &'a self,
        name: &'static str,
        limit: Option<Duration>,
        work: impl FnOnce(Arc<Report<'a>>) -> W,
    ) {
        let report = Arc::new(Report {
            check: name,
            events: &self.events,
            looked_at: AtomicU64::new(0),
            subject: Mutex::default(),
        });
        let mut work = std::pin::pin!(work(Arc::clone(&report)));
        let begun = tokio::time::Instant::now();
        loop {
            if tokio::time::timeout(BEAT, &mut work).await.is_ok() {
                break;
            }
            if limit.is_some_and(|limit| begun.elapsed() >= limit) {
                let problem = format!("not done after {} s", begun.elapsed().as_secs());
                let finding = Finding::new(Severity::Warning, name, problem)
                    .advice("look for what holds the daemon up: the disk, containerd, the network");
                report.finding(finding).await;
                break;
            }
            let _ = self.events.send(report.progress()).await;
        }
        let looked_at = report.looked_at.load(Ordering::Relaxed);
        let _ = self.events.send(Event::Done(name, looked_at)).await;
    }

    /// The lazy layers that snapshots have, each once.
    async fn records(&self) -> Result<BTreeMap<DeviceKey, LazyLayerRecord>, StoreError> {
        let metadata = Arc::clone(&self.lazy.parts().metadata);
        let records = blocking(move || metadata.layers()).await?;
        let mut layers: BTreeMap<DeviceKey, LazyLayerRecord> = BTreeMap::new();
        for (_, record) in records {
            let known = layers.entry(device_key(&record));
            known
                .and_modify(|it| it.sources.extend(record.sources.iter().cloned()))
                .or_insert(record);
        }
        Ok(layers)
    }

    /// What people call a layer: its images, and its diff ID.
    fn name(&self, record: &LazyLayerRecord) -> String {
        let images = self.names.get(&record.chain_id.to_string());
        let images = images.map_or_else(String::new, |names| format!("{}: ", names.join(" ")));
        format!("{images}layer {}", record.diff_id)
    }
}

/// Runs blocking work; it is finished also when the caller goes away.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and we with it.
            Err(_) => std::future::pending().await,
        },
    }
}
