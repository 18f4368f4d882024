// SPDX-License-Identifier: Apache-2.0
//! What registries say when something was pushed: distribution's envelope of events, and Harbor's webhook.
//!
//! **Source** distribution, `notifications/event.go`; Harbor, `PUSH_ARTIFACT` of its webhooks (default payload).

use std::collections::BTreeMap;

use serde::Deserialize;
use sluice_blockindex::digest::ManifestDigest;
use sluice_fetcher::registry::{ImageReference, MANIFEST_TYPES, Repository};

/// The most events of one body that are looked at; distribution sends one or a few.
pub const EVENTS_MAX: usize = 256;
/// The longest name that is looked at.
const NAME_MAX_BYTES: usize = 512;

/// What one event comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// An image was pushed.
    Image(ImageReference),
    /// Something else happened, or only a blob came.
    Nothing(&'static str),
    /// It cannot be read.
    Malformed(&'static str),
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    events: Option<Vec<Event>>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    event_data: Option<EventData>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    action: String,
    #[serde(default)]
    target: Target,
    #[serde(default)]
    request: Origin,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Target {
    media_type: String,
    digest: String,
    repository: String,
    url: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Origin {
    host: String,
}

#[derive(Deserialize)]
struct EventData {
    #[serde(default)]
    resources: Vec<Resource>,
    #[serde(default)]
    repository: HarborRepository,
}

#[derive(Deserialize)]
struct Resource {
    #[serde(default)]
    digest: String,
    #[serde(default)]
    resource_url: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HarborRepository {
    repo_full_name: String,
}

/// Reads a body; `hosts` says what this node calls a registry that names itself otherwise.
///
/// **Errors** it is JSON of neither kind.
pub fn read(body: &[u8], hosts: &BTreeMap<String, String>) -> Result<Vec<Told>, String> {
    let body: Body = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if let Some(events) = body.events {
        let told = events.iter().take(EVENTS_MAX);
        return Ok(told.map(|event| of_distribution(event, hosts)).collect());
    }
    match (body.kind.as_deref(), body.event_data) {
        (Some("PUSH_ARTIFACT"), Some(data)) => {
            let name = &data.repository.repo_full_name;
            let told = data.resources.iter().take(EVENTS_MAX);
            Ok(told.map(|it| of_harbor(it, name, hosts)).collect())
        }
        (Some(_), _) => Ok(vec![Told::Nothing("other")]),
        (None, _) => Err("neither events nor a type".to_owned()),
    }
}

fn image(host: &str, name: &str, digest: &str, hosts: &BTreeMap<String, String>) -> Told {
    if [host, name, digest]
        .iter()
        .any(|it| it.len() > NAME_MAX_BYTES)
    {
        return Told::Malformed("a name is too long");
    }
    let host = hosts.get(host).map_or(host, String::as_str);
    let Ok(digest) = digest.parse::<ManifestDigest>() else {
        return Told::Malformed("the digest is no sha256 digest");
    };
    match Repository::new(host, name) {
        Ok(place) => Told::Image(place.with_digest(digest)),
        Err(_) => Told::Malformed("host and repository name no place"),
    }
}

fn of_distribution(event: &Event, hosts: &BTreeMap<String, String>) -> Told {
    let Event {
        action,
        target,
        request,
    } = event;
    if action != "push" {
        return Told::Nothing("other");
    }
    if !MANIFEST_TYPES.contains(&target.media_type.as_str()) {
        return Told::Nothing("blob");
    }
    // The host that the pusher used; the URL has it, too, as the registry is configured.
    let host = match request.host.as_str() {
        "" => host_of_url(&target.url).unwrap_or_default(),
        host => host,
    };
    image(host, &target.repository, &target.digest, hosts)
}

fn of_harbor(resource: &Resource, name: &str, hosts: &BTreeMap<String, String>) -> Told {
    // HOST/PROJECT/REPOSITORY:TAG, or with @DIGEST.
    let host = resource.resource_url.split('/').next().unwrap_or_default();
    image(host, name, &resource.digest, hosts)
}

fn host_of_url(url: &str) -> Option<&str> {
    url.split_once("://")?.1.split('/').next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn read_all(body: &Value) -> Vec<Told> {
        let hosts = BTreeMap::from([("registry:5000".to_owned(), "r.test".to_owned())]);
        super::read(body.to_string().as_bytes(), &hosts).unwrap()
    }

    fn at(place: &str) -> Told {
        Told::Image(format!("{place}@{DIGEST}").parse().unwrap())
    }

    /// In the form of distribution's documentation; what a real docker-registry sends is tested end to end.
    fn pushed(media_type: &str, action: &str) -> Value {
        json!({"events": [{
            "id": "320678d8-ca14-430f-8bb6-4ca139cd83f7",
            "timestamp": "2026-01-05T14:22:20.9Z",
            "action": action,
            "target": {
                "mediaType": media_type,
                "size": 708,
                "digest": DIGEST,
                "length": 708,
                "repository": "team/app",
                "url": format!("http://127.0.0.1:5000/v2/team/app/manifests/{DIGEST}"),
                "tag": "v1",
            },
            "request": {
                "id": "6df24a34-0959-4923-81ca-14f09767db19",
                "addr": "192.168.64.11:42961",
                "host": "r.test:5000",
                "method": "PUT",
                "useragent": "skopeo/1.9",
            },
            "actor": {},
            "source": {"addr": "registry:5000", "instanceID": "a53db899"},
        }]})
    }

    #[test]
    fn distribution_tells_of_manifests() {
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        let layer = "application/octet-stream";
        assert_eq!(
            read_all(&pushed(manifest, "push")),
            [at("r.test:5000/team/app")]
        );
        assert_eq!(read_all(&pushed(layer, "push")), [Told::Nothing("blob")]);
        assert_eq!(
            read_all(&pushed(manifest, "pull")),
            [Told::Nothing("other")]
        );
        let mut known = pushed(manifest, "push");
        known["events"][0]["request"]["host"] = "registry:5000".into();
        assert_eq!(read_all(&known), [at("r.test/team/app")]);
        let mut no_host = pushed(manifest, "push");
        no_host["events"][0]["request"] = json!({});
        assert_eq!(read_all(&no_host), [at("127.0.0.1:5000/team/app")]);
        for (field, value) in [("digest", "sha256:0"), ("repository", "../../etc")] {
            let mut wrong = pushed(manifest, "push");
            wrong["events"][0]["target"][field] = value.into();
            assert!(
                matches!(read_all(&wrong)[..], [Told::Malformed(_)]),
                "{field}"
            );
        }
    }

    #[test]
    fn harbor_tells_of_artifacts() {
        let mut body = json!({
            "type": "PUSH_ARTIFACT",
            "occur_at": 1_680_501_893,
            "operator": "admin",
            "event_data": {
                "resources": [{
                    "digest": DIGEST,
                    "tag": "v1",
                    "resource_url": "harbor.test/team/app:v1",
                }],
                "repository": {
                    "date_created": 1_680_501_430,
                    "name": "app",
                    "namespace": "team",
                    "repo_full_name": "team/app",
                    "repo_type": "private",
                },
            },
        });
        assert_eq!(read_all(&body), [at("harbor.test/team/app")]);
        body["type"] = "DELETE_ARTIFACT".into();
        assert_eq!(read_all(&body), [Told::Nothing("other")]);
    }

    #[test]
    fn what_is_neither_is_an_error() {
        for body in ["", "{}", "[]", "{\"events\": 3}", "nonsense"] {
            let read = super::read(body.as_bytes(), &BTreeMap::new());
            assert!(read.is_err(), "{body}");
        }
        let many = json!({"events": vec![json!({"action": "pull"}); EVENTS_MAX + 1]});
        assert_eq!(read_all(&many).len(), EVENTS_MAX);
    }
}
