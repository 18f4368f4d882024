// SPDX-License-Identifier: Apache-2.0
//! The store's disk is full, fails, or loses the daemon at any moment: readers get their bytes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sluice_integration::harness::command;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::Surroundings;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::root::Root;
use sluice_integration::harness::site::Site;

use super::image::{Got, Image, Mounted, READERS_ONLY, Since};

const SEED: u64 = 71;
const FILE_BYTES: usize = 3_000_000;
const EIO: i32 = nix::libc::EIO;

/// A site whose daemon looks for its failpoints in the file that is returned.
fn site_with_failpoints(name: &str, extra: &str) -> Result<(Site, PathBuf)> {
    let root = Root::new(name)?;
    let rules = root.join("failpoints.json")?;
    let surroundings = Surroundings {
        environment: vec![("SLUICE_FAILPOINTS".into(), rules.clone().into())],
        ..Surroundings::default()
    };
    let site = Site::start_within(root, surroundings, Release::V1, Line::OPEN, extra)?;
    Ok((site, rules))
}

fn rule(rules: &Path, point: &str, pass: u64, strikes: u64, then: &str) -> Result<()> {
    let text = format!(
        "[{{\"point\":\"{point}\",\"pass\":{pass},\"strikes\":{strikes},\"then\":{then}}}]"
    );
    std::fs::write(rules, text).context("write failpoints")
}

fn all_bytes(seen: &Mounted<'_>, files: std::ops::Range<usize>) -> Result<Duration> {
    let start = Instant::now();
    for file in files {
        let (got, took) = seen.read(file)?;
        ensure!(got == Got::Bytes, "file {file}: {got:?} after {took:?}");
    }
    Ok(start.elapsed())
}

#[test]
fn a_full_disk_passes_bytes_to_readers_and_keeps_them_again_when_it_can() -> Result<()> {
    let root = Root::new("full")?;
    let state = root.directory("sluice")?;
    mount(
        Some("tmpfs"),
        &state,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=64m"),
    )
    .context("mount a small disk")?;
    let site = Site::start_within(
        root,
        Surroundings::default(),
        Release::V1,
        Line::OPEN,
        READERS_ONLY,
    )?;
    let image = Image::new(3, FILE_BYTES, SEED)?;
    let seen = image.publish(&site, "full")?;
    all_bytes(&seen, 0..1)?;
    let passed = || {
        site.daemon
            .metric("sluice_passed_chunks_total", &["reason=\"full\""])
    };
    ensure!(passed()? == 0.0);

    let since = Since::now(&site);
    let filler = state.join("filler");
    let mut zeros = std::io::Read::take(std::io::repeat(0), 1 << 30);
    let full = std::io::copy(&mut zeros, &mut File::create(&filler)?);
    ensure!(full.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull));
    let took = all_bytes(&seen, 0..2)?;
    let count = passed()?;
    println!("full disk: {FILE_BYTES} bytes right after {took:?}, {count} chunks past the store");
    ensure!(count >= 1.0, "{}", since.log());
    since.said(&["the store takes no chunks", "no room for"])?;

    std::fs::remove_file(&filler)?;
    all_bytes(&seen, 2..3)?;
    since.said(&["the store takes chunks again"])?;
    ensure!(
        passed()? == count,
        "chunks were passed though there is room"
    );
    Ok(())
}

#[test]
fn a_disk_that_fails_costs_no_reader_anything() -> Result<()> {
    let (site, rules) = site_with_failpoints("eio", READERS_ONLY)?;
    let image = Image::new(2, FILE_BYTES, SEED + 1)?;
    let seen = image.publish(&site, "eio")?;
    let since = Since::now(&site);
    rule(
        &rules,
        "write",
        1,
        u64::MAX,
        &format!("{{\"error\":{EIO}}}"),
    )?;
    let took = all_bytes(&seen, 0..1)?;
    let passed = site
        .daemon
        .metric("sluice_passed_chunks_total", &["reason=\"store\""])?;
    println!(
        "writes fail: {FILE_BYTES} bytes right after {took:?}, {passed} chunks past the store"
    );
    ensure!(passed >= 1.0, "{}", since.log());
    since.said(&["the store takes no chunks", "failed to write chunk"])?;
    rule(&rules, "read", 0, 0, "\"die\"")?;
    all_bytes(&seen, 0..2)?;
    since.said(&["the store takes chunks again"])
}

