// SPDX-License-Identifier: Apache-2.0
//! containerd's own snapshotter test suite, run against the daemon by a Go test binary.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use sluice_integration::harness::daemon::Daemon;
use sluice_integration::harness::root::Root;
use sluice_integration::harness::{command, tools};

#[test]
fn containerd_snapshotter_suite() -> Result<()> {
    let root = Root::new("contract")?;
    let socket = root.directory("c")?.join("c.sock");
    let daemon = Daemon::start(&root, &socket, "")?;
    // The suite mounts below its temporary directory: keep that below the root and on its disk.
    let temporary = root.directory("tmp")?;
    let output = command::run(
        Command::new(tools::go_tool("snapshotter-suite")?)
            .args(["-test.v", "-test.timeout", "240s", "-test.root"])
            .current_dir(&temporary)
            .env("TMPDIR", &temporary)
            .env("SLUICE_SNAPSHOTS_SOCKET", daemon.snapshots_socket()),
        Duration::from_secs(300),
    )?;
    let passed = output
        .stdout
        .lines()
        .filter(|l| l.trim_start().starts_with("--- PASS"))
        .count();
    let failed: Vec<&str> = output
        .stdout
        .lines()
        .filter(|l| l.trim_start().starts_with("--- FAIL"))
        .collect();
    println!("{passed} passed, {} failed", failed.len());
    ensure!(
        output.ok() && failed.is_empty(),
        "{}\n{}\n{}",
        output.stdout,
        output.stderr,
        daemon.log_tail()
    );
    ensure!(
        passed >= 15,
        "only {passed} tests of the suite ran:\n{}",
        output.stdout
    );
    Ok(())
}
