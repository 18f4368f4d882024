// SPDX-License-Identifier: Apache-2.0

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;

fn password(username: &str, password: &str) -> Credential {
    Credential::Password {
        username: username.into(),
        password: Secret::new(password),
    }
}

fn target(host: &str) -> CredentialTarget {
    CredentialTarget::new(host, "team/app")
}

fn write(folder: &Path, config: &str) -> DockerConfig {
    let path = folder.join("config.json");
    std::fs::write(&path, config).unwrap();
    DockerConfig::new(Some(path))
}

/// Writes a helper as a shell script; gives its name.
fn helper(folder: &Path, script: &str) -> String {
    let name = format!("test-{}", rand::random::<u64>());
    let path = folder.join(format!("docker-credential-{name}"));
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    name
}

async fn run(folder: &Path, name: &str, timeout: Duration) -> Result<Option<Credential>, String> {
    let config = DockerConfig::new(None)
        .with_helper_folder(folder.to_owned())
        .with_helper_timeout(timeout);
    config.run_helper(name, "registry.example").await
}

#[tokio::test]
async fn entries_of_auths_are_found_by_host() {
    let folder = tempfile::tempdir().unwrap();
    // u:p, hub:secret
    let config = write(
        folder.path(),
        r#"{"auths":{
            "registry.example":{"auth":"dTpw"},
            "localhost:5000":{"username":"a","password":"b"},
            "https://index.docker.io/v1/":{"auth":"aHViOnNlY3JldA=="},
            "token.example":{"auth":"eDp5","identitytoken":"it"},
            "broken.example":{"auth":"%%%"},
            "empty.example":{}
        }}"#,
    );
    let cases = [
        ("registry.example", vec![password("u", "p")]),
        ("localhost:5000", vec![password("a", "b")]),
        ("docker.io", vec![password("hub", "secret")]),
        (
            "token.example",
            vec![Credential::IdentityToken(Secret::new("it"))],
        ),
        ("broken.example", vec![]),
        ("empty.example", vec![]),
        ("other.example", vec![]),
        ("localhost:5001", vec![]),
    ];
    for (host, expected) in cases {
        assert_eq!(
            config.credentials(&target(host), false).await,
            expected,
            "{host}"
        );
    }
}

#[tokio::test]
async fn a_changed_file_counts_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = write(
        folder.path(),
        r#"{"auths":{"r.example":{"username":"a","password":"1"}}}"#,
    );
    assert_eq!(
        config.credentials(&target("r.example"), false).await,
        [password("a", "1")]
    );
    write(
        folder.path(),
        r#"{"auths":{"r.example":{"username":"a","password":"2"}}}"#,
    );
    assert_eq!(
        config.credentials(&target("r.example"), false).await,
        [password("a", "2")]
    );
    write(folder.path(), "not json");
    assert_eq!(config.credentials(&target("r.example"), false).await, []);
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert_eq!(config.credentials(&target("r.example"), false).await, []);
}

