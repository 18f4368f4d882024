// SPDX-License-Identifier: Apache-2.0
//! `[cluster]` as meant.
//!
//! Its values are checked whether it is enabled or not: who writes them finds out at once. Only the
//! host's name, the default of the node's, is asked for when it is needed.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use sluice_fetcher::cluster::home::SharedZones;
use sluice_fetcher::cluster::node::{NodeId, Role, check_name};
use sluice_fetcher::cluster::seed::Seed;

use super::written::{Cluster, ClusterTls};
use super::{Check, ConfigError, units};

/// Where the kernel tells the name of the host.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// What a node does in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Its name, unique in the cluster and the same after a restart.
    pub name: NodeId,
    /// Nodes with cheap links between them.
    pub zone: String,
    /// Nodes with still cheaper ones; may be empty.
    pub rack: String,
    /// What it does for others.
    pub role: Role,
    /// Where it listens for peers (TCP) and gossip (UDP).
    pub listen: SocketAddr,
    /// Where others reach it; `None`: at `listen`, or where that is no single address, at that of the
    /// default route.
    pub advertise: Option<SocketAddr>,
    /// Where others may be found.
    pub seeds: Vec<Seed>,
    /// A file with further seeds.
    pub seed_file: Option<PathBuf>,
    /// Find nodes by gossip; otherwise the seeds are all there are.
    pub gossip: bool,
    /// Networks of peers that may connect; empty: all.
    pub allow: Vec<IpNet>,
    /// Most bytes per second to peers; `None`: no limit.
    pub upload_bytes_per_second: Option<u64>,
    /// Most bytes per second from peers; `None`: no limit.
    pub download_bytes_per_second: Option<u64>,
    /// Most bytes per second from all origins to the whole zone; `None`: no limit.
    pub origin_bytes_per_second: Option<u64>,
    /// Most requests at one origin at a time, of the whole zone; `None`: no limit.
    pub origin_requests: Option<u32>,
    /// Zones that fetch each piece from the origin once for all of them.
    pub shared_zones: SharedZones,
    /// Most uploads to peers at a time.
    pub upload_slots: u16,
    /// Mutual TLS between nodes; `None`: plain TCP.
    pub tls: Option<ClusterTlsConfig>,
}

/// The files of mutual TLS, all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterTlsConfig {
    /// This node's certificate and those between it and the authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The certificate authorities of the cluster's nodes.
    pub ca: PathBuf,
}

impl Cluster {
    /// Turns what is written into what is meant; `None` where it is not enabled.
    pub(super) fn validate(self, check: &Check<'_>) -> Result<Option<ClusterConfig>, ConfigError> {
        let Cluster {
            enabled,
            name,
            zone,
            rack,
            role,
            listen,
            advertise,
            seeds,
            seed_file,
            gossip,
            allow,
            upload,
            download,
            origin,
            origin_requests,
            shared_zones,
            upload_slots,
            tls,
        } = self;
        let name = match (name.as_str(), enabled) {
            ("", false) => None,
            ("", true) => Some(check.value("cluster.name", "", |_| host_name())?),
            (name, _) => Some(check.value("cluster.name", name, node_id)?),
        };
        check.value("cluster.zone", &zone, named)?;
        if !rack.is_empty() {
            check.value("cluster.rack", &rack, named)?;
        }
        let role = check.value("cluster.role", &role, role_named)?;
        let listen = check.value("cluster.listen", &listen, with_port)?;
        let advertise = optional(&advertise)
            .map(|text| check.value("cluster.advertise", text, reachable))
            .transpose()?;
        let seeds = each(&seeds, |text| {
            check.value("cluster.seeds", text, |text| {
                Seed::parse(text).map_err(|error| error.to_string())
            })
        })?;
        let seed_file = optional(&seed_file)
            .map(|path| check.absolute("cluster.seed_file", Path::new(path)))
            .transpose()?;
        let allow = each(&allow, |text| check.value("cluster.allow", text, network))?;
        let rate = |key, text: &str| -> Result<Option<u64>, ConfigError> {
            let rate = check.value(key, text, units::parse_bytes)?;
            Ok((rate != 0).then_some(rate))
        };
        let upload_bytes_per_second = rate("cluster.upload", &upload)?;
        let download_bytes_per_second = rate("cluster.download", &download)?;
        let origin_bytes_per_second = rate("cluster.origin", &origin)?;
        check.value("cluster.upload_slots", &upload_slots.to_string(), |_| {
            match upload_slots {
                0 => Err("want at least 1; a node that gives nothing has role = \"leech\""),
                _ => Ok(()),
            }
            .map_err(str::to_owned)
        })?;
        let shared_zones = check.value("cluster.shared_zones", &shared_zones.join(", "), |_| {
            zones_of(&shared_zones, &zone)
        })?;
        let tls = tls.validate(check)?;
        Ok(name.filter(|_| enabled).map(|name| ClusterConfig {
            name,
            zone,
            rack,
            role,
            listen,
            advertise,
            seeds,
            seed_file,
            gossip,
            allow,
            upload_bytes_per_second,
            download_bytes_per_second,
            origin_bytes_per_second,
            origin_requests: (origin_requests != 0).then_some(origin_requests),
            shared_zones,
            upload_slots,
            tls,
        }))
    }
}

