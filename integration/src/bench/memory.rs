// SPDX-License-Identifier: Apache-2.0
//! Memory of the shim per 100 layers mounted, over each back-end, and of the daemon with 100 images.
//!
//! Images have ten layers each and share none. First they are pulled; then ten of them are mounted, not complete,
//! over each back-end in turn, and all their files listed and read; over FUSE all of them are mounted, too.
//! At last all are completed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::process::{Usage, peak_bytes};
use super::{DEADLINE, NAMESPACE, files, incomplete_over, synthetic};
use crate::harness::containerd::Release;
use crate::harness::daemon::shims;
use crate::harness::proxy::Line;
use crate::harness::rootfs::Rootfs;
use crate::harness::site::Site;
use crate::harness::{http, mounts};

/// What the shim may take per 100 layers.
const SHIM_GOAL_BYTES: u64 = 30 << 20;
/// What the daemon may take.
const DAEMON_GOAL_BYTES: u64 = 100 << 20;
/// Images that are mounted for the shim's figure: 100 layers.
const MOUNTED: usize = 10;
/// Work that follows an answer has come to its end.
const SETTLE: Duration = Duration::from_secs(3);

/// By then the daemon has taken away what it does not need: it looks once a minute.
const SWEPT: Duration = Duration::from_secs(65);

/// An image in the registry.
struct Published {
    reference: String,
    chain_id: String,
}

/// Measures with so many images.
pub fn measure(images: usize) -> Result<Value> {
    ensure!(images >= 3 * MOUNTED, "at least {} images", 3 * MOUNTED);
    let mut site = Site::start("bench", Release::V1, Line::OPEN, &incomplete_over("fuse"))?;
    let published = (0..images).map(|number| publish(&site, number));
    let published = published.collect::<Result<Vec<_>>>()?;
    println!(
        "\nmemory: {images} images of {} layers, {} files each",
        synthetic::FILES_PER_LAYER.len(),
        synthetic::FILES_PER_LAYER.iter().sum::<usize>()
    );
    let mut daemon = json!({});
    daemon["started"] = json!(daemon_usage(&site, "no image")?);
    for image in &published {
        site.pull_lazily(NAMESPACE, &image.reference)?;
    }
    daemon["pulled"] = json!(daemon_usage(&site, "all pulled")?);

    let mut shim = json!({});
    let (over_fuse, rest) = published.split_at(MOUNTED);
    shim["fuse"] = mounted(&site, "fuse", over_fuse, rest)?;
    let any = &published[0].reference;
    reconfigure(&mut site, any, "fuse", "auto")?;
    shim["erofs-fuse"] = mounted(&site, "erofs-fuse", &rest[MOUNTED..2 * MOUNTED], &[])?;
    reconfigure(&mut site, any, "auto", "erofs")?;
    shim["erofs"] = mounted(&site, "erofs", &rest[..MOUNTED], &[])?;

    daemon["used"] = json!(daemon_usage(&site, "some mounted and read")?);
    for image in &published {
        site.daemon.sluice_ok(&["prewarm", &image.reference])?;
    }
    site.wait_sealed(DEADLINE)?;
    daemon["completed"] = json!(daemon_usage(&site, "all just completed")?);
    std::thread::sleep(SWEPT);
    daemon["complete"] = json!(daemon_usage(&site, "a minute later")?);
    site.daemon.stop()?;
    site.daemon_again()?;
    daemon["restarted"] = json!(daemon_usage(&site, "started again")?);
    site.status()?;
    daemon["listed"] = json!(daemon_usage(&site, "then asked for its status")?);
    Ok(json!({
        "images": images,
        "layers_per_image": synthetic::FILES_PER_LAYER.len(),
        "files_per_image": synthetic::FILES_PER_LAYER.iter().sum::<usize>(),
        "goals": {"shim_bytes_per_100_layers": SHIM_GOAL_BYTES, "daemon_bytes": DAEMON_GOAL_BYTES},
        "shim": shim,
        "daemon": daemon,
    }))
}

/// Makes an image and converts it straight into the registry.
fn publish(site: &Site, number: usize) -> Result<Published> {
    let directory = tempfile::tempdir_in(site.root.path())?;
    let layout = synthetic::many_files(directory.path(), u64::try_from(number)?)?;
    let repository = format!("many{number:03}");
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let from = format!("oci:{}:latest", layout.display());
    let to = format!("docker://{direct}/{repository}:sluice");
    site.daemon.sluice_ok(&["convert", &from, &to])?;
    Ok(Published {
        reference: format!("{host}/{repository}:sluice"),
        chain_id: http::chain_id(&direct, &repository, "sluice")?,
    })
}

