// SPDX-License-Identifier: Apache-2.0
//! Prewarming: a cold start after it takes nothing of the registry but the names of things.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_integration::cluster::image::Image;
use sluice_integration::cluster::{Cluster, Options, Shape};
use sluice_integration::harness::command::{self, run_observed};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::daemon::Daemon;
use sluice_integration::harness::http::manifest;
use sluice_integration::harness::images;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::registry::{Registry, free_address};
use sluice_integration::harness::root::Root;
use sluice_integration::harness::site::Site;

const REPOSITORY: &str = "prewarm/python";
const DEADLINE: Duration = Duration::from_secs(300);

/// The lines of `sluice ... --json`.
fn lines(text: &str) -> Result<Vec<Value>> {
    let lines = text.lines().map(serde_json::from_str);
    lines.collect::<Result<_, _>>().context("JSON lines")
}

/// Bytes of an image that stand in its manifest: the layers' blobs, their indexes, and the config.
fn sizes(manifest: &Value) -> (u64, u64, u64) {
    let layers = manifest["layers"].as_array().unwrap();
    let blobs = layers.iter().map(|it| it["size"].as_u64().unwrap()).sum();
    let index = "containerd.io/snapshot/sluice.index.size";
    let number = |it: &Value| it["annotations"][index].as_str().unwrap().parse::<u64>();
    let indexes = layers.iter().map(|it| number(it).unwrap()).sum();
    (blobs, indexes, manifest["config"]["size"].as_u64().unwrap())
}

#[test]
fn a_start_after_a_prewarm_needs_the_manifest_alone() -> Result<()> {
    let site = Site::start("prewarm", Release::V1, Line::OPEN, "")?;
    let layout = images::python_layout()?;
    let [original, reference] = site.push_and_convert(&layout, REPOSITORY)?;
    let line = &site.registry.line;
    let converted = line.bytes();

    // What is not there is named, and what cannot be prewarmed is refused, each with exit code 1.
    let missing = format!("{}/{REPOSITORY}:none", site.registry.host());
    for (image, scope, says) in [
        (&missing, "--full", "not found"),
        (
            &original,
            "--boot",
            "it has no index: the image is not converted",
        ),
    ] {
        let mut sluice = site.daemon.sluice()?;
        let output = command::run(sluice.args(["prewarm", scope, image]), DEADLINE)?;
        ensure!(!output.ok() && output.stderr.contains(says), "{output:?}");
        ensure!(output.stderr.contains(image.as_str()), "{output:?}");
    }
    let refused = line.bytes() - converted;
    ensure!(refused < 1 << 20, "refused after {refused} bytes");

    let before = line.bytes();
    let output = site.daemon.sluice_ok(&["prewarm", &reference, "--json"])?;
    let prewarmed = line.bytes() - before;
    let reports = lines(&output.stdout)?;
    let (summary, reports) = reports.split_last().context("a summary")?;
    ensure!(
        summary["event"] == "summary" && summary["failed"] == 0,
        "{summary}"
    );
    let last = reports.last().context("reports")?;
    ensure!(last["phase"] == "done", "{last}");
    for layer in last["layers"].as_array().unwrap() {
        ensure!(layer["phase"] == "done", "{layer}");
        ensure!(layer["present_bytes"] == layer["total_bytes"], "{layer}");
    }
    // It is seen to come.
    let present = |report: &Value| report["present_bytes"].as_u64().unwrap();
    ensure!(present(&reports[0]) < present(last), "{reports:?}");
    let (blobs, indexes, config) = sizes(&manifest(&site.registry.direct(), REPOSITORY, "sluice")?);
    ensure!(prewarmed >= blobs * 9 / 10, "{prewarmed} of {blobs}");

    let (requests, bytes) = (line.requests(), line.bytes());
    let nerdctl = site.nerdctl("prewarm");
    let began = Instant::now();
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    let mut run = nerdctl.command()?;
    run.args(["run", "--rm", "--net", "none", &reference]);
    let mut ready = Duration::ZERO;
    let output = run_observed(&mut run, Duration::from_secs(120), |_| {
        ready = began.elapsed();
    })?;
    ensure!(
        output.ok() && output.stdout.contains("\"ready\": true"),
        "{output:?}\n{}",
        site.daemon.log_tail()
    );
    let (requests, bytes) = (line.requests() - requests, line.bytes() - bytes);
    println!(
        "prewarm {:.1} MB ({blobs} B of layers, {indexes} B of indexes); then pull and start {:.2} s, \
         {requests} requests, {bytes} bytes from the registry",
        prewarmed as f64 / 1e6,
        ready.as_secs_f64()
    );
    // The manifest comes twice (nerdctl resolves and fetches it), the config once; each answer has a
    // head. An index or a chunk would be more.
    ensure!(
        bytes < 64 << 10 && bytes < config + (40 << 10),
        "{bytes} bytes, config {config}"
    );
    let fetched = |priority: &str| {
        let name = "sluice_fetched_bytes_total";
        site.daemon.metric(name, &["origin", priority])
    };
    ensure!(fetched("foreground")? < 1.0, "a reader had to wait");
    ensure!(fetched("background")? >= blobs as f64 * 0.9, "{blobs}");
    // Pulled, it is the image's like any other.
    ensure!(site.daemon.is_sealed()?, "{:#}", site.status()?);
    site.kill_containers();
    Ok(())
}

