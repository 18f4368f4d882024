// SPDX-License-Identifier: Apache-2.0
//! `sluice convert`.

use std::path::PathBuf;

use clap::Args;

use super::open::{CapsArguments, RegistryArguments, destination, location};
use super::show::ShowArguments;
use crate::convert::{Options, convert};
use crate::image::{Location, Platform};

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub(super) struct Convert {
    /// Image to read: docker://HOST/REPOSITORY:TAG, a bare reference, oci:PATH[:TAG],
    /// oci-archive:PATH[:TAG], or docker-archive:PATH[:NAME].
    #[arg(value_parser = location)]
    source: Location,
    /// Image to write, named in the same ways; a docker-archive: can only be read.
    #[arg(value_parser = destination)]
    destination: Location,
    /// Only this platform of an index (os/architecture[/variant]); repeatable. Default: all.
    #[arg(long, value_parser = Platform::parse)]
    platform: Vec<Platform>,
    /// Threads that compress. Default: one per core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
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
    registry: RegistryArguments,
}

pub(super) async fn run(arguments: Convert) -> anyhow::Result<()> {
    let defaults = Options::default();
    let options = Options {
        platforms: arguments.platform,
        threads: arguments.threads.map_or(defaults.threads, usize::from),
        memory_bytes: u64::from(arguments.memory) * 1024 * 1024,
        caps: arguments.caps.caps(),
        work_directory: arguments.work_dir,
        force: arguments.force,
        port: arguments.destination.port(),
    };
    let source = arguments.registry.reader(&arguments.source)?;
    let destination = arguments.registry.writer(&arguments.destination)?;
    convert(source, destination, options, arguments.show.reporter()).await?;
    Ok(())
}