#[test]
fn a_disk_that_does_not_flush_costs_no_reader_anything() -> Result<()> {
    let (site, rules) = site_with_failpoints("flush", "\n[prefetch]\ndelay = \"0s\"\n")?;
    let image = Image::new(2, FILE_BYTES, SEED + 2)?;
    let since = Since::now(&site);
    rule(&rules, "sync", 0, u64::MAX, &format!("{{\"error\":{EIO}}}"))?;
    let seen = image.publish(&site, "flush")?;
    all_bytes(&seen, 0..2)?;
    let start = Instant::now();
    while since.said(&["failed to", "sync"]).is_err() {
        ensure!(
            start.elapsed() < Duration::from_secs(30),
            "nothing is said:\n{}",
            since.log()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(
        !site.daemon.is_sealed()?,
        "sealed without having been flushed"
    );
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    all_bytes(&seen, 0..2).map(|_| ())
}

/// The daemon dies at a write, a flush or a new record, is started again, and dies again: until all is sealed.
#[test]
fn deaths_at_every_step_of_the_store_lose_nothing() -> Result<()> {
    const LAYERS: usize = 12;
    let (mut site, rules) = site_with_failpoints("steps", "\n[prefetch]\ndelay = \"0s\"\n")?;
    let mut random = StdRng::seed_from_u64(SEED);
    println!("seed {SEED}");
    let image = Image::new(LAYERS, FILE_BYTES / 2, SEED + 3)?;
    let (mut deaths, start) = (0, Instant::now());
    // What is mounted borrows the site, and the daemon dies and comes back below it.
    let files: Vec<(PathBuf, String)> = {
        let seen = image.publish(&site, "steps")?;
        let files = seen.files();
        std::mem::forget(seen);
        files
    };
    // Slow enough that several lives of the daemon are needed.
    site.registry.line.set_line(Line {
        bytes_per_second: 3_000_000,
        latency: Duration::from_millis(5),
    });
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<u32> {
            let mut reads = 0;
            while !over.load(Ordering::Relaxed) {
                for (file, digest) in &files {
                    let (got, took) = super::image::read(file, digest)?;
                    ensure!(
                        got == Got::Bytes,
                        "{}: {got:?} after {took:?}",
                        file.display()
                    );
                    reads += 1;
                }
            }
            Ok(reads)
        });
        let storm = (|| -> Result<()> {
            while !site.daemon.is_sealed().unwrap_or(false) {
                ensure!(
                    start.elapsed() < Duration::from_secs(90),
                    "not sealed after {deaths} deaths"
                );
                let point = ["write", "sync", "record"][random.random_range(0..3)];
                let pass = random.random_range(1..4) * if point == "write" { 7 } else { 1 };
                rule(&rules, point, pass, 1, "\"die\"")?;
                if site.daemon.ends_within(Duration::from_secs(2)) {
                    deaths += 1;
                    std::fs::remove_file(&rules)?;
                    site.daemon.kill()?;
                    site.daemon.start_again()?;
                }
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        let reads = reader.join().unwrap();
        storm?;
        println!(
            "{deaths} deaths at steps of the store, {} files read right",
            reads?
        );
        Ok(())
    })?;
    ensure!(deaths >= 3, "{deaths} deaths prove nothing");
    std::fs::remove_file(&rules).ok();
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    for (file, digest) in &files {
        ensure!(super::image::read(file, digest)?.0 == Got::Bytes);
    }
    // Of the host it may find what it will; the store is whole.
    let mut doctor = site.daemon.sluice()?;
    let output = command::run(
        doctor.args(["doctor", "--deep", "--json"]),
        Duration::from_secs(120),
    )?;
    let report: serde_json::Value =
        serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    let checked = report["checks"].as_array().context("checks")?;
    ensure!(
        checked.iter().any(|it| it["check"] == "content"),
        "{report:#}"
    );
    let findings = report["findings"].as_array().context("findings")?;
    ensure!(
        !findings.iter().any(|it| it["check"] == "content"),
        "{report:#}"
    );
    Ok(())
}
