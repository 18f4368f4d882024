// SPDX-License-Identifier: Apache-2.0
//! How fast an image comes into the store, on a line that is no bound: fetch, verify, decompress, write, seal.
//!
//! The daemon's own scheduler, store and registry client complete an image from a registry in this process, over loopback.
//! Both have the same processors, so what each takes of them is told apart by its threads; and each stage is measured by
//! itself, on one thread. Where the processors' time goes is drawn, of this and of a conversion.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use figures::{Figures, Profile, Round};
use works::Works;

use super::conversion::source::Source;
use super::conversion::works::converting;
use super::flame::{self, Frames};
use super::report as document;
use crate::harness::root::Root;

pub mod figures;
pub mod report;
pub mod works;

/// The name of the benchmark and of its files.
const NAME: &str = "fill";
/// The longest that the conversion that is sampled may take.
const CONVERTS: Duration = Duration::from_secs(600);

/// What is measured.
#[derive(Debug, Clone, Args)]
#[group(id = "fill")]
pub struct Options {
    /// The image that is completed.
    #[arg(long, default_value = "python", value_name = "IMAGE")]
    pub fill_image: String,
    /// How often.
    #[arg(long, default_value_t = 7, value_name = "ROUNDS")]
    pub fill_rounds: usize,
}

/// Measures, prints, and keeps fill.json, fill.md and the flame graphs in `directory`.
pub fn measure(options: &Options, directory: Option<&Path>) -> Result<()> {
    ensure!(options.fill_rounds > 0, "--fill-rounds must be at least 1");
    let [source] = &Source::all(std::slice::from_ref(&options.fill_image))?[..] else {
        anyhow::bail!("one image is completed");
    };
    let root = Root::new(NAME)?;
    println!(
        "\nfill: {}, {:.0} MB gzip",
        source.name,
        source.bytes as f64 / 1e6
    );
    let works = Works::open(source)?;
    let mut rounds: Vec<Round> = Vec::new();
    for round in 0..options.fill_rounds {
        let round = works.round(&root.directory(&format!("r/{round}"))?)?;
        println!("   {round}");
        rounds.push(round);
    }
    let stages = works.stages(&root.directory("stages")?)?;
    let mut figures = Figures::of(&works, rounds, stages)?;
    print!("{}", report::table(&figures));
    let filled = works.sampled(&root.directory("sampled")?)?;
    let converted = convert(source, &root)?;
    for (name, title, frames) in [
        ("fill", format!("completing {}", source.name), filled),
        (
            "convert",
            format!("sluice convert of {}", source.name),
            converted,
        ),
    ] {
        let Some(frames) = frames else {
            println!("   perf is not on PATH: no flame graph of {name}");
            continue;
        };
        figures
            .profiles
            .insert(name.to_owned(), Profile::of(&frames));
        if let Some(directory) = directory {
            let path = directory.join(format!("flame-{name}.svg"));
            std::fs::write(&path, frames.svg(&title))
                .with_context(|| format!("write {}", path.display()))?;
        }
    }
    if let Some(directory) = directory {
        document::keep(directory, NAME, json!(figures), report::markdown)?;
    }
    Ok(())
}

/// Writes fill.md again from fill.json.
pub fn redraw(directory: &Path) -> Result<()> {
    document::redraw(directory, NAME, report::markdown)
}

/// Where a conversion spends its time.
fn convert(source: &Source, root: &Root) -> Result<Option<Frames>> {
    let work = root.directory("convert")?;
    let sluice = converting(source, &work)?;
    flame::of_command(&sluice, &work.join("perf.data"), CONVERTS)
}
