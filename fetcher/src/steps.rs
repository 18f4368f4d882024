// SPDX-License-Identifier: Apache-2.0
//! What is under way and may get stuck, and since when.
//!
//! Whoever is about to wait (for a registry, another process, a system call) enters a step and leaves it by
//! dropping the guard. A step that stands for longer than the limit of its kind is *stuck*: the
//! [`Watchdog`] finds it, names it once in the log, and counts it; it is shown for as long as it stands.
//! Nothing is cancelled here: deadlines end waits, and this says which wait it is that somebody else's
//! deadline is about to end, or none will.
//!
//! ```text
//!   enter --> stands --limit--> stuck (told once) --begin or rest--> stands
//!               |                 |
//!               +---- drop -------+--> gone
//! ```
//! Times are real: a test that stops the runtime's clock stops no system call. Table and times are pure; they
//! are told what time it is.
//!
//! **Cost** entering and leaving take a short lock and an allocation; [`StepGuard::begin`] and
//! [`StepGuard::rest`], meant for loops, are one atomic store. What a step is about is put into words only
//! when it is stuck. **Bounds** at most [`MOST`] steps are watched; what comes on top is counted and not
//! watched. **Locks** each is held for map operations, never while something is logged.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

mod metrics;
#[cfg(test)]
mod tests;
mod watchdog;

use metrics::StepMetrics;
pub use watchdog::Watchdog;

use crate::store::lock;

/// Steps that are watched at most: readers and requests of a busy node are some thousands, and each costs about
/// 200 bytes.
pub const MOST: usize = 8192;
/// Steps that are named at most when somebody asks what is stuck: one screen; the rest is the same again.
pub const MOST_NAMED: usize = 64;

/// Moment at which a resting step began to stand: never.
const RESTS: u64 = u64::MAX;

/// A kind of wait. Its limit is well above what it takes on a healthy node, and below the deadline that ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKind {
    name: &'static str,
    limit: Duration,
}

impl StepKind {
    /// A kind with this name, a label of metrics, which is stuck beyond `limit`.
    pub const fn new(name: &'static str, limit: Duration) -> Self {
        Self { name, limit }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Beyond it a step is stuck.
    pub const fn limit(self) -> Duration {
        self.limit
    }
}

/// A step that stands for longer than its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The process that it stands in: its process ID.
    pub pid: u32,
    /// Tells it from other steps of that process.
    pub id: u64,
    /// The name of its kind.
    pub step: String,
    /// On behalf of whom.
    pub whom: String,
    /// What it is about.
    pub subject: String,
    /// For how long it stands.
    pub stands: Duration,
}

struct Standing {
    kind: StepKind,
    whom: &'static str,
    subject: Box<dyn Display + Send>,
    /// Milliseconds from the table's first moment until it began to stand.
    since: Arc<AtomicU64>,
    /// The `since` of which was told that it is stuck.
    told: Option<u64>,
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} for {}",
            self.kind.name, self.subject, self.whom
        )
    }
}

#[derive(Debug, Default)]
struct Table {
    next_id: u64,
    standing: BTreeMap<u64, Standing>,
}

#[derive(Debug)]
struct Inner {
    first: Instant,
    table: Mutex<Table>,
    /// What other processes said that is stuck there, and when.
    heard: Mutex<Vec<(Stuck, Instant)>>,
    metrics: StepMetrics,
}

/// The steps of this process. Clones are the same.
#[derive(Clone, Debug)]
pub struct Steps(Arc<Inner>);

impl Default for Steps {
    fn default() -> Self {
        Self(Arc::new(Inner {
            first: Instant::now(),
            table: Mutex::default(),
            heard: Mutex::default(),
            metrics: StepMetrics::default(),
        }))
    }
}

/// What changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Steps that were found stuck for the first time.
    pub(crate) stuck: Vec<Stuck>,
    /// Names of steps that were stuck and go on.
    pub(crate) moved: Vec<&'static str>,
}

