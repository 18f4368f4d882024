// SPDX-License-Identifier: Apache-2.0
//! A converted image is the same image: on overlayfs, mounted by Sluice, and mounted by the kernel.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::images;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::look::walk;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, http, tools};
use sluice_integration::tree::same_but_touched;
use tar::EntryType;

/// Everything a layer can say, over three layers.
fn strange_layers() -> Result<Vec<Layer>> {
    let root = Attributes::root;
    let mut base = Layer::new();
    base.directory("bin", root(0o755))?
        .file("bin/busybox", root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?;
    base.directory("dir/", root(0o1777))?
        .file("dir/setuid", root(0o4755), b"suid")?;
    base.pax(&[
        ("SCHILY.xattr.user.comment", b"with \x00 byte"),
        (
            "SCHILY.xattr.security.capability",
            b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        ),
    ])?
    .file("dir/attributed", root(0o755), b"capable")?;
    base.pax(&[("mtime", b"-5.25")])?
        .file("dir/before-1970", root(0o600), b"old")?;
    base.file(
        "dir/owned",
        Attributes {
            mode: 0o640,
            uid: 70000,
            gid: 4_000_000,
        },
        b"owned",
    )?;
    base.file("dir/original", root(0o644), &[b'x'; 300_000])?
        .link("dir/link-1", "dir/original")?
        .link("other/link-2", "dir/link-1")?;
    base.special("dir/fifo", EntryType::Fifo, 0, 0)?
        .special("dir/null", EntryType::Char, 1, 3)?
        .special("dir/disk", EntryType::Block, 8, 1)?;
    base.file("dir/empty", root(0o644), b"")?
        .file("./dir/dotted", root(0o644), b"1")?
        .file("dir/dotted", root(0o600), b"22")?;
    let long = format!("long/{}/{}", "n".repeat(200), "m".repeat(180));
    base.file(&long, root(0o644), b"long name")?
        .symlink("long/link", &"t/".repeat(200))?;
    base.directory("gone", root(0o755))?
        .file("gone/a", root(0o644), b"a")?
        .file("gone/b", root(0o644), b"b")?;
    base.directory("opaque", root(0o755))?
        .file("opaque/hidden", root(0o644), b"h")?;
    base.directory("becomes-file", root(0o755))?
        .file("becomes-file/x", root(0o644), b"x")?;
    base.file("becomes-directory", root(0o644), b"f")?;
    for i in 0..400 {
        base.file(
            &format!("many/{i:04}"),
            root(0o644),
            format!("{i}\n").repeat(i).as_bytes(),
        )?;
    }
    let mut middle = Layer::new();
    middle
        .file(".wh.gone", root(0o644), b"")?
        .file("opaque/.wh..wh..opq", root(0o644), b"")?
        .file("opaque/shown", root(0o644), b"s")?;
    middle
        .file("becomes-file", root(0o644), b"now a file")?
        .directory("becomes-directory", root(0o750))?
        .file("becomes-directory/y", root(0o644), b"y")?;
    middle.file("dir/.wh.owned", root(0o644), b"")?.file(
        "implied/deep/file",
        root(0o644),
        b"no parents",
    )?;
    let mut top = Layer::new();
    top.file("gone/again", root(0o644), b"again")?
        .file("many/0007", root(0o600), b"replaced")?
        .file("dir/link-1", root(0o644), b"no longer linked")?;
    Ok(vec![base, middle, Layer::new(), top])
}

fn identical(name: &str, layout: &std::path::Path, backend: &str) -> Result<()> {
    let start = SystemTime::now() - Duration::from_secs(1);
    let config = format!("[mount]\nbackend = \"{backend}\"\n");
    let site = Site::start(name, Release::V1, Line::OPEN, &config)?;
    let direct = site.registry.direct();
    let [original, converted] = site.push_and_convert(layout, name)?;
    // A namespace each: in one, the second image would find the first one's snapshots.
    let ctr = |namespace: &str, args: &[&str]| site.containerd.ctr_ok(namespace, args);
    for (namespace, reference) in [("original", &original), ("converted", &converted)] {
        site.pull_ordinarily(namespace, reference)?;
    }

    // The same config digest, hence the same diff IDs and chain IDs.
    let config = |reference: &str| -> Result<serde_json::Value> {
        let manifest = command::run_ok(
            Command::new(tools::on_path("skopeo")?)
                .args(["inspect", "--raw", "--tls-verify=false"])
                .arg(format!("docker://{reference}")),
            Duration::from_secs(30),
        )?;
        Ok(
            serde_json::from_str::<serde_json::Value>(&manifest.stdout)?["config"]["digest"]
                .clone(),
        )
    };
    ensure!(
        config(&original)? == config(&converted)?,
        "the config digest changed"
    );
    let chain_id = http::chain_id(&direct, name, "original")?;
    let files = site.files("original", "overlayfs", &chain_id, true)?;
    let converted_files = site.files("converted", "overlayfs", &chain_id, true)?;
    ensure!(files.len() > 100, "only {} files were listed", files.len());
    same_but_touched(&files, &converted_files, start)?;

    // Sluice: pulled lazily through containerd's API; the same chain IDs appear.
    site.pull_lazily("lazy", &converted)?;
    let chains = |namespace: &str, snapshotter: &str| -> Result<Vec<String>> {
        let list = ctr(
            namespace,
            &["snapshots", "--snapshotter", snapshotter, "ls"],
        )?;
        let mut chains: Vec<String> = list
            .stdout
            .lines()
            .filter(|line| line.contains("Committed"))
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect();
        chains.sort();
        Ok(chains)
    };
    let ordinary = chains("original", "overlayfs")?;
    ensure!(
        ordinary.contains(&chain_id),
        "{chain_id} not in {ordinary:?}"
    );
    for (namespace, snapshotter) in [("converted", "overlayfs"), ("lazy", "sluice")] {
        let found = chains(namespace, snapshotter)?;
        ensure!(found == ordinary, "{found:?} instead of {ordinary:?}");
    }
    let why = site
        .daemon
        .sluice_ok(&["why", "--json", &converted])?
        .stdout;
    let why: serde_json::Value = serde_json::from_str(&why)?;
    ensure!(why["lazy"].as_bool() == Some(true), "not lazy: {why:#}");
    let sluice_files = site.files("lazy", "sluice", &chain_id, true)?;
    same_but_touched(&files, &sluice_files, start)?;
    let miscounted = sluice_files.iter().find(|line| line.contains(" nlink="));
    ensure!(miscounted.is_none(), "{miscounted:?}");
    let status = site.status()?;
    println!("{name}: shown by {}", status["mounts"][0]["backend"]);
    ensure!(
        status["mounts"][0]["backend"] == status["backend"],
        "{status:#}"
    );
    // A container is what starts the completion in the background.
    let run = [
        "run",
        "--rm",
        "--snapshotter",
        "sluice",
        &converted,
        "ready",
    ];
    ctr("lazy", &run)?;
    kernel_shows_the_same(&site, &sluice_files)
}

/// Mounts the merged tree over the complete devices by the kernel's EROFS.
fn kernel_shows_the_same(site: &Site, expected: &[String]) -> Result<()> {
    site.wait_sealed(Duration::from_secs(240))?;
    let tree = std::fs::read_dir(site.daemon.state().join("trees"))?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "erofs"));
    let tree = tree.context("a merged tree is kept")?;
    // Devices in the order of the layers, lowest first, as `sluice status` lists the image.
    let status: serde_json::Value =
        serde_json::from_str(&site.daemon.sluice_ok(&["status", "--json"])?.stdout)?;
    let image = status["images"]
        .as_array()
        .and_then(|i| i.first())
        .context("an image in the status")?;
    let mut options = vec![];
    for diff in image["diff_ids"].as_array().context("diff IDs")? {
        let diff = diff
            .as_str()
            .and_then(|d| d.strip_prefix("sha256:"))
            .context("diff ID")?;
        let device = std::fs::read_dir(site.daemon.state().join("devices").join(diff))?
            .flatten()
            .next()
            .context("a device")?;
        options.push(format!("device={}", device.path().join("data").display()));
    }
    let target = site.root.directory("kernel")?;
    // The system call itself: mount(8) would put a loop device between, which takes no files as devices.
    nix::mount::mount(
        Some(&tree),
        &target,
        Some("erofs"),
        nix::mount::MsFlags::MS_RDONLY,
        Some(options.join(",").as_str()),
    )
    .with_context(|| format!("mount {} by the kernel's EROFS", tree.display()))?;
    let files = walk(&target, true);
    command::run_ok(Command::new("umount").arg(&target), Duration::from_secs(20))?;
    let files = files?;
    for (l, r) in expected.iter().zip(&files) {
        ensure!(l == r, "the kernel shows\n  {r}\ninstead of\n  {l}");
    }
    ensure!(expected.len() == files.len());
    Ok(())
}

#[test]
fn every_kind_of_entry() -> Result<()> {
    strange("erofs")
}

#[test]
fn every_kind_of_entry_over_fuse() -> Result<()> {
    strange("fuse")
}

/// As it is by itself: names by the kernel, bytes over FUSE where the kernel can.
#[test]
fn every_kind_of_entry_as_it_comes() -> Result<()> {
    strange("auto")
}

fn strange(backend: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let layout = layout::write(
        directory.path(),
        &mut strange_layers()?,
        &["/bin/sh", "-c", "echo ready"],
    )?;
    identical("strange", &layout, backend)
}

#[test]
fn a_real_image() -> Result<()> {
    identical("python", &images::python_layout()?, "auto")
}
