// SPDX-License-Identifier: Apache-2.0
//! What is counted of steps. Names of steps are those of kinds: there are some dozens.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabel {
    step: String,
}

impl StepLabel {
    fn of(step: &str) -> Self {
        Self { step: step.into() }
    }
}

#[derive(Debug, Default)]
pub(super) struct StepMetrics {
    found: Family<StepLabel, Counter>,
    now: Family<StepLabel, Gauge>,
    unwatched: Counter,
}

impl StepMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let found = "Steps that stood for longer than their limit";
        registry.register("stuck_steps", found, self.found.clone());
        // Not the counter's name: in OpenMetrics they would be one family of two kinds.
        let now = "Steps that stand for longer than their limit now";
        registry.register("stuck_steps_now", now, self.now.clone());
        let unwatched = "Steps that nobody watched: too many stood";
        registry.register("unwatched_steps", unwatched, self.unwatched.clone());
    }

    pub(super) fn found(&self, step: &str) {
        self.found.get_or_create(&StepLabel::of(step)).inc();
        self.now.get_or_create(&StepLabel::of(step)).inc();
    }

    pub(super) fn ended(&self, step: &str) {
        self.now.get_or_create(&StepLabel::of(step)).dec();
    }

    pub(super) fn unwatched(&self) {
        self.unwatched.inc();
    }

    pub(super) fn found_so_far(&self, step: &str) -> u64 {
        self.found.get_or_create(&StepLabel::of(step)).get()
    }

    pub(super) fn stuck_now(&self, step: &str) -> i64 {
        self.now.get_or_create(&StepLabel::of(step)).get()
    }
}
