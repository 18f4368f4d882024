// SPDX-License-Identifier: Apache-2.0
//! The sources of one layer's blob, and which one is asked next.
//!
//! They are asked in the order given, those first that are not backing off. A failure makes a source
//! back off, exponentially with each further one; a success forgets that. Requests that fail together
//! are one failure: what was begun before the latest one was counted tells nothing new. A corrupt
//! chunk says something of that chunk at that source only, so it backs off by itself, and is asked of
//! those sources first that have not yet sent it so. No source is ever given up: a reader's deadline
//! decides.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::error::FetchFailure;
use crate::backoff::{Backoff, moment_after, pause_after};
use crate::clock;
use crate::source::{BlobSource, Class, SourceError};
use crate::store::lock;

/// First pause after a failure that may pass.
const TRANSIENT_PAUSE: Duration = Duration::from_millis(100);
/// First pause after one that will hardly pass by itself: asking faster only loads the source.
const PERMANENT_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause: a source that is back is noticed within it.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Corrupt chunks remembered per layer; beyond it the memory starts anew.
const CORRUPT_CHUNKS: usize = 4096;

/// Which source, for reporting back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SourceId(usize);

/// What to do now.
#[derive(Debug)]
pub(crate) enum Choice {
    /// Ask this one.
    Use(SourceId, Arc<dyn BlobSource>),
    /// All are backing off; the first until then.
    Wait(Instant),
    /// There is none.
    Nobody,
}

#[derive(Debug)]
struct Entry {
    source: Arc<dyn BlobSource>,
    backoff: Backoff,
}

/// What is known of a chunk that a source sent corrupt.
#[derive(Clone, Copy, Debug, Default)]
struct Corrupt {
    times: u32,
    not_before: Option<Instant>,
}

#[derive(Debug, Default)]
struct Entries {
    list: Vec<Entry>,
    corrupt: HashMap<(u32, usize), Corrupt>,
}

impl Entries {
    /// When the source may be asked for `chunk`, or at all; `None` when it always might.
    fn not_before(&self, at: usize, chunk: Option<u32>) -> Option<Instant> {
        let corrupt = chunk.and_then(|chunk| self.corrupt.get(&(chunk, at)));
        let of_source = self.list.get(at).and_then(|it| it.backoff.not_before());
        of_source.max(corrupt.and_then(|it| it.not_before))
    }
}

/// The sources.
#[derive(Debug)]
pub(crate) struct SourceSet {
    entries: Mutex<Entries>,
    changed: watch::Sender<()>,
}

impl SourceSet {
    pub(crate) fn new(sources: Vec<Arc<dyn BlobSource>>) -> Self {
        let set = Self {
            entries: Mutex::default(),
            changed: watch::Sender::new(()),
        };
        sources.into_iter().for_each(|source| set.add(source));
        set
    }

    /// Adds a source at the end. One with the same name and kind is replaced (it may have newer
    /// credentials) and need not back off.
    pub(crate) fn add(&self, source: Arc<dyn BlobSource>) {
        let mut entries = lock(&self.entries);
        let same = |entry: &&mut Entry| {
            entry.source.label() == source.label() && entry.source.kind() == source.kind()
        };
        let known = entries.list.iter_mut().find(same);
        let new = Entry {
            source: Arc::clone(&source),
            backoff: Backoff::new(clock::now()),
        };
        match known {
            Some(entry) => *entry = new,
            None => entries.list.push(new),
        }
        drop(entries);
        self.changed.send_replace(());
    }

    /// Which source to ask for `chunk` now, or for any chunk that none sent corrupt.
    pub(crate) fn choose(&self, chunk: Option<u32>, now: Instant) -> Choice {
        let entries = lock(&self.entries);
        let times = |at: usize| {
            let corrupt = chunk.and_then(|chunk| entries.corrupt.get(&(chunk, at)));
            corrupt.map_or(0, |it| it.times)
        };
        let best = (0..entries.list.len())
            .filter(|at| entries.not_before(*at, chunk).is_none_or(|at| at <= now))
            .min_by_key(|at| (times(*at), *at));
        if let Some(at) = best {
            return Choice::Use(SourceId(at), Arc::clone(&entries.list[at].source));
        }
        let first = (0..entries.list.len())
            .filter_map(|at| entries.not_before(at, chunk))
            .min();
        match first {
            Some(at) => Choice::Wait(at),
            None => Choice::Nobody,
        }
    }

