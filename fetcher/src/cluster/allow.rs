// SPDX-License-Identifier: Apache-2.0
//! Which addresses may be peers.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// The networks of peers. Clones share the list.
#[derive(Clone, Debug, Default)]
pub struct Allow(Arc<[IpNet]>);

impl Allow {
    /// Permits these networks; all where there is none.
    #[must_use]
    pub fn new(networks: Vec<IpNet>) -> Self {
        Allow(networks.into())
    }

    /// Whether a peer may have this address. A v4 address that was mapped into v6, as sockets which
    /// listen to both show it, counts as what it is.
    #[must_use]
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.is_empty() || self.0.iter().any(|network| network.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_permit_their_addresses() {
        let some = ["10.0.0.0/8", "192.168.1.7/32", "fd00::/8"];
        let some = Allow::new(some.map(|network| network.parse().unwrap()).into());
        for (address, expected) in [
            ("10.255.0.1", true),
            ("11.0.0.1", false),
            ("192.168.1.7", true),
            ("192.168.1.8", false),
            ("::ffff:10.1.1.1", true),
            ("::ffff:11.1.1.1", false),
            ("fd12::1", true),
            ("fe80::1", false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(some.permits(address), expected, "{address}");
            assert!(Allow::default().permits(address));
        }
    }
}
