// SPDX-License-Identifier: Apache-2.0
//! What is large on one node: many containers at once, an image of many layers, one of many files, one of large files.
//!
//! Beside what others would pick, as in [`super::start`]: contenders take turns, each run is on a node that has
//! nothing, and the registry stands behind a shaped line. Here the processes of the snapshotter are looked at, too: what
//! they take in memory, descriptors, threads and CPU time.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum as _};

use figures::{Document, Figures, Outcome, Sample};
use scenes::{Scene, Stage};

use super::report as documents;
use super::start::contender::Contender;
use super::start::lab::Lab;
use crate::harness::proxy::Line;

pub mod figures;
pub mod images;
pub mod large;
pub mod report;
pub mod run;
pub mod scenes;
pub mod side_by_side;

/// Speed of the line.
const MBIT_PER_SECOND: u64 = 1000;
/// Its round trip.
const LATENCY: Duration = Duration::from_millis(20);
/// Runs of a contender that do fail, after which it is not asked again: one may be an accident.
const FAILURES: usize = 2;

/// What is measured.
#[derive(Debug, Clone, Args)]
#[group(id = "scale")]
pub struct Options {
    /// Scenes; all of them by default.
    #[arg(long, value_delimiter = ',', value_enum)]
    pub scenes: Vec<Scene>,
    /// Contenders in them; such as need a start to be prepared have no place.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [
        Contender::Overlayfs, Contender::Sluice, Contender::Stargz, Contender::Soci,
    ])]
    pub scale_contenders: Vec<Contender>,
    /// Runs of each scene by each contender; by default 3, and 1 of the large image.
    #[arg(long)]
    pub scale_runs: Option<usize>,
    /// Containers of the scene of many.
    #[arg(long, default_value_t = 50)]
    pub scale_containers: usize,
    /// Files of 1 GiB in the large image.
    #[arg(long, default_value_t = 20)]
    pub scale_gigabytes: u64,
    /// Minutes that making a contender's form of a scene's images may take.
    #[arg(long, default_value_t = 10)]
    pub scale_prepare_minutes: u64,
}

impl Options {
    /// What is meant.
    fn settled(mut self) -> Result<Self> {
        if self.scenes.is_empty() {
            self.scenes = Scene::value_variants().to_vec();
        }
        self.scenes.sort();
        self.scenes.dedup();
        self.scale_contenders.sort();
        self.scale_contenders.dedup();
        let unfit = [
            Contender::SluiceBoot,
            Contender::StargzOptimized,
            Contender::Nydus,
        ];
        if let Some(unfit) = unfit.iter().find(|it| self.scale_contenders.contains(it)) {
            bail!("{} has no place in the scenes", unfit.name());
        }
        ensure!(
            self.scale_runs != Some(0),
            "--scale-runs must be at least 1"
        );
        ensure!(
            (1..=500).contains(&self.scale_containers),
            "--scale-containers must be 1 to 500"
        );
        ensure!(
            (1..=200).contains(&self.scale_gigabytes),
            "--scale-gigabytes must be 1 to 200"
        );
        Ok(self)
    }

    fn prepares(&self) -> Duration {
        Duration::from_secs(60 * self.scale_prepare_minutes)
    }
}

/// Measures, prints, and keeps scale.json and scale.md in `directory`; with `redraw` it only writes the latter again.
pub fn measure(options: Options, directory: Option<&Path>, redraw: bool) -> Result<()> {
    let options = options.settled()?;
    let mut document = match directory {
        Some(directory) => documents::read(&directory.join("scale.json"))?,
        None => Document::default(),
    };
    if let (true, Some(directory)) = (redraw, directory) {
        return keep(directory, &document);
    }
    (document.kernel, document.cores) = documents::machine()?;
    let mut failed = Vec::new();
    for scene in &options.scenes {
        let figures = of_scene(*scene, &options)?;
        print!("{}", report::section(&figures));
        for (contender, why) in &figures.absent {
            if contender.is_ours() {
                failed.push(format!("{}: {why}", scene.name()));
            }
        }
        // What was measured is not lost when a later scene fails.
        document.scenes.insert(*scene, figures);
        if let Some(directory) = directory {
            keep(directory, &document)?;
        }
    }
    ensure!(failed.is_empty(), "Sluice failed: {}", failed.join("; "));
    Ok(())
}

fn keep(directory: &Path, document: &Document) -> Result<()> {
    documents::write(&directory.join("scale.json"), document)?;
    let path = directory.join("scale.md");
    std::fs::write(&path, report::markdown(document))
        .with_context(|| format!("write {}", path.display()))
}

