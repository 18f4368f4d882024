// SPDX-License-Identifier: Apache-2.0
//! Mutual TLS between nodes, from three PEM files that are read again when they change.
//!
//! Both sides show a certificate that one of the cluster's authorities signed. The side that connects
//! knows whom it wants: the certificate must name the node's id (as a DNS name) or its IP address. The
//! side that accepts takes whoever the authorities vouch for; what a peer may then read is a matter of
//! knowing digests. TLS 1.3 only, and no session is resumed: every connection verifies anew, and those
//! of peers are few and long.
//!
//! [`TlsFiles::watch`] looks at the files every [`LOOK_EVERY`]. New files count from the next connection
//! on. Files that are no good, or not yet all written, change nothing and are reported once; what they
//! become is looked at again.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::client::{Resumption, VerifierBuilderError};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject as _};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{
    self, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio_util::sync::CancellationToken;

use super::metrics::ClusterMetrics;
use crate::bounded;

/// How often the files are looked at: soon enough for who waits for a rotation, and three small reads.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The longest file: far more than all authorities of an operating system.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// The protocol spoken within: HTTP/2, as gRPC needs.
const ALPN: &[u8] = b"h2";

/// Files that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("read {path:?}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no PEM.
    #[error("parse {path:?}: {source}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// A file holds no certificate.
    #[error("{0:?} holds no certificate")]
    Empty(PathBuf),
    /// Certificate and key cannot be used, or not together.
    #[error("use {cert:?} with {key:?}: {source}")]
    Identity {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// An authority cannot be used.
    #[error("use the authorities of {path:?}: {source}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The contents of the files.
#[derive(PartialEq, Eq)]
struct Texts {
    cert: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

/// What the files were made into.
struct Loaded {
    server: Arc<ServerConfig>,
    client: ClientConfig,
    verifier: Arc<WebPkiServerVerifier>,
}

/// What was seen last, and what is in use.
struct State {
    /// `Err` holds the failure, so that each is reported once.
    seen: Result<Texts, String>,
    loaded: Arc<Loaded>,
}

struct Inner {
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    state: Mutex<State>,
    metrics: ClusterMetrics,
}

/// The TLS files of a node. Clones share them.
#[derive(Clone)]
pub struct TlsFiles {
    inner: Arc<Inner>,
}

impl fmt::Debug for TlsFiles {
    /// Paths only: the rest is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            cert,
            key,
            ca,
            state: _,
            metrics: _,
        } = &*self.inner;
        f.debug_struct("TlsFiles")
            .field("cert", cert)
            .field("key", key)
            .field("ca", ca)
            .finish()
    }
}

impl TlsFiles {
    /// Reads the files: the node's certificate (and those between it and the authority), its private
    /// key, and the authorities. Blocks for three small reads.
    ///
    /// **Errors**: a file cannot be read or used, or certificate and key do not belong together.
    pub fn open(
        cert: &Path,
        key: &Path,
        ca: &Path,
        metrics: ClusterMetrics,
    ) -> Result<Self, TlsError> {
        let texts = read_all(cert, key, ca)?;
        let loaded = Arc::new(load(&texts, cert, key, ca)?);
        Ok(TlsFiles {
            inner: Arc::new(Inner {
                cert: cert.into(),
                key: key.into(),
                ca: ca.into(),
                state: Mutex::new(State {
                    seen: Ok(texts),
                    loaded,
                }),
                metrics,
            }),
        })
    }

