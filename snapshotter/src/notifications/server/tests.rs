// SPDX-License-Identifier: Apache-2.0
//! Notifications over loopback, and what a node does with them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::json;
use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::lazy::tests::lazy_in;
use crate::prewarm::PrewarmOptions;

const TOKEN: &str = "0123456789abcdef";
const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

struct Site {
    receiver: Receiver,
    address: SocketAddr,
    metrics: NotificationMetrics,
    stop: CancellationToken,
    _dir: TempDir,
}

async fn site(prewarm: bool) -> Site {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let client = RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials)).unwrap();
    let lazy = lazy_in(dir.path(), client.clone(), Duration::ZERO);
    let minute = Duration::from_secs(60);
    let options = PrewarmOptions {
        grace: minute,
        deadline: minute,
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let options = (
        NotificationOptions {
            listen: address,
            token,
            prewarm,
            hosts: BTreeMap::new(),
        },
        Prewarms::new(lazy, client, options),
    );
    let metrics = NotificationMetrics::default();
    // Nobody listens at the first.
    let trust = Trust::new(vec!["127.0.0.1:1/*".to_owned()]);
    let receiver = Receiver::new(options.0, options.1, trust, None, metrics.clone()).unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(receiver.clone().serve_on(listener, stop.clone()));
    Site {
        receiver,
        address,
        metrics,
        stop,
        _dir: dir,
    }
}

fn pushed(host: &str) -> String {
    let event = json!({
        "action": "push",
        "target": {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": DIGEST,
            "repository": "team/app",
        },
        "request": {"host": host},
    });
    json!({"events": [event]}).to_string()
}

impl Site {
    /// The status of the answer.
    async fn post(&self, token: &str, body: &str) -> u16 {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "POST /notifications HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\
             Content-Type: application/vnd.docker.distribution.events.v1+json\r\n\
             Authorization: {token}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // What is too long is not read to its end.
        let _ = stream.write_all(body.as_bytes()).await;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        std::str::from_utf8(&answer[9..]).unwrap().parse().unwrap()
    }

    fn counted(&self, outcome: &'static str) -> u64 {
        self.metrics.counted(outcome)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_is_acted_on_if_the_token_and_the_place_are_right() {
    let site = site(true).await;
    let good = format!("Bearer {TOKEN}");
    let (ours, theirs) = (pushed("127.0.0.1:1"), pushed("127.0.0.1:2"));
    let longer = format!("{good}0");
    for token in ["Bearer", "Bearer 0123456789abcdeF", "", longer.as_str()] {
        assert_eq!(site.post(token, &ours).await, 401, "{token}");
    }
    assert_eq!((site.counted("denied"), site.counted("prewarmed")), (4, 0));
    assert_eq!(site.post(&good, &theirs).await, 200);
    assert_eq!(
        (site.counted("untrusted"), site.counted("prewarmed")),
        (1, 0)
    );
    assert_eq!(site.post(&good, &ours).await, 200);
    assert_eq!(site.post(TOKEN, &ours).await, 200);
    assert_eq!(site.counted("prewarmed"), 2);
    assert_eq!(site.post(&good, "{}").await, 400);
    let long = format!("{}{ours}", " ".repeat(BODY_MAX_BYTES));
    assert_eq!(site.post(&good, &long).await, 413);
    assert_eq!(site.counted("malformed"), 2);
    site.stop.cancel();
    site.receiver.0.prewarms.stop().await;
    assert_eq!(site.counted("prewarmed"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_no_supernode_and_was_not_told_to_does_nothing() {
    let site = site(false).await;
    let good = format!("Bearer {TOKEN}");
    assert_eq!(site.post(&good, &pushed("127.0.0.1:1")).await, 200);
    assert_eq!(
        (site.counted("not_supernode"), site.counted("prewarmed")),
        (1, 0)
    );
    site.stop.cancel();
}

#[test]
fn a_token_must_be_long_and_secret() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    for (text, mode, good) in [
        (TOKEN, 0o600, true),
        (TOKEN, 0o640, true),
        (TOKEN, 0o644, false),
        ("short", 0o600, false),
        ("", 0o600, false),
    ] {
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(Token::read(&path).is_ok(), good, "{text} {mode:o}");
    }
    assert!(Token::read(&dir.path().join("none")).is_err());
}
