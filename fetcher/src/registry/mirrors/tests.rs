// SPDX-License-Identifier: Apache-2.0
//! Mirrors and a stand-in for Dragonfly's daemon, as fake registries.

use std::path::Path;

use bytes::Bytes;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::super::fake::{Access, FakeRegistry, Misbehaviour, Seen};
use super::super::media::OCI_MANIFEST;
use super::super::options::{DragonflyOptions, MirrorOptions};
use super::super::{Credential, NoCredentials, RegistryClient, Secret, StaticCredentials, hosts};
use super::*;
use crate::source::contract::{check_source, sample_blob};
use crate::source::{
    BlobSource, OriginSet, Priority, RegistryBlobSource, RetryPolicy, SourceError, SourceKind,
    read_checked,
};

mod tls;

/// A registry with a blob, and mirrors that have it too.
struct Rig {
    origin: FakeRegistry,
    mirrors: Vec<FakeRegistry>,
    files: tempfile::TempDir,
    bytes: Bytes,
    blob: BlobDigest,
}

impl Rig {
    async fn new(mirrors: usize, bytes: Bytes) -> Self {
        let origin = FakeRegistry::start().await;
        let blob = origin.add_blob("team/app", bytes.clone());
        let mut rig = Rig {
            origin,
            mirrors: Vec::new(),
            files: tempfile::tempdir().unwrap(),
            bytes,
            blob,
        };
        for _ in 0..mirrors {
            let mirror = FakeRegistry::start().await;
            mirror.add_blob("team/app", rig.bytes.clone());
            rig.mirrors.push(mirror);
        }
        rig.write(&rig.hosts(""));
        rig
    }

    /// A file with all mirrors, each with these further lines.
    fn hosts(&self, further: &str) -> String {
        let of =
            |mirror: &FakeRegistry| format!("[host.\"http://{}\"]\n{further}\n", mirror.host());
        self.mirrors.iter().map(of).collect()
    }

    fn write(&self, text: &str) {
        write(self.files.path(), &self.origin.host(), text);
    }

    fn options(&self) -> RegistryOptions {
        RegistryOptions {
            retry: RetryPolicy {
                base: Duration::from_millis(2),
                max_attempts: 3,
                ..RetryPolicy::default()
            },
            mirrors: MirrorOptions {
                directories: vec![self.files.path().to_owned()],
                // Long enough for a machine that is busy with other tests.
                patience: Duration::from_secs(1),
                stall: Duration::from_secs(1),
                look_every: Duration::from_millis(20),
                ..MirrorOptions::default()
            },
            ..RegistryOptions::default()
        }
    }

    fn client(&self) -> RegistryClient {
        RegistryClient::new(self.options(), Arc::new(NoCredentials)).unwrap()
    }

    fn place(&self) -> Repository {
        self.origin.place("team/app")
    }

    fn source(&self, client: &RegistryClient) -> RegistryBlobSource {
        let places = OriginSet::new([self.place()]);
        let policy = client.options().retry.clone();
        RegistryBlobSource::new(client.clone(), self.blob, self.size(), places, policy)
    }

    fn size(&self) -> u64 {
        u64::try_from(self.bytes.len()).unwrap()
    }

    /// What each was asked since the last call: the mirrors in order, then the registry.
    fn seen(&self) -> Vec<Vec<Seen>> {
        let all = self.mirrors.iter().chain([&self.origin]);
        all.map(FakeRegistry::take_seen).collect()
    }

    fn counts(&self) -> Vec<usize> {
        self.seen().iter().map(Vec::len).collect()
    }
}

fn write(files: &Path, host: &str, text: &str) {
    let directory = files.join(host);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
}

fn context(priority: Priority) -> ReadContext {
    ReadContext::new(priority).with_timeout(Duration::from_secs(20))
}

fn foreground() -> ReadContext {
    context(Priority::Foreground)
}

fn extent(start: u64, end: u64) -> Extent<BlobSpace> {
    Extent::new(start, end).unwrap()
}

