// SPDX-License-Identifier: Apache-2.0
//! What was measured, and its medians.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::scenes::{Scene, Stage};
use crate::bench::process::{Usage, peak_bytes};
use crate::bench::report::Times;
use crate::bench::start::contender::Contender;

/// What processes took together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Their memory at the end of the run, what several map shared among them.
    pub pss_bytes: u64,
    /// The most memory that each ever had, added up.
    pub peak_rss_bytes: u64,
    /// Open descriptors at the end.
    pub descriptors: u64,
    /// Threads at the end.
    pub threads: u64,
    /// CPU time of the run.
    pub cpu_s: f64,
}

impl Cost {
    /// Of these, which took so much CPU time.
    pub fn of(pids: &[Pid], cpu_s: f64) -> Result<Self> {
        let mut usage = Usage::default();
        let mut peak_rss_bytes = 0;
        for pid in pids {
            usage = usage.and(Usage::of(*pid)?);
            peak_rss_bytes += peak_bytes(*pid)?;
        }
        Ok(Self {
            pss_bytes: usage.pss_bytes,
            peak_rss_bytes,
            descriptors: usage.descriptors,
            threads: usage.threads,
            cpu_s,
        })
    }

    fn median(costs: &[Self]) -> Result<Self> {
        Ok(Self {
            pss_bytes: middle(costs.iter().map(|it| it.pss_bytes))?,
            peak_rss_bytes: middle(costs.iter().map(|it| it.peak_rss_bytes))?,
            descriptors: middle(costs.iter().map(|it| it.descriptors))?,
            threads: middle(costs.iter().map(|it| it.threads))?,
            cpu_s: Times::of(costs.iter().map(|it| it.cpu_s).collect())?.median_s,
        })
    }
}

/// The middle one; the upper of two.
fn middle<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Result<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable();
    let middle = values.get(values.len() / 2);
    middle.copied().context("nothing measured")
}

/// One run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds from the begin until each of [`Scene::steps`].
    pub steps: Vec<f64>,
    /// Containers that did not get ready.
    pub failures: usize,
    /// What the line had carried by then.
    pub bytes: u64,
    /// Requests that had been answered by then.
    pub requests: u64,
    /// All processes of the snapshotter, where it is not containerd's own.
    pub snapshotter: Option<Cost>,
    /// containerd itself.
    pub containerd: Cost,
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for seconds in &self.steps {
            write!(f, "{seconds:7.2} ")?;
        }
        let (mb, requests) = (self.bytes as f64 / 1e6, self.requests);
        write!(f, "s; {mb:6.1} MB, {requests} requests")?;
        if self.failures > 0 {
            write!(f, ", {} failed", self.failures)?;
        }
        for (name, cost) in [
            ("snapshotter", self.snapshotter),
            ("containerd", Some(self.containerd)),
        ] {
            let Some(cost) = cost else { continue };
            write!(
                f,
                "; {name}: PSS {:.0} MB, peak RSS {:.0} MB, {} descriptors, {} threads, {:.1} s CPU",
                cost.pss_bytes as f64 / 1e6,
                cost.peak_rss_bytes as f64 / 1e6,
                cost.descriptors,
                cost.threads,
                cost.cpu_s
            )?;
        }
        Ok(())
    }
}

/// All runs of one contender.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The contender's version.
    pub version: String,
    /// How long its form of the images took to make.
    pub prepared_s: f64,
    /// Each figure's median; failures added up.
    pub median: Sample,
    /// The shortest and the longest run.
    pub range_s: [f64; 2],
    /// Runs that failed as a whole.
    pub failed: usize,
    /// Those that did not.
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// Of these samples.
    ///
    /// **Errors**: there are none.
    pub fn of(
        version: String,
        prepared_s: f64,
        samples: Vec<Sample>,
        failed: usize,
    ) -> Result<Self> {
        let steps = samples.first().context("nothing measured")?.steps.len();
        let times = |step: usize| {
            let seconds = samples.iter().filter_map(|it| it.steps.get(step));
            Times::of(seconds.copied().collect())
        };
        let last = times(steps.checked_sub(1).context("no step measured")?)?;
        let snapshotter: Vec<Cost> = samples.iter().filter_map(|it| it.snapshotter).collect();
        let containerd: Vec<Cost> = samples.iter().map(|it| it.containerd).collect();
        let median = Sample {
            steps: (0..steps)
                .map(|step| Ok(times(step)?.median_s))
                .collect::<Result<_>>()?,
            failures: samples.iter().map(|it| it.failures).sum(),
            bytes: middle(samples.iter().map(|it| it.bytes))?,
            requests: middle(samples.iter().map(|it| it.requests))?,
            snapshotter: match snapshotter.as_slice() {
                [] => None,
                costs => Some(Cost::median(costs)?),
            },
            containerd: Cost::median(&containerd)?,
        };
        Ok(Self {
            version,
            prepared_s,
            median,
            range_s: [last.min_s, last.max_s],
            failed,
            samples,
        })
    }
}

/// One scene.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figures {
    /// Which.
    pub scene: Scene,
    /// Its title.
    pub title: String,
    /// Layers of an image.
    pub layers: usize,
    /// Bytes of all images in the registry, as gzip.
    pub image_bytes: u64,
    /// Speed of the line.
    pub mbit_per_second: u64,
    /// The machine's average load in the last minute, by all that ran.
    pub load: Option<f64>,
    /// Who took part.
    pub outcomes: BTreeMap<Contender, Outcome>,
    /// Who did not, and why.
    pub absent: BTreeMap<Contender, String>,
}

impl Figures {
    /// Nothing is measured yet.
    #[must_use]
    pub fn new(stage: &Stage, title: String, mbit_per_second: u64) -> Self {
        Self {
            scene: stage.scene,
            title,
            layers: stage.layers,
            image_bytes: stage.bytes,
            mbit_per_second,
            load: None,
            outcomes: BTreeMap::new(),
            absent: BTreeMap::new(),
        }
    }
}

/// All that was measured, at times.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Document {
    /// The kernel of the last measurement.
    pub kernel: String,
    /// Its cores.
    pub cores: usize,
    /// The last figures of each scene.
    pub scenes: BTreeMap<Scene, Figures>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_each_figures_own_and_failures_add_up() {
        let sample = |last: f64, failures, pss_bytes| Sample {
            steps: vec![last / 2.0, last],
            failures,
            snapshotter: Some(Cost {
                pss_bytes,
                cpu_s: last,
                ..Cost::default()
            }),
            ..Sample::default()
        };
        let samples = vec![sample(3.0, 1, 5), sample(1.0, 0, 7), sample(2.0, 2, 9)];
        let outcome = Outcome::of(String::new(), 4.0, samples, 0).unwrap();
        assert_eq!(outcome.median.steps, [1.0, 2.0]);
        assert_eq!(outcome.median.failures, 3);
        let cost = outcome.median.snapshotter.unwrap();
        assert_eq!((cost.pss_bytes, cost.cpu_s), (7, 2.0));
        assert_eq!(outcome.range_s, [1.0, 3.0]);
        assert!(Outcome::of(String::new(), 0.0, Vec::new(), 1).is_err());
    }
}
