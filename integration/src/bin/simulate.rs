// SPDX-License-Identifier: Apache-2.0
//! `make simulate`: clusters of 10 to 10,000 nodes that start one image, simulated.
//!
//! Prints a table of registry egress, start times and load; with options also variants of the policy,
//! published figures beside ours, a comparison with real runs, curves and JSON.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use sluice_integration::simulate::report::{HEAD, Report, complaints, row};
use sluice_integration::simulate::scenario::Scenario;
use sluice_integration::simulate::world::World;
use sluice_integration::simulate::{calibrate, chart, published, variants};

/// Simulates clusters that start one image at once, with the daemon's own policy code.
#[derive(Debug, Parser)]
struct Options {
    /// Numbers of nodes.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "10,30,100,300,1000,3000,10000"
    )]
    nodes: Vec<u32>,
    /// A scenario as JSON: whatever is not said in it is as by default.
    #[arg(long)]
    scenario: Option<PathBuf>,
    /// Decides everything that is random.
    #[arg(long)]
    seed: Option<u64>,
    /// Figures of real runs, docs/benchmarks/cluster-real.json or a file like it: prints the simulator's
    /// error and nothing else.
    #[arg(long)]
    calibrate: Option<PathBuf>,
    /// Also variants of the policy and of what befalls the nodes.
    #[arg(long)]
    variants: bool,
    /// Also published figures, with ours beside them.
    #[arg(long)]
    published: bool,
    /// Where to draw the curves.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Where to write the scenario and all figures.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let name = || format!("read {}", path.display());
    let bytes = std::fs::read(path).with_context(name)?;
    serde_json::from_slice(&bytes).with_context(name)
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(path) = &options.calibrate {
        let document: serde_json::Value = read(path)?;
        let measured = if document.get("cluster").is_some() {
            calibrate::of_real(&document)?
        } else {
            serde_json::from_value(document)?
        };
        print!("{}", calibrate::compare(&measured)?);
        return Ok(());
    }
    let mut scenario = match &options.scenario {
        Some(path) => read(path)?,
        None => Scenario::default(),
    };
    scenario.seed = options.seed.unwrap_or(scenario.seed);
    println!("seed {}\n", scenario.seed);
    let report = sizes(&scenario, &options.nodes);
    if options.variants {
        println!("\n| 1,000 nodes{}", HEAD.trim_start_matches("| nodes"));
        for (name, scenario) in variants::of(&scenario) {
            print!("{}", row(name, &World::new(scenario).run()));
        }
    }
    if options.published {
        println!();
        print!("{}", published::table(&published::cases(scenario.seed)));
    }
    if let Some(path) = &options.svg {
        write(path, &chart::svg(&report.figures))?;
    }
    if let Some(path) = &options.json {
        write(path, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    }
    Ok(())
}

/// Runs all sizes, and prints each as soon as it is there.
fn sizes(scenario: &Scenario, nodes: &[u32]) -> Report {
    print!("{HEAD}");
    let mut figures = Vec::new();
    for nodes in nodes {
        let began = Instant::now();
        let run = World::new(Scenario {
            nodes: *nodes,
            ..scenario.clone()
        })
        .run();
        print!("{}", row(&nodes.to_string(), &run));
        let complaints = complaints(&run);
        eprintln!(
            "{nodes} nodes: {} events in {:.1} s{}{complaints}",
            run.events,
            began.elapsed().as_secs_f64(),
            if complaints.is_empty() { "" } else { "; " },
        );
        figures.push(run);
    }
    Report {
        scenario: scenario.clone(),
        figures,
    }
}
