// SPDX-License-Identifier: Apache-2.0
//! What is said to a plugin, and what it answers: `CredentialProviderRequest` and `CredentialProviderResponse`. Pure.
//!
//! **Source** Kubernetes, `credentialprovider.kubelet.k8s.io/v1`; v1beta1 and v1alpha1 are the same but for their names.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::registry::credentials::target::Pattern;
use crate::registry::hosts::go_duration;
use crate::registry::{Credential, Secret};

/// Entries of one answer that are looked at.
const MOST_ENTRIES: usize = 1024;

/// The version in which a plugin speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V1beta1,
    V1alpha1,
}

impl Version {
    const ALL: [Version; 3] = [Version::V1, Version::V1beta1, Version::V1alpha1];

    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }

    const fn as_str(self) -> &'static str {
        match self {
            Version::V1 => "credentialprovider.kubelet.k8s.io/v1",
            Version::V1beta1 => "credentialprovider.kubelet.k8s.io/v1beta1",
            Version::V1alpha1 => "credentialprovider.kubelet.k8s.io/v1alpha1",
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'static str,
    api_version: &'static str,
    image: &'a str,
}

/// The question for an image, which is named without tag and digest.
pub(super) fn request(version: Version, image: &str) -> Vec<u8> {
    let request = Request {
        kind: "CredentialProviderRequest",
        api_version: version.as_str(),
        image,
    };
    // Of three texts: nothing can be wrong with it.
    let mut bytes = serde_json::to_vec(&request).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// What an answer is good for, besides the image that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum CacheKind {
    /// That image alone.
    #[default]
    Image,
    /// All images of the registry.
    Registry,
    /// All images.
    Global,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Response {
    pub(super) kind: CacheKind,
    /// How long it counts, where it says so.
    pub(super) life: Option<Duration>,
    /// What says more comes first.
    pub(super) entries: Vec<(Pattern, Credential)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    kind: String,
    api_version: String,
    cache_key_type: String,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Auth>>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// Reads an answer.
///
/// **Errors** what is wrong, without anything of what it says.
pub(super) fn parse(version: Version, bytes: &[u8]) -> Result<Response, &'static str> {
    let written: Written =
        serde_json::from_slice(bytes).map_err(|_| "no CredentialProviderResponse")?;
    if written.kind != "CredentialProviderResponse" {
        return Err("kind: want CredentialProviderResponse");
    }
    if written.api_version != version.as_str() {
        return Err("apiVersion: another than it was asked in");
    }
    let kind = match written.cache_key_type.as_str() {
        "Image" => CacheKind::Image,
        "Registry" => CacheKind::Registry,
        "Global" => CacheKind::Global,
        _ => return Err("cacheKeyType: want Image, Registry or Global"),
    };
    let life = match written.cache_duration {
        None => None,
        Some(text) => Some(go_duration(&text).ok_or("cacheDuration: want a time such as \"6h\"")?),
    };
    let auth = written.auth.unwrap_or_default();
    if auth.len() > MOST_ENTRIES {
        return Err("auth: too many entries");
    }
    let mut entries = Vec::new();
    for (key, auth) in auth {
        let pattern = Pattern::parse(&key).map_err(|_| "auth: a key is no registry")?;
        if auth.username.is_empty() && auth.password.is_empty() {
            continue;
        }
        let credential = Credential::Password {
            username: auth.username,
            password: Secret::new(auth.password),
        };
        entries.push((pattern, credential));
    }
    entries.sort_by_key(|(pattern, _)| pattern.rank());
    Ok(Response {
        kind,
        life,
        entries,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_says_what_kubelet_says() {
        let text = String::from_utf8(request(Version::V1beta1, "r.example:5000/team/app")).unwrap();
        assert_eq!(
            text,
            "{\"kind\":\"CredentialProviderRequest\",\
             \"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1beta1\",\
             \"image\":\"r.example:5000/team/app\"}\n"
        );
    }

    #[test]
    fn answers_are_read_and_garbage_is_refused() {
        let good = r#"{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
            "cacheKeyType":"Registry","cacheDuration":"6h",
            "auth":{"*.r.example":{"username":"any","password":"p"},
                    "a.r.example":{"username":"own","password":"hunter2"}, "b.example":{}}}"#;
        let parsed = parse(Version::V1, good.as_bytes()).unwrap();
        let life = Some(Duration::from_secs(6 * 3600));
        assert_eq!((parsed.kind, parsed.life), (CacheKind::Registry, life));
        let users: Vec<_> = parsed
            .entries
            .iter()
            .map(|(_, credential)| match credential {
                Credential::Password { username, .. } => username.as_str(),
                Credential::IdentityToken(_) => "",
            })
            .collect();
        assert_eq!(users, ["own", "any"]);
        let with = |from: &str, to: &str| {
            assert!(good.contains(from), "{from}");
            good.replace(from, to)
        };
        let empty = with("\"auth\":", "\"auth\":null,\"other\":");
        assert!(
            parse(Version::V1, empty.as_bytes())
                .unwrap()
                .entries
                .is_empty()
        );
        let cases = [
            ("hello".to_owned(), "no CredentialProviderResponse"),
            ("null".to_owned(), "no CredentialProviderResponse"),
            (with("ProviderResponse", "ProviderRequest"), "kind"),
            (with("k8s.io/v1", "k8s.io/v1beta1"), "apiVersion"),
            (with("Registry", "Node"), "cacheKeyType"),
            (with("6h", "-6h"), "cacheDuration"),
            (with("*.r.example", "r.example/*"), "auth"),
            (
                with("\"hunter2\"", "[\"hunter2\"]"),
                "no CredentialProviderResponse",
            ),
        ];
        for (text, problem) in cases {
            let error = parse(Version::V1, text.as_bytes()).unwrap_err();
            assert!(
                error.contains(problem) && !error.contains("hunter2"),
                "{error}, want {problem}"
            );
        }
    }
}