#[test]
fn a_prewarm_indexes_an_image_that_nobody_converted() -> Result<()> {
    let site = Site::start("prewarm-index", Release::V1, Line::OPEN, "")?;
    let direct = site.registry.direct();
    images::push_layout(
        &images::python_layout()?,
        &format!("{direct}/{REPOSITORY}:original"),
    )?;
    let reference = format!("{}/{REPOSITORY}:original", site.registry.host());
    let manifest = manifest(&direct, REPOSITORY, "original")?;
    let layers = manifest["layers"].as_array().unwrap().iter();
    let image_bytes: u64 = layers.map(|layer| layer["size"].as_u64().unwrap()).sum();
    let line = &site.registry.line;

    let before = line.bytes();
    let prewarmed = site.daemon.sluice_ok(&["prewarm", &reference, "--json"])?;
    let read = line.bytes() - before;
    let summary = lines(&prewarmed.stdout)?;
    let summary = summary.last().context("a summary")?;
    ensure!(summary["failed"] == 0, "{summary}");
    // Its bytes are read once, for index and chunks.
    ensure!(
        read < image_bytes + image_bytes / 20,
        "{read} of {image_bytes}"
    );

    let before = line.bytes();
    let nerdctl = site.nerdctl("prewarm");
    nerdctl.ok(&["pull", "--quiet", &reference])?;
    let ran = nerdctl.ok(&["run", "--rm", "--net", "none", &reference])?;
    ensure!(ran.stdout.contains("\"ready\": true"), "{ran:?}");
    let pulled = line.bytes() - before;
    ensure!(site.daemon.is_sealed()?, "{:#}", site.status()?);
    println!("prewarm read {read} of {image_bytes} bytes; pull and start {pulled}");
    ensure!(
        pulled < 100_000,
        "{pulled} bytes\n{}",
        site.daemon.log_tail()
    );
    Ok(())
}

#[test]
fn a_zone_is_prewarmed_at_the_price_of_one_node() -> Result<()> {
    // Nobody starts anything, so nothing but the prewarm completes an image.
    let options = Options::cluster(Duration::from_secs(600));
    let cluster = Cluster::start(3, Shape::ZONE, &options)?;
    let image = Image::build(cluster.root().path(), "app", 1)?;
    let image = cluster.publish(&image)?;
    let first = cluster.node(0)?;
    let before = cluster.origin().egress().bytes;
    let began = Instant::now();
    let output = first.sluice_ok(&["prewarm", &image.reference, "--zone", "--json"])?;
    let took = began.elapsed();
    let reports = lines(&output.stdout)?;
    let summary = reports.last().context("a summary")?;
    ensure!(summary["nodes"] == 3 && summary["failed"] == 0, "{summary}");
    for node in cluster.nodes() {
        let own = |it: &&Value| it["node"] == node.name();
        let last = reports.iter().rfind(own).context("reports of each node")?;
        ensure!(last["phase"] == "done", "{last}");
        ensure!(last["present_bytes"] == last["total_bytes"], "{last}");
    }
    let bytes = cluster.origin().egress().bytes - before;
    println!(
        "prewarm of 3 nodes: {:.1} MB of an image of {:.1} MB in {:.1} s",
        bytes as f64 / 1e6,
        image.bytes as f64 / 1e6,
        took.as_secs_f64()
    );
    ensure!(
        bytes as f64 >= image.bytes as f64 * 0.9,
        "{bytes} of {}",
        image.bytes
    );
    // As in the other tests of clusters that do not ask how fast the machine is: a node without a processor
    // to spare is left, and what it fetches is fetched again.
    ensure!(
        (bytes as f64) < image.bytes as f64 * 1.6,
        "{bytes} of {}",
        image.bytes
    );

    let bad = first.sluice_ok(&["prewarm", &image.reference, "--nodes", "nobody"]);
    let error = format!("{:#}", bad.err().context("a node that is not there")?);
    ensure!(error.contains("nobody"), "{error}");
    cluster.end()
}

#[test]
fn what_is_pushed_to_a_registry_is_prewarmed() -> Result<()> {
    const TOKEN: &str = "a-token-of-some-length";
    let root = Root::new("notify")?;
    let address = free_address()?;
    let endpoint = format!("http://{address}/notifications");
    let registry = Registry::start_notifying(&root, Line::OPEN, &endpoint, TOKEN)?;
    let token = root.join("token")?;
    std::fs::write(&token, TOKEN)?;
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600))?;
    let config = format!(
        "[notifications]\nlisten = \"{address}\"\ntoken = \"{}\"\nprewarm = true\n",
        token.display()
    );
    // Nobody pulls anything, so nothing listens at containerd's socket.
    let daemon = Daemon::start(&root, &root.join("none.sock")?, &config)?;
    let layout = images::python_layout()?;
    let reference = |tag: &str| format!("{}/{REPOSITORY}:{tag}", registry.host());
    images::push_layout(&layout, &reference("original"))?;
    let [original, converted] =
        ["original", "sluice"].map(|tag| format!("docker://{}", reference(tag)));
    daemon.sluice_ok(&["convert", &original, &converted])?;

    let told = |outcome: &str| {
        let label = format!("outcome=\"{outcome}\"");
        daemon.metric("sluice_notifications_total", &[&label])
    };
    let began = Instant::now();
    // The converted image, and the one before it.
    let done = || daemon.log().matches("image prewarmed").count();
    while told("prewarmed")? < 2.0 || done() < 2 {
        let log = || daemon.log_tail();
        ensure!(began.elapsed() < DEADLINE, "not prewarmed\n{}", log());
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(told("blob")? > 0.0 && told("denied")? < 1.0);
    let before = registry.line.bytes();
    daemon.sluice_ok(&["prewarm", &reference("sluice")])?;
    let bytes = registry.line.bytes() - before;
    ensure!(bytes < 64 << 10, "{bytes} bytes of what should be here");
    Ok(())
}
