// SPDX-License-Identifier: Apache-2.0
//! `sluice convert`.

use std::path::PathBuf;

use clap::Args;
use sluice_blockindex::encode::{TARGET_MAX_BYTES, TARGET_MIN_BYTES};

use super::open::{CapsArguments, ContainerdArguments, RegistryArguments, destination, location};
use super::show::ShowArguments;
use crate::convert::{Options, convert};
use crate::image::{Location, Platform};
use crate::plan::Recipe;

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub(super) struct Convert {
    /// Image to read: docker://HOST/REPOSITORY:TAG, a bare reference, oci:PATH[:TAG],
    /// oci-archive:PATH[:TAG], docker-archive:PATH[:NAME], or containerd:NAME.
    #[arg(value_parser = location)]
    source: Location,
    /// Image to write, named in the same ways; a docker-archive: can only be read.
    #[arg(value_parser = destination)]
    destination: Location,
    /// Only this platform of an index (os/architecture[/variant]); repeatable. Default: all.
    #[arg(long, value_parser = Platform::parse)]
    platform: Vec<Platform>,
    /// Threads that compress. Default: one per core.
    #[arg(long, alias = "threads", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// zstd level of the layers. Default: 3. Layers that were converted with another are converted again.
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

pub(super) async fn run(arguments: Convert) -> anyhow::Result<()> {
    let defaults = Options::default();
    let options = Options {
        platforms: arguments.platform,
        threads: arguments.jobs.map_or(defaults.threads, usize::from),
        recipe: Recipe {
            level: arguments.level.unwrap_or(defaults.recipe.level),
            chunk_bytes: arguments.chunk_size.unwrap_or(defaults.recipe.chunk_bytes),
        },
        exact_recipe: arguments.level.is_some() || arguments.chunk_size.is_some(),
        memory_bytes: u64::from(arguments.memory) * 1024 * 1024,
        caps: arguments.caps.caps(),
        work_directory: arguments.work_dir,
        force: arguments.force,
        port: arguments.destination.port(),
    };
    let source = arguments
        .registry
        .reader(&arguments.source, &arguments.containerd)?;
    let destination = arguments
        .registry
        .writer(&arguments.destination, &arguments.containerd)?;
    convert(source, destination, options, arguments.show.reporter()).await?;
    Ok(())
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
