// SPDX-License-Identifier: Apache-2.0
use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::artifact::{ArtifactLayer, GENERATION, IndexBlobs, MANIFEST_TYPE, Subject};
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};

use super::*;
use crate::registry::fake::{FakeRegistry, Misbehaviour, ReferrersApi};
use crate::registry::{NewReferrer, NoCredentials, RegistryOptions, fallback_tag};
use crate::source::{Priority, RetryPolicy};

fn subject() -> ManifestDigest {
    ManifestDigest::of(b"image")
}

fn context() -> ReadContext {
    ReadContext::new(Priority::Foreground).with_timeout(Duration::from_secs(20))
}

fn client() -> RegistryClient {
    let options = RegistryOptions {
        retry: RetryPolicy {
            base: Duration::from_millis(2),
            max_attempts: 2,
            ..RetryPolicy::default()
        },
        ..RegistryOptions::default()
    };
    RegistryClient::new(options, Arc::new(NoCredentials)).unwrap()
}

fn artifact(generation: u32, name: &str) -> Artifact {
    let layer = ArtifactLayer {
        blob: BlobDigest::of(b"blob"),
        blob_bytes: 1000,
        diff_id: DiffId::of(b"tar"),
        index: Ok(IndexBlobs {
            digest: IndexDigest::of(name.as_bytes()),
            bytes: 100,
            windows: None,
        }),
    };
    Artifact {
        subject: Subject {
            media_type: MANIFEST_TYPE.to_owned(),
            digest: subject(),
            bytes: 700,
        },
        generation,
        recipe: String::new(),
        layers: vec![layer],
    }
}

fn add(fake: &FakeRegistry, artifact: &Artifact) -> ManifestDigest {
    let bytes = artifact.to_json().unwrap();
    fake.add_manifest("a", "any", MANIFEST_TYPE, bytes)
}

async fn find(fake: &FakeRegistry) -> Result<Option<FoundArtifact>, FindArtifactError> {
    find_index_artifact(&client(), &fake.place("a"), subject(), &context()).await
}

/// Manifests that were read.
fn read_count(fake: &FakeRegistry) -> usize {
    let lines = fake.take_lines();
    lines
        .iter()
        .filter(|it| it.contains("/manifests/sha256:"))
        .count()
}

#[tokio::test]
async fn the_highest_generation_counts() {
    for annotations in [true, false] {
        let fake = FakeRegistry::start().await;
        fake.set_referrers(Some(ReferrersApi {
            page: 2,
            annotations,
            ..ReferrersApi::default()
        }));
        assert_eq!(find(&fake).await.unwrap(), None);
        for generation in [2, 11, 9] {
            add(&fake, &artifact(generation, "x"));
        }
        fake.take_seen();
        let found = find(&fake).await.unwrap().unwrap();
        assert_eq!(found.artifact, artifact(11, "x"));
        // The list alone tells which one is worth a request, where it repeats annotations.
        assert_eq!(read_count(&fake), if annotations { 1 } else { 3 });

        let twin = [add(&fake, &artifact(11, "y")), found.digest];
        let found = find(&fake).await.unwrap().unwrap();
        assert_eq!(found.digest, twin.into_iter().max().unwrap());
    }
}

#[tokio::test]
async fn it_is_found_under_the_tag_too() {
    let fake = FakeRegistry::start().await;
    let wanted = artifact(1, "x");
    let new = NewReferrer {
        bytes: Bytes::from(wanted.to_json().unwrap()),
        media_type: MANIFEST_TYPE.to_owned(),
        artifact_type: ARTIFACT_TYPE.to_owned(),
        annotations: wanted.annotations(),
        subject: subject(),
    };
    let place = fake.place("a");
    let pushed = client()
        .put_referrer(&context(), &place, &new, |_| true)
        .await;
    pushed.unwrap();
    let found = find(&fake).await.unwrap().unwrap();
    assert_eq!(found.artifact, wanted);
    assert_eq!(found.digest, ManifestDigest::of(&new.bytes));
}

