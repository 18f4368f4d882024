// SPDX-License-Identifier: Apache-2.0
//! Lazy, ordinary and mixed chains, in two containerd namespaces at once.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::look::Why;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, http, images};

/// Three layers; each adds a file, changes one below and removes one below. `mark` makes the lowest one,
/// and with it every chain ID, unlike that of any other mark: all namespaces share the snapshot of a chain.
fn layers(mark: &str) -> Result<Vec<Layer>> {
    let root = Attributes::root;
    let mut base = Layer::new();
    base.directory("bin", root(0o755))?
        .file("bin/busybox", root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?;
    base.file("mark", root(0o644), mark.as_bytes())?
        .directory("d", root(0o750))?;
    for name in ["one", "changed", "removed", "removed-later", "opaque/below"] {
        base.file(
            &format!("d/{name}"),
            root(0o644),
            format!("{name} of base\n").as_bytes(),
        )?;
    }
    let mut middle = Layer::new();
    middle
        .file("d/two", root(0o644), b"two of middle\n")?
        .file("d/changed", root(0o600), b"changed by middle\n")?;
    middle.file("d/.wh.removed", root(0o644), b"")?.file(
        "d/from-middle",
        root(0o644),
        b"goes away\n",
    )?;
    middle
        .file("d/opaque/.wh..wh..opq", root(0o644), b"")?
        .file("d/opaque/middle", root(0o644), b"m\n")?;
    let mut top = Layer::new();
    top.file("d/three", root(0o644), b"three of top\n")?.file(
        "d/.wh.from-middle",
        root(0o644),
        b"",
    )?;
    top.file("d/.wh.removed-later", root(0o644), b"")?
        .file("d/opaque/top", root(0o644), b"t\n")?;
    Ok(vec![base, middle, top])
}

const LOOK: &str = "find /d | sort; find /d -type f | sort | while read f; do echo $f; cat $f; done; stat -c '%n %a %u' /d /d/changed";

#[test]
fn chains_of_every_mixture() -> Result<()> {
    // What has lost its annotations is to stay ordinary.
    let config = "\n[index]\nnode = \"off\"\n";
    let site = Site::start("mixed", Release::V1, Line::OPEN, config)?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let image = |mark: &str| -> Result<()> {
        let directory = tempfile::tempdir()?;
        let layout = layout::write(
            directory.path(),
            &mut layers(mark)?,
            &["/bin/sh", "-c", LOOK],
        )?;
        images::push_layout(&layout, &format!("{direct}/mixed-{mark}:original"))?;
        site.daemon.sluice_ok(&[
            "convert",
            &format!("docker://{host}/mixed-{mark}:original"),
            &format!("docker://{host}/mixed-{mark}:lazy"),
        ])?;
        Ok(())
    };
    // Which layers keep their index: lazy/ordinary/lazy and so on.
    let mixtures: [(&str, &[usize]); 6] = [
        ("lazy", &[]),
        ("bottom", &[1, 2]),
        ("middle", &[0, 2]),
        ("sandwich", &[1]),
        ("top", &[0, 1]),
        ("none", &[0, 1, 2]),
    ];
    let run = |namespace: &str, snapshotter: &str, reference: &str| -> Result<String> {
        let nerdctl = site.nerdctl_with(namespace, snapshotter);
        nerdctl.ok(&["pull", "--quiet", reference])?;
        let output = command::run_ok(
            nerdctl
                .command()?
                .args(["run", "--rm", "--net", "none", reference]),
            Duration::from_secs(60),
        )
        .with_context(|| site.daemon.log_tail())?;
        Ok(output.stdout)
    };
    image("lazy")?;
    let expected = run("plain", "overlayfs", &format!("{host}/mixed-lazy:original"))?;
    ensure!(
        expected.contains("changed by middle") && !expected.contains("/d/opaque/below"),
        "{expected}"
    );
    for (tag, stripped) in mixtures {
        if !stripped.is_empty() {
            image(tag)?;
            let repository = format!("mixed-{tag}");
            http::strip_annotations(&direct, &repository, "lazy", tag, stripped)?;
        }
        let namespace = format!("mixed-{tag}");
        let reference = format!("{host}/mixed-{tag}:{tag}");
        let shown = run(&namespace, "sluice", &reference)?;
        ensure!(
            shown == expected,
            "{tag} shows\n{shown}\ninstead of\n{expected}"
        );
        let layers = site.why(&namespace, &reference)?;
        println!("{tag}: {layers:?}");
        for (i, Why { lazy, reason, .. }) in layers.iter().enumerate() {
            // The lowest has busybox in it; the others are some hundred bytes.
            let small = !lazy && i > 0;
            ensure!(
                reason.starts_with("pulled whole: ") == small,
                "{tag}: layer {i}: {reason}"
            );
            ensure!(
                *lazy != stripped.contains(&i),
                "{tag}: layer {i}: lazy {lazy}, {reason}"
            );
            ensure!(!reason.is_empty(), "{tag}: layer {i} says nothing");
        }
        ensure!(layers.len() == 3, "{tag}: {layers:?}");
    }
    // The same chain again in a second namespace, and the first is still right after the second is gone.
    let second = run("other", "sluice", &format!("{host}/mixed-lazy:lazy"))?;
    ensure!(second == expected, "{second}");
    site.nerdctl("other")
        .ok(&["rmi", "-f", &format!("{host}/mixed-lazy:lazy")])?;
    let first = site
        .nerdctl("mixed-lazy")
        .ok(&[
            "run",
            "--rm",
            "--net",
            "none",
            &format!("{host}/mixed-lazy:lazy"),
        ])?
        .stdout;
    ensure!(first == expected, "{first}");
    Ok(())
}
