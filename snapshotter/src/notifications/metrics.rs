// SPDX-License-Identifier: Apache-2.0
//! What is counted of notifications.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct NotificationMetrics {
    events: Family<Outcome, Counter>,
}

impl NotificationMetrics {
    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Events of registries, by what became of them";
        registry.register("notifications", help, self.events.clone());
    }

    pub(super) fn count(&self, outcome: &'static str) {
        self.events.get_or_create(&Outcome { outcome }).inc();
    }

    #[cfg(test)]
    pub(super) fn counted(&self, outcome: &'static str) -> u64 {
        self.events.get_or_create(&Outcome { outcome }).get()
    }
}
