// SPDX-License-Identifier: Apache-2.0
//! What is measured in a run.

use serde::Serialize;

/// Percentiles of a time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half were not slower.
    pub p50: f64,
    /// 95 % were not slower.
    pub p95: f64,
    /// 99 % were not slower.
    pub p99: f64,
    /// Nobody was slower.
    pub max: f64,
}

impl Percentiles {
    /// Of these times, by nearest rank; zeros when there are none.
    #[must_use]
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100);
            times.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Percentiles {
            p50: rank(50),
            p95: rank(95),
            p99: rank(99),
            max: rank(100),
        }
    }
}

/// Counts of what the nodes did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Fetches from other nodes or the registry.
    pub fetches: u64,
    /// Requests to other nodes.
    pub asked: u64,
    /// Of these, answered "busy, ask these".
    pub busy: u64,
    /// Of these, for something that was not there.
    pub lacked: u64,
    /// Searches that found nobody and waited for another round.
    pub waits: u64,
    /// Second requests because an answer was late.
    pub hedged: u64,
    /// Requests to the origin as a home.
    pub origin: u64,
    /// Requests to the origin because no home helped.
    pub fallbacks: u64,
    /// Feeders that died.
    pub lost: u64,
    /// Feeders that sent nothing for too long.
    pub stalled: u64,
    /// Most hops from the origin.
    pub hops: u32,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Nodes that started the image, those that died included.
    pub nodes: u32,
    /// Containers on each.
    pub containers: u32,
    /// Zones.
    pub zones: u32,
    /// Bytes that left the registry for starts.
    pub egress_start: u64,
    /// Bytes that left the registry in all.
    pub egress: u64,
    /// `egress_start` as a multiple of what one start fetches.
    pub starts: f64,
    /// `egress` as a multiple of the image; 0 when nothing is fetched in the background.
    pub images: f64,
    /// From the beginning until a container has read what it starts with.
    pub start: Percentiles,
    /// From the beginning until a node has the whole image.
    pub complete: Percentiles,
    /// Bytes that the busiest node sent.
    pub sent_max: u64,
    /// Bytes that a node sent on average.
    pub sent_mean: u64,
    /// What the nodes did.
    pub counts: Counts,
    /// Containers and nodes that did not finish: 0, unless something is wrong.
    pub unfinished: u64,
    /// Events of the run.
    pub events: u64,
}

impl Figures {
    /// Requests to other nodes for each fetch: the way down the tree.
    #[must_use]
    pub fn asked_per_fetch(&self) -> f64 {
        let counts = &self.counts;
        counts.asked as f64 / counts.fetches.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let times: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let expected = Percentiles {
            p50: 100.0,
            p95: 190.0,
            p99: 198.0,
            max: 200.0,
        };
        assert_eq!(Percentiles::of(times), expected);
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
        assert_eq!(Percentiles::of(vec![7.0]).p50, 7.0);
    }
}
