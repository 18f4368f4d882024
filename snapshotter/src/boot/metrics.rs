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

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
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

    pub(super) fn ignored(&self, reason: &'static str) {
        self.ignored.get_or_create(&Reason { reason }).inc();
    }
}
