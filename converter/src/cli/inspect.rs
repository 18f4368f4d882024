// SPDX-License-Identifier: Apache-2.0
//! `sluice inspect`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use super::open::{RegistryArguments, location};
use super::show::{Table, bytes, short};
use crate::image::{Document, DocumentKind, ImageReader, Platform};
use crate::inspect::{IndexReport, LayerReport, inspect_file, inspect_layer};
use crate::plan::{is_image, select};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// An image (docker://…, a bare reference, oci:PATH[:TAG]), or a file: a converted blob, or a
    /// layer index. An existing file goes first.
    target: String,
    /// Only this platform of an index; repeatable. Default: all.
    #[arg(long, value_parser = Platform::parse)]
    platform: Vec<Platform>,
    /// List the files of each layer.
    #[arg(long)]
    tree: bool,
    /// One JSON object on standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    registry: RegistryArguments,
}

pub(super) async fn run(arguments: Inspect) -> anyhow::Result<()> {
    let path = Path::new(&arguments.target);
    if path.is_file() {
        return file(path, &arguments);
    }
    let location = location(&arguments.target).map_err(anyhow::Error::msg)?;
    let reader = arguments.registry.reader(&location)?;
    image(&*reader, &arguments).await
}

fn file(path: &Path, arguments: &Inspect) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let (report, tree) = inspect_file(&file, arguments.tree)
        .with_context(|| format!("inspect {}", path.display()))?;
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(
            out,
            "{}",
            json!({"file": path.display().to_string(), "index": report, "tree": tree})
        )?;
        return Ok(());
    }
    let mut table = Table::new(&["PROPERTY", "VALUE"]);
    for (name, value) in properties(&report) {
        table.row([name.to_owned(), value]);
    }
    table.write(&mut out)?;
    write!(out, "{}", tree.unwrap_or_default())?;
    Ok(())
}

fn properties(report: &IndexReport) -> [(&'static str, String); 9] {
    [
        ("diff ID", report.diff_id.clone()),
        ("layer device", bytes(report.device_bytes)),
        (
            "frames",
            format!("{}, {}", report.frames, bytes(report.frames_bytes)),
        ),
        ("ratio", ratio(report.device_bytes, report.frames_bytes)),
        ("index", index_size(report)),
        (
            "files",
            format!("{}, {}", report.files, bytes(report.content_bytes)),
        ),
        (
            "inodes",
            format!("{} ({} directories)", report.inodes, report.directories),
        ),
        ("strong digest", report.algorithm.clone()),
        ("written by", report.writer.clone()),
    ]
}

fn ratio(device_bytes: u64, blob_bytes: u64) -> String {
    // Hundredths in whole numbers: a table needs no more.
    let hundredths = device_bytes
        .saturating_mul(100)
        .checked_div(blob_bytes)
        .unwrap_or(0);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

fn index_size(report: &IndexReport) -> String {
    match report.index_bytes {
        0 => bytes(report.index_file_bytes),
        stored => format!(
            "{} ({} unpacked)",
            bytes(stored),
            bytes(report.index_file_bytes)
        ),
    }
}

/// A manifest and what was found out about its layers.
struct Inspected {
    platform: String,
    manifest: Document,
    layers: Vec<LayerReport>,
}

async fn image(reader: &dyn ImageReader, arguments: &Inspect) -> anyhow::Result<()> {
    let root = reader.root().await?;
    let mut manifests = Vec::new();
    match root.kind {
        DocumentKind::Manifest => manifests.push((String::new(), root.clone())),
        DocumentKind::Index => {
            let entries = root.list("manifests")?;
            for entry in select(reader.label(), &entries, &arguments.platform)? {
                let platform = entry.platform.as_ref().map(ToString::to_string);
                let document = reader.document(&entry).await?;
                manifests.push((platform.unwrap_or_default(), document));
            }
        }
    }
    let mut inspected = Vec::new();
    for (platform, manifest) in manifests {
        let mut layers = Vec::new();
        if is_image(&manifest) {
            for layer in manifest.list("layers")? {
                layers.push(inspect_layer(reader, &layer, arguments.tree).await);
            }
        }
        inspected.push(Inspected {
            platform,
            manifest,
            layers,
        });
    }
    let mut out = io::stdout().lock();
    match arguments.json {
        true => writeln!(out, "{}", to_json(reader.label(), &root, &inspected))?,
        false => write_image(&mut out, reader.label(), &root, &inspected)?,
    }
    let broken: Vec<&str> = inspected
        .iter()
        .flat_map(|image| &image.layers)
        .filter(|layer| layer.broken)
        .map(|layer| layer.blob.as_str())
        .collect();
    if !broken.is_empty() {
        bail!(
            "{}: layers with a damaged index: {}",
            reader.label(),
            broken.join(", ")
        );
    }
    Ok(())
}

fn to_json(label: &str, root: &Document, images: &[Inspected]) -> serde_json::Value {
    let images: Vec<_> = images
        .iter()
        .map(|image| {
            json!({
                "platform": image.platform,
                "digest": image.manifest.digest.to_string(),
                "lazy": is_lazy(image),
                "layers": image.layers,
            })
        })
        .collect();
    json!({
        "image": label,
        "digest": root.digest.to_string(),
        "media_type": root.media_type,
        "images": images,
    })
}

fn is_lazy(image: &Inspected) -> bool {
    !image.layers.is_empty() && image.layers.iter().all(|layer| layer.index.is_some())
}

fn write_image(
    out: &mut impl Write,
    label: &str,
    root: &Document,
    images: &[Inspected],
) -> io::Result<()> {
    writeln!(out, "{label}\n{} {}", root.digest, root.media_type)?;
    for image in images {
        let lazy = match (image.layers.is_empty(), is_lazy(image)) {
            (true, _) => "no file system layers",
            (false, true) => "lazy",
            (false, false) => "not lazy in all layers",
        };
        writeln!(
            out,
            "\n{} {}: {lazy}",
            image.platform, image.manifest.digest
        )?;
        let header = [
            "LAYER", "BLOB", "DEVICE", "RATIO", "FRAMES", "INDEX", "FILES", "LAZY",
        ];
        let mut table = Table::new(&header);
        for layer in &image.layers {
            let blob = short(&layer.blob).to_owned();
            let blob_bytes = bytes(layer.blob_bytes);
            match &layer.index {
                Some(index) => table.row([
                    blob,
                    blob_bytes,
                    bytes(index.device_bytes),
                    ratio(index.device_bytes, layer.blob_bytes),
                    index.frames.to_string(),
                    bytes(index.index_bytes),
                    index.files.to_string(),
                    "yes".to_owned(),
                ]),
                None => {
                    let reason = layer.reason.as_deref().unwrap_or_default();
                    let none = || "-".to_owned();
                    let reason = format!("no: {reason}");
                    table.row([
                        blob,
                        blob_bytes,
                        none(),
                        none(),
                        none(),
                        none(),
                        none(),
                        reason,
                    ]);
                }
            }
        }
        if !image.layers.is_empty() {
            table.write(out)?;
        }
        for layer in &image.layers {
            if let Some(tree) = &layer.tree {
                writeln!(out, "\nfiles of layer {}:", layer.blob)?;
                write!(out, "{tree}")?;
            }
        }
    }
    Ok(())
}