    /// Looks at the files until `stop`. Whoever spawns it joins it.
    pub async fn watch(&self, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let files = self.clone();
            // Only the stop of the runtime cancels it.
            let _ = tokio::task::spawn_blocking(move || files.look()).await;
        }
    }

    /// Reads the files again, takes them if they changed and are good, and says whether it did. Blocks.
    pub fn look(&self) -> bool {
        let Inner {
            cert,
            key,
            ca,
            state,
            metrics,
        } = &*self.inner;
        let read = read_all(cert, key, ca);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let texts = match read {
            Ok(texts) if state.seen.as_ref() == Ok(&texts) => return false,
            Ok(texts) => texts,
            Err(error) => {
                let error = error.to_string();
                if state.seen.as_ref().err() != Some(&error) {
                    tracing::warn!(%error, "new TLS files cannot be read, the old ones stay in use");
                    metrics.reloaded(false);
                }
                state.seen = Err(error);
                return false;
            }
        };
        let loaded = load(&texts, cert, key, ca);
        state.seen = Ok(texts);
        match loaded {
            Ok(loaded) => {
                tracing::info!(?cert, "new TLS files are in use");
                metrics.reloaded(true);
                state.loaded = Arc::new(loaded);
                true
            }
            Err(error) => {
                tracing::warn!(%error, "new TLS files cannot be used, the old ones stay in use");
                metrics.reloaded(false);
                false
            }
        }
    }

    fn loaded(&self) -> Arc<Loaded> {
        let state = self.inner.state.lock();
        Arc::clone(&state.unwrap_or_else(PoisonError::into_inner).loaded)
    }

    /// How the next connection is accepted: peers show a certificate of the authorities.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.loaded().server)
    }

    /// How the next connection to a node is opened, whose certificate must have one of these names.
    #[must_use]
    pub fn client(&self, names: Vec<ServerName<'static>>) -> Arc<ClientConfig> {
        let loaded = self.loaded();
        let mut config = loaded.client.clone();
        let webpki = Arc::clone(&loaded.verifier);
        let verifier = NodeVerifier { webpki, names };
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

fn read_all(cert: &Path, key: &Path, ca: &Path) -> Result<Texts, TlsError> {
    let read = |path: &Path| {
        bounded::read(path, FILE_MAX_BYTES).map_err(|source| TlsError::Read {
            path: path.into(),
            source,
        })
    };
    Ok(Texts {
        cert: read(cert)?,
        key: read(key)?,
        ca: read(ca)?,
    })
}

fn certificates(text: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    let certificates = parsed.map_err(|source| TlsError::Pem {
        path: path.into(),
        source,
    })?;
    if certificates.is_empty() {
        return Err(TlsError::Empty(path.into()));
    }
    Ok(certificates)
}

fn load(texts: &Texts, cert: &Path, key: &Path, ca: &Path) -> Result<Loaded, TlsError> {
    let chain = certificates(&texts.cert, cert)?;
    let private = PrivateKeyDer::from_pem_slice(&texts.key).map_err(|source| TlsError::Pem {
        path: key.into(),
        source,
    })?;
    let authority = |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Authority {
        path: ca.into(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&texts.ca, ca)? {
        roots
            .add(certificate)
            .map_err(|error| authority(error.into()))?;
    }
    let roots = Arc::new(roots);
    let identity = |source: rustls::Error| TlsError::Identity {
        cert: cert.into(),
        key: key.into(),
        source,
    };
    let verifying = |error: VerifierBuilderError| authority(error.into());

    // Named, not installed: the process may have another default.
    let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(verifying)?;
    let peers = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(verifying)?;

    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(identity)?
        .with_client_cert_verifier(peers)
        .with_single_cert(chain.clone(), private.clone_key())
        .map_err(identity)?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    server.send_tls13_tickets = 0;

    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(identity)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NodeVerifier {
            webpki: Arc::clone(&verifier),
            names: Vec::new(),
        }))
        .with_client_auth_cert(chain, private)
        .map_err(identity)?;
    client.alpn_protocols = vec![ALPN.to_vec()];
    client.resumption = Resumption::disabled();

    Ok(Loaded {
        server: Arc::new(server),
        client,
        verifier,
    })
}

/// Verifies as usual, but for any of several names.
#[derive(Debug)]
struct NodeVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let mut refusal = CertificateError::NotValidForName.into();
        for name in &self.names {
            let verified =
                self.webpki
                    .verify_server_cert(end_entity, intermediates, name, ocsp_response, now);
            match verified {
                Ok(verified) => return Ok(verified),
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}
