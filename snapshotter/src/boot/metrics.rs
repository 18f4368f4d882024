// SPDX-License-Identifier: Apache-2.0
//! What boot lists do, counted.
//!
//! | name | labels | what |
//! | --- | --- | --- |
//! | `boot_bursts` | | lists that were loaded, as far as something was missing |
//! | `boot_loaded_chunks`, `boot_loaded_bytes` | | chunks that they brought, and their compressed bytes |
//! | `boot_read_chunks`, `boot_read_bytes` | | of these, what was read in the window of a start |
//! | `boot_recordings` | | starts that were recorded |
//! | `boot_lists_off` | | lists that were turned off |
//! | `boot_lists_ignored` | reason | lists from outside that could not be used |
//! | `boot_list_asks` | answer | askings of other nodes for a list |
//! | `boot_lists_given` | | lists given to other nodes |
//! | `boot_lists_told` | | homes that took what was learnt here |
//! | `boot_lists_taken` | | lists that other nodes told |

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    answer: &'static str,
}

/// What came of asking other nodes for a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// One came.
    Given,
    /// Nobody had one.
    Nobody,
    /// One came that could not be used.
    Refused,
    /// Nothing came in time.
    Late,
}

impl Answer {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Nobody => "nobody",
            Self::Refused => "refused",
            Self::Late => "late",
        }
    }
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct BootMetrics {
    bursts: Counter,
    loaded_chunks: Counter,
    loaded_bytes: Counter,
    read_chunks: Counter,
    read_bytes: Counter,
    recordings: Counter,
    off: Counter,
    ignored: Family<Reason, Counter>,
    asks: Family<Answered, Counter>,
    given: Counter,
    told: Counter,
    taken: Counter,
}

impl BootMetrics {
    /// Exports the counters through `registry`, which adds its own prefix.
    pub fn register(&self, registry: &mut Registry) {
        let mut count = |name: &str, help: &str, counter: &Counter| {
            registry.register(name, help, counter.clone());
        };
        count("boot_bursts", "Boot lists loaded", &self.bursts);
        let loaded = "Chunks brought by boot lists";
        count("boot_loaded_chunks", loaded, &self.loaded_chunks);
        let read = "Chunks brought by boot lists and then read";
        count("boot_read_chunks", read, &self.read_chunks);
        count("boot_recordings", "Starts recorded", &self.recordings);
        count("boot_lists_off", "Boot lists turned off", &self.off);
        let given = "Boot lists given to other nodes";
        count("boot_lists_given", given, &self.given);
        let told = "Homes that took a boot list learnt here";
        count("boot_lists_told", told, &self.told);
        let taken = "Boot lists that other nodes told";
        count("boot_lists_taken", taken, &self.taken);
        let asks = "Askings of other nodes for a boot list";
        registry.register("boot_list_asks", asks, self.asks.clone());
        let ignored = "Boot lists that could not be used";
        registry.register("boot_lists_ignored", ignored, self.ignored.clone());
        let bytes = |registry: &mut Registry, name: &str, help: &str, counter: &Counter| {
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
        };
        let loaded = "Compressed bytes brought by boot lists";
        bytes(registry, "boot_loaded", loaded, &self.loaded_bytes);
        let read = "Compressed bytes brought by boot lists and then read";
        bytes(registry, "boot_read", read, &self.read_bytes);
    }

    pub(super) fn loaded(&self, chunks: u64, bytes: u64) {
        self.bursts.inc();
        self.loaded_chunks.inc_by(chunks);
        self.loaded_bytes.inc_by(bytes);
    }

    pub(super) fn recorded(&self, read_chunks: u64, read_bytes: u64) {
        self.recordings.inc();
        self.read_chunks.inc_by(read_chunks);
        self.read_bytes.inc_by(read_bytes);
    }

    pub(super) fn turned_off(&self) {
        self.off.inc();
    }

    pub(super) fn asked(&self, answer: Answer) {
        let answer = answer.as_str();
        self.asks.get_or_create(&Answered { answer }).inc();
    }

    pub(super) fn gave(&self) {
        self.given.inc();
    }

    pub(super) fn told(&self, homes: usize) {
        self.told.inc_by(u64::try_from(homes).unwrap_or(u64::MAX));
    }

    pub(super) fn took(&self) {
        self.taken.inc();
    }

    pub(super) fn ignored(&self, reason: &'static str) {
        self.ignored.get_or_create(&Reason { reason }).inc();
    }
}