async fn read(
    source: &RegistryBlobSource,
    wanted: Extent<BlobSpace>,
) -> Result<(Bytes, SourceKind), SourceError> {
    let stream = source.open(&foreground(), wanted).await?.narrow(wanted)?;
    let by = stream
        .served
        .as_ref()
        .map_or(SourceKind::Origin, |it| it.kind());
    Ok((stream.collect(u64::MAX).await?, by))
}

#[tokio::test]
async fn contract_registry_with_a_mirror() {
    let rig = Rig::new(1, sample_blob()).await;
    check_source(Arc::new(rig.source(&rig.client())), &rig.bytes).await;
    assert_eq!(rig.counts()[1], 0, "the registry itself was asked");
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_are_told_whom_they_stand_for() {
    let rig = Rig::new(2, sample_blob()).await;
    let first = FakeRegistry::start().await;
    let file = format!(
        "[host.\"http://{}/cache\"]\n{}",
        first.host(),
        rig.hosts("")
    );
    rig.write(&file);
    let source = rig.source(&rig.client());
    for number in 0..2 {
        let wanted = extent(number * 100, number * 100 + 50);
        let (bytes, by) = read(&source, wanted).await.unwrap();
        let start = usize::try_from(wanted.start()).unwrap();
        assert_eq!(bytes, rig.bytes.slice(start..start + 50));
        assert_eq!(by, SourceKind::Mirror);
    }
    // What it lacks it is not asked for again.
    let asked = first.take_seen();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(
        asked[0].path,
        format!("/cache/v2/team/app/blobs/{}", rig.blob)
    );
    let namespace = format!("ns={}", rig.origin.host().replace(':', "%3A"));
    assert_eq!(asked[0].query, namespace);
    let seen = rig.seen();
    assert_eq!(seen[0].len(), 2);
    assert_eq!(seen[0][0].query, namespace);
    assert_eq!(seen[0][0].range.as_deref(), Some("bytes=0-49"));
    assert_eq!((seen[1].len(), seen[2].len()), (0, 0));
}

#[tokio::test]
async fn a_mirror_that_fails_is_left_alone_and_the_registry_serves() {
    let retry_after = || Some("3600".to_owned());
    let cases = [
        (Misbehaviour::Status(500, None), true),
        (Misbehaviour::Status(503, retry_after()), true),
        (Misbehaviour::Status(429, retry_after()), true),
        (Misbehaviour::Status(404, None), false),
        (Misbehaviour::Status(403, None), false),
        (Misbehaviour::Status(401, None), false),
        (Misbehaviour::Status(400, None), true),
        (Misbehaviour::Status(301, None), true),
        (Misbehaviour::Redirect("file:///etc/passwd".into()), true),
        (Misbehaviour::NoAnswer, true),
        (Misbehaviour::LostAnswer, true),
        (Misbehaviour::ShiftedRange, true),
        (Misbehaviour::ShortLength(1), true),
        (Misbehaviour::CutBody(100), true),
        (Misbehaviour::StallBody(100), true),
        (Misbehaviour::SlowBody(1, Duration::from_millis(20)), true),
    ];
    for (what, left_alone) in cases {
        let rig = Rig::new(1, sample_blob()).await;
        let name = format!("{what:?}");
        rig.mirrors[0].misbehave("GET", "/blobs/", 0, u32::MAX, what);
        let client = rig.client();
        let source = rig.source(&client);
        let began = std::time::Instant::now();
        let wanted = extent(1000, 3000);
        let (bytes, _) = read(&source, wanted).await.unwrap();
        assert_eq!(bytes, rig.bytes.slice(1000..3000), "{name}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{name}: {took:?}");
        let counts = rig.counts();
        assert_eq!(counts, [1, 1], "{name}");
        // The next one does not ask it.
        let (_, by) = read(&source, wanted).await.unwrap();
        assert_eq!(by, SourceKind::Origin, "{name}");
        assert_eq!(rig.counts(), [0, 1], "{name}");
        let metrics = &client.inner.mirrors.metrics;
        let pauses = metrics.pauses(SourceKind::Mirror);
        assert_eq!(pauses, u64::from(left_alone), "{name}");
    }
}

#[tokio::test]
async fn nobody_at_a_mirrors_address_costs_nothing() {
    let rig = Rig::new(0, sample_blob()).await;
    let gone = FakeRegistry::start().await.host();
    rig.write(&format!("[host.\"http://{gone}\"]\n"));
    let client = rig.client();
    let (bytes, by) = read(&rig.source(&client), extent(5, 6)).await.unwrap();
    assert_eq!((bytes, by), (rig.bytes.slice(5..6), SourceKind::Origin));
    let metrics = &client.inner.mirrors.metrics;
    let failed = metrics.failures(SourceKind::Mirror, Class::Transient);
    let asked = metrics.requests(SourceKind::Mirror, Priority::Foreground);
    assert_eq!((failed, asked), (1, 1));
}

#[tokio::test]
async fn a_caller_that_leaves_a_silent_mirror_notes_it() {
    let rig = Rig::new(1, sample_blob()).await;
    rig.mirrors[0].misbehave("", "", 0, u32::MAX, Misbehaviour::NoAnswer);
    let mut options = rig.options();
    options.mirrors.patience = Duration::from_millis(100);
    let client = RegistryClient::new(options, Arc::new(NoCredentials)).unwrap();
    let place = rig.place();
    let context = foreground();
    let mirrors = &client.inner.mirrors;
    let endpoints = mirrors.of(&context, place.host()).await.unwrap();
    let at = &endpoints.mirrors[0];
    let attempt = Attempt::begin(mirrors, at, &place, Some(rig.blob));
    drop(attempt);
    assert!(mirrors.admits(at, &place, Some(rig.blob), false));
    let attempt = Attempt::begin(mirrors, at, &place, Some(rig.blob));
    tokio::time::sleep(Duration::from_millis(110)).await;
    drop(attempt);
    assert!(!mirrors.admits(at, &place, Some(rig.blob), false));
}

#[tokio::test]
async fn a_mirror_that_gives_blobs_only_whole_is_for_those_who_can_wait() {
    let size = usize::try_from(LET_PASS).unwrap() + 100_000;
    let bytes: Vec<u8> = (0..size)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    let rig = Rig::new(1, bytes.into()).await;
    rig.mirrors[0].misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::IgnoreRange);
    let client = rig.client();
    let source = rig.source(&client);
    let late = extent(LET_PASS + 10, LET_PASS + 20);
    for expected in [[1, 1], [0, 1]] {
        let (part, by) = read(&source, late).await.unwrap();
        assert_eq!((part.len(), by), (10, SourceKind::Origin));
        assert_eq!(rig.counts(), expected);
    }
    // What comes soon, and who does not wait, takes it whole, again and again: it may give ranges by then.
    for (wanted, priority) in [
        (extent(10, 20), Priority::Foreground),
        (late, Priority::Background),
        (late, Priority::Background),
    ] {
        let stream = source.open(&context(priority), wanted).await.unwrap();
        assert_eq!(stream.extent, extent(0, rig.size()));
        assert_eq!(stream.served.as_ref().unwrap().kind(), SourceKind::Mirror);
        assert_eq!(stream.collect(u64::MAX).await.unwrap(), rig.bytes);
        let seen = rig.seen();
        assert_eq!((seen[0].len(), seen[1].len()), (1, 0));
        assert!(seen[0][0].range.is_some());
    }
    assert!(!source.whole_blob_only());
}

