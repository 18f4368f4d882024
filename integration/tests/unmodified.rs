// SPDX-License-Identifier: Apache-2.0
//! Images that nobody converted: lazy by an index that stands elsewhere than in their blobs.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::{Surroundings, quick_reaper_with};
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::registry::{Registry, free_address};
use sluice_integration::harness::root::Root;
use sluice_integration::harness::site::{REGISTRY, Site};
use sluice_integration::harness::wait::eventually;
use sluice_integration::harness::{http, images};

const NAMESPACE: &str = "unmodified";
const REPOSITORY: &str = "unmodified/python";

/// Pushes the test image as it is; gives its reference and the bytes of its layers.
fn push(registry: &Registry) -> Result<(String, u64)> {
    let direct = registry.direct();
    images::push_layout(
        &images::python_layout()?,
        &format!("{direct}/{REPOSITORY}:original"),
    )?;
    let manifest = http::manifest(&direct, REPOSITORY, "original")?;
    let layers = manifest["layers"].as_array().into_iter().flatten();
    let bytes = layers.filter_map(|layer| layer["size"].as_u64()).sum();
    let host = registry.host();
    Ok((format!("{host}/{REPOSITORY}:original"), bytes))
}

fn site(name: &str, extra: &str) -> Result<Site> {
    let config = format!("{}{extra}", quick_reaper_with("auto"));
    Site::start(name, Release::V1, Line::OPEN, &config)
}

/// Has the daemon know a registry by its port: containerd's labels leave ports out, and an image that nobody converted
/// has no hint.
fn named(registry: &str) -> String {
    format!("\n[registry.hosts.\"{registry}\"]\n")
}

/// All files of the image as a snapshotter shows them, a line each.
fn files(site: &Site, registry: &Registry, snapshotter: &str) -> Result<Vec<String>> {
    let chain_id = http::chain_id(&registry.direct(), REPOSITORY, "original")?;
    site.files(NAMESPACE, snapshotter, &chain_id, false)
}

/// Pulls, and says how many bytes that took of the registry.
fn pull(site: &Site, registry: &Registry, reference: &str) -> Result<u64> {
    let before = registry.line.bytes();
    site.nerdctl(NAMESPACE)
        .ok(&["pull", "--quiet", reference])?;
    Ok(registry.line.bytes() - before)
}

/// Pulls the ordinary way, and waits until each layer has an index; says how many layers there are.
fn pull_and_index(site: &Site, reference: &str, image_bytes: u64) -> Result<f64> {
    let pulled = pull(site, &site.registry, reference)?;
    ensure!(
        pulled >= image_bytes,
        "the first pull moved {pulled} of {image_bytes}"
    );
    let why = site.why(NAMESPACE, reference)?;
    ensure!(
        !why.is_empty() && why.iter().all(|layer| !layer.lazy),
        "{why:?}"
    );
    let layers = why.len() as f64;
    let indexed = eventually("each layer is indexed", Duration::from_secs(240), || {
        let made = site
            .daemon
            .metric("sluice_node_indexes_total", &["result=\"made\""]);
        Ok(made.is_ok_and(|made| made == layers))
    });
    indexed.with_context(|| site.daemon.log_tail())?;
    Ok(layers)
}

/// Starts a container of it, and compares all files with those that containerd unpacks by itself.
fn shows_the_same(site: &Site, registry: &Registry, reference: &str) -> Result<()> {
    let run = ["run", "--rm", "--net", "none", reference];
    let ran = site.nerdctl(NAMESPACE).ok(&run)?;
    ensure!(ran.stdout.contains("\"ready\": true"), "{ran:?}");
    let seen = files(site, registry, "sluice")?;
    site.pull_ordinarily(NAMESPACE, reference)?;
    let expected = files(site, registry, "overlayfs")?;
    for (ours, theirs) in seen.iter().zip(&expected) {
        ensure!(ours == theirs, "shows\n  {ours}\ninstead of\n  {theirs}");
    }
    ensure!(seen.len() == expected.len() && seen.len() > 1000);
    Ok(())
}

/// Removes the image and all that containerd and this node hold of it, but indexes.
fn forget(site: &Site, reference: &str) -> Result<()> {
    site.nerdctl(NAMESPACE).ok(&["rmi", "-f", reference])?;
    let devices = site.daemon.state().join("devices");
    eventually("all of the image goes", Duration::from_secs(90), || {
        let blobs = site
            .containerd
            .ctr_ok(NAMESPACE, &["content", "ls", "-q"])?;
        let devices = std::fs::read_dir(&devices)?.flatten();
        let left = devices.filter(|it| !it.file_name().to_string_lossy().starts_with('.'));
        Ok(blobs.stdout.trim().is_empty() && left.count() == 0)
    })
}

