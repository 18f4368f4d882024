// SPDX-License-Identifier: Apache-2.0
//! Tools that need every blob work on a lazily pulled image after `sluice content complete`.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, http, tools};

#[test]
fn push_save_and_export_after_completion() -> Result<()> {
    let site = Site::start("content", Release::V1, Line::OPEN, "")?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let mut base = Layer::new();
    base.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?;
    let mut top = Layer::new();
    top.file("data", Attributes::root(0o644), &[42; 700_000])?;
    let directory = tempfile::tempdir()?;
    let layout = layout::write(
        directory.path(),
        &mut [base, top],
        &["/bin/sh", "-c", "md5sum /data"],
    )?;
    let [_, reference] = site.push_and_convert(&layout, "content")?;
    let nerdctl = site.nerdctl("content");
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    let before = site
        .containerd
        .ctr_ok("content", &["content", "ls", "-q"])?
        .stdout;
    let manifest = http::manifest(&direct, "content", "sluice")?;
    let blobs: Vec<&str> = manifest["layers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|l| l["digest"].as_str())
        .collect();
    ensure!(
        blobs.iter().all(|b| !before.contains(b)),
        "the pull was not lazy:\n{before}"
    );

    site.daemon
        .sluice_ok(&["content", "complete", "--namespace", "content", &reference])?;
    // containerd's collector must keep what was put there.
    site.containerd
        .ctr_ok("content", &["images", "tag", &reference, "gone:1"])?;
    site.containerd
        .ctr_ok("content", &["images", "rm", "--sync", "gone:1"])?;
    let after = site
        .containerd
        .ctr_ok("content", &["content", "ls", "-q"])?
        .stdout;
    ensure!(
        blobs.iter().all(|b| after.contains(b)),
        "blobs are missing:\n{after}"
    );

    let export = site.root.join("export.tar")?.display().to_string();
    site.containerd
        .ctr_ok("content", &["images", "export", &export, &reference])?;
    let save = site.root.join("save.tar")?.display().to_string();
    nerdctl.ok(&["save", "-o", &save, &reference])?;
    for archive in [&export, &save] {
        let copy = site.root.directory("copied")?;
        std::fs::remove_dir_all(&copy)?;
        command::run_ok(
            Command::new(tools::on_path("skopeo")?)
                .args(["--insecure-policy", "copy"])
                .arg(format!("oci-archive:{archive}"))
                .arg(format!("oci:{}:x", copy.display())),
            Duration::from_secs(60),
        )?;
    }
    let pushed = format!("{host}/pushed:1");
    nerdctl.ok(&["tag", &reference, &pushed])?;
    nerdctl.ok(&[
        "push",
        "--quiet",
        "--allow-nondistributable-artifacts",
        &pushed,
    ])?;
    ensure!(
        http::manifest(&direct, "pushed", "1")?["layers"] == manifest["layers"],
        "another image was pushed"
    );
    Ok(())
}
