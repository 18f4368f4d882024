// SPDX-License-Identifier: Apache-2.0
//! Ordinary pulls through the mirror: the conformance tests of the distribution specification, skopeo,
//! nerdctl with overlayfs, and a docker-style client; each also with the registry stopped.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use sluice_integration::harness::containerd::{Containerd, Release};
use sluice_integration::harness::daemon::Daemon;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::nerdctl::Nerdctl;
use sluice_integration::harness::proxy::Line;
use sluice_integration::harness::registry::{Registry, free_address};
use sluice_integration::harness::root::Root;
use sluice_integration::harness::{command, images, tools};

/// What docker sends when it pulls a manifest.
const DOCKER_ACCEPT: &str = "application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json";
/// Bytes of the large layer: several pieces.
const LAYER_BYTES: usize = 9_000_000;

/// A registry, a daemon with a mirror, and an image in the registry.
struct Pulls {
    daemon: Daemon,
    registry: Registry,
    mirror: SocketAddr,
    root: Root,
}

impl Pulls {
    /// `extra` is appended to `[mirror]`.
    fn start(name: &str, extra: &str) -> Result<Self> {
        let root = Root::new(name)?;
        let registry = Registry::start(&root, Line::OPEN)?;
        let mirror = free_address()?;
        let upstream = registry.host();
        let config = format!(
            "\n[mirror]\nlisten = \"{mirror}\"\nupstream = \"{upstream}\"\nfresh = \"0s\"\n{extra}"
        );
        let daemon = Daemon::start(&root, &root.join("c/c.sock")?, &config)?;
        let pulls = Self {
            daemon,
            registry,
            mirror,
            root,
        };
        pulls.push("app")?;
        Ok(pulls)
    }

    /// Pushes an image of two layers that runs.
    fn push(&self, repository: &str) -> Result<()> {
        let mut base = Layer::new();
        base.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
            .symlink("bin/sh", "busybox")?;
        let mut top = Layer::new();
        top.file("data", Attributes::root(0o644), &noise(LAYER_BYTES))?;
        let directory = tempfile::tempdir()?;
        let layers = &mut [base, top];
        let layout = layout::write(directory.path(), layers, &["/bin/sh", "-c", "md5sum /data"])?;
        let reference = format!("{}/{repository}:1", self.registry.direct());
        images::push_layout(&layout, &reference)
    }

    /// What became of all that was asked of the mirror.
    fn requests(&self, labels: &[&str]) -> Result<f64> {
        self.daemon.metric("sluice_mirror_requests_total", labels)
    }

    fn get(&self, path: &str, headers: &str) -> Result<Answer> {
        exchange(self.mirror, path, headers)
    }
}

/// Bytes that do not compress, the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 32);
    let mut block = Sha256::digest(b"noise");
    while bytes.len() < length {
        bytes.extend_from_slice(&block);
        block = Sha256::digest(block);
    }
    bytes.truncate(length);
    bytes
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn digest(&self) -> String {
        format!("sha256:{}", hex::encode(Sha256::digest(&self.body)))
    }
}

/// A GET as docker sends it. The connection ends with the answer.
fn exchange(address: SocketAddr, path: &str, headers: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: docker/20.10.24 go/go1.19.8\r\n{headers}Connection: close\r\n\r\n"
    )?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let split = all.windows(4).position(|it| it == b"\r\n\r\n");
    let split = split.context("no head")?;
    let head = std::str::from_utf8(&all[..split])?;
    let status = head.split(' ').nth(1).context("status")?.parse()?;
    let pairs = head.lines().skip(1).filter_map(|it| it.split_once(": "));
    let headers: BTreeMap<_, _> = pairs
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let body = all[split + 4..].to_vec();
    if let Some(length) = headers.get("content-length") {
        ensure!(body.len() == length.parse::<usize>()?, "{path} was cut");
    }
    Ok(Answer {
        status,
        headers,
        body,
    })
}

fn digests(manifest: &Value) -> Vec<String> {
    let layers = manifest["layers"].as_array().into_iter().flatten();
    std::iter::once(&manifest["config"])
        .chain(layers)
        .filter_map(|it| it["digest"].as_str().map(str::to_owned))
        .collect()
}

