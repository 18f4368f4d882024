// SPDX-License-Identifier: Apache-2.0
//! Metrics of the snapshots service. `docs/METRICS.md` is the list.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use sluice_fetcher::steps::Steps;

/// What became of a Prepare with `containerd.io/snapshot.ref`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum PrepareOutcome {
    /// Committed as a lazy layer.
    Lazy,
    /// Answered by a snapshot that existed.
    Existing,
    /// Unpacked here.
    Unpacked,
    /// Left to containerd, with a reason from the lazy side.
    Ordinary,
    /// Left to containerd because the budget was spent.
    BudgetSpent,
    /// Left to containerd because the unpack failed.
    UnpackFailed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PrepareLabels {
    outcome: PrepareOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

/// Upper bounds in seconds: a transaction takes milliseconds, a Prepare up to its budget.
const BUCKETS: [f64; 9] = [0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0];

/// Handle to the metrics of the snapshots service; cheap to clone.
#[derive(Debug, Clone)]
pub struct SnapshotMetrics {
    prepares: Family<PrepareLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    seconds: Family<MethodLabels, Histogram, fn() -> Histogram>,
    steps: Steps,
}

impl Default for SnapshotMetrics {
    fn default() -> Self {
        Self {
            prepares: Family::default(),
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            steps: Steps::default(),
        }
    }
}

impl SnapshotMetrics {
    /// Makes metrics that the registry shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "sluice_prepares",
            "Prepares that named a chain ID, by what became of them",
            metrics.prepares.clone(),
        );
        registry.register(
            "sluice_snapshots_requests",
            "Requests to the snapshots service, by method and gRPC code",
            metrics.requests.clone(),
        );
        registry.register(
            "sluice_snapshots_request_seconds",
            "Time to answer a request to the snapshots service",
            metrics.seconds.clone(),
        );
        metrics
    }

    /// Has requests entered into these steps, which somebody watches.
    #[must_use]
    pub fn watched_by(self, steps: Steps) -> Self {
        Self { steps, ..self }
    }

    /// What is under way.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    /// Counts a Prepare.
    pub fn prepared(&self, outcome: PrepareOutcome) {
        self.prepares
            .get_or_create(&PrepareLabels { outcome })
            .inc();
    }

    /// Counts a request.
    pub fn requested(&self, method: &'static str, code: String, took: Duration) {
        self.requests
            .get_or_create(&RequestLabels { method, code })
            .inc();
        self.seconds
            .get_or_create(&MethodLabels { method })
            .observe(took.as_secs_f64());
    }
}
