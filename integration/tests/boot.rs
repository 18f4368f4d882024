// SPDX-License-Identifier: Apache-2.0
//! Boot lists: a start that was recorded makes the next one wait for fewer bytes, on the node that
//! recorded it and, once `sluice optimize` has attached it, on a node that never saw the image.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_integration::harness::command::run_observed;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::quick_reaper_with;
use sluice_integration::harness::http::manifest;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{images, mounts, wait};

const REPOSITORY: &str = "boot/python";

/// A pull and a run, up to the first output.
#[derive(Debug)]
struct Start {
    pull: Duration,
    total: Duration,
    requests: u64,
    bytes: u64,
}

fn start(site: &Site, reference: &str) -> Result<Start> {
    let line = site.registry.line.tally();
    let before = line.total();
    let nerdctl = site.nerdctl("boot");
    let began = Instant::now();
    nerdctl.ok(&["pull", "--quiet", reference])?;
    let pull = began.elapsed();
    let mut run = nerdctl.command()?;
    run.args(["run", "--rm", "--net", "none", reference]);
    let (mut at_ready, mut total) = (before, Duration::ZERO);
    let output = run_observed(&mut run, Duration::from_secs(120), |_| {
        total = began.elapsed();
        at_ready = line.total();
    })?;
    ensure!(
        output.ok() && output.stdout.contains("\"ready\": true"),
        "{output:?}\n{}",
        site.daemon.log_tail()
    );
    let carried = at_ready.since(before);
    Ok(Start {
        pull,
        total,
        requests: carried.requests,
        bytes: carried.bytes,
    })
}

fn eventually(what: &str, site: &Site, holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let done = wait::eventually(what, Duration::from_secs(90), holds);
    done.with_context(|| site.daemon.log_tail())
}

/// What `sluice status` says of the image's only list.
fn boot_list(site: &Site) -> Result<Value> {
    let status = site.status()?;
    let lists = status["images"][0]["boot_lists"].as_array().cloned();
    Ok(lists
        .and_then(|lists| lists.into_iter().next())
        .unwrap_or_default())
}