#[test]
fn oci_conformance_of_pulls() -> Result<()> {
    let pulls = Pulls::start("conformance", "")?;
    let manifest = exchange(
        pulls.registry.direct().parse()?,
        "/v2/app/manifests/1",
        &format!("Accept: {DOCKER_ACCEPT}\r\n"),
    )?;
    let blobs = digests(&serde_json::from_slice(&manifest.body)?);
    let program = tools::go_tool("oci-conformance")
        .context("the conformance tests need Go and their module")?;
    let directory = pulls.root.directory("conformance")?;
    let output = command::run(
        Command::new(program)
            .current_dir(&directory)
            .env("OCI_RESULTS_DIR", &directory)
            .env("OCI_VERSION", "1.1")
            .env("OCI_REGISTRY", pulls.mirror.to_string())
            .env("OCI_TLS", "disabled")
            .env("OCI_REPO1", "app")
            .env("OCI_API_PULL", "true")
            .env("OCI_API_PUSH", "false")
            .env("OCI_API_BLOBS_DELETE", "false")
            .env("OCI_API_MANIFESTS_DELETE", "false")
            .env("OCI_API_TAGS_DELETE", "false")
            // Debian's registry has no referrers; the mirror passes its 404 on.
            .env("OCI_API_REFERRER", "false")
            // The tests look for digest headers in content that they pushed themselves only; for ours
            // they fail whatever comes. The docker-style client looks for them.
            .env("OCI_API_BLOBS_DIGEST_HEADER", "false")
            .env("OCI_API_MANIFESTS_DIGEST_HEADER", "false")
            .env("OCI_RO_DATA_TAGS", "1")
            .env("OCI_RO_DATA_MANIFESTS", manifest.digest())
            .env("OCI_RO_DATA_BLOBS", blobs.join(" ")),
        Duration::from_secs(120),
    )?;
    // The summary is all there is to go by: the program fails when it writes its files of a run that
    // pushed nothing, and its exit status is that of the writing.
    let (_, summary) = output
        .stdout
        .split_once("OCI Conformance Result: ")
        .with_context(|| format!("no result:\n{}{}", output.stdout, output.stderr))?;
    let verdict = summary.lines().next().unwrap_or_default();
    let count = |word: &str| -> Result<u32> {
        let line = summary
            .lines()
            .map(str::trim)
            .find(|it| it.starts_with(word));
        let (_, number) = line.and_then(|it| it.split_once(':')).context("no count")?;
        Ok(number.trim().parse()?)
    };
    let (passed, failed) = (count("Pass.")?, count("FAIL.")? + count("Error.")?);
    let skipped = count("Skip.")?;
    println!(
        "OCI Conformance Result: {verdict} ({passed} passed, {failed} failed, {skipped} skipped)"
    );
    ensure!(
        verdict.eq_ignore_ascii_case("pass") && failed == 0,
        "{}",
        output.stdout
    );
    ensure!(
        passed >= 16 && skipped == 0,
        "only {passed} ran:\n{summary}"
    );
    for api in [
        "Tag listing",
        "Blob get.",
        "Blob head",
        "Manifest get by digest",
        "Manifest get by tag",
    ] {
        let line = summary
            .lines()
            .map(str::trim)
            .find(|it| it.starts_with(api));
        ensure!(
            line.is_some_and(|it| it.ends_with(" Pass")),
            "{api}:\n{summary}"
        );
    }
    Ok(())
}

/// Copies the image by the registry's name, checks each blob.
fn copy(pulls: &Pulls, registries: &Path, name: &str) -> Result<()> {
    let target = pulls.root.directory(name)?;
    command::run_ok(
        Command::new(tools::on_path("skopeo")?)
            .args(["--insecure-policy", "--registries-conf"])
            .arg(registries)
            .arg("copy")
            .arg(format!("docker://{}/app:1", pulls.registry.host()))
            .arg(format!("dir:{}", target.display())),
        Duration::from_secs(120),
    )?;
    let copied: Value = serde_json::from_slice(&std::fs::read(target.join("manifest.json"))?)?;
    for digest in digests(&copied) {
        let hex = digest.trim_start_matches("sha256:");
        let bytes = std::fs::read(target.join(hex))?;
        ensure!(
            hex::encode(Sha256::digest(&bytes)) == hex,
            "{digest} is wrong"
        );
    }
    Ok(())
}

