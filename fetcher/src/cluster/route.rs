// SPDX-License-Identifier: Apache-2.0
//! Which of this machine's addresses others reach, where nobody said it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Addresses far away, which no packet is sent to: those for documentation (RFC 5737, RFC 3849) take
/// the default route, if there is one.
const FAR: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// The address that packets to `to` leave from. Sends nothing: the kernel looks its route up.
///
/// **Errors**: there is no route.
pub fn source_address(to: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    // Any port: no packet goes there.
    socket.connect((to, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// `listen` itself; where it names no single address, that of the default route, or of the route to one
/// of `seeds` on a network without one. `None` where the network is not up yet.
#[must_use]
pub fn advertised(listen: SocketAddr, seeds: &[SocketAddr]) -> Option<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return Some(listen);
    }
    let far = FAR.into_iter();
    let near = seeds.iter().map(SocketAddr::ip);
    let address = far
        .chain(near)
        // A socket that listens to v4 is not reached under a v6 address.
        .filter(|to| listen.is_ipv6() || to.is_ipv4())
        .filter_map(|to| source_address(to).ok())
        .find(|address| !address.is_unspecified() && !address.is_loopback())?;
    Some(SocketAddr::new(address, listen.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_taken_and_the_rest_is_routed() {
        let address = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let said = address("127.0.0.1:9641");
        assert_eq!(advertised(said, &[]), Some(said));
        let loopback = source_address(Ipv4Addr::LOCALHOST.into()).unwrap();
        assert!(loopback.is_loopback());
        // Machines without a network have none, and none is made up: loopback reaches nobody else.
        let found = advertised(address("0.0.0.0:77"), &[said]);
        if let Some(found) = found {
            assert_eq!(found.port(), 77);
            assert!(found.is_ipv4() && !found.ip().is_loopback() && !found.ip().is_unspecified());
        }
    }
}
