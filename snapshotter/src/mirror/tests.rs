// SPDX-License-Identifier: Apache-2.0
//! The mirror over HTTP, in front of a registry that misbehaves.

use std::collections::BTreeMap;

use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::blob_cache::{BlobCacheOptions, BlobMetrics};
use sluice_fetcher::registry::fake::{Access, FakeRegistry, Misbehaviour};
use sluice_fetcher::registry::{NoCredentials, RegistryOptions};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const ACCEPT: &str = "Accept: application/vnd.oci.image.manifest.v1+json\r\n";

/// An answer as it came.
#[derive(Debug)]
struct Got {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
    /// As long as its `Content-Length` says.
    complete: bool,
}

struct Site {
    registry: FakeRegistry,
    mirror: Mirror,
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<()>,
    _directory: TempDir,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.cancel();
        self.server.abort();
    }
}

impl Site {
    async fn new(times: &str) -> Self {
        let registry = FakeRegistry::start().await;
        let directory = tempfile::tempdir().unwrap();
        let text =
            format!("[mirror]\nlisten = \"127.0.0.1:1\"\nregistries = [\"127.0.0.1:*\"]\n{times}");
        let config = crate::config::Config::parse(
            &text,
            std::path::Path::new("test"),
            crate::config::Overrides::default(),
        );
        let options = BlobCacheOptions {
            directory: directory.path().to_owned(),
            budget_bytes: 1 << 30,
            stall: Duration::from_secs(20),
        };
        let stop = CancellationToken::new();
        let mut fast = RegistryOptions::default();
        fast.retry.max_attempts = 1;
        let parts = MirrorParts {
            client: RegistryClient::new(fast, Arc::new(NoCredentials)).unwrap(),
            blobs: BlobCache::open(options, BlobMetrics::default()).unwrap(),
            nodes: Arc::new(|_| None),
            metrics: MirrorMetrics::default(),
            key: [7; 32],
            stop: stop.clone(),
        };
        let mirror = Mirror::new(&config.unwrap().mirror.unwrap(), parts);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = mirror.clone();
        let server = tokio::spawn(async move { serve::serve(&serving, listener).await });
        Site {
            registry,
            mirror,
            address,
            stop,
            server,
            _directory: directory,
        }
    }

    /// One request to the mirror, of the fake registry; `headers` end with CRLF each.
    async fn ask(&self, method: &str, path: &str, headers: &str) -> Got {
        let path = format!("{path}?ns={}", self.registry.host());
        self.ask_plainly(method, &path, headers).await
    }

