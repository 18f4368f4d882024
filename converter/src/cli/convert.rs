// SPDX-License-Identifier: Apache-2.0
//! `sluice convert`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use sluice_blockindex::encode::{TARGET_MAX_BYTES, TARGET_MIN_BYTES};

use super::open::{CapsArguments, ContainerdArguments, RegistryArguments, location};
use super::show::ShowArguments;
use crate::convert::{Known, Options, convert};
use crate::image::{Location, Platform, Prefix};
use crate::plan::{LayerFormat, Recipe};
use crate::records::Records;
use crate::report::{Event, Reporter};

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub(super) struct Convert {
    /// Image to read: docker://HOST/REPOSITORY:TAG, a bare reference, oci:PATH[:TAG],
    /// oci-archive:PATH[:TAG], docker-archive:PATH[:NAME], or containerd:NAME.
    #[arg(value_name = "SOURCE", value_parser = location)]
    source: Location,
    /// Image to write, named in the same ways; a docker-archive: can only be read. With --to further
    /// images to read.
    #[arg(value_name = "DESTINATION", value_parser = location)]
    rest: Vec<Location>,
    /// Convert all images that are named, each to its own repository and tag below this place: REGISTRY,
    /// REGISTRY/PREFIX, or containerd: for whole names. Layers that they share are converted once.
    #[arg(long, value_name = "PLACE", value_parser = Prefix::parse)]
    to: Option<Prefix>,
    /// Only this platform of an index (os/architecture[/variant]); repeatable. Default: all.
    #[arg(long, value_parser = Platform::parse)]
    platform: Vec<Platform>,
    /// Threads that compress. Default: one per core.
    #[arg(long, alias = "threads", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Format of the layers: sluice, zstd-chunked or estargz. eStargz changes diff IDs and config digest, which
    /// is said.
    #[arg(long, value_name = "FORMAT", default_value = "sluice", value_parser = LayerFormat::parse)]
    format: LayerFormat,
    /// Level of compression: of zstd 1 to 22, default 6; of eStargz, which is gzip, 1 to 9, default 6. Layers that
    /// were converted with another are converted again.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=22))]
    level: Option<i32>,
    /// About how much of a layer is fetched at once, such as 64K: 16K to 512K, in steps of 4K. Default:
    /// 128K. Layers that were converted with another are converted again.
    #[arg(long, value_name = "SIZE", value_parser = chunk_size)]
    chunk_size: Option<u64>,
    /// Memory for chunks on their way, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..))]
    memory: u32,
    #[command(flatten)]
    caps: CapsArguments,
    /// Where unfinished layers are kept. Default: the layout written to, or /var/tmp.
    #[arg(long, value_name = "DIRECTORY")]
    work_dir: Option<PathBuf>,
    /// Where it is remembered what was converted, for a call that goes on after an interruption. Default:
    /// $XDG_CACHE_HOME/sluice, or /var/cache/sluice for root.
    #[arg(long, value_name = "DIRECTORY", env = "SLUICE_STATE")]
    state: Option<PathBuf>,
    /// Convert again what the destination already has.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    show: ShowArguments,
    #[command(flatten)]
    containerd: ContainerdArguments,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// For clap: bytes, or with K or M those binary units.
fn chunk_size(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let number = upper.trim_end_matches("IB").trim_end_matches('B');
    let (digits, unit) = match number.strip_suffix('K') {
        Some(digits) => (digits, 1024),
        None => match number.strip_suffix('M') {
            Some(digits) => (digits, 1024 * 1024),
            None => (number, 1),
        },
    };
    let bytes = digits.parse::<u64>().ok();
    let bytes = bytes.and_then(|bytes| bytes.checked_mul(unit));
    let range = TARGET_MIN_BYTES..=TARGET_MAX_BYTES;
    bytes
        .filter(|bytes| range.contains(bytes) && bytes.is_multiple_of(4096))
        .ok_or_else(|| {
            let (least, most) = (TARGET_MIN_BYTES / 1024, TARGET_MAX_BYTES / 1024);
            format!("want {least}K to {most}K, in steps of 4K")
        })
}

impl Convert {
    /// What goes where. **Errors**: a message about the arguments.
    fn pairs(&self) -> Result<Vec<(Location, Location)>, String> {
        let most = self.format.level_max();
        if let Some(level) = self.level.filter(|level| *level > most) {
            let format = self.format;
            return Err(format!(
                "--level {level}: of {format} the highest is {most}"
            ));
        }
        let Some(to) = &self.to else {
            let [destination] = self.rest.as_slice() else {
                let message = "want one SOURCE and one DESTINATION; several images go --to a place";
                return Err(message.to_owned());
            };
            destination.check_writable()?;
            return Ok(vec![(self.source.clone(), destination.clone())]);
        };
        let mut pairs: Vec<(Location, Location)> = Vec::new();
        for source in std::iter::once(&self.source).chain(&self.rest) {
            let destination = to.place(source)?;
            if let Some((other, _)) = pairs.iter().find(|(_, taken)| *taken == destination) {
                return Err(format!(
                    "{other} and {source} would both become {destination}"
                ));
            }
            pairs.push((source.clone(), destination));
        }
        Ok(pairs)
    }

    fn options(&self) -> Options {
        let defaults = Options::default();
        let usual = Recipe::of(self.format);
        let state = self.state.clone().or_else(state_directory);
        let records = state.map(|state| Records::open(&state.join("layers")));
        Options {
            platforms: self.platform.clone(),
            threads: self.jobs.map_or(defaults.threads, usize::from),
            recipe: Recipe {
                format: self.format,
                level: self.level.unwrap_or(usual.level),
                chunk_bytes: self.chunk_size.unwrap_or(usual.chunk_bytes),
            },
            exact_recipe: self.level.is_some() || self.chunk_size.is_some(),
            memory_bytes: u64::from(self.memory) * 1024 * 1024,
            caps: self.caps.caps(),
            work_directory: self.work_dir.clone(),
            force: self.force,
            port: None,
            known: Arc::new(Known::new(records)),
        }
    }

    async fn one(
        &self,
        (source, destination): &(Location, Location),
        options: &Options,
        reporter: &Arc<dyn Reporter>,
    ) -> anyhow::Result<()> {
        let options = Options {
            port: destination.port(),
            ..options.clone()
        };
        let source = self.registry.reader(source, &self.containerd)?;
        let destination = self.registry.writer(destination, &self.containerd)?;
        convert(source, destination, options, Arc::clone(reporter)).await?;
        Ok(())
    }
}

/// Where records are kept, if nobody says. Nowhere, where there is no home.
fn state_directory() -> Option<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Some("/var/cache/sluice".into());
    }
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?;
    cache.is_absolute().then(|| cache.join("sluice"))
}

