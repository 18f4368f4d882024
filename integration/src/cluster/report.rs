// SPDX-License-Identifier: Apache-2.0
//! What a burst measured, as a table for people and as JSON for the simulator that is calibrated on it.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::Shape;
use super::cpu::{Cpu, Load};
use crate::harness::proxy::tally::Traffic;
use crate::harness::tools;

/// What a home fetches at once; `PIECE_BYTES` of the fetcher.
pub(super) const PIECE_BYTES: u64 = 2 << 20;

/// Traffic of the registry.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Egress {
    /// Bytes sent to nodes.
    pub bytes: u64,
    /// Requests answered.
    pub requests: u64,
    /// The part of the bytes that belongs to answers that broke off.
    pub cut_bytes: u64,
    /// The part of the bytes of blobs that had been sent before in the same run, to whomever.
    pub repeated_bytes: u64,
}

impl From<Traffic> for Egress {
    fn from(traffic: Traffic) -> Self {
        let Traffic {
            bytes,
            requests,
            cut_bytes,
            repeated_bytes,
        } = traffic;
        Self {
            bytes,
            requests,
            cut_bytes,
            repeated_bytes,
        }
    }
}

/// A [`Shape`] in a report.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ShapeReport {
    /// Its word.
    pub name: &'static str,
    /// The registry's link.
    pub registry_bits_per_second: u64,
    /// Each node's link.
    pub node_bits_per_second: u64,
    /// To the registry, and back.
    pub round_trip_seconds: f64,
}

impl From<Shape> for ShapeReport {
    fn from(shape: Shape) -> Self {
        Self {
            name: shape.name,
            registry_bits_per_second: shape.registry_bits_per_second,
            node_bits_per_second: shape.node_bits_per_second,
            round_trip_seconds: shape.latency.as_secs_f64(),
        }
    }
}

/// One node of a burst; times are since all began.
#[derive(Debug, Clone, Serialize)]
pub struct NodeStart {
    /// Its name.
    pub name: String,
    /// Until `sluice pull` had ended.
    pub pull_seconds: f64,
    /// Until its container ran.
    pub begun_seconds: f64,
    /// Until its program had read what it needs: the start time.
    pub start_seconds: f64,
    /// How long it had no daemon meanwhile.
    pub outage_seconds: f64,
    /// Whether its daemon was killed.
    pub killed: bool,
    /// Whether it was cut off from its peers.
    pub cut_off: bool,
    /// What its faults explain of the registry's traffic. It was killed: answers that broke off, and a
    /// piece that had arrived and was not stored yet. It was cut off: all it had got until it was healed,
    /// because it had no one else to ask, and nobody could ask it for what it had.
    pub explained_bytes: u64,
    /// What it got from the registry until its container had ended.
    pub from_registry: Egress,
    /// Until the whole image was here and checked (looked at once a second).
    pub sealed_seconds: Option<f64>,
}

/// The end of the background completion.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sealed {
    /// All that the registry sent since the beginning.
    pub egress: Egress,
    /// Of the CPU, since the beginning.
    pub cpu: Load,
}

/// A burst.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// `alone` or `cluster`.
    pub mode: &'static str,
    /// The links.
    pub shape: ShapeReport,
    /// How many nodes.
    pub n: usize,
    /// The image's layer blobs.
    pub image_bytes: u64,
    /// Each node.
    pub nodes: Vec<NodeStart>,
    /// The registry when the last node was ready.
    pub first_output: Egress,
    /// The CPU until the last node was ready.
    pub cpu: Load,
    /// When all was complete, if that was waited for.
    pub sealed: Option<Sealed>,
    #[serde(skip)]
    pub(super) began: Option<(Instant, Cpu, Traffic)>,
}

impl Run {
    pub(super) fn seal(&mut self, egress: Traffic, cpu: Load) {
        self.sealed = Some(Sealed {
            egress: egress.into(),
            cpu,
        });
    }

    /// The longest start time, without what a killed daemon's absence took.
    #[must_use]
    pub fn slowest_seconds(&self) -> f64 {
        self.nodes
            .iter()
            .map(|it| it.start_seconds - it.outage_seconds)
            .fold(0.0, f64::max)
    }