    /// The chunks that no source may be asked for now because each sent them corrupt, or backs off.
    pub(crate) fn resting(&self, now: Instant) -> BTreeSet<u32> {
        let entries = lock(&self.entries);
        let rests = |chunk: &u32| {
            (0..entries.list.len()).all(|at| {
                entries
                    .not_before(at, Some(*chunk))
                    .is_some_and(|at| at > now)
            })
        };
        let chunks = entries.corrupt.keys().map(|(chunk, _)| *chunk);
        chunks.filter(rests).collect()
    }

    /// Tells of every source that is added, replaced or refreshed from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The sources know of further places: they may be asked at once.
    pub(crate) fn refresh(&self) {
        for entry in &mut lock(&self.entries).list {
            entry.backoff.succeeded();
        }
        self.changed.send_replace(());
    }

    /// A source gave what was asked of it.
    pub(crate) fn succeeded(&self, id: SourceId) {
        if let Some(entry) = lock(&self.entries).list.get_mut(id.0) {
            entry.backoff.succeeded();
        }
    }

    /// An attempt at a source that was begun at `began` failed: the source backs off.
    pub(crate) fn failed(
        &self,
        id: SourceId,
        failure: &FetchFailure,
        began: Instant,
        now: Instant,
    ) {
        let mut entries = lock(&self.entries);
        let Some(entry) = entries.list.get_mut(id.0) else {
            return;
        };
        let (first, asked) = match failure {
            FetchFailure::Source { error, .. } => {
                let first = match error.class() {
                    Class::Transient | Class::Cancelled => TRANSIENT_PAUSE,
                    Class::Permanent | Class::Corrupt => PERMANENT_PAUSE,
                };
                (first, SourceError::retry_after(error))
            }
            // Not of the source: see `sent_corrupt` for what it sent.
            FetchFailure::Corrupt { .. }
            | FetchFailure::NoSource
            | FetchFailure::Windows { .. }
            | FetchFailure::NoWindows { .. }
            | FetchFailure::Store(_)
            | FetchFailure::Cancelled => return,
        };
        entry
            .backoff
            .failed(first, LONGEST_PAUSE, asked, began, now);
    }

