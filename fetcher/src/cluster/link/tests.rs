// SPDX-License-Identifier: Apache-2.0
use std::path::{Path, PathBuf};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::*;

/// A certificate authority of a test.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Self(rcgen::CertifiedIssuer::self_signed(parameters, key).unwrap())
    }

    /// Writes the files of a node whose certificate has these names.
    fn issue(&self, directory: &Path, names: &[&str]) -> [PathBuf; 3] {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let parameters = rcgen::CertificateParams::new(names).unwrap();
        let cert = parameters.signed_by(&key, &self.0).unwrap();
        let paths = ["cert", "key", "ca"].map(|name| directory.join(name));
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(&paths[0], cert.pem()).unwrap();
        std::fs::write(&paths[1], key.serialize_pem()).unwrap();
        std::fs::write(&paths[2], self.0.pem()).unwrap();
        paths
    }

    fn files(&self, directory: &Path, names: &[&str]) -> TlsFiles {
        open(&self.issue(directory, names), &ClusterMetrics::new())
    }
}

fn open([cert, key, ca]: &[PathBuf; 3], metrics: &ClusterMetrics) -> TlsFiles {
    TlsFiles::open(cert, key, ca, metrics.clone()).unwrap()
}

fn links(tls: Option<TlsFiles>) -> Links {
    Links::new(tls, Allow::default(), ClusterMetrics::new())
}

/// What each side gets when `client` connects to `server` and sends four bytes there and back.
async fn meet(
    server: &Links,
    client: &Links,
    name: Option<&str>,
) -> (Result<bool, LinkError>, io::Result<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = server.accept(stream).await?;
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        Ok(matches!(stream, PeerStream::Tls(_)))
    };
    let ask = async {
        let mut stream = client
            .connect(address, name)
            .await
            .map_err(io::Error::other)?;
        stream.write_all(b"ping").await?;
        stream.flush().await?;
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).await?;
        assert_eq!(stream.peer_addr()?, address);
        if &bytes != b"ping" {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    };
    let both = async { tokio::join!(serve, ask) };
    let deadline = Duration::from_secs(20);
    tokio::time::timeout(deadline, both).await.unwrap()
}

#[tokio::test]
async fn nodes_of_one_authority_meet_under_id_or_address() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let client = links(Some(authority.files(&directory.path().join("c"), &["x"])));
    for (case, (names, name, good)) in [
        (&["node_1.zone-2"][..], Some("node_1.zone-2"), true),
        (&["127.0.0.1"], Some("node-1"), true),
        (&["127.0.0.1"], None, true),
        (&["node-1", "127.0.0.1"], Some("node-1"), true),
        (&["node-2"], Some("node-1"), false),
        (&["10.0.0.1"], Some("node-1"), false),
        (&["node-1"], None, false),
        (&["node-1"], Some("not a name"), false),
    ]
    .into_iter()
    .enumerate()
    {
        let files = authority.files(&directory.path().join(case.to_string()), names);
        let (served, asked) = meet(&links(Some(files)), &client, name).await;
        assert_eq!(asked.is_ok(), good, "{names:?} as {name:?}: {asked:?}");
        assert_eq!(matches!(served, Ok(true)), good, "{names:?}: {served:?}");
    }
}

#[tokio::test]
async fn strangers_are_refused_on_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let node = links(Some(ours.files(&directory.path().join("a"), &["node-1"])));
    let stranger = links(Some(theirs.files(&directory.path().join("b"), &["node-1"])));
    for (server, client) in [(&node, &stranger), (&stranger, &node)] {
        let (served, asked) = meet(server, client, Some("node-1")).await;
        assert!(matches!(served, Err(LinkError::Handshake { .. })));
        asked.unwrap_err();
        assert_eq!(server.metrics.refusals("handshake"), 1);
    }
    // Trusts us, but has nothing to show that we trust.
    let paths = theirs.issue(&directory.path().join("c"), &["node-1"]);
    std::fs::write(&paths[2], ours.0.pem()).unwrap();
    let guest = links(Some(open(&paths, &ClusterMetrics::new())));
    let (served, asked) = meet(&node, &guest, Some("node-1")).await;
    let error = served.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.to_string().contains("TLS handshake"), "{error}");
    asked.unwrap_err();
}

#[tokio::test]
async fn a_peer_without_a_certificate_is_refused() {
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let node = links(Some(authority.files(directory.path(), &["node-1"])));
    let mut roots = RootCertStore::empty();
    roots.add(authority.0.der().clone()).unwrap();
    let config = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async { node.accept(listener.accept().await.unwrap().0).await };
    let ask = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("node-1").unwrap();
        let connector = TlsConnector::from(std::sync::Arc::new(config));
        let mut stream = connector.connect(name, stream).await?;
        // The refusal comes with the first bytes that would be an answer.
        stream.read_exact(&mut [0; 1]).await
    };
    let (served, asked) = tokio::join!(serve, ask);
    let error = served.unwrap_err().to_string();
    assert!(error.contains("no certificates"), "{error}");
    asked.unwrap_err();
}

#[tokio::test]
async fn without_files_connections_are_plain_and_do_not_mix_with_tls() {
    let directory = tempfile::tempdir().unwrap();
    let plain = links(None);
    let (served, asked) = meet(&plain, &plain, Some("any")).await;
    asked.unwrap();
    assert!(!served.unwrap());
    let tls = links(Some(Authority::new().files(directory.path(), &["n"])));
    let (served, asked) = meet(&tls, &plain, None).await;
    assert!(matches!(served, Err(LinkError::Handshake { .. })));
    asked.unwrap_err();
}

