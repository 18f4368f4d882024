// SPDX-License-Identifier: Apache-2.0
//! `make demo`: converts a real image, runs it before its bytes are here, and compares.
//!
//! Ordinary pull and run (overlayfs) against lazy pull and run (Sluice), both from the same registry
//! behind the same line of 100 Mbit/s and 20 ms; then background completion, the seal, and a start
//! with the registry stopped. Everything lives below one temporary root and is gone afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sluice_integration::harness::command::run_observed;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::{QUICK_REAPER, shim_pids};
use sluice_integration::harness::images;
use sluice_integration::harness::mounts;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::tools;

const MB: f64 = 1e6;
const DEADLINE: Duration = Duration::from_secs(300);

/// One cold pull and run.
#[derive(Debug)]
struct Measured {
    pull: Duration,
    ready: Duration,
    bytes_at_ready: u64,
    requests: u64,
}

fn main() -> Result<()> {
    let site = Site::start("demo", Release::V1, Line::OPEN, QUICK_REAPER)?;
    let layout = images::python_layout()?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    println!("1. push the original image to a private registry");
    images::push_layout(&layout, &format!("{direct}/demo/python:original"))?;

    println!("2. sluice convert (once, in a pipeline)");
    let converted = site.daemon.sluice_ok(&[
        "convert",
        &format!("docker://{host}/demo/python:original"),
        &format!("docker://{host}/demo/python:sluice"),
    ])?;
    println!("   {:.1} s", converted.elapsed.as_secs_f64());
    print!(
        "{}",
        indent(
            &site
                .daemon
                .sluice_ok(&["inspect", &format!("docker://{host}/demo/python:sluice")])?
                .stdout
        )
    );

    site.registry.line.set_line(Line::WIDE_AREA);
    println!("3. cold start on a line of 100 Mbit/s and 20 ms");
    let go = tools::go_tool("nerdctl1").is_ok();
    let client = if go {
        "nerdctl pull, nerdctl run"
    } else {
        "ctr/sluice pull, ctr run"
    };
    let ordinary = cold_start(
        &site,
        go,
        "overlayfs",
        &format!("{host}/demo/python:original"),
    )?;
    let before_lazy = site.registry.line.bytes();
    let lazy = cold_start(&site, go, "sluice", &format!("{host}/demo/python:sluice"))?;

    println!("4. background completion");
    let start = Instant::now();
    site.wait_sealed(DEADLINE)?;
    let all = site.registry.line.bytes() - before_lazy;
    println!(
        "   every layer complete and sealed against its diff ID after {:.1} s more",
        start.elapsed().as_secs_f64()
    );
    print!("{}", indent(&site.daemon.sluice_ok(&["status"])?.stdout));

    println!("5. the image is removed, and started again: what its first start read is known now");
    let converted = format!("{host}/demo/python:sluice");
    // Both have one config, by which containerd would keep the snapshots of the other.
    let original = format!("{host}/demo/python:original");
    remove(&site, go, "overlayfs", &original)?;
    forget(&site, go, &converted)?;
    let before_boot = site.registry.line.bytes();
    let boot = cold_start(&site, go, "sluice", &converted)?;
    site.wait_sealed(DEADLINE)?;
    let all_boot = site.registry.line.bytes() - before_boot;

    println!(
        "\n   {client}          pull s   run s  total s  MB at first output  MB in all  requests"
    );
    row("ordinary (overlayfs)", &ordinary, ordinary.bytes_at_ready);
    row("lazy (sluice)", &lazy, all);
    row("lazy with a boot list (sluice)", &boot, all_boot);
    let sooner = |m: &Measured| total(&ordinary) / total(m);
    let share = |m: &Measured| m.bytes_at_ready as f64 / ordinary.bytes_at_ready as f64 * 100.0;
    println!(
        "   first output {:.1} times sooner, with {:.1} % of the image's bytes; with a boot list {:.1} times, with {:.1} %\n",
        sooner(&lazy),
        share(&lazy),
        sooner(&boot),
        share(&boot)
    );

    println!("6. the registry stops; a new container starts");
    let mut site = site;
    site.registry.stop()?;
    let again = run_image(
        &site,
        go,
        "sluice",
        &format!("{host}/demo/python:sluice"),
        "offline",
        |_| (),
    )?;
    println!(
        "   ready after {:.2} s with no registry",
        again.as_secs_f64()
    );

    println!("7. remove the image");
    remove(&site, go, "sluice", &converted)?;
    let root = site.root.path().to_owned();
    drop(site);
    let left = mounts::below(&root);
    let shims = shim_pids(&root.join("run"));
    ensure!(
        left.is_empty() && shims.is_empty() && !root.exists(),
        "left behind: {left:?}, processes {shims:?} in {}",
        root.display()
    );
    println!(
        "   nothing is left: no mount, no process, no file below {}",
        root.display()
    );
    ensure!(
        share(&lazy) < 30.0,
        "{:.1} % of the image was fetched before the first output",
        share(&lazy)
    );
    Ok(())
}