    /// A source sent this chunk corrupt: it is not asked for it for a while.
    pub(crate) fn sent_corrupt(&self, id: SourceId, chunk: u32, now: Instant) {
        let mut entries = lock(&self.entries);
        if entries.corrupt.len() >= CORRUPT_CHUNKS {
            entries.corrupt.clear();
        }
        let corrupt = entries.corrupt.entry((chunk, id.0)).or_default();
        corrupt.not_before = moment_after(
            now,
            pause_after(PERMANENT_PAUSE, LONGEST_PAUSE, corrupt.times),
        );
        corrupt.times = corrupt.times.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backoff::LONGEST_ASKED_PAUSE;
    use crate::registry::RegistryError;
    use crate::source::memory::MemorySource;
    use crate::source::{BlobStream, ReadContext, SourceKind};
    use sluice_blockindex::extent::{BlobSpace, Extent};

    #[derive(Debug)]
    struct Named(&'static str, MemorySource);

    #[async_trait::async_trait]
    impl BlobSource for Named {
        fn label(&self) -> &str {
            self.0
        }
        fn kind(&self) -> SourceKind {
            SourceKind::Origin
        }
        async fn open(
            &self,
            context: &ReadContext,
            extent: Extent<BlobSpace>,
        ) -> Result<BlobStream, SourceError> {
            self.1.open(context, extent).await
        }
    }

    fn named(label: &'static str) -> Arc<dyn BlobSource> {
        Arc::new(Named(label, MemorySource::new(vec![0; 10])))
    }

    fn chosen(set: &SourceSet, chunk: u32) -> (SourceId, String) {
        match set.choose(Some(chunk), clock::now()) {
            Choice::Use(id, source) => (id, source.label().to_owned()),
            other => panic!("{other:?}"),
        }
    }

    fn failure(error: SourceError) -> FetchFailure {
        FetchFailure::Source {
            label: "x".into(),
            error,
        }
    }

    /// An attempt that was begun just now.
    fn failed(set: &SourceSet, id: SourceId, failure: &FetchFailure) {
        set.failed(id, failure, clock::now(), clock::now());
    }

    /// How long nobody may be asked for `chunk`.
    fn rest(set: &SourceSet, chunk: u32) -> Duration {
        match set.choose(Some(chunk), clock::now()) {
            Choice::Use(..) => Duration::ZERO,
            Choice::Wait(until) => until - clock::now(),
            Choice::Nobody => panic!("no source"),
        }
    }

    fn throttled(retry_after: Duration) -> FetchFailure {
        failure(SourceError::Registry(RegistryError::Throttled {
            endpoint: "x".into(),
            what: "x".into(),
            retry_after: Some(retry_after),
        }))
    }

    fn refused() -> FetchFailure {
        failure(SourceError::Stalled {
            after: Duration::ZERO,
            offset: 0,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_together_counts_once() {
        let set = SourceSet::new(vec![named("a")]);
        let (a, _) = chosen(&set, 0);
        let began = clock::now();
        tokio::time::advance(Duration::from_millis(20)).await;
        for _ in 0..32 {
            set.failed(a, &refused(), began, clock::now());
        }
        assert_eq!(rest(&set, 0), TRANSIENT_PAUSE);
        // What an attempt of the same time was asked for holds all the same.
        let second = Duration::from_secs(1);
        set.failed(a, &throttled(second), began, clock::now());
        set.failed(a, &refused(), began, clock::now());
        assert_eq!(rest(&set, 0), second);
        tokio::time::advance(second).await;
        failed(&set, a, &refused());
        assert_eq!(rest(&set, 0), 2 * TRANSIENT_PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_that_a_source_asks_for_is_bounded() {
        let cases = [
            (Duration::from_millis(1), TRANSIENT_PAUSE),
            (Duration::from_secs(7), Duration::from_secs(7)),
            (Duration::from_secs(86_400), LONGEST_ASKED_PAUSE),
            (Duration::MAX, LONGEST_ASKED_PAUSE),
        ];
        for (asked, expected) in cases {
            let set = SourceSet::new(vec![named("a")]);
            failed(&set, chosen(&set, 0).0, &throttled(asked));
            assert_eq!(rest(&set, 0), expected, "{asked:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_that_is_not_backing_off_is_asked() {
        let set = SourceSet::new(vec![named("a"), named("b")]);
        let transient = failure(SourceError::Stalled {
            after: Duration::ZERO,
            offset: 0,
        });
        let (a, label) = chosen(&set, 0);
        assert_eq!(label, "a");
        failed(&set, a, &transient);
        let (b, label) = chosen(&set, 0);
        assert_eq!(label, "b");
        failed(&set, b, &transient);
        assert!(matches!(set.choose(None, clock::now()), Choice::Wait(_)));
        tokio::time::advance(TRANSIENT_PAUSE).await;
        assert_eq!(chosen(&set, 0).1, "a");
        // The second failure in a row pauses twice as long.
        failed(&set, a, &transient);
        failed(&set, b, &transient);
        tokio::time::advance(TRANSIENT_PAUSE).await;
        assert!(matches!(set.choose(None, clock::now()), Choice::Wait(_)));
        tokio::time::advance(TRANSIENT_PAUSE).await;
        set.succeeded(a);
        assert_eq!(chosen(&set, 0).1, "a");
        assert!(matches!(
            SourceSet::new(vec![]).choose(None, clock::now()),
            Choice::Nobody
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn a_corrupt_chunk_is_asked_of_another() {
        let set = SourceSet::new(vec![named("a"), named("b")]);
        let (a, _) = chosen(&set, 5);
        set.sent_corrupt(a, 5, clock::now());
        assert_eq!(
            (chosen(&set, 5).1.as_str(), chosen(&set, 6).1.as_str()),
            ("b", "a")
        );
        let (b, _) = chosen(&set, 5);
        assert_eq!(set.resting(clock::now()), BTreeSet::new());
        set.sent_corrupt(b, 5, clock::now());
        // It rests by itself: other chunks are asked for as before.
        assert_eq!(
            (rest(&set, 5), rest(&set, 6)),
            (PERMANENT_PAUSE, Duration::ZERO)
        );
        assert_eq!(set.resting(clock::now()), BTreeSet::from([5]));
        tokio::time::advance(PERMANENT_PAUSE).await;
        assert_eq!(chosen(&set, 5), (a, "a".to_owned()));
        set.sent_corrupt(a, 5, clock::now());
        assert_eq!(chosen(&set, 5).1, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_is_added_again_starts_afresh() {
        let set = SourceSet::new(vec![named("a")]);
        let (a, _) = chosen(&set, 0);
        let nowhere = failure(SourceError::NoSource { blob: "x".into() });
        failed(&set, a, &nowhere);
        assert!(matches!(set.choose(None, clock::now()), Choice::Wait(_)));
        set.add(named("a"));
        assert_eq!(chosen(&set, 0), (a, "a".to_owned()));
    }
}
