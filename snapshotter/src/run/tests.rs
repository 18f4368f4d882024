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
