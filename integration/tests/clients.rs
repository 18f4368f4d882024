// SPDX-License-Identifier: Apache-2.0
//! What clients do with lazy images besides pulling and running one.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::quick_reaper_with;
use sluice_integration::harness::layout::{self, Coding};
use sluice_integration::harness::mounts;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, http, images};
use sluice_integration::oddities::entry::Entry;

const NAMESPACE: &str = "clients";

fn site(name: &str, release: Release) -> Result<Site> {
    let config = quick_reaper_with("auto");
    Site::start_for_kubernetes(name, release, Line::OPEN, &config)
}

fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut tar: Vec<u8> = entries.iter().flat_map(Entry::bytes).collect();
    tar.extend([0; 1024]);
    tar
}

/// A layer with a shell, and with `mark` in it.
fn base(mark: &str) -> Result<Vec<u8>> {
    Ok(tar(&[
        Entry::file("bin/busybox", layout::busybox()?).mode(0o755),
        Entry::symlink("bin/sh", "busybox"),
        Entry::directory("data").mode(0o755).owner(1000, 1000),
        Entry::file("data/mark", mark).owner(1000, 1000),
    ]))
}

/// A layer with one file.
fn file(name: &str, content: &str) -> Vec<u8> {
    tar(&[Entry::file(format!("data/{name}"), content)])
}

/// Pushes an image of these layers that says what `command` does, and converts it; gives the reference.
fn push(site: &Site, name: &str, layers: &[Vec<u8>], command: &str) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let command = ["/bin/sh", "-c", command];
    let layout = layout::write_tars(directory.path(), layers, Coding::Gzip, &command)?;
    let [_, converted] = site.push_and_convert(&layout, name)?;
    Ok(converted)
}

fn is_lazy(site: &Site, namespace: &str, reference: &str) -> Result<()> {
    let why = site.why(namespace, reference)?;
    ensure!(
        !why.is_empty() && why.iter().all(|layer| layer.lazy),
        "{why:?}"
    );
    Ok(())
}

#[test]
fn an_image_of_127_layers_is_one_mount() -> Result<()> {
    let site = site("layers127", Release::V2)?;
    let mut layers = vec![base("of 127 layers")?];
    for at in 1..127 {
        layers.push(file(&format!("layer-{at:03}"), &format!("{at}\n")));
    }
    let reference = push(&site, "many", &layers, "cat /data/layer-*; sleep 2")?;
    let nerdctl = site.nerdctl(NAMESPACE);
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    is_lazy(&site, NAMESPACE, &reference)?;
    let mut run = nerdctl.command()?;
    run.args(["run", "--rm", "--net", "none", &reference]);
    let mut seen = Vec::new();
    let below = site.daemon.state().join("mnt");
    let ran = command::run_observed(&mut run, Duration::from_secs(60), |_| {
        seen = mounts::below(&below);
    })?;
    let expected: String = (1..127).map(|at| format!("{at}\n")).collect();
    ensure!(ran.ok() && ran.stdout == expected, "{ran:?}");
    let trees = seen.iter().filter(|it| it.kind == "erofs").count();
    ensure!(trees == 1 && seen.len() <= 2, "{seen:?}");
    Ok(())
}