const LET_PASS: u64 = 4 << 20;

#[tokio::test]
async fn wrong_bytes_of_a_mirror_are_read_elsewhere() {
    let rig = Rig::new(2, sample_blob()).await;
    for mirror in &rig.mirrors {
        mirror.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::FlipByte);
    }
    let client = rig.client();
    let source = rig.source(&client);
    let wanted = extent(100, 200);
    let right = rig.bytes.slice(100..200);
    let check = |bytes: &[u8]| if bytes == right { Ok(()) } else { Err("wrong") };
    let bytes = read_checked(&source, &foreground(), wanted, check).await;
    assert_eq!(bytes.unwrap().unwrap(), right);
    assert_eq!(rig.counts(), [1, 1, 1], "each mirror was blamed once");
    let refuse = |_: &[u8]| Err::<(), _>("never right");
    let refused = read_checked(&source, &foreground(), wanted, refuse).await;
    assert_eq!(refused.unwrap(), Err("never right"));
    assert_eq!(rig.counts(), [0, 0, 1]);

    // A whole blob is checked on its way.
    let client = rig.client();
    let source = rig.source(&client);
    let whole = extent(0, rig.size());
    for mirror in 0..2 {
        match read(&source, whole).await {
            Err(SourceError::DigestMismatch { expected, .. }) => assert_eq!(expected, rig.blob),
            other => panic!("mirror {mirror}: {other:?}"),
        }
    }
    let (bytes, by) = read(&source, whole).await.unwrap();
    assert_eq!((bytes, by), (rig.bytes.clone(), SourceKind::Origin));
}

