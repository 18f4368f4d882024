// SPDX-License-Identifier: Apache-2.0
//! Cold starts of real images, side by side with what users would pick instead.
//!
//! Contenders take turns in each round, in an order that moves on from round to round. Before each start the state of
//! containerd and of the snapshotter is gone and the page cache dropped; the registry stands behind a line that is
//! shaped, which counts what it carries.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum as _};

use cold::Setting;
use contender::Contender;
use figures::{Document, Outcome, Scene};
use images::Image;
use lab::Lab;

use crate::harness::proxy::Line;

pub mod chart;
pub mod cold;
pub mod contender;
pub mod figures;
pub mod images;
pub mod lab;
pub mod parents;
pub mod probe;
pub mod report;

/// Round trip of the line.
const LATENCY: Duration = Duration::from_millis(20);
/// Runs of a contender that do fail, after which it is not asked again: one may be an accident.
const FAILURES: usize = 2;

/// What is measured.
#[derive(Debug, Clone, Args)]
#[group(id = "start")]
pub struct Options {
    /// Images that are started; all of them by default.
    #[arg(long, value_delimiter = ',', value_enum)]
    pub images: Vec<Image>,
    /// Contenders; all of them by default.
    #[arg(long, value_delimiter = ',', value_enum)]
    pub contenders: Vec<Contender>,
    /// Starts of each image by each contender.
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Speeds of the line, Mbit/s.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000])]
    pub rate: Vec<u64>,
    /// Few images, contenders and runs, and a verdict by their ratios: below five minutes.
    #[arg(long)]
    pub quick: bool,
    /// Appended to sluiced's configuration, to try a setting.
    #[arg(
        long,
        value_name = "TOML",
        default_value = "",
        conflicts_with = "report"
    )]
    pub config: String,
    /// Keep start.json, start.md and start.svg in this directory, and what other benchmarks have a report of beside them;
    /// what is there of other images, speeds and scenes stays.
    #[arg(long, value_name = "DIRECTORY")]
    pub report: Option<PathBuf>,
    /// Measure nothing: write start.md and start.svg again from start.json, and the same of the others.
    #[arg(long, requires = "report")]
    pub redraw: bool,
}

impl Options {
    /// What is meant: `--quick` says what is not said.
    fn settled(mut self) -> Result<Self> {
        let (images, contenders) = (Image::value_variants(), Contender::value_variants());
        if self.images.is_empty() {
            self.images = if self.quick { &images[..2] } else { images }.to_vec();
        }
        if self.contenders.is_empty() {
            self.contenders = if self.quick {
                vec![Contender::Overlayfs, Contender::Sluice, Contender::Stargz]
            } else {
                contenders.to_vec()
            };
        }
        if self.quick {
            self.runs = self.runs.min(2);
            self.rate = vec![100];
        }
        // A list is attached to what was converted, and a start is recorded of what was converted.
        for (form, before) in [
            (Contender::SluiceErofs, Contender::SluiceBoot),
            (Contender::SluiceFuse, Contender::SluiceBoot),
            (Contender::SluiceBoot, Contender::Sluice),
            (Contender::StargzOptimized, Contender::Stargz),
        ] {
            if self.contenders.contains(&form) && !self.contenders.contains(&before) {
                self.contenders.push(before);
            }
        }
        self.images.sort();
        self.contenders.sort();
        self.images.dedup();
        self.contenders.dedup();
        ensure!(self.runs > 0, "--runs must be at least 1");
        ensure!(
            self.rate.iter().all(|rate| (1..=10_000).contains(rate)),
            "--rate is in Mbit/s, 1 to 10000"
        );
        Ok(self)
    }
}

/// Measures, prints, and keeps the report.
pub fn measure(options: Options) -> Result<()> {
    let options = options.settled()?;
    let directory = options.report.as_deref();
    let mut document = match directory {
        Some(directory) => super::report::read(&directory.join("start.json"))?,
        None => Document::default(),
    };
    if let (true, Some(directory)) = (options.redraw, directory) {
        return keep(directory, &document);
    }
    document.look_around()?;
    let mut absent = BTreeMap::new();
    let mut present = Vec::new();
    for contender in &options.contenders {
        match contender.version() {
            Ok(version) => present.push((*contender, version)),
            Err(error) if contender.is_ours() => return Err(error),
            Err(error) => {
                println!("   {} cannot be had: {error:#}", contender.name());
                absent.insert(*contender, format!("{error:#}"));
            }
        }
    }
    let mut scenes = Vec::new();
    for image in &options.images {
        // What was measured is not lost when a later start fails.
        let done = |scene: Scene| {
            print!("{}", report::table(&scene));
            document.put(scene.clone());
            scenes.push(scene);
            directory.map_or(Ok(()), |directory| keep(directory, &document))
        };
        of_image(*image, &options, (&present, &absent), done)?;
    }
    print!("{}", report::ratios(&scenes));
    if options.quick {
        figures::guard(&scenes)?;
        println!("== the ratios are as they should be");
    }
    Ok(())
}