#[tokio::test]
async fn other_networks_are_refused() {
    let allow = Allow::new(vec!["10.0.0.0/8".parse().unwrap()]);
    let server = Links::new(None, allow, ClusterMetrics::new());
    let (served, asked) = meet(&server, &links(None), None).await;
    assert!(matches!(served, Err(LinkError::Refused(ip)) if ip.is_loopback()));
    asked.unwrap_err();
    assert_eq!(server.metrics.refusals("network"), 1);
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_dropped_at_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let node = links(Some(Authority::new().files(directory.path(), &["n"])));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _silent = TcpStream::connect(address).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    tokio::time::pause();
    let error = node.accept(stream).await.unwrap_err();
    assert!(matches!(error, LinkError::Deadline(_)), "{error}");
    assert_eq!(node.metrics.refusals("deadline"), 1);
    // And the same the other way round: it listens and says nothing.
    let error = node.connect(address, None).await.unwrap_err();
    assert!(matches!(error, LinkError::Deadline(_)), "{error}");
    assert_eq!(error.class(), Class::Transient);
}

#[tokio::test]
async fn new_files_are_taken_and_broken_ones_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Authority::new());
    let metrics = ClusterMetrics::new();
    let paths = old.issue(&directory.path().join("node"), &["node-1"]);
    let files = open(&paths, &metrics);
    let node = links(Some(files.clone()));
    let of_old = links(Some(old.files(&directory.path().join("o"), &["o"])));
    let of_new = links(Some(new.files(&directory.path().join("n"), &["n"])));
    let works_with = async |peer: &Links| meet(&node, peer, Some("node-1")).await.1.is_ok();

    assert!(!files.look(), "nothing changed");
    assert!(works_with(&of_old).await && !works_with(&of_new).await);

    // A rotation that is half done, twice looked at: reported once, the old files serve.
    let key = std::fs::read(&paths[1]).unwrap();
    let other = new.issue(&directory.path().join("other"), &["node-1"]);
    std::fs::copy(&other[1], &paths[1]).unwrap();
    assert!(!files.look() && !files.look());
    assert_eq!(metrics.tls_reloads(), (0, 1));
    assert!(works_with(&of_old).await);
    for broken in [&b""[..], b"junk", b"-----BEGIN CERTIFICATE-----\n!!\n"] {
        std::fs::write(&paths[0], broken).unwrap();
        assert!(!files.look() && !files.look());
    }
    assert_eq!(metrics.tls_reloads(), (0, 4));
    std::fs::remove_file(&paths[2]).unwrap();
    assert!(!files.look() && !files.look());
    assert_eq!(metrics.tls_reloads(), (0, 5));
    assert!(works_with(&of_old).await);
    assert_ne!(key, std::fs::read(&paths[1]).unwrap());

    // Then it is done. The task that watches finds it.
    for (from, to) in other.iter().zip(&paths) {
        std::fs::copy(from, to).unwrap();
    }
    tokio::time::pause();
    let stop = CancellationToken::new();
    let watching = {
        let (files, stop) = (files.clone(), stop.clone());
        tokio::spawn(async move { files.watch(&stop).await })
    };
    while metrics.tls_reloads() != (1, 5) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    stop.cancel();
    watching.await.unwrap();
    tokio::time::resume();
    assert!(works_with(&of_new).await && !works_with(&of_old).await);
}

#[test]
fn files_that_are_no_good_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let paths = authority.issue(directory.path(), &["n"]);
    let other = authority.issue(&directory.path().join("other"), &["n"]);
    let try_open =
        |[cert, key, ca]: [&Path; 3]| TlsFiles::open(cert, key, ca, ClusterMetrics::new());
    let [cert, key, ca] = [&paths[0], &paths[1], &paths[2]].map(PathBuf::as_path);
    let missing = directory.path().join("missing");
    for (case, part) in [
        ([&missing, key, ca], "missing"),
        ([key, key, ca], "holds no certificate"),
        ([cert, cert, ca], "parse"),
        ([cert, key, key], "holds no certificate"),
        ([cert, other[1].as_path(), ca], "use"),
    ] {
        let error = try_open(case).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let files = try_open([cert, key, ca]).unwrap();
    let shown = format!("{files:?}");
    assert!(shown.contains("cert") && !shown.contains("PRIVATE"));
}

#[tokio::test]
async fn tonic_speaks_over_it() {
    use tonic::transport::{Endpoint, Server};

    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = |name: &str| authority.files(&directory.path().join(name), &[name]);
    let server = links(Some(files("server")));
    let client = links(Some(files("client")));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let incoming = futures::stream::once(async move {
        let (stream, _) = listener.accept().await.unwrap();
        Ok::<_, LinkError>(server.accept(stream).await.unwrap())
    });
    let stopped = stop.clone();
    // A service that answers nothing but that it does not know the method.
    let serving = tokio::spawn(
        Server::builder()
            .add_routes(tonic::service::Routes::default())
            .serve_with_incoming_shutdown(incoming, async move { stopped.cancelled().await }),
    );
    let channel = Endpoint::from_static("http://peer")
        .connect_with_connector(client.connector(address, Some("server")))
        .await
        .unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let method = tonic::codegen::http::uri::PathAndQuery::from_static("/none/None");
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let answer = grpc.unary(tonic::Request::new(()), method, codec).await;
    assert_eq!(answer.unwrap_err().code(), tonic::Code::Unimplemented);
    drop(grpc);
    stop.cancel();
    serving.await.unwrap().unwrap();
}
