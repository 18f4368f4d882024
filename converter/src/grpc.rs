// SPDX-License-Identifier: Apache-2.0
//! gRPC over unix sockets, to containerd and to `sluiced`.

use std::io;
use std::path::Path;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Error};

/// A connected channel. **Errors**: nobody listens there, or the socket is not ours to open.
pub async fn connect(socket: &Path) -> Result<Channel, Error> {
    let path = socket.to_owned();
    // The address is not used: the connector opens the socket.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                Ok::<_, io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?))
            }
        }))
        .await
}
