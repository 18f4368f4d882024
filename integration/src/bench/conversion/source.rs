// SPDX-License-Identifier: Apache-2.0
//! The images that are converted: OCI layouts with gzip layers.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum as _;
use serde_json::Value;

use crate::bench::start::images::Image;
use crate::harness::{images, tools};

/// The image of tests and demo, in no other benchmark of images.
const PYTHON: &str = "python";
/// What is converted when nothing is said, as far as it is there.
const DEFAULT: [&str; 5] = [PYTHON, "nginx", "node", "postgres", "ml"];
/// Rounds of an image above [`LARGE`]: more would take long, and its times scatter less.
const ROUNDS_OF_LARGE: usize = 3;
/// Bytes of gzip from which on an image is large.
const LARGE: u64 = 300_000_000;

/// An image as it is before a conversion.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its word in tables.
    pub name: String,
    /// Where it is.
    pub layout: PathBuf,
    /// Its layers' blobs, the lowest first.
    pub layers: Vec<PathBuf>,
    /// Their bytes.
    pub bytes: u64,
}

impl Source {
    /// Those with these names, made when missing; by default those that are there, and `python`.
    pub fn all(names: &[String]) -> Result<Vec<Self>> {
        if !names.is_empty() {
            return names.iter().map(|name| Self::named(name)).collect();
        }
        let there = |name: &&&str| {
            let made = tools::target().join("images/bench").join(name);
            **name == PYTHON || made.join(".complete").exists()
        };
        DEFAULT
            .iter()
            .filter(there)
            .map(|it| Self::named(it))
            .collect()
    }

    fn named(name: &str) -> Result<Self> {
        let layout = match name {
            PYTHON => images::python_layout()?,
            _ => Image::from_str(name, true)
                .map_err(|_| anyhow::anyhow!("no image is called {name}"))?
                .layout()?,
        };
        let layers = layers(&layout)?;
        let sizes = layers.iter().map(|layer| Ok(layer.metadata()?.len()));
        let bytes = sizes.sum::<Result<u64>>()?;
        let name = name.to_owned();
        Ok(Self {
            name,
            layout,
            layers,
            bytes,
        })
    }

    /// How often each way is measured, of so many times.
    #[must_use]
    pub fn rounds(&self, wanted: usize) -> usize {
        if self.bytes > LARGE {
            wanted.min(ROUNDS_OF_LARGE)
        } else {
            wanted
        }
    }
}

/// The layers' blobs of the first manifest of a layout.
pub fn layers(layout: &Path) -> Result<Vec<PathBuf>> {
    let blob = |digest: &Value| -> Result<PathBuf> {
        let hex = digest
            .as_str()
            .and_then(|digest| digest.strip_prefix("sha256:"))
            .context("a digest")?;
        Ok(layout.join("blobs/sha256").join(hex))
    };
    let read =
        |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let index = read(layout.join("index.json"))?;
    let manifest = read(blob(&index["manifests"][0]["digest"])?)?;
    let layers = manifest["layers"].as_array().context("layers")?;
    ensure!(!layers.is_empty(), "no layers in {}", layout.display());
    layers.iter().map(|layer| blob(&layer["digest"])).collect()
}
