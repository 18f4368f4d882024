// SPDX-License-Identifier: Apache-2.0

use std::time::Instant;

use bytes::Bytes;
use sluice_blockindex::digest::ManifestDigest;

use super::*;
use crate::registry::fake::{FakeRegistry, Misbehaviour};
use crate::registry::media::{OCI_INDEX, OCI_MANIFEST};
use crate::source::contract::{check_source, sample_blob};
use crate::source::{BlobSource, Class, OriginSet, RegistryBlobSource, SourceError};
use crate::steps::{Steps, Stuck};

async fn setting() -> (FakeRegistry, Bytes, BlobDigest, Repository) {
    let fake = FakeRegistry::start().await;
    let bytes = sample_blob();
    let blob = fake.add_blob("team/app", bytes.clone());
    let place = fake.place("team/app");
    (fake, bytes, blob, place)
}

fn source(
    client: &RegistryClient,
    blob: BlobDigest,
    bytes: &Bytes,
    places: impl IntoIterator<Item = Repository>,
) -> RegistryBlobSource {
    let policy = client.options().retry.clone();
    RegistryBlobSource::new(
        client.clone(),
        blob,
        length(bytes),
        OriginSet::new(places),
        policy,
    )
}

async fn read(source: &RegistryBlobSource, start: u64, end: u64) -> Result<Bytes, SourceError> {
    let wanted = extent(start, end);
    source
        .open(&context(), wanted)
        .await?
        .narrow(wanted)?
        .collect(u64::MAX)
        .await
}

#[tokio::test]
async fn contract_registry() {
    let (_fake, bytes, blob, place) = setting().await;
    check_source(
        Arc::new(source(&client(quick_options()), blob, &bytes, [place])),
        &bytes,
    )
    .await;
}

#[tokio::test]
async fn contract_registry_that_redirects() {
    let (fake, bytes, blob, place) = setting().await;
    fake.set_redirects(true);
    check_source(
        Arc::new(source(&client(quick_options()), blob, &bytes, [place])),
        &bytes,
    )
    .await;
}

#[tokio::test]
async fn contract_registry_that_ignores_ranges() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::IgnoreRange);
    check_source(
        Arc::new(source(&client(quick_options()), blob, &bytes, [place])),
        &bytes,
    )
    .await;
}

#[tokio::test]
async fn contract_registry_that_cuts_bodies() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave(
        "GET",
        "/blobs/",
        0,
        u32::MAX,
        Misbehaviour::CutBody(100_000),
    );
    check_source(
        Arc::new(source(&client(quick_options()), blob, &bytes, [place])),
        &bytes,
    )
    .await;
}

#[tokio::test]
async fn one_range_is_one_request() {
    let (fake, bytes, blob, place) = setting().await;
    let source = source(&client(quick_options()), blob, &bytes, [place]);
    assert_eq!(
        read(&source, 1000, 2000).await.unwrap(),
        bytes.slice(1000..2000)
    );
    let seen = fake.take_seen();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!(seen[0].range.as_deref(), Some("bytes=1000-1999"));
    assert_eq!(seen[0].authorization, None);
    read(&source, 0, length(&bytes)).await.unwrap();
    assert_eq!(
        fake.take_seen()[0].range,
        None,
        "a whole blob needs no range"
    );
}

#[tokio::test]
async fn an_ignored_range_is_remembered_for_the_blob() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::IgnoreRange);
    let client = client(quick_options());
    let source = source(&client, blob, &bytes, [place.clone()]);
    let stream = source.open(&context(), extent(1000, 2000)).await.unwrap();
    assert_eq!(stream.extent, extent(0, length(&bytes)));
    assert_eq!(stream.collect(u64::MAX).await.unwrap(), bytes);
    assert!(source.whole_blob_only() && client.ignores_ranges(&place, blob));
    assert!(!client.ignores_ranges(&fake.place("team/other"), blob));
    assert!(!client.ignores_ranges(&place, BlobDigest::of(b"another")));
    fake.take_seen();
    read(&source, 5, 6).await.unwrap();
    let seen = fake.take_seen();
    assert_eq!((seen.len(), seen[0].range.clone()), (1, None));
}

