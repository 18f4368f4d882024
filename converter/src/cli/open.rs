// SPDX-License-Identifier: Apache-2.0
//! From what a user wrote to the image behind it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use sluice_fetcher::registry::{DockerConfig, ImageReference, RegistryClient, RegistryOptions};

use crate::image::containerd::{ContainerdImage, Store};
use crate::image::docker_archive::DockerArchiveImage;
use crate::image::oci_archive::OciArchiveImage;
use crate::image::oci_layout::LayoutImage;
use crate::image::registry::RegistryImage;
use crate::image::{ImageReader, ImageWriter, Location};
use crate::pack::Caps;

/// What is refused of layers.
#[derive(Debug, Clone, Args)]
pub(super) struct CapsArguments {
    /// Refuse layers that decompress to more bytes than this.
    #[arg(long, value_name = "BYTES", default_value_t = Caps::default().layer_bytes)]
    max_layer_bytes: u64,
    /// Refuse layers above 1 GiB that decompress to more than this many times their size.
    #[arg(long, value_name = "N", default_value_t = Caps::default().ratio)]
    max_ratio: u64,
}

impl CapsArguments {
    /// As the work takes them.
    pub(super) fn caps(&self) -> Caps {
        Caps {
            layer_bytes: self.max_layer_bytes,
            ratio: self.max_ratio,
        }
    }
}

/// Where containerd is, for images that it holds.
#[derive(Debug, Clone, Args)]
pub(super) struct ContainerdArguments {
    /// containerd's socket.
    #[arg(
        long,
        short,
        value_name = "SOCKET",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub(super) address: PathBuf,
    /// containerd namespace.
    #[arg(long, short, value_name = "NAME", default_value = "default")]
    pub(super) namespace: String,
}

/// How registries are talked to.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Registry options")]
pub(super) struct RegistryArguments {
    /// Talk plain HTTP to this registry host (host[:port]); repeatable. Local hosts need no flag.
    #[arg(long, value_name = "HOST")]
    plain_http: Vec<String>,
    /// Trust these certificate authorities for this host as well: HOST=FILE; repeatable.
    #[arg(long, value_name = "HOST=FILE", value_parser = ca_file)]
    ca_file: Vec<(String, PathBuf)>,
    /// Docker's config.json with credentials. Default: $DOCKER_CONFIG or ~/.docker.
    #[arg(long, value_name = "FILE")]
    auth_file: Option<PathBuf>,
}

impl RegistryArguments {
    /// A client with these options.
    pub(super) fn client(&self) -> anyhow::Result<RegistryClient> {
        let mut options = RegistryOptions::default();
        for host in &self.plain_http {
            options.host_mut(host).plain_http = Some(true);
        }
        for (host, file) in &self.ca_file {
            options.host_mut(host).ca_files.push(file.clone());
        }
        if let Some(file) = &self.auth_file {
            // Docker's file may be missing; one that the user names may not.
            File::open(file).with_context(|| format!("open --auth-file {}", file.display()))?;
        }
        let credentials = Arc::new(DockerConfig::new(self.auth_file.clone()));
        RegistryClient::new(options, credentials).context("set up registry client")
    }

    /// An image that exists.
    pub(super) fn reader(
        &self,
        location: &Location,
        containerd: &ContainerdArguments,
    ) -> anyhow::Result<Arc<dyn ImageReader>> {
        Ok(match location {
            Location::Registry(reference) => Arc::new(self.registry(reference)?),
            Location::Layout { path, tag } => Arc::new(LayoutImage::open(path, tag.as_deref())?),
            Location::OciArchive { path, tag } => {
                Arc::new(OciArchiveImage::open(path, tag.as_deref())?)
            }
            Location::DockerArchive { path, tag } => {
                Arc::new(DockerArchiveImage::open(path, tag.as_deref())?)
            }
            Location::Containerd(name) => Arc::new(self.containerd(name, containerd)?),
        })
    }

    /// An image to write.
    pub(super) fn writer(
        &self,
        location: &Location,
        containerd: &ContainerdArguments,
    ) -> anyhow::Result<Arc<dyn ImageWriter>> {
        Ok(match location {
            Location::Registry(reference) => Arc::new(self.registry(reference)?),
            Location::Layout { path, tag } => Arc::new(LayoutImage::create(path, tag.as_deref())?),
            Location::OciArchive { path, tag } => {
                Arc::new(OciArchiveImage::create(path, tag.as_deref())?)
            }
            Location::DockerArchive { .. } => {
                bail!("{location} can only be read")
            }
            Location::Containerd(name) => Arc::new(self.containerd(name, containerd)?),
        })
    }

    fn containerd(
        &self,
        name: &str,
        containerd: &ContainerdArguments,
    ) -> anyhow::Result<ContainerdImage> {
        let store = Store {
            address: containerd.address.clone(),
            namespace: containerd.namespace.clone(),
        };
        Ok(ContainerdImage::new(store, name, self.client()?))
    }

    /// An image in a registry.
    pub(super) fn registry(&self, reference: &ImageReference) -> anyhow::Result<RegistryImage> {
        Ok(RegistryImage::new(self.client()?, reference.clone()))
    }
}

/// For clap: a registry reference with Docker's defaults.
pub(super) fn reference(text: &str) -> Result<ImageReference, String> {
    match Location::parse(text)? {
        Location::Registry(reference) => Ok(reference),
        _ => Err(format!("{text:?}: want an image in a registry")),
    }
}

/// For clap: a host and a file.
fn ca_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((host, file)) if !host.is_empty() && !file.is_empty() => {
            Ok((host.to_owned(), file.into()))
        }
        _ => Err("want HOST=FILE".to_owned()),
    }
}

/// For clap: a location to write to.
pub(super) fn destination(text: &str) -> Result<Location, String> {
    Location::parse_destination(text)
}

/// For clap: a location, with its own messages.
pub(super) fn location(text: &str) -> Result<Location, String> {
    Location::parse(text)
}
