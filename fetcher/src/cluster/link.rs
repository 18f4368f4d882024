// SPDX-License-Identifier: Apache-2.0
//! Connections between nodes: plain TCP or mutual TLS, of one type, with deadlines.
//!
//! [`Links`] accepts and opens them. [`Connector`] opens them for tonic's
//! `Endpoint::connect_with_connector`; the endpoint's scheme is `http` in both cases, because the
//! connector brings the TLS.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tonic::transport::Uri;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::allow::Allow;
use super::metrics::ClusterMetrics;
use super::tls::TlsFiles;
use crate::source::Class;

/// How long a TCP connection may take: nodes are near, and one that is slower is asked in vain.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// How long a handshake may take, on either side: two round trips and some signatures.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer's address is in none of the networks that may connect.
    #[error("{0} is in no network of cluster.allow")]
    Refused(IpAddr),
    /// TCP failed.
    #[error("connect to {address}: {source}")]
    Connect {
        /// Whom to.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One side does not take the other's certificate, or speaks no TLS.
    #[error("TLS handshake with {address}: {source}")]
    Handshake {
        /// With whom.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("{0} did not answer in time")]
    Deadline(SocketAddr),
    /// The connection was gone before it was accepted.
    #[error("accept a connection: {0}")]
    Gone(#[source] io::Error),
}

impl LinkError {
    /// Whether it is worth another try.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            LinkError::Refused(_) | LinkError::Handshake { .. } => Class::Permanent,
            LinkError::Connect { .. } | LinkError::Deadline(_) | LinkError::Gone(_) => {
                Class::Transient
            }
        }
    }
}

/// A connection with another node.
#[derive(Debug)]
pub enum PeerStream {
    /// Without TLS.
    Plain(TcpStream),
    /// With mutual TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl PeerStream {
    fn tcp(&self) -> &TcpStream {
        match self {
            PeerStream::Plain(stream) => stream,
            PeerStream::Tls(stream) => stream.get_ref().0,
        }
    }

    /// The other side's address.
    ///
    /// **Errors**: the connection is gone.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.tcp().peer_addr()
    }
}

impl Connected for PeerStream {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.tcp().connect_info()
    }
}

/// Calls a method of whichever stream it is.
macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            PeerStream::Plain($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            PeerStream::Tls($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for PeerStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            PeerStream::Plain(stream) => stream.is_write_vectored(),
            PeerStream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(context))
    }
}

/// Accepts and opens connections between nodes.
#[derive(Clone, Debug)]
pub struct Links {
    tls: Option<TlsFiles>,
    allow: Allow,
    metrics: ClusterMetrics,
}

impl Links {
    /// With mutual TLS where there are files, otherwise plain; from the networks of `allow` only.
    #[must_use]
    pub fn new(tls: Option<TlsFiles>, allow: Allow, metrics: ClusterMetrics) -> Self {
        Links {
            tls,
            allow,
            metrics,
        }
    }

    /// Makes a connection of one that TCP accepted.
    ///
    /// **Errors**: the peer's network may not connect, its certificate is missing or not of the
    /// authorities, or the handshake took more than 5 s. The connection is closed then.
    /// **Cancel**: closes the connection.
    pub async fn accept(&self, stream: TcpStream) -> Result<PeerStream, LinkError> {
        let accepted = self.accept_inner(stream).await;
        match &accepted {
            Ok(_) | Err(LinkError::Gone(_)) => {}
            Err(LinkError::Refused(_)) => self.metrics.refused("network"),
            Err(LinkError::Deadline(_)) => self.metrics.refused("deadline"),
            Err(_) => self.metrics.refused("handshake"),
        }
        accepted
    }

    async fn accept_inner(&self, stream: TcpStream) -> Result<PeerStream, LinkError> {
        let address = stream.peer_addr().map_err(LinkError::Gone)?;
        if !self.allow.permits(address.ip()) {
            return Err(LinkError::Refused(address.ip()));
        }
        stream.set_nodelay(true).map_err(LinkError::Gone)?;
        let Some(tls) = &self.tls else {
            return Ok(PeerStream::Plain(stream));
        };
        let handshake = TlsAcceptor::from(tls.server()).accept(stream);
        let accepted = tokio::time::timeout(HANDSHAKE_DEADLINE, handshake)
            .await
            .map_err(|_| LinkError::Deadline(address))?;
        accepted
            .map(|stream| PeerStream::Tls(Box::new(stream.into())))
            .map_err(|source| LinkError::Handshake { address, source })
    }

    /// Connects to a node. With TLS, its certificate must be for its IP address or for `name`: the
    /// node's id, or the DNS name that led to it.
    ///
    /// **Errors**: it cannot be reached within 3 s, is not who it should be, or does not take our
    /// certificate. A node that refuses ours may say so only after the connection was opened.
    /// **Cancel**: closes the connection.
    pub async fn connect(
        &self,
        address: SocketAddr,
        name: Option<&str>,
    ) -> Result<PeerStream, LinkError> {
        let stream = tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address))
            .await
            .map_err(|_| LinkError::Deadline(address))?;
        let connected = |source| LinkError::Connect { address, source };
        let stream = stream.map_err(connected)?;
        stream.set_nodelay(true).map_err(connected)?;
        let Some(tls) = &self.tls else {
            return Ok(PeerStream::Plain(stream));
        };
        let ip = ServerName::from(address.ip().to_canonical());
        let name = name.and_then(|name| ServerName::try_from(name.to_owned()).ok());
        let names = std::iter::once(ip.clone()).chain(name).collect();
        // The IP address is no server name indication: none is sent.
        let handshake = TlsConnector::from(tls.client(names)).connect(ip, stream);
        let opened = tokio::time::timeout(HANDSHAKE_DEADLINE, handshake)
            .await
            .map_err(|_| LinkError::Deadline(address))?;
        opened
            .map(|stream| PeerStream::Tls(Box::new(stream.into())))
            .map_err(|source| LinkError::Handshake { address, source })
    }

    /// Opens connections to one node for tonic; see [`connect`](Self::connect).
    #[must_use]
    pub fn connector(&self, address: SocketAddr, name: Option<&str>) -> Connector {
        Connector {
            links: self.clone(),
            address,
            name: name.map(str::to_owned),
        }
    }
}

/// Opens connections to one node, whatever the address of the endpoint says.
#[derive(Clone, Debug)]
pub struct Connector {
    links: Links,
    address: SocketAddr,
    name: Option<String>,
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<PeerStream>;
    type Error = LinkError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, LinkError>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _endpoint: Uri) -> Self::Future {
        let Connector {
            links,
            address,
            name,
        } = self.clone();
        Box::pin(async move {
            let stream = links.connect(address, name.as_deref()).await?;
            Ok(TokioIo::new(stream))
        })
    }
}

#[cfg(test)]
mod tests;
