// SPDX-License-Identifier: Apache-2.0

use bytes::Bytes;
use futures::stream;
use sluice_blockindex::digest::ManifestDigest;

use super::*;
use crate::registry::fake::{FakeRegistry, Misbehaviour};
use crate::registry::media::OCI_MANIFEST;
use crate::source::contract::sample_blob;

fn small_pieces() -> RegistryOptions {
    RegistryOptions {
        upload_piece_bytes: 100_000,
        ..quick_options()
    }
}

async fn push(
    client: &RegistryClient,
    place: &Repository,
    bytes: &Bytes,
) -> Result<BlobDigest, RegistryError> {
    let blob = BlobDigest::of(bytes);
    let pieces: Vec<_> = bytes
        .chunks(33_333)
        .map(|piece| Ok::<_, String>(Bytes::copy_from_slice(piece)))
        .collect();
    client
        .push_stream(&context(), place, stream::iter(pieces), || blob)
        .await
}

/// Methods and, for pieces, how much of the path matters.
fn methods(fake: &FakeRegistry) -> Vec<String> {
    fake.take_seen()
        .into_iter()
        .map(|seen| seen.method)
        .collect()
}

#[tokio::test]
async fn presence_is_one_head() {
    let fake = FakeRegistry::start().await;
    let blob = fake.add_blob("a", "hello");
    let client = client(quick_options());
    let absent = BlobDigest::of(b"absent");
    assert_eq!(
        client
            .blob_size(&context(), &fake.place("a"), blob)
            .await
            .unwrap(),
        Some(5)
    );
    assert_eq!(
        client
            .blob_size(&context(), &fake.place("a"), absent)
            .await
            .unwrap(),
        None
    );
    assert_eq!(
        client
            .blob_size(&context(), &fake.place("b"), blob)
            .await
            .unwrap(),
        None
    );
    assert_eq!(methods(&fake), ["HEAD", "HEAD", "HEAD"]);
}

#[tokio::test]
async fn a_blob_in_memory_is_one_post_and_one_put() {
    let fake = FakeRegistry::start().await;
    let client = client(quick_options());
    let place = fake.place("a");
    for bytes in [Bytes::new(), Bytes::from_static(b"x"), sample_blob()] {
        let blob = BlobDigest::of(&bytes);
        client
            .push_blob(&context(), &place, blob, bytes.clone())
            .await
            .unwrap();
        assert_eq!(fake.blob("a", blob), Some(bytes));
        assert_eq!(methods(&fake), ["POST", "PUT"]);
    }
    let wrong = BlobDigest::of(b"other");
    let error = client
        .push_blob(&context(), &place, wrong, Bytes::from_static(b"x"))
        .await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, RegistryError::Refused { status: 400, detail, .. } if detail == ": DIGEST_INVALID no match"),
        "{error}"
    );
    assert_eq!(fake.open_uploads(), 0);
}

#[tokio::test]
async fn a_push_that_fails_in_passing_is_repeated() {
    for (method, lost) in [("POST", false), ("PUT", false), ("PUT", true)] {
        let fake = FakeRegistry::start().await;
        let client = client(quick_options());
        let fault = if lost {
            Misbehaviour::LostAnswer
        } else {
            Misbehaviour::Status(503, None)
        };
        fake.misbehave(method, "/uploads/", 0, 1, fault);
        let bytes = sample_blob();
        let blob = BlobDigest::of(&bytes);
        client
            .push_blob(&context(), &fake.place("a"), blob, bytes.clone())
            .await
            .unwrap();
        assert_eq!(fake.blob("a", blob), Some(bytes), "{method}");
    }
}

#[tokio::test]
async fn a_stream_goes_in_pieces() {
    let fake = FakeRegistry::start().await;
    let client = client(small_pieces());
    let bytes = sample_blob();
    let blob = push(&client, &fake.place("a"), &bytes).await.unwrap();
    assert_eq!(fake.blob("a", blob), Some(bytes));
    assert_eq!(
        methods(&fake),
        ["POST", "PATCH", "PATCH", "PATCH", "PATCH", "PUT"]
    );
    // A short one needs no piece of its own.
    let short = Bytes::from_static(b"short");
    let blob = push(&client, &fake.place("a"), &short).await.unwrap();
    assert_eq!(fake.blob("a", blob), Some(short));
    assert_eq!(methods(&fake), ["POST", "PUT"]);
    let empty = push(&client, &fake.place("a"), &Bytes::new())
        .await
        .unwrap();
    assert_eq!(fake.blob("a", empty), Some(Bytes::new()));
}

