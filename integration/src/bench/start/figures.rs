// SPDX-License-Identifier: Apache-2.0
//! What was measured: medians, ratios, and the document that keeps them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::cold::Sample;
use super::contender::Contender;
use super::images::Image;
use crate::bench::report::{self, Times};

/// The most of overlayfs's time that Sluice may take in the quick form, on the geometric mean.
const QUICK_OF_OVERLAYFS: f64 = 0.6;
/// The same of the best peer's. The goals are 0.4 and 0.5; two runs on a busy machine need room.
const QUICK_OF_BEST_PEER: f64 = 1.0;

/// One image over one line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scene {
    /// The image.
    pub image: Image,
    /// Speed of the line.
    pub mbit_per_second: u64,
    /// Layers of the image.
    pub layers: usize,
    /// Their bytes in the registry, as gzip.
    pub image_bytes: u64,
    /// The machine's average load in the last minute, by all that ran.
    pub load: Option<f64>,
    /// Who started it.
    pub outcomes: BTreeMap<Contender, Outcome>,
    /// Who could not, and why.
    pub absent: BTreeMap<Contender, String>,
}

/// What one contender's starts took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The contender's version.
    pub version: String,
    /// Each figure's median.
    pub median: Sample,
    /// Shortest and longest time to ready.
    pub ready_range_s: [f64; 2],
    /// Starts that failed.
    pub failed: usize,
    /// All that succeeded.
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// Of these samples.
    ///
    /// **Errors**: there are none.
    pub fn of(version: String, samples: Vec<Sample>, failed: usize) -> Result<Self> {
        let times = |figure: fn(&Sample) -> f64| Times::of(samples.iter().map(figure).collect());
        let seconds = |figure| times(figure).map(|it| it.median_s);
        let ready = times(|it| it.ready_s)?;
        let count = |figure: fn(&Sample) -> u64| {
            let mut counts: Vec<u64> = samples.iter().map(figure).collect();
            counts.sort_unstable();
            counts[counts.len() / 2]
        };
        let median = Sample {
            pull_s: seconds(|it| it.pull_s)?,
            create_s: seconds(|it| it.create_s)?,
            output_s: seconds(|it| it.output_s)?,
            ready_s: ready.median_s,
            bytes: count(|it| it.bytes),
            requests: count(|it| it.requests),
            peak_rss_bytes: count(|it| it.peak_rss_bytes),
        };
        Ok(Self {
            version,
            median,
            ready_range_s: [ready.min_s, ready.max_s],
            failed,
            samples,
        })
    }
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "pull {:6.2} s, create {:6.2}, output {:6.2}, ready {:6.2}; {:6.1} MB, {:4} requests, peak RSS {:4.0} MB",
            self.pull_s,
            self.create_s,
            self.output_s,
            self.ready_s,
            self.bytes as f64 / 1e6,
            self.requests,
            self.peak_rss_bytes as f64 / 1e6
        )
    }
}

impl Scene {
    /// Nothing is measured yet.
    #[must_use]
    pub fn new(
        image: Image,
        mbit_per_second: u64,
        layers: usize,
        image_bytes: u64,
        absent: BTreeMap<Contender, String>,
    ) -> Self {
        Self {
            image,
            mbit_per_second,
            layers,
            image_bytes,
            load: None,
            outcomes: BTreeMap::new(),
            absent,
        }
    }

    /// Median time to ready.
    #[must_use]
    pub fn ready_s(&self, contender: Contender) -> Option<f64> {
        Some(self.outcomes.get(&contender)?.median.ready_s)
    }

    /// The fastest of those that are neither Sluice nor overlayfs.
    #[must_use]
    pub fn best_peer(&self) -> Option<(Contender, f64)> {
        let peers = self
            .outcomes
            .iter()
            .filter(|(contender, _)| !contender.is_ours() && **contender != Contender::Overlayfs);
        peers
            .map(|(contender, outcome)| (*contender, outcome.median.ready_s))
            .min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// Geometric means over images of a contender's time to ready by another's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratios {
    /// By overlayfs.
    pub overlayfs: Option<f64>,
    /// By the best peer of each image.
    pub best_peer: Option<f64>,
    /// Images of the first.
    pub images: usize,
}

impl Ratios {
    /// Over those of the scenes in which both were measured.
    #[must_use]
    pub fn of<'a>(contender: Contender, scenes: impl Iterator<Item = &'a Scene>) -> Self {
        let (mut overlayfs, mut best_peer) = (Vec::new(), Vec::new());
        for scene in scenes {
            let Some(ours) = scene.ready_s(contender) else {
                continue;
            };
            overlayfs.extend(scene.ready_s(Contender::Overlayfs).map(|it| ours / it));
            best_peer.extend(scene.best_peer().map(|(_, it)| ours / it));
        }
        Self {
            overlayfs: geometric_mean(&overlayfs),
            best_peer: geometric_mean(&best_peer),
            images: overlayfs.len(),
        }
    }
}

fn geometric_mean(ratios: &[f64]) -> Option<f64> {
    let logarithms: f64 = ratios.iter().map(|it| it.ln()).sum();
    (!ratios.is_empty()).then(|| (logarithms / ratios.len() as f64).exp())
}

