// SPDX-License-Identifier: Apache-2.0
//! Every format of layers by every client on both containerds: the same files, the same output, lazy where it can be.
//!
//! Short: each format by each client, so that each pair of format, client and containerd is there. `SLUICE_LONG`: all.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::quick_reaper_with;
use sluice_integration::harness::kubernetes;
use sluice_integration::harness::layout::{self, Coding};
use sluice_integration::harness::look::Why;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::wait::eventually;
use sluice_integration::harness::{http, images};
use sluice_integration::oddities::entry::Entry;
use sluice_integration::oddities::together;
use sluice_integration::tree::same_but_touched;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Converted,
    GzipReferrer,
    GzipNode,
    EStargz,
    ZstdChunked,
    Zstd,
    Plain,
}

impl Format {
    const ALL: [Self; 7] = [
        Self::Converted,
        Self::GzipReferrer,
        Self::GzipNode,
        Self::EStargz,
        Self::ZstdChunked,
        Self::Zstd,
        Self::Plain,
    ];

    /// How the image is written before anything is made of it.
    fn coding(self) -> Coding {
        match self {
            Self::Converted | Self::EStargz | Self::ZstdChunked => Coding::Gzip,
            Self::GzipReferrer | Self::GzipNode => Coding::GzipMembers,
            Self::Zstd => Coding::ZstdFrames,
            Self::Plain => Coding::Plain,
        }
    }

