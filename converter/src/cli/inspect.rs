// SPDX-License-Identifier: Apache-2.0
//! `sluice inspect`.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use super::open::{ContainerdArguments, RegistryArguments, location};
use super::show::{Table, bytes, printable, short};
use crate::image::{Document, DocumentKind, ImageReader, Location, Platform, read_small};
use crate::inspect::{
    FileReport, IndexReport, LayerReport, NotLazyReport, inspect_file, inspect_layer,
};
use crate::plan::{is_image, platform_of, require_platform, select};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// An image (docker://…, a bare reference, oci:PATH[:TAG], oci-archive:PATH[:TAG], containerd:NAME),
    /// or a file: a converted blob, or a layer index. An existing file goes first.
    #[arg(value_parser = target)]
    target: Target,
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
    containerd: ContainerdArguments,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// What is looked into.
#[derive(Debug, Clone)]
enum Target {
    File(PathBuf),
    Image(Location),
}

/// For clap: an existing file, or a location with its own messages.
fn target(text: &str) -> Result<Target, String> {
    match Path::new(text).is_file() {
        true => Ok(Target::File(text.into())),
        false => location(text).map(Target::Image),
    }
}

pub(super) async fn run(arguments: Inspect) -> anyhow::Result<()> {
    match &arguments.target {
        Target::File(path) => file(path, &arguments),
        Target::Image(location) => {
            let reader = arguments.registry.reader(location, &arguments.containerd)?;
            image(&*reader, &arguments).await
        }
    }
}

fn file(path: &Path, arguments: &Inspect) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let report = inspect_file(&file, arguments.tree)
        .with_context(|| format!("inspect {}", path.display()))?;
    let mut out = io::stdout().lock();
    if arguments.json {
        let file = path.display().to_string();
        let line = match report {
            FileReport::Index(report, tree) => json!({"file": file, "index": report, "tree": tree}),
            FileReport::NotLazy(report) => json!({"file": file, "not_lazy": report}),
        };
        writeln!(out, "{line}")?;
        return Ok(());
    }
    let mut table = Table::new(&["PROPERTY", "VALUE"]);
    let (rows, tree) = match report {
        FileReport::Index(report, tree) => (properties(&report).to_vec(), tree),
        FileReport::NotLazy(report) => (properties_not_lazy(&report).to_vec(), None),
    };
    for (name, value) in rows {
        table.row([name.to_owned(), value]);
    }
    table.write(&mut out)?;
    write!(out, "{}", tree.unwrap_or_default())?;
    Ok(())
}

fn properties_not_lazy(report: &NotLazyReport) -> [(&'static str, String); 5] {
    [
        ("diff ID", report.diff_id.clone()),
        ("layer device", bytes(report.device_bytes)),
        ("frames", frames(report.frames, report.frames_bytes)),
        ("ratio", ratio(report.device_bytes, report.frames_bytes)),
        ("not lazy", report.reason.clone()),
    ]
}

fn frames(count: u64, total_bytes: u64) -> String {
    format!("{count}, {}", bytes(total_bytes))
}

fn properties(report: &IndexReport) -> [(&'static str, String); 9] {
    [
        ("diff ID", report.diff_id.clone()),
        ("layer device", bytes(report.device_bytes)),
        ("frames", frames(report.frames, report.frames_bytes)),
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
        DocumentKind::Manifest => {
            check_platform(reader, &root, &arguments.platform).await?;
            manifests.push((String::new(), root.clone()));
        }
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
    let layers_that = |is: fn(&LayerReport) -> bool| {
        let layers = inspected.iter().flat_map(|image| &image.layers);
        let blobs: Vec<&str> = layers
            .filter(|layer| is(layer))
            .map(|layer| layer.blob.as_str())
            .collect();
        blobs.join(", ")
    };
    let faults: Vec<String> = [
        ("with a damaged index", layers_that(|layer| layer.broken)),
        (
            "whose index could not be read",
            layers_that(|layer| layer.unread),
        ),
    ]
    .into_iter()
    .filter(|(_, blobs)| !blobs.is_empty())
    .map(|(fault, blobs)| format!("layers {fault}: {blobs}"))
    .collect();
    if !faults.is_empty() {
        bail!("{}: {}", reader.label(), faults.join("; "));
    }
    Ok(())
}

/// Refuses a single image that is for none of the platforms asked for.
async fn check_platform(
    reader: &dyn ImageReader,
    manifest: &Document,
    asked: &[Platform],
) -> anyhow::Result<()> {
    let config = manifest.single("config")?;
    let Some(config) = config.filter(|_| !asked.is_empty() && is_image(manifest)) else {
        return Ok(());
    };
    let bytes = read_small(reader, &config).await?;
    let found = platform_of(&bytes).with_context(|| format!("read config {}", config.digest))?;
    require_platform(reader.label(), manifest, &found, asked)?;
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
    let media_type = printable(&root.media_type);
    writeln!(out, "{}\n{} {media_type}", printable(label), root.digest)?;
    for image in images {
        let lazy = match (image.layers.is_empty(), is_lazy(image)) {
            (true, _) => "no file system layers",
            (false, true) => "lazy",
            (false, false) => "not lazy in all layers",
        };
        writeln!(
            out,
            "\n{} {}: {lazy}",
            printable(&image.platform),
            image.manifest.digest
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
