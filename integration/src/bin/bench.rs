// SPDX-License-Identifier: Apache-2.0
//! `make bench`: see [`sluice_integration::bench`]. `bench NAME…` runs some of the benchmarks only.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use serde_json::json;
use sluice_integration::bench::{
    conversion, files, fill, first_read, memory, reads, report, scale, start, update,
};
use sluice_integration::cluster::cpu::Account;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::images;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Benchmark {
    /// Converting and indexing images, side by side; not with --json.
    Conversion,
    /// Chunks into the store when no line bounds them, and flame graphs; not with --json.
    Fill,
    /// Files of a complete image.
    Fs,
    /// Files of complete images, side by side; not with --json.
    Reads,
    /// Memory of shim and daemon.
    Memory,
    /// The first read of a file.
    FirstRead,
    /// Cold starts of real images, side by side; not with --json.
    Start,
    /// New versions of images that a node has, side by side; not with --json.
    Update,
    /// Many containers, many layers, many files and large ones, side by side; not with --json.
    Scale,
}

#[derive(Debug, Parser)]
struct Arguments {
    /// Which ones; all of them by default.
    benchmarks: Vec<Benchmark>,
    /// Keep the figures in this document, beside those of other benchmarks.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Images of the daemon's figure.
    #[arg(long, default_value_t = 100)]
    memory_images: usize,
    #[command(flatten, next_help_heading = "Conversion")]
    conversion: conversion::Options,
    #[command(flatten, next_help_heading = "Filling")]
    fill: fill::Options,
    #[command(flatten, next_help_heading = "Reads")]
    reads: reads::Options,
    #[command(flatten, next_help_heading = "Cold starts")]
    start: start::Options,
    #[command(flatten, next_help_heading = "New versions")]
    update: update::Options,
    #[command(flatten, next_help_heading = "Scale")]
    scale: scale::Options,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // What else runs on the machine is not to be measured.
    let _precedence = Account::open("sluice-bench");
    let all = Benchmark::value_variants();
    let chosen = match arguments.benchmarks.as_slice() {
        // The quick form is of cold starts only.
        [] if arguments.start.quick => &[Benchmark::Start],
        [] => all,
        some => some,
    };
    let directory = arguments.start.report.as_deref();
    let redrawn = directory.filter(|_| arguments.start.redraw);
    for benchmark in all.iter().filter(|it| chosen.contains(it)) {
        let figures = match benchmark {
            Benchmark::Conversion => {
                match redrawn {
                    Some(directory) => conversion::redraw(directory)?,
                    None => conversion::measure(&arguments.conversion, directory)?,
                }
                continue;
            }
            Benchmark::Fill => {
                match redrawn {
                    Some(directory) => fill::redraw(directory)?,
                    None => fill::measure(&arguments.fill, directory)?,
                }
                continue;
            }
            Benchmark::Reads => {
                match redrawn {
                    Some(directory) => reads::redraw(directory)?,
                    None => reads::measure(&arguments.reads, directory)?,
                }
                continue;
            }
            Benchmark::Fs => {
                let layout = images::python_layout()?;
                let mut figures = json!({});
                for backend in ["fuse", "auto", "erofs"] {
                    let config = format!("[mount]\nbackend = \"{backend}\"\n");
                    let site = Site::start("bench", Release::V1, Line::OPEN, &config)?;
                    figures[backend] = files::measure(&site, &layout)?;
                }
                figures
            }
            Benchmark::Memory => memory::measure(arguments.memory_images)?,
            Benchmark::FirstRead => first_read::measure()?,
            Benchmark::Start => {
                start::measure(arguments.start.clone())?;
                continue;
            }
            Benchmark::Update => {
                match redrawn {
                    Some(directory) => update::redraw(directory)?,
                    None => update::measure(&arguments.update, directory)?,
                }
                continue;
            }
            Benchmark::Scale => {
                let (report, redraw) = (&arguments.start.report, arguments.start.redraw);
                scale::measure(arguments.scale.clone(), report.as_deref(), redraw)?;
                continue;
            }
        };
        if let (Some(path), Some(name)) = (&arguments.json, benchmark.to_possible_value()) {
            report::store(path, name.get_name(), figures)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Arguments;

    #[test]
    fn the_options_of_all_benchmarks_go_together() {
        Arguments::command().debug_assert();
    }
}
