// SPDX-License-Identifier: Apache-2.0
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener as StdListener, UnixStream};

use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::*;
use crate::config::Overrides;

fn config(root: &TempDir) -> Config {
    let overrides = Overrides {
        root: Some(root.path().join("root")),
        run_dir: Some(root.path().join("run")),
    };
    let text = "[telemetry]\naddress = \"\"";
    Config::parse(text, Path::new("test"), overrides).unwrap()
}

type Running = JoinHandle<Result<(), RunError>>;

async fn start(config: &Config) -> (Running, CancellationToken) {
    let stop = CancellationToken::new();
    let daemon = tokio::spawn(run_until(config.clone(), stop.clone()));
    let socket = config.snapshots_socket();
    tokio::time::timeout(Duration::from_secs(20), async {
        while UnixStream::connect(&socket).is_err() {
            assert!(!daemon.is_finished(), "the daemon ended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    (daemon, stop)
}

async fn end((daemon, stop): (Running, CancellationToken)) {
    stop.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(20), daemon).await;
    ended.expect("the daemon stops").unwrap().unwrap();
}

#[tokio::test]
async fn a_daemon_starts_alone_and_stops_and_starts_again() {
    let root = tempfile::tempdir().unwrap();
    let config = config(&root);
    let running = start(&config).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&config.root), mode(&config.run_dir)), (0o700, 0o700));
    assert_eq!(mode(&config.snapshots_socket()), 0o600);

    // A second one on the same root, elsewhere or not, is refused and disturbs nobody.
    let mut second = config.clone();
    second.run_dir = root.path().join("run2");
    let error = run_until(second, CancellationToken::new())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RunError::Lock(LockError::Held { .. })),
        "{error}"
    );
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    // One with another root is refused the socket.
    let mut third = config.clone();
    third.root = root.path().join("root3");
    let error = run_until(third, CancellationToken::new())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RunError::Socket(SocketError::InUse { .. })),
        "{error}"
    );
    UnixStream::connect(config.snapshots_socket()).unwrap();

    end(running).await;
    assert!(config.root.join("metadata.redb").exists());
    // The socket file is stale now, as after a crash.
    end(start(&config).await).await;
}

