// SPDX-License-Identifier: Apache-2.0
//! Where images are converted: a root, a registry and a containerd, which have the images before anything is timed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::source::{self, Source};
use super::way::{self, Cost, Way};
use crate::bench::{NAMESPACE, meter};
use crate::harness::containerd::{Containerd, Release};
use crate::harness::nerdctl::Nerdctl;
use crate::harness::proxy::Line;
use crate::harness::registry::Registry;
use crate::harness::root::Root;
use crate::harness::{command, images, tools};

/// The longest that one conversion may take.
const CONVERTS: Duration = Duration::from_secs(1800);
/// What is converted within containerd, for as long as its size is looked at.
const CONVERTED: &str = "localhost/converted:latest";

/// All of it. Fields drop in order.
#[derive(Debug)]
pub struct Works {
    containerd: Containerd,
    registry: Registry,
    root: Root,
}

impl Works {
    /// With nothing in it.
    pub fn open() -> Result<Self> {
        let root = Root::new("conversion")?;
        let registry = Registry::start(&root, Line::OPEN)?;
        let containerd = Containerd::start_with(&root, Release::V2, &[])?;
        Ok(Self {
            containerd,
            registry,
            root,
        })
    }

    /// Brings an image into the registry and containerd's content store.
    pub fn bring(&self, source: &Source) -> Result<()> {
        let reference = self.reference(source);
        images::push_layout(&source.layout, &reference)?;
        let nerdctl = Nerdctl::new(&self.root, &self.containerd, NAMESPACE, "overlayfs");
        nerdctl.ok(&["pull", "--quiet", "--unpack=false", &reference])?;
        // Every way finds the layers in memory.
        for layer in &source.layers {
            std::io::copy(&mut std::fs::File::open(layer)?, &mut std::io::sink())?;
        }
        Ok(())
    }

    fn reference(&self, source: &Source) -> String {
        format!("{}/{}:original", self.registry.direct(), source.name)
    }

    /// Goes one way once. `round` makes names of what is made.
    pub fn run(&self, way: Way, source: &Source, round: usize) -> Result<Cost> {
        let work = self.root.directory(&format!("w/{round}"))?;
        let cost = match way {
            Way::Pipeline => {
                let mut cost = self.shell(source, &way::pipeline)?;
                if round == 0 {
                    cost.output_bytes = Some(self.pipeline_bytes(source)?);
                }
                Ok(cost)
            }
            Way::Gunzip => self.shell(source, &|layer| {
                format!("gzip -dc {} >/dev/null", layer.display())
            }),
            Way::Nydus => self.nydus(source, &work),
            Way::Sluice => self.sluice_convert(source, &work),
            Way::Estargz => self.estargz(source, &work),
            Way::IndexOne => self.sluice_index(source, &["--jobs", "1"]),
            Way::Index => self.sluice_index(source, &[]),
        };
        std::fs::remove_dir_all(work)?;
        cost
    }

    fn metered(&self, command: &Command) -> Result<meter::Metered> {
        meter::run(command, self.root.path(), CONVERTS)
    }

    /// A script of each layer, one after the other.
    fn shell(&self, source: &Source, script: &dyn Fn(&Path) -> String) -> Result<Cost> {
        let scripts: Vec<String> = source.layers.iter().map(|it| script(it)).collect();
        let script = format!("set -euo pipefail\n{}", scripts.join("\n"));
        let mut bash = Command::new("bash");
        bash.args(["-c", &script]);
        Ok(cost(&self.metered(&bash)?, None))
    }

    fn pipeline_bytes(&self, source: &Source) -> Result<u64> {
        let mut bytes = 0;
        for layer in &source.layers {
            let script = way::pipeline_bytes(layer);
            let output = command::run_ok(Command::new("bash").args(["-c", &script]), CONVERTS)?;
            bytes += output.stdout.trim().parse::<u64>()?;
        }
        Ok(bytes)
    }