/// Has the daemon, and a new shim, make mounts over another back-end. `any`: an image that is here.
fn reconfigure(site: &mut Site, any: &str, from: &str, to: &str) -> Result<()> {
    // What was removed is the collector's, and it comes only when it must.
    let gone = "gone:1";
    site.containerd
        .ctr_ok(NAMESPACE, &["images", "tag", any, gone])?;
    site.containerd
        .ctr_ok(NAMESPACE, &["images", "rm", "--sync", gone])?;
    let begun = Instant::now();
    let serves = |mount: &mounts::MountEntry| mount.kind.starts_with("fuse");
    while mounts::below(site.root.path()).iter().any(serves) {
        ensure!(begun.elapsed() < DEADLINE, "a mount that nobody uses stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    site.daemon.stop()?;
    site.daemon.kill_shim();
    let config = site.root.join("sluice.toml")?;
    let text = std::fs::read_to_string(&config)?;
    let key = |backend: &str| format!("backend = \"{backend}\"");
    std::fs::write(config, text.replace(&key(from), &key(to)))?;
    site.daemon_again()
}

/// Mounts 100 layers, uses them, and, where there are more, mounts these as well.
fn mounted(site: &Site, backend: &str, images: &[Published], more: &[Published]) -> Result<Value> {
    println!(" shim, {backend} back-end");
    let before = shim_usage(site, "nothing mounted")?;
    let mount = |image: &Published| {
        let name = image.chain_id.trim_start_matches("sha256:");
        let target = site.root.directory(&format!("m/{}", &name[..16]))?;
        Rootfs::mount(
            &site.containerd,
            NAMESPACE,
            "sluice",
            &image.chain_id,
            &target,
        )
    };
    let mut rootfs = images.iter().map(mount).collect::<Result<Vec<_>>>()?;
    check_backend(site, backend, rootfs.len())?;
    let layers = images.len() * synthetic::FILES_PER_LAYER.len();
    let idle = shim_usage(site, &format!("{layers} layers in {} mounts", rootfs.len()))?;
    for (mode, done) in [("stat", "all files listed"), ("read", "all files read")] {
        for rootfs in &rootfs {
            files::walk(mode, rootfs.path())?;
        }
        shim_usage(site, done)?;
    }
    let used = shim_usage(site, "a while later")?;
    let worst = used.pss_bytes.max(idle.pss_bytes);
    verdict(
        "the shim",
        worst * 100 / u64::try_from(layers)?,
        SHIM_GOAL_BYTES,
        " per 100 layers",
    );
    let mut figures =
        json!({"nothing_mounted": before, "mounted": idle, "used": used, "layers": layers});
    if !more.is_empty() {
        rootfs.extend(more.iter().map(mount).collect::<Result<Vec<_>>>()?);
        let layers = rootfs.len() * synthetic::FILES_PER_LAYER.len();
        let all = shim_usage(site, &format!("{layers} layers in {} mounts", rootfs.len()))?;
        figures["all"] = json!({"layers": layers, "mounted": all});
    }
    Ok(figures)
}

fn check_backend(site: &Site, backend: &str, count: usize) -> Result<()> {
    let status = site.status()?;
    let mounts = status["mounts"].as_array().context("mounts")?;
    let over = mounts.iter().filter(|mount| mount["backend"] == backend);
    ensure!(
        over.count() == count,
        "not mounted over {backend}: {status:#}"
    );
    Ok(())
}

fn shim_usage(site: &Site, when: &str) -> Result<Usage> {
    std::thread::sleep(SETTLE);
    let shims = shims(site.daemon.run_dir());
    let of = |role: &str| -> Result<Usage> {
        let found = shims.iter().find(|(_, its)| its == role);
        Usage::of(found.with_context(|| format!("no {role}"))?.0)
    };
    let (worker, holder) = (of("worker")?, of("holder")?);
    let both = worker.and(holder);
    println!("   {when:<32} {both}");
    Ok(both)
}

fn daemon_usage(site: &Site, when: &str) -> Result<Value> {
    std::thread::sleep(SETTLE);
    let pid = site.daemon.pid()?;
    let usage = Usage::of(pid)?;
    println!(" daemon, {when:<29} {usage}");
    if when != "no image" {
        verdict("the daemon", usage.pss_bytes, DAEMON_GOAL_BYTES, "");
    }
    Ok(json!({"now": usage, "peak_rss_bytes": peak_bytes(pid)?}))
}

fn verdict(who: &str, bytes: u64, goal: u64, per: &str) {
    let word = if bytes < goal { "reached" } else { "MISSED" };
    println!(
        "   {who}: {:.1} MiB{per}, goal < {} MiB: {word}",
        bytes as f64 / f64::from(1 << 20),
        goal >> 20
    );
}