/// What `sluice nodes` is told.
async fn nodes(config: &Config) -> sluice_proto::control::NodesResponse {
    use sluice_proto::control::control_client::ControlClient;

    let path = config.control_socket();
    // It is bound later than the one that was waited for.
    tokio::time::timeout(Duration::from_secs(20), async {
        while UnixStream::connect(&path).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let channel = tonic::transport::Endpoint::from_static("http://control")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        }))
        .await
        .unwrap();
    let request = sluice_proto::control::NodesRequest {};
    let answer = ControlClient::new(channel).nodes(request).await;
    answer.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_joins_its_cluster_and_leaves_it() {
    use sluice_fetcher::cluster::allow::Allow;
    use sluice_fetcher::cluster::membership::{Discovery, Membership, MembershipOptions};
    use sluice_fetcher::cluster::metrics::ClusterMetrics;
    use sluice_fetcher::cluster::node::{Node, NodeId, Role};

    let root = tempfile::tempdir().unwrap();
    let mut config = config(&root);
    let running = start(&config).await;
    assert_eq!(
        nodes(&config).await,
        sluice_proto::control::NodesResponse::default()
    );
    end(running).await;

    // Addresses of this test alone.
    let process = std::process::id().to_le_bytes();
    let address =
        |last| std::net::SocketAddr::from(([127, process[0] | 1, process[1], last], 9641));
    let options = MembershipOptions {
        listen: address(101),
        discovery: Discovery::Gossip,
        seeds: Vec::new(),
        seed_file: None,
        remembered: Vec::new(),
        allow: Allow::default(),
        metrics: ClusterMetrics::new(),
    };
    let other = Node {
        id: NodeId::parse("other").unwrap(),
        zone: "z".into(),
        rack: "r".into(),
        role: Role::Supernode,
        address: address(101),
        version: "0.0.1".into(),
        protocol: 7,
        load: 3,
        free_slots: 9,
    };
    let other = Membership::start(options, other, &CancellationToken::new()).unwrap();
    let text = format!(
        "[telemetry]\naddress = \"\"\n[cluster]\nenabled = true\nname = \"daemon\"\nzone = \"z\"\n\
         listen = \"{}\"\nseeds = [\"{}\"]\nupload_slots = 4\n",
        address(102),
        address(101)
    );
    let overrides = Overrides {
        root: Some(config.root.clone()),
        run_dir: Some(config.run_dir.clone()),
    };
    config = Config::parse(&text, Path::new("test"), overrides).unwrap();
    let running = start(&config).await;
    let mut view = other.view();
    let joined = view.wait_for(|view| view.others.len() == 1);
    let joined = tokio::time::timeout(Duration::from_secs(30), joined).await;
    let daemon = joined.unwrap().unwrap().others[0].clone();
    assert_eq!(
        (daemon.id.as_str(), daemon.address, daemon.free_slots),
        ("daemon", address(102), 4)
    );
    let both = async {
        loop {
            let answer = nodes(&config).await;
            if answer.nodes.len() == 2 {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(30), both).await;
    let answer = answer.unwrap();
    let shown: Vec<_> = answer
        .nodes
        .iter()
        .map(|node| (node.name.as_str(), node.distance.as_str(), node.protocol))
        .collect();
    let ours = sluice_fetcher::peer::PROTOCOL;
    assert_eq!(shown, [("daemon", "self", ours), ("other", "zone", 7)]);

    end(running).await;
    let left = view.wait_for(|view| view.others.is_empty());
    let left = tokio::time::timeout(Duration::from_secs(4), left).await;
    left.expect("sooner than silence would tell").unwrap();
    other.stop().await;
}

#[tokio::test]
async fn tls_files_that_are_no_good_are_an_error_that_names_them() {
    let root = tempfile::tempdir().unwrap();
    let mut config = config(&root);
    let text = "[cluster]\nenabled = true\nname = \"a\"\n[cluster.tls]\ncert = \"/no/cert\"\n\
                key = \"/no/key\"\nca = \"/no/ca\"\n";
    let parsed = Config::parse(text, Path::new("test"), Overrides::default()).unwrap();
    config.cluster = parsed.cluster;
    let error = run_until(config, CancellationToken::new())
        .await
        .unwrap_err();
    assert!(matches!(error, RunError::Cluster(_)), "{error}");
    assert!(error.to_string().contains("/no/cert"), "{error}");
}

#[tokio::test]
async fn only_a_dead_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let dead = StdListener::bind(&path).unwrap();
    drop(dead);
    assert!(path.exists());
    let listener = bind_private(&path).unwrap();
    assert!(matches!(
        bind_private(&path),
        Err(SocketError::InUse { .. })
    ));
    drop(listener);
    bind_private(&path).unwrap();

    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(
        bind_private(&file),
        Err(SocketError::NotASocket { .. })
    ));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let nowhere = directory.path().join("no/socket");
    assert!(matches!(
        bind_private(&nowhere),
        Err(SocketError::Io { .. })
    ));
}

#[tokio::test]
async fn damaged_metadata_is_an_error_that_names_the_file() {
    let root = tempfile::tempdir().unwrap();
    let config = config(&root);
    std::fs::create_dir_all(&config.root).unwrap();
    std::fs::write(config.root.join("metadata.redb"), vec![7; 8192]).unwrap();
    let error = run_until(config, CancellationToken::new())
        .await
        .unwrap_err();
    assert!(matches!(error, RunError::Store { .. }), "{error}");
    assert!(error.to_string().contains("metadata.redb"), "{error}");
}

/// The first line of an answer; `None` while nobody answers.
fn ask(address: std::net::SocketAddr, path: &str) -> Option<(String, std::net::TcpStream)> {
    use std::io::{BufRead as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: h\r\n\r\n").ok()?;
    let mut line = String::new();
    let mut reader = std::io::BufReader::new(stream.try_clone().unwrap());
    reader.read_line(&mut line).ok()?;
    Some((line, stream))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_telemetry_port_is_waited_for_and_its_clients_do_not_hold_a_stop() {
    let root = tempfile::tempdir().unwrap();
    let mut config = config(&root);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    config.telemetry = Some(address);
    let running = start(&config).await;
    drop(taken);
    let answer = tokio::task::spawn_blocking(move || {
        let begun = std::time::Instant::now();
        loop {
            match ask(address, "/healthz") {
                Some(answer) => return answer,
                None => assert!(begun.elapsed() < Duration::from_secs(60)),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let (line, open) = answer.await.unwrap();
    assert!(line.contains("200"), "{line}");
    end(running).await;
    drop(open);
}
