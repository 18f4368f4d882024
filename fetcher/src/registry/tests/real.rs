// SPDX-License-Identifier: Apache-2.0
//! The client against Debian's `docker-registry`. The program must be there; only
//! `SLUICE_TEST_NO_REGISTRY=1` allows to go without, and then says so.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use bytes::Bytes;
use futures::stream;

use super::*;
use crate::registry::media::OCI_MANIFEST;
use crate::source::contract::{check_source, sample_blob};
use crate::source::{OriginSet, RegistryBlobSource};

const PROGRAM: &str = "/usr/bin/docker-registry";

/// A registry process with its folder; both end with it.
struct RealRegistry {
    process: Child,
    address: SocketAddr,
    _root: tempfile::TempDir,
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl RealRegistry {
    /// With a certificate and its key in PEM: TLS.
    fn start(tls: Option<(String, String)>) -> Self {
        for _ in 0..5 {
            if let Some(registry) = Self::try_start(tls.as_ref()) {
                return registry;
            }
        }
        panic!("{PROGRAM} does not start");
    }

    /// `None` when another process took the port in between.
    fn try_start(tls: Option<&(String, String)>) -> Option<Self> {
        let root = tempfile::Builder::new()
            .prefix("registry-real-")
            .tempdir_in("/tmp")
            .unwrap();
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            root.path().join("data").display()
        );
        let config = match tls {
            None => config,
            Some((certificate, key)) => {
                let [certificate_path, key_path] =
                    ["certificate.pem", "key.pem"].map(|name| root.path().join(name));
                std::fs::write(&certificate_path, certificate).unwrap();
                std::fs::write(&key_path, key).unwrap();
                let paths = (certificate_path.display(), key_path.display());
                format!(
                    "{config}  tls:
    certificate: {}
    key: {}
",
                    paths.0, paths.1
                )
            }
        };
        let path = root.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let mut process = Command::new(PROGRAM)
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("start {PROGRAM}: {error}; install docker-registry or set SLUICE_TEST_NO_REGISTRY=1"));
        for _ in 0..200 {
            if process.try_wait().unwrap().is_some() {
                return None;
            }
            if TcpStream::connect(address).is_ok() {
                return Some(RealRegistry {
                    process,
                    address,
                    _root: root,
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = process.kill();
        let _ = process.wait();
        None
    }
}

/// `None`, and says so, where the test is waived.
async fn start(tls: Option<(String, String)>) -> Option<RealRegistry> {
    if std::env::var_os("SLUICE_TEST_NO_REGISTRY").is_some_and(|value| value == "1") {
        println!("skipped: SLUICE_TEST_NO_REGISTRY=1");
        return None;
    }
    Some(
        tokio::task::spawn_blocking(move || RealRegistry::start(tls))
            .await
            .unwrap(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_registry_tls() {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = rcgen::CertifiedIssuer::self_signed(parameters, authority_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &authority)
        .unwrap();
    let Some(registry) = start(Some((leaf.pem(), key.serialize_pem()))).await else {
        return;
    };
    let host = registry.address.to_string();
    let place = Repository::new(&host, "team/app").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let authority_path = folder.path().join("ca.pem");
    std::fs::write(&authority_path, authority.pem()).unwrap();

    let with = |change: &dyn Fn(&mut HostOptions)| {
        let mut options = quick_options();
        let host_options = options.host_mut(&host);
        host_options.plain_http = Some(false);
        change(host_options);
        client(options)
    };
    let blob = BlobDigest::of(b"tls");
    let bytes = Bytes::from_static(b"tls");
    let stranger = with(&|_| {});
    let error = stranger
        .blob_size(&context(), &place, blob)
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::Certificate { .. }),
        "{error}"
    );
    assert_eq!(error.class(), crate::source::Class::Permanent);

    let trusting = with(&|host| host.ca_files = vec![authority_path.clone()]);
    trusting
        .push_blob(&context(), &place, blob, bytes.clone())
        .await
        .unwrap();
    let careless = with(&|host| host.insecure_skip_verify = true);
    assert_eq!(
        careless
            .blob_bytes(&context(), &place, blob, 10)
            .await
            .unwrap(),
        bytes
    );
    // Plain HTTP to a TLS port is refused by the registry; nothing is read.
    let plain = client(quick_options());
    let error = plain.blob_size(&context(), &place, blob).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Refused { status: 400, .. }),
        "{error}"
    );

    for (name, content) in [("missing.pem", None), ("empty.pem", Some("no certificate"))] {
        let path = folder.path().join(name);
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let mut options = RegistryOptions::default();
        options.host_mut(&host).ca_files.push(path);
        let error = RegistryClient::new(options, Arc::new(NoCredentials)).unwrap_err();
        assert!(
            matches!(error, RegistryError::Configuration { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_registry_push_pull_range_mount() {
    let Some(registry) = start(None).await else {
        return;
    };
    let options = RegistryOptions {
        upload_piece_bytes: 100_000,
        ..RegistryOptions::default()
    };
    let client = client(options);
    let host = registry.address.to_string();
    let place = Repository::new(&host, "team/app").unwrap();
    let context = context();

    // Push: in memory, and as a stream in pieces.
    let bytes = sample_blob();
    let blob = BlobDigest::of(&bytes);
    assert_eq!(
        client.blob_size(&context, &place, blob).await.unwrap(),
        None
    );
    let pieces: Vec<_> = bytes
        .chunks(77_777)
        .map(|piece| Ok::<_, String>(Bytes::copy_from_slice(piece)))
        .collect();
    client
        .push_stream(&context, &place, stream::iter(pieces), || blob)
        .await
        .unwrap();
    assert_eq!(
        client.blob_size(&context, &place, blob).await.unwrap(),
        Some(length(&bytes))
    );
    let config = Bytes::from_static(br#"{"architecture":"amd64","os":"linux"}"#);
    let config_blob = BlobDigest::of(&config);
    client
        .push_blob(&context, &place, config_blob, config.clone())
        .await
        .unwrap();
    let refused = client
        .push_blob(&context, &place, BlobDigest::of(b"no"), config.clone())
        .await;
    assert!(matches!(
        refused.unwrap_err(),
        RegistryError::Refused { status: 400, .. }
    ));

    // Manifest: put, resolve, get, tag.
    let json = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_blob}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{blob}","size":{}}}]}}"#,
        config.len(),
        bytes.len()
    );
    let tagged = place.tagged("v1").unwrap();
    let digest = client
        .put_manifest(&context, &tagged, OCI_MANIFEST, Bytes::from(json))
        .await
        .unwrap();
    assert_eq!(
        client.resolve(&context, &tagged).await.unwrap().digest,
        digest
    );
    let manifest = client
        .manifest(&context, &place.with_digest(digest))
        .await
        .unwrap();
    assert!(matches!(manifest.parse().unwrap(), ManifestBody::Image(_)));
    assert_eq!(client.tag(&context, &tagged, "v2").await.unwrap(), digest);
    let absent = client
        .resolve(&context, &place.tagged("none").unwrap())
        .await;
    assert!(matches!(
        absent.unwrap_err(),
        RegistryError::NotFound { .. }
    ));

    // Pull: whole, verified, ranges by the contract.
    let whole = client
        .blob(&context, &place, blob, length(&bytes))
        .await
        .unwrap();
    assert_eq!(whole.collect(u64::MAX).await.unwrap(), bytes);
    assert_eq!(
        client
            .blob_bytes(&context, &place, config_blob, 4096)
            .await
            .unwrap(),
        config
    );
    let policy = client.options().retry.clone();
    let origins = OriginSet::new([place.clone()]);
    let source = RegistryBlobSource::new(client.clone(), blob, length(&bytes), origins, policy);
    check_source(Arc::new(source), &bytes).await;
    assert!(!client.ignores_ranges(&place, blob));

    // Mount: from a repository that has it, and from one that has not.
    let other = Repository::new(&host, "team/other").unwrap();
    let outcome = client
        .mount_blob(&context, &other, &place, blob)
        .await
        .unwrap();
    assert!(matches!(outcome, MountOutcome::Mounted), "{outcome:?}");
    assert_eq!(
        client.blob_size(&context, &other, blob).await.unwrap(),
        Some(length(&bytes))
    );
    let new = Bytes::from_static(b"known nowhere yet");
    let new_blob = BlobDigest::of(&new);
    let outcome = client
        .mount_blob(&context, &other, &place, new_blob)
        .await
        .unwrap();
    let MountOutcome::Upload(mut upload) = outcome else {
        panic!("{outcome:?}")
    };
    upload.write(&context, new).await.unwrap();
    upload.finish(&context, new_blob).await.unwrap();
    assert!(
        client
            .blob_size(&context, &other, new_blob)
            .await
            .unwrap()
            .is_some()
    );
}

/// Debian's registry lists no referrers: they stand in the index under the tag.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_registry_referrers() {
    let Some(registry) = start(None).await else {
        return;
    };
    let client = client(RegistryOptions::default());
    let place = Repository::new(&registry.address.to_string(), "team/app").unwrap();
    let context = context();
    let config = Bytes::from_static(b"{}");
    let config_blob = BlobDigest::of(&config);
    client
        .push_blob(&context, &place, config_blob, config)
        .await
        .unwrap();
    let subject = sluice_blockindex::digest::ManifestDigest::of(b"an image");
    let referrer = |artifact_type: &str, name: &str| {
        let annotations = std::collections::BTreeMap::from([("name".to_owned(), name.to_owned())]);
        let empty = serde_json::json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": config_blob.to_string(), "size": 2});
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": artifact_type,
            "config": empty, "layers": [empty], "annotations": annotations,
            "subject": {"mediaType": OCI_MANIFEST, "digest": subject.to_string(), "size": 8},
        });
        NewReferrer {
            bytes: Bytes::from(manifest.to_string()),
            media_type: OCI_MANIFEST.to_owned(),
            artifact_type: artifact_type.to_owned(),
            annotations,
            subject,
        }
    };
    let list = |of_type: &'static str| {
        let (client, context, place) = (&client, &context, &place);
        async move {
            let found = client.referrers(context, place, subject, of_type).await;
            found.unwrap()
        }
    };
    assert_eq!(list("a/ours").await, []);
    for (of_type, name) in [("a/ours", "1"), ("a/others", "2"), ("a/ours", "3")] {
        let new = referrer(of_type, name);
        let put = client.put_referrer(&context, &place, &new, |_| true).await;
        assert_eq!(put.unwrap(), Listed::ByTag);
    }
    let ours = list("a/ours").await;
    assert_eq!(
        ours.len(),
        1,
        "the later one took the place of the earlier one"
    );
    assert_eq!(ours[0].annotations["name"], "3");
    assert_eq!(list("a/others").await.len(), 1);
    let manifest = client
        .manifest(&context, &place.with_digest(ours[0].digest))
        .await
        .unwrap();
    assert_eq!(manifest.bytes, referrer("a/ours", "3").bytes);
}
