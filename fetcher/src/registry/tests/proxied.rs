// SPDX-License-Identifier: Apache-2.0
//! Through a proxy, a small real one: what it forwards, what goes past it, and what it is shown.

use std::net::SocketAddr;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::registry::fake::FakeRegistry;

/// Forwards everything to one address, whatever host is named, and notes the heads of requests.
struct Proxy {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    async fn start(to: String) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&heads);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (to, noted) = (to.clone(), Arc::clone(&noted));
                tokio::spawn(async move { Self::forward(client, &to, &noted).await });
            }
        });
        Proxy {
            address,
            heads,
            task,
        }
    }

    /// One request of a connection; the answer's end is the connection's.
    async fn forward(mut client: TcpStream, to: &str, noted: &Mutex<Vec<String>>) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = client.read_u8().await.ok()?;
            head.push(byte);
        }
        let head = String::from_utf8(head).ok()?;
        noted.lock().unwrap().push(head.clone());
        let mut server = TcpStream::connect(to).await.ok()?;
        if head.starts_with("CONNECT ") {
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
        } else {
            // The path alone, as a server is asked.
            let (first, rest) = head.split_once("\r\n")?;
            let (method, target) = first.split_once(' ')?;
            let path = Url::parse(target.split(' ').next()?)
                .ok()?
                .path()
                .to_owned();
            let head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n{rest}");
            server.write_all(head.as_bytes()).await.ok()?;
        }
        copy_bidirectional(&mut client, &mut server).await.ok()?;
        Some(())
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.heads.lock().unwrap())
    }
}

/// Options by which requests go through the proxy, except for these hosts.
fn through(proxy: &Proxy, except: &str) -> RegistryOptions {
    let url = format!("http://gate:open@{}", proxy.address);
    let variable = |name: &str| match name {
        "http_proxy" | "HTTPS_PROXY" => Some(url.clone()),
        "NO_PROXY" => Some(except.to_owned()),
        _ => None,
    };
    let mut options = quick_options();
    options.proxies = ProxyRules::read(variable).0;
    options.host_mut("plain.example").plain_http = Some(true);
    options
}

#[tokio::test]
async fn a_registry_is_reached_through_the_proxy_and_the_proxy_is_shown_its_own_password() {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "hello, blob");
    let proxy = Proxy::start(fake.host()).await;
    let given = StaticCredentials::default().with(
        "plain.example",
        Credential::Password {
            username: "u".into(),
            password: Secret::new("p"),
        },
    );
    fake.set_access(crate::registry::fake::Access::Basic {
        username: "u".into(),
        password: "p".into(),
    });
    let client = RegistryClient::new(through(&proxy, ""), Arc::new(given)).unwrap();
    let place = Repository::new("plain.example", "team/app").unwrap();
    let read = client.blob_bytes(&context(), &place, blob, 100).await;
    assert_eq!(read.unwrap(), "hello, blob");
    let heads = proxy.take();
    assert_eq!(heads.len(), 2, "{heads:?}");
    for head in &heads {
        let lower = head.to_ascii_lowercase();
        assert!(
            head.starts_with("GET http://plain.example/v2/team/app/blobs/"),
            "{head}"
        );
        // gate:open
        assert!(
            lower.contains("proxy-authorization: basic z2f0ztpvcgvu"),
            "{head}"
        );
    }
    // What is for the proxy does not go on to the registry where the proxy does its part; ours forwards heads as
    // they are, so only the registry's own is looked at.
    let shown: Vec<_> = fake
        .take_seen()
        .into_iter()
        .map(|it| it.authorization)
        .collect();
    assert_eq!(shown, [None, Some("Basic dTpw".to_owned())]);
}

#[tokio::test]
async fn tls_goes_through_a_tunnel_that_is_asked_for_by_name_and_port() {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "x");
    let proxy = Proxy::start(fake.host()).await;
    let client = client(through(&proxy, ""));
    let place = Repository::new("tls.example:8443", "team/app").unwrap();
    let error = client
        .blob_bytes(&context(), &place, blob, 100)
        .await
        .unwrap_err();
    // There is no TLS behind it.
    let text = error.to_string();
    assert!(!text.contains("open"), "{text}");
    let heads = proxy.take();
    assert!(
        heads[0].starts_with("CONNECT tls.example:8443 HTTP/1.1\r\n"),
        "{heads:?}"
    );
    assert!(
        heads[0]
            .to_ascii_lowercase()
            .contains("proxy-authorization: "),
        "{heads:?}"
    );
    assert!(
        heads
            .iter()
            .all(|head| !head.to_ascii_lowercase().contains("\nauthorization: "))
    );
}

#[tokio::test]
async fn this_machine_and_exceptions_are_reached_past_the_proxy() {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "hello, blob");
    let proxy = Proxy::start("127.0.0.1:1".to_owned()).await;
    let read = async |options: RegistryOptions, place: &Repository| {
        let client = client(options);
        client.blob_bytes(&context(), place, blob, 100).await
    };
    let place = fake.place("team/app");
    assert_eq!(
        read(through(&proxy, ""), &place).await.unwrap(),
        "hello, blob"
    );
    assert_eq!(proxy.take(), [""; 0]);
    let place = Repository::new("plain.example", "team/app").unwrap();
    read(through(&proxy, "plain.example:80"), &place)
        .await
        .unwrap_err();
    assert_eq!(proxy.take(), [""; 0]);
    read(through(&proxy, "plain.example:81"), &place)
        .await
        .unwrap_err();
    assert!(!proxy.take().is_empty());
}