#[test]
fn skopeo_copies_through_the_mirror_also_without_the_registry() -> Result<()> {
    let mut pulls = Pulls::start("skopeo", "")?;
    let host = pulls.registry.host();
    let registries = pulls.root.join("registries.conf")?;
    std::fs::write(
        &registries,
        format!(
            "[[registry]]\nlocation = \"{host}\"\ninsecure = true\n\n[[registry.mirror]]\n\
             location = \"{}\"\ninsecure = true\n",
            pulls.mirror
        ),
    )?;
    copy(&pulls, &registries, "first")?;
    ensure!(
        pulls.requests(&["kind=\"blob\""])? >= 3.0,
        "not by the mirror"
    );
    let fetched = pulls
        .daemon
        .metric("sluice_mirror_bytes_total", &["origin"])?;
    copy(&pulls, &registries, "second")?;
    let again = pulls
        .daemon
        .metric("sluice_mirror_bytes_total", &["origin"])?;
    ensure!(
        fetched >= LAYER_BYTES as f64 && again == fetched,
        "{fetched} {again}"
    );
    pulls.registry.stop()?;
    copy(&pulls, &registries, "third")?;
    ensure!(
        pulls
            .daemon
            .metric("sluice_mirror_stale_served_total", &[])?
            > 0.0
    );
    Ok(())
}

#[test]
fn nerdctl_with_overlayfs_pulls_by_hosts_toml_also_without_the_registry() -> Result<()> {
    let mut pulls = Pulls::start("nerdctl", "")?;
    let socket = pulls.daemon.snapshots_socket();
    let containerd = Containerd::start(&pulls.root, Release::V2, &socket)?;
    let etc = pulls.root.directory("etc-root")?;
    let host = pulls.registry.host();
    let (root, mirror) = (etc.display().to_string(), pulls.mirror.to_string());
    let setup = ["setup", "mirror", "--root", &root, "--mirror", &mirror];
    let written = pulls
        .daemon
        .sluice_ok(&[&setup[..], &["--registry", &host]].concat())?;
    ensure!(
        written.stdout.contains("hosts.toml written"),
        "{}",
        written.stdout
    );
    let hosts = etc.join("etc/containerd/certs.d").display().to_string();
    let reference = format!("{host}/app:1");
    let pull = |pulls: &Pulls, namespace: &str| -> Result<()> {
        let nerdctl = Nerdctl::new(&pulls.root, &containerd, namespace, "overlayfs");
        nerdctl.ok(&["--hosts-dir", &hosts, "pull", "--quiet", &reference])?;
        let run = [
            "run", "--rm", "--net", "none", "--pull", "never", &reference,
        ];
        let output = nerdctl.ok(&run)?;
        ensure!(output.stdout.contains("/data"), "{}", output.stdout);
        // Namespaces share content: without it the next pull is a pull.
        nerdctl.ok(&["rmi", "--force", &reference])?;
        containerd.ctr_ok(namespace, &["content", "prune", "references"])?;
        Ok(())
    };
    pull(&pulls, "one")?;
    let blobs = pulls.requests(&["kind=\"blob\""])?;
    ensure!(
        blobs >= 3.0,
        "{blobs} blobs by the mirror\n{}",
        containerd.log_tail()
    );
    pulls.registry.stop()?;
    pull(&pulls, "two")?;
    ensure!(
        pulls.requests(&["kind=\"blob\""])? >= 2.0 * blobs,
        "nothing was pulled again"
    );
    ensure!(
        pulls
            .daemon
            .metric("sluice_mirror_stale_served_total", &[])?
            > 0.0
    );
    let status = pulls.daemon.sluice_ok(&["status"])?.stdout;
    ensure!(status.contains("serving pulls"), "{status}");
    Ok(())
}

