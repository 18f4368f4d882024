// SPDX-License-Identifier: Apache-2.0
//! The registry in its own network, behind the line that counts and delays.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::fabric::{Fabric, Port};
use super::image::{Image, Published};
use crate::harness::proxy::Line;
use crate::harness::proxy::tally::Traffic;
use crate::harness::registry::Registry;
use crate::harness::root::Root;
use crate::harness::{command, http, images, tools};

/// The line's TCP port.
pub const PORT: u16 = 5000;
/// The registry itself, for preparations; only its own network reaches it.
const DIRECT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5001);
const DEADLINE: Duration = Duration::from_secs(300);

/// The running registry. It drops before its network.
#[derive(Debug)]
pub struct Origin {
    registry: Registry,
    port: Port,
}

impl Origin {
    /// Starts it, empty, with its own link to the bridge.
    pub fn start(fabric: &Fabric, root: &Root, bits_per_second: u64, line: Line) -> Result<Self> {
        let port = fabric.plug_registry(bits_per_second)?;
        let listen = super::registry_address();
        let registry = port
            .network()
            .inside(|| Registry::start_at(root, DIRECT, listen, line))?;
        Ok(Self { registry, port })
    }

    /// Pushes the image, converts it, and says under which reference nodes pull it.
    pub fn publish(&self, image: &Image) -> Result<Published> {
        let repository = image.name();
        let [original, converted] =
            ["original", "sluice"].map(|tag| format!("{DIRECT}/{repository}:{tag}"));
        let manifest = self.port.network().inside(|| {
            images::push_layout(image.layout(), &original)?;
            let mut convert = Command::new(tools::binary("sluice")?);
            convert
                .arg("convert")
                .args([&original, &converted].map(|it| format!("docker://{it}")));
            command::run_ok(&mut convert, DEADLINE)?;
            http::manifest(&DIRECT.to_string(), repository, "sluice")
        })?;
        let layers = manifest["layers"].as_array().context("layers")?;
        Ok(Published {
            reference: format!("{}/{repository}:sluice", super::registry_address()),
            digest: image.digest().to_owned(),
            bytes: layers.iter().filter_map(|it| it["size"].as_u64()).sum(),
        })
    }

    /// What all nodes got so far.
    #[must_use]
    pub fn egress(&self) -> Traffic {
        self.registry.line.tally().total()
    }

    /// From now on no byte counts as sent before.
    pub(super) fn new_round(&self) {
        self.registry.line.tally().new_round();
    }

    /// What one node got so far.
    #[must_use]
    pub fn egress_to(&self, node: IpAddr) -> Traffic {
        self.registry.line.tally().of(node)
    }
}
