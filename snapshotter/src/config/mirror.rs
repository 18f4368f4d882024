// SPDX-License-Identifier: Apache-2.0
//! `[mirror]` as meant.

use std::net::SocketAddr;
use std::time::Duration;

use super::written::Mirror;
use super::{Check, ConfigError, is_host, is_pattern, units};

/// How the node serves ordinary pulls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The registry of requests that name none; `None`: they are refused.
    pub upstream: Option<String>,
    /// Patterns of `host/repository` that it serves.
    pub registries: Vec<String>,
    /// Most bytes of blobs on disk.
    pub budget_bytes: u64,
    /// How long a tag stands for what it stood for without asking the registry.
    pub fresh: Duration,
    /// How long a proof of access counts while the registry answers.
    pub access: Duration,
    /// How long tags and proofs count while the registry does not answer.
    pub stale: Duration,
}

impl Mirror {
    /// Turns what is written into what is meant; `None` where it listens nowhere.
    pub(super) fn validate(self, check: &Check<'_>) -> Result<Option<MirrorConfig>, ConfigError> {
        let Mirror {
            listen,
            open,
            upstream,
            registries,
            budget,
            fresh,
            access,
            stale,
        } = self;
        let listen = check.value("mirror.listen", &listen, |text| address(text, open))?;
        if !upstream.is_empty() {
            check.value("mirror.upstream", &upstream, is_host)?;
        }
        for pattern in &registries {
            check.value("mirror.registries", pattern, is_pattern)?;
        }
        let budget_bytes =
            check.value("mirror.budget", &budget, |text| {
                match units::parse_bytes(text)? {
                    0 => Err("must not be zero".to_owned()),
                    bytes => Ok(bytes),
                }
            })?;
        let fresh = check.duration("mirror.fresh", &fresh)?;
        let access = check.duration("mirror.access", &access)?;
        let stale = check.duration("mirror.stale", &stale)?;
        Ok(listen.map(|listen| MirrorConfig {
            listen,
            upstream: (!upstream.is_empty()).then_some(upstream),
            registries,
            budget_bytes,
            fresh,
            access,
            stale,
        }))
    }
}

/// An address with a port; not a loopback one only if that was asked for.
fn address(text: &str, open: bool) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "want <address>:<port>, or nothing to turn it off".to_owned())?;
    if address.port() == 0 {
        Err("want a port: clients are configured with it".to_owned())
    } else if address.ip().is_loopback() || open {
        Ok(Some(address))
    } else {
        Err("want a loopback address, or mirror.open = true: it speaks plain HTTP".to_owned())
    }
}
