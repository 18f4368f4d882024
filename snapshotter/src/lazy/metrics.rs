// SPDX-License-Identifier: Apache-2.0
//! What the lazy side counts.
//!
//! | name | labels | what |
//! | --- | --- | --- |
//! | `refused_layers` | reason | why layers were not lazy |
//! | `index_fetches` | | indexes fetched from a registry |
//! | `index_bytes` | | compressed bytes of these |
//! | `node_indexes` | result | layers that this node looked at to index them |
//! | `whole_layers`, `whole_bytes` | | layers pulled whole on purpose, and their bytes |
//! | `lazy_layers` | index | layers made lazy, by where their index came from |

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

use crate::plan::RefusalKind;
use crate::snapshots::IndexSource;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Source {
    index: &'static str,
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct LazyMetrics {
    refused: Family<Reason, Counter>,
    index_fetches: Counter,
    index_bytes: Counter,
    indexed: Family<Outcome, Counter>,
    lazy: Family<Source, Counter>,
    whole_layers: Counter,
    whole_bytes: Counter,
}

impl LazyMetrics {
    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "refused_layers",
            "Layers not made lazy",
            self.refused.clone(),
        );
        registry.register(
            "index_fetches",
            "Indexes fetched",
            self.index_fetches.clone(),
        );
        registry.register(
            "node_indexes",
            "Layers looked at to index them",
            self.indexed.clone(),
        );
        registry.register("lazy_layers", "Layers made lazy", self.lazy.clone());
        let help = "Layers pulled whole on purpose";
        registry.register("whole_layers", help, self.whole_layers.clone());
        let help = "Compressed bytes of layers pulled whole on purpose";
        registry.register_with_unit("whole", help, Unit::Bytes, self.whole_bytes.clone());
        let help = "Compressed bytes of fetched indexes";
        registry.register_with_unit("index", help, Unit::Bytes, self.index_bytes.clone());
    }

    pub(super) fn refused(&self, kind: RefusalKind) {
        self.refused
            .get_or_create(&Reason {
                reason: kind.as_str(),
            })
            .inc();
    }

    /// A layer of so many compressed bytes is pulled whole on purpose.
    pub(super) fn whole(&self, blob_bytes: u64) {
        self.whole_layers.inc();
        self.whole_bytes.inc_by(blob_bytes);
    }

    pub(super) fn indexed(&self, result: &'static str) {
        self.indexed.get_or_create(&Outcome { result }).inc();
    }

    /// How many jobs ended so.
    #[cfg(test)]
    pub(super) fn indexed_so_far(&self, result: &'static str) -> u64 {
        self.indexed.get_or_create(&Outcome { result }).get()
    }

    pub(super) fn lazy(&self, source: IndexSource) {
        let index = source.as_str();
        self.lazy.get_or_create(&Source { index }).inc();
    }

    pub(super) fn index_fetched(&self, bytes: u64) {
        self.index_fetches.inc();
        self.index_bytes.inc_by(bytes);
    }

    /// Compressed bytes of all indexes fetched so far.
    #[must_use]
    pub fn fetched_index_bytes(&self) -> u64 {
        self.index_bytes.get()
    }
}