    /// Whether the pull that is looked at can be lazy.
    fn is_lazy(self) -> bool {
        !matches!(self, Self::Zstd | Self::Plain)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Client {
    Nerdctl,
    Ctr,
    Cri,
}

impl Client {
    const ALL: [Self; 3] = [Self::Nerdctl, Self::Ctr, Self::Cri];
}

/// One cell of the matrix.
#[derive(Debug, Clone, Copy)]
struct Cell {
    format: Format,
    client: Client,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{:?}-{:?}", self.format, self.client);
        f.write_str(&name.to_lowercase())
    }
}

impl Cell {
    fn namespace(&self) -> String {
        match self.client {
            Client::Cri => kubernetes::NAMESPACE.to_owned(),
            Client::Nerdctl | Client::Ctr => self.to_string(),
        }
    }
}

/// Those for one containerd.
fn cells(release: Release) -> Vec<Cell> {
    let all = std::env::var_os("SLUICE_LONG").is_some();
    let mut cells = Vec::new();
    for (row, format) in Format::ALL.into_iter().enumerate() {
        for (column, client) in Client::ALL.into_iter().enumerate() {
            if all || ((row + column) % 2 == 0) == (release == Release::V1) {
                cells.push(Cell { format, client });
            }
        }
    }
    cells
}

const SHOW: &str = "cd /odd && find . | sort | md5sum && find . -type f | sort | xargs -d '\\n' cat | md5sum && echo ready";

/// Writes and pushes the image, and makes of it what its format says; gives its reference.
fn prepare(site: &Site, cell: Cell) -> Result<String> {
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let name = cell.to_string();
    // No two cells have a layer in common: each is to be pulled.
    let mark = Entry::file(format!("marks/{name}"), &name).bytes();
    let mut tars: Vec<Vec<u8>> = together();
    for tar in &mut tars {
        tar.splice(0..0, mark.clone());
    }
    let mut base = [
        Entry::file("bin/busybox", layout::busybox()?)
            .mode(0o755)
            .bytes(),
        Entry::symlink("bin/sh", "busybox").bytes(),
        mark,
    ]
    .concat();
    base.extend([0; 1024]);
    tars.insert(0, base);
    let directory = tempfile::tempdir()?;
    let command = ["/bin/sh", "-c", SHOW];
    let layout = layout::write_tars(directory.path(), &tars, cell.format.coding(), &command)?;
    images::push_layout(&layout, &format!("{direct}/{name}:original"))?;
    let [original, ready] = ["original", "ready"].map(|tag| format!("{host}/{name}:{tag}"));
    match cell.format {
        Format::Converted => {
            site.daemon.sluice_ok(&["convert", &original, &ready])?;
        }
        Format::EStargz => by_nerdctl(site, "--estargz", &original, &ready)?,
        Format::ZstdChunked => by_nerdctl(site, "--zstdchunked", &original, &ready)?,
        Format::GzipReferrer => {
            site.daemon.sluice_ok(&["index", &original])?;
            return Ok(original);
        }
        Format::GzipNode => {
            first_pull(site, cell, &original, tars.len())?;
            return Ok(original);
        }
        Format::Zstd | Format::Plain => return Ok(original),
    }
    Ok(ready)
}

/// Converts by nerdctl, which has the formats' own writers.
fn by_nerdctl(site: &Site, format: &str, original: &str, converted: &str) -> Result<()> {
    let nerdctl = site.nerdctl_with("convert", "overlayfs");
    nerdctl.ok(&["pull", "--quiet", "--unpack=false", original])?;
    nerdctl.ok(&["image", "convert", format, "--oci", original, converted])?;
    nerdctl.ok(&["push", "--quiet", converted])?;
    Ok(())
}

/// Pulls it once, so that the node has its indexes, and forgets the rest of it.
fn first_pull(site: &Site, cell: Cell, reference: &str, layers: usize) -> Result<()> {
    let made = || {
        site.daemon
            .metric("sluice_node_indexes_total", &["result=\"made\""])
    };
    let before = made()?;
    pull(site, cell, reference)?;
    eventually("each layer is indexed", Duration::from_secs(60), || {
        Ok(made()? >= before + layers as f64)
    })
    .with_context(|| site.daemon.log_tail())?;
    let namespace = cell.namespace();
    match cell.client {
        Client::Cri => site.kubernetes().ok(&["rmi", reference])?,
        Client::Nerdctl | Client::Ctr => site.nerdctl(&namespace).ok(&["rmi", "-f", reference])?,
    };
    let chain_id = http::chain_id(&site.registry.direct(), &cell.to_string(), "original")?;
    eventually("its snapshots go", Duration::from_secs(60), || {
        let list = ["snapshots", "--snapshotter", "sluice", "ls"];
        let left = site.containerd.ctr_ok(&namespace, &list)?.stdout;
        Ok(!left.contains(&chain_id))
    })
}

fn pull(site: &Site, cell: Cell, reference: &str) -> Result<()> {
    let namespace = cell.namespace();
    match (cell.client, site.containerd.release()) {
        (Client::Nerdctl, _) => {
            site.nerdctl(&namespace)
                .ok(&["pull", "--quiet", reference])?;
        }
        // That of 1.6 asks no snapshotter for layers that need no download.
        (Client::Ctr, Release::V1) => site.pull_lazily(&namespace, reference)?,
        (Client::Ctr, Release::V2) => {
            let pull = [
                "images",
                "pull",
                "--plain-http",
                "--snapshotter",
                "sluice",
                reference,
            ];
            site.containerd.ctr_ok(&namespace, &pull)?;
        }
        (Client::Cri, _) => site.kubernetes().pull(reference)?,
    }
    Ok(())
}

/// What a container of it says.
fn run(site: &Site, cell: Cell, reference: &str) -> Result<String> {
    let namespace = cell.namespace();
    Ok(match cell.client {
        Client::Nerdctl => {
            let run = ["run", "--rm", "--net", "none", reference];
            site.nerdctl(&namespace).ok(&run)?.stdout
        }
        Client::Ctr => {
            let run = ["run", "--rm", "--snapshotter", "sluice", reference, "it"];
            site.containerd.ctr_ok(&namespace, &run)?.stdout
        }
        Client::Cri => site.kubernetes().run(&cell.to_string(), reference)?,
    })
}

fn whole_seconds(line: &str) -> String {
    let fields = line.split(' ').map(|field| match field.split_once('.') {
        Some((time, _)) if field.starts_with("mtime=") => time,
        _ => field,
    });
    fields.collect::<Vec<_>>().join(" ")
}

fn check(site: &Site, cell: Cell) -> Result<()> {
    let started = SystemTime::now() - Duration::from_secs(1);
    let reference = prepare(site, cell)?;
    let (namespace, plain) = (cell.namespace(), format!("plain-{cell}"));
    pull(site, cell, &reference)?;
    let said = run(site, cell, &reference)?;
    site.pull_ordinarily(&plain, &reference)?;
    let ordinary = [
        "run",
        "--rm",
        "--snapshotter",
        "overlayfs",
        &reference,
        "it",
    ];
    let expected = site.containerd.ctr_ok(&plain, &ordinary)?.stdout;
    ensure!(
        said == expected && said.contains("ready"),
        "a container says\n{said}and on overlayfs\n{expected}"
    );
    let tag = reference.rsplit(':').next().unwrap_or_default();
    let chain_id = http::chain_id(&site.registry.direct(), &cell.to_string(), tag)?;
    let mut unpacked = site.files(&plain, "overlayfs", &chain_id, true)?;
    ensure!(unpacked.len() > 100, "only {} files", unpacked.len());
    let mut shown = site.files(&namespace, "sluice", &chain_id, true)?;
    if matches!(cell.format, Format::EStargz | Format::ZstdChunked) {
        // Their tables of contents hold whole seconds.
        for line in unpacked.iter_mut().chain(&mut shown) {
            *line = whole_seconds(line);
        }
    }
    same_but_touched(&unpacked, &shown, started)?;
    let why = site.why(&namespace, &reference)?;
    let as_expected = |layer: &Why| layer.lazy == cell.format.is_lazy() && !layer.reason.is_empty();
    ensure!(!why.is_empty() && why.iter().all(as_expected), "{why:?}");
    Ok(())
}

fn matrix(name: &str, release: Release) -> Result<()> {
    let config = quick_reaper_with("auto");
    let site = Site::start_for_kubernetes(name, release, Line::OPEN, &config)?;
    let mut failed = Vec::new();
    for cell in cells(release) {
        let start = Instant::now();
        match check(&site, cell) {
            Ok(()) => println!(
                "{cell} on {}: {:.1} s",
                release.name(),
                start.elapsed().as_secs_f64()
            ),
            Err(error) => failed.push(format!("{cell}: {error:#}")),
        }
    }
    let log = site.daemon.log_tail();
    ensure!(failed.is_empty(), "{}\n{log}", failed.join("\n"));
    Ok(())
}

#[test]
fn every_format_by_every_client_on_containerd_1() -> Result<()> {
    matrix("matrix1", Release::V1)
}

#[test]
fn every_format_by_every_client_on_containerd_2() -> Result<()> {
    matrix("matrix2", Release::V2)
}
