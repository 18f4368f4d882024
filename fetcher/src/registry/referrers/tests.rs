// SPDX-License-Identifier: Apache-2.0
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use super::push::edit;
use super::*;
use crate::registry::fake::{Access, FakeRegistry, Misbehaviour, ReferrersApi};
use crate::registry::media::{OCI_INDEX, OCI_MANIFEST};
use crate::registry::{
    Credential, MirrorOptions, NoCredentials, RegistryClient, RegistryError, RegistryOptions,
    Secret, StaticCredentials,
};
use crate::source::{Class, Priority, ReadContext, RetryPolicy};

const OURS: &str = "application/x.ours";
const OTHERS: &str = "application/x.others";

fn subject() -> ManifestDigest {
    ManifestDigest::of(b"image")
}

fn context() -> ReadContext {
    ReadContext::new(Priority::Foreground).with_timeout(Duration::from_secs(20))
}

fn options() -> RegistryOptions {
    RegistryOptions {
        header_timeout: Duration::from_millis(800),
        stall_timeout: Duration::from_millis(500),
        retry: RetryPolicy {
            base: Duration::from_millis(2),
            max_attempts: 3,
            ..RetryPolicy::default()
        },
        ..RegistryOptions::default()
    }
}

fn client() -> RegistryClient {
    RegistryClient::new(options(), Arc::new(NoCredentials)).unwrap()
}

/// A referrer that differs from others by its name.
fn referrer(artifact_type: &str, name: &str) -> NewReferrer {
    let annotations = BTreeMap::from([("name".to_owned(), name.to_owned())]);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": artifact_type,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": ManifestDigest::of(b"{}").to_string(), "size": 2},
        "layers": [], "annotations": annotations,
        "subject": {"mediaType": OCI_MANIFEST, "digest": subject().to_string(), "size": 5},
    });
    NewReferrer {
        bytes: Bytes::from(manifest.to_string()),
        media_type: OCI_MANIFEST.to_owned(),
        artifact_type: artifact_type.to_owned(),
        annotations,
        subject: subject(),
    }
}

fn names(found: &[Referrer]) -> Vec<&str> {
    let mut names: Vec<&str> = found
        .iter()
        .map(|it| it.annotations["name"].as_str())
        .collect();
    names.sort_unstable();
    names
}

async fn listed(fake: &FakeRegistry) -> Result<Vec<Referrer>, RegistryError> {
    let place = fake.place("a");
    client()
        .referrers(&context(), &place, subject(), OURS)
        .await
}

async fn put(fake: &FakeRegistry, new: &NewReferrer) -> Result<Listed, RegistryError> {
    let place = fake.place("a");
    client()
        .put_referrer(&context(), &place, new, |_| true)
        .await
}

/// The entries under the tag, by name.
fn under_tag(fake: &FakeRegistry) -> Vec<String> {
    let bytes = fake.manifest("a", &fallback_tag(subject())).unwrap();
    let list: List = serde_json::from_slice(&bytes).unwrap();
    let name = |it: &serde_json::Value| it["annotations"]["name"].as_str().unwrap().to_owned();
    list.manifests.iter().map(name).collect()
}

#[test]
fn links_lead_to_the_next_page() {
    for (header, expected) in [
        ("</v2/a?n=1>; rel=\"next\"", Some("/v2/a?n=1")),
        (
            "<https://x/v2/a?n=1,2>; rel=next",
            Some("https://x/v2/a?n=1,2"),
        ),
        (
            "</b>; rel=\"prev\", </c>; title=\"x\"; REL=\"Next\"",
            Some("/c"),
        ),
        ("</b>; rel=\"prev\"", None),
        ("</b>", None),
        ("</b", None),
        ("", None),
    ] {
        assert_eq!(next_link(header), expected, "{header}");
    }
}

#[test]
fn entries_of_other_shapes_are_no_concern() {
    let list = json!({"manifests": [
        {"mediaType": "m", "digest": subject().to_string(), "size": 1, "artifactType": OURS},
        {"mediaType": "m", "digest": "sha512:00", "size": 1, "artifactType": OURS},
        {"mediaType": "m", "digest": subject().to_string(), "size": -1, "artifactType": OURS},
        {"mediaType": "m", "digest": subject().to_string(), "size": 1},
        {"mediaType": "m", "digest": subject().to_string(), "size": 1, "artifactType": OTHERS},
        7,
    ]});
    let found = entries_of(list.to_string().as_bytes(), OURS).unwrap();
    assert_eq!(found.len(), 1);
    assert!(entries_of(b"{}", OURS).is_err());
    assert!(entries_of(b"<html>", OURS).is_err());
}