    fn nydus(&self, source: &Source, work: &Path) -> Result<Cost> {
        let blob = |layer: &Path| work.join(layer.file_name().unwrap_or_default());
        let mut cost = self.shell(source, &|layer| way::nydus(layer, &blob(layer)))?;
        let blobs: Vec<PathBuf> = source.layers.iter().map(|layer| blob(layer)).collect();
        cost.output_bytes = Some(added(&blobs)?);
        Ok(cost)
    }

    fn sluice_convert(&self, source: &Source, work: &Path) -> Result<Cost> {
        let metered = self.metered(&converting(source, work)?)?;
        let bytes = added(&source::layers(&work.join("layout"))?)?;
        Ok(cost(&metered, Some(bytes)))
    }

    fn sluice_index(&self, source: &Source, options: &[&str]) -> Result<Cost> {
        let mut sluice = Command::new(tools::binary("sluice")?);
        sluice.args(["index", "--force", "--json"]).args(options);
        sluice.arg(format!("docker://{}", self.reference(source)));
        let metered = self.metered(&sluice)?;
        let last = metered.output.stdout.lines().last().context("a summary")?;
        let summary: Value = serde_json::from_str(last)?;
        let bytes = |name: &str| {
            summary[name]
                .as_u64()
                .with_context(|| format!("{name} in {last}"))
        };
        let beside = bytes("index_bytes")? + bytes("windows_bytes")?;
        Ok(cost(&metered, Some(beside)))
    }

    fn estargz(&self, source: &Source, work: &Path) -> Result<Cost> {
        let mut convert = Command::new(tools::go_tool("stargz-peer")?);
        // It writes each layer there before the content store gets it.
        convert.env("TMPDIR", work);
        convert.arg("convert").arg(self.containerd.socket());
        convert.args([NAMESPACE, &self.reference(source), CONVERTED]);
        let metered = self.metered(&convert)?;
        let bytes = self.converted_bytes()?;
        let remove = ["images", "rm", "--sync", CONVERTED];
        self.containerd.ctr_ok(NAMESPACE, &remove)?;
        Ok(cost(&metered, Some(bytes)))
    }

    /// The bytes of the layers of the image that was converted within containerd.
    fn converted_bytes(&self) -> Result<u64> {
        let ctr = |arguments: &[&str]| self.containerd.ctr_ok(NAMESPACE, arguments);
        let list = ctr(&["images", "ls", &format!("name=={CONVERTED}")])?;
        let mut lines = list.stdout.lines();
        let line = lines.find(|line| line.starts_with(CONVERTED));
        // REF TYPE DIGEST SIZE …
        let digest = line.and_then(|line| line.split_whitespace().nth(2));
        let digest = digest.with_context(|| format!("a digest in {}", list.stdout))?;
        let manifest = ctr(&["content", "get", digest])?.stdout;
        let manifest: Value = serde_json::from_str(&manifest)?;
        let layers = manifest["layers"].as_array().context("layers")?;
        Ok(layers.iter().filter_map(|it| it["size"].as_u64()).sum())
    }
}

/// `sluice convert` of an image into the layout `layout` in `work`, with a state of its own.
pub fn converting(source: &Source, work: &Path) -> Result<Command> {
    let mut sluice = Command::new(tools::binary("sluice")?);
    sluice.env("SLUICE_STATE", work.join("state"));
    sluice.args(["convert", "--quiet"]);
    for layout in [&source.layout, &work.join("layout")] {
        sluice.arg(format!("oci:{}:latest", layout.display()));
    }
    Ok(sluice)
}

fn cost(metered: &meter::Metered, output_bytes: Option<u64>) -> Cost {
    Cost {
        seconds: metered.seconds,
        peak_rss_bytes: metered.peak_rss_bytes,
        output_bytes,
    }
}

fn added(files: &[PathBuf]) -> Result<u64> {
    let bytes = files.iter().map(|file| {
        let meta = file.metadata();
        Ok(meta
            .with_context(|| format!("look at {}", file.display()))?
            .len())
    });
    bytes.sum()
}
