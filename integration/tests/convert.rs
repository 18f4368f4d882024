// SPDX-License-Identifier: Apache-2.0
//! Images are converted where containerd keeps them, and what nerdctl pushes then is lazy elsewhere.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{http, images};

/// The summary of a conversion within containerd's namespace `convert`.
fn convert(site: &Site, arguments: &[&str]) -> Result<Value> {
    let address = site.containerd.socket().display().to_string();
    let store = ["--address", &address, "--namespace", "convert"];
    let all = [&["convert", "--json"], &store[..], arguments].concat();
    let output = site.daemon.sluice_ok(&all)?;
    let last = output.stdout.lines().last().context("a summary")?;
    Ok(serde_json::from_str(last)?)
}

fn in_place(release: Release) -> Result<()> {
    let site = Site::start("convert", release, Line::OPEN, "")?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let mut base = Layer::new();
    base.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?;
    let mut top = Layer::new();
    top.file("data", Attributes::root(0o644), &[42; 700_000])?;
    let directory = tempfile::tempdir()?;
    let command = ["/bin/sh", "-c", "md5sum /data"];
    let layout = layout::write(directory.path(), &mut [base, top], &command)?;
    images::push_layout(&layout, &format!("{direct}/app:original"))?;

    // Pulled and unpacked as ever, then converted under its own name.
    let image = format!("{host}/app:original");
    site.pull_ordinarily("convert", &image)?;
    let ordinary = site.nerdctl_with("convert", "overlayfs");
    let run = ["run", "--rm", "--net", "none", image.as_str()];
    let before = ordinary.ok(&run)?.stdout;
    let name = format!("containerd:{image}");
    let summary = convert(&site, &[&name, &name])?;
    ensure!(
        (&summary["layers_converted"], &summary["layers_not_lazy"]) == (&2.into(), &0.into()),
        "{summary}"
    );
    let again = convert(&site, &[&name, &name])?;
    ensure!(
        (&again["uploads"], &again["digest"]) == (&0.into(), &summary["digest"]),
        "{again}"
    );
    // The snapshots that were unpacked are the converted image's as well.
    ensure!(ordinary.ok(&run)?.stdout == before, "it runs as before");

    // Garbage collection keeps what the record names; then everybody can have it.
    let ctr = |args: &[&str]| site.containerd.ctr_ok("convert", args);
    ctr(&["images", "tag", &image, "gone:1"])?;
    ctr(&["images", "rm", "--sync", "gone:1"])?;
    ensure!(
        ctr(&["leases", "ls", "-q"])?.stdout.trim().is_empty(),
        "no lease stays"
    );
    let pushed = format!("{host}/pushed:1");
    let push = |pushed: &str| -> Result<Value> {
        ordinary.ok(&["tag", &image, pushed])?;
        let flag = "--allow-nondistributable-artifacts";
        ordinary.ok(&["push", "--quiet", flag, pushed])?;
        let (repository, tag) = pushed[host.len() + 1..].split_once(':').context("a tag")?;
        http::manifest(&direct, repository, tag)
    };
    let first = push(&pushed)?;
    let lazily = |namespace: &str, reference: &str| -> Result<()> {
        site.pull_lazily(namespace, reference)?;
        let why = site.daemon.sluice_ok(&["why", reference])?.stdout;
        ensure!(why.contains("lazy") && !why.contains("not lazy"), "{why}");
        let nerdctl = site.nerdctl(namespace);
        let ran = nerdctl.ok(&["run", "--rm", "--net", "none", reference])?;
        ensure!(ran.stdout == before, "{ran:?}");
        Ok(())
    };
    lazily("elsewhere", &pushed)?;

    // What nerdctl and ctr save is the same image, whichever way the archive is read.
    for (n, tool) in ["nerdctl", "ctr"].into_iter().enumerate() {
        let archive = site
            .root
            .join(&format!("{tool}.tar"))?
            .display()
            .to_string();
        match tool {
            "nerdctl" => drop(ordinary.ok(&["save", "-o", &archive, &image])?),
            _ => drop(ctr(&["images", "export", &archive, &image])?),
        }
        for scheme in ["docker-archive", "oci-archive"] {
            let source = format!("{scheme}:{archive}");
            let loaded = format!("docker://{host}/saved:{scheme}-{n}");
            let summary = convert(&site, &[&source, &loaded])?;
            ensure!(summary["layers_not_lazy"] == 0, "{source}: {summary}");
            let tag = format!("{scheme}-{n}");
            let saved = http::manifest(&direct, "saved", &tag)?;
            ensure!(saved["config"] == first["config"], "{source}: {saved}");
            let digests = |manifest: &Value| -> Vec<Value> {
                let layers = manifest["layers"].as_array().into_iter().flatten();
                layers.map(|layer| layer["digest"].clone()).collect()
            };
            ensure!(digests(&saved) == digests(&first), "{source}: {saved}");
        }
    }

    // A lazily pulled image has no layers in the content store: they are fetched where it came from.
    site.pull_lazily("convert", &pushed)?;
    ctr(&["images", "rm", "--sync", &image])?;
    let layers = first["layers"].as_array().context("layers")?;
    let name = format!("containerd:{pushed}");
    // The least and the most that one read may fetch.
    let size = match release {
        Release::V1 => "16K",
        Release::V2 => "512K",
    };
    let how = ["--level", "9", "--chunk-size", size];
    let summary = convert(&site, &[&[name.as_str(), &name], &how[..]].concat())?;
    ensure!(summary["layers_converted"] == layers.len(), "{summary}");
    let image = pushed;
    let pushed = format!("{host}/other:2");
    ordinary.ok(&["tag", &image, &pushed])?;
    ordinary.ok(&[
        "push",
        "--quiet",
        "--allow-nondistributable-artifacts",
        &pushed,
    ])?;
    let second = http::manifest(&direct, "other", "2")?;
    ensure!(
        second["config"]["digest"] == first["config"]["digest"],
        "{second}"
    );
    ensure!(
        second["layers"] != first["layers"],
        "made by another recipe"
    );
    site.wait_sealed(Duration::from_secs(120))?;
    lazily("again", &pushed)
}

#[test]
fn in_place_in_containerd_1_6() -> Result<()> {
    in_place(Release::V1)
}

#[test]
fn in_place_in_containerd_2() -> Result<()> {
    in_place(Release::V2)
}