fn keep(directory: &Path, document: &Document) -> Result<()> {
    super::report::write(&directory.join("start.json"), document)?;
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    write("start.md", report::markdown(document))?;
    write("start.svg", chart::svg(document))
}

/// One image at each speed, in a registry of its own.
fn of_image(
    image: Image,
    options: &Options,
    (present, absent): (&[(Contender, String)], &BTreeMap<Contender, String>),
    mut done: impl FnMut(Scene) -> Result<()>,
) -> Result<()> {
    let lab = Lab::open("start")?;
    let (layers, bytes) = lab.push(image.name(), &image.layout()?)?;
    println!(
        "\n{}: {layers} layers, {:.0} MB",
        image.name(),
        bytes as f64 / 1e6
    );
    let (mut absent, mut ready) = (absent.clone(), Vec::new());
    for (contender, version) in present {
        match lab.prepare(*contender, image) {
            Ok(()) => ready.push((*contender, version.clone())),
            Err(error) if contender.is_ours() => return Err(error),
            Err(error) => {
                println!("   {error:#}");
                absent.insert(*contender, format!("the image cannot be made: {error:#}"));
            }
        }
    }
    for rate in &options.rate {
        lab.registry.line.set_line(Line {
            bytes_per_second: rate * 1_000_000 / 8,
            latency: LATENCY,
        });
        let mut scene = Scene::new(image, *rate, layers, bytes, absent.clone());
        rounds(&lab, options, &ready, &mut scene)?;
        scene.load = Some(super::report::load()?);
        done(scene)?;
    }
    Ok(())
}

fn rounds(
    lab: &Lab,
    options: &Options,
    contenders: &[(Contender, String)],
    scene: &mut Scene,
) -> Result<()> {
    let mut samples: BTreeMap<Contender, Vec<cold::Sample>> = BTreeMap::new();
    let mut failures: BTreeMap<Contender, Vec<String>> = BTreeMap::new();
    let setting = Setting {
        config: &options.config,
        ..Setting::default()
    };
    for round in 0..options.runs {
        let mut order = contenders.to_vec();
        order.rotate_left(round % contenders.len().max(1));
        for (contender, _) in order {
            if failures
                .get(&contender)
                .is_some_and(|it| it.len() >= FAILURES)
            {
                continue;
            }
            match cold::start_in(lab, contender, scene.image, setting) {
                Ok((sample, _node)) => {
                    println!("   {:<18} {sample}", contender.name());
                    samples.entry(contender).or_default().push(sample);
                }
                Err(error) if contender.is_ours() => return Err(error),
                Err(error) => {
                    println!("   {:<18} failed: {error:#}", contender.name());
                    failures
                        .entry(contender)
                        .or_default()
                        .push(format!("{error:#}"));
                }
            }
        }
    }
    for (contender, version) in contenders {
        let failed = failures.remove(contender).unwrap_or_default();
        match samples.remove(contender) {
            Some(samples) => {
                let outcome = Outcome::of(version.clone(), samples, failed.len())?;
                scene.outcomes.insert(*contender, outcome);
            }
            None => {
                let why = failed.into_iter().next().unwrap_or_default();
                let first = why.lines().next().unwrap_or_default();
                scene
                    .absent
                    .insert(*contender, format!("no start succeeded: {first}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(quick: bool) -> Options {
        Options {
            images: Vec::new(),
            contenders: Vec::new(),
            runs: 5,
            rate: vec![100, 1000],
            quick,
            config: String::new(),
            report: None,
            redraw: false,
        }
    }

    #[test]
    fn options_are_settled() {
        let full = options(false).settled().unwrap();
        assert_eq!((full.images.len(), full.contenders.len()), (6, 10));
        let quick = options(true).settled().unwrap();
        assert_eq!(quick.images, [Image::Nginx, Image::Python]);
        assert_eq!((quick.runs, quick.rate), (2, vec![100]));
        let mut boot = options(true);
        boot.contenders = vec![Contender::SluiceBoot];
        let boot = boot.settled().unwrap();
        assert_eq!(boot.contenders, [Contender::Sluice, Contender::SluiceBoot]);
        for (runs, rate) in [(0, 100), (1, 0), (1, 20_000)] {
            let mut bad = options(false);
            (bad.runs, bad.rate) = (runs, vec![rate]);
            assert!(bad.settled().is_err(), "{runs} {rate}");
        }
    }
}
