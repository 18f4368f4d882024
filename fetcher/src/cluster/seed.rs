// SPDX-License-Identifier: Apache-2.0
//! Seeds: the places where a node that starts looks for others.
//!
//! A seed is an address or a DNS name, which may have many addresses and others tomorrow. Values only;
//! who resolves them, and when, is elsewhere.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The port of the peer API and of gossip where nothing else is said.
pub const DEFAULT_PORT: u16 = 9641;

/// The longest DNS name.
const HOST_MAX_BYTES: usize = 253;
/// The most bytes of a seed file that are read: far more than addresses of the largest cluster take.
pub const SEED_FILE_MAX_BYTES: u64 = 4 << 20;

/// A text that names no seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("want host:port, or a host alone for port 9641")]
pub struct InvalidSeed;

/// Where other nodes may be found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seed {
    host: String,
    port: u16,
}

impl Seed {
    /// Takes `host:port`, `host`, `10.0.0.1:9641`, `[fd00::1]:9641`, or an address alone.
    ///
    /// **Errors** [`InvalidSeed`].
    pub fn parse(text: &str) -> Result<Self, InvalidSeed> {
        let bracketed = text.strip_prefix('[');
        let (host, port) = if text.parse::<Ipv6Addr>().is_ok() {
            (text, None)
        } else if let Some(rest) = bracketed {
            let (host, rest) = rest.split_once(']').ok_or(InvalidSeed)?;
            host.parse::<Ipv6Addr>().map_err(|_| InvalidSeed)?;
            let port = match rest {
                "" => None,
                rest => Some(rest.strip_prefix(':').ok_or(InvalidSeed)?),
            };
            (host, port)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let digits = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
        let port = match port {
            None => DEFAULT_PORT,
            Some(port) if digits(port) => port.parse().map_err(|_| InvalidSeed)?,
            Some(_) => return Err(InvalidSeed),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        let named = (1..=HOST_MAX_BYTES).contains(&host.len()) && host.chars().all(plain);
        if !named || port == 0 {
            return Err(InvalidSeed);
        }
        Ok(Seed {
            host: host.to_owned(),
            port,
        })
    }

    /// The name or the address.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address, unless the host is a name.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        let address: IpAddr = self.host.parse().ok()?;
        Some(SocketAddr::new(address, self.port))
    }
}

impl From<SocketAddr> for Seed {
    fn from(address: SocketAddr) -> Self {
        Seed {
            host: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Some(address) => address.fmt(f),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// The seeds of a seed file, one a line, and the lines that are none. What follows a `#` is a remark.
#[must_use]
pub fn parse_seed_file(text: &str) -> (Vec<Seed>, Vec<&str>) {
    let (mut seeds, mut wrong) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or("").trim();
        match Seed::parse(line) {
            _ if line.is_empty() => {}
            Ok(seed) => seeds.push(seed),
            Err(InvalidSeed) => wrong.push(line),
        }
    }
    (seeds, wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_hosts_with_ports() {
        for (text, host, port, shown) in [
            ("a", "a", 9641, "a:9641"),
            (
                "sluice.kube-system.svc:80",
                "sluice.kube-system.svc",
                80,
                "sluice.kube-system.svc:80",
            ),
            ("10.0.0.1", "10.0.0.1", 9641, "10.0.0.1:9641"),
            ("10.0.0.1:1", "10.0.0.1", 1, "10.0.0.1:1"),
            ("fd00::1", "fd00::1", 9641, "[fd00::1]:9641"),
            ("[fd00::1]", "fd00::1", 9641, "[fd00::1]:9641"),
            ("[fd00::1]:65535", "fd00::1", 65535, "[fd00::1]:65535"),
        ] {
            let seed = Seed::parse(text).unwrap();
            assert_eq!((seed.host(), seed.port()), (host, port), "{text}");
            assert_eq!(seed.to_string(), shown);
            assert_eq!(
                seed.address(),
                shown.parse::<SocketAddr>().ok(),
                "{text} is an address or is none"
            );
            if let Some(address) = seed.address() {
                assert_eq!(Seed::from(address), seed);
            }
        }
        for bad in [
            "",
            ":9641",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a:b",
            "a:1:2",
            "a b",
            "http://a:1",
            "[a]:1",
            "[fd00::1",
            "[fd00::1]1",
            "[fd00::1]:",
            "ä",
            &"x".repeat(254),
        ] {
            assert_eq!(Seed::parse(bad), Err(InvalidSeed), "{bad:?}");
        }
    }

    #[test]
    fn a_seed_file_has_one_seed_a_line() {
        let text = "# ours\na:1\n\n  b  # the other\r\nno seed\n[fd00::1]:2\n";
        let (seeds, wrong) = parse_seed_file(text);
        let shown: Vec<_> = seeds.iter().map(Seed::to_string).collect();
        assert_eq!(shown, ["a:1", "b:9641", "[fd00::1]:2"]);
        assert_eq!(wrong, ["no seed"]);
    }
}
