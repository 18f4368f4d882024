// SPDX-License-Identifier: Apache-2.0
//! gRPC over unix sockets, to containerd and to `sluiced`.

use std::io;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Error};

/// How long a connection may take: a socket on this machine answers at once, or its owner is stuck.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connected channel. **Errors**: nobody listens there, the socket is not ours to open, or its owner
/// does not take the connection.
pub async fn connect(socket: &Path) -> Result<Channel, Error> {
    let path = socket.to_owned();
    // The address is not used: the connector opens the socket.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                Ok::<_, io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?))
            }
        }))
        .await
}
