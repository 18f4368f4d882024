// SPDX-License-Identifier: Apache-2.0
//! Gives hosts their ports back.
//!
//! containerd's `distribution.source` labels name a registry's host without its port, and while a
//! pull runs nothing else in containerd names it. So each such host is tried at the ports that are
//! known for it: those of the configuration, those that CRI or the converter's annotation name, and
//! last as it stands. What answers wrongly is harmless: the index is checked against its digest.
//! A hint never names a host, so an image can't send this node anywhere that containerd was not.

use std::collections::BTreeSet;

use sluice_fetcher::registry::{host_name, port_of};

use crate::snapshots::BlobOrigin;

/// How many ports that an image names are tried on one host.
const HINTS_MAX: usize = 4;

/// The origins with every known port of their hosts, the likeliest first, each once.
///
/// `configured` are hosts (`host[:port]`) of the configuration; `hints` are ports that the image names.
#[must_use]
pub fn with_ports(
    origins: &[BlobOrigin],
    configured: &[String],
    hints: &BTreeSet<u16>,
) -> Vec<BlobOrigin> {
    let mut known: Vec<BlobOrigin> = Vec::new();
    let mut add = |host: String, repository: &str| {
        let repository = repository.to_owned();
        let origin = BlobOrigin { host, repository };
        if !known.contains(&origin) {
            known.push(origin);
        }
    };
    for origin in origins.iter().filter(|o| port_of(&o.host).is_some()) {
        add(origin.host.clone(), &origin.repository);
    }
    for origin in origins.iter().filter(|o| port_of(&o.host).is_none()) {
        let written = origins.iter().map(|o| &o.host).chain(configured);
        for host in written.filter(|h| port_of(h).is_some() && host_name(h) == origin.host) {
            add(host.clone(), &origin.repository);
        }
        for port in hints.iter().take(HINTS_MAX) {
            add(format!("{}:{port}", origin.host), &origin.repository);
        }
        add(origin.host.clone(), &origin.repository);
    }
    known
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
        let configured = [
            "r.example:5000".to_owned(),
            "other:1".to_owned(),
            "[::1]:7".to_owned(),
        ];
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
            let hints = hints.iter().copied().collect();
            assert_eq!(
                with_ports(&origins(given), &configured, &hints),
                origins(expected)
            );
        }
    }
}
