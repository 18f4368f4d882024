// SPDX-License-Identifier: Apache-2.0
//! What was measured, as it is kept.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::source::Source;
use super::way::{Cost, Way};
use crate::bench::report::Times;

/// The most of the pipeline's time that `sluice convert` may take.
pub const OF_PIPELINE: f64 = 1.15;
/// How many times as fast as the converter to eStargz it should be at least.
pub const OF_ESTARGZ: f64 = 8.0;
/// The memory that it must stay below.
pub const PEAK_BYTES: u64 = 512 << 20;
/// The most of gunzip's time that `sluice index` may take on one core: its speed, and what two runs differ by.
pub const OF_GUNZIP: f64 = 1.05;

/// All of a run, or of several.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Figures {
    /// By name of the image.
    pub images: BTreeMap<String, Measured>,
    /// What each way is, in which version, where it could be had.
    pub versions: BTreeMap<Way, String>,
    /// Which could not be had, and why.
    pub absent: BTreeMap<Way, String>,
}

/// One image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    /// Its layers, as gzip.
    pub gzip_bytes: u64,
    /// How many there are.
    pub layers: usize,
    /// The machine's average load in the last minute, by all that ran.
    pub load: f64,
    /// What each way took.
    pub ways: BTreeMap<Way, Figure>,
}

/// One way of one image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    /// Seconds.
    pub times: Times,
    /// The highest peak of its largest process in all rounds.
    pub peak_rss_bytes: u64,
    /// Bytes of what it made.
    pub output_bytes: Option<u64>,
}

impl Figure {
    /// Of all rounds.
    ///
    /// **Errors**: there are none.
    pub fn of(costs: &[Cost]) -> Result<Self> {
        let peaks = costs.iter().map(|cost| cost.peak_rss_bytes);
        Ok(Self {
            times: Times::of(costs.iter().map(|cost| cost.seconds).collect())?,
            peak_rss_bytes: peaks.max().context("nothing measured")?,
            output_bytes: costs.iter().find_map(|cost| cost.output_bytes),
        })
    }
}

impl Measured {
    /// Of an image, nothing yet.
    #[must_use]
    pub fn new(source: &Source) -> Self {
        Self {
            gzip_bytes: source.bytes,
            layers: source.layers.len(),
            load: 0.0,
            ways: BTreeMap::new(),
        }
    }

    /// A way's median by another's.
    #[must_use]
    pub fn ratio(&self, way: Way, reference: Way) -> Option<f64> {
        let median = |way| Some(self.ways.get(way)?.times.median_s);
        Some(median(&way)? / median(&reference)?)
    }

    /// Each goal: what it is of, the figure as text, and whether it is reached. Only what was measured.
    #[must_use]
    pub fn goals(&self) -> Vec<(&'static str, String, bool)> {
        let mut goals = Vec::new();
        let times = |ratio: f64| format!("{ratio:.2} times");
        if let Some(ratio) = self.ratio(Way::Sluice, Way::Pipeline) {
            let what = "convert: at most 1.15 times the pipeline's time";
            goals.push((what, times(ratio), ratio <= OF_PIPELINE));
        }
        if let Some(ratio) = self.ratio(Way::Estargz, Way::Sluice) {
            let what = "convert: at least 8 times as fast as to eStargz";
            goals.push((what, times(ratio), ratio >= OF_ESTARGZ));
        }
        if let Some(figure) = self.ways.get(&Way::Sluice) {
            if let Some(bytes) = figure.output_bytes {
                let share = bytes as f64 / self.gzip_bytes as f64;
                let what = "convert: layers no larger than gzip's";
                goals.push((what, times(share), bytes <= self.gzip_bytes));
            }
            let peak = figure.peak_rss_bytes;
            let mib = format!("{:.0} MiB", peak as f64 / f64::from(1 << 20));
            goals.push(("convert: peak RSS below 512 MiB", mib, peak < PEAK_BYTES));
        }
        if let Some(ratio) = self.ratio(Way::IndexOne, Way::Gunzip) {
            let what = "index, one layer at a time: as fast as gunzip";
            goals.push((what, times(ratio), ratio <= OF_GUNZIP));
        }
        goals
    }
}

/// An image of which each way took these seconds.
#[cfg(test)]
pub(super) fn sketch(seconds: &[(Way, f64)]) -> Measured {
    let ways = seconds.iter().map(|(way, seconds)| {
        let cost = Cost {
            seconds: *seconds,
            peak_rss_bytes: 100 << 20,
            output_bytes: Some(90_000_000),
        };
        (*way, Figure::of(&[cost]).unwrap())
    });
    Measured {
        gzip_bytes: 100_000_000,
        layers: 4,
        load: 0.5,
        ways: ways.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_of_what_was_measured() {
        let measured = sketch(&[
            (Way::Pipeline, 2.0),
            (Way::Sluice, 2.4),
            (Way::Estargz, 24.0),
            (Way::IndexOne, 1.0),
        ]);
        let goals = measured.goals();
        let reached: Vec<bool> = goals.iter().map(|it| it.2).collect();
        assert_eq!(reached, [false, true, true, true], "{goals:?}");
        assert_eq!(goals[0].1, "1.20 times");
        assert_eq!(goals[2].1, "0.90 times");
        assert!(sketch(&[(Way::Pipeline, 1.0)]).goals().is_empty());
    }
}