/// **Errors**: Sluice is slower than it must not be, or there is nothing to say so.
pub fn guard(scenes: &[Scene]) -> Result<()> {
    let ratios = Ratios::of(Contender::Sluice, scenes.iter());
    let overlayfs = ratios.overlayfs.context("no start of overlayfs")?;
    let best_peer = ratios.best_peer.context("no start of a peer")?;
    ensure!(
        overlayfs <= QUICK_OF_OVERLAYFS && best_peer <= QUICK_OF_BEST_PEER,
        "Sluice took {overlayfs:.2} of overlayfs's time and {best_peer:.2} of the best peer's; at most {QUICK_OF_OVERLAYFS} and {QUICK_OF_BEST_PEER} are good"
    );
    Ok(())
}

/// All that was measured, at times.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Document {
    /// The kernel of the last measurement.
    pub kernel: String,
    /// Its cores.
    pub cores: usize,
    /// By speed and image.
    pub scenes: BTreeMap<String, Scene>,
}

impl Document {
    /// Notes the machine.
    pub fn look_around(&mut self) -> Result<()> {
        (self.kernel, self.cores) = report::machine()?;
        Ok(())
    }

    /// Adds a scene, in the place of an older one of the same image and speed.
    pub fn put(&mut self, scene: Scene) {
        let key = format!("{:05}-{}", scene.mbit_per_second, scene.image.name());
        self.scenes.insert(key, scene);
    }

    /// The speeds, and what was measured at each in order of images.
    #[must_use]
    pub fn by_speed(&self) -> BTreeMap<u64, Vec<&Scene>> {
        let mut speeds: BTreeMap<u64, Vec<&Scene>> = BTreeMap::new();
        for scene in self.scenes.values() {
            speeds.entry(scene.mbit_per_second).or_default().push(scene);
        }
        for scenes in speeds.values_mut() {
            scenes.sort_by_key(|scene| scene.image);
        }
        speeds
    }
}

/// A scene in which contenders were ready after these seconds.
#[cfg(test)]
pub(super) fn sketch(image: Image, ready: &[(Contender, f64)]) -> Scene {
    let mut scene = Scene::new(image, 100, 4, 60_000_000, BTreeMap::new());
    for (contender, ready_s) in ready {
        let sample = Sample {
            pull_s: ready_s / 4.0,
            create_s: ready_s / 2.0,
            output_s: ready_s * 0.75,
            ready_s: *ready_s,
            bytes: 5_000_000,
            requests: 20,
            peak_rss_bytes: 50_000_000,
        };
        let outcome = Outcome::of("1.0".to_owned(), vec![sample], 0).unwrap();
        scene.outcomes.insert(*contender, outcome);
    }
    scene
}

#[cfg(test)]
mod tests {
    use super::*;
    use Contender::{Overlayfs, Sluice, Soci, Stargz};

    fn scenes(ours: [f64; 2]) -> [Scene; 2] {
        let first = [
            (Overlayfs, 8.0),
            (Sluice, ours[0]),
            (Stargz, 2.0),
            (Soci, 4.0),
        ];
        let second = [(Overlayfs, 16.0), (Sluice, ours[1]), (Soci, 8.0)];
        [sketch(Image::Nginx, &first), sketch(Image::Python, &second)]
    }

    #[test]
    fn ratios_are_geometric_means_over_images() {
        let scenes = scenes([2.0, 1.0]);
        assert_eq!(scenes[0].best_peer(), Some((Stargz, 2.0)));
        let ratios = Ratios::of(Sluice, scenes.iter());
        // 1/4 and 1/16; 1 and 1/8.
        assert!((ratios.overlayfs.unwrap() - 0.125).abs() < 1e-9);
        assert!((ratios.best_peer.unwrap() - 0.125f64.sqrt()).abs() < 1e-9);
        assert_eq!(ratios.images, 2);
        let nothing = Ratios::of(Contender::Nydus, scenes.iter());
        assert_eq!((nothing.overlayfs, nothing.images), (None, 0));
    }

    #[test]
    fn the_guard_knows_slow_from_fast() {
        assert!(guard(&scenes([2.0, 1.0])).is_ok());
        assert!(guard(&scenes([7.0, 15.0])).is_err());
        assert!(guard(&scenes([4.0, 6.0])).is_err(), "slower than the peers");
        assert!(guard(&[]).is_err());
    }

    #[test]
    fn medians_are_each_figures_own() {
        let sample = |ready_s, bytes| Sample {
            ready_s,
            bytes,
            ..Sample::default()
        };
        let samples = vec![sample(3.0, 1), sample(1.0, 9), sample(2.0, 5)];
        let outcome = Outcome::of(String::new(), samples, 1).unwrap();
        assert_eq!((outcome.median.ready_s, outcome.median.bytes), (2.0, 5));
        assert_eq!(outcome.ready_range_s, [1.0, 3.0]);
        assert!(Outcome::of(String::new(), Vec::new(), 0).is_err());
    }

    #[test]
    fn a_document_keeps_what_was_measured_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("start.json");
        let mut document = report::read::<Document>(&path).unwrap();
        let [nginx, python] = scenes([2.0, 1.0]);
        document.put(python);
        report::write(&path, &document).unwrap();
        let mut document = report::read::<Document>(&path).unwrap();
        document.put(nginx);
        let speeds = document.by_speed();
        let images: Vec<Image> = speeds[&100].iter().map(|it| it.image).collect();
        assert_eq!(images, [Image::Nginx, Image::Python]);
        std::fs::write(&path, "{").unwrap();
        assert!(report::read::<Document>(&path).is_err());
    }
}