fn password(username: &str, password: &str) -> Credential {
    Credential::Password {
        username: username.into(),
        password: Secret::new(password),
    }
}

fn authorizations(seen: &[Seen]) -> Vec<&str> {
    seen.iter()
        .filter_map(|it| it.authorization.as_deref())
        .collect()
}

#[tokio::test]
async fn each_is_shown_its_own_credentials_and_headers_only() {
    let rig = Rig::new(1, sample_blob()).await;
    let mirror = &rig.mirrors[0];
    let bearer = |username: &str| Access::Bearer {
        password: Some((username.to_owned(), "p".into())),
        identity: None,
        expires_in: 300,
        refusal: 401,
    };
    rig.origin.set_access(bearer("of-origin"));
    mirror.set_access(bearer("of-mirror"));
    mirror.set_redirects(true);
    rig.write(&rig.hosts("header = { x-site = \"secret\" }"));
    let credentials = StaticCredentials::default()
        .with(&rig.origin.host(), password("of-origin", "p"))
        .with(&mirror.host(), password("of-mirror", "p"));
    let client = RegistryClient::new(rig.options(), Arc::new(credentials)).unwrap();
    let source = rig.source(&client);
    let (_, by) = read(&source, extent(0, 10)).await.unwrap();
    assert_eq!(by, SourceKind::Mirror);
    let seen = rig.seen();
    assert_eq!(seen[1], [], "the registry was asked");
    // base64 of `of-mirror:p`
    let own = ["Basic b2YtbWlycm9yOnA=", "Bearer token-1"];
    assert_eq!(authorizations(&seen[0]), own);
    let (storage, api): (Vec<_>, Vec<_>) = seen[0].iter().partition(|it| it.storage);
    assert_eq!(storage.len(), 1);
    assert_eq!(
        (
            storage[0].header("x-site"),
            storage[0].authorization.as_deref()
        ),
        (None, None),
        "a redirect leads elsewhere"
    );
    for request in api {
        let expected = (request.path != "/token").then_some("secret");
        assert_eq!(request.header("x-site"), expected, "{}", request.path);
    }
    mirror.misbehave("", "/blobs/", 0, u32::MAX, Misbehaviour::Status(500, None));
    let another = rig.origin.add_blob("team/app", "another");
    let places = OriginSet::new([rig.place()]);
    let source = RegistryBlobSource::once(client.clone(), another, 7, places);
    read(&source, extent(0, 7)).await.unwrap();
    let seen = rig.seen();
    assert_eq!(authorizations(&seen[0]), ["Bearer token-1"]);
    assert_eq!(
        authorizations(&seen[1]),
        // base64 of `of-origin:p`
        ["Basic b2Ytb3JpZ2luOnA=", "Bearer token-1"]
    );
    assert!(seen[1].iter().all(|it| it.header("x-site").is_none()));
}