#[tokio::test]
async fn ranges_are_tried_again_after_a_while() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::IgnoreRange);
    let options = RegistryOptions {
        range_memory: Duration::from_millis(50),
        ..quick_options()
    };
    let source = source(&client(options), blob, &bytes, [place]);
    read(&source, 5, 6).await.unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(!source.whole_blob_only());
    let stream = source.open(&context(), extent(7, 8)).await.unwrap();
    assert_eq!(stream.extent, extent(7, 8));
}

#[tokio::test]
async fn a_cut_body_is_resumed_where_it_broke() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::CutBody(123_456));
    let client = client(quick_options());
    let all = client
        .blob(&context(), &place, blob, length(&bytes))
        .await
        .unwrap();
    assert_eq!(all.collect(u64::MAX).await.unwrap(), bytes);
    let ranges: Vec<_> = fake
        .take_seen()
        .into_iter()
        .map(|seen| seen.range)
        .collect();
    assert_eq!(ranges, [None, Some("bytes=123456-300006".to_owned())]);
}

#[tokio::test]
async fn a_stall_is_noticed_and_resumed() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::StallBody(70_000));
    let client = client(quick_options());
    let before = Instant::now();
    let all = client
        .blob(&context(), &place, blob, length(&bytes))
        .await
        .unwrap();
    assert_eq!(all.collect(u64::MAX).await.unwrap(), bytes);
    let took = before.elapsed();
    assert!(
        took >= Duration::from_millis(400) && took < Duration::from_secs(5),
        "{took:?}"
    );
    assert_eq!(fake.take_seen().len(), 2);

    fake.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::StallBody(0));
    let error = client
        .blob(&context(), &place, blob, length(&bytes))
        .await
        .unwrap();
    let error = error.collect(u64::MAX).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Stalled { offset: 0, .. }),
        "{error}"
    );
    assert_eq!(error.class(), Class::Transient);
    assert_eq!(fake.take_seen().len(), 3, "as many attempts as configured");
}

