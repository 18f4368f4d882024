// SPDX-License-Identifier: Apache-2.0
//! What the fetcher counts. A handle that is passed in; there is no global registry.
//!
//! | name | labels | unit | what |
//! | --- | --- | --- | --- |
//! | `fetched_bytes` | source, priority | bytes | compressed bytes that arrived, wanted or not |
//! | `fetch_requests` | source, priority | | requests opened |
//! | `fetch_failures` | source, class | | requests that failed, before or within the body |
//! | `fetch_pauses` | source | | times that a mirror or Dragonfly began to be left alone |
//! | `fetch_stalls` | source | | of these, because no byte came for too long |
//! | `corrupt_chunks` | source | | chunks dropped because they were not what the index says |
//! | `committed_chunks` | source | | chunks that became present, by where they came from |
//! | `fill_duration_seconds` | priority | seconds | how long a fill took that had to wait |
//! | `fill_failures` | reason | | fills that failed, each an error at a reader |
//! | `registry_events` | event | | what registries did that costs a request more: `token_expired`, `redirect_expired`, `ranges_ignored` |
//! | `passed_chunks` | reason | | chunks that readers got past the store, which did not take them |
//! | `hedged_requests` | | | requests made to a second node because the first was silent |
//! | `home_bypasses` | | | requests to the origin for pieces whose home is another node |
//! | `peer_busy` | | | answers of other nodes that had no free upload slot |
//! | `peer_served_bytes` | form | bytes | bytes of chunks given to other nodes |
//! | `peer_requests_refused` | reason | | requests of other nodes that were not served |
//! | `sealed_layers` | | | layers found equal to their diff ID |
//! | `seal_failures` | | | layers found to be something else |
//! | `evicted_layers` | | | layer devices taken away for the budget or on a full disk |
//! | `evicted_bytes` | | bytes | what they took |
//! | `store_held_bytes` | | bytes | what the store took when it was last looked at (gauge) |
//! | `store_pinned_bytes` | | bytes | of these, in use by mounts or containers (gauge) |

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::source::{Class, Priority, SourceKind};
use crate::steps::Steps;

/// Where bytes came from, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Flow {
    source: &'static str,
    priority: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    source: &'static str,
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PriorityLabel {
    priority: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FormLabel {
    form: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabel {
    event: &'static str,
}

/// Bytes that need no request: chunks of the store itself that were checked or copied.
pub(crate) const FROM_STORE: &str = "store";

/// From 1 ms (a local registry) doubling to 131 s (half of the default read deadline).
fn fill_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug)]
pub struct Metrics {
    fetched_bytes: Family<Flow, Counter>,
    requests: Family<Flow, Counter>,
    failures: Family<FailureLabels, Counter>,
    stalls: Family<SourceLabel, Counter>,
    pauses: Family<SourceLabel, Counter>,
    corrupt: Family<SourceLabel, Counter>,
    committed: Family<SourceLabel, Counter>,
    fill_seconds: Family<PriorityLabel, Histogram, fn() -> Histogram>,
    fill_failures: Family<ReasonLabel, Counter>,
    passed: Family<ReasonLabel, Counter>,
    registry_events: Family<EventLabel, Counter>,
    hedged: Counter,
    peer_busy: Counter,
    bypassed: Counter,
    served: Family<FormLabel, Counter>,
    refusals: Family<ReasonLabel, Counter>,
    sealed: Counter,
    seal_failures: Counter,
    evicted: Counter,
    evicted_bytes: Counter,
    held: Gauge,
    pinned: Gauge,
    steps: Steps,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            fetched_bytes: Family::default(),
            requests: Family::default(),
            failures: Family::default(),
            stalls: Family::default(),
            pauses: Family::default(),
            corrupt: Family::default(),
            committed: Family::default(),
            fill_seconds: Family::new_with_constructor(fill_buckets),
            fill_failures: Family::default(),
            passed: Family::default(),
            registry_events: Family::default(),
            hedged: Counter::default(),
            peer_busy: Counter::default(),
            bypassed: Counter::default(),
            served: Family::default(),
            refusals: Family::default(),
            sealed: Counter::default(),
            seal_failures: Counter::default(),
            evicted: Counter::default(),
            evicted_bytes: Counter::default(),
            held: Gauge::default(),
            pinned: Gauge::default(),
            steps: Steps::default(),
        }
    }
}

/// The word for a priority in metrics and logs.
pub(crate) const fn priority_word(priority: Priority) -> &'static str {
    match priority {
        Priority::Foreground => "foreground",
        Priority::Boot => "boot",
        Priority::Background => "background",
    }
}

