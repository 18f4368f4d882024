// SPDX-License-Identifier: Apache-2.0
//! What is found at a layer that says it is converted already.

use super::*;

#[tokio::test]
async fn a_layer_that_is_not_as_annotated_is_converted() {
    type Edit = Box<dyn FnOnce(&MemoryImage, &mut Descriptor)>;
    let cases: Vec<(&str, Edit)> = vec![
        (
            "another index digest",
            Box::new(|_, layer| set(layer, "index.digest", DiffId::of(b"x").to_string())),
        ),
        (
            "another place",
            Box::new(|_, layer| set(layer, "index.offset", "7".into())),
        ),
        (
            "a blob without an index",
            Box::new(|store, layer| {
                let tar = zstd::decode_all(&store.blob_bytes(layer.digest).unwrap()[..]).unwrap();
                let blob = zstd::encode_all(&tar[..], 19).unwrap();
                (layer.size, layer.digest) = (blob.len() as u64, store.insert_blob(blob));
                let (digest, size) = (layer.digest.to_string(), layer.size.to_string());
                set(layer, "blob", digest);
                set(layer, "blob.size", size);
                set(layer, "index.offset", "0".into());
                set(layer, "index.size", "9".into());
            }),
        ),
    ];
    for (name, edit) in cases {
        let (store, tar) = converted().await;
        edited(&store, |layer| edit(&store, layer)).await;
        let destination = MemoryImage::new("destination");
        let summary = run(&store, &destination, options(1)).await.unwrap();
        assert_eq!(summary.layers_converted, 1, "{name}");
        let layer = lowest_layer(&destination).await;
        let LayerMark::Lazy(found) = mark(&layer) else {
            panic!("{name}: lazy")
        };
        let found = crate::inspect::read_index(&destination, &layer, &found, false).await;
        assert!(found.is_ok(), "{name}: {found:?}");
        let blob = destination.blob_bytes(layer.digest).unwrap();
        assert!(zstd::decode_all(&blob[..]).unwrap() == tar, "{name}");
    }
}

#[tokio::test]
async fn a_tar_that_is_not_as_annotated_is_refused() {
    type Edit = Box<dyn FnOnce(&MemoryImage, &mut Descriptor)>;
    let other_bytes = |store: &MemoryImage, layer: &mut Descriptor| {
        // Content that does not compress stands in its frame as it is, and frames have no checksum.
        let mut blob = store.blob_bytes(layer.digest).unwrap().to_vec();
        blob[50_000] ^= 1;
        layer.digest = store.insert_blob(blob);
        let digest = layer.digest.to_string();
        set(layer, "blob", digest);
    };
    let not_lazy = move |store: &MemoryImage, layer: &mut Descriptor| {
        other_bytes(store, layer);
        layer.annotations.clear();
        set(layer, "not-lazy", "because".into());
    };
    let cases: Vec<(&str, Edit)> = vec![
        ("lazy", Box::new(other_bytes)),
        ("not lazy", Box::new(not_lazy)),
    ];
    for (name, edit) in cases {
        let (store, _) = converted().await;
        edited(&store, |layer| edit(&store, layer)).await;
        let bad = lowest_layer(&store).await;
        let destination = MemoryImage::new("destination");
        let error = run(&store, &destination, options(1)).await.expect_err(name);
        let error = format!("{:#}", anyhow::Error::from(error));
        assert!(error.contains("has diff ID"), "{name}: {error}");
        assert!(destination.blob_bytes(bad.digest).is_none(), "{name}");
        assert!(destination.root().await.is_err(), "{name}");

        // What the destination has is read only when it must be.
        let blob = store.blob_bytes(bad.digest).unwrap();
        destination.insert_blob(blob);
        let forced = Options {
            force: true,
            ..options(1)
        };
        assert!(run(&store, &destination, forced).await.is_err(), "{name}");
        store.reset_counts();
        run(&store, &destination, options(1)).await.expect(name);
        assert_eq!(store.counts().blobs_read, 2, "{name}: the config, twice");
    }
}

#[tokio::test]
async fn a_second_copy_of_a_converted_image_reads_no_layer() {
    let (store, _) = converted().await;
    let destination = MemoryImage::new("destination");
    run(&store, &destination, options(1)).await.unwrap();
    assert_eq!(store.counts().ranges_read, 1, "the index");
    store.reset_counts();
    let summary = run(&store, &destination, options(1)).await.unwrap();
    assert_eq!((summary.uploads, summary.layers_reused), (0, 1));
    let counts = store.counts();
    assert_eq!((counts.blobs_read, counts.ranges_read), (1, 0));
    // Another manifest at the destination proves nothing.
    edited(&destination, |layer| set(layer, "index.size", "3".into())).await;
    run(&store, &destination, options(1)).await.unwrap();
    assert_eq!(store.counts().ranges_read, 1);
}
