// SPDX-License-Identifier: Apache-2.0
//! All processes of Sluice are killed, again and again, under sixteen processes that read a lazily loading image:
//! no read fails, none is wrong, and none waits longer than its deadline.
//!
//! The short form runs in `make test`, the long one (`long_`, 210 deaths in ten minutes each) in `make soak`.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::shims;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, images};

/// What is promised to a reader.
const READ_DEADLINE: Duration = Duration::from_secs(60);
const READERS: usize = 16;

/// Digests of all files and listings of all directories below some directories of the image.
const LOOK: &str = include_str!("storm/look.py");
/// Reads, maps, lists and runs what is there for a while, and compares.
const READ: &str = include_str!("storm/read.py");

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Worker,
    Holder,
    Daemon,
    WorkerAndDaemon,
    Shim,
    All,
}

/// Who may die where a service manager keeps descriptors, and where none does.
const MANAGED: [Victim; 6] = [
    Victim::Worker,
    Victim::Holder,
    Victim::Daemon,
    Victim::WorkerAndDaemon,
    Victim::Shim,
    Victim::All,
];
const ALONE: [Victim; 5] = [
    Victim::Worker,
    Victim::Holder,
    Victim::Daemon,
    Victim::WorkerAndDaemon,
    Victim::Shim,
];

/// A storm.
struct Storm {
    name: &'static str,
    /// Appended to the daemon's configuration.
    mount: &'static str,
    managed: bool,
    lasts: Duration,
    deaths: u32,
    seed: u64,
}

fn signal(site: &Site, role: &str, signal: Signal) {
    for (pid, of) in shims(site.daemon.run_dir()) {
        if of == role {
            kill(pid, signal).ok();
        }
    }
}

fn shim_pids(site: &Site) -> Vec<Pid> {
    shims(site.daemon.run_dir())
        .into_iter()
        .map(|it| it.0)
        .collect()
}

