// SPDX-License-Identifier: Apache-2.0
//! A registry that answers nothing any more: what waits for it is named, in the log, in the metrics, by
//! `sluice status` and by `sluice doctor`, in the daemon and in the shim; and when the registry is back, the
//! reader has its bytes and nothing is stuck.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use sluice_integration::harness::command;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::{Line, Mode};
use sluice_integration::harness::site::Site;

/// Nothing is completed in the background: what is not read is not here.
const CONFIG: &str = "[prefetch]\nenabled = false\n\n[boot]\nenabled = false\n";
/// Half a minute until a reader counts as stuck, and a busy machine.
const NAMED_WITHIN: Duration = Duration::from_secs(90);

fn image(site: &Site) -> Result<String> {
    let mut layer = Layer::new();
    layer
        .file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?
        .file("word", Attributes::root(0o644), b"here\n")?;
    let directory = tempfile::tempdir()?;
    let layout = layout::write(
        directory.path(),
        &mut [layer],
        &["/bin/sh", "-c", "cat /word"],
    )?;
    let [_, reference] = site.push_and_convert(&layout, "stuck")?;
    Ok(reference)
}

/// The stuck steps of this name, as `sluice status` shows them.
fn stuck(site: &Site, step: &str) -> Result<Vec<Value>> {
    let status = site.status()?;
    let all = status["stuck"].as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().filter(|it| it["step"] == step).collect())
}

fn eventually(what: &str, site: &Site, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(
            start.elapsed() < NAMED_WITHIN,
            "{what}: not within {NAMED_WITHIN:?}: {:#}\n{}\n{}",
            site.status()?["stuck"],
            site.daemon.log_tail(),
            site.daemon.shim_log_tail()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    println!("{what} after {:?}", start.elapsed());
    Ok(())
}

#[test]
fn what_waits_for_a_dead_registry_is_named_and_forgotten_when_it_is_back() -> Result<()> {
    let site = Site::start("stuck", Release::V1, Line::OPEN, CONFIG)?;
    let reference = image(&site)?;
    let nerdctl = site.nerdctl("stuck");
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    ensure!(site.status()?["stuck"] == Value::Array(Vec::new()));

    site.registry.line.set_mode(Mode::BlackHole);
    let mut run = nerdctl.command()?;
    run.args(["run", "--rm", "--net", "none", &reference]);
    let runner = std::thread::spawn(move || command::run(&mut run, Duration::from_secs(200)));

    // The wait for the registry has its name long before the reader's.
    eventually("the registry's head is named", &site, || {
        Ok(!stuck(&site, "registry head")?.is_empty())
    })?;
    ensure!(
        stuck(&site, "reader")?.is_empty(),
        "half a minute too early"
    );
    eventually("fill and reader are named", &site, || {
        Ok(!stuck(&site, "fill")?.is_empty() && !stuck(&site, "reader")?.is_empty())
    })?;
    let reader = &stuck(&site, "reader")?[0];
    ensure!(reader["process"] == "sluice-shim", "{reader}");
    ensure!(reader["seconds"].as_u64() >= Some(30), "{reader}");
    let host = site.registry.host();
    let (log, shim_log) = (site.daemon.log(), site.daemon.shim_log_tail());
    for words in ["registry head", "fill", "reader", &host] {
        let named = |line: &str| line.contains("a step is stuck") && line.contains(words);
        ensure!(log.lines().any(named), "{words}: {log}");
    }
    ensure!(shim_log.contains("a step is stuck"), "{shim_log}");
    for step in ["registry head", "fill", "reader"] {
        let label = format!("step=\"{step}\"");
        let found = site.daemon.metric("sluice_stuck_steps_total", &[&label])?;
        ensure!(found >= 1.0, "{step}: {}", site.daemon.metrics()?);
    }
    let doctor = command::run(
        site.daemon.sluice()?.args(["doctor", "--json"]),
        Duration::from_secs(120),
    )?;
    let said: Value = serde_json::from_str(&doctor.stdout)?;
    let findings = said["findings"].as_array().cloned().unwrap_or_default();
    let told = |it: &Value| {
        it["check"] == "steps"
            && it["subject"]
                .as_str()
                .is_some_and(|it| it.contains("reader: "))
    };
    ensure!(findings.iter().any(told), "{said:#}");

    site.registry.line.set_mode(Mode::Forward);
    let ran = runner.join().unwrap()?;
    ensure!(
        ran.ok() && ran.stdout == "here\n",
        "{ran:?}\n{}",
        site.daemon.log_tail()
    );
    eventually("nothing is stuck any more", &site, || {
        let now = site.daemon.metric("sluice_stuck_steps_now", &[])?;
        Ok(now == 0.0 && site.status()?["stuck"] == Value::Array(Vec::new()))
    })?;
    let log = site.daemon.log();
    ensure!(log.contains("a step that was stuck has ended"), "{log}");
    Ok(())
}
