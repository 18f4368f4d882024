// SPDX-License-Identifier: Apache-2.0

use std::fs;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;

/// A directory with plugins, which are shell scripts, and a configuration that names them.
struct Node {
    folder: TempDir,
    plugins: KubeletPlugins,
}

const RUN_LIMIT: Duration = Duration::from_millis(1500);

/// Plugins: a name, the images it is for, and what it does. Each notes its runs.
fn node(plugins: &[(&str, &str, &str)]) -> Node {
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let mut config =
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"
            .to_owned();
    for (name, images, script) in plugins {
        let (path, runs) = (bin.join(name), folder.path().join(format!("{name}.runs")));
        let script = format!("#!/bin/sh\necho >> {}\n{script}\n", runs.display());
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        config.push_str(&format!(
            "- name: {name}\n  matchImages: [\"{images}\"]\n  defaultCacheDuration: 1h\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [get, it]\n  \
             env: [{{name: WHO, value: u}}]\n"
        ));
    }
    let file = folder.path().join("config.yaml");
    fs::write(&file, config).unwrap();
    let plugins = KubeletPlugins::new(file, bin).with_run_timeout(RUN_LIMIT);
    Node { folder, plugins }
}

/// A script that answers for `key`.
fn answer(kind: &str, rest: &str, key: &str) -> String {
    format!(
        r#"printf '{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"{kind}"{rest},"auth":{{"{key}":{{"username":"%s","password":"s"}}}}}}' "$WHO""#
    )
}

impl Node {
    async fn known(&self, image: &str, refresh: bool) -> Vec<String> {
        let (host, repository) = image.split_once('/').unwrap();
        let target = CredentialTarget::new(host, repository);
        let found = self.plugins.credentials(&target, refresh).await;
        let user = |it: &Credential| match it {
            Credential::Password { username, .. } => username.clone(),
            Credential::IdentityToken(_) => String::new(),
        };
        found.iter().map(user).collect()
    }

    fn runs(&self, name: &str) -> usize {
        let runs = fs::read_to_string(self.folder.path().join(format!("{name}.runs")));
        runs.unwrap_or_default().lines().count()
    }
}

#[tokio::test]
async fn a_plugin_is_asked_as_kubelet_asks_it() {
    let told = "cat > $0.in; echo \"$@\" > $0.args\n";
    let script = format!("{told}{}", answer("Image", "", "r.example:5000"));
    let node = node(&[("own", "r.example:5000", &script)]);
    assert_eq!(node.known("r.example:5000/team/app", false).await, ["u"]);
    let bin = node.folder.path().join("bin");
    let question = fs::read_to_string(bin.join("own.in")).unwrap();
    assert!(
        question.contains("\"image\":\"r.example:5000/team/app\""),
        "{question}"
    );
    assert_eq!(
        fs::read_to_string(bin.join("own.args")).unwrap(),
        "get it\n"
    );
    // It is for nobody else.
    for other in ["r.example/team/app", "r.example:5001/a", "s.example:5000/a"] {
        assert_eq!(node.known(other, false).await, [""; 0], "{other}");
    }
    assert_eq!(node.runs("own"), 1);
}

#[tokio::test]
async fn an_answer_counts_for_what_and_as_long_as_it_says() {
    let life = ",\"cacheDuration\":\"0s\"";
    let node = node(&[
        (
            "image",
            "*.image.example",
            &answer("Image", "", "*.image.example"),
        ),
        (
            "registry",
            "*.registry.example",
            &answer("Registry", "", "*.registry.example"),
        ),
        (
            "global",
            "*.global.example",
            &answer("Global", "", "*.global.example"),
        ),
        (
            "short",
            "*.short.example",
            &answer("Global", life, "*.short.example"),
        ),
    ]);
    for (name, runs) in [("image", 3), ("registry", 2), ("global", 1), ("short", 4)] {
        for image in [
            "a.X.example/1",
            "a.X.example/1",
            "a.X.example/2",
            "b.X.example/1",
        ] {
            let image = image.replace('X', name);
            assert_eq!(node.known(&image, false).await, ["u"], "{image}");
        }
        assert_eq!(node.runs(name), runs, "{name}");
    }
    // What was refused is asked for anew, but not in a burst.
    assert_eq!(node.known("a.global.example/1", true).await, ["u"]);
    assert_eq!(node.runs("global"), 1);
    tokio::time::sleep(MIN_AGE).await;
    assert_eq!(node.known("a.global.example/1", true).await, ["u"]);
    assert_eq!(node.runs("global"), 2);
}

/// A plugin may say whatever it likes: it is used where its keys say.
#[tokio::test]
async fn what_is_for_another_host_is_not_given() {
    let node = node(&[("wide", "*.example", &answer("Global", "", "a.example"))]);
    assert_eq!(node.known("a.example/x", false).await, ["u"]);
    for image in ["b.example/x", "b.example/a.example"] {
        assert_eq!(node.known(image, false).await, [""; 0], "{image}");
    }
}

