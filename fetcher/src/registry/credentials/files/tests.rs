// SPDX-License-Identifier: Apache-2.0

use std::fs;
use std::os::unix::fs::symlink;

use super::*;

fn names(found: &[Credential]) -> Vec<String> {
    let name = |credential: &Credential| match credential {
        Credential::Password { username, password } => format!("{username}:{}", password.reveal()),
        Credential::IdentityToken(token) => format!("token {}", token.reveal()),
    };
    found.iter().map(name).collect()
}

async fn known(files: &CredentialFiles, host: &str, repository: &str) -> Vec<String> {
    let target = CredentialTarget::new(host, repository);
    names(&files.credentials(&target, false).await)
}

#[tokio::test]
async fn all_that_match_count_and_those_that_say_more_first() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.json"), folder.path().join("b.json"));
    // u:p:q
    let text = r#"{"auths":{
        "registry.example":{"auth":"dTpwOnE="},
        "registry.example/team":{"username":"team","password":"t"},
        "*.example":{"username":"any","password":"x"},
        "registry.example:5000":{"username":"port","password":"x"},
        "https://index.docker.io/v1/":{"identitytoken":"it","auth":"dTpw"}
    }}"#;
    fs::write(&a, text).unwrap();
    let text =
        r#"{"auths":{"registry.example":{"username":"second","password":""}},"HttpHeaders":{}}"#;
    fs::write(&b, text).unwrap();
    let files = CredentialFiles::new(vec![a, b]);
    let host = "registry.example";
    assert_eq!(
        known(&files, host, "team/app").await,
        ["team:t", "u:p:q", "second:", "any:x"]
    );
    assert_eq!(
        known(&files, host, "teammate").await,
        ["u:p:q", "second:", "any:x"]
    );
    assert_eq!(
        known(&files, "registry.example:5000", "team/app").await,
        ["port:x"]
    );
    assert_eq!(
        known(&files, "registry.example:5001", "team/app").await,
        [""; 0]
    );
    assert_eq!(
        known(&files, "registry.example.evil", "team/app").await,
        [""; 0]
    );
    assert_eq!(known(&files, "docker.io", "library/a").await, ["token it"]);
    let mut hosts = files.hosts().await;
    hosts.sort();
    hosts.dedup();
    assert_eq!(
        hosts,
        ["docker.io", "registry.example", "registry.example:5000"]
    );
}

/// A volume of a Secret: the file is a link to what lies behind a link, which is put in place as a whole.
#[tokio::test]
async fn mounted_secrets_are_read_again_when_they_change() {
    let folder = tempfile::tempdir().unwrap();
    let volume = folder.path().join("pull-secret");
    let put = |version: &str, password: &str| {
        let behind = volume.join(version);
        fs::create_dir_all(&behind).unwrap();
        let text =
            format!(r#"{{"auths":{{"r.example":{{"username":"u","password":"{password}"}}}}}}"#);
        fs::write(behind.join(".dockerconfigjson"), text).unwrap();
        symlink(version, volume.join("..next")).unwrap();
        fs::rename(volume.join("..next"), volume.join("..data")).unwrap();
    };
    fs::create_dir(&volume).unwrap();
    let files = [&volume, folder.path()].map(|path| CredentialFiles::new(vec![path.to_owned()]));
    put("..1", "old");
    symlink("..data/.dockerconfigjson", volume.join(".dockerconfigjson")).unwrap();
    for files in &files {
        assert_eq!(known(files, "r.example", "a").await, ["u:old"]);
    }
    put("..2", "new");
    for files in &files {
        assert_eq!(known(files, "r.example", "a").await, ["u:new"]);
    }
}

#[tokio::test]
async fn a_bad_file_or_entry_does_not_hide_the_good_ones() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &[u8]| fs::write(folder.path().join(name), text).unwrap();
    put("a", b"{\"auths\":");
    put("b", b"[1]");
    put("c", &vec![b' '; 1 << 20 | 1]);
    let entries = br#"{"auths":{
        "r.example":{"username":"u","password":"p"},
        "s.example":{"auth":"%%%"}, "t.example":{"auth":"dQ=="}, "u.example":{"auth":"OnA="},
        "v.example:x":{"auth":"dTpw"}, "w.example":{}
    }}"#;
    put("d", entries);
    std::os::unix::net::UnixListener::bind(folder.path().join("e")).unwrap();
    let files = CredentialFiles::new(vec![
        folder.path().join("missing"),
        folder.path().to_owned(),
    ]);
    assert_eq!(known(&files, "r.example", "a").await, ["u:p"]);
    for host in [
        "s.example",
        "t.example",
        "u.example",
        "v.example",
        "w.example",
    ] {
        assert_eq!(known(&files, host, "a").await, [""; 0], "{host}");
    }
    let told = files.told.lock().unwrap();
    let of = |name: &str| told[&folder.path().join(name)].clone();
    assert_eq!(of("a"), "no JSON (line 1)");
    assert_eq!(of("b"), "no docker configuration (line 1)");
    assert!(of("c").contains("larger than"));
    let expected = "entry \"s.example\": `auth` is no base64; entry \"t.example\": `auth` has no colon; \
                    entry \"u.example\": no user name; entry \"v.example:x\": the port is no number";
    assert_eq!(of("d"), expected);
    assert!(of("e").contains("neither a file"));
    assert!(of("missing").contains("No such file"));
}
