// SPDX-License-Identifier: Apache-2.0
//! Conversions to formats that others read too.

use std::io::Read as _;

use serde_json::Value;
use sluice_blockindex::toc::{ESTARGZ_DIGEST, TocFormat, TocPin, ZSTD_CHUNKED_POSITION};

use super::*;
use crate::records::Records;

const ESTARGZ: LayerFormat = LayerFormat::Toc(TocFormat::Estargz);
const ZSTD_CHUNKED: LayerFormat = LayerFormat::Toc(TocFormat::ZstdChunked);
const BOTH: [LayerFormat; 2] = [ESTARGZ, ZSTD_CHUNKED];

fn to(format: LayerFormat) -> Options {
    Options {
        recipe: Recipe::of(format),
        ..options(2)
    }
}

fn unpack(format: LayerFormat, blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    if format == ESTARGZ {
        let mut decoder = flate2::read::MultiGzDecoder::new(blob);
        decoder.read_to_end(&mut tar).unwrap();
    } else {
        tar = zstd::decode_all(blob).unwrap();
    }
    tar
}

struct Image {
    document: Document,
    config: Value,
    config_digest: String,
    layers: Vec<Descriptor>,
}

async fn image(store: &MemoryImage) -> Image {
    let document = store.root().await.unwrap();
    let config = document.single("config").unwrap().unwrap();
    let bytes = store.blob_bytes(config.digest).unwrap();
    Image {
        config: serde_json::from_slice(&bytes).unwrap(),
        config_digest: config.digest.to_string(),
        layers: document.list("layers").unwrap(),
        document,
    }
}

/// What was said of changed diff IDs: layers, and the configs before and now.
#[derive(Debug, Default)]
struct ToldChanges(Mutex<Vec<(u64, String, String)>>);

impl Reporter for ToldChanges {
    fn event(&self, event: &Event) {
        if let Event::DiffIdsChanged {
            layers,
            config_before,
            config,
            ..
        } = event
        {
            let told = (*layers, config_before.clone(), config.clone());
            self.0.lock().unwrap().push(told);
        }
    }
    fn progress(&self, _: &str, _: u64) {}
    fn uploading(&self, _: &str, _: u64, _: u64) {}
}

#[tokio::test]
async fn only_estargz_changes_diff_ids_and_says_so() {
    for format in BOTH {
        let builder = Builder::new();
        let (_, tars) = builder.ordinary();
        let destination = MemoryImage::new("destination");
        let told = Arc::new(ToldChanges::default());
        let summary = convert(
            Arc::new(builder.store.clone()),
            Arc::new(destination.clone()),
            to(format),
            Arc::<ToldChanges>::clone(&told),
        )
        .await
        .unwrap();
        assert_eq!((summary.layers_converted, summary.layers_not_lazy), (4, 0));
        let (before, now) = (image(&builder.store).await, image(&destination).await);
        let told = told.0.lock().unwrap().clone();
        match format == ESTARGZ {
            true => {
                let expected = (4, before.config_digest, now.config_digest);
                assert_eq!(told, [expected]);
            }
            false => {
                assert_eq!(told, []);
                assert_eq!(before.config_digest, now.config_digest);
            }
        }
        let without_ids = |config: &Value| {
            let mut config = config.clone();
            config["rootfs"]["diff_ids"] = Value::Null;
            config
        };
        assert_eq!(without_ids(&before.config), without_ids(&now.config));
        for (number, (layer, tar)) in now.layers.iter().zip(&tars).enumerate() {
            let blob = destination.blob_bytes(layer.digest).unwrap();
            let unpacked = unpack(format, &blob);
            let diff_id = now.config["rootfs"]["diff_ids"][number].as_str().unwrap();
            assert_eq!(diff_id, DiffId::of(&unpacked).to_string(), "{format}");
            if format == ZSTD_CHUNKED {
                assert!(unpacked == *tar);
            }
            let get = |name: &str| layer.annotations.get(name).map(String::as_str);
            let pin = TocPin::of_annotations(get).unwrap();
            assert!(pin.is_some(), "{format}");
            assert_eq!(mark(layer), LayerMark::Unmarked, "{format}");
        }
    }
}