#[test]
fn pulls_at_once_of_images_that_share_layers() -> Result<()> {
    let site = site("parallel", Release::V2)?;
    let mut shared = vec![base("shared")?];
    for at in 0..4 {
        shared.push(file(&format!("shared-{at}"), &"s".repeat(100_000)));
    }
    let mut references = Vec::new();
    for image in 0..8 {
        let mut layers = shared.clone();
        layers.push(file("own", &format!("image {image}\n")));
        let name = format!("sharing-{image}");
        references.push(push(
            &site,
            &name,
            &layers,
            "cat /data/own; cat /data/shared-* | wc -c",
        )?);
    }
    // Half of them by Kubernetes, which is another namespace.
    let results: Vec<Result<String>> = std::thread::scope(|scope| {
        let pulls: Vec<_> = references
            .iter()
            .enumerate()
            .map(|(at, reference)| {
                let site = &site;
                scope.spawn(move || -> Result<String> {
                    if at % 2 == 0 {
                        let nerdctl = site.nerdctl(NAMESPACE);
                        nerdctl.ok(&["pull", "--quiet", reference])?;
                        let run = ["run", "--rm", "--net", "none", reference];
                        return Ok(nerdctl.ok(&run)?.stdout);
                    }
                    site.kubernetes().pull(reference)?;
                    site.kubernetes().run(&format!("pod-{at}"), reference)
                })
            })
            .collect();
        pulls
            .into_iter()
            .map(|pull| pull.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
            .collect()
    });
    for (at, result) in results.into_iter().enumerate() {
        let said = result.with_context(|| site.daemon.log_tail())?;
        ensure!(
            said == format!("image {at}\n400000\n"),
            "image {at}: {said}"
        );
        let namespace = if at % 2 == 0 { NAMESPACE } else { "k8s.io" };
        is_lazy(&site, namespace, &references[at])?;
    }
    Ok(())
}

#[test]
fn of_an_index_each_machine_gets_its_own_image() -> Result<()> {
    let site = site("platforms", Release::V2)?;
    let (host, direct) = (site.registry.host(), site.registry.direct());
    let mut manifests = Vec::new();
    for (architecture, said) in [("arm64", "wrong"), ("amd64", "right")] {
        let directory = tempfile::tempdir()?;
        let command = ["/bin/sh", "-c", "cat /data/mark; echo"];
        let layout = layout::write_tars(directory.path(), &[base(said)?], Coding::Gzip, &command)?;
        images::push_layout(&layout, &format!("{direct}/multi:{architecture}"))?;
        let descriptor = http::descriptor(&direct, "multi", architecture)?;
        manifests.push(json!({
            "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.bytes,
            "platform": {"architecture": architecture, "os": "linux"},
        }));
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
    });
    http::put_index(&direct, "multi", "original", &index)?;
    let [original, converted] = ["original", "lazy"].map(|tag| format!("{host}/multi:{tag}"));
    site.daemon.sluice_ok(&["convert", &original, &converted])?;
    let nerdctl = site.nerdctl(NAMESPACE);
    nerdctl.ok(&["pull", "--quiet", &converted])?;
    let ran = nerdctl.ok(&["run", "--rm", "--net", "none", &converted])?;
    ensure!(ran.stdout == "right\n", "{ran:?}");
    is_lazy(&site, NAMESPACE, &converted)?;
    site.kubernetes().pull(&converted)?;
    let said = site.kubernetes().run("multi", &converted)?;
    ensure!(said == "right\n", "{said}");
    Ok(())
}

#[test]
fn images_are_volumes_of_pods_and_mounts_of_ctr() -> Result<()> {
    let site = site("volumes", Release::V2)?;
    let program = push(
        &site,
        "program",
        &[base("program")?],
        "cat /volume/data/model; echo",
    )?;
    let model = push(
        &site,
        "model",
        &[base("model")?, file("model", "weights")],
        "true",
    )?;
    let kubernetes = site.kubernetes();
    kubernetes.pull(&program)?;
    kubernetes.pull(&model)?;
    let volume =
        json!([{"container_path": "/volume", "image": {"image": model}, "readonly": true}]);
    let said = kubernetes.run_with("volume", &program, &volume, None)?;
    ensure!(said == "weights\n", "{said}\n{}", site.daemon.log_tail());
    is_lazy(&site, "k8s.io", &model)?;

    site.nerdctl(NAMESPACE).ok(&["pull", "--quiet", &model])?;
    let target = site.root.directory("look")?;
    let directory = target.display().to_string();
    let mount = [
        "images",
        "mount",
        "--snapshotter",
        "sluice",
        &model,
        &directory,
    ];
    site.containerd.ctr_ok(NAMESPACE, &mount)?;
    let read = command::run_ok(
        Command::new("cat").arg(target.join("data/model")),
        Duration::from_secs(30),
    );
    let unmount = [
        "images",
        "unmount",
        "--snapshotter",
        "sluice",
        "--rm",
        &directory,
    ];
    site.containerd.ctr_ok(NAMESPACE, &unmount)?;
    ensure!(read?.stdout == "weights");
    Ok(())
}