/// What stands for longer than half a minute from now, when something stands at all.
async fn stuck_soon(steps: &Steps) -> Vec<Stuck> {
    for _ in 0..1000 {
        let stuck = steps.stuck(Instant::now() + Duration::from_secs(60));
        if !stuck.is_empty() {
            return stuck;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Vec::new()
}

#[tokio::test]
async fn a_registry_that_stalls_is_named_until_it_is_given_up() {
    for (what, step) in [
        (Misbehaviour::NoAnswer, "registry head"),
        (Misbehaviour::StallBody(70_000), "registry body"),
    ] {
        let (fake, bytes, blob, place) = setting().await;
        fake.misbehave("GET", "/blobs/", 0, 1, what);
        let metrics = Metrics::new();
        let steps = metrics.steps().clone();
        let client =
            RegistryClient::counted(quick_options(), Arc::new(NoCredentials), metrics).unwrap();
        let host = place.host().to_owned();
        let context = context();
        let read = async {
            let all = client
                .blob(&context, &place, blob, length(&bytes))
                .await
                .unwrap();
            all.collect(u64::MAX).await.unwrap()
        };
        let standing = async {
            // The body's first bytes come: what stands a moment later is what stalls.
            tokio::time::sleep(Duration::from_millis(200)).await;
            stuck_soon(&steps).await
        };
        let (all, stuck) = tokio::join!(read, standing);
        assert_eq!(all, bytes);
        let [stuck] = &stuck[..] else {
            panic!("{step}: {stuck:?}")
        };
        assert_eq!((&*stuck.step, &*stuck.whom), (step, "foreground"));
        assert!(stuck.subject.contains(&host), "{stuck:?}");
        // The second attempt read all: nothing stands any more.
        assert_eq!(steps.stuck(Instant::now() + Duration::from_secs(60)), []);
    }
}

#[tokio::test]
async fn a_slow_body_is_not_a_stall() {
    let (fake, bytes, blob, place) = setting().await;
    let drip = Misbehaviour::SlowBody(60_000, Duration::from_millis(150));
    fake.misbehave("GET", "/blobs/", 0, 1, drip.clone());
    let client = client(quick_options());
    let all = client
        .blob(&context(), &place, blob, length(&bytes))
        .await
        .unwrap();
    assert_eq!(all.collect(u64::MAX).await.unwrap(), bytes);
    assert_eq!(fake.take_seen().len(), 1);

    // The caller's deadline bounds it all the same.
    fake.misbehave("GET", "/blobs/", 0, 1, drip);
    let hurried = ReadContext::new(Priority::Foreground).with_timeout(Duration::from_millis(300));
    let all = client
        .blob(&hurried, &place, blob, length(&bytes))
        .await
        .unwrap();
    let error = all.collect(u64::MAX).await.unwrap_err();
    assert!(matches!(error, SourceError::DeadlineExceeded), "{error}");
}

#[tokio::test]
async fn wrong_answers_to_ranges_are_typed() {
    let cases: [(Misbehaviour, Class, u32); 4] = [
        (Misbehaviour::ShiftedRange, Class::Corrupt, 1),
        (Misbehaviour::ShortLength(10), Class::Corrupt, 1),
        (Misbehaviour::Status(416, None), Class::Permanent, 1),
        (Misbehaviour::Status(404, None), Class::Permanent, 1),
    ];
    for (fault, class, requests) in cases {
        let (fake, bytes, blob, place) = setting().await;
        fake.misbehave("GET", "/blobs/", 0, u32::MAX, fault.clone());
        let source = source(&client(quick_options()), blob, &bytes, [place]);
        let error = read(&source, 1000, 2000).await.unwrap_err();
        assert_eq!(error.class(), class, "{fault:?}: {error}");
        match fault {
            Misbehaviour::ShiftedRange | Misbehaviour::ShortLength(_) => {
                assert!(matches!(error, SourceError::WrongExtent { .. }), "{error}");
            }
            Misbehaviour::Status(416, _) => {
                assert!(matches!(error, SourceError::BeyondEnd { .. }), "{error}");
            }
            _ => {
                assert!(
                    matches!(error, SourceError::Registry(RegistryError::NotFound { .. })),
                    "{error}"
                );
            }
        }
        assert_eq!(
            fake.take_seen().len(),
            usize::try_from(requests).unwrap(),
            "{fault:?}"
        );
    }
}

#[tokio::test]
async fn failures_in_passing_are_repeated_so_many_times() {
    for status in [429, 500, 502, 503, 504, 408] {
        let (fake, bytes, blob, place) = setting().await;
        fake.misbehave("GET", "/blobs/", 0, 2, Misbehaviour::Status(status, None));
        let client = client(quick_options());
        let source = source(&client, blob, &bytes, [place.clone()]);
        read(&source, 0, 10).await.unwrap();
        assert_eq!(fake.take_seen().len(), 3, "{status}");
        fake.behave();
        fake.misbehave(
            "",
            "/blobs/",
            0,
            u32::MAX,
            Misbehaviour::Status(status, None),
        );
        let error = read(&source, 0, 10).await.unwrap_err();
        assert_eq!(error.class(), Class::Transient, "{error}");
        assert_eq!(fake.take_seen().len(), 3, "{status}");
        let error = client
            .blob_size(&context(), &place, blob)
            .await
            .unwrap_err();
        assert_eq!(error.class(), Class::Transient, "{error}");
        assert_eq!(fake.take_seen().len(), 3, "{status}");
    }
    for status in [400, 405, 410, 501] {
        let (fake, bytes, blob, place) = setting().await;
        fake.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::Status(status, None));
        let source = source(&client(quick_options()), blob, &bytes, [place]);
        assert_eq!(
            read(&source, 0, 10).await.unwrap_err().class(),
            Class::Permanent
        );
        assert_eq!(fake.take_seen().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn retry_after_is_waited_for_up_to_its_cap_and_the_deadline() {
    let (fake, bytes, blob, place) = setting().await;
    let throttle = || Misbehaviour::Status(429, Some("1".into()));
    fake.misbehave("GET", "/blobs/", 0, 1, throttle());
    let source_of = |options| source(&client(options), blob, &bytes, [place.clone()]);
    let patient = source_of(quick_options());
    let before = Instant::now();
    read(&patient, 0, 10).await.unwrap();
    assert!(before.elapsed() >= Duration::from_secs(1));

    let mut capped = quick_options();
    capped.retry.retry_after_cap = Duration::from_millis(20);
    fake.misbehave("GET", "/blobs/", 0, 1, throttle());
    let before = Instant::now();
    read(&source_of(capped), 0, 10).await.unwrap();
    assert!(before.elapsed() < Duration::from_millis(900));

    // It will not be over in time, so the answer comes at once.
    fake.behave();
    fake.misbehave("GET", "/blobs/", 0, 1, throttle());
    fake.take_seen();
    let hurried = ReadContext::new(Priority::Foreground).with_timeout(Duration::from_millis(800));
    let before = Instant::now();
    let error = patient.open(&hurried, extent(0, 10)).await.unwrap_err();
    assert!(before.elapsed() < Duration::from_millis(500));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(1)), "{error}");
    assert_eq!(fake.take_seen().len(), 1);
}

#[tokio::test]
async fn no_answer_ends_at_the_header_timeout_and_on_cancel() {
    let (fake, bytes, blob, place) = setting().await;
    fake.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::NoAnswer);
    let mut options = quick_options();
    options.retry.max_attempts = 1;
    let source = source(&client(options), blob, &bytes, [place]);
    let before = Instant::now();
    let error = read(&source, 0, 10).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Registry(RegistryError::NoAnswer { .. })),
        "{error}"
    );
    assert!(before.elapsed() >= Duration::from_millis(600));
    let cancel = tokio_util::sync::CancellationToken::new();
    let leaving = context().with_cancel(cancel.clone());
    let before = Instant::now();
    let (outcome, ()) = tokio::join!(source.open(&leaving, extent(0, 10)), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        cancel.cancel();
    });
    assert!(matches!(outcome.unwrap_err(), SourceError::Cancelled));
    assert!(before.elapsed() < Duration::from_millis(500));
}