#[tokio::test]
async fn a_second_run_converts_nothing_wherever_the_image_is() {
    for format in BOTH {
        let builder = Builder::new();
        builder.ordinary();
        let destination = MemoryImage::new("destination");
        let first = run(&builder.store, &destination, to(format)).await.unwrap();
        let again = run(&builder.store, &destination, to(format)).await.unwrap();
        assert_eq!((again.uploads, again.layers_reused), (0, 4), "{format}");
        assert_eq!(again.digest, first.digest);
        // In place, and onwards to somebody who does not have it.
        let in_place = run(&destination, &destination, to(format)).await.unwrap();
        assert_eq!(
            (in_place.uploads, in_place.digest),
            (0, first.digest.clone())
        );
        let other = MemoryImage::new("other");
        let onwards = run(&destination, &other, to(format)).await.unwrap();
        assert_eq!(
            (onwards.layers_converted, onwards.digest),
            (0, first.digest)
        );
        // Another level is asked for, so it is made again; the same once more is not.
        let exact = || Options {
            recipe: Recipe {
                level: 1,
                ..Recipe::of(format)
            },
            exact_recipe: true,
            ..options(2)
        };
        for converted in [4, 0] {
            let summary = run(&destination, &other, exact()).await.unwrap();
            assert_eq!(summary.layers_converted, converted, "{format}");
        }
        // No table of contents is listed in another one.
        for layer in image(&other).await.layers {
            let tar = unpack(format, &other.blob_bytes(layer.digest).unwrap());
            let mut archive = tar::Archive::new(tar.as_slice());
            let paths = archive.entries().unwrap().map(|entry| {
                let path = entry.unwrap().path().unwrap().into_owned();
                path.display().to_string()
            });
            let tables = paths.filter(|path| path == "stargz.index.json").count();
            assert_eq!(tables, usize::from(format == ESTARGZ));
        }
    }
}

#[tokio::test]
async fn formats_are_converted_into_each_other() {
    let builder = Builder::new();
    let (_, tars) = builder.ordinary();
    let mut from = builder.store.clone();
    for format in [ZSTD_CHUNKED, LayerFormat::Sluice, ZSTD_CHUNKED, ESTARGZ] {
        let destination = MemoryImage::new("destination");
        let summary = run(&from, &destination, to(format)).await.unwrap();
        assert_eq!((summary.layers_converted, summary.layers_not_lazy), (4, 0));
        for (layer, tar) in image(&destination).await.layers.iter().zip(&tars) {
            let names = [ESTARGZ_DIGEST, ZSTD_CHUNKED_POSITION];
            let pins = names.map(|name| layer.annotations.contains_key(name));
            assert_eq!(pins, [format == ESTARGZ, format == ZSTD_CHUNKED]);
            let lazy = matches!(mark(layer), LayerMark::Lazy(_));
            assert_eq!(lazy, format == LayerFormat::Sluice);
            if format != ESTARGZ {
                let blob = destination.blob_bytes(layer.digest).unwrap();
                assert!(unpack(format, &blob) == *tar);
            }
        }
        from = destination;
    }
    // And back, with the table as a file of the tar.
    let ours = MemoryImage::new("ours");
    let summary = run(&from, &ours, options(2)).await.unwrap();
    assert_eq!((summary.layers_converted, summary.layers_not_lazy), (4, 0));
    let (before, now) = (image(&from).await, image(&ours).await);
    assert_eq!(before.config_digest, now.config_digest);
}

#[tokio::test]
async fn a_layer_that_has_no_place_in_a_table_stays_as_it_is() {
    for format in BOTH {
        let builder = Builder::new();
        let (sparse, plain) = (sparse_tar(), tar_of(1, 3));
        let layers = [&sparse, &plain].map(|tar| {
            let layer = builder.layer(OCI_LAYER_GZIP, gzip(tar));
            (layer, DiffId::of(tar))
        });
        builder.image(OCI_MANIFEST, "amd64", &layers);
        let destination = MemoryImage::new("destination");
        let summary = run(&builder.store, &destination, to(format)).await.unwrap();
        assert_eq!((summary.layers_converted, summary.layers_not_lazy), (2, 1));
        let made = image(&destination).await;
        let blob = destination.blob_bytes(made.layers[0].digest).unwrap();
        assert!(unpack(format, &blob) == sparse, "{format}");
        let reason = &made.layers[0].annotations["sluice.no-toc"];
        assert!(reason.contains("sparse"), "{reason}");
        // Whoever indexes blobs as they are may try this one.
        assert_eq!(mark(&made.layers[0]), LayerMark::Unmarked);
        let again = run(&builder.store, &destination, to(format)).await.unwrap();
        assert_eq!((again.uploads, again.layers_not_lazy), (0, 1), "{format}");
        let in_place = run(&destination, &destination, to(format)).await.unwrap();
        assert_eq!(in_place.layers_converted, 0, "{format}");
    }
}