const fn class_word(class: Class) -> &'static str {
    match class {
        Class::Transient => "transient",
        Class::Permanent => "permanent",
        Class::Cancelled => "cancelled",
        Class::Corrupt => "corrupt",
    }
}

impl Metrics {
    /// Counters that nobody exports yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// As [`Self::new`]; what may get stuck is entered into `steps`, which are registered apart.
    pub fn watched(steps: Steps) -> Self {
        Self {
            steps,
            ..Self::default()
        }
    }

    /// What is under way.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        let bytes = "Compressed bytes that arrived";
        registry.register_with_unit("fetched", bytes, Unit::Bytes, self.fetched_bytes.clone());
        registry.register("fetch_requests", "Requests opened", self.requests.clone());
        registry.register(
            "fetch_failures",
            "Requests that failed",
            self.failures.clone(),
        );
        registry.register(
            "fetch_stalls",
            "Transfers without a byte for too long",
            self.stalls.clone(),
        );
        registry.register(
            "fetch_pauses",
            "Times that a mirror began to be left alone",
            self.pauses.clone(),
        );
        registry.register(
            "corrupt_chunks",
            "Chunks dropped as corrupt",
            self.corrupt.clone(),
        );
        registry.register(
            "committed_chunks",
            "Chunks made present",
            self.committed.clone(),
        );
        let fill = "Time of fills that had to wait";
        registry.register_with_unit(
            "fill_duration",
            fill,
            Unit::Seconds,
            self.fill_seconds.clone(),
        );
        registry.register(
            "fill_failures",
            "Fills that failed",
            self.fill_failures.clone(),
        );
        let events = "What registries did that costs a request more";
        registry.register("registry_events", events, self.registry_events.clone());
        let passed = "Chunks that readers got past the store";
        registry.register("passed_chunks", passed, self.passed.clone());
        let hedged = "Requests made to a second node";
        registry.register("hedged_requests", hedged, self.hedged.clone());
        let busy = "Answers of nodes without a free slot";
        registry.register("peer_busy", busy, self.peer_busy.clone());
        let bypassed = "Requests to the origin for pieces of other homes";
        registry.register("home_bypasses", bypassed, self.bypassed.clone());
        let served = "Bytes given to other nodes";
        registry.register_with_unit("peer_served", served, Unit::Bytes, self.served.clone());
        let refusals = "Requests of nodes that were not served";
        registry.register("peer_requests_refused", refusals, self.refusals.clone());
        registry.register(
            "sealed_layers",
            "Layers found equal to their diff ID",
            self.sealed.clone(),
        );
        let failed = "Layers found not to be what they claim";
        registry.register("seal_failures", failed, self.seal_failures.clone());
        let evicted = "Layer devices evicted";
        registry.register("evicted_layers", evicted, self.evicted.clone());
        let held = "Bytes that the store takes";
        registry.register_with_unit("store_held", held, Unit::Bytes, self.held.clone());
        let pinned = "Bytes of the store that are in use";
        registry.register_with_unit("store_pinned", pinned, Unit::Bytes, self.pinned.clone());
        let bytes = "Bytes of evicted layer devices";
        registry.register_with_unit("evicted", bytes, Unit::Bytes, self.evicted_bytes.clone());
    }

    fn flow(source: SourceKind, priority: Priority) -> Flow {
        Flow {
            source: source.as_str(),
            priority: priority_word(priority),
        }
    }

    pub(crate) fn arrived(&self, source: SourceKind, priority: Priority, bytes: u64) {
        self.fetched_bytes
            .get_or_create(&Self::flow(source, priority))
            .inc_by(bytes);
    }

    pub(crate) fn requested(&self, source: SourceKind, priority: Priority) {
        self.requests
            .get_or_create(&Self::flow(source, priority))
            .inc();
    }

    pub(crate) fn failed(&self, source: SourceKind, class: Class) {
        let labels = FailureLabels {
            source: source.as_str(),
            class: class_word(class),
        };
        self.failures.get_or_create(&labels).inc();
    }

    pub(crate) fn stalled(&self, source: SourceKind) {
        self.stalls
            .get_or_create(&SourceLabel {
                source: source.as_str(),
            })
            .inc();
    }

    pub(crate) fn left_alone(&self, source: SourceKind) {
        self.pauses
            .get_or_create(&SourceLabel {
                source: source.as_str(),
            })
            .inc();
    }

    pub(crate) fn corrupt(&self, source: &'static str) {
        self.corrupt.get_or_create(&SourceLabel { source }).inc();
    }

    pub(crate) fn committed(&self, source: &'static str) {
        self.committed.get_or_create(&SourceLabel { source }).inc();
    }

    pub(crate) fn filled(&self, priority: Priority, after: std::time::Duration) {
        let label = PriorityLabel {
            priority: priority_word(priority),
        };
        self.fill_seconds
            .get_or_create(&label)
            .observe(after.as_secs_f64());
    }

    pub(crate) fn fill_failed(&self, reason: &'static str) {
        self.fill_failures
            .get_or_create(&ReasonLabel { reason })
            .inc();
    }

    pub(crate) fn registry_did(&self, event: &'static str) {
        self.registry_events
            .get_or_create(&EventLabel { event })
            .inc();
    }

    pub(crate) fn passed(&self, reason: &'static str) {
        self.passed.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn hedged(&self) {
        self.hedged.inc();
    }

    pub(crate) fn peer_busy(&self) {
        self.peer_busy.inc();
    }

    pub(crate) fn bypassed(&self) {
        self.bypassed.inc();
    }

    pub(crate) fn served(&self, form: &'static str, bytes: u64) {
        self.served.get_or_create(&FormLabel { form }).inc_by(bytes);
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Answers of other nodes that had no free slot.
    pub fn busy_answers(&self) -> u64 {
        self.peer_busy.get()
    }

    /// Requests at `source` that failed in this way.
    pub fn failures(&self, source: SourceKind, class: Class) -> u64 {
        let labels = FailureLabels {
            source: source.as_str(),
            class: class_word(class),
        };
        self.failures.get_or_create(&labels).get()
    }

    /// Bytes of chunks given to other nodes.
    pub fn served_bytes(&self) -> u64 {
        let forms = ["raw", "frame", "zstd"];
        let of = |form| self.served.get_or_create(&FormLabel { form }).get();
        forms.into_iter().map(of).sum()
    }

    pub(crate) fn sealed(&self, well: bool) {
        if well {
            self.sealed.inc()
        } else {
            self.seal_failures.inc()
        };
    }

    pub(crate) fn evicted(&self, bytes: u64) {
        self.evicted.inc();
        self.evicted_bytes.inc_by(bytes);
    }

    pub(crate) fn store_holds(&self, held_bytes: u64, pinned_bytes: u64) {
        let gauge = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.held.set(gauge(held_bytes));
        self.pinned.set(gauge(pinned_bytes));
    }

    /// Layer devices that were evicted, and the bytes that they took.
    pub fn evictions(&self) -> (u64, u64) {
        (self.evicted.get(), self.evicted_bytes.get())
    }

    /// Compressed bytes that arrived from `source` for `priority`.
    pub fn fetched_bytes(&self, source: SourceKind, priority: Priority) -> u64 {
        self.fetched_bytes
            .get_or_create(&Self::flow(source, priority))
            .get()
    }

    /// Requests opened at `source` for `priority`.
    pub fn requests(&self, source: SourceKind, priority: Priority) -> u64 {
        self.requests
            .get_or_create(&Self::flow(source, priority))
            .get()
    }

    /// Chunks from `source` that were dropped as corrupt.
    pub fn corrupt_chunks(&self, source: SourceKind) -> u64 {
        self.corrupt
            .get_or_create(&SourceLabel {
                source: source.as_str(),
            })
            .get()
    }

    /// Transfers from `source` on which no byte came for too long.
    pub fn stalls(&self, source: SourceKind) -> u64 {
        self.stalls
            .get_or_create(&SourceLabel {
                source: source.as_str(),
            })
            .get()
    }

    /// Times that a mirror, or Dragonfly, began to be left alone.
    pub fn pauses(&self, source: SourceKind) -> u64 {
        self.pauses
            .get_or_create(&SourceLabel {
                source: source.as_str(),
            })
            .get()
    }

    /// Layers that were sealed, and layers that were found not to be what they claim.
    pub fn seals(&self) -> (u64, u64) {
        (self.sealed.get(), self.seal_failures.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_exported_under_their_names() {
        let metrics = Metrics::new();
        let mut registry = Registry::with_prefix("sluice");
        metrics.register(&mut registry);
        metrics.arrived(SourceKind::Origin, Priority::Foreground, 7);
        metrics.corrupt(SourceKind::Peer.as_str());
        metrics.sealed(true);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"sluice_fetched_bytes_total{source="origin",priority="foreground"} 7"#,
            r#"sluice_corrupt_chunks_total{source="peer"} 1"#,
            "sluice_sealed_layers_total 1",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
