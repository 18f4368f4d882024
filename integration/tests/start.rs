// SPDX-License-Identifier: Apache-2.0
//! The budget of a start, in round trips (docs/start.md): how often a pull and the first output of a container wait for
//! the registry one after the other, and how often they ask it at all.
//!
//! The line is as far away as another planet and as wide as a local one, so that all else is small beside the waits.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_integration::harness::command::run_observed;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::proxy::tally::Traffic;
use sluice_integration::harness::site::Site;

/// For each new connection, and for the first byte of each answer.
const ROUND_TRIP: Duration = Duration::from_millis(500);
const FAR: Line = Line {
    latency: ROUND_TRIP,
    ..Line::OPEN
};
const LAYERS: usize = 8;

// The budget. Of the pull, six are containerd's: HTTPS is tried, a connection, the manifest asked for and fetched, the
// config; two are ours: a connection, and one wave for the indexes of all layers.
const PULL_ROUND_TRIPS: u64 = 9;
const PULL_REQUESTS: u64 = 3 + LAYERS as u64;
// A program of 2 MB: a connection, and windows that double.
const FIRST_ROUND_TRIPS: u64 = 6;
const FIRST_REQUESTS: u64 = 5;
// And a file of each layer, one after the other as the program reads them.
const READY_ROUND_TRIPS: u64 = FIRST_ROUND_TRIPS + LAYERS as u64 + 1;
const READY_REQUESTS: u64 = FIRST_REQUESTS + LAYERS as u64 + 1;
// With completion, which is on by default and has the line between the waits: the image is small beside it, so all of
// it is here before the program asks for its second file.
const COMPLETED_ROUND_TRIPS: u64 = 5;
const COMPLETED_REQUESTS: u64 = 20;

/// What one phase took.
#[derive(Debug, Clone, Copy)]
struct Phase {
    took: Duration,
    line: Traffic,
}