#[tokio::test]
async fn every_request_of_an_upload_may_fail_once() {
    // 0 = POST, 1..=4 = pieces, 5 = PUT; before the work is done, and after.
    for k in 0..6 {
        for fault in [Misbehaviour::Status(502, None), Misbehaviour::LostAnswer] {
            let fake = FakeRegistry::start().await;
            fake.misbehave("", "/uploads/", k, 1, fault.clone());
            let client = client(small_pieces());
            let bytes = sample_blob();
            let pushed = push(&client, &fake.place("a"), &bytes).await;
            let blob = pushed.unwrap_or_else(|error| panic!("k = {k}, {fault:?}: {error}"));
            assert_eq!(fake.blob("a", blob), Some(bytes), "k = {k}, {fault:?}");
        }
    }
}

#[tokio::test]
async fn a_failing_input_ends_the_upload() {
    let fake = FakeRegistry::start().await;
    let client = client(small_pieces());
    let pieces = [Ok(Bytes::from_static(b"x")), Err("disk on fire")];
    let outcome = client
        .push_stream(&context(), &fake.place("a"), stream::iter(pieces), || {
            BlobDigest::of(b"x")
        })
        .await;
    let error = outcome.unwrap_err();
    assert!(matches!(&error, RegistryError::Input { reason } if reason == "disk on fire"));
    assert_eq!(methods(&fake), ["POST", "DELETE"]);
    assert_eq!(fake.open_uploads(), 0);
}

#[tokio::test]
async fn blobs_are_mounted_or_uploaded() {
    let fake = FakeRegistry::start().await;
    let bytes = Bytes::from_static(b"shared");
    let blob = fake.add_blob("from", bytes.clone());
    let client = client(quick_options());
    let (from, to) = (fake.place("from"), fake.place("to"));
    let outcome = client
        .mount_blob(&context(), &to, &from, blob)
        .await
        .unwrap();
    assert!(matches!(outcome, MountOutcome::Mounted), "{outcome:?}");
    assert_eq!(fake.blob("to", blob), Some(bytes.clone()));
    let seen = fake.take_seen();
    assert_eq!((seen.len(), seen[0].method.as_str()), (1, "POST"));

    fake.set_mounts(false);
    let third = fake.place("third");
    let MountOutcome::Upload(mut upload) = client
        .mount_blob(&context(), &third, &from, blob)
        .await
        .unwrap()
    else {
        panic!("mounted, though it is switched off")
    };
    upload.write(&context(), bytes.clone()).await.unwrap();
    assert_eq!(upload.written_bytes(), 6);
    upload.finish(&context(), blob).await.unwrap();
    assert_eq!(fake.blob("third", blob), Some(bytes));
    assert_eq!(methods(&fake), ["POST", "PUT"]);

    // A registry that refuses to mount gets an ordinary upload.
    fake.misbehave("POST", "/uploads/", 0, 1, Misbehaviour::Status(405, None));
    let outcome = client
        .mount_blob(&context(), &fake.place("fourth"), &from, blob)
        .await
        .unwrap();
    assert!(matches!(outcome, MountOutcome::Upload(_)), "{outcome:?}");
}

#[tokio::test]
async fn manifests_are_put_and_tagged() {
    let fake = FakeRegistry::start().await;
    let client = client(quick_options());
    let json = Bytes::from_static(br#"{"schemaVersion":2,"layers":[]}"#);
    let tagged = fake.place("a").tagged("v1").unwrap();
    let digest = client
        .put_manifest(&context(), &tagged, OCI_MANIFEST, json.clone())
        .await
        .unwrap();
    assert_eq!(digest, ManifestDigest::of(&json));
    let back = client.manifest(&context(), &tagged).await.unwrap();
    assert_eq!(
        (back.bytes, back.media_type.as_str()),
        (json.clone(), OCI_MANIFEST)
    );
    assert_eq!(client.tag(&context(), &tagged, "v2").await.unwrap(), digest);
    let second = fake.place("a").tagged("v2").unwrap();
    assert_eq!(
        client.resolve(&context(), &second).await.unwrap().digest,
        digest
    );
    let other = fake.place("a").with_digest(ManifestDigest::of(b"other"));
    let error = client
        .put_manifest(&context(), &other, OCI_MANIFEST, json)
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::DigestMismatch { .. }),
        "{error}"
    );
}
