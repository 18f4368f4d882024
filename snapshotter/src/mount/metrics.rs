// SPDX-License-Identifier: Apache-2.0
//! What is counted of mounts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use sluice_fetcher::steps::Steps;

use super::Backend;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByBackend {
    backend: &'static str,
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct MountMetrics {
    made: Family<ByBackend, Counter>,
    fallbacks: Counter,
    steps: Steps,
}

impl MountMetrics {
    /// Counts nothing yet; what may get stuck is entered into `steps`.
    #[must_use]
    pub fn watched(steps: Steps) -> Self {
        Self {
            steps,
            ..Self::default()
        }
    }

    /// What is under way.
    pub(super) fn steps(&self) -> &Steps {
        &self.steps
    }

    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("mounts_made", "Mounts made", self.made.clone());
        registry.register(
            "mount_fallbacks",
            "Mounts made over FUSE because the kernel refused",
            self.fallbacks.clone(),
        );
    }

    /// A mount was made.
    pub(super) fn made(&self, backend: Backend) {
        let backend = backend.as_str();
        self.made.get_or_create(&ByBackend { backend }).inc();
    }

    /// The kernel refused one that it should have made.
    pub(super) fn fell_back(&self) {
        self.fallbacks.inc();
    }

    /// How often a mount was made with this back-end.
    #[must_use]
    pub fn made_with(&self, backend: Backend) -> u64 {
        let backend = backend.as_str();
        self.made.get_or_create(&ByBackend { backend }).get()
    }
}