#[test]
fn a_second_pull_is_lazy_without_any_conversion() -> Result<()> {
    let site = site("unmodified", "")?;
    let (reference, image_bytes) = push(&site.registry)?;
    let layers = pull_and_index(&site, &reference, image_bytes)?;
    // It looks once a second what the client has called the image.
    let known = eventually("the port is found", Duration::from_secs(30), || {
        let log = site.daemon.log();
        Ok(log.contains("found out where a repository is"))
    });
    known.with_context(|| site.daemon.log_tail())?;
    forget(&site, &reference)?;

    let pulled = pull(&site, &site.registry, &reference)?;
    let why = site.why(NAMESPACE, &reference)?;
    println!("the second pull moved {pulled} of {image_bytes} bytes; {why:?}");
    // Nobody told the daemon the registry's port, and the name was removed with the image.
    let place = format!("{}/{REPOSITORY}", site.registry.host());
    ensure!(!why.is_empty() && why.iter().all(|layer| layer.place == place));
    ensure!(
        pulled * 20 < image_bytes,
        "{pulled} of {image_bytes}\n{}",
        site.daemon.log_tail()
    );
    ensure!(
        why.iter()
            .all(|layer| layer.lazy && layer.reason.contains("made by this node")),
        "{why:?}"
    );
    let lazy = site
        .daemon
        .metric("sluice_lazy_layers_total", &["index=\"node\""])?;
    ensure!(lazy == layers, "{lazy}");
    shows_the_same(&site, &site.registry, &reference)?;
    // Complete, and proven by the diff IDs of the image.
    site.wait_sealed(Duration::from_secs(240))
}

#[test]
fn an_artifact_makes_the_first_pull_lazy_and_changes_nothing_of_the_image() -> Result<()> {
    let config = "\n[index]\nnode = \"off\"\n";
    let site = site("referrer", &(named(REGISTRY) + config))?;
    let (reference, image_bytes) = push(&site.registry)?;
    let direct = site.registry.direct();
    let before = http::manifest(&direct, REPOSITORY, "original")?;
    let indexed = site.daemon.sluice_ok(&["index", &reference])?;
    println!("{}", indexed.stdout);
    ensure!(http::manifest(&direct, REPOSITORY, "original")? == before);

    let pulled = pull(&site, &site.registry, &reference)?;
    let why = site.why(NAMESPACE, &reference)?;
    println!("the first pull moved {pulled} of {image_bytes} bytes; {why:?}");
    ensure!(
        why.iter()
            .all(|layer| layer.lazy && layer.reason.contains("artifact")),
        "{why:?}\n{}",
        site.daemon.log_tail()
    );
    ensure!(pulled * 20 < image_bytes, "{pulled} of {image_bytes}");
    shows_the_same(&site, &site.registry, &reference)?;
    site.wait_sealed(Duration::from_secs(240))
}

/// A node of a zone that knows this registry, with all that it needs below its own part of the root.
fn node_of_zone(
    root: &Root,
    name: &str,
    [at, seed]: [SocketAddr; 2],
    registry: &str,
) -> Result<Site> {
    let config = quick_reaper_with("auto") + &named(registry);
    let config = format!(
        "{config}\n[cluster]\nenabled = true\nname = \"{name}\"\nlisten = \"{at}\"\nseeds = [\"{seed}\"]\n"
    );
    let (part, around) = (root.part(name)?, Surroundings::default());
    Site::start_within(part, around, Release::V1, Line::OPEN, &config)
}

#[test]
fn the_first_pull_is_lazy_on_a_node_whose_zone_has_the_indexes() -> Result<()> {
    let root = Root::new("zone")?;
    let (at_a, at_b) = (free_address()?, free_address()?);
    let a = node_of_zone(&root, "a", [at_a, at_b], REGISTRY)?;
    let registry = &a.registry;
    let (reference, image_bytes) = push(registry)?;
    let layers = pull_and_index(&a, &reference, image_bytes)?;

    // It comes later, so nobody has told it anything: it has to ask.
    let b = node_of_zone(&root, "b", [at_b, at_a], &registry.host())?;
    let joined = |site: &Site| site.daemon.metric("sluice_cluster_nodes", &[]);
    eventually("they know each other", Duration::from_secs(60), || {
        Ok(joined(&a)? == 2.0 && joined(&b)? == 2.0)
    })?;
    let pulled = pull(&b, registry, &reference)?;
    let why = b.why(NAMESPACE, &reference)?;
    println!("the first pull of another node moved {pulled} of {image_bytes} bytes; {why:?}");
    ensure!(
        why.len() as f64 == layers
            && why
                .iter()
                .all(|layer| layer.lazy && layer.reason.contains("made by another node")),
        "{why:?}\n{}",
        b.daemon.log_tail()
    );
    ensure!(pulled * 10 < image_bytes, "{pulled} of {image_bytes}");
    let asked = b
        .daemon
        .metric("sluice_zone_index_asks_total", &["answer=\"given\""])?;
    let lazy = b
        .daemon
        .metric("sluice_lazy_layers_total", &["index=\"peer\""])?;
    ensure!(asked == layers && lazy == layers, "{asked}, {lazy}");
    shows_the_same(&b, registry, &reference)?;
    b.wait_sealed(Duration::from_secs(240))?;
    // What nobody but another node said of names and places is what the bytes say.
    let proven = b
        .daemon
        .metric("sluice_tree_checks_total", &["result=\"same\""])?;
    ensure!(proven == layers, "{proven} of {layers}");
    // Also chunks came of a node that has the layers as directories only.
    let opened = a
        .daemon
        .log()
        .contains("opened a layer on behalf of a node");
    let served = a
        .daemon
        .metric("sluice_peer_served_bytes_total", &["form=\"index\""])?;
    ensure!(opened && served > 0.0, "{served}\n{}", a.daemon.log_tail());
    Ok(())
}
