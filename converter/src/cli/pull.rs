// SPDX-License-Identifier: Apache-2.0
//! `sluice pull`.

use std::path::PathBuf;

use clap::Args;
use sluice_fetcher::registry::ImageReference;

use super::open::{RegistryArguments, reference};
use super::show::ShowArguments;
use crate::image::Platform;
use crate::pull::{Target, pull};

/// Arguments of `pull`.
#[derive(Debug, Args)]
pub(super) struct Pull {
    /// Image in a registry, with or without docker://.
    #[arg(value_parser = reference)]
    image: ImageReference,
    /// containerd's socket.
    #[arg(long, short, default_value = "/run/containerd/containerd.sock")]
    address: PathBuf,
    /// containerd namespace.
    #[arg(long, short, default_value = "default")]
    namespace: String,
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
        address: &arguments.address,
        namespace: &arguments.namespace,
        snapshotter: &arguments.snapshotter,
        name: &name,
        repository: (reference.host(), reference.repository()),
        platform: arguments.platform.unwrap_or_else(Platform::host),
    };
    pull(&source, &target, arguments.show.reporter()).await?;
    Ok(())
}