#[tokio::test]
async fn a_file_is_read_again_when_it_changes_and_counts_for_nothing_when_wrong() {
    let rig = Rig::new(2, sample_blob()).await;
    let client = rig.client();
    let source = rig.source(&client);
    let only = |number: usize| format!("[host.\"http://{}\"]\n", rig.mirrors[number].host());
    let cases = [
        (only(0), [1, 0, 0]),
        (only(1), [0, 1, 0]),
        ("server = 1\n".to_owned(), [0, 0, 1]),
        (format!("{}ca = \"missing.pem\"\n", only(0)), [0, 0, 1]),
        (format!("{}client = \"missing.pem\"\n", only(0)), [0, 0, 1]),
        (
            format!("{}capabilities = [\"resolve\"]\n", only(0)),
            [0, 0, 1],
        ),
        (only(0), [1, 0, 0]),
        (String::new(), [0, 0, 1]),
        (
            format!("server = \"http://{}\"\n", rig.mirrors[1].host()),
            [0, 1, 0],
        ),
        (
            format!("server = \"http://{}\"\n", rig.origin.host()),
            [0, 0, 1],
        ),
        (
            format!("[host.\"http://{}\"]\n", rig.origin.host()),
            [0, 0, 1],
        ),
    ];
    for (number, (text, expected)) in cases.into_iter().enumerate() {
        // A length of its own: the clock of files may be coarse.
        rig.write(&format!("{text}{}\n", "#".repeat(number)));
        let mut counts = vec![];
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(25)).await;
            read(&source, extent(0, 5)).await.unwrap();
            counts = rig.counts();
            if counts == expected {
                break;
            }
        }
        assert_eq!(counts, expected, "{text}");
    }
}

#[tokio::test]
async fn tags_are_asked_of_those_who_may_say_what_they_stand_for() {
    let rig = Rig::new(1, sample_blob()).await;
    let manifest = br#"{"schemaVersion":2,"layers":[]}"#.as_slice();
    let digest = rig
        .origin
        .add_manifest("team/app", "1", OCI_MANIFEST, manifest);
    rig.mirrors[0].add_manifest("team/app", "1", OCI_MANIFEST, manifest);
    let by_tag = rig.place().tagged("1").unwrap();
    let by_digest = rig.place().with_digest(digest);
    let all = ["GET", "HEAD"];
    for (capabilities, reference, expected) in [
        ("[\"pull\"]", &by_tag, [0, 1]),
        ("[\"pull\"]", &by_digest, [1, 0]),
        ("[\"pull\", \"resolve\"]", &by_tag, [1, 0]),
        ("[\"resolve\"]", &by_digest, [0, 1]),
    ] {
        rig.write(&rig.hosts(&format!("capabilities = {capabilities}")));
        let client = rig.client();
        for method in all {
            let found = match method {
                "GET" => {
                    client
                        .manifest(&foreground(), reference)
                        .await
                        .unwrap()
                        .digest
                }
                _ => {
                    client
                        .resolve(&foreground(), reference)
                        .await
                        .unwrap()
                        .digest
                }
            };
            assert_eq!(found, digest);
            assert_eq!(
                rig.counts(),
                expected,
                "{capabilities} {reference} {method}"
            );
        }
    }
    // Mirrors that are down, lack it or lie do not hide it.
    for what in [
        Misbehaviour::Status(500, None),
        Misbehaviour::Status(404, None),
        Misbehaviour::Status(401, None),
        Misbehaviour::NoAnswer,
        Misbehaviour::FlipByte,
        Misbehaviour::CutBody(3),
    ] {
        let name = format!("{what:?}");
        rig.mirrors[0].behave();
        rig.mirrors[0].misbehave("", "/manifests/", 0, u32::MAX, what);
        rig.write(&rig.hosts(""));
        for reference in [&by_digest, &by_tag] {
            let found = rig.client().manifest(&foreground(), reference).await;
            assert_eq!(found.unwrap().bytes, manifest, "{name}");
            assert_eq!(rig.counts(), [1, 1], "{name}");
        }
    }
}