/// One scene, in a registry of its own.
fn of_scene(scene: Scene, options: &Options) -> Result<Figures> {
    let title = scene.title(options);
    println!("\n{title}");
    let lab = Lab::open("scale")?;
    let begun = Instant::now();
    let stage = Stage::set(&lab, scene, options)?;
    println!(
        "   made: {} layers, {:.0} MB in the registry, {:.0} s",
        stage.layers,
        stage.bytes as f64 / 1e6,
        begun.elapsed().as_secs_f64()
    );
    let mut figures = Figures::new(&stage, title, MBIT_PER_SECOND);
    let mut ready = Vec::new();
    for contender in &options.scale_contenders {
        let prepared = match scene.leaves_out(*contender) {
            Some(why) => Err(anyhow::anyhow!("{why}")),
            None => prepare(&lab, *contender, &stage, options),
        };
        match prepared {
            Ok(prepared) => ready.push(prepared),
            Err(error) => {
                println!("   {}: {error:#}", contender.name());
                figures.absent.insert(*contender, format!("{error:#}"));
            }
        }
    }
    lab.registry.line.set_line(Line {
        bytes_per_second: MBIT_PER_SECOND * 1_000_000 / 8,
        latency: LATENCY,
    });
    let runs = options.scale_runs.unwrap_or_else(|| scene.runs());
    rounds(&lab, &stage, runs, &ready, &mut figures)?;
    figures.load = Some(super::report::load()?);
    Ok(figures)
}

/// A contender whose form of the images is in the registry.
struct Prepared {
    contender: Contender,
    version: String,
    seconds: f64,
}

/// Makes the contender's form of all images of the stage.
fn prepare(lab: &Lab, contender: Contender, stage: &Stage, options: &Options) -> Result<Prepared> {
    let version = contender.version()?;
    let (begun, deadline) = (Instant::now(), options.prepares());
    for image in &stage.images {
        let left = deadline.saturating_sub(begun.elapsed());
        let made = lab.convert(contender, image, left);
        if made.is_err() && begun.elapsed() >= deadline {
            let minutes = options.scale_prepare_minutes;
            bail!("conversion took longer than {minutes} min");
        }
        made.context("the image cannot be made")?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("   {:<12} prepared in {seconds:.1} s", contender.name());
    Ok(Prepared {
        contender,
        version,
        seconds,
    })
}

fn rounds(
    lab: &Lab,
    stage: &Stage,
    runs: usize,
    contenders: &[Prepared],
    figures: &mut Figures,
) -> Result<()> {
    let mut samples: BTreeMap<Contender, Vec<Sample>> = BTreeMap::new();
    let mut failures: BTreeMap<Contender, Vec<String>> = BTreeMap::new();
    for round in 0..runs {
        let mut order: Vec<Contender> = contenders.iter().map(|it| it.contender).collect();
        order.rotate_left(round % contenders.len().max(1));
        for contender in order {
            let failed = failures.entry(contender).or_default();
            if failed.len() >= FAILURES {
                continue;
            }
            match run::once(lab, contender, stage) {
                Ok(sample) => {
                    println!("   {:<12} {sample}", contender.name());
                    samples.entry(contender).or_default().push(sample);
                }
                Err(error) => {
                    println!("   {:<12} failed: {error:#}", contender.name());
                    failed.push(error.root_cause().to_string());
                }
            }
        }
    }
    for prepared in contenders {
        let contender = prepared.contender;
        let failed = failures.remove(&contender).unwrap_or_default();
        if let Some(samples) = samples.remove(&contender) {
            let (version, seconds) = (prepared.version.clone(), prepared.seconds);
            let outcome = Outcome::of(version, seconds, samples, failed.len())?;
            figures.outcomes.insert(contender, outcome);
            continue;
        }
        let why = failed.first().and_then(|it| it.lines().next());
        let why = format!("no run succeeded: {}", why.unwrap_or_default());
        figures.absent.insert(contender, why);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            scenes: Vec::new(),
            scale_contenders: vec![Contender::Sluice, Contender::Overlayfs],
            scale_runs: None,
            scale_containers: 50,
            scale_gigabytes: 20,
            scale_prepare_minutes: 10,
        }
    }

    #[test]
    fn options_are_settled() {
        let settled = options().settled().unwrap();
        assert_eq!(settled.scenes.len(), 4);
        let contenders = [Contender::Overlayfs, Contender::Sluice];
        assert_eq!(settled.scale_contenders, contenders);
        let mut bad = options();
        bad.scale_contenders.push(Contender::Nydus);
        assert!(bad.settled().is_err());
        let mut bad = options();
        bad.scale_runs = Some(0);
        assert!(bad.settled().is_err());
    }
}