#[tokio::test]
async fn nobody_listens() {
    let place = Repository::new("127.0.0.1:1", "team/app").unwrap();
    let client = client(quick_options());
    let blob = BlobDigest::of(b"x");
    let error = client
        .blob_size(&context(), &place, blob)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, RegistryError::Connect { endpoint, .. } if endpoint == "http://127.0.0.1:1"),
        "{error}"
    );
    assert_eq!(error.class(), Class::Transient);
}

#[tokio::test]
async fn every_known_place_is_tried_and_the_last_good_one_first() {
    let (fake, bytes, blob, place) = setting().await;
    let missing = fake.place("team/gone");
    let source = source(&client(quick_options()), blob, &bytes, [missing.clone()]);
    let error = read(&source, 0, 10).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Registry(RegistryError::NotFound { .. })),
        "{error}"
    );
    fake.take_seen();
    assert!(source.origins().add(place.clone()));
    assert!(!source.origins().add(place));
    read(&source, 0, 10).await.unwrap();
    read(&source, 0, 10).await.unwrap();
    let (gone, here) = (blob_path("team/gone", blob), blob_path("team/app", blob));
    let lines = [
        format!("GET {gone}"),
        format!("GET {here}"),
        format!("GET {here}"),
    ];
    assert_eq!(fake.take_lines(), lines);
}

