// SPDX-License-Identifier: Apache-2.0
//! `sluice pull`.

use clap::Args;
use sluice_fetcher::registry::ImageReference;

use super::open::{ContainerdArguments, RegistryArguments, reference};
use super::show::ShowArguments;
use crate::image::Platform;
use crate::pull::{Target, pull};

/// Arguments of `pull`.
#[derive(Debug, Args)]
pub(super) struct Pull {
    /// Image in a registry, with or without docker://.
    #[arg(value_parser = reference)]
    image: ImageReference,
    #[command(flatten)]
    containerd: ContainerdArguments,
    /// Name of the snapshotter in containerd.
    #[arg(long, default_value = "sluice")]
    snapshotter: String,
    /// Platform of an index. Default: this machine's.
    #[arg(long, value_parser = Platform::parse)]
    platform: Option<Platform>,
    #[command(flatten)]
    show: ShowArguments,
    #[command(flatten)]
    registry: RegistryArguments,
}

pub(super) async fn run(arguments: Pull) -> anyhow::Result<()> {
    let reference = &arguments.image;
    let name = reference.to_string();
    let source = arguments.registry.registry(reference)?;
    let target = Target {
        address: &arguments.containerd.address,
        namespace: &arguments.containerd.namespace,
        snapshotter: &arguments.snapshotter,
        name: &name,
        repository: (reference.host(), reference.repository()),
        platform: arguments.platform.unwrap_or_else(Platform::host),
    };
    pull(&source, &target, arguments.show.reporter()).await?;
    Ok(())
}