#[tokio::test]
async fn helpers_answer_fail_or_are_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let long = Duration::from_secs(10);
    let echo = helper(
        path,
        r#"read server; printf '{"ServerURL":"x","Username":"%s","Secret":"s"}' "$server$1""#,
    );
    assert_eq!(
        run(path, &echo, long).await,
        Ok(Some(password("registry.exampleget", "s")))
    );
    let token = helper(path, r#"printf '{"Username":"<token>","Secret":"t"}'"#);
    let identity = Credential::IdentityToken(Secret::new("t"));
    assert_eq!(run(path, &token, long).await, Ok(Some(identity)));
    let unknown = helper(path, "echo credentials not found; exit 1");
    assert_eq!(run(path, &unknown, long).await, Ok(None));
    let garbage = helper(path, "echo hello");
    assert_eq!(
        run(path, &garbage, long).await,
        Err("malformed answer".into())
    );
    let flood = helper(path, "yes");
    let flooded = run(path, &flood, long).await;
    assert!(flooded.unwrap_err().contains("more than 65536 bytes"));
    assert!(
        run(path, "missing", long)
            .await
            .unwrap_err()
            .starts_with("start:")
    );
    assert!(
        run(path, "../evil", long)
            .await
            .unwrap_err()
            .contains("without a path")
    );

    // Its child keeps the pipe open, so only killing the whole group ends it.
    let mark = path.join("child");
    let hang = helper(
        path,
        &format!("sleep 600 & echo $! > {}; wait", mark.display()),
    );
    let before = std::time::Instant::now();
    let stopped = run(path, &hang, Duration::from_millis(700)).await;
    assert!(stopped.unwrap_err().contains("no answer within"));
    assert!(before.elapsed() < Duration::from_secs(5));
    let child = std::fs::read_to_string(mark).unwrap();
    let process = format!("/proc/{}/stat", child.trim());
    for _ in 0..100 {
        // Gone, or a zombie that its new parent has not reaped yet.
        match std::fs::read_to_string(&process) {
            Ok(stat) if !stat.contains(") Z ") => {}
            _ => return,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the helper's child still runs");
}

#[tokio::test]
async fn secrets_are_not_shown() {
    let shown = format!(
        "{:?}",
        [
            password("u", "hunter2"),
            Credential::IdentityToken(Secret::new("hunter2"))
        ]
    );
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(shown.contains("[redacted]"), "{shown}");
}

#[tokio::test]
async fn helpers_come_before_and_after_entries() {
    let folder = tempfile::tempdir().unwrap();
    let answer = |user: &str| format!(r#"printf '{{"Username":"{user}","Secret":"s"}}'"#);
    let own = helper(folder.path(), &answer("own"));
    let common = helper(folder.path(), &answer("common"));
    let config = write(
        folder.path(),
        &format!(
            r#"{{"auths":{{"r.example":{{"username":"file","password":"s"}},"hub.example":{{}}}},
                "credHelpers":{{"r.example":"{own}","gone.example":"missing"}},
                "credsStore":"{common}"}}"#
        ),
    )
    .with_helper_folder(folder.path().to_owned());
    let cases = [
        ("r.example", vec!["own", "file", "common"]),
        ("hub.example", vec!["common"]),
        ("gone.example", vec!["common"]),
    ];
    for (host, users) in cases {
        let expected: Vec<_> = users.into_iter().map(|user| password(user, "s")).collect();
        assert_eq!(
            config.credentials(&target(host), false).await,
            expected,
            "{host}"
        );
    }
}

#[tokio::test]
async fn a_refresh_runs_the_helper_again_but_not_in_a_burst() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs");
    let script = format!(
        r#"echo >> {0}; printf '{{"Username":"%s","Secret":"s"}}' "$(wc -l < {0})""#,
        runs.display()
    );
    let name = helper(folder.path(), &script);
    let config = write(folder.path(), &format!(r#"{{"credsStore":"{name}"}}"#))
        .with_helper_folder(folder.path().to_owned());
    assert_eq!(
        config.credentials(&target("r.example"), false).await,
        [password("1", "s")]
    );
    assert_eq!(
        config.credentials(&target("r.example"), false).await,
        [password("1", "s")]
    );
    assert_eq!(
        config.credentials(&target("r.example"), true).await,
        [password("1", "s")],
        "too young"
    );
    tokio::time::sleep(HELPER_MIN_AGE).await;
    assert_eq!(
        config.credentials(&target("r.example"), false).await,
        [password("1", "s")]
    );
    assert_eq!(
        config.credentials(&target("r.example"), true).await,
        [password("2", "s")]
    );
}

#[tokio::test]
async fn one_run_of_a_helper_answers_all_who_wait() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs");
    let script = format!(
        r#"echo run >> {}; sleep 0.3; printf '{{"Username":"u","Secret":"s"}}'"#,
        runs.display()
    );
    let name = helper(folder.path(), &script);
    let config = format!(r#"{{"credHelpers":{{"r.example":"{name}"}}}}"#);
    let config = write(folder.path(), &config).with_helper_folder(folder.path().to_owned());
    let r = target("r.example");
    let asks = (0..8).map(|_| config.credentials(&r, false));
    for answer in futures::future::join_all(asks).await {
        assert_eq!(answer, [password("u", "s")]);
    }
    assert_eq!(std::fs::read_to_string(&runs).unwrap(), "run\n");
}

#[tokio::test]
async fn a_helper_that_fails_later_takes_nothing_back() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken");
    let script = format!(
        r#"test -e {} && echo hello || printf '{{"Username":"u","Secret":"s"}}'"#,
        broken.display()
    );
    let name = helper(folder.path(), &script);
    let config = format!(r#"{{"credHelpers":{{"r.example":"{name}"}}}}"#);
    let config = write(folder.path(), &config).with_helper_folder(folder.path().to_owned());
    let known = [password("u", "s")];
    assert_eq!(config.credentials(&target("r.example"), false).await, known);
    std::fs::write(broken, "").unwrap();
    tokio::time::sleep(HELPER_MIN_AGE + Duration::from_millis(100)).await;
    assert_eq!(config.credentials(&target("r.example"), true).await, known);
    assert_eq!(config.credentials(&target("r.example"), false).await, known);
}
