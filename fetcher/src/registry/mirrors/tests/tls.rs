// SPDX-License-Identifier: Apache-2.0
//! A mirror with an authority of its own that wants to see a client's certificate.

use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};

use super::*;

struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Self(rcgen::CertifiedIssuer::self_signed(parameters, key).unwrap())
    }

    fn certificate(&self, name: &str) -> (rcgen::Certificate, rcgen::KeyPair) {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (parameters.signed_by(&key, &self.0).unwrap(), key)
    }
}

/// Answers every request with the first ten of `bytes`. Says where it listens; ends with the runtime.
async fn serve(authority: &Authority, bytes: Bytes) -> u16 {
    let provider = Arc::new(crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(authority.0.der().clone()).unwrap();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let (certificate, key) = authority.certificate("127.0.0.1");
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let Ok(mut connection) = acceptor.accept(connection).await else {
                continue;
            };
            let mut head = [0; 4096];
            let _ = connection.read(&mut head).await;
            let answer = format!(
                "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/{}\r\nContent-Length: 10\r\nConnection: close\r\n\r\n",
                bytes.len()
            );
            let _ = connection.write_all(answer.as_bytes()).await;
            let _ = connection.write_all(&bytes[..10]).await;
            let _ = connection.shutdown().await;
        }
    });
    port
}

#[tokio::test]
async fn certificates_of_the_file_are_those_of_its_host() {
    let rig = Rig::new(0, sample_blob()).await;
    let authority = Authority::new();
    let port = serve(&authority, rig.bytes.clone()).await;
    let directory = rig.files.path().join(rig.origin.host());
    let (client, key) = authority.certificate("node");
    for (name, text) in [
        ("ca.pem", authority.0.pem()),
        ("node.pem", client.pem()),
        ("node.key", key.serialize_pem()),
        (
            "both.pem",
            format!("{}{}", client.pem(), key.serialize_pem()),
        ),
    ] {
        std::fs::write(directory.join(name), text).unwrap();
    }
    let (mirror, origin) = (SourceKind::Mirror, SourceKind::Origin);
    let cases = [
        (
            "ca = \"ca.pem\"\nclient = [[\"node.pem\", \"node.key\"]]",
            mirror,
        ),
        ("ca = [\"ca.pem\"]\nclient = \"both.pem\"", mirror),
        ("skip_verify = true\nclient = \"both.pem\"", mirror),
        (
            "ca = \"ca.pem\"\nclient = \"both.pem\"\ndial_timeout = \"1s\"",
            mirror,
        ),
        ("client = \"both.pem\"", origin),
        ("ca = \"ca.pem\"", origin),
        ("ca = \"ca.pem\"\nclient = \"node.pem\"", origin),
        ("ca = \"node.key\"\nclient = \"both.pem\"", origin),
        (
            "ca = \"ca.pem\"\nclient = \"both.pem\"\nproxy = \"http://127.0.0.1:9\"",
            origin,
        ),
    ];
    for (lines, expected) in cases {
        rig.write(&format!("[host.\"https://127.0.0.1:{port}\"]\n{lines}\n"));
        let mut options = rig.options();
        options.mirrors.patience = Duration::from_secs(2);
        let client = RegistryClient::new(options, Arc::new(NoCredentials)).unwrap();
        let (bytes, by) = read(&rig.source(&client), extent(0, 10)).await.unwrap();
        assert_eq!((bytes, by), (rig.bytes.slice(..10), expected), "{lines}");
    }
}
