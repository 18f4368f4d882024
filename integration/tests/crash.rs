// SPDX-License-Identifier: Apache-2.0
//! The daemon dies and is stopped under readers: no read fails, none is wrong, and all goes on when it is back.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, images};

/// Reads every file below /usr in a fixed order and prints one digest of it all.
const READ_ALL: &str = r"
import hashlib, os, sys
whole = hashlib.sha256()
print('reading', flush=True)
for top in ('/usr/bin', '/usr/lib/python3', '/usr/lib/python3.11', '/srv'):
    for directory, names, files in sorted(os.walk(top)):
        for name in sorted(files):
            path = os.path.join(directory, name)
            if os.path.islink(path):
                continue
            with open(path, 'rb') as f:
                whole.update(path.encode() + hashlib.sha256(f.read()).digest())
print('digest', whole.hexdigest(), flush=True)
";

#[test]
fn daemon_killed_and_stopped_under_readers_of_the_kernels_mount() -> Result<()> {
    deaths("erofs")
}

#[test]
fn daemon_killed_and_stopped_under_readers() -> Result<()> {
    deaths("auto")
}

fn deaths(backend: &str) -> Result<()> {
    let config = format!("[mount]\nbackend = \"{backend}\"\n");
    let mut site = Site::start("crash", Release::V1, Line::OPEN, &config)?;
    let [original, reference] = site.push_and_convert(&images::python_layout()?, "crash/python")?;
    let expected = {
        let ordinary = site.nerdctl_with("crash", "overlayfs");
        ordinary.ok(&["pull", "--quiet", &original])?;
        ordinary
            .ok(&[
                "run", "--rm", "--net", "none", &original, "python3", "-c", READ_ALL,
            ])?
            .stdout
    };
    ensure!(expected.contains("digest "), "{expected}");

    // Slow enough that much is still missing while the daemon dies again and again.
    site.registry.line.set_line(Line {
        bytes_per_second: 8_000_000,
        latency: Duration::from_millis(10),
    });
    site.nerdctl("crash").ok(&["pull", "--quiet", &reference])?;
    let mut run = site.nerdctl("crash").command()?;
    run.args([
        "run", "--rm", "--net", "none", &reference, "python3", "-c", READ_ALL,
    ]);
    let reader = std::thread::spawn(move || command::run(&mut run, Duration::from_secs(280)));
    std::thread::sleep(Duration::from_secs(3));
    let mut kills = 0;
    let start = Instant::now();
    while !reader.is_finished() && start.elapsed() < Duration::from_secs(60) {
        // Now a crash, now the way an upgrade goes.
        if kills % 2 == 0 {
            site.daemon.kill()?;
        } else {
            site.daemon.stop()?;
        }
        kills += 1;
        std::thread::sleep(Duration::from_millis(700));
        site.daemon.start_again()?;
        std::thread::sleep(Duration::from_millis(1500));
    }
    let output = reader.join().unwrap()?;
    println!(
        "{backend}: killed and stopped {kills} times in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    ensure!(
        kills >= 3,
        "the container ended after {kills} kills: too few to prove anything"
    );
    ensure!(output.ok(), "{output:?}\n{}", site.daemon.log_tail());
    ensure!(
        output.stdout == expected,
        "read\n{}\ninstead of\n{expected}",
        output.stdout
    );

    site.daemon.stop()?;
    site.daemon_again()?;
    // All goes on: a new container starts, and the image is completed.
    let again = site
        .nerdctl("crash")
        .ok(&["run", "--rm", "--net", "none", &reference])?;
    ensure!(again.stdout.contains("\"ready\": true"), "{again:?}");
    site.wait_sealed(Duration::from_secs(240))
}