/// Waits until what the last death ended is back and hands its descriptors over; a death before that is
/// another one of the same moment, and counts as such.
fn wait_whole(site: &Site) -> Result<()> {
    let start = Instant::now();
    loop {
        let roles: Vec<String> = shims(site.daemon.run_dir())
            .into_iter()
            .map(|it| it.1)
            .collect();
        let has = |role: &str| roles.iter().filter(|it| *it == role).count() == 1;
        if has("worker") && has("holder") && site.daemon.keeps_descriptors() {
            return Ok(());
        }
        ensure!(
            start.elapsed() < Duration::from_secs(30),
            "not whole again: {roles:?}\n{}",
            site.daemon.log_tail()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn die(site: &mut Site, victim: Victim) -> Result<()> {
    wait_whole(site)?;
    let daemon = matches!(
        victim,
        Victim::Daemon | Victim::WorkerAndDaemon | Victim::All
    );
    if matches!(victim, Victim::Shim | Victim::All) {
        // One that runs on would replace the other.
        for pid in shim_pids(site) {
            kill(pid, Signal::SIGSTOP).ok();
        }
    }
    match victim {
        Victim::Worker | Victim::WorkerAndDaemon => signal(site, "worker", Signal::SIGKILL),
        Victim::Holder => signal(site, "holder", Signal::SIGKILL),
        Victim::Daemon => {}
        Victim::Shim | Victim::All => {
            for pid in shim_pids(site) {
                kill(pid, Signal::SIGKILL).ok();
            }
        }
    }
    if daemon {
        site.daemon.kill()?;
        site.daemon.start_again()?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn run(storm: &Storm) -> Result<()> {
    println!("storm {}: seed {}", storm.name, storm.seed);
    let extra = format!(
        "\n[fetch]\nread_deadline = \"{}s\"\n\n[prefetch]\nenabled = false\n\n[mount]\n{}\n",
        READ_DEADLINE.as_secs(),
        storm.mount
    );
    let mut site = match storm.managed {
        true => Site::start_managed(storm.name, Release::V1, Line::OPEN, &extra)?,
        false => Site::start(storm.name, Release::V1, Line::OPEN, &extra)?,
    };
    let [original, reference] = site.push_and_convert(&images::python_layout()?, "storm/python")?;
    let shared = site.root.directory("storm")?;
    write(&shared.join("look.py"), LOOK)?;
    write(&shared.join("read.py"), READ)?;
    let volume = format!("{}:/storm", shared.display());
    let python = |image: &str, script: &str, arguments: &[&str]| -> Vec<String> {
        let fixed = [
            "run", "--rm", "--net", "none", "-v", &volume, image, "python3", script,
        ];
        fixed
            .iter()
            .chain(arguments)
            .map(|it| (*it).to_owned())
            .collect()
    };
    let ordinary = site.nerdctl_with("storm", "overlayfs");
    ordinary.ok(&["pull", "--quiet", &original])?;
    let mut look = ordinary.command()?;
    look.args(python(
        &original,
        "/storm/look.py",
        &["/storm/expected.json"],
    ));
    command::run_ok(&mut look, Duration::from_secs(120))?;

    // Slow enough that something is missing for all of the storm: the image has 36 MB.
    let line = |bytes_per_second| Line {
        bytes_per_second,
        latency: Duration::from_millis(10),
    };
    site.nerdctl("storm").ok(&["pull", "--quiet", &reference])?;
    let seconds = storm.lasts.as_secs().to_string();
    let (readers, seed) = (READERS.to_string(), storm.seed.to_string());
    let mut reading = site.nerdctl("storm").command()?;
    reading.args(python(
        &reference,
        "/storm/read.py",
        &[&seconds, &readers, &seed],
    ));
    let deadline = storm.lasts + 3 * READ_DEADLINE;
    site.registry.line.set_line(line(2_000_000));
    let reader = std::thread::spawn(move || command::run(&mut reading, deadline));
    // The container is to start sooner than it is to read.
    std::thread::sleep(Duration::from_secs(4));
    let slow = line(20_000_000 / storm.lasts.as_secs());
    site.registry.line.set_line(slow);

    let mut random = StdRng::seed_from_u64(storm.seed);
    let victims: &[Victim] = if storm.managed { &MANAGED } else { &ALONE };
    let pause = storm.lasts / storm.deaths;
    let start = Instant::now();
    let mut deaths = std::collections::BTreeMap::new();
    for death in 1..=storm.deaths {
        let until = pause * death;
        let jitter = Duration::from_millis(random.random_range(0..200));
        std::thread::sleep((until + jitter).saturating_sub(start.elapsed()));
        if reader.is_finished() {
            break;
        }
        let victim = *victims.choose(&mut random).unwrap();
        die(&mut site, victim)?;
        *deaths.entry(format!("{victim:?}")).or_insert(0u32) += 1;
    }
    let output = reader.join().unwrap()?;
    let count: u32 = deaths.values().sum();
    println!(
        "{count} deaths in {:.0} s: {deaths:?}",
        start.elapsed().as_secs_f64()
    );
    ensure!(
        output.ok(),
        "{output:?}\n{}\n{}",
        site.daemon.log_tail(),
        site.daemon.shim_log_tail()
    );
    let report: serde_json::Value = serde_json::from_str(output.stdout.trim())
        .with_context(|| format!("read {:?}", output.stdout))?;
    println!("storm {}: {report}", storm.name);
    ensure!(report["failed"] == 0 && report["wrong"] == 0, "{report}");
    // Each reads a whole file, and most wait for the line.
    ensure!(report["operations"].as_u64() > Some(50), "{report}");
    let longest = report["longest_seconds"]
        .as_f64()
        .context("the longest wait")?;
    ensure!(longest < READ_DEADLINE.as_secs_f64(), "{report}");
    ensure!(count >= storm.deaths * 4 / 5, "only {count} deaths");
    let sum = |name: &str| -> Result<u64> {
        let status = site.status()?;
        let layers = status["layers"].as_array().cloned().unwrap_or_default();
        Ok(layers.iter().filter_map(|it| it[name].as_u64()).sum())
    };
    let (present, all) = (sum("present_bytes")?, sum("device_bytes")?);
    println!(
        "{:.1} of {:.1} MB were read in the end",
        present as f64 / 1e6,
        all as f64 / 1e6
    );
    ensure!(present < all, "nothing was missing in the end");
    ensure!(all > 0);
    Ok(())
}

/// Of everything a little, as it is by itself: names by the kernel's EROFS, bytes over FUSE.
#[test]
fn storm_of_deaths() -> Result<()> {
    run(&Storm {
        name: "storm",
        mount: "backend = \"auto\"",
        managed: true,
        lasts: SHORT,
        deaths: 9,
        seed: 1,
    })
}

/// As on a kernel that cannot hand requests out again, without a service manager.
#[test]
fn storm_of_deaths_with_a_journal() -> Result<()> {
    run(&Storm {
        name: "stormj",
        mount: "backend = \"fuse\"\njournal = true",
        managed: false,
        lasts: SHORT,
        deaths: 9,
        seed: 2,
    })
}

/// The kernel's EROFS, which asks before it reads.
#[test]
fn storm_of_deaths_over_erofs() -> Result<()> {
    run(&Storm {
        name: "storme",
        mount: "backend = \"erofs\"",
        managed: true,
        lasts: SHORT,
        deaths: 9,
        seed: 5,
    })
}

const SHORT: Duration = Duration::from_secs(20);
/// An image is read in this time; then it is read anew by a set-up of its own.
const ROUND: Duration = Duration::from_secs(40);
const ROUNDS: u64 = 15;

/// 210 deaths in ten minutes of reading.
fn rounds(name: &'static str, mount: &'static str, seed: u64) -> Result<()> {
    (0..ROUNDS).try_for_each(|round| {
        // Another set-up that waits for its turn gets it.
        std::thread::sleep(Duration::from_secs(1));
        run(&Storm {
            name,
            mount,
            managed: true,
            lasts: ROUND,
            deaths: 14,
            seed: seed + round,
        })
    })
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_storm_of_deaths() -> Result<()> {
    rounds("storm", "backend = \"auto\"", 400)
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_storm_of_deaths_over_fuse() -> Result<()> {
    rounds("stormf", "backend = \"fuse\"", 100)
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_storm_of_deaths_with_a_journal() -> Result<()> {
    rounds("stormj", "backend = \"fuse\"\njournal = true", 200)
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_storm_of_deaths_over_erofs() -> Result<()> {
    rounds("storme", "backend = \"erofs\"", 300)
}
