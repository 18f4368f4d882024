// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::io::Write;

use bytes::Bytes;
use serde_json::json;
use sluice_blockindex::annotations::LayerMark;

use crate::fixture::sparse_tar;
use crate::image::document::{
    DOCKER_CONFIG, DOCKER_INDEX, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP,
    OCI_LAYER_TAR, OCI_MANIFEST,
};
use crate::image::memory::MemoryImage;
use crate::report::Silent;

mod annotated;
mod formats;
mod told;

const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

fn tar_of(seed: u32, files: u32) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for n in 0..files {
        let mut header = tar::Header::new_gnu();
        let content: Vec<u8> = (0..3000 + n * 100)
            .map(|i| (i.wrapping_mul(seed + n) >> 5).to_le_bytes()[0])
            .collect();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, format!("d{seed}/f{n}"), content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Builds images into a memory store.
struct Builder {
    store: MemoryImage,
}

impl Builder {
    fn new() -> Self {
        Self {
            store: MemoryImage::new("source/image"),
        }
    }

    fn layer(&self, media_type: &str, blob: Vec<u8>) -> Descriptor {
        let bytes = blob.len() as u64;
        Descriptor::new(media_type, self.store.insert_blob(blob), bytes)
    }

    fn image(&self, media_type: &str, arch: &str, layers: &[(Descriptor, DiffId)]) -> Document {
        let diff_ids: Vec<String> = layers.iter().map(|(_, id)| id.to_string()).collect();
        let config = json!({
            "architecture": arch,
            "os": "linux",
            "history": [{"created_by": "test", "empty_layer": true}],
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string();
        let config_type = if media_type == DOCKER_MANIFEST {
            DOCKER_CONFIG
        } else {
            OCI_CONFIG
        };
        let config = self.layer(config_type, config.into_bytes());
        let layers: Vec<&Descriptor> = layers.iter().map(|(layer, _)| layer).collect();
        let value = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        let document = Document::of_value(media_type, value);
        self.store.insert_document(&document, true);
        document
    }

    /// gzip, zstd, uncompressed and empty.
    fn ordinary(&self) -> (Document, Vec<Vec<u8>>) {
        let empty = vec![0; 1024];
        let tars = vec![tar_of(1, 80), tar_of(2, 30), tar_of(3, 5), empty];
        let layers = [
            self.layer(DOCKER_LAYER, gzip(&tars[0])),
            self.layer(
                DOCKER_LAYER,
                zstd::encode_all(tars[1].as_slice(), 1).unwrap(),
            ),
            self.layer(
                "application/vnd.docker.image.rootfs.diff.tar",
                tars[2].clone(),
            ),
            self.layer(DOCKER_LAYER, gzip(&tars[3])),
        ];
        let layers: Vec<_> = layers
            .into_iter()
            .zip(&tars)
            .map(|(layer, tar)| (layer, DiffId::of(tar)))
            .collect();
        (self.image(DOCKER_MANIFEST, "amd64", &layers), tars)
    }
}

fn options(threads: usize) -> Options {
    let work_directory = Some(std::env::temp_dir());
    Options {
        threads,
        work_directory,
        ..Options::default()
    }
}

async fn run(
    source: &MemoryImage,
    destination: &MemoryImage,
    options: Options,
) -> Result<Summary, ConvertError> {
    convert(
        Arc::new(source.clone()),
        Arc::new(destination.clone()),
        options,
        Arc::new(Silent),
    )
    .await
}

fn mark(descriptor: &Descriptor) -> LayerMark {
    LayerMark::parse(|name| descriptor.annotations.get(name).map(String::as_str)).unwrap()
}

#[tokio::test]
async fn an_image_keeps_its_tars_and_its_config() {
    let builder = Builder::new();
    let (original, tars) = builder.ordinary();
    let destination = MemoryImage::new("destination");
    let summary = run(&builder.store, &destination, options(2)).await.unwrap();
    assert_eq!(
        (
            summary.layers,
            summary.layers_converted,
            summary.layers_not_lazy
        ),
        (4, 4, 0)
    );
    let document = destination.root().await.unwrap();
    assert_eq!(document.digest.to_string(), summary.digest);
    assert_eq!(document.media_type, OCI_MANIFEST);
    let config = document.single("config").unwrap().unwrap();
    assert_eq!(
        config.digest,
        original.single("config").unwrap().unwrap().digest
    );
    let layers = document.list("layers").unwrap();
    for (layer, tar) in layers.iter().zip(&tars) {
        let blob = destination.blob_bytes(layer.digest).unwrap();
        assert_eq!(layer.size, blob.len() as u64);
        assert!(zstd::decode_all(&blob[..]).unwrap() == *tar);
        let LayerMark::Lazy(found) = mark(layer) else {
            panic!("lazy")
        };
        assert_eq!((found.blob, found.diff_id), (layer.digest, DiffId::of(tar)));
        assert_eq!(found.config.as_bytes(), config.digest.as_bytes());
        let range = destination
            .range(layer.digest, layer.size, found.index_extent)
            .await
            .unwrap();
        assert_eq!(
            sluice_blockindex::digest::IndexDigest::of(&range),
            found.index_digest
        );
    }
}

#[tokio::test]
async fn the_result_does_not_depend_on_threads_or_memory() {
    let builder = Builder::new();
    builder.ordinary();
    let mut digests = Vec::new();
    for (threads, memory_bytes) in [(1, 1), (2, 1 << 20), (5, 1 << 28)] {
        let destination = MemoryImage::new("destination");
        let options = Options {
            memory_bytes,
            ..options(threads)
        };
        digests.push(
            run(&builder.store, &destination, options)
                .await
                .unwrap()
                .digest,
        );
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[tokio::test]
async fn a_second_run_reads_and_writes_no_layer() {
    let builder = Builder::new();
    builder.ordinary();
    let destination = MemoryImage::new("destination");
    run(&builder.store, &destination, options(2)).await.unwrap();
    destination.reset_counts();
    builder.store.reset_counts();
    let summary = run(&builder.store, &destination, options(2)).await.unwrap();
    assert_eq!(
        (
            summary.uploads,
            summary.layers_reused,
            summary.layers_converted
        ),
        (0, 4, 0)
    );
    assert_eq!(
        destination.counts(),
        crate::image::memory::Counts::default()
    );
    assert_eq!(
        builder.store.counts().blobs_read,
        1,
        "the config, to know the diff IDs"
    );

    // A blob that has gone is made anew.
    let document = destination.root().await.unwrap();
    let lost = document.list("layers").unwrap()[1].digest;
    destination.remove_blob(lost);
    let summary = run(&builder.store, &destination, options(2)).await.unwrap();
    assert_eq!((summary.uploads, summary.layers_converted), (1, 1));
    assert!(destination.blob_bytes(lost).is_some());

    let forced = Options {
        force: true,
        ..options(2)
    };
    let summary = run(&builder.store, &destination, forced).await.unwrap();
    assert_eq!((summary.layers_converted, summary.uploads), (4, 0));
}

#[tokio::test]
async fn another_recipe_converts_again_and_the_same_does_not() {
    let builder = Builder::new();
    builder.ordinary();
    let destination = MemoryImage::new("destination");
    let by = |level, chunk_bytes| Options {
        recipe: Recipe {
            level,
            chunk_bytes,
            ..Recipe::default()
        },
        exact_recipe: true,
        ..options(2)
    };
    let mut digests = std::collections::BTreeSet::new();
    for recipe in [(1, 64 * 1024), (9, 64 * 1024), (9, 16 * 1024)] {
        for converted in [4, 0] {
            let options = by(recipe.0, recipe.1);
            let summary = run(&builder.store, &destination, options).await.unwrap();
            assert_eq!(summary.layers_converted, converted, "{recipe:?}");
            digests.insert(summary.digest);
        }
    }
    assert_eq!(digests.len(), 3);

    // In place: what was converted is converted again only where a recipe was asked for.
    for (options, converted) in [
        (options(2), 0),
        (by(9, 16 * 1024), 0),
        (by(1, 16 * 1024), 4),
        (by(1, 16 * 1024), 0),
        (options(2), 0),
    ] {
        let exact = options.exact_recipe;
        let summary = run(&destination, &destination, options).await.unwrap();
        assert_eq!(summary.layers_converted, converted, "exact: {exact}");
        let document = destination.root().await.unwrap();
        assert!(
            document
                .list("layers")
                .unwrap()
                .iter()
                .all(|layer| matches!(mark(layer), LayerMark::Lazy(_)))
        );
    }
}

#[tokio::test]
async fn layers_that_images_of_a_call_share_are_converted_once() {
    let builder = Builder::new();
    let (shared, own) = (tar_of(9, 40), [tar_of(1, 10), tar_of(2, 10)]);
    // The same tar, compressed by two tools.
    let blobs = [gzip(&shared), zstd::encode_all(&shared[..], 1).unwrap()];
    let options = options(2);
    let mut stores: Vec<MemoryImage> = Vec::new();
    let mut layers = Vec::new();
    for ((base, own), name) in blobs.into_iter().zip(own).zip(["first/app", "second/app"]) {
        let media_type = match layers.is_empty() {
            true => OCI_LAYER_GZIP,
            false => OCI_LAYER_ZSTD,
        };
        let image = [
            (builder.layer(media_type, base), DiffId::of(&shared)),
            (builder.layer(OCI_LAYER_GZIP, gzip(&own)), DiffId::of(&own)),
        ];
        builder.image(OCI_MANIFEST, "amd64", &image);
        let mut store = MemoryImage::new(name);
        if let Some(first) = stores.first() {
            let repository = first.repository().unwrap();
            store.mountable = Some((repository, Arc::new(first.clone())));
        }
        let summary = run(&builder.store, &store, options.clone()).await.unwrap();
        let again = u64::from(!layers.is_empty());
        assert_eq!(
            (summary.layers_converted, summary.layers_shared),
            (2 - again, again)
        );
        layers.push(store.root().await.unwrap().list("layers").unwrap());
        stores.push(store);
    }
    assert_eq!(layers[0][0].digest, layers[1][0].digest);
    let counts = stores[1].counts();
    assert_eq!(counts.blobs_mounted, 1, "not sent again");
    // Where nothing can be mounted it is copied from the first.
    let third = MemoryImage::new("third/app");
    let summary = run(&builder.store, &third, options.clone()).await.unwrap();
    assert_eq!((summary.layers_converted, summary.layers_shared), (0, 2));
    assert!(third.blob_bytes(layers[0][0].digest).is_some());
}

#[tokio::test]
async fn what_others_say_of_a_layer_does_not_reach_further_images() {
    // Converted by somebody who gave the blob of another tar this diff ID; its index is sound.
    let (store, _) = converted().await;
    let honest = tar_of(3, 10);
    let root = store.root().await.unwrap();
    let options = options(1);
    let first = MemoryImage::new("first");
    run(&store, &first, options.clone()).await.unwrap();
    let builder = Builder::new();
    let layer = root.list("layers").unwrap().remove(0);
    let LayerMark::Lazy(found) = mark(&layer) else {
        panic!("lazy")
    };
    // The same diff ID again, from a blob that nobody has: it must be read, not taken from the first.
    let absent = Descriptor::new(OCI_LAYER_GZIP, BlobDigest::of(b"absent"), 6);
    let layers = [
        (absent, found.diff_id),
        (
            builder.layer(OCI_LAYER_GZIP, gzip(&honest)),
            DiffId::of(&honest),
        ),
    ];
    builder.image(OCI_MANIFEST, "amd64", &layers);
    let second = MemoryImage::new("second");
    let error = run(&builder.store, &second, options).await.unwrap_err();
    assert!(error.to_string().contains("not found"), "{error}");
}

#[tokio::test]
async fn an_interrupted_conversion_goes_on_where_it_ended() {
    let state = tempfile::tempdir().unwrap();
    let by_records = || Options {
        known: Arc::new(Known::new(Some(crate::records::Records::open(
            state.path(),
        )))),
        ..options(1)
    };
    let builder = Builder::new();
    let (original, _) = builder.ordinary();
    let last = original.list("layers").unwrap().remove(3).digest;
    let blob = builder.store.blob_bytes(last).unwrap();
    builder.store.remove_blob(last);
    let destination = MemoryImage::new("destination");
    run(&builder.store, &destination, by_records())
        .await
        .expect_err("the last layer is not there");
    let finished = destination.counts().blobs_written;
    assert!((2..4).contains(&finished), "{finished} layers");

    builder.store.insert_blob(blob);
    let summary = run(&builder.store, &destination, by_records())
        .await
        .unwrap();
    assert_eq!(summary.layers_reused, finished as u64);
    assert_eq!(summary.layers_converted, 4 - finished as u64);
    let fresh = MemoryImage::new("fresh");
    let expected = run(&builder.store, &fresh, options(1)).await.unwrap();
    assert_eq!(summary.digest, expected.digest);

    // Records alone are no blobs: elsewhere, after damage, and with --force, layers are converted.
    let elsewhere = MemoryImage::new("elsewhere");
    let summary = run(&builder.store, &elsewhere, by_records()).await.unwrap();
    assert_eq!(summary.layers_converted, 4);
    let layer = lowest_layer(&destination).await;
    let damaged = MemoryImage::new("damaged");
    let mut bytes = destination.blob_bytes(layer.digest).unwrap().to_vec();
    let LayerMark::Lazy(found) = mark(&layer) else {
        panic!("lazy")
    };
    bytes[usize::try_from(found.index_extent.start()).unwrap() + 20] ^= 1;
    damaged.corrupt_blob(layer.digest, bytes);
    let summary = run(&builder.store, &damaged, by_records()).await.unwrap();
    assert_eq!((summary.layers_converted, summary.layers_reused), (4, 0));
    let forced = Options {
        force: true,
        ..by_records()
    };
    let summary = run(&builder.store, &destination, forced).await.unwrap();
    assert_eq!(summary.layers_converted, 4);
}

#[tokio::test]
async fn a_converted_image_is_copied_and_blobs_are_mounted() {
    let builder = Builder::new();
    builder.ordinary();
    let first = MemoryImage::new("first/repository");
    let summary = run(&builder.store, &first, options(2)).await.unwrap();
    let repository = first.repository().unwrap();
    let mut second = MemoryImage::new("second/repository");
    second.mountable = Some((repository, Arc::new(first.clone())));
    let copied = run(&first, &second, options(2)).await.unwrap();
    assert_eq!(copied.digest, summary.digest);
    assert_eq!(copied.layers_converted, 0);
    let counts = second.counts();
    assert_eq!(
        (counts.blobs_mounted, counts.blobs_written, counts.named),
        (5, 0, 1)
    );
}

#[tokio::test]
async fn every_platform_of_an_index_is_converted_and_the_rest_is_kept() {
    let builder = Builder::new();
    let shared = tar_of(9, 20);
    let shared_layer = builder.layer(DOCKER_LAYER, gzip(&shared));
    let mut entries = Vec::new();
    for (arch, seed) in [("amd64", 1), ("arm64", 2)] {
        let own = tar_of(seed, 10);
        let layers = [
            (shared_layer.clone(), DiffId::of(&shared)),
            (builder.layer(OCI_LAYER_GZIP, gzip(&own)), DiffId::of(&own)),
        ];
        let mut entry = builder.image(DOCKER_MANIFEST, arch, &layers).descriptor();
        entry.platform = Some(Platform::parse(&format!("linux/{arch}")).unwrap());
        entries.push(entry);
    }
    let attested = builder.layer("application/vnd.in-toto+json", b"{}".to_vec());
    let empty = builder.layer(OCI_CONFIG, b"{\"architecture\":\"unknown\"}".to_vec());
    let value = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": empty, "layers": [attested]});
    let attestation = Document::of_value(OCI_MANIFEST, value);
    builder.store.insert_document(&attestation, false);
    let mut entry = attestation.descriptor();
    entry.platform = Some(Platform::parse("unknown/unknown").unwrap());
    entry.annotations.insert(
        "vnd.docker.reference.digest".into(),
        entries[0].digest.to_string(),
    );
    entries.push(entry);
    let index = Document::of_value(
        DOCKER_INDEX,
        json!({"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": entries}),
    );
    builder.store.insert_document(&index, true);

    let destination = MemoryImage::new("destination");
    let summary = run(&builder.store, &destination, options(2)).await.unwrap();
    assert_eq!(
        (summary.images, summary.layers),
        (2, 3),
        "the shared layer is converted once"
    );
    let root = destination.root().await.unwrap();
    assert_eq!(root.media_type, OCI_INDEX);
    let manifests = root.list("manifests").unwrap();
    assert_eq!(manifests.len(), 3);
    let attested_digest = "vnd.docker.reference.digest";
    assert_eq!(
        manifests[2].annotations[attested_digest],
        manifests[0].digest.to_string(),
        "the attestation speaks of the image that is there"
    );
    assert_eq!(manifests[2].digest, entries[2].digest);
    assert!(destination.blob_bytes(attested.digest).is_some());
    for (manifest, entry) in manifests.iter().zip(&entries).take(2) {
        assert_eq!(manifest.platform, entry.platform);
        let image = destination.document(manifest).await.unwrap();
        assert!(
            image
                .list("layers")
                .unwrap()
                .iter()
                .all(|l| matches!(mark(l), LayerMark::Lazy(_)))
        );
    }
    destination.reset_counts();
    let again = run(&builder.store, &destination, options(2)).await.unwrap();
    assert_eq!((again.uploads, again.digest), (0, summary.digest));

    let only = MemoryImage::new("only");
    let arm = Options {
        platforms: vec![Platform::parse("linux/arm64").unwrap()],
        ..options(1)
    };
    assert_eq!(run(&builder.store, &only, arm).await.unwrap().images, 1);
    let none = Options {
        platforms: vec![Platform::parse("linux/s390x").unwrap()],
        ..options(1)
    };
    let error = run(&builder.store, &only, none)
        .await
        .expect_err("no s390x")
        .to_string();
    assert_eq!(
        error,
        "platform linux/s390x is not in source/image; it has linux/amd64, linux/arm64"
    );
}

#[tokio::test]
async fn a_platform_that_a_single_image_is_not_for_is_refused() {
    let builder = Builder::new();
    builder.ordinary();
    let destination = MemoryImage::new("destination");
    let platforms = vec![Platform::parse("linux/arm64").unwrap()];
    let options = Options {
        platforms,
        ..options(1)
    };
    let error = run(&builder.store, &destination, options)
        .await
        .expect_err("amd64 only");
    assert!(error.to_string().ends_with("it has linux/amd64"), "{error}");
}

#[tokio::test]
async fn layers_that_cannot_be_lazy_are_ordinary_zstd_and_say_why() {
    let tar = sparse_tar();
    for (blob, unchanged) in [
        (gzip(&tar), false),
        (zstd::encode_all(tar.as_slice(), 1).unwrap(), true),
    ] {
        let builder = Builder::new();
        let media_type = if unchanged {
            OCI_LAYER_ZSTD
        } else {
            OCI_LAYER_GZIP
        };
        let layer = builder.layer(media_type, blob);
        builder.image(OCI_MANIFEST, "amd64", &[(layer.clone(), DiffId::of(&tar))]);
        let destination = MemoryImage::new("destination");
        let summary = run(&builder.store, &destination, options(1)).await.unwrap();
        assert_eq!(summary.layers_not_lazy, 1);
        let read = builder.store.counts().blobs_read;
        assert_eq!(read, 3, "the layer once, the config twice");
        let found = lowest_layer(&destination).await;
        assert!(matches!(mark(&found), LayerMark::NotLazy(reason) if reason.contains("sparse")));
        assert_eq!(found.media_type, OCI_LAYER_ZSTD);
        assert_eq!(found.digest == layer.digest, unchanged);
        let bytes = destination.blob_bytes(found.digest).unwrap();
        assert!(zstd::decode_all(&bytes[..]).unwrap() == tar);
        let again = run(&builder.store, &destination, options(1)).await.unwrap();
        assert_eq!((again.uploads, again.layers_converted), (0, 0));
    }
}

#[tokio::test]
async fn foreign_layers_are_left_where_they_are() {
    let builder = Builder::new();
    let tar = tar_of(1, 3);
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let mut layer = Descriptor::new(foreign, BlobDigest::of(b"not here"), 8);
    layer
        .other
        .insert("urls".into(), json!(["https://example.test/base"]));
    let own = builder.layer(DOCKER_LAYER, gzip(&tar));
    let layers = [(layer, DiffId::of(b"windows")), (own, DiffId::of(&tar))];
    builder.image(DOCKER_MANIFEST, "amd64", &layers);
    let destination = MemoryImage::new("destination");
    run(&builder.store, &destination, options(1)).await.unwrap();
    let found = destination.root().await.unwrap().list("layers").unwrap();
    assert_eq!(found[0].digest, BlobDigest::of(b"not here"));
    assert!(destination.blob_bytes(found[0].digest).is_none());
    assert!(matches!(mark(&found[1]), LayerMark::Lazy(_)));
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_name_and_nothing_is_named() {
    let tar = tar_of(1, 40);
    let blob = gzip(&tar);
    let digest = BlobDigest::of(&blob);
    let bomb = gzip(&vec![0; 3 << 20]);
    type Damage = Box<dyn Fn(&MemoryImage)>;
    let flip = blob.clone();
    let cut = blob.clone();
    let cases: Vec<(&str, Vec<u8>, DiffId, Damage, &str)> = vec![
        (
            "corrupt",
            blob.clone(),
            DiffId::of(&tar),
            Box::new(move |store| {
                let mut flip = flip.clone();
                flip[1000] ^= 0x10;
                store.corrupt_blob(digest, flip);
            }),
            "is corrupt: expected sha256:",
        ),
        (
            "truncated",
            blob.clone(),
            DiffId::of(&tar),
            Box::new(move |store| store.corrupt_blob(digest, Bytes::copy_from_slice(&cut[..500]))),
            "bytes, got 500 bytes",
        ),
        (
            "missing",
            blob.clone(),
            DiffId::of(&tar),
            Box::new(move |store| store.remove_blob(digest)),
            "not found",
        ),
        (
            "wrong diff ID",
            blob.clone(),
            DiffId::of(b"other"),
            Box::new(|_| {}),
            "has diff ID",
        ),
        (
            "bomb",
            bomb,
            DiffId::of(b"never reached"),
            Box::new(|_| {}),
            "--max-layer-bytes",
        ),
        (
            "no gzip",
            b"\x1f\x8bgarbage".to_vec(),
            DiffId::of(b"x"),
            Box::new(|_| {}),
            "decompress",
        ),
    ];
    for (name, blob, diff_id, damage, message) in cases {
        let builder = Builder::new();
        let layer = builder.layer(DOCKER_LAYER, blob);
        let good = tar_of(5, 3);
        let other = builder.layer(DOCKER_LAYER, gzip(&good));
        let layers = [(other, DiffId::of(&good)), (layer.clone(), diff_id)];
        builder.image(DOCKER_MANIFEST, "amd64", &layers);
        damage(&builder.store);
        let destination = MemoryImage::new("destination");
        let caps = Caps {
            layer_bytes: 2 << 20,
            ..Caps::default()
        };
        let options = Options { caps, ..options(2) };
        let error = run(&builder.store, &destination, options)
            .await
            .expect_err(name);
        // As the command line prints it.
        let error = format!("{:#}", anyhow::Error::from(error));
        assert_eq!(error.matches(message).count(), 1, "{name}: {error}");
        assert!(
            error.contains(&layer.digest.to_string()),
            "{name} names the blob: {error}"
        );
        let counts = destination.counts();
        assert_eq!((counts.documents_written, counts.named), (0, 0), "{name}");
        assert!(destination.root().await.is_err(), "{name}");
    }
}

/// A converted image of one layer of incompressible content, in a store of its own.
async fn converted() -> (MemoryImage, Vec<u8>) {
    let builder = Builder::new();
    let mut state = 1_u64;
    let noise = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.to_be_bytes()[0]
    });
    let noise: Vec<u8> = noise.take(100_000).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(noise.len() as u64);
    header.set_mode(0o644);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header, "noise", &noise[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let layer = builder.layer(OCI_LAYER_GZIP, gzip(&tar));
    builder.image(OCI_MANIFEST, "amd64", &[(layer, DiffId::of(&tar))]);
    let store = MemoryImage::new("converted");
    run(&builder.store, &store, options(1)).await.unwrap();
    (store, tar)
}

/// What an image's manifest says of its lowest layer.
async fn lowest_layer(image: &MemoryImage) -> Descriptor {
    image
        .root()
        .await
        .unwrap()
        .list("layers")
        .unwrap()
        .remove(0)
}

/// Puts an edited manifest in place of the image's; `edit` gets the layer's descriptor.
async fn edited(store: &MemoryImage, edit: impl FnOnce(&mut Descriptor)) {
    let document = store.root().await.unwrap();
    let mut layers = document.list("layers").unwrap();
    edit(&mut layers[0]);
    let mut value = document.value.clone();
    value["layers"] = serde_json::to_value(&layers).unwrap();
    store.insert_document(&Document::of_value(OCI_MANIFEST, value), true);
}

fn set(layer: &mut Descriptor, name: &str, value: String) {
    let name = format!("containerd.io/snapshot/sluice.{name}");
    layer.annotations.insert(name, value);
}

#[tokio::test]
async fn an_artifact_is_copied_as_it_is() {
    let builder = Builder::new();
    let layer = builder.layer(
        "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
        b"x".to_vec(),
    );
    let config = builder.layer("application/vnd.cncf.helm.config.v1+json", b"{}".to_vec());
    let value = json!({"schemaVersion": 2, "config": config, "layers": [layer], "subject": null});
    let chart = Document::of_value(OCI_MANIFEST, value);
    builder.store.insert_document(&chart, true);
    let destination = MemoryImage::new("destination");
    let summary = run(&builder.store, &destination, options(1)).await.unwrap();
    assert_eq!(summary.digest, chart.digest.to_string());
}

#[tokio::test]
async fn uncompressed_layers_of_any_name_are_read_by_their_first_bytes() {
    let builder = Builder::new();
    let tar = tar_of(1, 4);
    // Says tar, is gzip; says gzip, is tar.
    let layers = [
        (builder.layer(OCI_LAYER_TAR, gzip(&tar)), DiffId::of(&tar)),
        (builder.layer(OCI_LAYER_GZIP, tar.clone()), DiffId::of(&tar)),
    ];
    builder.image(OCI_MANIFEST, "amd64", &layers);
    let destination = MemoryImage::new("destination");
    run(&builder.store, &destination, options(1)).await.unwrap();
    let found = destination.root().await.unwrap().list("layers").unwrap();
    assert_eq!(
        found[0].digest, found[1].digest,
        "the same tar is the same blob"
    );
}
