// SPDX-License-Identifier: Apache-2.0
//! What is large in each scene, and its images in the registry.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Options;
use super::images::{self, Making};
use super::large;
use super::run::{READY, STARTED};
use crate::bench::start::contender::Contender;
use crate::bench::start::lab::Lab;
use crate::harness::http;
use crate::harness::layout::blob;

/// A walk prints this and the number of entries.
const LISTED: &str = "scale: listed";
/// The reader of pieces prints this and their bytes.
const READ: &str = "scale: read";

/// A scene.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Scene {
    /// 50 containers of ten images, pulled and started at once.
    Many,
    /// An image of 127 layers.
    Layers,
    /// An image of 200,000 files.
    Files,
    /// An image of 20 GB.
    Large,
}

impl Scene {
    /// Its word on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Many => "many",
            Self::Layers => "layers",
            Self::Files => "files",
            Self::Large => "large",
        }
    }

    /// What the report calls it.
    #[must_use]
    pub fn title(self, options: &Options) -> String {
        match self {
            Self::Many => format!(
                "{} containers of ten images at once",
                options.scale_containers
            ),
            Self::Layers => format!("{} layers", images::LAYERS),
            Self::Files => "200,000 files".to_owned(),
            Self::Large => format!("{} files of 1 GiB", options.scale_gigabytes),
        }
    }

    /// What is done, for the report.
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::Many => {
                "All `nerdctl run` are called at once, and pull what is missing: ten images of eight layers, three of \
                 them shared by all. Each container reads 64 files and prints a line. Memory is looked at when the last \
                 has printed, with all containers running."
            }
            Self::Layers => {
                "Each layer adds a directory of twenty files, changes a file, and deletes one of two layers below. The \
                 container lists all there is."
            }
            Self::Files => {
                "In two layers above the first, 200 to 1,800 bytes each. The container lists all there is \
                 (`find / | wc -l`), then reads 1,000 files."
            }
            Self::Large => {
                "Files of 1 GiB in layers of four, compressed to about a tenth. The container reads 4 KiB in the midst \
                 of each. overlayfs is left out: the disk would have to hold the image, unpacked."
            }
        }
    }

    /// What the report calls its times.
    #[must_use]
    pub fn steps(self) -> &'static [&'static str] {
        match self {
            Self::Many => &["first s", "median s", "last s"],
            Self::Layers => &["pulled s", "first output s", "all listed s"],
            Self::Files => &["pulled s", "first output s", "all listed s", "1,000 read s"],
            Self::Large => &["pulled s", "first output s", "all read s"],
        }
    }

    /// What a container prints at each of them behind the pull.
    #[must_use]
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Many => &[READY],
            Self::Layers | Self::Large => &[STARTED, READY],
            Self::Files => &[STARTED, LISTED, READY],
        }
    }

    /// Why a contender has no place in it.
    #[must_use]
    pub fn leaves_out(self, contender: Contender) -> Option<&'static str> {
        (self == Self::Large && contender == Contender::Overlayfs)
            .then_some("left out: the disk would have to hold the image, unpacked")
    }

    /// Runs if nobody says how many.
    #[must_use]
    pub fn runs(self) -> usize {
        if self == Self::Large { 1 } else { 3 }
    }
}

/// A scene whose images are in the registry.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Which.
    pub scene: Scene,
    /// Names of the images.
    pub images: Vec<String>,
    /// Containers that are started.
    pub containers: usize,
    /// Layers of an image.
    pub layers: usize,
    /// Bytes of all layers in the registry, as gzip.
    pub bytes: u64,
    /// What a container must print: a word and the least number behind it.
    pub expected: Option<(&'static str, u64)>,
}

impl Stage {
    /// Makes the images and pushes them.
    pub fn set(lab: &Lab, scene: Scene, options: &Options) -> Result<Self> {
        let directory = lab.root.directory("layout")?;
        let mut stage = Self {
            scene,
            images: Vec::new(),
            containers: 1,
            layers: 0,
            bytes: 0,
            expected: None,
        };
        // What several images have counts once.
        let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
        let made = match scene {
            Scene::Many => {
                stage.containers = options.scale_containers;
                images::many(&directory)?
            }
            Scene::Layers => vec![images::many_layers(&directory)?],
            Scene::Files => vec![images::many_files(&directory)?],
            Scene::Large => {
                let files = options.scale_gigabytes;
                room(&directory, files)?;
                stage.expected = Some((READ, large::read_bytes(files)));
                vec![large::write(&directory, files)?]
            }
        };
        for (number, Making { layers, entries }) in made.into_iter().enumerate() {
            let name = format!("{}{number}", scene.name());
            blob::assemble(&directory, &layers, &[images::PROGRAM])?;
            (stage.layers, _) = lab.push(&name, &directory)?;
            let direct = lab.registry.direct();
            let manifest = http::manifest(&direct, &format!("{name}/original"), "latest")?;
            let layers = manifest["layers"].as_array().context("layers")?;
            sizes.extend(layers.iter().filter_map(|layer| {
                let digest = layer["digest"].as_str()?.to_owned();
                Some((digest, layer["size"].as_u64()?))
            }));
            stage.images.push(name);
            stage.expected = stage.expected.or(entries.map(|it| (LISTED, it)));
        }
        stage.bytes = sizes.values().sum();
        // The registry has it all.
        std::fs::remove_dir_all(directory)?;
        Ok(stage)
    }
}

/// **Errors**: the disk has no room for the large image. The converter of stargz-snapshotter wants it once unpacked and
/// once compressed; beside that all forms of it stand in the registry, a tenth each.
fn room(directory: &std::path::Path, gigabytes: u64) -> Result<()> {
    let free = nix::sys::statvfs::statvfs(directory)?;
    let free = free.blocks_available() * free.fragment_size() / large::FILE_BYTES;
    let wanted = gigabytes * 16 / 10;
    ensure!(
        free >= wanted,
        "{wanted} GiB of disk are wanted for {gigabytes} GB, and {free} are free: see --scale-gigabytes"
    );
    Ok(())
}
