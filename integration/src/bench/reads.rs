// SPDX-License-Identifier: Apache-2.0
//! Reads of images that are complete on the node, side by side with what users would pick instead.
//!
//! Each contender has a node of its own, where the image was pulled, started once and has come as a whole; then its
//! processes are ended, and what a container would see is mounted. All nodes live at once, and the contenders take turns
//! in each operation of each round, in an order that moves on from round to round.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum as _};
use serde_json::json;

use figures::{Figures, Outcome, Scene};
use nodes::Nodes;
use reader::Reader;
use rounds::Subject;

use super::report as document;
use super::start::images::Image;

pub mod figures;
pub mod nodes;
pub mod reader;
pub mod report;
pub mod rounds;

/// The name of the benchmark and of its files.
const NAME: &str = "reads";

/// What is measured.
#[derive(Debug, Clone, Args)]
#[group(id = "reads")]
pub struct Options {
    /// Images whose files are read.
    #[arg(long, value_delimiter = ',', value_enum, value_name = "IMAGES",
        default_values_t = [Image::Python, Image::Node, Image::Postgres])]
    pub reads_images: Vec<Image>,
    /// Who serves them; all by default. Overlayfs is always among them.
    #[arg(long, value_delimiter = ',', value_enum, value_name = "CONTENDERS")]
    pub reads_contenders: Vec<Reader>,
    /// How often each of them does each operation.
    #[arg(long, default_value_t = 5, value_name = "ROUNDS")]
    pub reads_rounds: usize,
}

impl Options {
    fn contenders(&self) -> Vec<Reader> {
        let mut contenders = self.reads_contenders.clone();
        if contenders.is_empty() {
            contenders = Reader::value_variants().to_vec();
        }
        contenders.push(Reader::Overlayfs);
        contenders.sort();
        contenders.dedup();
        contenders
    }
}

/// Measures, prints, and keeps reads.json and reads.md in `directory`; what is there of other images stays.
pub fn measure(options: &Options, directory: Option<&Path>) -> Result<()> {
    ensure!(
        options.reads_rounds > 0,
        "--reads-rounds must be at least 1"
    );
    let mut figures = Figures::new();
    if let Some(directory) = directory {
        let stored = document::stored(&directory.join("reads.json"), NAME)?;
        figures = stored.map_or_else(Figures::new, |entry| entry.figures);
    }
    for image in &options.reads_images {
        let scene = of_image(*image, &options.contenders(), options.reads_rounds)?;
        print!("{}", report::table(image.name(), &scene));
        figures.insert(image.name().to_owned(), scene);
        if let Some(directory) = directory {
            document::keep(directory, NAME, json!(figures), report::markdown)?;
        }
    }
    Ok(())
}

/// Writes reads.md again from reads.json.
pub fn redraw(directory: &Path) -> Result<()> {
    document::redraw(directory, NAME, report::markdown)
}

fn of_image(image: Image, contenders: &[Reader], count: usize) -> Result<Scene> {
    println!(
        "\nreads of {}, complete, {count} rounds in turn",
        image.name()
    );
    let nodes = Nodes::start(image, contenders)?;
    let rootfs = nodes.mount()?;
    let paths: Vec<(Reader, &Path)> = nodes
        .readers()
        .zip(rootfs.iter().map(|it| it.path()))
        .collect();
    nodes.complete(&paths)?;
    let subject = Subject::of(&paths)?;
    println!(
        "   {} entries, {:.0} MB; at random: {}, {:.0} MB",
        subject.files,
        subject.bytes as f64 / 1e6,
        subject.large_file.display(),
        subject.large_file_bytes as f64 / 1e6
    );
    let mut times = rounds::run(&nodes, &paths, &subject, count)?;
    let mut outcomes = BTreeMap::new();
    for node in nodes.all() {
        let (times, line_bytes) = times.remove(&node.reader).unwrap_or_default();
        let outcome = Outcome {
            version: node.version.clone(),
            served_by: node.served_by()?,
            times,
            line_bytes,
            peak_rss_bytes: node.node.service.peak_rss_bytes()?,
        };
        outcomes.insert(node.reader, outcome);
    }
    Ok(Scene {
        files: subject.files,
        bytes: subject.bytes,
        large_file: subject.large_file.display().to_string(),
        large_file_bytes: subject.large_file_bytes,
        rounds: count,
        readers: rounds::READERS,
        random_reads: rounds::RANDOM_READS,
        load: document::load()?,
        outcomes,
        absent: nodes.absent().clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlayfs_is_always_compared_with() {
        let mut options = Options {
            reads_images: Vec::new(),
            reads_contenders: vec![Reader::Soci, Reader::SluiceErofs],
            reads_rounds: 5,
        };
        let three = [Reader::Overlayfs, Reader::SluiceErofs, Reader::Soci];
        assert_eq!(options.contenders(), three);
        options.reads_contenders.clear();
        assert_eq!(options.contenders().len(), 6);
    }
}