pub(super) async fn run(arguments: Convert) -> anyhow::Result<()> {
    let pairs = arguments.pairs().unwrap_or_else(|message| {
        use clap::CommandFactory;
        let mut command = super::Arguments::command();
        let kind = clap::error::ErrorKind::ValueValidation;
        command.error(kind, message).exit()
    });
    let (options, reporter) = (arguments.options(), arguments.show.reporter());
    if arguments.to.is_none() {
        for pair in &pairs {
            arguments.one(pair, &options, &reporter).await?;
        }
        return Ok(());
    }
    let started = Instant::now();
    let mut failed = 0;
    for pair in &pairs {
        if let Err(error) = arguments.one(pair, &options, &reporter).await {
            failed += 1;
            let (source, destination) = (pair.0.to_string(), pair.1.to_string());
            let error = format!("{error:#}");
            if arguments.show.quiet {
                tracing::error!("{source} -> {destination}: {error}");
            }
            reporter.event(&Event::ImageFailed {
                source,
                destination,
                error,
            });
        }
    }
    let images = pairs.len() as u64;
    reporter.event(&Event::Total {
        images,
        failed,
        seconds: started.elapsed().as_secs_f64(),
    });
    match failed {
        0 => Ok(()),
        failed => bail!("{failed} of {images} images failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_read_as_users_write_them() {
        for (text, bytes) in [
            ("16384", Some(16_384)),
            ("64K", Some(65_536)),
            ("64kib", Some(65_536)),
            ("256kB", Some(262_144)),
            ("512K", Some(524_288)),
            ("0.5M", None),
            ("1M", None),
            ("8K", None),
            ("65537", None),
            ("18446744073709551615K", None),
            ("K", None),
            ("", None),
            ("-64K", None),
        ] {
            assert_eq!(chunk_size(text).ok(), bytes, "{text}");
        }
    }
}