#[tokio::test]
async fn what_leads_to_the_nodes_own_mirror_is_left_out() {
    let cases = [
        ("127.0.0.1:9642", "http://127.0.0.1:9642/v2", true),
        ("127.0.0.1:9642", "http://localhost:9642/v2", true),
        ("127.0.0.1:9642", "http://[::1]:9642/v2", true),
        ("127.0.0.1:9642", "http://127.0.0.1:9643/v2", false),
        ("127.0.0.1:9642", "http://192.0.2.1:9642/v2", false),
        ("192.0.2.1:9642", "http://192.0.2.1:9642/v2", true),
        ("192.0.2.1:9642", "http://127.0.0.1:9642/v2", false),
        ("0.0.0.0:9642", "http://127.0.0.1:9642/v2", true),
        ("0.0.0.0:9642", "http://192.0.2.1:9642/v2", false),
        ("[::]:9642", "http://localhost:9642/v2", true),
        ("127.0.0.1:80", "http://127.0.0.1/v2", true),
        ("127.0.0.1:9642", "http://mirror.example:9642/v2", false),
    ];
    for (own, url, expected) in cases {
        let mut options = RegistryOptions::default();
        options.mirrors.own = Some(own.parse().unwrap());
        let mirrors = Mirrors::new(Arc::new(options), Metrics::new());
        let url = Url::parse(url).unwrap();
        assert_eq!(mirrors.is_own(&url), expected, "{own} {url}");
    }
    // Also as a server, and the file's other mirrors count.
    let rig = Rig::new(2, sample_blob()).await;
    let mut options = rig.options();
    options.mirrors.own = Some(rig.mirrors[0].host().parse().unwrap());
    let own = format!("server = \"http://{}\"\n", rig.mirrors[0].host());
    for (text, expected) in [(rig.hosts(""), [0, 1, 0]), (own, [0, 0, 1])] {
        rig.write(&text);
        let client = RegistryClient::new(options.clone(), Arc::new(NoCredentials)).unwrap();
        read(&rig.source(&client), extent(0, 5)).await.unwrap();
        assert_eq!(rig.counts(), expected, "{text}");
    }
}

#[test]
fn the_files_of_setup_mirror_are_understood() {
    // What `sluice setup mirror` writes for a registry.
    let text = "# written\nserver = \"https://r.example\"\n\n[host.\"http://127.0.0.1:9642\"]\n  capabilities = [\"pull\", \"resolve\"]\n";
    let parsed = hosts::parse(text, Path::new("/x")).unwrap();
    let mut options = RegistryOptions::default();
    options.mirrors.own = Some("127.0.0.1:9642".parse().unwrap());
    let mirrors = Mirrors::new(Arc::new(options), Metrics::new());
    assert!(mirrors.is_own(&parsed.mirrors[0].base));
}

#[tokio::test(start_paused = true)]
async fn one_request_tries_what_had_failed() {
    let options = Arc::new(RegistryOptions::default());
    let mirrors = Mirrors::new(Arc::clone(&options), Metrics::new());
    let mut at = Endpoint::origin(&options, "m.example").unwrap();
    at.kind = SourceKind::Mirror;
    let place = Repository::new("r.example", "app").unwrap();
    let admits = || mirrors.admits(&at, &place, None, false);
    assert!(admits() && admits());
    let began = clock::now();
    tokio::time::advance(Duration::from_millis(1)).await;
    mirrors.failed(&at, "x", None, began);
    // What failed at the same time is one failure.
    mirrors.failed(&at, "x", None, began);
    assert!(!admits());
    let pause = options.mirrors.first_pause;
    tokio::time::advance(pause).await;
    assert_eq!([admits(), admits()], [true, false]);
    // The one that tries may never say what came of it.
    tokio::time::advance(PROBE).await;
    assert_eq!([admits(), admits()], [true, false]);
    mirrors.failed(&at, "x", None, clock::now());
    tokio::time::advance(pause).await;
    assert!(!admits(), "the second pause is longer");
    tokio::time::advance(pause).await;
    assert!(admits());
    mirrors.succeeded(&at);
    assert!(admits() && admits());
    // Pauses that are asked for count, within bounds.
    mirrors.failed(&at, "x", Some(Duration::from_secs(86_400)), clock::now());
    tokio::time::advance(Duration::from_secs(59)).await;
    assert!(!admits());
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(admits());
    assert_eq!(mirrors.metrics.pauses(SourceKind::Mirror), 2);
}

