// SPDX-License-Identifier: Apache-2.0
//! A node for each contender, with the whole image on it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::reader::Reader;
use super::rounds::read_all;
use crate::bench::NAMESPACE;
use crate::bench::start::cold::{self, Node, Setting};
use crate::bench::start::contender::Service;
use crate::bench::start::images::Image;
use crate::bench::start::lab::Lab;
use crate::harness::http;
use crate::harness::rootfs::Rootfs;

/// Who watched a device until it was sealed looks once a second whether it is.
const LOOKS: Duration = Duration::from_secs(3);

/// One contender's node.
#[derive(Debug)]
pub struct ReaderNode {
    /// Who it is.
    pub reader: Reader,
    /// Its version.
    pub version: String,
    /// The node.
    pub node: Node,
}

impl ReaderNode {
    /// What serves Sluice's mount.
    pub fn served_by(&self) -> Result<Option<String>> {
        let Service::Sluice { daemon, .. } = &self.node.service else {
            return Ok(None);
        };
        let status = daemon.status()?;
        let backend = status["mounts"][0]["backend"].as_str();
        Ok(Some(backend.context("a mount")?.to_owned()))
    }
}

/// All of them. Fields drop in order.
#[derive(Debug)]
pub struct Nodes {
    nodes: Vec<ReaderNode>,
    absent: BTreeMap<Reader, String>,
    image: Image,
    /// The registry and its line, which is open.
    pub lab: Lab,
}

impl Nodes {
    /// Has each contender pull and start the image, and ends what was started: nothing runs while others are measured.
    pub fn start(image: Image, readers: &[Reader]) -> Result<Self> {
        let lab = Lab::open("reads")?;
        lab.push(image.name(), &image.layout()?)?;
        let mut this = Self {
            nodes: Vec::new(),
            absent: BTreeMap::new(),
            image,
            lab,
        };
        let mut prepared = Vec::new();
        for (number, reader) in readers.iter().enumerate() {
            let contender = reader.contender();
            let mut started = || -> Result<ReaderNode> {
                let version = contender.version()?;
                if !prepared.contains(&contender) {
                    this.lab.prepare(contender, image)?;
                    prepared.push(contender);
                }
                let setting = Setting {
                    part: &format!("n{number}"),
                    record: false,
                    config: reader.config(),
                };
                let (sample, node) = cold::start_in(&this.lab, contender, image, setting)?;
                println!(
                    "   {:<14} ready after {:.2} s",
                    reader.name(),
                    sample.ready_s
                );
                node.containers.kill();
                Ok(ReaderNode {
                    reader: *reader,
                    version,
                    node,
                })
            };
            match started() {
                Ok(node) => this.nodes.push(node),
                Err(error) if reader.is_ours() || *reader == Reader::Overlayfs => {
                    return Err(error);
                }
                Err(error) => {
                    println!("   {} cannot be had: {error:#}", reader.name());
                    this.absent.insert(*reader, format!("{error:#}"));
                }
            }
        }
        Ok(this)
    }

    /// Those that were started, in order.
    #[must_use]
    pub fn all(&self) -> &[ReaderNode] {
        &self.nodes
    }

    /// Who they are.
    pub fn readers(&self) -> impl Iterator<Item = Reader> + '_ {
        self.nodes.iter().map(|it| it.reader)
    }

    /// Who could not be started, and why.
    #[must_use]
    pub fn absent(&self) -> &BTreeMap<Reader, String> {
        &self.absent
    }

    /// Mounts, on each node in order, what a further container would see.
    pub fn mount(&self) -> Result<Vec<Rootfs<'_>>> {
        let mounted = self.nodes.iter().map(|it| {
            let [form, tag] = it.reader.chain_of().place();
            let repository = format!("{}/{form}", self.image.name());
            let chain_id = http::chain_id(&self.lab.registry.direct(), &repository, tag)?;
            let target = self
                .lab
                .root
                .directory(&format!("fs-{}", it.reader.name()))?;
            let snapshotter = it.reader.contender().snapshotter();
            Rootfs::mount(
                &it.node.containerd,
                NAMESPACE,
                snapshotter,
                &chain_id,
                &target,
            )
            .with_context(|| format!("mount the files of {}", it.reader.name()))
        });
        mounted.collect()
    }

    /// Waits until each has the whole image: Sluice until it is sealed; the peers, which do not say it, until all their
    /// files were read and what they fetch in the background has come to an end.
    pub fn complete(&self, paths: &[(Reader, &Path)]) -> Result<()> {
        for it in &self.nodes {
            let sealed = it.node.service.wait_sealed();
            sealed.with_context(|| it.reader.name().to_owned())?;
        }
        std::thread::sleep(LOOKS);
        let mut peers = paths
            .iter()
            .filter(|(reader, _)| !reader.is_ours() && *reader != Reader::Overlayfs);
        let any = peers.clone().next().is_some();
        peers.try_for_each(|(_, path)| read_all(path).map(|_| ()))?;
        if any { self.lab.wait_quiet() } else { Ok(()) }
    }
}