#[tokio::test]
async fn many_who_ask_at_once_share_a_run() {
    let script = format!("sleep 0.3; {}", answer("Image", "", "r.example"));
    let node = node(&[("own", "r.example", &script)]);
    let asks = (0..8).map(|_| node.known("r.example/a", false));
    for found in futures::future::join_all(asks).await {
        assert_eq!(found, ["u"]);
    }
    assert_eq!(node.runs("own"), 1);
}

#[tokio::test]
async fn a_run_goes_on_without_who_asked_and_its_answer_is_there_then() {
    let script = format!("sleep 0.5; {}", answer("Image", "", "r.example"));
    let node = node(&[("own", "r.example", &script)]);
    let ask = node.known("r.example/a", false);
    let hurried = tokio::time::timeout(Duration::from_millis(100), ask).await;
    assert!(hurried.is_err());
    tokio::time::sleep(Duration::from_millis(900)).await;
    let ask = node.known("r.example/a", false);
    let found = tokio::time::timeout(Duration::from_millis(100), ask).await;
    assert_eq!(found.unwrap(), ["u"]);
    assert_eq!(node.runs("own"), 1);
}

#[tokio::test]
async fn what_hangs_fails_or_talks_nonsense_is_left_alone_for_a_while() {
    let node = node(&[
        ("hangs", "hangs.example", "sleep 600 & wait"),
        ("garbage", "garbage.example", "echo hello"),
        ("floods", "floods.example", "yes"),
        ("fails", "fails.example", "echo hunter2 >&2; exit 3"),
        ("gone", "gone.example", ""),
    ]);
    fs::remove_file(node.folder.path().join("bin/gone")).unwrap();
    for name in ["hangs", "garbage", "floods", "fails", "gone"] {
        let image = format!("{name}.example/a");
        let begun = Instant::now();
        assert_eq!(node.known(&image, false).await, [""; 0], "{name}");
        assert!(
            begun.elapsed() < RUN_LIMIT * 4,
            "{name}: {:?}",
            begun.elapsed()
        );
        let begun = Instant::now();
        for refresh in [false, true] {
            assert_eq!(node.known(&image, refresh).await, [""; 0], "{name}");
        }
        assert!(begun.elapsed() < RUN_LIMIT, "{name}");
        assert_eq!(node.runs(name), usize::from(name != "gone"), "{name}");
    }
}

/// The answer that counts still does while the plugin is broken.
#[tokio::test]
async fn an_earlier_answer_outlives_a_failure() {
    let script = format!(
        "test -e $0.broken && exit 1; {}",
        answer("Image", "", "r.example")
    );
    let node = node(&[("own", "r.example", &script)]);
    assert_eq!(node.known("r.example/a", false).await, ["u"]);
    fs::write(node.folder.path().join("bin/own.broken"), "").unwrap();
    tokio::time::sleep(MIN_AGE).await;
    for _ in 0..3 {
        assert_eq!(node.known("r.example/a", true).await, ["u"]);
    }
    assert_eq!(node.runs("own"), 2);
}

#[tokio::test]
async fn the_configuration_may_change_and_be_a_directory() {
    let node = node(&[("own", "r.example", &answer("Image", "", "r.example"))]);
    let file = node.folder.path().join("config.yaml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, "providers: [").unwrap();
    assert_eq!(node.known("r.example/a", false).await, [""; 0]);
    assert!(lock(&node.plugins.told).contains("no CredentialProviderConfig"));
    fs::write(&file, &text).unwrap();
    assert_eq!(node.known("r.example/a", false).await, ["u"]);
    // Files of a directory count together; others than these endings do not.
    let directory = node.folder.path().join("several");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("a.yaml"), &text).unwrap();
    fs::write(directory.join("b.yml"), text.replace("own", "other")).unwrap();
    fs::write(directory.join("readme"), "no").unwrap();
    assert_eq!(read_config(&directory).map(|all| all.len()), Ok(2));
    fs::write(directory.join("c.json"), &text).unwrap();
    let error = read_config(&directory).map(|all| all.len()).unwrap_err();
    assert!(
        error.contains("c.json: provider \"own\": named twice"),
        "{error}"
    );
}

/// As `hangs` above, but the daemon stops first: nothing is left of it, and nothing begins any more.
#[tokio::test]
async fn what_runs_ends_with_the_daemon() {
    let mut node = node(&[("hangs", "r.example", "echo $$ > $0.pid; sleep 600 & wait")]);
    node.plugins.run_timeout = Duration::from_secs(600);
    let pid = node.folder.path().join("bin/hangs.pid");
    let (found, ()) = tokio::join!(node.known("r.example/a", false), async {
        while !fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let stop = node.plugins.stop();
        tokio::time::timeout(RUN_LIMIT, stop).await.unwrap();
    });
    assert_eq!(found, [""; 0]);
    let pid = fs::read_to_string(&pid).unwrap();
    let process = format!("/proc/{}/stat", pid.trim());
    for _ in 0..100 {
        match fs::read_to_string(&process) {
            Ok(stat) if !stat.contains(") Z ") => {}
            _ => break,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let left = fs::read_to_string(&process).unwrap_or_default();
    assert!(left.is_empty() || left.contains(") Z "), "{left}");
}