impl Phase {
    /// Waits one after the other.
    fn round_trips(self) -> u64 {
        u64::try_from(self.took.as_millis() / ROUND_TRIP.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Sums up a phase when it ends.
struct Clock<'s> {
    site: &'s Site,
    began: Instant,
    before: Traffic,
}

impl<'s> Clock<'s> {
    fn start(site: &'s Site) -> Self {
        Self {
            site,
            before: site.registry.line.tally().total(),
            began: Instant::now(),
        }
    }

    fn phase(&self) -> Phase {
        let total = self.site.registry.line.tally().total();
        Phase {
            took: self.began.elapsed(),
            line: total.since(self.before),
        }
    }
}

/// An image of several layers whose program reads a file of each; no two of other numbers have a file in common.
fn image(number: usize) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    for at in 0..LAYERS {
        let mut layer = Layer::new();
        if at == 0 {
            layer.directory("bin", Attributes::root(0o755))?;
            layer.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?;
            layer.symlink("bin/sh", "busybox")?;
        }
        let content: Vec<u8> = (0..100_000)
            .map(|it: usize| (it + at + 1000 * number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32)
            .flat_map(|it| it.to_le_bytes().into_iter().take(4))
            .collect();
        layer.file(&format!("data/{at}"), Attributes::root(0o644), &content)?;
        layers.push(layer);
    }
    Ok(layers)
}

#[test]
fn a_start_keeps_to_its_budget_of_round_trips() -> Result<()> {
    let first = ("first output", FIRST_ROUND_TRIPS, FIRST_REQUESTS);
    let ready = ("all read", READY_ROUND_TRIPS, READY_REQUESTS);
    start("[prefetch]\nenabled = false\n", first, ready)
}

#[test]
fn completion_saves_a_start_its_round_trips() -> Result<()> {
    let of = |name| (name, COMPLETED_ROUND_TRIPS, COMPLETED_REQUESTS);
    start("", of("first output"), of("all read"))
}

/// Of each of eight layers, whose indexes come from next door, and of the mount of them all. The goals are 5 and 10 ms on an
/// idle machine, in a release build; tests are built for less speed, and beside others.
const PREPARE: Duration = Duration::from_millis(20);
const MOUNT: Duration = Duration::from_millis(40);

#[test]
fn what_a_start_computes_takes_milliseconds() -> Result<()> {
    let site = Site::start("start", Release::V1, Line::OPEN, "")?;
    let nerdctl = site.nerdctl("start");
    let spent = |methods: &[&str]| -> Result<[f64; 2]> {
        let mut sums = [0.0; 2];
        for method in methods {
            let label = format!("method=\"{method}\"");
            for (sum, part) in sums.iter_mut().zip(["sum", "count"]) {
                let name = format!("sluice_snapshots_request_seconds_{part}");
                *sum += site.daemon.metric(&name, &[&label])?;
            }
        }
        Ok(sums)
    };
    // Other tests have the processors, too: the quickest of a few counts.
    let mut quickest = [f64::MAX; 2];
    for number in 1..=5 {
        let directory = tempfile::tempdir()?;
        let name = format!("start/own{number}");
        let layout = layout::write(
            directory.path(),
            &mut image(number)?,
            &["/bin/sh", "-c", ":"],
        )?;
        let [_, reference] = site.push_and_convert(&layout, &name)?;
        let before = spent(&["Prepare"])?;
        nerdctl.ok(&["pull", "--quiet", &reference])?;
        let pulled = spent(&["Prepare"])?;
        // The snapshots of containerd's own are prepared as lazy ones are.
        let prepared = pulled[1] - before[1];
        ensure!(
            prepared >= LAYERS as f64,
            "{prepared} Prepares of {LAYERS} layers"
        );
        let prepare = (pulled[0] - before[0]) / prepared;
        let before = spent(&["Prepare", "Mounts"])?;
        nerdctl.ok(&["run", "--rm", "--net", "none", &reference])?;
        let mount = spent(&["Prepare", "Mounts"])?[0] - before[0];
        println!(
            "Prepare {:.2} ms, mount {:.2} ms",
            prepare * 1e3,
            mount * 1e3
        );
        for (least, seconds) in quickest.iter_mut().zip([prepare, mount]) {
            *least = least.min(seconds);
        }
    }
    let [prepare, mount] = quickest.map(Duration::from_secs_f64);
    ensure!(prepare < PREPARE && mount < MOUNT, "{prepare:?}, {mount:?}");
    Ok(())
}

/// A phase's name, and its round trips and requests at most.
type Budget = (&'static str, u64, u64);

fn start(config: &str, first_budget: Budget, ready_budget: Budget) -> Result<()> {
    let site = Site::start("start", Release::V1, Line::OPEN, config)?;
    let directory = tempfile::tempdir()?;
    let command = "for i in 0 1 2 3 4 5 6 7; do /bin/busybox md5sum /data/$i; done";
    let command = ["/bin/sh", "-c", command];
    let layout = layout::write(directory.path(), &mut image(0)?, &command)?;
    let [_, reference] = site.push_and_convert(&layout, "start/image")?;
    site.registry.line.set_line(FAR);
    let nerdctl = site.nerdctl("start");

    let clock = Clock::start(&site);
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    let pull = clock.phase();

    let clock = Clock::start(&site);
    let mut run = nerdctl.command()?;
    run.args(["run", "--rm", "--net", "none", &reference]);
    let mut first = None;
    let output = run_observed(&mut run, Duration::from_secs(120), |_| {
        first.get_or_insert_with(|| clock.phase());
    })?;
    ensure!(output.ok(), "{output:?}\n{}", site.daemon.log_tail());
    let first = first.unwrap();
    let ready = clock.phase();
    for (phase, (name, round_trips, requests)) in [
        (pull, ("pull", PULL_ROUND_TRIPS, PULL_REQUESTS)),
        (first, first_budget),
        (ready, ready_budget),
    ] {
        let (waited, asked) = (phase.round_trips(), phase.line.requests);
        println!(
            "{name:<14} {waited:>2} round trips of {round_trips}, {asked:>2} requests of {requests}, {} bytes, {:?}",
            phase.line.bytes, phase.took
        );
        ensure!(
            waited <= round_trips && asked <= requests,
            "{name} takes more than its budget\n{}",
            site.daemon.log_tail()
        );
    }
    Ok(())
}
