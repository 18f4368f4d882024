// SPDX-License-Identifier: Apache-2.0
//! `sluice convert` and `sluice index` beside what does the same, or the least of it.
//!
//! For each image the ways take turns in each round, in an order that moves on from round to round. Sources are in memory
//! and what others wrote is on the disk before each run. [`Way::timed`] says what is timed.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

use figures::{Figure, Figures, Measured};
use source::Source;
use way::Way;
use works::Works;

use super::report as document;

pub mod figures;
pub mod report;
pub mod source;
pub mod way;
pub mod works;

/// The name of the benchmark and of its files.
const NAME: &str = "conversion";

/// What is measured.
#[derive(Debug, Clone, Args)]
#[group(id = "conversion")]
pub struct Options {
    /// Images that are converted; by default python (that of the demo), and of nginx, node, postgres and ml those that
    /// were made before.
    #[arg(long, value_delimiter = ',', value_name = "IMAGES")]
    pub conversion_images: Vec<String>,
    /// Conversions of each image by each way; of large ones at most three.
    #[arg(long, default_value_t = 5, value_name = "ROUNDS")]
    pub conversion_rounds: usize,
}

/// Measures, prints, and keeps conversion.json and conversion.md in `directory`; what is there of other images stays.
pub fn measure(options: &Options, directory: Option<&Path>) -> Result<()> {
    ensure!(
        options.conversion_rounds > 0,
        "--conversion-rounds must be at least 1"
    );
    let sources = Source::all(&options.conversion_images)?;
    let mut figures = Figures::default();
    if let Some(directory) = directory {
        let stored = document::stored(&directory.join("conversion.json"), NAME)?;
        figures = stored.map_or_else(Figures::default, |entry| entry.figures);
    }
    figures.versions = BTreeMap::new();
    figures.absent = BTreeMap::new();
    for way in Way::ALL {
        match way.version() {
            Ok(version) => {
                figures.versions.insert(way, version);
            }
            Err(error) if matches!(way, Way::Estargz | Way::Nydus) => {
                println!("   {} cannot be had: {error:#}", way.title());
                figures.absent.insert(way, format!("{error:#}"));
            }
            Err(error) => return Err(error),
        }
    }
    for source in &sources {
        let measured = of_image(source, options.conversion_rounds, &mut figures)?;
        print!("{}", report::tables(&source.name, &measured));
        figures.images.insert(source.name.clone(), measured);
        if let Some(directory) = directory {
            document::keep(directory, NAME, json!(figures), report::markdown)?;
        }
    }
    Ok(())
}

/// Writes conversion.md again from conversion.json.
pub fn redraw(directory: &Path) -> Result<()> {
    document::redraw(directory, NAME, report::markdown)
}

fn of_image(source: &Source, wanted: usize, figures: &mut Figures) -> Result<Measured> {
    let works = Works::open()?;
    works.bring(source)?;
    let rounds = source.rounds(wanted);
    println!(
        "\nconversion of {}: {:.0} MB gzip, {} layers, {rounds} rounds in turn",
        source.name,
        source.bytes as f64 / 1e6,
        source.layers.len()
    );
    let mut costs: BTreeMap<Way, Vec<way::Cost>> = BTreeMap::new();
    for round in 0..rounds {
        let mut order: Vec<Way> = figures.versions.keys().copied().collect();
        let first = round % order.len();
        order.rotate_left(first);
        for way in order {
            match works.run(way, source, round) {
                Ok(cost) => {
                    println!("   {:<22} {cost}", way.title());
                    costs.entry(way).or_default().push(cost);
                }
                // How it is called is not known of every version of it.
                Err(error) if way == Way::Nydus => {
                    println!("   {:<22} failed: {error:#}", way.title());
                    figures.versions.remove(&way);
                    figures.absent.insert(way, format!("it failed: {error:#}"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    let mut measured = Measured::new(source);
    measured.load = document::load()?;
    for (way, costs) in costs {
        measured.ways.insert(way, Figure::of(&costs)?);
    }
    Ok(measured)
}
