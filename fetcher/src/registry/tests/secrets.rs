// SPDX-License-Identifier: Apache-2.0
//! Several users of one registry, and where their secrets stand: with their own host, and in no log.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

use tracing_subscriber::fmt::MakeWriter;

use super::*;
use crate::registry::fake::{Access, FakeRegistry, Misbehaviour};

fn password(username: &str, password: &str) -> Credential {
    Credential::Password {
        username: username.into(),
        password: Secret::new(password),
    }
}

fn with(host: &str, all: &[Credential]) -> RegistryClient {
    let none = StaticCredentials::default();
    let given = all
        .iter()
        .fold(none, |given, one| given.with(host, one.clone()));
    RegistryClient::new(quick_options(), Arc::new(given)).unwrap()
}

fn basic(username: &str) -> Access {
    Access::Basic {
        username: username.into(),
        password: "p".into(),
    }
}

#[tokio::test]
async fn what_one_user_is_not_shown_another_is_asked_for() {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "hello, blob");
    fake.set_access(basic("u"));
    let client = with(&fake.host(), &[password("u", "p"), password("v", "p")]);
    let size = async |client: &RegistryClient| {
        let place = fake.place("team/app");
        client.blob_size(&context(), &place, blob).await.unwrap()
    };
    assert_eq!(size(&client).await, Some(11));
    fake.take_seen();
    // For `u` it is not there, as registries say that hide what is not for everybody.
    fake.misbehave("HEAD", "/blobs/", 0, 1, Misbehaviour::Status(404, None));
    fake.set_access(basic("v"));
    assert_eq!(size(&client).await, Some(11));
    let users = |fake: &FakeRegistry| -> Vec<String> {
        let seen = fake.take_seen().into_iter();
        seen.map(|it| it.authorization.unwrap_or_default())
            .collect()
    };
    assert_eq!(users(&fake), ["Basic dTpw", "Basic djpw"]);
    // The one that worked is the first from then on.
    assert_eq!(size(&client).await, Some(11));
    assert_eq!(users(&fake), ["Basic djpw"]);
    // What is there for nobody costs a request for each, and none without a name.
    fake.misbehave("HEAD", "/blobs/", 0, 2, Misbehaviour::Status(404, None));
    assert_eq!(size(&client).await, None);
    assert_eq!(users(&fake), ["Basic djpw", "Basic dTpw"]);
    assert_eq!(size(&client).await, Some(11));
    assert_eq!(
        users(&fake),
        ["Basic djpw"],
        "it is not forgotten who worked"
    );
}

#[tokio::test]
async fn credentials_that_are_refused_are_tried_within_a_bound() {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "x");
    fake.set_access(basic("nobody"));
    let all: Vec<Credential> = (0..50).map(|it| password(&format!("u{it}"), "p")).collect();
    let given = all.iter().fold(StaticCredentials::default(), |given, one| {
        given.with(&fake.host(), one.clone())
    });
    let chain = CredentialChain::new(vec![Arc::new(given)]);
    let client = RegistryClient::new(quick_options(), Arc::new(chain)).unwrap();
    let place = fake.place("team/app");
    client
        .blob_size(&context(), &place, blob)
        .await
        .unwrap_err();
    // The first without any, then eight.
    assert_eq!(fake.take_seen().len(), 9);
}

/// All that is logged, down to what libraries trace.
#[derive(Clone, Debug, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

/// Goes through all that has to do with secrets, well and badly.
async fn use_secrets(folder: &std::path::Path) {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("team/app", "hello, blob");
    let place = fake.place("team/app");
    let helper = folder.join("docker-credential-log");
    let script = "#!/bin/sh\nprintf '{\"Username\":\"h\",\"Secret\":\"hunter2-helper\"}'\n";
    std::fs::write(&helper, script).unwrap();
    let plugin = folder.join("plugin");
    let script = "#!/bin/sh\necho '{\"auth\":\"hunter2-plugin\"}'; echo hunter2-error >&2\n";
    std::fs::write(&plugin, script).unwrap();
    for program in [&helper, &plugin] {
        std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let host = fake.host();
    let docker = folder.join("config.json");
    // x:hunter2-auth
    let text = format!(
        r#"{{"auths":{{"{host}":{{"auth":"eDpodW50ZXIyLWF1dGg="}}}},"credHelpers":{{"{host}":"log"}}}}"#
    );
    std::fs::write(&docker, text).unwrap();
    let files = folder.join("files");
    std::fs::create_dir(&files).unwrap();
    let text = format!(
        r#"{{"auths":{{"{host}":{{"username":"f","password":"hunter2-file"}},"b":{{"auth":"hunter2-bad"}}}}}}"#
    );
    std::fs::write(files.join("good"), text).unwrap();
    std::fs::write(files.join("bad"), r#"{"auths":{"a":"hunter2-wrong"}}"#).unwrap();
    let config = folder.join("plugins.yaml");
    let text = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: plugin\n  \
         matchImages: ['{host}']\n  defaultCacheDuration: 1m\n  \
         apiVersion: credentialprovider.kubelet.k8s.io/v1\n  env: [{{name: A, value: hunter2-env}}]\n"
    );
    std::fs::write(&config, text).unwrap();
    let client = |docker: DockerConfig| {
        let chain = CredentialChain::new(vec![
            Arc::new(docker.with_helper_folder(folder.to_owned())),
            Arc::new(CredentialFiles::new(vec![files.clone()])),
            Arc::new(KubeletPlugins::new(config.clone(), folder.to_owned())),
        ]);
        RegistryClient::new(quick_options(), Arc::new(chain)).unwrap()
    };
    for access in [
        basic("nobody"),
        Access::Basic {
            username: "f".into(),
            password: "hunter2-file".into(),
        },
        Access::Bearer {
            password: Some(("h".into(), "hunter2-helper".into())),
            identity: None,
            expires_in: 300,
            refusal: 401,
        },
        Access::Bearer {
            password: Some(("nobody".into(), "p".into())),
            identity: None,
            expires_in: 300,
            refusal: 403,
        },
    ] {
        fake.set_access(access);
        fake.set_redirects(true);
        let client = client(DockerConfig::new(Some(docker.clone())));
        for _ in 0..2 {
            let read = client.blob_bytes(&context(), &place, blob, 100).await;
            tracing::info!("{:?} {read:?}", read.as_ref().map_err(ToString::to_string));
            fake.expire_tokens();
            fake.expire_redirects();
        }
    }
}

#[test]
fn no_secret_stands_in_a_log_at_any_level() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.clone())
        .finish();
    let folder = tempfile::tempdir().unwrap();
    tracing::subscriber::with_default(subscriber, || {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(use_secrets(folder.path()));
    });
    let text = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    // It saw what it was to see.
    for word in [
        "no CredentialProviderResponse",
        "a file with credentials",
        "TRACE",
        "hello, blob",
    ] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
    // As they are, and as headers have them (`h:hunter2-…`, `f:…`, `x:…`).
    let secrets = [
        "hunter2",
        "aDpodW50ZXIy",
        "ZjpodW50ZXIy",
        "eDpodW50ZXIy",
        "Bearer token-",
    ];
    for secret in secrets {
        let lines: Vec<&str> = text.lines().filter(|line| line.contains(secret)).collect();
        assert!(lines.is_empty(), "{secret}: {lines:#?}");
    }
}
