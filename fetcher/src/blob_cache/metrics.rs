// SPDX-License-Identifier: Apache-2.0
//! What the blob cache counts.
//!
//! | name | labels | unit | what |
//! | --- | --- | --- | --- |
//! | `mirror_bytes` | source | bytes | `cache`: read from what was here when the reader came; `peer`, `origin`: arrived from there |
//! | `mirror_bad_blobs` | | | blobs that were complete and had another digest |
//! | `mirror_evicted_blobs` | | | blobs taken away for the budget |
//! | `mirror_uncached_reads` | | | reads that went past the cache: no room, no disk, or bytes that the reader must not be shown yet |
//! | `mirror_held_bytes` | | bytes | what the kept blobs count for (gauge) |

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

/// Where bytes that were read came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Cache,
    Node,
    Origin,
}

impl From {
    const fn word(self) -> &'static str {
        match self {
            From::Cache => "cache",
            From::Node => "peer",
            From::Origin => "origin",
        }
    }
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct BlobMetrics {
    bytes: Family<SourceLabel, Counter>,
    bad: Counter,
    evicted: Counter,
    uncached: Counter,
    held: Gauge,
}

impl BlobMetrics {
    /// Makes them visible.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "mirror",
            "Bytes of blobs that the mirror read, by where they came from",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "mirror_bad_blobs",
            "Blobs that were complete and had another digest",
            self.bad.clone(),
        );
        registry.register(
            "mirror_evicted_blobs",
            "Blobs taken away for the budget",
            self.evicted.clone(),
        );
        registry.register(
            "mirror_uncached_reads",
            "Reads that went past the cache",
            self.uncached.clone(),
        );
        registry.register_with_unit(
            "mirror_held",
            "What the kept blobs count for",
            Unit::Bytes,
            self.held.clone(),
        );
    }

    /// Bytes by source: `cache`, `peer` or `origin`.
    #[must_use]
    pub fn bytes_from(&self, source: &'static str) -> u64 {
        self.bytes.get_or_create(&SourceLabel { source }).get()
    }

    /// Blobs that were complete and had another digest.
    #[must_use]
    pub fn bad_blobs(&self) -> u64 {
        self.bad.get()
    }

    /// Reads that went past the cache.
    #[must_use]
    pub fn uncached_reads(&self) -> u64 {
        self.uncached.get()
    }

    pub(super) fn came(&self, source: From, bytes: u64) {
        let source = source.word();
        self.bytes
            .get_or_create(&SourceLabel { source })
            .inc_by(bytes);
    }

    pub(super) fn bad(&self) {
        self.bad.inc();
    }

    pub(super) fn evicted(&self) {
        self.evicted.inc();
    }

    pub(super) fn uncached(&self) {
        self.uncached.inc();
    }

    pub(super) fn held(&self, bytes: u64) {
        self.held.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
