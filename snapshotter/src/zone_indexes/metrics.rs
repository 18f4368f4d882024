// SPDX-License-Identifier: Apache-2.0
//! What goes round of indexes, counted.
//!
//! | name | labels | what |
//! | --- | --- | --- |
//! | `zone_index_asks` | answer | indexes of blobs that other nodes were asked for |
//! | `zone_indexes_told` | | homes that took word of an index that was made here |
//! | `tree_checks` | result | indexes of others whose trees were held against complete layers |
//! | `zone_indexes_taken` | | indexes that were fetched of who made them, for other nodes |

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    answer: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Proven {
    result: &'static str,
}

/// What came of asking other nodes for an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It came.
    Given,
    /// Nobody has one.
    Nobody,
    /// What came was no index of the blob.
    Refused,
    /// It broke off, or could not be kept.
    Failed,
    /// It did not come in time.
    Late,
}

impl Answer {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Nobody => "nobody",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Late => "late",
        }
    }
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct ZoneIndexMetrics {
    asks: Family<Answered, Counter>,
    proven: Family<Proven, Counter>,
    told: Counter,
    taken: Counter,
}

impl ZoneIndexMetrics {
    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Indexes of unmodified blobs that other nodes were asked for";
        registry.register("zone_index_asks", help, self.asks.clone());
        let help = "Homes that took word of an index that was made here";
        registry.register("zone_indexes_told", help, self.told.clone());
        let help = "Trees of other nodes' and pushed indexes held against complete layers";
        registry.register("tree_checks", help, self.proven.clone());
        let help = "Indexes fetched of who made them, for other nodes";
        registry.register("zone_indexes_taken", help, self.taken.clone());
    }

    pub(super) fn asked(&self, answer: Answer) {
        let answer = answer.as_str();
        self.asks.get_or_create(&Answered { answer }).inc();
    }

    pub(super) fn proven(&self, same: bool) {
        let result = if same { "same" } else { "differs" };
        self.proven.get_or_create(&Proven { result }).inc();
    }

    #[cfg(test)]
    pub(super) fn answers(&self, answer: Answer) -> u64 {
        let answer = answer.as_str();
        self.asks.get_or_create(&Answered { answer }).get()
    }

    pub(super) fn told(&self, homes: usize) {
        self.told.inc_by(u64::try_from(homes).unwrap_or(u64::MAX));
    }

    pub(super) fn taken(&self) {
        self.taken.inc();
    }
}