/// Whether a layer has a device below a directory.
fn has_devices(directory: &Path) -> Result<bool> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("list {}", directory.display())),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name() == "data" || (entry.path().is_dir() && has_devices(&entry.path())?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes the image and waits until nothing of it is left but what was learnt.
fn remove(site: &Site, reference: &str) -> Result<()> {
    site.nerdctl("boot").ok(&["rmi", "-f", reference])?;
    eventually("the image goes away", site, || {
        let gone = mounts::below(&site.daemon.state().join("mnt")).is_empty();
        Ok(gone && !has_devices(&site.daemon.state().join("devices"))?)
    })
}

/// A node that never saw an image: everything of Sluice's is gone.
fn forget_all(site: &mut Site) -> Result<()> {
    site.daemon.stop()?;
    site.daemon.kill_shim();
    mounts::abort_fuse(site.daemon.state());
    ensure!(mounts::unmount_all(site.daemon.state()).is_empty());
    std::fs::remove_dir_all(site.daemon.state())?;
    site.daemon_again()
}

fn row(name: &str, start: &Start) {
    println!(
        "{name:<24} pull {:.2} s, first output after {:.2} s, {} requests, {:.1} MB",
        start.pull.as_secs_f64(),
        start.total.as_secs_f64(),
        start.requests,
        start.bytes as f64 / 1e6
    );
}

/// A start that moves at most two thirds of what one without a list does, and is not later, in at most three: a machine
/// that is busy for a moment makes readers overtake the burst, and never the other way round.
fn quick_start(
    site: &mut Site,
    (name, reference): (&str, &str),
    without: &Start,
    again: impl Fn(&mut Site) -> Result<()>,
) -> Result<Start> {
    for _ in 0..3 {
        let this = start(site, reference)?;
        row(name, &this);
        if this.bytes * 3 <= without.bytes * 2 && this.total <= without.total {
            return Ok(this);
        }
        remove(site, reference)?;
        again(site)?;
    }
    bail!("{name}: no start was as quick as it should be")
}

#[test]
fn a_recorded_start_makes_the_next_one_fast() -> Result<()> {
    let config = quick_reaper_with("auto");
    let config = format!("{config}\n[boot]\nwindow = \"4s\"\n");
    let mut site = Site::start("boot", Release::V1, Line::OPEN, &config)?;
    let layout = images::python_layout()?;
    let [original, reference] = site.push_and_convert(&layout, REPOSITORY)?;
    // The first start of all also reads the programs from the disk.
    start(&site, &reference)?;
    remove(&site, &reference)?;
    forget_all(&mut site)?;

    site.registry.line.set_line(Line::WIDE_AREA);
    let without = start(&site, &reference)?;
    row("without a boot list", &without);
    eventually("a start is learnt from", &site, || {
        Ok(boot_list(&site)?["starts"].as_u64() == Some(1))
    })?;
    let list = boot_list(&site)?;
    let chunks = list["chunks"].as_u64().unwrap();
    ensure!(list["origin"] == "learned" && chunks > 50, "{list}");

    remove(&site, &reference)?;
    let learned = ("with a learned list", reference.as_str());
    quick_start(&mut site, learned, &without, |_| Ok(()))?;
    eventually("another start is learnt from", &site, || {
        Ok(boot_list(&site)?["starts"].as_u64() >= Some(2))
    })?;
    let list = boot_list(&site)?;
    let number = |key: &str| list[key].as_u64().unwrap();
    ensure!(number("read_bytes") * 2 > number("loaded_bytes"), "{list}");
    let counted = |name: &str| site.daemon.metric(name, &[]);
    ensure!(counted("sluice_boot_loaded_chunks_total")? >= chunks as f64 / 2.0);
    ensure!(counted("sluice_boot_read_chunks_total")? > 0.0);
    let why = site.daemon.sluice_ok(&["why", &reference])?;
    ensure!(why.stdout.contains("boot list: "), "{why:?}");

    // Attached to the image: another manifest, and nothing else.
    let direct = site.registry.direct();
    let before = manifest(&direct, REPOSITORY, "sluice")?;
    let optimized = format!("{}/{REPOSITORY}:boot", site.registry.host());
    let result = site
        .daemon
        .sluice_ok(&["optimize", &reference, "--tag", "boot", "--json"])?;
    let result: Value = serde_json::from_str(&result.stdout)?;
    ensure!(result["digest"] != result["old_digest"], "{result}");
    println!("{result}");
    let after = manifest(&direct, REPOSITORY, "boot")?;
    let mut stripped = after.clone();
    let name = "containerd.io/snapshot/sluice.boot";
    for layer in stripped["layers"].as_array_mut().unwrap() {
        let annotations = layer["annotations"].as_object_mut().unwrap();
        if let Some(text) = annotations.remove(name) {
            ensure!(name.len() + text.as_str().unwrap().len() < 4096);
        }
    }
    ensure!(stripped == before && after != before, "{after:#}");
    // A conversion of the original to the same name keeps what is attached.
    let [from, to] = [&original, &optimized].map(|it| format!("docker://{it}"));
    site.daemon.sluice_ok(&["convert", &from, &to])?;
    ensure!(manifest(&direct, REPOSITORY, "boot")? == after);

    // On a node that never saw the image.
    remove(&site, &reference)?;
    forget_all(&mut site)?;
    let attached = ("with an attached list", optimized.as_str());
    let over_fuse = quick_start(&mut site, attached, &without, forget_all)?;
    let list = boot_list(&site)?;
    ensure!(list["origin"] == "attached", "{list}");
    remove(&site, &optimized)?;

    // The kernel asks for whole pages of devices; the list was recorded where nobody does.
    let config = site.root.join("sluice.toml")?;
    let [auto, erofs] = ["auto", "erofs"].map(quick_reaper_with);
    let text = std::fs::read_to_string(&config)?;
    ensure!(text.contains(&auto), "{text}");
    std::fs::write(&config, text.replace(&auto, &erofs))?;
    forget_all(&mut site)?;
    let attached = ("the same, EROFS alone", optimized.as_str());
    let alone = quick_start(&mut site, attached, &without, forget_all)?;
    let backend = &site.status()?["mounts"][0]["backend"];
    ensure!(backend == "erofs", "{backend}");
    let (most, requests) = (over_fuse.requests * 3 / 2, alone.requests);
    ensure!(requests <= most, "{requests} requests, {most} at most");
    remove(&site, &optimized)
}
