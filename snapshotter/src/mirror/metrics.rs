// SPDX-License-Identifier: Apache-2.0
//! What the mirror counts. `docs/METRICS.md` is the list.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v2/`.
    Version,
    /// A manifest by tag.
    Tag,
    /// A manifest by digest.
    Manifest,
    /// A blob.
    Blob,
    /// Lists, referrers, what is none of ours.
    Other,
}

impl Kind {
    /// The word in metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Version => "version",
            Kind::Tag => "tag",
            Kind::Manifest => "manifest",
            Kind::Blob => "blob",
            Kind::Other => "other",
        }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// From what is kept, without a question.
    Cached,
    /// From what is kept, after the registry said that it holds.
    Unchanged,
    /// From the registry, or on its way from somewhere.
    Fetched,
    /// From what is kept, because the registry cannot be asked.
    Stale,
    /// Passed on as it is.
    Passed,
    /// The registry did not let the client in.
    Denied,
    /// The registry does not have it.
    NotFound,
    /// The registry cannot be asked, and nothing is kept that could be served.
    Unavailable,
    /// No request that is answered.
    Refused,
}

impl Outcome {
    /// The word in metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Cached => "cached",
            Outcome::Unchanged => "unchanged",
            Outcome::Fetched => "fetched",
            Outcome::Stale => "stale",
            Outcome::Passed => "passed",
            Outcome::Denied => "denied",
            Outcome::NotFound => "not_found",
            Outcome::Unavailable => "unavailable",
            Outcome::Refused => "refused",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    kind: &'static str,
    result: &'static str,
}

/// The counters. Clones count into the same ones.
#[derive(Clone, Debug, Default)]
pub struct MirrorMetrics {
    requests: Family<RequestLabels, Counter>,
    stale: Counter,
    denied: Counter,
}

impl MirrorMetrics {
    /// Makes them visible.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "mirror_requests",
            "Requests to the mirror, by what was asked and what came of it",
            self.requests.clone(),
        );
        registry.register(
            "mirror_stale_served",
            "Answers from what is kept while the registry could not be asked",
            self.stale.clone(),
        );
        registry.register(
            "mirror_access_denied",
            "Requests for what is kept that no proof of access speaks for, or that the registry denied",
            self.denied.clone(),
        );
    }

    /// Counts a request.
    pub(super) fn answered(&self, kind: Kind, outcome: Outcome) {
        let labels = RequestLabels {
            kind: kind.as_str(),
            result: outcome.as_str(),
        };
        self.requests.get_or_create(&labels).inc();
        match outcome {
            Outcome::Stale => {
                self.stale.inc();
            }
            Outcome::Denied => self.denied(),
            _ => {}
        }
    }

    /// Counts a client that may not have what is kept.
    pub(super) fn denied(&self) {
        self.denied.inc();
    }

    /// Requests of a kind with this outcome.
    #[must_use]
    pub fn requests(&self, kind: Kind, outcome: Outcome) -> u64 {
        let labels = RequestLabels {
            kind: kind.as_str(),
            result: outcome.as_str(),
        };
        self.requests.get_or_create(&labels).get()
    }

    /// Answers while the registry could not be asked.
    #[must_use]
    pub fn stale_served(&self) -> u64 {
        self.stale.get()
    }

    /// Clients that may not have what is kept.
    #[must_use]
    pub fn access_denied(&self) -> u64 {
        self.denied.get()
    }
}
