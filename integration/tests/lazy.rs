// SPDX-License-Identifier: Apache-2.0
//! The main job: `nerdctl pull` and `nerdctl run` are lazy, complete in the background, need no
//! registry afterwards, share one mount, and leave nothing when the image is removed.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_integration::harness::command::run_observed;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::quick_reaper_with;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::wait::eventually;
use sluice_integration::harness::{images, mounts};

const LINE: Line = Line {
    bytes_per_second: 12_500_000,
    latency: Duration::from_millis(5),
};

fn image_mounts(site: &Site) -> Vec<mounts::MountEntry> {
    mounts::below(&site.daemon.state().join("mnt"))
}

/// Bytes of disk that the files below a directory take; what is deleted meanwhile takes none.
fn disk_bytes(directory: &Path) -> Result<u64> {
    let mut total = 0;
    let mut todo = vec![directory.to_owned()];
    while let Some(path) = todo.pop() {
        let looked = std::fs::symlink_metadata(&path).and_then(|metadata| {
            if metadata.is_dir() {
                for entry in std::fs::read_dir(&path)? {
                    todo.push(entry?.path());
                }
            }
            Ok(metadata.blocks() * 512)
        });
        match looked {
            Ok(bytes) => total += bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("look at {}", path.display())),
        }
    }
    Ok(total)
}

/// What the mount table says of a run that is served by a back-end, in the order of the alphabet.
fn kinds_of(backend: &serde_json::Value) -> &'static [&'static str] {
    match backend.as_str() {
        Some("erofs") => &["erofs"],
        Some("erofs-fuse") => &["erofs", "fuse.sluice"],
        _ => &["fuse.sluice"],
    }
}

fn mounted_kinds(site: &Site) -> Vec<String> {
    let mut kinds: Vec<_> = image_mounts(site).into_iter().map(|it| it.kind).collect();
    kinds.sort();
    kinds
}

fn whole_life(release: Release, backend: &str) -> Result<()> {
    let config = quick_reaper_with(backend);
    let mut site = Site::start("lazy", release, Line::OPEN, &config)?;
    let [_, reference] = site.push_and_convert(&images::python_layout()?, "lazy/python")?;
    let direct = site.registry.direct();
    let image_bytes: u64 =
        sluice_integration::harness::http::manifest(&direct, "lazy/python", "sluice")?["layers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|l| l["size"].as_u64())
            .sum();
    site.registry.line.set_line(LINE);
    let before = site.registry.line.bytes();

    // Cold: pull moves almost nothing, the first output comes long before the image.
    let nerdctl = site.nerdctl("lazy");
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    let pulled = site.registry.line.bytes() - before;
    ensure!(
        pulled * 20 < image_bytes,
        "pull moved {pulled} of {image_bytes} bytes: not lazy\n{}",
        site.daemon.log_tail()
    );
    let mut at_ready = 0;
    let mut run = nerdctl.command()?;
    run.args(["run", "--rm", "--net", "none", &reference]);
    let cold = run_observed(&mut run, Duration::from_secs(120), |_| {
        at_ready = site.registry.line.bytes() - before
    })?;
    ensure!(
        cold.ok() && cold.stdout.contains("\"ready\": true"),
        "{cold:?}\n{}",
        site.daemon.log_tail()
    );
    let share = at_ready as f64 / image_bytes as f64;
    println!(
        "{}: first output after {:.1} % of {:.1} MB, {:.2} s",
        release.name(),
        share * 100.0,
        image_bytes as f64 / 1e6,
        cold.first_output.unwrap().as_secs_f64()
    );
    ensure!(
        share < 0.30,
        "{:.1} % was fetched before the first output",
        share * 100.0
    );

    // Two containers of one image at once share one mount.
    for name in ["one", "two"] {
        nerdctl.ok(&[
            "run",
            "-d",
            "--net",
            "none",
            "--name",
            name,
            &reference,
            "/usr/bin/python3",
            "/srv/app/ready.py",
            "--serve",
        ])?;
    }
    let status = site.status()?;
    println!(
        "served by {}, by {} once complete; {}",
        status["backend"], status["sealed_backend"], status["backend_reason"]
    );
    let kinds = mounted_kinds(&site);
    ensure!(
        kinds == kinds_of(&status["backend"]),
        "{kinds:?}\n{}",
        site.daemon.log_tail()
    );

    // Warm, after the seal, and with no registry at all.
    site.wait_sealed(Duration::from_secs(240))?;
    let sealed_bytes = site.registry.line.bytes() - before;
    ensure!(
        sealed_bytes < image_bytes + image_bytes / 10,
        "{sealed_bytes} bytes moved for an image of {image_bytes}"
    );
    site.registry.stop()?;
    let nerdctl = site.nerdctl("lazy");
    let warm = nerdctl.ok(&["run", "--rm", "--net", "none", &reference])?;
    ensure!(warm.stdout.contains("\"ready\": true"), "{warm:?}");
    ensure!(
        site.registry.line.bytes() - before == sealed_bytes,
        "a sealed image asked the registry"
    );

    // A restart of everything but the disk: the image still starts.
    site.nerdctl("lazy").ok(&["rm", "-f", "one", "two"])?;
    site.daemon.stop()?;
    site.daemon_again()?;
    site.containerd.restart()?;
    let again = site
        .nerdctl("lazy")
        .ok(&["run", "--rm", "--net", "none", &reference])?;
    ensure!(again.stdout.contains("\"ready\": true"), "{again:?}");

    // A reboot, as far as mounts go: the shim and its mounts are gone, and come back with no network.
    site.daemon.kill()?;
    site.daemon.kill_shim();
    mounts::abort_fuse(site.daemon.state());
    ensure!(mounts::unmount_all(site.daemon.state()).is_empty());
    site.daemon_again()?;
    let again = site
        .nerdctl("lazy")
        .ok(&["run", "--rm", "--net", "none", &reference])?;
    ensure!(again.stdout.contains("\"ready\": true"), "{again:?}");

    // What is complete is the kernel's from the next mount on, where it is able to.
    let status = site.status()?;
    let (kinds, expected) = (mounted_kinds(&site), &status["sealed_backend"]);
    ensure!(
        kinds == kinds_of(expected),
        "{kinds:?}\n{}",
        site.daemon.log_tail()
    );
    ensure!(status["mounts"][0]["backend"] == *expected, "{status:#}");

    // A daemon that starts finds the mount and keeps it, and neither shim nor daemon is needed to read.
    site.daemon.kill()?;
    site.daemon_again()?;
    let again = site
        .nerdctl("lazy")
        .ok(&["run", "--rm", "--net", "none", &reference])?;
    ensure!(again.stdout.contains("\"ready\": true"), "{again:?}");
    ensure!(image_mounts(&site).len() == 1, "{:?}", image_mounts(&site));

    // Removal frees mounts and disk.
    site.nerdctl("lazy").ok(&["rmi", "-f", &reference])?;
    eventually("mounts go away", Duration::from_secs(60), || {
        Ok(image_mounts(&site).is_empty())
    })?;
    eventually("disk is freed", Duration::from_secs(60), || {
        Ok(disk_bytes(&site.daemon.state().join("devices"))? < 1 << 20
            && disk_bytes(&site.daemon.state().join("snapshots"))? < 1 << 20)
    })
}

#[test]
fn whole_life_on_containerd_1() -> Result<()> {
    whole_life(Release::V1, "auto")
}

#[test]
fn whole_life_on_containerd_2() -> Result<()> {
    whole_life(Release::V2, "erofs")
}