#[test]
fn a_lazy_image_is_committed_and_pushed_once_its_content_is_complete() -> Result<()> {
    let site = site("commit", Release::V2)?;
    let image = push(
        &site,
        "parent",
        &[base("parent")?, file("below", "below")],
        "true",
    )?;
    let nerdctl = site.nerdctl(NAMESPACE);
    nerdctl.ok(&["pull", "--quiet", &image])?;
    is_lazy(&site, NAMESPACE, &image)?;
    let write = [
        "run", "--name", "writer", "--net", "none", &image, "/bin/sh", "-c",
    ];
    nerdctl.ok(&[&write[..], &["echo above > /data/above; rm /data/mark"]].concat())?;
    site.daemon
        .sluice_ok(&["content", "complete", "--namespace", NAMESPACE, &image])?;
    let host = site.registry.host();
    let child = format!("{host}/child:1");
    nerdctl.ok(&["commit", "writer", &child])?;
    nerdctl.ok(&["push", "--quiet", &child])?;
    let look = ["/bin/sh", "-c", "cat /data/*; ls /data"];
    let run = ["run", "--rm", "--net", "none"];
    let expected = "above\nbelowabove\nbelow\n";
    let ran = nerdctl.ok(&[&run[..], &[&child], &look].concat())?;
    ensure!(ran.stdout == expected, "{ran:?}");
    // Elsewhere it is an image like others.
    let other = site.nerdctl_with("elsewhere", "overlayfs");
    other.ok(&["pull", "--quiet", &child])?;
    let ran = other.ok(&[&run[..], &[&child], &look].concat())?;
    ensure!(ran.stdout == expected, "{ran:?}");
    Ok(())
}

#[test]
fn containers_with_users_of_their_own_share_the_mount() -> Result<()> {
    let site = site("users", Release::V2)?;
    let layers = [base("users")?];
    let reference = push(
        &site,
        "users",
        &layers,
        "stat -c '%u %g %n' /data/mark /bin/sh; cat /proc/self/uid_map",
    )?;
    site.nerdctl(NAMESPACE)
        .ok(&["pull", "--quiet", &reference])?;
    for (at, first) in ["100000", "300000"].into_iter().enumerate() {
        let map = format!("0:{first}:65536");
        let run = [
            "run",
            "--rm",
            "--snapshotter",
            "sluice",
            "--remap-labels",
            "--uidmap",
            &map,
            "--gidmap",
            &map,
        ];
        let name = format!("users-{at}");
        let ran = site
            .containerd
            .ctr_ok(NAMESPACE, &[&run[..], &[&reference, &name]].concat());
        let ran = ran.with_context(|| site.daemon.log_tail())?;
        let lines: Vec<&str> = ran.stdout.lines().collect();
        ensure!(
            lines[..2] == ["1000 1000 /data/mark", "0 0 /bin/sh"],
            "{ran:?}"
        );
        ensure!(
            lines[2].split_whitespace().eq(["0", first, "65536"]),
            "{ran:?}"
        );
    }
    let below = mounts::below(&site.daemon.state().join("mnt"));
    let trees = below.iter().filter(|it| it.kind == "erofs").count();
    ensure!(trees <= 1, "{below:?}");
    Ok(())
}

#[test]
fn pods_with_users_of_their_own_share_the_mount() -> Result<()> {
    let site = site("podusers", Release::V2)?;
    let show = "stat -c '%u %g %n' /data/mark /bin/sh; cat /proc/self/uid_map";
    let reference = push(&site, "podusers", &[base("users of a pod")?], show)?;
    let kubernetes = site.kubernetes();
    kubernetes.pull(&reference)?;
    is_lazy(&site, "k8s.io", &reference)?;
    for first in [100_000, 300_000] {
        let name = format!("users-{first}");
        let ran = kubernetes.run_with(&name, &reference, &json!([]), Some(first));
        let said = ran.with_context(|| site.daemon.log_tail())?;
        let lines: Vec<&str> = said.lines().collect();
        ensure!(
            lines[..2] == ["1000 1000 /data/mark", "0 0 /bin/sh"],
            "{said}"
        );
        let map = ["0", &first.to_string(), "65536"];
        ensure!(lines[2].split_whitespace().eq(map), "{said}");
    }
    let below = mounts::below(&site.daemon.state().join("mnt"));
    // The image and that of the pods' first process, which each pod has.
    let trees = below.iter().filter(|it| it.kind == "erofs").count();
    ensure!(trees <= 2, "{below:?}");
    Ok(())
}
