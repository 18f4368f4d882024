// SPDX-License-Identifier: Apache-2.0
//! The ways to convert or index an image, and what each is in words.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::bench::start::contender::Contender;
use crate::harness::{command, tools};

/// How long a program may take to say its version.
const SAYS: Duration = Duration::from_secs(20);

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Common tools that do what a conversion has to do at least.
    Pipeline,
    /// `sluice convert`.
    Sluice,
    /// stargz-snapshotter's converter to eStargz.
    Estargz,
    /// `nydus-image create`.
    Nydus,
    /// gzip, output to nowhere.
    Gunzip,
    /// `sluice index --jobs 1`.
    IndexOne,
    /// `sluice index`.
    Index,
}

/// What one run took and made.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// From start to end of the program.
    pub seconds: f64,
    /// The most memory of its largest process.
    pub peak_rss_bytes: u64,
    /// Bytes of what it made; `None` where nothing is kept.
    pub output_bytes: Option<u64>,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (seconds, peak) = (
            self.seconds,
            self.peak_rss_bytes as f64 / f64::from(1 << 20),
        );
        write!(f, "{seconds:7.2} s, peak RSS {peak:5.0} MiB")?;
        self.output_bytes
            .map_or(Ok(()), |bytes| write!(f, ", {:7.1} MB", bytes as f64 / 1e6))
    }
}

impl Way {
    /// All, in the order of tables.
    pub const ALL: [Self; 7] = [
        Self::Pipeline,
        Self::Sluice,
        Self::Estargz,
        Self::Nydus,
        Self::Gunzip,
        Self::IndexOne,
        Self::Index,
    ];
    /// Those that convert; the others read a gzip image to index it.
    pub const CONVERT: [Self; 4] = [Self::Pipeline, Self::Sluice, Self::Estargz, Self::Nydus];
    /// Those.
    pub const INDEX: [Self; 3] = [Self::Gunzip, Self::IndexOne, Self::Index];

    /// What tables call it.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Pipeline => "pipeline",
            Self::Sluice => "sluice convert",
            Self::Estargz => "eStargz",
            Self::Nydus => "nydus",
            Self::Gunzip => "gzip -dc",
            Self::IndexOne => "sluice index --jobs 1",
            Self::Index => "sluice index",
        }
    }

    /// What exactly is timed.
    #[must_use]
    pub fn timed(self) -> &'static str {
        match self {
            Self::Pipeline => {
                "`gzip -dc | tee >(sha256sum) | zstd -3 -T0 | sha256sum` of each layer's file, one after the other; nothing \
                 is written. Its size is what zstd gives, counted in a further run"
            }
            Self::Sluice => {
                "`sluice convert oci:A oci:B`, layout to layout, state and destination new each time; digests and indexes \
                 included"
            }
            Self::Estargz => {
                "stargz-snapshotter's `nativeconverter/estargz` at level 9, as `ctr-remote` and nerdctl call it, all layers at \
                 once, from containerd's content store to the same store; pull and push are not in it. containerd serves and \
                 stores the blobs: its memory is not in the peak"
            }
            Self::Nydus => {
                "`gzip -dc` into `nydus-image create --type tar-rafs --fs-version 6` of each layer's file, one after the other, \
                 as nydus-snapshotter calls it; the layers' bootstraps are not merged"
            }
            Self::Gunzip => "`gzip -dc >/dev/null` of each layer's file, one after the other",
            Self::IndexOne => {
                "`sluice index --force --jobs 1` of the image in a registry of this machine, past any shaping: blobs are \
                 fetched, indexes made, and those that it lacks pushed. Its size is that of indexes and windows, which go beside \
                 the gzip image"
            }
            Self::Index => "the same without `--jobs`: as many layers at once as there are cores",
        }
    }

    /// Its version, and that of what it stands on.
    ///
    /// **Errors** say why it cannot be had.
    pub fn version(self) -> Result<String> {
        match self {
            Self::Pipeline => {
                let (gzip, zstd) = (first_line("gzip")?, first_line("zstd")?);
                Ok(format!("{gzip}; {zstd}"))
            }
            Self::Gunzip => first_line("gzip"),
            Self::Sluice | Self::IndexOne | Self::Index => Contender::Sluice.version(),
            Self::Estargz => {
                let containerd = Contender::Overlayfs.version()?;
                let stargz = Contender::Stargz.version()?;
                Ok(format!(
                    "stargz-snapshotter {stargz}; containerd {containerd}"
                ))
            }
            Self::Nydus => first_line("nydus-image"),
        }
    }
}

fn first_line(program: &str) -> Result<String> {
    let Ok(path) = tools::on_path(program) else {
        bail!("{program} is not on PATH");
    };
    let output = command::run_ok(Command::new(path).arg("--version"), SAYS)?;
    let mut lines = output.stdout.lines().filter(|line| !line.is_empty());
    let line = lines.next().context("a version")?;
    Ok(line.trim_matches('*').trim().to_owned())
}

/// `gzip -dc`, then zstd: what the pipeline would have kept.
pub(super) fn pipeline(layer: &Path) -> String {
    format!(
        "gzip -dc {} | tee >(sha256sum >/dev/null) | zstd -3 -T0 -c | sha256sum",
        layer.display()
    )
}

/// How many bytes the pipeline's zstd gives.
pub(super) fn pipeline_bytes(layer: &Path) -> String {
    format!("gzip -dc {} | zstd -3 -T0 -c | wc -c", layer.display())
}

/// What nydus-snapshotter runs for a layer, into the file `blob`.
pub(super) fn nydus(layer: &Path, blob: &Path) -> String {
    format!(
        "nydus-image create --log-level warn --prefetch-policy fs --blob {} --whiteout-spec none --fs-version 6 \
         --type tar-rafs --blob-inline-meta --features blob-toc <(gzip -dc {}) >/dev/null",
        blob.display(),
        layer.display()
    )
}
