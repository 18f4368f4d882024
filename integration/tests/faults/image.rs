// SPDX-License-Identifier: Apache-2.0
//! An image with one file per layer, mounted lazily, and who reads it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use sluice_integration::harness::command;
use sluice_integration::harness::http;
use sluice_integration::harness::layout::{self, Attributes, Layer};
use sluice_integration::harness::rootfs::Rootfs;
use sluice_integration::harness::site::Site;

pub const NAMESPACE: &str = "faults";
pub const REPOSITORY: &str = "faults/app";
/// Nothing fetches but readers.
pub const READERS_ONLY: &str = "\n[prefetch]\nenabled = false\n\n[boot]\nenabled = false\n";
/// No read of these tests may take longer, whatever happens.
const WATCHDOG: Duration = Duration::from_secs(120);

/// An image whose layer `n` has the file `file-n`, which does not compress.
#[derive(Debug)]
pub struct Image {
    directory: tempfile::TempDir,
    digests: Vec<String>,
}

impl Image {
    pub fn new(layers: usize, file_bytes: usize, seed: u64) -> Result<Self> {
        println!("image of {layers} layers of {file_bytes} bytes, seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let (mut all, mut digests) = (Vec::new(), Vec::new());
        for number in 0..layers {
            let mut bytes = vec![0; file_bytes];
            random.fill_bytes(&mut bytes);
            let mut layer = Layer::new();
            layer.file(&format!("file-{number}"), Attributes::root(0o644), &bytes)?;
            all.push(layer);
            digests.push(hex::encode(Sha256::digest(&bytes)));
        }
        let directory = tempfile::tempdir()?;
        layout::write(&directory.path().join("original"), &mut all, &["/none"])?;
        Ok(Self { directory, digests })
    }

    /// The layout of the image as it is written.
    pub fn original(&self) -> PathBuf {
        self.directory.path().join("original")
    }

    /// The layout of the converted image.
    pub fn convert(&self, site: &Site) -> Result<PathBuf> {
        let converted = self.directory.path().join("converted");
        let [from, to] =
            [self.original(), converted.clone()].map(|it| format!("oci:{}:latest", it.display()));
        site.daemon.sluice_ok(&["convert", &from, &to])?;
        Ok(converted)
    }

    /// Pulls `host`'s `REPOSITORY:sluice` lazily and mounts it as a container would see it.
    pub fn mount<'a>(&self, site: &'a Site, host: &str) -> Result<Mounted<'a>> {
        site.pull_lazily(NAMESPACE, &format!("{host}/{REPOSITORY}:sluice"))?;
        self.look(site, host, REPOSITORY)
    }

    /// Pushes and converts it at the site's registry, and mounts it.
    pub fn publish<'a>(&self, site: &'a Site, repository: &str) -> Result<Mounted<'a>> {
        let [_, reference] = site.push_and_convert(&self.original(), repository)?;
        site.pull_lazily(NAMESPACE, &reference)?;
        self.look(site, &site.registry.direct(), repository)
    }

    /// Mounts `repository:sluice`, which was pulled; `host` says what it is.
    pub fn look<'a>(&self, site: &'a Site, host: &str, repository: &str) -> Result<Mounted<'a>> {
        let chain_id = http::chain_id(host, repository, "sluice")?;
        let target = site
            .root
            .directory(&format!("seen/{}", repository.replace('/', "-")))?;
        let rootfs = Rootfs::mount(&site.containerd, NAMESPACE, "sluice", &chain_id, &target)?;
        let manifest = http::manifest(host, repository, "sluice")?;
        let layers = manifest["layers"].as_array().context("layers")?;
        let blob = |layer: &serde_json::Value| Some(layer["digest"].as_str()?.to_owned());
        Ok(Mounted {
            blobs: layers.iter().filter_map(blob).collect(),
            digests: self.digests.clone(),
            rootfs,
        })
    }
}

/// A mounted image.
#[derive(Debug)]
pub struct Mounted<'a> {
    rootfs: Rootfs<'a>,
    /// The layers' blobs.
    pub blobs: Vec<String>,
    digests: Vec<String>,
}

/// What a reader got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Got {
    /// The bytes of the image.
    Bytes,
    /// The system's words for an error.
    Error(String),
}

impl Got {
    pub fn eio() -> Self {
        Self::Error("Input/output error".into())
    }
}

impl Mounted<'_> {
    /// All files, with what they digest to.
    pub fn files(&self) -> Vec<(PathBuf, String)> {
        let digests = self.digests.iter().cloned();
        (0..).map(|number| self.file(number)).zip(digests).collect()
    }

    pub fn file(&self, number: usize) -> PathBuf {
        self.rootfs.path().join(format!("file-{number}"))
    }

    /// Reads a file in a process of its own, past what the kernel has of it. Wrong bytes are an error of the test.
    pub fn read(&self, number: usize) -> Result<(Got, Duration)> {
        read(&self.file(number), &self.digests[number])
    }
}

/// See [`Mounted::read`].
pub fn read(file: &Path, digest: &str) -> Result<(Got, Duration)> {
    let start = Instant::now();
    let output = command::run(
        Command::new("sha256sum").arg(file).env("LC_ALL", "C"),
        WATCHDOG,
    )?;
    let took = start.elapsed();
    if output.ok() {
        ensure!(
            output.stdout.starts_with(digest),
            "WRONG BYTES of {}: {output:?}",
            file.display()
        );
        return Ok((Got::Bytes, took));
    }
    let words = output.stderr.trim().rsplit(": ").next();
    Ok((Got::Error(words.context("an error")?.to_owned()), took))
}

/// What is new in the daemon's log, and of a metric.
#[derive(Debug)]
pub struct Since<'a> {
    site: &'a Site,
    log_bytes: usize,
}

impl<'a> Since<'a> {
    pub fn now(site: &'a Site) -> Self {
        Self {
            site,
            log_bytes: site.daemon.log().len(),
        }
    }

    pub fn log(&self) -> String {
        self.site.daemon.log().split_off(self.log_bytes)
    }

    /// Fails unless a new line of the log has all of `words`. A reader may have its answer before the daemon has told of
    /// it, so the line is waited for.
    pub fn said(&self, words: &[&str]) -> Result<()> {
        let has = |line: &str| words.iter().all(|word| line.contains(word));
        let said = soon(|| Ok(self.log().lines().any(has)))?;
        ensure!(said, "no line of the log has {words:?}:\n{}", self.log());
        Ok(())
    }
}

/// Whether `done` holds within a time that is long for what needs no more than a moment.
pub fn soon(done: impl Fn() -> Result<bool>) -> Result<bool> {
    let begun = Instant::now();
    while !done()? {
        if begun.elapsed() > Duration::from_secs(5) {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}