fn with_dragonfly(rig: &Rig, daemon: &FakeRegistry) -> RegistryOptions {
    let endpoint = Url::parse(&format!("http://{}", daemon.host())).unwrap();
    let mut options = rig.options();
    options.mirrors.dragonfly = Some(DragonflyOptions {
        application: "sluice".into(),
        tag: "t1".into(),
        patience: Duration::from_secs(1),
        ..DragonflyOptions::new(endpoint)
    });
    options
}

#[tokio::test]
async fn dragonfly_is_asked_first_and_for_parts_of_blobs_only() {
    let rig = Rig::new(1, sample_blob()).await;
    let daemon = FakeRegistry::start().await;
    daemon.add_blob("team/app", rig.bytes.clone());
    let access = Access::Bearer {
        password: Some(("of-origin".into(), "p".into())),
        identity: None,
        expires_in: 300,
        refusal: 401,
    };
    // The registry's refusal comes through the daemon, and so does what we show.
    daemon.set_access(access);
    let credentials =
        StaticCredentials::default().with(&rig.origin.host(), password("of-origin", "p"));
    let options = with_dragonfly(&rig, &daemon);
    let client = RegistryClient::new(options, Arc::new(credentials)).unwrap();
    let source = rig.source(&client);
    let (bytes, by) = read(&source, extent(10, 30)).await.unwrap();
    assert_eq!(
        (bytes, by),
        (rig.bytes.slice(10..30), SourceKind::Dragonfly)
    );
    let seen = daemon.take_seen();
    let asked = seen.last().unwrap();
    assert_eq!(asked.path, format!("/v2/team/app/blobs/{}", rig.blob));
    assert_eq!(asked.range.as_deref(), Some("bytes=10-29"));
    let registry = format!("http://{}", rig.origin.host());
    for (name, value) in [
        ("x-dragonfly-registry", registry.as_str()),
        ("x-dragonfly-use-p2p", "true"),
        ("x-dragonfly-application", "sluice"),
        ("x-dragonfly-tag", "t1"),
        ("authorization", "Bearer token-1"),
    ] {
        assert_eq!(asked.header(name), Some(value), "{name}");
    }
    assert_eq!(rig.counts(), [0, 0]);

    let manifest = br#"{"schemaVersion":2,"layers":[]}"#.as_slice();
    let digest = rig
        .origin
        .add_manifest("team/app", "1", OCI_MANIFEST, manifest);
    let by_digest = rig.place().with_digest(digest);
    client.manifest(&foreground(), &by_digest).await.unwrap();
    assert_eq!(daemon.take_seen(), []);
    rig.seen();

    // Its errors: dfdaemon answers 500 with X-Dragonfly-Error-Type.
    daemon.misbehave("", "/blobs/", 0, u32::MAX, Misbehaviour::Status(500, None));
    for expected in [1, 0] {
        let (_, by) = read(&source, extent(10, 30)).await.unwrap();
        assert_eq!(by, SourceKind::Mirror);
        assert_eq!(daemon.take_seen().len(), expected);
        assert_eq!(rig.counts(), [1, 0]);
    }
    let metrics = &client.inner.mirrors.metrics;
    assert_eq!(metrics.pauses(SourceKind::Dragonfly), 1);
}

#[tokio::test]
async fn without_dragonflys_daemon_reads_go_on() {
    let rig = Rig::new(0, sample_blob()).await;
    let daemon = FakeRegistry::start().await;
    let options = with_dragonfly(&rig, &daemon);
    drop(daemon);
    let client = RegistryClient::new(options, Arc::new(NoCredentials)).unwrap();
    check_source(Arc::new(rig.source(&client)), &rig.bytes).await;
}