#[tokio::test]
async fn interrupted_and_further_images_find_what_was_converted() {
    for format in BOTH {
        let builder = Builder::new();
        builder.ordinary();
        let directory = tempfile::tempdir().unwrap();
        let with_records = || Options {
            known: Arc::new(Known::new(Some(Records::open(directory.path())))),
            ..to(format)
        };
        let call = with_records();
        let destination = MemoryImage::new("first/app");
        let first = run(&builder.store, &destination, call.clone())
            .await
            .unwrap();
        // Another image of the call, with nothing at its own place.
        let second = MemoryImage::new("second/app");
        let shared = run(&builder.store, &second, call).await.unwrap();
        assert_eq!((shared.layers_converted, shared.layers_shared), (0, 4));
        assert_eq!(shared.digest, first.digest);
        // A later call finds blobs without a name.
        let unnamed = MemoryImage::new("third/app");
        for layer in image(&destination).await.layers {
            unnamed.insert_blob(destination.blob_bytes(layer.digest).unwrap().to_vec());
        }
        let later = run(&builder.store, &unnamed, with_records()).await.unwrap();
        assert_eq!((later.layers_converted, later.layers_reused), (0, 4));
        assert_eq!(later.digest, first.digest);
        // By another format they are not looked for.
        let other = BOTH.into_iter().find(|other| *other != format).unwrap();
        let options = Options {
            recipe: Recipe::of(other),
            ..with_records()
        };
        let summary = run(&builder.store, &unnamed, options).await.unwrap();
        assert_eq!(summary.layers_converted, 4);
    }
}

#[tokio::test]
async fn a_pin_that_lies_is_not_carried_on() {
    for (format, name) in [
        (ESTARGZ, ESTARGZ_DIGEST),
        (ZSTD_CHUNKED, ZSTD_CHUNKED_POSITION),
    ] {
        let builder = Builder::new();
        builder.ordinary();
        let honest = MemoryImage::new("honest");
        run(&builder.store, &honest, to(format)).await.unwrap();
        let Image {
            mut document,
            layers,
            ..
        } = image(&honest).await;
        let lie = match format == ESTARGZ {
            true => DiffId::of(b"another table").to_string(),
            false => "9:9:9:1".to_owned(),
        };
        document.value["layers"][1]["annotations"][name] = lie.into();
        let lying = Document::of_value(OCI_MANIFEST, document.value);
        honest.insert_document(&lying, true);
        let destination = MemoryImage::new("destination");
        let summary = run(&honest, &destination, to(format)).await.unwrap();
        assert_eq!(summary.layers_converted, 1, "{format}");
        let made = image(&destination).await.layers;
        // The same tar, so the same blob, with a pin that holds.
        assert_eq!(made[1].digest, layers[1].digest);
        assert_eq!(made[1].annotations[name], layers[1].annotations[name]);
    }
}

#[tokio::test]
async fn a_layer_that_is_not_what_its_config_says_is_refused() {
    for format in BOTH {
        let builder = Builder::new();
        let layer = builder.layer(OCI_LAYER_GZIP, gzip(&tar_of(1, 3)));
        builder.image(OCI_MANIFEST, "amd64", &[(layer, DiffId::of(b"another"))]);
        let destination = MemoryImage::new("destination");
        let error = run(&builder.store, &destination, to(format))
            .await
            .unwrap_err();
        let text = format!("{:#}", anyhow::Error::from(error));
        assert!(text.contains("diff ID"), "{text}");
        assert!(destination.root().await.is_err(), "nothing has the name");
    }
}