#[test]
fn a_docker_style_client_resumes_also_without_the_registry() -> Result<()> {
    let mut pulls = Pulls::start("docker", "")?;
    let accept = format!("Accept: {DOCKER_ACCEPT}\r\n");
    ensure!(pulls.get("/v2/", "")?.status == 200);
    let manifest = pulls.get("/v2/app/manifests/1", &accept)?;
    ensure!(
        manifest.status == 200 && manifest.headers["docker-content-digest"] == manifest.digest()
    );
    let blobs = digests(&serde_json::from_slice(&manifest.body)?);
    let large = blobs.last().context("a layer")?.clone();
    let path = format!("/v2/app/blobs/{large}");
    // The first half of the layer, then the registry stops: what is here is served, the rest is not.
    let half = pulls.get(&path, "Range: bytes=0-4194303\r\n")?;
    ensure!(half.status == 206 && half.body.len() == 4 << 20);
    pulls
        .registry
        .line
        .set_mode(sluice_integration::harness::proxy::Mode::Refuse);
    let again = pulls.get(&path, "Range: bytes=1000-2000\r\n")?;
    ensure!(again.status == 206 && again.body == half.body[1000..=2000]);
    let beyond = pulls.get(&path, "Range: bytes=6000000-6000100\r\n")?;
    ensure!(beyond.status == 502, "{}", beyond.status);
    pulls
        .registry
        .line
        .set_mode(sluice_integration::harness::proxy::Mode::Forward);
    let rest = pulls.get(&path, "Range: bytes=4194304-\r\n")?;
    let whole = Answer {
        body: [half.body, rest.body].concat(),
        ..rest
    };
    ensure!(whole.status == 206 && whole.digest() == large);
    for digest in &blobs {
        ensure!(pulls.get(&format!("/v2/app/blobs/{digest}"), "")?.digest() == *digest);
    }
    pulls.registry.stop()?;
    let stale = pulls.get("/v2/app/manifests/1", &accept)?;
    ensure!(stale.body == manifest.body && stale.headers["warning"].starts_with("110"));
    let by_digest = format!("/v2/app/manifests/{}", manifest.digest());
    ensure!(pulls.get(&by_digest, &accept)?.body == manifest.body);
    for digest in &blobs {
        ensure!(pulls.get(&format!("/v2/app/blobs/{digest}"), "")?.digest() == *digest);
    }
    // Somebody else's name for the same bytes is no right to them.
    let other = pulls.get(&format!("/v2/other/blobs/{large}"), "")?;
    ensure!(other.status == 502, "{}", other.status);
    // A kill leaves a cache that opens; without the registry nobody's access is proven any more.
    pulls.daemon.kill()?;
    pulls.daemon.start_again()?;
    let answered = (0..100).find_map(|_| {
        std::thread::sleep(Duration::from_millis(100));
        pulls.get(&path, "").ok()
    });
    ensure!(answered.context("the mirror is back")?.status == 502);
    Ok(())
}

#[test]
fn two_nodes_pull_a_blob_once() -> Result<()> {
    let root = Root::new("mirrors")?;
    let registry = Registry::start(&root, Line::OPEN)?;
    let host = registry.host();
    let peers = [free_address()?, free_address()?];
    let mirrors = [free_address()?, free_address()?];
    let mut daemons = Vec::new();
    for at in 0..2 {
        let part = root.part(&format!("node-{at}"))?;
        let config = format!(
            "\n[mirror]\nlisten = \"{}\"\nupstream = \"{host}\"\n\n[cluster]\nenabled = true\n\
             name = \"node-{at}\"\nlisten = \"{}\"\nseeds = [\"{}\"]\n",
            mirrors[at],
            peers[at],
            peers[1 - at]
        );
        let daemon = Daemon::start(&part, &part.join("c/c.sock")?, &config)?;
        daemons.push((daemon, part));
    }
    let mut base = Layer::new();
    // Sixteen pieces: with one home for all of them the test would say nothing.
    base.file("data", Attributes::root(0o644), &noise(32 << 20))?;
    let directory = tempfile::tempdir()?;
    let layout = layout::write(directory.path(), &mut [base], &["/x"])?;
    images::push_layout(&layout, &format!("{}/app:1", registry.direct()))?;
    let sees = |daemon: &Daemon| -> Result<bool> {
        let nodes = daemon.sluice_ok(&["nodes"])?.stdout;
        Ok(nodes.contains("node-0") && nodes.contains("node-1"))
    };
    let begun = Instant::now();
    while !(sees(&daemons[0].0)? && sees(&daemons[1].0)?) {
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "the nodes do not find each other"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let accept = format!("Accept: {DOCKER_ACCEPT}\r\n");
    let before = registry.line.bytes();
    let mut blob_bytes = 0;
    for mirror in mirrors {
        let manifest = exchange(mirror, "/v2/app/manifests/1", &accept)?;
        let manifest: Value = serde_json::from_slice(&manifest.body)?;
        let layer = digests(&manifest).pop().context("a layer")?;
        let blob = exchange(mirror, &format!("/v2/app/blobs/{layer}"), "")?;
        ensure!(blob.digest() == layer);
        blob_bytes = blob.body.len() as u64;
    }
    let sent = registry.line.bytes() - before;
    let from_nodes = |daemon: &Daemon| daemon.metric("sluice_mirror_bytes_total", &["peer"]);
    let given = from_nodes(&daemons[0].0)? + from_nodes(&daemons[1].0)?;
    println!(
        "a blob of {blob_bytes} bytes, pulled at two nodes: the registry sent {sent}, nodes gave {given}"
    );
    // Heads, manifests, and nothing of the blob twice.
    ensure!(
        sent < blob_bytes + (1 << 20),
        "{sent} of {blob_bytes}\n{}",
        daemons[1].0.log_tail()
    );
    ensure!(given > 0.0);
    Ok(())
}