impl Steps {
    /// Nothing under way.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Exports what is counted through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        self.0.metrics.register(registry);
    }

    /// Enters a step: it stands from now on until the guard is dropped.
    ///
    /// `subject` is put into words under the table's lock, and only if the step gets stuck.
    pub fn enter(
        &self,
        kind: StepKind,
        whom: &'static str,
        subject: impl Display + Send + 'static,
    ) -> StepGuard {
        let since = Arc::new(AtomicU64::new(self.moment(Instant::now())));
        let mut table = lock(&self.0.table);
        if table.standing.len() >= MOST {
            drop(table);
            self.0.metrics.unwatched();
            return StepGuard {
                steps: self.clone(),
                id: None,
                since,
            };
        }
        let id = table.next_id;
        table.next_id += 1;
        let standing = Standing {
            kind,
            whom,
            subject: Box::new(subject),
            since: Arc::clone(&since),
            told: None,
        };
        table.standing.insert(id, standing);
        StepGuard {
            steps: self.clone(),
            id: Some(id),
            since,
        }
    }

    /// What is stuck at `now`, here and where others told of, the longest first; at most [`MOST_NAMED`].
    #[must_use]
    pub fn stuck(&self, now: Instant) -> Vec<Stuck> {
        let mut stuck = self.stuck_here(now);
        stuck.extend(lock(&self.0.heard).iter().map(|(told, at)| Stuck {
            stands: told.stands + now.saturating_duration_since(*at),
            ..told.clone()
        }));
        longest_first(stuck)
    }

    /// As [`Self::stuck`], of this process only.
    #[must_use]
    pub fn stuck_here(&self, now: Instant) -> Vec<Stuck> {
        let now = self.moment(now);
        let table = lock(&self.0.table);
        let standing = table.standing.iter();
        let late = standing.filter_map(|(id, it)| {
            let stands = it.stands(now);
            (stands > it.kind.limit).then_some((stands, *id, it))
        });
        let mut late: Vec<_> = late.collect();
        late.sort_by_key(|(stands, ..)| std::cmp::Reverse(*stands));
        late.truncate(MOST_NAMED);
        late.into_iter()
            .map(|(stands, id, it)| it.named(id, stands))
            .collect()
    }

    /// Takes over what another process says is stuck there: all of it, each time, or nothing when it is gone.
    /// What was not known is counted and named in the log.
    pub fn hear(&self, told: Vec<Stuck>) {
        let now = Instant::now();
        let name = |it: &Stuck| (it.pid, it.id);
        let before = {
            let mut heard = lock(&self.0.heard);
            let after = told.iter().map(|it| (it.clone(), now)).collect();
            std::mem::replace(&mut *heard, after)
        };
        for (old, _) in &before {
            if !told.iter().any(|it| name(it) == name(old)) {
                self.0.metrics.ended(&old.step);
            }
        }
        for new in &told {
            if !before.iter().any(|(it, _)| name(it) == name(new)) {
                self.0.metrics.found(&new.step);
                watchdog::tell(new);
            }
        }
    }

    /// How often a step of this name was found stuck.
    #[must_use]
    pub fn found(&self, step: &str) -> u64 {
        self.0.metrics.found_so_far(step)
    }

    /// How many steps of this name are stuck, as far as somebody looked.
    #[must_use]
    pub fn stuck_now(&self, step: &str) -> i64 {
        self.0.metrics.stuck_now(step)
    }

    /// Looks for what got stuck since the last look, and counts it.
    pub(crate) fn look(&self, now: Instant) -> Look {
        let now = self.moment(now);
        let mut look = Look::default();
        let mut table = lock(&self.0.table);
        for (id, it) in &mut table.standing {
            let since = it.since.load(Ordering::Relaxed);
            if it.told.is_some_and(|told| told != since) {
                it.told = None;
                self.0.metrics.ended(it.kind.name);
                look.moved.push(it.kind.name);
            }
            let stands = it.stands(now);
            if it.told.is_none() && stands > it.kind.limit {
                it.told = Some(since);
                self.0.metrics.found(it.kind.name);
                look.stuck.push(it.named(*id, stands));
            }
        }
        look
    }

    /// Milliseconds since the first moment.
    fn moment(&self, at: Instant) -> u64 {
        let passed = at.saturating_duration_since(self.0.first);
        u64::try_from(passed.as_millis()).map_or(RESTS - 1, |it| it.min(RESTS - 1))
    }
}

/// The longest first, and not too many.
fn longest_first(mut stuck: Vec<Stuck>) -> Vec<Stuck> {
    stuck.sort_by_key(|it| std::cmp::Reverse(it.stands));
    stuck.truncate(MOST_NAMED);
    stuck
}

impl Standing {
    fn stands(&self, now: u64) -> Duration {
        Duration::from_millis(now.saturating_sub(self.since.load(Ordering::Relaxed)))
    }

    fn named(&self, id: u64, stands: Duration) -> Stuck {
        Stuck {
            pid: std::process::id(),
            id,
            step: self.kind.name.to_owned(),
            whom: self.whom.to_owned(),
            subject: self.subject.to_string(),
            stands,
        }
    }
}

/// A step under way. Dropped, it is over.
#[derive(Debug)]
pub struct StepGuard {
    steps: Steps,
    /// `None`: too many stand, and it is not watched.
    id: Option<u64>,
    since: Arc<AtomicU64>,
}

impl StepGuard {
    /// It made progress: it stands anew from now on.
    pub fn begin(&self) {
        let now = self.steps.moment(Instant::now());
        self.since.store(now, Ordering::Relaxed);
    }

    /// Nobody waits in it until it begins again.
    pub fn rest(&self) {
        self.since.store(RESTS, Ordering::Relaxed);
    }
}

impl Drop for StepGuard {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let gone = lock(&self.steps.0.table).standing.remove(&id);
        // Its subject is dropped here, outside of the lock.
        if let Some(step) = gone.filter(|step| step.told.is_some()) {
            let name = step.kind.name;
            self.steps.0.metrics.ended(name);
            tracing::info!(step = name, subject = %step.subject, "a step that was stuck has ended");
        }
    }
}