#[tokio::test]
async fn the_registry_lists_in_pages() {
    for filters in [true, false] {
        let fake = FakeRegistry::start().await;
        fake.set_referrers(Some(ReferrersApi {
            page: 2,
            filters,
            annotations: true,
        }));
        assert_eq!(listed(&fake).await.unwrap(), []);
        for (of_type, name) in [(OURS, "1"), (OTHERS, "2"), (OURS, "3"), (OURS, "4")] {
            let outcome = put(&fake, &referrer(of_type, name)).await.unwrap();
            assert_eq!(outcome, Listed::ByRegistry);
        }
        fake.take_seen();
        let found = listed(&fake).await.unwrap();
        assert_eq!(names(&found), ["1", "3", "4"], "filters: {filters}");
        assert!(found.iter().all(|it| it.artifact_type == OURS));
        let seen = fake.take_seen();
        assert_eq!(seen.len(), 2, "pages");
        assert!(seen[0].query.contains("artifactType=application%2Fx.ours"));
        let lines: Vec<_> = seen.iter().map(|it| it.path.clone()).collect();
        assert_eq!(lines, vec![format!("/v2/a/referrers/{}", subject()); 2]);
        assert_eq!(fake.manifest("a", &fallback_tag(subject())), None);
    }
}

#[tokio::test]
async fn the_tag_stands_for_a_registry_that_lists_nothing() {
    let fake = FakeRegistry::start().await;
    assert_eq!(listed(&fake).await.unwrap(), []);
    for (of_type, name) in [(OTHERS, "1"), (OURS, "2")] {
        let outcome = put(&fake, &referrer(of_type, name)).await.unwrap();
        assert_eq!(outcome, Listed::ByTag);
    }
    assert_eq!(under_tag(&fake), ["1", "2"]);
    assert_eq!(names(&listed(&fake).await.unwrap()), ["2"]);
    // Twice the same is once, and writes the manifest alone.
    fake.take_seen();
    put(&fake, &referrer(OURS, "2")).await.unwrap();
    let tag = format!("/v2/a/manifests/{}", fallback_tag(subject()));
    let writes = fake.take_lines();
    assert!(!writes.contains(&format!("PUT {tag}")), "{writes:?}");
    // A later one of ours takes the place of the earlier one; others stay.
    put(&fake, &referrer(OURS, "3")).await.unwrap();
    assert_eq!(under_tag(&fake), ["1", "3"]);
    let place = fake.place("a");
    let keep = client()
        .put_referrer(&context(), &place, &referrer(OURS, "4"), |it| {
            it.annotations["name"] == "9"
        })
        .await;
    keep.unwrap();
    assert_eq!(under_tag(&fake), ["1", "3", "4"]);
}

#[tokio::test]
async fn answers_that_know_no_referrers_lead_to_the_tag() {
    let html = Misbehaviour::Answer("text/html".to_owned(), Bytes::from_static(b"<html>"));
    let statuses = [404, 400, 405, 501].map(|status| Misbehaviour::Status(status, None));
    for fault in statuses.into_iter().chain([html]) {
        let fake = FakeRegistry::start().await;
        put(&fake, &referrer(OURS, "1")).await.unwrap();
        fake.misbehave("GET", "/referrers/", 0, 9, fault.clone());
        assert_eq!(names(&listed(&fake).await.unwrap()), ["1"], "{fault:?}");
    }
}

#[tokio::test]
async fn whoever_is_faster_keeps_his_entry() {
    let tag = fallback_tag(subject());
    // 0 = GET of the index, 1 = HEAD, 3 = HEAD after the PUT. Between 1 and 2 nobody can tell.
    for k in [0, 1, 3] {
        let fake = FakeRegistry::start().await;
        put(&fake, &referrer(OTHERS, "first")).await.unwrap();
        let before = fake.manifest("a", &tag).unwrap();
        let faster = edit(Some(&before), &referrer(OTHERS, "faster"), |_| false);
        let place = [&"a".to_owned(), &tag, &OCI_INDEX.to_owned()].map(Clone::clone);
        let fault = Misbehaviour::Meanwhile(place, faster.unwrap().unwrap());
        fake.misbehave("", &tag, k, 1, fault);
        put(&fake, &referrer(OURS, "slower")).await.unwrap();
        assert_eq!(under_tag(&fake), ["first", "faster", "slower"], "k = {k}");
    }
}

#[tokio::test]
async fn an_index_that_keeps_changing_is_given_up() {
    let fake = FakeRegistry::start().await;
    let tag = fallback_tag(subject());
    let place = || [&"a".to_owned(), &tag, &OCI_INDEX.to_owned()].map(Clone::clone);
    for n in 0..12 {
        let other = edit(None, &referrer(OTHERS, &n.to_string()), |_| false);
        let fault = Misbehaviour::Meanwhile(place(), other.unwrap().unwrap());
        fake.misbehave("HEAD", &tag, 0, 1, fault);
    }
    let error = put(&fake, &referrer(OURS, "mine")).await.unwrap_err();
    assert!(matches!(error, RegistryError::Contended { .. }), "{error}");
    assert_eq!(error.class(), Class::Transient);
    assert!(!under_tag(&fake).contains(&"mine".to_owned()));
}