/// Pulls and runs once from nothing and removes the container, not the image.
fn cold_start(site: &Site, go: bool, snapshotter: &str, reference: &str) -> Result<Measured> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").ok();
    let (bytes, requests) = (site.registry.line.bytes(), site.registry.line.requests());
    let start = Instant::now();
    if go {
        site.nerdctl_with("demo", snapshotter)
            .ok(&["pull", "--quiet", reference])?;
    } else if snapshotter == "sluice" {
        site.pull_lazily("demo", reference)?;
    } else {
        site.containerd.ctr_ok(
            "demo",
            &[
                "images",
                "pull",
                "--plain-http",
                "--snapshotter",
                snapshotter,
                reference,
            ],
        )?;
    }
    let pull = start.elapsed();
    let mut bytes_at_ready = 0;
    let ready = run_image(site, go, snapshotter, reference, "cold", |_| {
        bytes_at_ready = site.registry.line.bytes() - bytes;
    })?;
    Ok(Measured {
        pull,
        ready,
        bytes_at_ready,
        requests: site.registry.line.requests() - requests,
    })
}

/// Runs the image's command and returns the time to its first output line.
fn run_image(
    site: &Site,
    go: bool,
    snapshotter: &str,
    reference: &str,
    name: &str,
    on_first_output: impl FnMut(Duration),
) -> Result<Duration> {
    let name = format!("{snapshotter}-{name}");
    let mut run = if go {
        let mut c = site.nerdctl_with("demo", snapshotter).command()?;
        c.args(["run", "--rm", "--net", "none", "--name", &name, reference]);
        c
    } else {
        let mut c = site.containerd.ctr()?;
        c.args([
            "-n",
            "demo",
            "run",
            "--rm",
            "--snapshotter",
            snapshotter,
            reference,
            &name,
        ]);
        c
    };
    let output = run_observed(&mut run, DEADLINE, on_first_output)?;
    if !output.ok() || !output.stdout.contains("\"ready\": true") {
        bail!(
            "{run:?} ended with {}: {}{}\n{}",
            output.status,
            output.stdout,
            output.stderr,
            site.daemon.log_tail()
        );
    }
    output.first_output.context("the container printed nothing")
}

fn remove(site: &Site, go: bool, snapshotter: &str, reference: &str) -> Result<()> {
    if go {
        site.nerdctl_with("demo", snapshotter)
            .ok(&["rmi", reference])?;
    } else {
        site.containerd
            .ctr_ok("demo", &["images", "rm", "--sync", reference])?;
    }
    Ok(())
}

/// Removes the image and waits until nothing of it is left but what was learnt.
fn forget(site: &Site, go: bool, reference: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        let list = &site.status()?["images"][0]["boot_lists"][0];
        if list["starts"].as_u64() > Some(0) {
            println!("   {} chunks, as `sluice status` says", list["chunks"]);
            break;
        }
        ensure!(start.elapsed() < DEADLINE, "no start was recorded");
        std::thread::sleep(Duration::from_millis(250));
    }
    remove(site, go, "sluice", reference)?;
    while site.status()?["store_present_bytes"].as_u64() != Some(0) {
        ensure!(start.elapsed() < DEADLINE, "the image stays in the store");
        std::thread::sleep(Duration::from_millis(250));
    }
    Ok(())
}

fn total(m: &Measured) -> f64 {
    (m.pull + m.ready).as_secs_f64()
}

fn row(name: &str, m: &Measured, all: u64) {
    println!(
        "   {name:<32} {:>8.2} {:>7.2} {:>8.2} {:>19.1} {:>10.1} {:>9}",
        m.pull.as_secs_f64(),
        m.ready.as_secs_f64(),
        total(m),
        m.bytes_at_ready as f64 / MB,
        all as f64 / MB,
        m.requests
    );
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("   {l}\n")).collect()
}
