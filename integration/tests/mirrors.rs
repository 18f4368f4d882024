// SPDX-License-Identifier: Apache-2.0
//! `sluiced` reads what it fetches at the mirrors of `hosts.toml`: a real pull-through cache in front of a
//! real registry. The cache has a line of its own to the registry, so that both ways are counted.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};
use sluice_integration::harness::containerd::Release;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::process::Process;
use sluice_integration::harness::proxy::{LOOPBACK, Line, Proxy};
use sluice_integration::harness::registry::{Registry, free_address};
use sluice_integration::harness::root::Root;
use sluice_integration::harness::site::Site;
use sluice_integration::harness::{command, http, tools};

/// Bytes of each large file, which do not compress.
const FILE_BYTES: usize = 8_000_000;
/// What a pull and a start take of the registry besides chunks: manifests, the config, no more.
const SMALL_BYTES: u64 = 100_000;
const REPOSITORY: &str = "mirrors/app";

/// Fields drop in order: the cache before the site, its line to the registry last.
struct Cached {
    cache: Registry,
    _cache_root: Root,
    upstream: Proxy,
    site: Site,
    reference: String,
    _files: tempfile::TempDir,
}

impl Cached {
    fn start(name: &str, extra: &str) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let config = format!(
            "\n[registry]\nhosts_dirs = [\"{}\"]\n{extra}",
            files.path().display()
        );
        let site = Site::start(name, Release::V2, Line::OPEN, &config)?;
        let upstream = Proxy::listen(LOOPBACK, site.registry.direct().parse()?, Line::OPEN)?;
        let root = site.root.part("cache")?;
        let cache = Registry::start_cache(&root, Line::OPEN, &upstream.address().to_string())?;
        let reference = push(&site)?;
        write_hosts(files.path(), &site.registry.host(), &cache.host())?;
        Ok(Self {
            cache,
            _cache_root: root,
            upstream,
            site,
            reference,
            _files: files,
        })
    }

    /// Fetches all layers through the cache, and waits until it gives ranges of them.
    fn warm(&self) -> Result<()> {
        let cache = self.cache.direct();
        for digest in self.layers()? {
            let whole = http::blob(&cache, REPOSITORY, &digest, None)?;
            ensure!(whole.0 == 200, "the cache answers {}", whole.0);
            let start = Instant::now();
            let part = || http::blob(&cache, REPOSITORY, &digest, Some("bytes=0-9"));
            while part()?.0 != 206 {
                ensure!(
                    start.elapsed() < Duration::from_secs(20),
                    "the cache gives no ranges"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    fn layers(&self) -> Result<Vec<String>> {
        let manifest = http::manifest(&self.site.registry.direct(), REPOSITORY, "sluice")?;
        let layers = manifest["layers"].as_array().context("layers")?;
        let digest = |layer: &serde_json::Value| Some(layer["digest"].as_str()?.to_owned());
        layers
            .iter()
            .map(|layer| digest(layer).context("digest"))
            .collect()
    }

    /// Compressed bytes that arrived from there.
    fn fetched(&self, source: &str) -> Result<f64> {
        let label = format!("source=\"{source}\"");
        self.site
            .daemon
            .metric("sluice_fetched_bytes_total", &[&label])
    }

    fn tell(&self, when: &str) -> Result<()> {
        println!(
            "{when}: {} bytes by the mirror, {} from the registry; lines of the registry: {} to the node, {} to the cache",
            self.fetched("mirror")?,
            self.fetched("origin")?,
            self.site.registry.line.bytes(),
            self.upstream.bytes(),
        );
        Ok(())
    }

    fn sum_command(&self, file: &str) -> Result<Command> {
        let mut command = self.site.nerdctl("mirrors").command()?;
        command.args(["run", "--rm", "--net", "none", &self.reference]);
        command.args(["/bin/sha256sum", file]);
        Ok(command)
    }

    /// Reads a file in a container and checks it.
    fn read(&self, file: &str) -> Result<()> {
        let output = command::run(&mut self.sum_command(file)?, Duration::from_secs(120))?;
        self.check(file, &output)
    }

    fn check(&self, file: &str, output: &command::Output) -> Result<()> {
        let expected = hex::encode(Sha256::digest(noise(file)));
        ensure!(
            output.ok() && output.stdout.starts_with(&expected),
            "{file}: {output:?}, expected {expected}\n{}",
            self.site.daemon.log_tail()
        );
        Ok(())
    }
}

/// Pushes and converts an image with four large files in one layer.
fn push(site: &Site) -> Result<String> {
    let mut base = Layer::new();
    base.file("bin/busybox", Attributes::root(0o755), &layout::busybox()?)?
        .symlink("bin/sh", "busybox")?
        .symlink("bin/sha256sum", "busybox")?;
    let mut top = Layer::new();
    for file in ["a", "b", "c", "d"] {
        top.file(file, Attributes::root(0o644), &noise(&format!("/{file}")))?;
    }
    let directory = tempfile::tempdir()?;
    let layout = layout::write(directory.path(), &mut [base, top], &["/bin/sh"])?;
    let [_, reference] = site.push_and_convert(&layout, REPOSITORY)?;
    Ok(reference)
}

fn write_hosts(files: &Path, registry: &str, mirror: &str) -> Result<()> {
    // Debian's tools and containerd's documentation write the port in two ways.
    let directory = files.join(format!("{}_", registry.replace(':', "_")));
    std::fs::create_dir_all(&directory)?;
    let text = format!(
        "server = \"http://{registry}\"\n\n[host.\"http://{mirror}\"]\n  capabilities = [\"pull\"]\n"
    );
    std::fs::write(directory.join("hosts.toml"), text)?;
    Ok(())
}

/// Bytes that do not compress, the same each time.
fn noise(seed: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FILE_BYTES + 32);
    let mut block = Sha256::digest(seed);
    while bytes.len() < FILE_BYTES {
        bytes.extend_from_slice(&block);
        block = Sha256::digest(block);
    }
    bytes.truncate(FILE_BYTES);
    bytes
}

#[test]
fn chunks_come_through_a_pull_through_cache_and_from_the_registry_when_it_dies() -> Result<()> {
    let mut cached = Cached::start("mirrors", "\n[prefetch]\nenabled = false\n")?;
    cached.warm()?;
    let (node, upstream) = (cached.site.registry.line.bytes(), cached.upstream.bytes());
    let nerdctl = cached.site.nerdctl("mirrors");
    nerdctl.ok(&["pull", "--quiet", &cached.reference])?;
    cached.read("/a")?;
    cached.tell("one file of four")?;
    let by_mirror = cached.fetched("mirror")?;
    // With the programs that read it, and what is read ahead: up to 8 MiB behind the end of the file.
    let most = FILE_BYTES as f64 + f64::from(12 << 20);
    ensure!(
        by_mirror >= FILE_BYTES as f64 && by_mirror < most,
        "{by_mirror} bytes came by the mirror"
    );
    ensure!(
        cached.fetched("origin")? == 0.0,
        "chunks came from the registry"
    );
    let direct = cached.site.registry.line.bytes() - node;
    ensure!(direct < SMALL_BYTES, "{direct} bytes came past the cache");
    let further = cached.upstream.bytes() - upstream;
    ensure!(
        further < SMALL_BYTES,
        "the warm cache fetched {further} bytes"
    );

    // It dies while a reader takes from it: 2 MB/s give four seconds for the file.
    cached.cache.line.set_line(Line {
        bytes_per_second: 2_000_000,
        latency: Duration::ZERO,
    });
    // Not the next file, which was read ahead.
    let mut reading = cached.sum_command("/c")?;
    let reader = std::thread::spawn(move || command::run(&mut reading, Duration::from_secs(120)));
    let start = Instant::now();
    while cached.fetched("mirror")? < by_mirror + 500_000.0 {
        ensure!(
            start.elapsed() < Duration::from_secs(30),
            "the reader does not begin"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    cached.cache.kill()?;
    let killed = Instant::now();
    let output = reader.join().unwrap()?;
    cached.check("/c", &output)?;
    println!("the reader went on for {:?}", killed.elapsed());
    cached.tell("the cache died")?;
    ensure!(
        killed.elapsed() < Duration::from_secs(15),
        "{:?}",
        killed.elapsed()
    );
    ensure!(
        cached.fetched("origin")? > 0.0,
        "nothing came from the registry"
    );
    let log = cached.site.daemon.log();
    ensure!(
        log.contains("leave a mirror alone"),
        "the log does not say so:\n{}",
        cached.site.daemon.log_tail()
    );
    let pauses = ["source=\"mirror\""];
    let pauses = cached
        .site
        .daemon
        .metric("sluice_fetch_pauses_total", &pauses)?;
    ensure!(pauses >= 1.0, "{pauses} pauses");
    // Nobody notices any more.
    let start = Instant::now();
    cached.read("/d")?;
    println!("without the cache: {:?}", start.elapsed());
    Ok(())
}

#[test]
fn a_cache_that_gives_no_ranges_yet_does_not_hold_readers() -> Result<()> {
    let cached = Cached::start("mircold", "\n[prefetch]\ndelay = \"1s\"\n")?;
    let nerdctl = cached.site.nerdctl("mirrors");
    nerdctl.ok(&["pull", "--quiet", &cached.reference])?;
    cached.read("/c")?;
    cached.tell("a reader, the cache being cold")?;
    cached.site.wait_sealed(Duration::from_secs(120))?;
    cached.tell("complete")?;
    for file in ["/a", "/b", "/c", "/d"] {
        cached.read(file)?;
    }
    Ok(())
}

/// Some peer, which Spegel wants to be told of; nobody is there.
const NOBODY: &str = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN";

/// Spegel takes from containerd's content store, its own node's here: what one snapshotter pulled whole,
/// `sluiced` reads in ranges.
#[test]
#[ignore = "long: Spegel is built for it"]
fn long_chunks_come_through_spegel() -> Result<()> {
    let files = tempfile::tempdir()?;
    let config = format!(
        "\n[registry]\nhosts_dirs = [\"{}\"]\n\n[prefetch]\nenabled = false\n",
        files.path().display()
    );
    let site = Site::start("spegel", Release::V2, Line::OPEN, &config)?;
    let reference = push(&site)?;
    site.nerdctl_with("whole", "overlayfs")
        .ok(&["pull", "--quiet", &reference])?;
    let (spegel, router, metrics) = (free_address()?, free_address()?, free_address()?);
    let content = site
        .containerd
        .root()
        .join("io.containerd.content.v1.content");
    let mut process = Process::start(
        "spegel",
        Command::new(tools::go_tool("spegel")?)
            .arg("registry")
            .args(["--registry-addr", &spegel.to_string()])
            .args(["--router-addr", &router.to_string()])
            .args(["--metrics-addr", &metrics.to_string()])
            .arg("--containerd-sock")
            .arg(site.containerd.socket())
            .args(["--containerd-namespace", "whole"])
            .arg("--containerd-content-path")
            .arg(&content)
            .args(["--bootstrap-kind", "static", "--static-bootstrap-peers"])
            .arg(format!("/ip4/127.0.0.1/tcp/9/p2p/{NOBODY}")),
        &site.root.join("spegel.log")?,
    )?;
    process.wait_ready(Duration::from_secs(30), || {
        TcpStream::connect(spegel).is_ok()
    })?;
    write_hosts(files.path(), &site.registry.host(), &spegel.to_string())?;
    let node = site.registry.line.bytes();
    site.nerdctl("mirrors")
        .ok(&["pull", "--quiet", &reference])?;
    let read = |file: &str| -> Result<()> {
        let mut command = site.nerdctl("mirrors").command()?;
        command.args([
            "run",
            "--rm",
            "--net",
            "none",
            &reference,
            "/bin/sha256sum",
            file,
        ]);
        let output = command::run(&mut command, Duration::from_secs(120))?;
        let expected = hex::encode(Sha256::digest(noise(file)));
        ensure!(output.stdout.starts_with(&expected), "{file}: {output:?}");
        Ok(())
    };
    read("/a")?;
    let fetched = |source: &str| {
        let label = format!("source=\"{source}\"");
        site.daemon.metric("sluice_fetched_bytes_total", &[&label])
    };
    let direct = site.registry.line.bytes() - node;
    println!(
        "{} bytes through Spegel, {} from the registry, whose line carried {direct}",
        fetched("mirror")?,
        fetched("origin")?
    );
    ensure!(
        fetched("mirror")? >= FILE_BYTES as f64
            && fetched("origin")? == 0.0
            && direct < SMALL_BYTES,
        "{}\n{}",
        site.daemon.log_tail(),
        process.log_tail()
    );
    process.kill()?;
    // Far enough that it was not read ahead.
    read("/d")?;
    ensure!(fetched("origin")? >= FILE_BYTES as f64, "from where else?");
    Ok(())
}