    async fn ask_plainly(&self, method: &str, path: &str, headers: &str) -> Got {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        let read = stream.read_to_end(&mut all);
        // A cut connection may be a reset: what came before counts.
        let _ = tokio::time::timeout(Duration::from_secs(60), read)
            .await
            .unwrap();
        let split = all.windows(4).position(|it| it == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(all[..split].to_vec()).unwrap();
        let mut lines = head.lines();
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let pairs = lines.filter_map(|line| line.split_once(": "));
        let headers: BTreeMap<_, _> = pairs
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let body = all[split + 4..].to_vec();
        let length = headers.get("content-length").and_then(|it| it.parse().ok());
        let complete = length.is_none_or(|length: usize| length == body.len() || method == "HEAD");
        Got {
            status,
            headers,
            body,
            complete,
        }
    }

    fn manifest(&self, name: &str, tag: &str, text: &str) -> BlobDigest {
        let bytes = text.as_bytes().to_vec();
        let digest = self.registry.add_manifest(name, tag, MANIFEST, bytes);
        BlobDigest::from_bytes(*digest.as_bytes())
    }

    fn count(&self, kind: Kind, outcome: Outcome) -> u64 {
        self.mirror.metrics().requests(kind, outcome)
    }

    /// The registry cannot be asked any more.
    fn break_registry(&self) {
        self.registry
            .misbehave("", "", 0, u32::MAX, Misbehaviour::Status(503, None));
    }
}

fn bytes(length: usize) -> Bytes {
    (0..length)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect()
}

fn basic(credential: &str) -> String {
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(credential);
    format!("Authorization: Basic {encoded}\r\n")
}

#[tokio::test]
async fn a_pull_is_served_and_repeated_without_the_registry() {
    let site = Site::new("").await;
    let digest = site.manifest("a/b", "1", "{\"v\":1}");
    let blob = bytes(3 << 20);
    let layer = site.registry.add_blob("a/b", blob.clone());
    assert_eq!(site.ask("GET", "/v2/", "").await.status, 200);
    for round in 0..2 {
        let head = site.ask("HEAD", "/v2/a/b/manifests/1", ACCEPT).await;
        assert_eq!((head.status, head.body.len()), (200, 0));
        assert_eq!(head.headers["docker-content-digest"], digest.to_string());
        assert_eq!(head.headers["content-type"], MANIFEST);
        assert_eq!(head.headers["content-length"], "7");
        let path = format!("/v2/a/b/manifests/{digest}");
        assert_eq!(site.ask("GET", &path, ACCEPT).await.body, b"{\"v\":1}");
        let path = format!("/v2/a/b/blobs/{layer}");
        let whole = site.ask("GET", &path, "").await;
        assert!(whole.status == 200 && whole.complete && whole.body == blob);
        let part = site.ask("GET", &path, "Range: bytes=1000-1999\r\n").await;
        assert_eq!((part.status, &part.body[..]), (206, &blob[1000..2000]));
        let range = format!("bytes 1000-1999/{}", blob.len());
        assert_eq!(part.headers["content-range"], range);
        let beyond = format!("Range: bytes={}-\r\n", blob.len());
        let beyond = site.ask("GET", &path, &beyond).await;
        assert_eq!(beyond.status, 416);
        assert_eq!(
            beyond.headers["content-range"],
            format!("bytes */{}", blob.len())
        );
        let known = format!("If-None-Match: \"{layer}\"\r\n");
        assert_eq!(site.ask("GET", &path, &known).await.status, 304);
        let asked = site.registry.take_lines();
        if round == 1 {
            assert_eq!(asked, [] as [&str; 0], "within the times nothing is asked");
        }
    }
    assert_eq!(site.count(Kind::Tag, Outcome::Cached), 1);
    assert_eq!(
        site.mirror.blobs().metrics().bytes_from("origin"),
        blob.len() as u64
    );
}

#[tokio::test]
async fn a_tag_is_revalidated_unchanged_changed_and_gone() {
    let site = Site::new("fresh = \"0s\"").await;
    site.manifest("a", "1", "one");
    let get = || site.ask("GET", "/v2/a/manifests/1", ACCEPT);
    assert_eq!(get().await.body, b"one");
    site.registry.take_lines();
    assert_eq!(get().await.body, b"one");
    assert_eq!(site.registry.take_lines(), ["HEAD /v2/a/manifests/1"]);
    assert_eq!(site.count(Kind::Tag, Outcome::Unchanged), 1);
    // A registry that answers by `If-None-Match`, and one that says no digest.
    site.registry.misbehave(
        "HEAD",
        "a/manifests/1",
        0,
        1,
        Misbehaviour::Status(304, None),
    );
    assert_eq!(get().await.body, b"one");
    assert_eq!(site.registry.take_lines(), ["HEAD /v2/a/manifests/1"]);
    site.registry
        .misbehave("HEAD", "a/manifests/1", 0, 1, Misbehaviour::NoDigestHeader);
    assert_eq!(get().await.body, b"one");
    let both = ["HEAD /v2/a/manifests/1", "GET /v2/a/manifests/1"];
    assert_eq!(site.registry.take_lines(), both);
    site.manifest("a", "1", "two");
    assert_eq!(get().await.body, b"two");
    assert_eq!(site.registry.take_lines(), both);
    // Unreachable.
    site.break_registry();
    let stale = get().await;
    assert_eq!(stale.body, b"two");
    assert!(stale.headers["warning"].starts_with("110"), "{stale:?}");
    assert_eq!(site.mirror.metrics().stale_served(), 1);
    site.registry.behave();
    // Gone: not served any more, also not when the registry is down afterwards.
    site.registry
        .misbehave("", "a/manifests/1", 0, 1, Misbehaviour::Status(404, None));
    assert_eq!(get().await.status, 404);
    site.break_registry();
    assert_eq!(get().await.status, 503);
}

#[tokio::test]
async fn stale_answers_end_at_the_bound() {
    let site = Site::new("fresh = \"0s\"\naccess = \"0s\"\nstale = \"1s\"").await;
    let digest = site.manifest("a", "1", "one");
    let by_digest = format!("/v2/a/manifests/{digest}");
    let layer = site.registry.add_blob("a", bytes(100));
    let blob = format!("/v2/a/blobs/{layer}");
    let paths = ["/v2/a/manifests/1", &by_digest, &blob];
    for path in paths {
        assert_eq!(site.ask("GET", path, ACCEPT).await.status, 200, "{path}");
    }
    let proven = tokio::time::Instant::now();
    site.break_registry();
    let mut served = 0;
    for path in paths {
        let got = site.ask("GET", path, ACCEPT).await;
        // On a machine that stood still meanwhile the bound may be over.
        let within = proven.elapsed() < Duration::from_secs(1);
        assert!(got.status == 200 || !within, "{path} {got:?}");
        served += u32::from(got.status == 200);
    }
    assert_eq!(u64::from(served), site.mirror.metrics().stale_served());
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for path in paths {
        assert_eq!(site.ask("GET", path, ACCEPT).await.status, 503, "{path}");
    }
}

#[tokio::test]
async fn private_content_is_for_those_whom_the_registry_lets_in() {
    let site = Site::new("").await;
    let digest = site.manifest("a", "1", "secret");
    let layer = site.registry.add_blob("a", bytes(1000));
    site.registry.set_access(Access::Basic {
        username: "alice".into(),
        password: "pw".into(),
    });
    let (alice, mallory) = (basic("alice:pw"), basic("alice:guess"));
    let by_digest = format!("/v2/a/manifests/{digest}");
    let blob = format!("/v2/a/blobs/{layer}");
    let paths = ["/v2/a/manifests/1", &by_digest, &blob];
    for path in paths {
        let got = site.ask("GET", path, "").await;
        assert_eq!(got.status, 401);
        assert_eq!(got.headers["www-authenticate"], "Basic realm=\"fake\"");
        assert_eq!(site.ask("GET", path, &alice).await.status, 200, "{path}");
    }
    for broken in [false, true] {
        if broken {
            site.break_registry();
        }
        for path in paths {
            for (who, headers) in [("nobody", ""), ("mallory", &mallory)] {
                let got = site.ask("GET", path, headers).await;
                let expected = if broken { 503 } else { 401 };
                assert_eq!(got.status, expected, "{who} {path}");
                assert!(!got.body.windows(6).any(|it| it == b"secret"));
            }
            assert_eq!(site.ask("GET", path, &alice).await.status, 200, "{path}");
        }
    }
    // Another repository does not give what only the first has.
    site.registry.behave();
    let other = format!("/v2/b/blobs/{layer}");
    assert_eq!(site.ask("GET", &other, &alice).await.status, 404);
    let other = format!("/v2/b/manifests/{digest}");
    assert_eq!(site.ask("GET", &other, &alice).await.status, 404);
    assert!(site.mirror.metrics().access_denied() >= 12);
}

#[tokio::test]
async fn tokens_are_passed_and_what_everybody_gets_needs_none() {
    let site = Site::new("").await;
    let digest = site.manifest("a", "1", "open");
    site.registry.set_access(Access::Bearer {
        password: None,
        identity: None,
        expires_in: 300,
        refusal: 401,
    });
    let refused = site.ask("GET", "/v2/a/manifests/1", ACCEPT).await;
    assert_eq!(refused.status, 401);
    let challenge = &refused.headers["www-authenticate"];
    assert!(challenge.starts_with("Bearer realm="), "{challenge}");
    // As the client would: a token of its own.
    let mut stream = TcpStream::connect(site.registry.host()).await.unwrap();
    let ask = "GET /token?service=fake&scope=repository:a:pull HTTP/1.0\r\nHost: r\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let body = answer.split("\r\n\r\n").nth(1).unwrap();
    let token: serde_json::Value = serde_json::from_str(body).unwrap();
    let token = format!(
        "{ACCEPT}Authorization: Bearer {}\r\n",
        token["token"].as_str().unwrap()
    );
    site.registry.take_seen();
    assert_eq!(
        site.ask("GET", "/v2/a/manifests/1", &token).await.status,
        200
    );
    // The mirror finds out that the repository is open to everybody; then no token is asked for.
    let by_digest = format!("/v2/a/manifests/{digest}");
    tokio::time::timeout(Duration::from_secs(20), async {
        while site.ask("GET", &by_digest, ACCEPT).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    site.break_registry();
    assert_eq!(site.ask("GET", &by_digest, ACCEPT).await.body, b"open");
    assert_eq!(
        site.ask("GET", "/v2/a/manifests/1", ACCEPT).await.body,
        b"open"
    );
}

#[tokio::test]
async fn credentials_do_not_follow_redirects() {
    let site = Site::new("").await;
    site.registry.set_redirects(true);
    let layer = site.registry.add_blob("a", bytes(10_000));
    site.registry.set_access(Access::Basic {
        username: "u".into(),
        password: "p".into(),
    });
    let path = format!("/v2/a/blobs/{layer}");
    let got = site.ask("GET", &path, &basic("u:p")).await;
    assert_eq!((got.status, got.body.len()), (200, 10_000));
    let seen = site.registry.take_seen();
    assert!(seen.iter().any(|it| it.storage));
    assert!(
        seen.iter()
            .any(|it| !it.storage && it.authorization.is_some())
    );
    assert!(
        seen.iter()
            .all(|it| !it.storage || it.authorization.is_none())
    );
}

#[tokio::test]
async fn a_wrong_blob_is_cut_and_the_next_pull_is_right() {
    let site = Site::new("").await;
    let blob = bytes(3 << 20);
    let layer = site.registry.add_blob("a", blob.clone());
    site.registry
        .misbehave("GET", "blobs", 0, 1, Misbehaviour::FlipByte);
    let path = format!("/v2/a/blobs/{layer}");
    let got = site.ask("GET", &path, "").await;
    assert!(!got.complete && got.body.len() < blob.len());
    let got = site.ask("GET", &path, "").await;
    assert!(got.complete && got.body == blob);
    // A small one: nothing was sent, so the client hears of it.
    let small = site.registry.add_blob("a", bytes(100));
    site.registry
        .misbehave("GET", "blobs", 0, 1, Misbehaviour::FlipByte);
    let got = site.ask("GET", &format!("/v2/a/blobs/{small}"), "").await;
    assert_eq!(got.status, 502);
}

#[tokio::test]
async fn a_pull_that_was_cut_resumes_and_a_body_that_breaks_is_continued() {
    let site = Site::new("").await;
    let blob = bytes(5 << 20);
    let layer = site.registry.add_blob("a", blob.clone());
    let path = format!("/v2/a/blobs/{layer}");
    site.registry
        .misbehave("GET", "blobs", 0, 2, Misbehaviour::CutBody(1 << 20));
    let got = site.ask("GET", &path, "").await;
    assert!(got.complete && got.body == blob);
    let rest = site.ask("GET", &path, "Range: bytes=3000000-\r\n").await;
    assert!(rest.status == 206 && rest.body == blob[3_000_000..]);
}

#[tokio::test]
async fn what_is_half_here_ends_where_the_registry_is_needed() {
    let site = Site::new("").await;
    let blob = bytes(6 << 20);
    let layer = site.registry.add_blob("a", blob.clone());
    let path = format!("/v2/a/blobs/{layer}");
    let part = site.ask("GET", &path, "Range: bytes=0-2097151\r\n").await;
    assert_eq!(part.body.len(), 2 << 20);
    site.break_registry();
    let got = site.ask("GET", &path, "").await;
    assert!(got.status == 200 && !got.complete && got.body == blob[..2 << 20]);
    site.registry.behave();
    let rest = site.ask("GET", &path, "Range: bytes=2097152-\r\n").await;
    assert!(rest.status == 206 && rest.complete && rest.body == blob[2 << 20..]);
    site.break_registry();
    let got = site.ask("GET", &path, "").await;
    assert!(got.complete && got.body == blob);
}

#[tokio::test]
async fn one_download_serves_many_clients() {
    let site = Site::new("").await;
    let blob = bytes(4 << 20);
    let layer = site.registry.add_blob("a", blob.clone());
    let slow = Misbehaviour::SlowBody(64 << 10, Duration::from_millis(2));
    site.registry.misbehave("GET", "blobs", 0, u32::MAX, slow);
    let path = format!("/v2/a/blobs/{layer}");
    let pulls = futures::future::join_all((0..10).map(|_| site.ask("GET", &path, ""))).await;
    assert!(pulls.iter().all(|got| got.complete && got.body == blob));
    let lines = site.registry.take_lines();
    let gets = lines.iter().filter(|line| line.starts_with("GET")).count();
    assert_eq!(gets, 1, "{lines:?}");
}

#[tokio::test]
async fn other_requests_are_passed_or_refused() {
    let site = Site::new("").await;
    site.manifest("a", "1", "x");
    let host = site.registry.host();
    // By a prefix of the name instead of `ns`.
    let path = format!("/v2/{host}/a/manifests/1");
    assert_eq!(site.ask_plainly("GET", &path, ACCEPT).await.body, b"x");
    for (method, path, status) in [
        ("GET", "/v2/".to_owned(), 200),
        ("GET", "/".to_owned(), 404),
        ("GET", "/v2/a/manifests/1".to_owned(), 404),
        ("GET", format!("/v2/a/manifests/2?ns={host}"), 404),
        (
            "GET",
            format!("/v2/a/blobs/{}?ns={host}", BlobDigest::of(b"?")),
            404,
        ),
        ("POST", format!("/v2/a/blobs/uploads/?ns={host}"), 405),
        ("DELETE", format!("/v2/a/manifests/1?ns={host}"), 405),
        ("GET", "/v2/a/manifests/1?ns=other.example".to_owned(), 403),
        ("GET", "/v2/a/manifests/1?ns=127.0.0.1:1".to_owned(), 403),
        ("GET", format!("/v2/A/manifests/1?ns={host}"), 400),
    ] {
        let got = site.ask_plainly(method, &path, "").await;
        assert_eq!(got.status, status, "{method} {path}");
        if status >= 400 {
            let body: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
            assert!(body["errors"][0]["code"].is_string(), "{body}");
        }
    }
    let long = format!("X: {}\r\n", "y".repeat(64 << 10));
    assert_eq!(site.ask_plainly("GET", "/v2/", &long).await.status, 431);
}

#[tokio::test]
async fn a_port_that_is_taken_is_tried_again_and_said() {
    let site = Site::new("").await;
    let taken = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let shared = &site.mirror.shared;
    let config = MirrorConfig {
        listen: taken.local_addr().unwrap(),
        upstream: None,
        registries: Vec::new(),
        budget_bytes: 1,
        fresh: Duration::ZERO,
        access: Duration::ZERO,
        stale: Duration::ZERO,
    };
    let parts = MirrorParts {
        client: shared.client.clone(),
        blobs: shared.blobs.clone(),
        nodes: Arc::new(|_| None),
        metrics: MirrorMetrics::default(),
        key: [7; 32],
        stop: site.stop.clone(),
    };
    let mirror = Mirror::new(&config, parts);
    let serving = tokio::spawn(serve_at(mirror.clone()));
    let until = |wanted: fn(&MirrorState) -> bool| {
        let mirror = mirror.clone();
        async move {
            while !wanted(&mirror.state()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let patience = Duration::from_secs(60);
    let problem = until(|state| !state.listening && state.problem.contains("listen at"));
    tokio::time::timeout(patience, problem).await.unwrap();
    drop(taken);
    let listening = until(|state| state.listening && state.problem.is_empty());
    tokio::time::timeout(patience, listening).await.unwrap();
    site.stop.cancel();
    tokio::time::timeout(patience, serving)
        .await
        .unwrap()
        .unwrap();
}
