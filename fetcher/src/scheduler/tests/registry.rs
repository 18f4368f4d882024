// SPDX-License-Identifier: Apache-2.0
//! The scheduler over the registry client and a registry that misbehaves, in real time.

use super::*;
use crate::registry::fake::{FakeRegistry, Misbehaviour};
use crate::registry::{NoCredentials, RegistryClient, RegistryOptions, Repository};
use crate::source::{OriginSet, RegistryBlobSource};

/// Far longer than any of these tests should take, on any machine.
const LONG: Duration = Duration::from_secs(60);

fn client(options: RegistryOptions) -> RegistryClient {
    RegistryClient::new(options, Arc::new(NoCredentials)).unwrap()
}

/// The layer, at these places, as the daemon opens it.
async fn add_at(
    fetcher: &Fetcher,
    layer: &TestLayer,
    client: &RegistryClient,
    places: &[Repository],
) -> Arc<LayerHandle> {
    let spec = layer.spec(Vec::new());
    let origins = OriginSet::new(places.iter().cloned());
    let source = RegistryBlobSource::once(client.clone(), spec.blob, spec.blob_bytes, origins);
    let sources: Vec<Arc<dyn BlobSource>> = vec![Arc::new(source)];
    fetcher
        .add_layer(LayerSpec { sources, ..spec })
        .await
        .unwrap()
}

#[tokio::test]
async fn a_registry_that_asks_for_a_pause_has_it_and_has_not_stalled() {
    let layer = TestLayer::even(40, 8, 4000);
    let fake = FakeRegistry::start().await;
    fake.add_blob("team/app", layer.blob.clone());
    let busy = Misbehaviour::Status(429, Some("2".into()));
    fake.misbehave("GET", "/blobs/", 0, 1, busy);
    let fetcher = fetcher_with(FetcherOptions {
        stall: Duration::from_millis(1500),
        ..options()
    });
    let client = client(RegistryOptions::default());
    let handle = add_at(&fetcher, &layer, &client, &[fake.place("team/app")]).await;
    let whole = Extent::new(0, layer.tar.len() as u64).unwrap();
    let before = clock::now();
    fetcher
        .fill(&handle, whole, Priority::Foreground, Some(LONG))
        .await
        .unwrap();
    assert!(clock::now() - before >= 2 * SECOND);
    assert_eq!(check(&handle, &layer), 8);
    assert_eq!(fake.take_lines().len(), 2);
    assert_eq!(fetcher.metrics().stalls(SourceKind::Origin), 0);
    fetcher.shutdown().await;
}

#[tokio::test]
async fn a_dead_place_costs_no_stall_while_another_answers() {
    let layer = TestLayer::even(41, 8, 4000);
    let (dead, alive) = (FakeRegistry::start().await, FakeRegistry::start().await);
    dead.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::NoAnswer);
    alive.add_blob("team/app", layer.blob.clone());
    let places = [dead.place("team/app"), alive.place("team/app")];
    let client = client(RegistryOptions {
        place_timeout: Duration::from_millis(200),
        ..RegistryOptions::default()
    });
    let fetcher = fetcher();
    let handle = add_at(&fetcher, &layer, &client, &places).await;
    for chunk in [0, 4, 7] {
        fetcher
            .fill(
                &handle,
                chunk_extent(&layer, chunk),
                Priority::Foreground,
                Some(LONG),
            )
            .await
            .unwrap();
    }
    assert_eq!(check(&handle, &layer), 3);
    assert_eq!((dead.take_lines().len(), alive.take_lines().len()), (1, 3));
    assert_eq!(fetcher.metrics().stalls(SourceKind::Origin), 0);
    fetcher.shutdown().await;
}

#[tokio::test]
async fn every_reader_that_has_a_slot_has_a_connection() {
    let layer = TestLayer::even(42, 2 * 32, 70_000);
    let fake = FakeRegistry::start().await;
    fake.add_blob("team/app", layer.blob.clone());
    fake.misbehave("GET", "/blobs/", 0, u32::MAX, Misbehaviour::StallBody(0));
    let fetcher = fetcher_with(FetcherOptions {
        stall: LONG,
        gap_bytes: 0,
        ..options()
    });
    let readers = u32::try_from(options().foreground_requests).unwrap();
    let client = client(RegistryOptions::default());
    let handle = add_at(&fetcher, &layer, &client, &[fake.place("team/app")]).await;
    // Chunks that are no neighbours: a request each, of which none comes to an end.
    let fills = (0..readers).map(|reader| {
        let extent = chunk_extent(&layer, 2 * reader);
        fetcher.fill(&handle, extent, Priority::Foreground, Some(LONG))
    });
    let all_asked = async {
        let mut asked = 0;
        while asked < readers as usize {
            asked += fake.take_lines().len();
            tokio::time::sleep(10 * MILLISECOND).await;
        }
    };
    tokio::select! {
        ends = futures::future::join_all(fills) => panic!("{ends:?}"),
        () = all_asked => {}
    }
    fetcher.shutdown().await;
}
