// SPDX-License-Identifier: Apache-2.0
//! The next version of an image on a node that has the one before: what is fetched of it, side by side.
//!
//! Everything was installed anew and one package upgraded ([`crate::harness::rebuilt`]): every layer is another one, so
//! that the reuse of layers, which each contender has, reuses nothing. The version before was started and is complete.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum as _};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::report as document;
use super::start::cold::{Node, Sample, Setting};
use super::start::contender::{Contender, Service};
use super::start::images::Image;
use super::start::lab::Lab;
use crate::harness::proxy::Line;
use crate::harness::rebuilt::{self, Changes};

mod report;

const NAME: &str = "update";
/// Those that are compared.
const CONTENDERS: [Contender; 4] = [
    Contender::Overlayfs,
    Contender::Sluice,
    Contender::Stargz,
    Contender::Soci,
];
/// The line while the next version comes.
const LINE: Line = Line {
    bytes_per_second: 100_000_000 / 8,
    latency: Duration::from_millis(20),
};
/// The longest that a conversion may take.
const CONVERTS: Duration = Duration::from_secs(1800);

/// What is measured.
#[derive(Debug, Clone, Args)]
#[group(id = "update")]
pub struct Options {
    /// Images of which there is a next version.
    #[arg(long, value_delimiter = ',', value_enum)]
    pub update_images: Vec<Image>,
    /// Rounds, in which contenders take turns.
    #[arg(long, default_value_t = 3)]
    pub update_runs: usize,
}

/// What a contender needed.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Update {
    /// Until it was ready.
    pub start: Sample,
    /// Bytes on the line until nothing more came.
    pub all_bytes: u64,
}

/// One image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scene {
    /// The upgraded package.
    pub package: String,
    /// Bytes of the next version's layers, in gzip.
    pub bytes: u64,
    /// How much of it changed.
    pub changes: Changes,
    /// By contender, with its version.
    pub updates: BTreeMap<Contender, (String, Vec<Update>)>,
    /// Why others are not there.
    pub absent: BTreeMap<Contender, String>,
    /// How many processes wanted to run in the last minute.
    pub load: f64,
}

/// By image.
pub type Figures = BTreeMap<Image, Scene>;

/// The upgraded package: what its files' paths have in them.
fn package(image: Image) -> &'static str {
    match image {
        Image::Nginx => "nginx",
        Image::Python => "/flask/",
        Image::Node => "/express/",
        Image::Java => "libjli",
        Image::Postgres => "libpq",
        Image::Ml => "/pandas/core/",
    }
}

/// Measures, prints, and keeps update.json and update.md in `directory`; what is there of other images stays.
pub fn measure(options: &Options, directory: Option<&Path>) -> Result<()> {
    ensure!(options.update_runs > 0, "--update-runs must be at least 1");
    let mut images = options.update_images.clone();
    if images.is_empty() {
        images = Image::value_variants()[..3].to_vec();
    }
    let stored = directory.map(|it| document::stored(&it.join("update.json"), NAME));
    let stored = stored.transpose()?.flatten();
    let mut figures: Figures = stored.map_or_else(Figures::new, |entry| entry.figures);
    for image in images {
        let scene = of_image(image, options.update_runs)?;
        print!("{}", report::table(image, &scene));
        figures.insert(image, scene);
        if let Some(directory) = directory {
            document::keep(directory, NAME, json!(figures), report::markdown)?;
        }
    }
    Ok(())
}

/// Writes update.md again from update.json.
pub fn redraw(directory: &Path) -> Result<()> {
    document::redraw(directory, NAME, report::markdown)
}

fn of_image(image: Image, runs: usize) -> Result<Scene> {
    let lab = Lab::open(NAME)?;
    let next = format!("{}-next", image.name());
    let layout = lab.root.directory("next")?;
    let (layout, changes) = rebuilt::write(&image.layout()?, &layout, package(image))?;
    lab.push(image.name(), &image.layout()?)?;
    let (layers, bytes) = lab.push(&next, &layout)?;
    println!(
        "\n{}: {layers} layers, {:.0} MB, of files {:.1} % changed",
        image.name(),
        bytes as f64 / 1e6,
        changes.percent()
    );
    let mut scene = Scene {
        package: package(image).trim_matches('/').to_owned(),
        bytes,
        changes,
        updates: BTreeMap::new(),
        absent: BTreeMap::new(),
        load: 0.0,
    };
    for contender in CONTENDERS {
        let prepared = contender.version().and_then(|version| {
            lab.prepare(contender, image)?;
            lab.convert(contender, &next, CONVERTS)?;
            Ok(version)
        });
        match prepared {
            Ok(version) => {
                scene.updates.insert(contender, (version, Vec::new()));
            }
            Err(error) if contender.is_ours() => return Err(error),
            Err(error) => {
                println!("   {} cannot be had: {error:#}", contender.name());
                scene.absent.insert(contender, format!("{error:#}"));
            }
        }
    }
    for round in 0..runs {
        let mut turns: Vec<Contender> = scene.updates.keys().copied().collect();
        let places = turns.len().max(1);
        turns.rotate_left(round % places);
        for contender in turns {
            let update = update(&lab, contender, image, &next)?;
            println!(
                "   {:<14} ready after {:.2} s, {:.1} MB by then, {:.1} MB in all",
                contender.name(),
                update.start.ready_s,
                update.start.bytes as f64 / 1e6,
                update.all_bytes as f64 / 1e6
            );
            if let Some((_, updates)) = scene.updates.get_mut(&contender) {
                updates.push(update);
            }
        }
    }
    scene.load = document::load()?;
    Ok(scene)
}

/// A node with the whole image starts its next version.
fn update(lab: &Lab, contender: Contender, image: Image, next: &str) -> Result<Update> {
    let line = &lab.registry.line;
    line.set_line(Line::OPEN);
    let mut node = Node::open(lab, contender, Setting::default())?;
    node.start(lab, image, image.name())?;
    complete(lab, &node)?;
    // What listens on ports makes room.
    node.containers.kill();
    line.set_line(LINE);
    let before = line.tally().total();
    let start = node.start(lab, image, next)?;
    complete(lab, &node)?;
    let all_bytes = line.tally().total().since(before).bytes;
    line.set_line(Line::OPEN);
    Ok(Update { start, all_bytes })
}

/// Waits until nothing more comes: Sluice says so, of peers the line is quiet.
fn complete(lab: &Lab, node: &Node) -> Result<()> {
    match &node.service {
        Service::None => Ok(()),
        Service::Sluice { .. } => node.service.wait_sealed(),
        Service::Peer { .. } => lab.wait_quiet(),
    }
}
