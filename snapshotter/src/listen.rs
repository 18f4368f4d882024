// SPDX-License-Identifier: Apache-2.0
//! Addresses of the daemon's TCP servers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;

/// Pause before an address that cannot be had is tried again.
const PAUSE: Duration = Duration::from_secs(5);

/// Listens at the address for `purpose`, sooner or later: a port that somebody else holds, or a network that
/// is not up yet, must not keep containers from starting. The first failure is logged, each is told to `failed`.
///
/// Without a deadline. **Cancel**: safe.
pub(crate) async fn listen(
    address: SocketAddr,
    purpose: &str,
    mut failed: impl FnMut(&io::Error),
) -> TcpListener {
    let mut said = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                failed(&error);
                if !std::mem::replace(&mut said, true) {
                    tracing::error!(%address, "failed to listen for {purpose}, will try again: {error}");
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