/// Puts an index under the tag that lists `bytes` as an artifact, with this size and generation.
fn list(fake: &FakeRegistry, entries: &[(&[u8], usize, Option<&str>)]) -> Vec<ManifestDigest> {
    let mut listed = Vec::new();
    let entry = |(bytes, size, generation): &(&[u8], usize, Option<&str>)| {
        let digest = fake.add_manifest("a", "any", MANIFEST_TYPE, bytes.to_vec());
        listed.push(digest);
        let mut entry = serde_json::json!({
            "mediaType": MANIFEST_TYPE, "digest": digest.to_string(), "size": size,
            "artifactType": ARTIFACT_TYPE,
        });
        if let Some(generation) = generation {
            entry["annotations"] = serde_json::json!({GENERATION: generation});
        }
        entry
    };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": entries,
    });
    let tag = fallback_tag(subject());
    let media_type = "application/vnd.oci.image.index.v1+json";
    fake.add_manifest("a", &tag, media_type, index.to_string());
    listed
}

#[tokio::test]
async fn what_is_not_valid_is_refused_with_the_reason() {
    let fake = FakeRegistry::start().await;
    let good = artifact(1, "x").to_json().unwrap();
    let mut other = artifact(9, "x");
    other.subject.digest = ManifestDigest::of(b"another image");
    let other = other.to_json().unwrap();
    let image = br#"{"schemaVersion":2,"layers":[]}"#;
    let huge = usize::try_from(ARTIFACT_MAX_BYTES).unwrap() + 1;
    for (bytes, size, expected) in [
        (&other[..], other.len(), "artifact is of sha256:"),
        (&image[..], image.len(), "malformed"),
        (&good[..], good.len() + 1, "the list says"),
        (&good[..], huge, "artifact of 4194305 bytes"),
    ] {
        let digests = list(&fake, &[(bytes, size, Some("9"))]);
        fake.take_seen();
        let error = find(&fake).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent);
        let text = error.to_string();
        assert!(
            text.contains(expected) && text.contains(&digests[0].to_string()),
            "{text}"
        );
        // What claims to be too large is not even asked for.
        assert_eq!(read_count(&fake), usize::from(size != huge), "{expected}");
    }
    // A lie beside a valid one costs nothing but a request.
    let digests = list(
        &fake,
        &[
            (&other, other.len(), Some("9")),
            (&good, good.len(), Some("1")),
            (image, image.len(), None),
        ],
    );
    assert_eq!(find(&fake).await.unwrap().unwrap().digest, digests[1]);
    let place = fake.place("a");
    let seen = index_artifacts(&client(), &place, subject(), &context()).await;
    let seen = seen.unwrap();
    assert_eq!((seen.refused.len(), seen.highest_generation), (2, 9));
    // Listed and gone.
    fake.remove_manifest("a", &digests[1].to_string());
    let error = find(&fake).await.unwrap_err();
    assert!(
        matches!(error, FindArtifactError::Refused { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_list_that_exaggerates_changes_nothing() {
    let fake = FakeRegistry::start().await;
    let (low, high) = (
        artifact(2, "x").to_json().unwrap(),
        artifact(3, "x").to_json().unwrap(),
    );
    let digests = list(
        &fake,
        &[
            (&low, low.len(), Some("4000000000")),
            (&high, high.len(), Some("3")),
        ],
    );
    assert_eq!(find(&fake).await.unwrap().unwrap().digest, digests[1]);
}

#[tokio::test]
async fn many_candidates_are_not_all_read() {
    let fake = FakeRegistry::start().await;
    let bytes: Vec<_> = (1..=20)
        .map(|n| artifact(n, "x").to_json().unwrap())
        .collect();
    let entries: Vec<_> = bytes.iter().map(|it| (&it[..], it.len(), None)).collect();
    list(&fake, &entries);
    fake.take_seen();
    find(&fake).await.unwrap().unwrap();
    assert_eq!(read_count(&fake), CANDIDATES_MAX);
}

#[tokio::test]
async fn a_registry_that_fails_is_no_registry_without_artifacts() {
    let fake = FakeRegistry::start().await;
    fake.set_referrers(Some(ReferrersApi::default()));
    add(&fake, &artifact(1, "x"));
    for path in ["/referrers/", "/manifests/sha256:"] {
        fake.misbehave("GET", path, 0, 2, Misbehaviour::Status(503, None));
        let error = find(&fake).await.unwrap_err();
        assert_eq!(error.class(), Class::Transient, "{error}");
    }
    fake.misbehave("GET", "/manifests/sha256:", 0, 1, Misbehaviour::FlipByte);
    let error = find(&fake).await.unwrap_err();
    assert!(
        matches!(error, FindArtifactError::Refused { .. }),
        "{error}"
    );
    assert!(find(&fake).await.unwrap().is_some());
}
