// SPDX-License-Identifier: Apache-2.0
//! The next version of an image, of which every layer is another one: what a node that has the version before fetches.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::QUICK_REAPER;
use sluice_integration::harness::http::manifest;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{images, rebuilt};

const SEALS: Duration = Duration::from_secs(120);

/// Runs the image and waits until all of it is here; the bytes that the line carried.
fn bring(site: &Site, reference: &str) -> Result<u64> {
    let line = site.registry.line.tally();
    let before = line.total();
    let nerdctl = site.nerdctl("reuse");
    nerdctl.ok(&["pull", "--quiet", reference])?;
    let output = nerdctl.ok(&["run", "--rm", "--net", "none", reference])?;
    ensure!(output.stdout.contains("\"ready\": true"), "{output:?}");
    site.wait_sealed(SEALS)?;
    Ok(line.total().since(before).bytes)
}

fn version(site: &Site, layout: &std::path::Path, name: &str) -> Result<(String, u64)> {
    let repository = format!("reuse/{name}");
    let [_, reference] = site.push_and_convert(layout, &repository)?;
    let manifest = manifest(&site.registry.direct(), &repository, "sluice")?;
    let layers = manifest["layers"].as_array().context("layers")?;
    let sizes = layers.iter().filter_map(|layer| layer["size"].as_u64());
    Ok((reference, sizes.sum()))
}

#[test]
fn the_next_version_of_an_image_costs_what_changed() -> Result<()> {
    let config = format!("{QUICK_REAPER}\n[prefetch]\ndelay = \"0s\"\n");
    let site = Site::start("reuse", Release::V1, Line::OPEN, &config)?;
    let layout = images::python_layout()?;
    let directory = tempfile::tempdir()?;
    let (next, changes) = rebuilt::write(&layout, directory.path(), "/email/")?;
    let (first, all) = version(&site, &layout, "first")?;
    let (second, next_all) = version(&site, &next, "second")?;
    let fetched = bring(&site, &first)?;
    ensure!(fetched > all * 9 / 10, "{fetched} of {all}");

    let fetched = bring(&site, &second)?;
    println!(
        "{} of {next_all} bytes for a version of which {} of {} bytes of files changed",
        fetched, changes.bytes, changes.all_bytes
    );
    let log = site.daemon.log();
    ensure!(
        log.contains("made of files of other layers"),
        "{}",
        site.daemon.log_tail()
    );
    ensure!(!log.contains("wrong=1"), "{}", site.daemon.log_tail());
    // What changed is part of chunks; headers and trees are new.
    let changed = next_all as f64 * changes.bytes as f64 / changes.all_bytes as f64;
    ensure!(
        (fetched as f64) < changed * 2.0 + next_all as f64 * 0.1,
        "{fetched} of {next_all}, {changes:?}\n{}",
        site.daemon.log_tail()
    );
    Ok(())
}