#[tokio::test]
async fn background_requests_leave_places_for_readers() {
    let (fake, bytes, blob, place) = setting().await;
    let options = RegistryOptions {
        max_in_flight: 3,
        kept_for_readers: 1,
        ..quick_options()
    };
    let source = source(&client(options), blob, &bytes, [place]);
    let background = ReadContext::new(Priority::Background);
    let held = [
        source.open(&background, extent(0, 300_000)).await.unwrap(),
        source.open(&background, extent(0, 300_000)).await.unwrap(),
    ];
    let waiting = source.open(&background, extent(0, 10));
    assert!(
        tokio::time::timeout(Duration::from_millis(200), waiting)
            .await
            .is_err()
    );
    read(&source, 0, 10).await.unwrap();
    assert_eq!(fake.take_seen().len(), 3);
    drop(held);
    source.open(&background, extent(0, 10)).await.unwrap();
}

#[tokio::test]
async fn manifests_are_verified() {
    let (fake, ..) = setting().await;
    let json = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
    let digest = fake.add_manifest("team/app", "v1", OCI_INDEX, json);
    let client = client(quick_options());
    let tagged = fake.place("team/app").tagged("v1").unwrap();
    let pinned = fake.place("team/app").with_digest(digest);
    for reference in [&tagged, &pinned] {
        let resolved = client.resolve(&context(), reference).await.unwrap();
        let expected = Resolved {
            digest,
            media_type: OCI_INDEX.into(),
            size_bytes: length(json.as_bytes()),
        };
        assert_eq!(resolved, expected);
        let manifest = client.manifest(&context(), reference).await.unwrap();
        assert_eq!(
            (manifest.digest, manifest.bytes.as_ref()),
            (digest, json.as_bytes())
        );
        assert!(matches!(manifest.parse().unwrap(), ManifestBody::Index(_)));
    }
    assert_eq!(fake.take_seen().len(), 4);

    let without = [
        Misbehaviour::NoDigestHeader,
        Misbehaviour::Status(405, None),
    ];
    for fault in without {
        fake.misbehave("HEAD", "/manifests/", 0, 1, fault);
        assert_eq!(
            client.resolve(&context(), &tagged).await.unwrap().digest,
            digest
        );
        assert_eq!(fake.take_seen().len(), 2, "HEAD, then GET");
    }
    for reference in [&tagged, &pinned] {
        fake.misbehave("GET", "/manifests/", 0, 1, Misbehaviour::FlipByte);
        let error = client.manifest(&context(), reference).await.unwrap_err();
        assert!(
            matches!(error, RegistryError::DigestMismatch { .. }),
            "{error}"
        );
        assert_eq!(error.class(), Class::Corrupt);
    }
    fake.misbehave("GET", "/manifests/", 0, 1, Misbehaviour::CutBody(10));
    client.manifest(&context(), &tagged).await.unwrap();
    let absent = fake.place("team/app").tagged("none").unwrap();
    let error = client.resolve(&context(), &absent).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("team/app:none"), "{error}");
}

#[tokio::test]
async fn manifests_and_small_blobs_have_a_size_limit() {
    let (fake, bytes, blob, place) = setting().await;
    let options = RegistryOptions {
        manifest_cap_bytes: 100,
        ..quick_options()
    };
    let client = client(options);
    fake.add_manifest("team/app", "big", OCI_MANIFEST, vec![b' '; 101]);
    let error = client
        .manifest(&context(), &place.tagged("big").unwrap())
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            RegistryError::TooLarge {
                limit_bytes: 100,
                ..
            }
        ),
        "{error}"
    );
    let error = client
        .blob_bytes(&context(), &place, blob, 300_006)
        .await
        .unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
    let all = client
        .blob_bytes(&context(), &place, blob, 300_007)
        .await
        .unwrap();
    assert_eq!(all, bytes);
    fake.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::FlipByte);
    let error = client
        .blob_bytes(&context(), &place, blob, 300_007)
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::DigestMismatch { .. }),
        "{error}"
    );
}

