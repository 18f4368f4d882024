// SPDX-License-Identifier: Apache-2.0
//! What the cluster side counts. A handle that is passed in; `docs/METRICS.md` is the list.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct ClusterMetrics {
    refusals: Family<ReasonLabel, Counter>,
    tls_reloads: Counter,
    tls_reload_failures: Counter,
}

impl ClusterMetrics {
    /// Counters that nobody exports yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "peer_refusals",
            "Connections of peers that were refused",
            self.refusals.clone(),
        );
        registry.register(
            "peer_tls_reloads",
            "Times that new TLS files were taken",
            self.tls_reloads.clone(),
        );
        registry.register(
            "peer_tls_reload_failures",
            "Times that new TLS files were no good",
            self.tls_reload_failures.clone(),
        );
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(super) fn reloaded(&self, well: bool) {
        if well {
            self.tls_reloads.inc();
        } else {
            self.tls_reload_failures.inc();
        }
    }

    /// Connections refused for `reason`: `network`, `handshake` or `deadline`.
    #[must_use]
    pub fn refusals(&self, reason: &'static str) -> u64 {
        self.refusals.get_or_create(&ReasonLabel { reason }).get()
    }

    /// Times that new TLS files were taken, and times that they were no good.
    #[must_use]
    pub fn tls_reloads(&self) -> (u64, u64) {
        (self.tls_reloads.get(), self.tls_reload_failures.get())
    }
}