impl ClusterTls {
    fn validate(&self, check: &Check<'_>) -> Result<Option<ClusterTlsConfig>, ConfigError> {
        let files = [
            ("cluster.tls.cert", &self.cert),
            ("cluster.tls.key", &self.key),
            ("cluster.tls.ca", &self.ca),
        ];
        if files.iter().all(|(_, path)| path.is_empty()) {
            return Ok(None);
        }
        let [cert, key, ca] = files.map(|(name, path)| {
            check.value(name, path, |path| match path {
                "" => Err("want all of cert, key and ca, or none".to_owned()),
                _ => Ok(()),
            })?;
            check.absolute(name, Path::new(path))
        });
        Ok(Some(ClusterTlsConfig {
            cert: cert?,
            key: key?,
            ca: ca?,
        }))
    }
}

/// `["*"]`: all. A list without the node's own zone is a mistake: it would share nothing.
fn zones_of(zones: &[String], own: &str) -> Result<SharedZones, String> {
    match zones {
        [] => Ok(SharedZones::None),
        [all] if all == "*" => Ok(SharedZones::All),
        zones => {
            zones.iter().try_for_each(|zone| named(zone))?;
            if zones.iter().any(|zone| zone == own) {
                Ok(SharedZones::Named(zones.iter().cloned().collect()))
            } else {
                Err(format!("want the node's own zone, {own:?}, among them"))
            }
        }
    }
}

fn optional(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn each<T>(
    texts: &[String],
    parse: impl Fn(&str) -> Result<T, ConfigError>,
) -> Result<Vec<T>, ConfigError> {
    texts.iter().map(|text| parse(text)).collect()
}

fn named(text: &str) -> Result<(), String> {
    check_name(text).map_err(|error| error.to_string())
}

fn node_id(text: &str) -> Result<NodeId, String> {
    NodeId::parse(text).map_err(|error| error.to_string())
}

fn role_named(text: &str) -> Result<Role, String> {
    Role::parse(text).ok_or_else(|| "want \"node\", \"supernode\" or \"leech\"".to_owned())
}

fn with_port(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err("want <address>:<port>".to_owned()),
    }
}

fn reachable(text: &str) -> Result<SocketAddr, String> {
    let address = with_port(text)?;
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        Err("want an address at which others reach this node".to_owned())
    } else {
        Ok(address)
    }
}

/// A CIDR; an address alone is the network of it alone.
fn network(text: &str) -> Result<IpNet, String> {
    let alone = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse::<IpNet>()
        .ok()
        .or_else(alone)
        .ok_or_else(|| "want a network such as 10.0.0.0/8 or fd00::/8".to_owned())
}

/// The host's name, as far as it can name a node.
fn host_name() -> Result<NodeId, String> {
    let read = |error: io::Error| format!("read the host's name: {error}; name the node");
    node_named(&std::fs::read_to_string(HOST_NAME).map_err(read)?)
}

fn node_named(host: &str) -> Result<NodeId, String> {
    let plain = |c: char| match c {
        c if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') => c,
        _ => '-',
    };
    // The kernel's names are at most 64 bytes.
    let name: String = host.trim().chars().map(plain).collect();
    match name.as_str() {
        // The kernel's answer when no name was ever set; many nodes would have it.
        "(none)" | "-none-" | "localhost" | "" => {
            Err(format!("the host's name is {host:?}; name the node"))
        }
        name => node_id(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_names_its_node() {
        for (host, expected) in [
            ("node-1\n", Some("node-1")),
            ("a.example.org", Some("a.example.org")),
            ("ip 10/8", Some("ip-10-8")),
            ("b\u{e4}r", Some("b-r")),
            ("", None),
            ("\n", None),
            ("(none)\n", None),
            ("localhost\n", None),
        ] {
            let name = node_named(host).ok().map(|id| id.to_string());
            assert_eq!(name.as_deref(), expected, "{host:?}");
        }
    }
}