#[test]
fn manifests_say_what_they_are() {
    let parse = |media_type: &str, json: &str| {
        let bytes = Bytes::from(json.to_owned());
        FetchedManifest {
            digest: ManifestDigest::of(&bytes),
            media_type: media_type.into(),
            bytes,
        }
        .parse()
    };
    assert!(parse("text/html", "<html>").is_err());
    assert!(parse(OCI_INDEX, "{").is_err());
    assert!(parse(OCI_INDEX, r#"{"schemaVersion":2,"manifests":[]}"#).is_ok());
}

#[tokio::test]
async fn a_place_that_does_not_answer_does_not_hide_one_that_does() {
    let (dead, alive) = (FakeRegistry::start().await, FakeRegistry::start().await);
    dead.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::NoAnswer);
    let bytes = sample_blob();
    let blob = dead.add_blob("team/app", bytes.clone());
    alive.add_blob("team/app", bytes.clone());
    let options = RegistryOptions {
        place_timeout: Duration::from_millis(200),
        header_timeout: Duration::from_secs(60),
        ..quick_options()
    };
    let places = || [dead.place("team/app"), alive.place("team/app")];
    // Within the patience of one opening.
    let client = client(options);
    let one = RegistryBlobSource::once(
        client.clone(),
        blob,
        length(&bytes),
        OriginSet::new(places()),
    );
    assert_eq!(read(&one, 5, 9).await.unwrap(), bytes.slice(5..9));
    // From then on the other is asked first.
    assert_eq!(read(&one, 5, 9).await.unwrap(), bytes.slice(5..9));
    assert_eq!((dead.take_lines().len(), alive.take_lines().len()), (1, 2));
    // A caller without the patience for it drops the opening, and comes again.
    let long = RegistryOptions {
        place_timeout: Duration::from_millis(300),
        ..client.options().clone()
    };
    let client = RegistryClient::new(long, Arc::new(NoCredentials)).unwrap();
    alive.misbehave("GET", "/blobs/", 0, 1, Misbehaviour::NoAnswer);
    let two = RegistryBlobSource::once(client, blob, length(&bytes), OriginSet::new(places()));
    let patience = Duration::from_millis(800);
    let hasty = tokio::time::timeout(patience, two.open(&context(), extent(5, 9))).await;
    assert!(hasty.is_err());
    assert_eq!((dead.take_lines().len(), alive.take_lines().len()), (1, 1));
    // Both kept it waiting: the one after the last is asked first, and has its share only.
    assert_eq!(read(&two, 5, 9).await.unwrap(), bytes.slice(5..9));
    assert_eq!((dead.take_lines().len(), alive.take_lines().len()), (1, 1));
}

#[tokio::test]
async fn a_remembered_target_that_is_of_no_use_is_asked_for_anew() {
    for status in [404, 410, 500, 503] {
        let (fake, bytes, blob, place) = setting().await;
        fake.set_redirects(true);
        let client = client(quick_options());
        let origins = OriginSet::new([place]);
        let source = RegistryBlobSource::once(client, blob, length(&bytes), origins);
        read(&source, 5, 9).await.unwrap();
        fake.take_lines();
        fake.misbehave("GET", "storage ", 0, 1, Misbehaviour::Status(status, None));
        assert_eq!(
            read(&source, 5, 9).await.unwrap(),
            bytes.slice(5..9),
            "{status}"
        );
        assert_eq!(
            fake.take_lines().len(),
            3,
            "{status}: target, registry, target"
        );
        // Where the registry's own new target fails, that is the answer.
        fake.misbehave("GET", "storage ", 0, 2, Misbehaviour::Status(status, None));
        read(&source, 5, 9).await.unwrap_err();
    }
}

#[test]
fn a_reader_that_the_scheduler_lets_run_does_not_queue_here() {
    let (registry, scheduler) = (
        RegistryOptions::default(),
        crate::scheduler::FetcherOptions::default(),
    );
    let urgent = scheduler.foreground_requests + scheduler.boot_requests;
    assert!(registry.max_in_flight >= urgent + scheduler.other_requests);
    assert!(registry.kept_for_readers >= urgent);
    assert!(registry.max_in_flight - registry.kept_for_readers >= scheduler.other_requests);
}
