// SPDX-License-Identifier: Apache-2.0
//! A registry that swallows lazy reads delays a pull by Prepare's budget at most, and no other image.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_integration::harness::command;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::{Line, Mode};
use sluice_integration::harness::site::Site;

fn image(site: &Site, name: &str, layers: usize) -> Result<String> {
    let mut all = Vec::new();
    for i in 0..layers {
        let mut layer = Layer::new();
        if i == 0 {
            layer
                .file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
                .symlink("bin/sh", "busybox")?;
        }
        layer.file(
            &format!("{name}-{i}"),
            Attributes::root(0o644),
            format!("{name} {i}\n").as_bytes(),
        )?;
        all.push(layer);
    }
    let directory = tempfile::tempdir()?;
    let layout = layout::write(directory.path(), &mut all, &["/bin/sh", "-c", "cat /*-*"])?;
    let [_, reference] = site.push_and_convert(&layout, &format!("budget-{name}"))?;
    Ok(reference)
}

#[test]
fn a_black_hole_costs_the_budget_once() -> Result<()> {
    let site = Site::start("budget", Release::V1, Line::OPEN, "")?;
    let held = image(&site, "held", 4)?;
    let other = image(&site, "other", 2)?;
    let lazy_before = image(&site, "before", 2)?;
    let nerdctl = site.nerdctl("budget");
    nerdctl.ok(&["pull", "--quiet", &lazy_before])?;

    site.registry.line.set_mode(Mode::HoldRanges);
    let mut pull = nerdctl.command()?;
    pull.args(["pull", "--quiet", &held]);
    let start = Instant::now();
    let puller = std::thread::spawn(move || command::run(&mut pull, Duration::from_secs(120)));
    std::thread::sleep(Duration::from_millis(500));

    // While it waits: the collector runs, an image that is here starts, and an ordinary one is pulled.
    site.containerd
        .ctr_ok("budget", &["images", "tag", &lazy_before, "gone:1"])?;
    site.containerd
        .ctr_ok("budget", &["images", "rm", "--sync", "gone:1"])?;
    let collected = start.elapsed();
    let overlay = site.nerdctl_with("elsewhere", "overlayfs");
    overlay.ok(&["pull", "--quiet", &other])?;
    let listed = Instant::now();
    site.containerd
        .ctr_ok("budget", &["snapshots", "--snapshotter", "sluice", "ls"])?;
    println!(
        "collector answered after {collected:?}, other pull after {:?}, list took {:?}",
        start.elapsed(),
        listed.elapsed()
    );
    ensure!(
        collected < Duration::from_secs(7),
        "the collector waited {collected:?}"
    );
    ensure!(
        start.elapsed() < Duration::from_secs(15),
        "others waited {:?}",
        start.elapsed()
    );

    let pulled = puller.join().unwrap()?;
    ensure!(pulled.ok(), "{pulled:?}\n{}", site.daemon.log_tail());
    println!(
        "pull of 4 layers behind the black hole took {:?}",
        pulled.elapsed
    );
    ensure!(
        pulled.elapsed < Duration::from_secs(12),
        "the budget was paid more than once: {:?}",
        pulled.elapsed
    );
    let shown = nerdctl.ok(&["run", "--rm", "--net", "none", &held])?.stdout;
    ensure!(shown == "held 0\nheld 1\nheld 2\nheld 3\n", "{shown}");
    let why = site
        .daemon
        .sluice()?
        .args(["why", "--namespace", "budget", &held])
        .output()?;
    let why = String::from_utf8_lossy(&why.stdout).into_owned();
    ensure!(
        why.contains("budget") || why.contains("deadline"),
        "`sluice why` does not say why:\n{why}"
    );
    Ok(())
}
