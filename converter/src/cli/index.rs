// SPDX-License-Identifier: Apache-2.0
//! `sluice index`.

use clap::Args;
use sluice_fetcher::registry::ImageReference;

use super::open::{CapsArguments, RegistryArguments, reference};
use super::show::ShowArguments;
use crate::image::Platform;
use crate::index::{Options, Selection, index};

/// Arguments of `index`.
#[derive(Debug, Args)]
pub(super) struct Index {
    /// Image in a registry, with or without docker://. Not a byte of it changes.
    #[arg(value_parser = reference)]
    image: ImageReference,
    /// Only this platform of an index (os/architecture[/variant]); repeatable. Default: this machine's.
    #[arg(long, value_parser = Platform::parse, conflicts_with = "all")]
    platform: Vec<Platform>,
    /// All platforms of an index.
    #[arg(long)]
    all: bool,
    /// Layers that are read at once, each on a core. Default: as many as there are cores.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: Option<u16>,
    #[command(flatten)]
    caps: CapsArguments,
    /// Index again what the image's artifact has already.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    show: ShowArguments,
    #[command(flatten)]
    registry: RegistryArguments,
}

pub(super) async fn run(arguments: Index) -> anyhow::Result<()> {
    let defaults = Options::default();
    let options = Options {
        selection: match (arguments.all, arguments.platform) {
            (true, _) => Selection::All,
            (false, platforms) if platforms.is_empty() => Selection::Host,
            (false, platforms) => Selection::Platforms(platforms),
        },
        jobs: arguments.jobs.map_or(defaults.jobs, usize::from),
        caps: arguments.caps.caps(),
        force: arguments.force,
    };
    let client = arguments.registry.client()?;
    index(client, arguments.image, options, arguments.show.reporter()).await?;
    Ok(())
}