#[tokio::test]
async fn a_tag_that_is_something_else_is_left_alone() {
    let fake = FakeRegistry::start().await;
    let tag = fallback_tag(subject());
    for (media_type, bytes) in [
        (OCI_MANIFEST, r#"{"schemaVersion":2,"layers":[]}"#),
        (OCI_INDEX, r#"{"schemaVersion":2,"manifests":{}}"#),
        (OCI_INDEX, "{"),
    ] {
        fake.add_manifest("a", &tag, media_type, bytes);
        let error = put(&fake, &referrer(OURS, "1")).await.unwrap_err();
        assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
        assert_eq!(fake.manifest("a", &tag).unwrap(), bytes);
        let error = listed(&fake).await.unwrap_err();
        assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    }
}

#[tokio::test]
async fn what_stands_in_the_index_stays() {
    let before = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"digest":"sha512:00","extra":[1]},7],"annotations":{"k":"v"},"z":null}"#;
    let new = referrer(OURS, "1");
    let after = edit(Some(before.as_bytes()), &new, |_| true)
        .unwrap()
        .unwrap();
    let text = String::from_utf8(after.to_vec()).unwrap();
    let (head, tail) = text.split_once(r#"7,{"mediaType""#).unwrap();
    assert!(before.starts_with(head), "{text}");
    assert!(
        tail.ends_with(r#"}],"annotations":{"k":"v"},"z":null}"#),
        "{text}"
    );
    assert_eq!(edit(Some(&after), &new, |_| true), Ok(None));
    // A description that is wrong is put right.
    let wrong = text.replace(OURS, OTHERS);
    let righted = edit(Some(wrong.as_bytes()), &new, |_| true).unwrap();
    assert_eq!(righted, Some(after));
}

#[tokio::test]
async fn lists_without_an_end_are_refused() {
    let own = format!("/v2/a/referrers/{}", subject());
    let cases = [
        (
            format!("<{own}?artifactType=application%2Fx.ours>; rel=\"next\""),
            "in a circle",
        ),
        (
            "<http://127.0.0.1:1/v2/a>; rel=\"next\"".to_owned(),
            "elsewhere",
        ),
        (
            "<../manifests/latest>; rel=\"next\"".to_owned(),
            "elsewhere",
        ),
        ("<http://[>; rel=\"next\"".to_owned(), "malformed link"),
    ];
    for (link, expected) in cases {
        let fake = FakeRegistry::start().await;
        fake.set_referrers(Some(ReferrersApi::default()));
        fake.misbehave(
            "GET",
            "/referrers/",
            0,
            1000,
            Misbehaviour::Link(link.clone()),
        );
        let error = listed(&fake).await.unwrap_err();
        assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{link}: {error}");
        assert_eq!(fake.take_seen().len(), 1, "{link}");
    }
    // Ever new pages.
    let fake = FakeRegistry::start().await;
    fake.set_referrers(Some(ReferrersApi::default()));
    for n in 0..100 {
        let link = Misbehaviour::Link(format!("<{own}?first={n}>; rel=\"next\""));
        fake.misbehave("GET", "/referrers/", 0, 1, link);
    }
    let error = listed(&fake).await.unwrap_err();
    assert!(error.to_string().contains("more than 16 pages"), "{error}");
    assert_eq!(fake.take_seen().len(), PAGES_MAX);
}

#[tokio::test]
async fn huge_lists_are_refused() {
    let fake = FakeRegistry::start().await;
    let answer = |body: String| Misbehaviour::Answer(OCI_INDEX.to_owned(), Bytes::from(body));
    let cap = usize::try_from(options().manifest_cap_bytes).unwrap();
    fake.misbehave("GET", "/referrers/", 0, 1, answer(" ".repeat(cap + 1)));
    let error = listed(&fake).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
    let entry = |n: usize| {
        let digest = ManifestDigest::of(&n.to_le_bytes()).to_string();
        json!({"mediaType": "m", "digest": digest, "size": 1, "artifactType": OURS})
    };
    for (count, fits) in [(REFERRERS_MAX, true), (REFERRERS_MAX + 1, false)] {
        let entries: Vec<_> = (0..count).map(entry).collect();
        let body = json!({"schemaVersion": 2, "manifests": entries}).to_string();
        fake.misbehave("GET", "/referrers/", 0, 1, answer(body));
        assert_eq!(listed(&fake).await.is_ok(), fits, "{count}");
    }
    fake.misbehave("GET", "/referrers/", 0, 1, answer("[]".to_owned()));
    let error = listed(&fake).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn failures_in_passing_are_repeated_and_silence_ends() {
    for k in 0..2 {
        let fake = FakeRegistry::start().await;
        fake.set_referrers(Some(ReferrersApi {
            page: 1,
            ..ReferrersApi::default()
        }));
        for name in ["1", "2"] {
            put(&fake, &referrer(OURS, name)).await.unwrap();
        }
        for fault in [Misbehaviour::Status(503, None), Misbehaviour::CutBody(5)] {
            fake.misbehave("GET", "/referrers/", k, 1, fault);
            assert_eq!(names(&listed(&fake).await.unwrap()), ["1", "2"], "k = {k}");
        }
    }
    let fake = FakeRegistry::start().await;
    fake.misbehave("GET", "/referrers/", 0, 9, Misbehaviour::NoAnswer);
    let began = std::time::Instant::now();
    let context = ReadContext::new(Priority::Foreground).with_timeout(Duration::from_millis(100));
    let place = fake.place("a");
    let outcome = client().referrers(&context, &place, subject(), OURS).await;
    assert_eq!(outcome.unwrap_err().class(), Class::Cancelled);
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_wrong_subject_in_the_answer_is_told() {
    let fake = FakeRegistry::start().await;
    fake.set_referrers(Some(ReferrersApi::default()));
    let mut new = referrer(OURS, "1");
    new.subject = ManifestDigest::of(b"another");
    let error = put(&fake, &new).await.unwrap_err();
    assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn credentials_are_used_as_for_manifests() {
    let fake = FakeRegistry::start().await;
    fake.set_referrers(Some(ReferrersApi::default()));
    fake.set_access(Access::Bearer {
        password: Some(("user".to_owned(), "secret".to_owned())),
        identity: None,
        expires_in: 60,
        refusal: 401,
    });
    let error = listed(&fake).await.unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    let credential = Credential::Password {
        username: "user".to_owned(),
        password: Secret::new("secret"),
    };
    let credentials = StaticCredentials::default().with(&fake.host(), credential);
    let client = RegistryClient::new(options(), Arc::new(credentials)).unwrap();
    let (place, new) = (fake.place("a"), referrer(OURS, "1"));
    client
        .put_referrer(&context(), &place, &new, |_| true)
        .await
        .unwrap();
    fake.expire_tokens();
    let found = client.referrers(&context(), &place, subject(), OURS).await;
    assert_eq!(names(&found.unwrap()), ["1"]);
}

#[tokio::test]
async fn a_mirror_that_knows_of_none_does_not_decide() {
    let (origin, mirror) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let files = tempfile::tempdir().unwrap();
    let directory = files.path().join(origin.host());
    std::fs::create_dir_all(&directory).unwrap();
    let text = format!("[host.\"http://{}\"]\n", mirror.host());
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let options = RegistryOptions {
        mirrors: MirrorOptions {
            directories: vec![files.path().to_owned()],
            ..MirrorOptions::default()
        },
        ..options()
    };
    let client = RegistryClient::new(options, Arc::new(NoCredentials)).unwrap();
    let (place, new) = (origin.place("a"), referrer(OURS, "1"));
    client
        .put_referrer(&context(), &place, &new, |_| true)
        .await
        .unwrap();
    assert_eq!(
        mirror.take_lines(),
        Vec::<String>::new(),
        "pushed to the registry"
    );
    origin.take_seen();
    for api in [None, Some(ReferrersApi::default())] {
        mirror.set_referrers(api);
        let found = client.referrers(&context(), &place, subject(), OURS).await;
        assert_eq!(names(&found.unwrap()), ["1"]);
        let seen = mirror.take_seen();
        assert!(!seen.is_empty(), "the mirror is asked first");
        let named = format!("ns={}", origin.host().replace(':', "%3A"));
        assert!(seen.iter().all(|it| it.query.contains(&named)), "{seen:?}");
        assert!(!origin.take_seen().is_empty());
    }
    // One that knows is enough, page by page.
    mirror.set_referrers(Some(ReferrersApi {
        page: 1,
        ..ReferrersApi::default()
    }));
    for name in ["2", "3"] {
        let new = referrer(OURS, name);
        mirror.add_manifest("a", name, OCI_MANIFEST, new.bytes);
    }
    let found = client.referrers(&context(), &place, subject(), OURS).await;
    assert_eq!(names(&found.unwrap()), ["2", "3"]);
    assert_eq!(origin.take_lines(), Vec::<String>::new());
    assert!(mirror.take_seen().iter().all(|it| it.query.contains("ns=")));
}
