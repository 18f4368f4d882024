// SPDX-License-Identifier: Apache-2.0
//! Gives hosts their ports back.
//!
//! containerd's `distribution.source` labels name a registry's host without its port, and while a
//! pull runs nothing else in containerd names it. So each such host is tried at the ports that are
//! known for it, the likeliest first:
//!
//! 1. where this repository was found before, or what an image of it is called in containerd;
//! 2. where other repositories of the host were found, or what images of them are called;
//! 3. the configuration: `[registry.hosts]`, directories with a `hosts.toml`, credentials;
//! 4. what CRI or the converter's annotation names;
//! 5. the port of the scheme.
//!
//! What answers wrongly is harmless: what it gives is checked against its digest, and it is shown the credentials
//! for its own host and port only. A hint never names a host, so an image can't send this node anywhere that
//! containerd was not. Pure.

use std::collections::BTreeSet;

use sluice_fetcher::registry::{host_name, port_of};

use crate::snapshots::BlobOrigin;

/// How many ports that an image names are tried on one host.
const HINTS_MAX: usize = 4;
/// How many ports of one host are tried, that of the scheme besides: beyond these it is guessing.
const PORTS_MAX: usize = 8;

/// What is known of the ports of hosts.
#[derive(Clone, Debug, Default)]
pub struct KnownPorts {
    /// Places that gave what they were asked for.
    pub proven: Vec<BlobOrigin>,
    /// What images are called.
    pub images: Vec<BlobOrigin>,
    /// Hosts (`host[:port]`) that the administrator named.
    pub configured: Vec<String>,
    /// Ports that the image itself names.
    pub hints: BTreeSet<u16>,
}

impl KnownPorts {
    /// The hosts, with ports or expressly without, that `origin` may mean, the likeliest first.
    fn hosts_of<'a>(&'a self, origin: &'a BlobOrigin) -> impl Iterator<Item = &'a String> {
        let seen = || self.proven.iter().chain(&self.images);
        let same = seen().filter(|it| it.repository == origin.repository);
        let hosts = same.chain(seen()).map(|it| &it.host);
        let configured = self.configured.iter().filter(|it| port_of(it).is_some());
        hosts
            .chain(configured)
            .filter(|host| host_name(host) == origin.host)
    }
}

/// The origins with every known port of their hosts, the likeliest first, each once.
#[must_use]
pub fn with_ports(origins: &[BlobOrigin], known: &KnownPorts) -> Vec<BlobOrigin> {
    let mut all: Vec<BlobOrigin> = Vec::new();
    let mut add = |host: &str, repository: &str| {
        let (host, repository) = (host.to_owned(), repository.to_owned());
        let origin = BlobOrigin { host, repository };
        if !all.contains(&origin) {
            all.push(origin);
        }
    };
    for origin in origins.iter().filter(|o| port_of(&o.host).is_some()) {
        add(&origin.host, &origin.repository);
    }
    for origin in origins.iter().filter(|o| port_of(&o.host).is_none()) {
        let written = origins.iter().map(|o| &o.host);
        let written = written.filter(|h| port_of(h).is_some() && host_name(h) == origin.host);
        let hints = known.hints.iter().take(HINTS_MAX);
        let hints = hints.map(|port| format!("{}:{port}", origin.host));
        let hosts = known.hosts_of(origin).chain(written).cloned().chain(hints);
        let mut tried: Vec<String> = Vec::new();
        for host in hosts {
            if tried.len() < PORTS_MAX && !tried.contains(&host) {
                add(&host, &origin.repository);
                tried.push(host);
            }
        }
        add(&origin.host, &origin.repository);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(list: &[&str]) -> Vec<BlobOrigin> {
        let split = |text: &&str| {
            let (host, repository) = text.split_once('/').unwrap();
            BlobOrigin {
                host: host.into(),
                repository: repository.into(),
            }
        };
        list.iter().map(split).collect()
    }

    #[test]
    fn hosts_get_the_ports_that_are_known_for_them() {
        let configured = ["r.example:5000", "other:1", "[::1]:7", "h"];
        let cases: [(&[&str], &[u16], &[&str]); 6] = [
            (&["r.example/a"], &[], &["r.example:5000/a", "r.example/a"]),
            (
                &["r.example/a"],
                &[8443],
                &["r.example:5000/a", "r.example:8443/a", "r.example/a"],
            ),
            (
                &["plain/a", "plain:9/b"],
                &[],
                &["plain:9/b", "plain:9/a", "plain/a"],
            ),
            (&["plain:9/b"], &[5], &["plain:9/b"]),
            (&["[::1]/a"], &[], &["[::1]:7/a", "[::1]/a"]),
            (
                &["h/a"],
                &[1, 2, 3, 4, 5, 6],
                &["h:1/a", "h:2/a", "h:3/a", "h:4/a", "h/a"],
            ),
        ];
        for (given, hints, expected) in cases {
            let known = KnownPorts {
                configured: configured.map(str::to_owned).to_vec(),
                hints: hints.iter().copied().collect(),
                ..KnownPorts::default()
            };
            assert_eq!(with_ports(&origins(given), &known), origins(expected));
        }
    }

    #[test]
    fn what_was_seen_comes_before_what_is_guessed() {
        let known = KnownPorts {
            proven: origins(&["r.example:1/team/b", "r.example:2/team/a", "s.example/c"]),
            images: origins(&["r.example:3/team/a", "r.example:4/team/b", "evil:5/team/a"]),
            configured: vec!["r.example:5".to_owned(), "s.example:6".to_owned()],
            hints: BTreeSet::from([7]),
        };
        let expected = [
            "r.example:2/team/a",
            "r.example:3/team/a",
            "r.example:1/team/a",
            "r.example:4/team/a",
            "r.example:5/team/a",
            "r.example:7/team/a",
            "r.example/team/a",
        ];
        assert_eq!(
            with_ports(&origins(&["r.example/team/a"]), &known),
            origins(&expected)
        );
        // One that was found at the port of the scheme is not looked for elsewhere first.
        assert_eq!(
            with_ports(&origins(&["s.example/c"]), &known),
            origins(&["s.example/c", "s.example:6/c", "s.example:7/c"])
        );
    }

    #[test]
    fn ports_of_a_host_are_tried_within_a_bound() {
        let images: Vec<String> = (1..100).map(|port| format!("r.example:{port}/b")).collect();
        let images: Vec<&str> = images.iter().map(String::as_str).collect();
        let known = KnownPorts {
            images: origins(&images),
            ..KnownPorts::default()
        };
        let tried = with_ports(&origins(&["r.example/a"]), &known);
        assert_eq!(tried.len(), PORTS_MAX + 1);
        assert_eq!(tried.last(), origins(&["r.example/a"]).last());
    }
}
