// SPDX-License-Identifier: Apache-2.0
//! All files of a complete image, mounted, against those of its unpacked layers over overlayfs.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::report::{Comparison, Times};
use super::{DEADLINE, NAMESPACE};
use crate::harness::rootfs::Rootfs;
use crate::harness::site::Site;
use crate::harness::{command, http, tools};

const ROUNDS: usize = 5;

/// Reads and stats them, cold and warm, in turn.
pub fn measure(site: &Site, layout: &Path) -> Result<Value> {
    let direct = site.registry.direct();
    let [original, converted] = site.push_and_convert(layout, "bench")?;
    site.pull_ordinarily(NAMESPACE, &original)?;
    site.pull_lazily(NAMESPACE, &converted)?;
    let chain_id = http::chain_id(&direct, "bench", "original")?;
    let mut mounted = Vec::new();
    for snapshotter in ["overlayfs", "sluice"] {
        let target = site.root.directory(&format!("fs-{snapshotter}"))?;
        let containerd = &site.containerd;
        let rootfs = Rootfs::mount(containerd, NAMESPACE, snapshotter, &chain_id, &target)?;
        mounted.push(rootfs);
    }
    // A container is what starts the completion in the background; then it is sealed.
    site.containerd.ctr_ok(
        NAMESPACE,
        &[
            "run",
            "--rm",
            "--snapshotter",
            "sluice",
            &converted,
            "ready",
        ],
    )?;
    site.wait_sealed(DEADLINE)?;
    // Who watched a device until it was sealed looks once a second whether it is.
    std::thread::sleep(Duration::from_secs(3));
    println!(
        "\nfile system of the sealed image, {ROUNDS} rounds in turn ({} backend)",
        site.status()?["mounts"][0]["backend"]
            .as_str()
            .unwrap_or("?")
    );
    let mut figures = json!({});
    for (name, mode, cold) in [
        ("cold read", "read", true),
        ("warm read", "read", false),
        ("cold stat", "stat", true),
        ("warm stat", "stat", false),
    ] {
        let mut seconds = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (i, target) in mounted.iter().map(Rootfs::path).enumerate() {
                if cold {
                    drop_caches()?;
                } else {
                    walk(mode, target)?;
                }
                seconds[i].push(walk(mode, target)?.0);
            }
        }
        let [native, ours] = seconds;
        println!(" {name}");
        let comparison = Comparison::print(
            "overlayfs, unpacked",
            Times::of(native)?,
            "sluice, mounted",
            Times::of(ours)?,
        );
        figures[name] = json!(comparison);
    }
    Ok(figures)
}

/// Empties the page cache and the caches of names.
pub(super) fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")
}

/// Walks a whole image; gives seconds and how many files there are.
pub(super) fn walk(mode: &str, target: &Path) -> Result<(f64, u64)> {
    let (seconds, files) = fstime(mode, target)?;
    ensure!(files > 1000, "too few files: {files}");
    Ok((seconds, files))
}

/// Runs `fstime`; gives seconds and files.
pub(super) fn fstime(mode: &str, target: &Path) -> Result<(f64, u64)> {
    let timed = timed(mode, target, None)?;
    Ok((timed.seconds, timed.count))
}

/// What `fstime` says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timed {
    /// How long it took.
    pub seconds: f64,
    /// Files, or reads.
    pub count: u64,
    /// Bytes that were read.
    pub bytes: u64,
}

/// Runs `fstime`, with so many readers or reads.
pub(super) fn timed(mode: &str, target: &Path, number: Option<usize>) -> Result<Timed> {
    let mut command = Command::new(tools::binary("fstime")?);
    command.arg(mode).arg(target);
    command.args(number.map(|it| it.to_string()));
    let output = command::run_ok(&mut command, DEADLINE)?;
    let mut words = output.stdout.split_whitespace();
    Ok(Timed {
        seconds: words.next().context("seconds")?.parse()?,
        count: words.next().context("files")?.parse()?,
        bytes: words.next().context("bytes")?.parse()?,
    })
}
