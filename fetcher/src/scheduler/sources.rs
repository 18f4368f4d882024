// SPDX-License-Identifier: Apache-2.0
//! The sources of one layer's blob, and which one is asked next.
//!
//! They are asked in the order given, those first that are not backing off. A failure makes a source
//! back off, exponentially with each further one; a success forgets that. A chunk that came corrupt is
//! asked of those sources first that have not yet sent it so. No source is ever given up: a reader's
//! deadline decides.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::error::FetchFailure;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    failures: u32,
    not_before: Option<Instant>,
}

#[derive(Debug, Default)]
struct Entries {
    list: Vec<Entry>,
    corrupt: HashMap<(u32, usize), u32>,
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
            failures: 0,
            not_before: None,
        };
        match known {
            Some(entry) => *entry = new,
            None => entries.list.push(new),
        }
        drop(entries);
        self.changed.send_replace(());
    }

    /// Which source to ask for `chunk` now.
    pub(crate) fn choose(&self, chunk: u32, now: Instant) -> Choice {
        let entries = lock(&self.entries);
        let ready = |entry: &Entry| entry.not_before.is_none_or(|at| at <= now);
        let corrupt = |at: usize| entries.corrupt.get(&(chunk, at)).copied().unwrap_or(0);
        let best = entries
            .list
            .iter()
            .enumerate()
            .filter(|(_, entry)| ready(entry))
            .min_by_key(|(at, _)| (corrupt(*at), *at));
        if let Some((at, entry)) = best {
            return Choice::Use(SourceId(at), Arc::clone(&entry.source));
        }
        match entries
            .list
            .iter()
            .filter_map(|entry| entry.not_before)
            .min()
        {
            Some(at) => Choice::Wait(at),
            None => Choice::Nobody,
        }
    }

    /// Waits until a source is added or replaced. Cancel-safe.
    pub(crate) async fn changed(&self) {
        let mut changed = self.changed.subscribe();
        // The sender is in `self`: it cannot be closed.
        let _ = changed.changed().await;
    }

    /// A source gave what was asked of it.
    pub(crate) fn succeeded(&self, id: SourceId) {
        if let Some(entry) = lock(&self.entries).list.get_mut(id.0) {
            entry.failures = 0;
            entry.not_before = None;
        }
    }

    /// A source failed: it backs off.
    pub(crate) fn failed(&self, id: SourceId, failure: &FetchFailure, now: Instant) {
        let mut entries = lock(&self.entries);
        let Some(entry) = entries.list.get_mut(id.0) else {
            return;
        };
        let first = match failure.class() {
            Class::Transient | Class::Cancelled => TRANSIENT_PAUSE,
            Class::Permanent | Class::Corrupt => PERMANENT_PAUSE,
        };
        let doubled = first
            .saturating_mul(1 << entry.failures.min(10))
            .min(LONGEST_PAUSE);
        let asked = match failure {
            FetchFailure::Source { error, .. } => SourceError::retry_after(error),
            _ => None,
        };
        entry.failures = entry.failures.saturating_add(1);
        entry.not_before = now.checked_add(asked.unwrap_or_default().max(doubled));
    }

    /// A source sent this chunk corrupt.
    pub(crate) fn sent_corrupt(&self, id: SourceId, chunk: u32) {
        let mut entries = lock(&self.entries);
        if entries.corrupt.len() >= CORRUPT_CHUNKS {
            entries.corrupt.clear();
        }
        *entries.corrupt.entry((chunk, id.0)).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        match set.choose(chunk, crate::clock::now()) {
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

    #[tokio::test(start_paused = true)]
    async fn the_first_that_is_not_backing_off_is_asked() {
        let set = SourceSet::new(vec![named("a"), named("b")]);
        let transient = failure(SourceError::Stalled {
            after: Duration::ZERO,
            offset: 0,
        });
        let (a, label) = chosen(&set, 0);
        assert_eq!(label, "a");
        set.failed(a, &transient, crate::clock::now());
        let (b, label) = chosen(&set, 0);
        assert_eq!(label, "b");
        set.failed(b, &transient, crate::clock::now());
        assert!(matches!(
            set.choose(0, crate::clock::now()),
            Choice::Wait(_)
        ));
        tokio::time::advance(TRANSIENT_PAUSE).await;
        assert_eq!(chosen(&set, 0).1, "a");
        // The second failure in a row pauses twice as long.
        set.failed(a, &transient, crate::clock::now());
        set.failed(b, &transient, crate::clock::now());
        tokio::time::advance(TRANSIENT_PAUSE).await;
        assert!(matches!(
            set.choose(0, crate::clock::now()),
            Choice::Wait(_)
        ));
        tokio::time::advance(TRANSIENT_PAUSE).await;
        set.succeeded(a);
        assert_eq!(chosen(&set, 0).1, "a");
        assert!(matches!(
            SourceSet::new(vec![]).choose(0, crate::clock::now()),
            Choice::Nobody
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn a_corrupt_chunk_is_asked_of_another() {
        let set = SourceSet::new(vec![named("a"), named("b")]);
        let (a, _) = chosen(&set, 5);
        set.sent_corrupt(a, 5);
        assert_eq!(
            (chosen(&set, 5).1.as_str(), chosen(&set, 6).1.as_str()),
            ("b", "a")
        );
        let (b, _) = chosen(&set, 5);
        set.sent_corrupt(b, 5);
        assert_eq!(chosen(&set, 5).1, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_is_added_again_starts_afresh() {
        let set = SourceSet::new(vec![named("a")]);
        let (a, _) = chosen(&set, 0);
        set.failed(
            a,
            &failure(SourceError::NoSource { blob: "x".into() }),
            crate::clock::now(),
        );
        assert!(matches!(
            set.choose(0, crate::clock::now()),
            Choice::Wait(_)
        ));
        set.add(named("a"));
        assert_eq!(chosen(&set, 0), (a, "a".to_owned()));
    }
}
