// SPDX-License-Identifier: Apache-2.0
//! `sluice convert` against the pipeline of common tools that does the same work.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::DEADLINE;
use super::report::{Comparison, Times};
use crate::harness::command;
use crate::harness::site::Site;

const ROUNDS: usize = 5;

/// Compares them on the layers of an image.
pub fn measure(site: &Site, layout: &Path) -> Result<Value> {
    let layers = layers(layout)?;
    let sizes = layers.iter().map(|layer| Ok(layer.metadata()?.len()));
    let bytes: u64 = sizes.sum::<Result<u64>>()?;
    let (mut pipeline, mut ours) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut seconds = 0.0;
        for layer in &layers {
            let script = format!(
                "set -o pipefail; gzip -dc {} | tee >(sha256sum >/dev/null) | zstd -3 -T0 -c | sha256sum",
                layer.display()
            );
            seconds += command::run_ok(Command::new("bash").args(["-c", &script]), DEADLINE)?
                .elapsed
                .as_secs_f64();
        }
        pipeline.push(seconds);
        let destination = site.root.path().join(format!("converted-{round}"));
        let output = site.daemon.sluice_ok(&[
            "convert",
            &format!("oci:{}:latest", layout.display()),
            &format!("oci:{}:latest", destination.display()),
        ])?;
        ours.push(output.elapsed.as_secs_f64());
        std::fs::remove_dir_all(&destination)?;
    }
    println!(
        "conversion of {:.0} MB gzip, {} layers, {ROUNDS} rounds in turn",
        bytes as f64 / 1e6,
        layers.len()
    );
    let comparison = Comparison::print(
        "gzip -dc | tee >(sha256sum) | zstd -3 -T0 | sha256sum",
        Times::of(pipeline)?,
        "sluice convert (index and digests included)",
        Times::of(ours)?,
    );
    Ok(json!({"gzip_bytes": bytes, "layers": layers.len(), "convert": comparison}))
}

/// The layers' blobs of the first manifest.
fn layers(layout: &Path) -> Result<Vec<PathBuf>> {
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
    layers.iter().map(|layer| blob(&layer["digest"])).collect()
}