    /// The median start time.
    #[must_use]
    pub fn median_seconds(&self) -> f64 {
        let mut seconds: Vec<f64> = self.nodes.iter().map(|it| it.start_seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied().unwrap_or_default()
    }

    /// What faults explain of the registry's traffic.
    #[must_use]
    pub fn explained_bytes(&self) -> u64 {
        self.nodes.iter().map(|node| node.explained_bytes).sum()
    }

    /// For programs. `lone` is the run that it is compared with.
    #[must_use]
    pub fn json(&self, lone: &Self) -> Value {
        let seconds: Vec<f64> = self.nodes.iter().map(|it| it.start_seconds).collect();
        let sealed = self.sealed.as_ref();
        json!({
            "mode": self.mode,
            "n": self.n,
            "start_seconds": seconds,
            "egress_bytes_first_output": self.first_output.bytes,
            "requests_first_output": self.first_output.requests,
            "egress_bytes_sealed": sealed.map(|it| it.egress.bytes),
            "requests_sealed": sealed.map(|it| it.egress.requests),
            "explained_bytes": self.explained_bytes(),
            "cpu_percent": self.cpu.percent(),
            "image_bytes": self.image_bytes,
            "lone_start_seconds": lone.slowest_seconds(),
            "lone_egress_bytes_first_output": lone.first_output.bytes,
            "lone_egress_bytes_sealed": lone.sealed.as_ref().map(|it| it.egress.bytes),
            "detail": self,
        })
    }

    /// Prints it beside a lone node's run.
    pub fn print(&self, lone: &Self) {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        println!(
            "{} {} x {}: start {:.2} s median, {:.2} s slowest ({:.2} times a lone node's {:.2} s); {}",
            self.shape.name,
            self.n,
            self.mode,
            self.median_seconds(),
            self.slowest_seconds(),
            self.slowest_seconds() / lone.slowest_seconds(),
            lone.slowest_seconds(),
            self.cpu,
        );
        println!(
            "   registry at first output: {:.2} MB ({:.2} starts), {} requests, {:.2} MB repeated, {:.2} MB cut, {:.2} MB explained by faults",
            mb(self.first_output.bytes),
            self.first_output.bytes as f64 / lone.first_output.bytes as f64,
            self.first_output.requests,
            mb(self.first_output.repeated_bytes),
            mb(self.first_output.cut_bytes),
            mb(self.explained_bytes()),
        );
        if let Some(sealed) = &self.sealed {
            let last = self.nodes.iter().filter_map(|it| it.sealed_seconds);
            println!(
                "   sealed after {:.1} s: {:.2} MB ({:.2} images of {:.2} MB), {} requests, {:.2} MB repeated; {}",
                last.fold(0.0, f64::max),
                mb(sealed.egress.bytes),
                sealed.egress.bytes as f64 / self.image_bytes as f64,
                mb(self.image_bytes),
                sealed.egress.requests,
                mb(sealed.egress.repeated_bytes),
                sealed.cpu,
            );
        }
        for node in &self.nodes {
            println!(
                "   {:<4} pull {:>6.2}  begun {:>6.2}  start {:>6.2}  {:>6.2} MB from the registry in {:>4} requests{}{}",
                node.name,
                node.pull_seconds,
                node.begun_seconds,
                node.start_seconds,
                mb(node.from_registry.bytes),
                node.from_registry.requests,
                if node.killed {
                    format!("  killed, away for {:.2} s", node.outage_seconds)
                } else {
                    String::new()
                },
                if node.cut_off { "  cut off" } else { "" },
            );
        }
    }
}

/// Replaces the section `name` of `docs/benchmarks/cluster-real.json` by these runs.
pub fn write(name: &str, lone: &Run, runs: &[Run]) -> Result<()> {
    let path = tools::workspace().join("docs/benchmarks/cluster-real.json");
    let mut document: Value = match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?
        }
        Err(_) => json!({}),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runs: Vec<Value> = runs.iter().map(|run| run.json(lone)).collect();
    document[name] = json!({"cores": cores, "shape": lone.shape, "runs": runs});
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(&path, format!("{document:#}\n"))
        .with_context(|| format!("write {}", path.display()))
}
