// SPDX-License-Identifier: Apache-2.0
//! `make bench`: conversion against the pipeline that does the same work, and the mounted image
//! against the unpacked one, over each back-end. `bench fs`: the latter only. Contenders take turns; medians and ratios are printed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::rootfs::Rootfs;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, http, images, tools};

const ROUNDS: usize = 5;
const DEADLINE: Duration = Duration::from_secs(300);

fn main() -> Result<()> {
    let layout = images::python_layout()?;
    for (number, backend) in ["fuse", "erofs"].into_iter().enumerate() {
        let config = format!("[mount]\nbackend = \"{backend}\"\n");
        let site = Site::start("bench", Release::V1, Line::OPEN, &config)?;
        if number == 0 && std::env::args().nth(1).as_deref() != Some("fs") {
            conversion(&site, &layout)?;
        }
        file_systems(&site, &layout)?;
    }
    Ok(())
}

fn conversion(site: &Site, layout: &Path) -> Result<()> {
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
    let blob = |digest: &serde_json::Value| -> Result<std::path::PathBuf> {
        let hex = digest
            .as_str()
            .and_then(|d| d.strip_prefix("sha256:"))
            .context("a digest")?;
        Ok(layout.join("blobs/sha256").join(hex))
    };
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(blob(&index["manifests"][0]["digest"])?)?)?;
    let layers: Vec<std::path::PathBuf> = manifest["layers"]
        .as_array()
        .context("layers")?
        .iter()
        .map(|l| blob(&l["digest"]))
        .collect::<Result<_>>()?;
    let bytes: u64 = layers
        .iter()
        .map(|l| std::fs::metadata(l).map(|m| m.len()).unwrap_or(0))
        .sum();
    let mut pipeline = Vec::new();
    let mut ours = Vec::new();
    for round in 0..ROUNDS {
        let mut seconds = 0.0;
        for layer in &layers {
            let script = format!(
                "set -o pipefail; gzip -dc {} | tee >(sha256sum >/dev/null) | zstd -3 -T0 -c | sha256sum",
                layer.display()
            );
            seconds += command::run_ok(Command::new("bash").args(["-c", &script]), DEADLINE)?
                .elapsed
                .as_secs_f64();
        }
        pipeline.push(seconds);
        let destination = site.root.path().join(format!("converted-{round}"));
        let output = site.daemon.sluice_ok(&[
            "convert",
            &format!("oci:{}:latest", layout.display()),
            &format!("oci:{}:latest", destination.display()),
        ])?;
        ours.push(output.elapsed.as_secs_f64());
        std::fs::remove_dir_all(&destination)?;
    }
    println!(
        "conversion of {:.0} MB gzip, {} layers, {ROUNDS} rounds in turn",
        bytes as f64 / 1e6,
        layers.len()
    );
    compare(
        "gzip -dc | tee >(sha256sum) | zstd -3 -T0 | sha256sum",
        &mut pipeline,
        "sluice convert (index and digests included)",
        &mut ours,
    );
    Ok(())
}

fn file_systems(site: &Site, layout: &Path) -> Result<()> {
    let direct = site.registry.direct();
    let [original, converted] = site.push_and_convert(layout, "bench")?;
    let ctr = |args: &[&str]| site.containerd.ctr_ok("bench", args);
    ctr(&[
        "images",
        "pull",
        "--plain-http",
        "--snapshotter",
        "overlayfs",
        &original,
    ])?;
    site.pull_lazily("bench", &converted)?;
    let chain_id = http::chain_id(&direct, "bench", "original")?;
    let mut mounted = Vec::new();
    for snapshotter in ["overlayfs", "sluice"] {
        let target = site.root.directory(&format!("fs-{snapshotter}"))?;
        mounted.push(Rootfs::mount(
            &site.containerd,
            "bench",
            snapshotter,
            &chain_id,
            &target,
        )?);
    }
    // A container is what starts the completion in the background; then it is sealed.
    ctr(&[
        "run",
        "--rm",
        "--snapshotter",
        "sluice",
        &converted,
        "ready",
    ])?;
    site.wait_sealed(DEADLINE)?;
    // Who watched a device until it was sealed looks once a second whether it is.
    std::thread::sleep(Duration::from_secs(3));
    println!(
        "\nfile system of the sealed image, {ROUNDS} rounds in turn ({} backend)",
        site.status()?["mounts"][0]["backend"]
            .as_str()
            .unwrap_or("?")
    );
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
                    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
                } else {
                    fstime(mode, target)?;
                }
                seconds[i].push(fstime(mode, target)?);
            }
        }
        let [mut native, mut ours] = seconds;
        println!(" {name}");
        compare(
            "overlayfs, unpacked",
            &mut native,
            "sluice, mounted",
            &mut ours,
        );
    }
    Ok(())
}

fn fstime(mode: &str, target: &Path) -> Result<f64> {
    let output = command::run_ok(
        Command::new(tools::binary("fstime")?).arg(mode).arg(target),
        DEADLINE,
    )?;
    let mut words = output.stdout.split_whitespace();
    let seconds = words.next().context("seconds")?.parse()?;
    ensure!(
        words
            .next()
            .and_then(|f| f.parse::<u64>().ok())
            .unwrap_or(0)
            > 1000,
        "too few files: {}",
        output.stdout
    );
    Ok(seconds)
}

fn compare(reference: &str, theirs: &mut [f64], name: &str, ours: &mut [f64]) {
    let (t, o) = (median(theirs), median(ours));
    println!(
        "   {reference:<60} {t:>8.3} s  [{:.3} .. {:.3}]",
        theirs[0],
        theirs[theirs.len() - 1]
    );
    println!(
        "   {name:<60} {o:>8.3} s  [{:.3} .. {:.3}]",
        ours[0],
        ours[ours.len() - 1]
    );
    println!("   speed against the reference: {:.2} times", t / o);
}

/// The median; sorts `values`.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
