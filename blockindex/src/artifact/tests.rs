// SPDX-License-Identifier: Apache-2.0
use std::io::Write;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::indexer::{IndexOptions, IndexedLayer, index_blob};

const DOC: &str = include_str!("../../../docs/formats/index-artifact.md");

fn subject() -> ManifestDigest {
    ManifestDigest::of(b"image")
}

fn blob(name: &str) -> BlobDigest {
    BlobDigest::of(name.as_bytes())
}

/// A layer with windows, one without, and one that is not lazy.
fn sample() -> Artifact {
    let layer = |name: &str, index| ArtifactLayer {
        blob: blob(name),
        blob_bytes: 1000,
        diff_id: DiffId::of(name.as_bytes()),
        index,
    };
    let index = |name: &str, windows| IndexBlobs {
        digest: IndexDigest::of(name.as_bytes()),
        bytes: 100,
        windows,
    };
    let windows = WindowsPin {
        bytes: 50,
        digest: *blob("windows").as_bytes(),
    };
    Artifact {
        subject: Subject {
            media_type: MANIFEST_TYPE.to_owned(),
            digest: subject(),
            bytes: 700,
        },
        generation: 3,
        recipe: "1".to_owned(),
        layers: vec![
            layer("gzip", Ok(index("index of gzip", Some(windows)))),
            layer("tar", Ok(index("index of tar", None))),
            layer("sparse", Err("sparse file".to_owned())),
        ],
    }
}

fn value() -> Value {
    serde_json::from_slice(&sample().to_json().unwrap()).unwrap()
}

fn parse(value: &Value) -> Result<Artifact, ArtifactError> {
    Artifact::parse(value.to_string().as_bytes(), subject())
}

#[test]
fn what_is_written_is_read_back() {
    let bytes = sample().to_json().unwrap();
    assert_eq!(Artifact::parse(&bytes, subject()), Ok(sample()));
    // Who pushes the same twice must push the same bytes.
    assert_eq!(bytes, sample().to_json().unwrap());
    let pinned = "sha256:7e91c1f0b3803d0360e5c5fb73698696c53e43830104f59676b9a8cf409a58ad";
    assert_eq!(ManifestDigest::of(&bytes).to_string(), pinned);
    let without = Artifact {
        recipe: String::new(),
        ..sample()
    };
    let bytes = without.to_json().unwrap();
    assert_eq!(Artifact::parse(&bytes, subject()), Ok(without));
}

#[test]
fn the_example_of_the_document_is_an_artifact() {
    let (_, rest) = DOC.split_once("```json\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let written: Value = serde_json::from_str(example).unwrap();
    assert_eq!(written, value());
    assert_eq!(parse(&written), Ok(sample()));
}

#[test]
fn what_is_not_known_means_nothing() {
    let mut value = value();
    value["other"] = json!([1]);
    value["annotations"]["org.example"] = json!("x");
    value["layers"][0]["annotations"]["org.example"] = json!("x");
    value["layers"][0]["urls"] = json!(["https://example.org"]);
    value["config"]["data"] = json!("e30=");
    assert_eq!(parse(&value), Ok(sample()));
}

/// Sets a member, by JSON pointer; `null` takes it away.
fn with(pointer: &str, new: Value) -> Value {
    let mut value = value();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match value.pointer_mut(parent).unwrap() {
        Value::Object(map) if new.is_null() => {
            map.shift_remove(key).unwrap();
        }
        Value::Object(map) => {
            map.insert(key.to_owned(), new);
        }
        Value::Array(list) if new.is_null() => {
            list.remove(key.parse().unwrap());
        }
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = new,
        other => panic!("{other}"),
    }
    value
}

#[test]
fn what_breaks_a_rule_is_refused_with_the_reason() {
    let other = blob("other").to_string();
    let gzip = "/layers/0/annotations/sluice.blob";
    let cases = [
        ("/schemaVersion", json!(1), "schemaVersion is \"1\""),
        (
            "/mediaType",
            json!("a/b"),
            "manifest of the artifact has type \"a/b\"",
        ),
        ("/mediaType", Value::Null, "missing field `mediaType`"),
        (
            "/artifactType",
            json!("application/vnd.sluice.index.v2"),
            "has type \"application/vnd.sluice.index.v2\"",
        ),
        (
            "/config/mediaType",
            json!("application/vnd.oci.image.config.v1+json"),
            "config of the artifact has type",
        ),
        (
            "/config/digest",
            json!(other),
            "config of the artifact is not the empty value",
        ),
        (
            "/config/size",
            json!(3),
            "config of the artifact is not the empty value",
        ),
        ("/subject", Value::Null, "no subject"),
        (
            "/subject/digest",
            json!(other),
            &format!("artifact is of {other}, not of {}", subject()),
        ),
        (
            "/subject/digest",
            json!("sha512:00"),
            "subject is \"sha512:00\"",
        ),
        (
            "/subject/mediaType",
            json!("application/vnd.oci.image.index.v1+json"),
            "subject of the artifact has type",
        ),
        ("/subject/size", json!(0), "subject: 0 is not within 1 to"),
        (
            "/subject/size",
            json!(SUBJECT_MAX_BYTES + 1),
            "subject: 16777217 is not within",
        ),
        (
            "/annotations",
            Value::Null,
            "annotation sluice.generation is missing at the manifest",
        ),
        (
            "/annotations/sluice.generation",
            json!("0"),
            "sluice.generation is \"0\"",
        ),
        (
            "/annotations/sluice.generation",
            json!("03"),
            "sluice.generation is \"03\"",
        ),
        (
            "/annotations/sluice.generation",
            json!("4294967296"),
            "sluice.generation is",
        ),
        (
            "/annotations/sluice.recipe",
            json!("x".repeat(65)),
            "recipe: 65 is not within",
        ),
        ("/layers", json!([]), "layers: 0 is not within 1 to 512"),
        (
            "/layers/0/mediaType",
            json!("application/vnd.oci.image.layer.v1.tar"),
            "an entry of the artifact has type",
        ),
        (
            "/layers/0/digest",
            json!("sha256:0"),
            "digest is \"sha256:0\" at entry 0",
        ),
        ("/layers/0/size", json!(0), "index: 0 is not within"),
        (
            "/layers/0/size",
            json!(INDEX_MAX_BYTES + 1),
            "index: 268435457 is not within",
        ),
        ("/layers/0/size", json!(-1), "malformed"),
        (
            "/layers/0/annotations",
            Value::Null,
            "annotation sluice.blob.size is missing at entry 0",
        ),
        (
            gzip,
            json!(blob("tar").to_string()),
            "windows at entry 1 do not follow",
        ),
        (
            "/layers/1/annotations/sluice.diff",
            json!(other),
            "windows at entry 1 do not follow",
        ),
        (
            "/layers/1/annotations/sluice.blob.size",
            json!("9"),
            "windows at entry 1 do not follow",
        ),
        ("/layers/0", Value::Null, "windows at entry 0 do not follow"),
        (
            "/layers/1/size",
            json!(HEADER_BYTES),
            "windows: 16 is not within",
        ),
        (
            "/layers/1/size",
            json!(WINDOWS_MAX_BYTES + 1),
            "windows: 268435457 is not within",
        ),
        (
            "/layers/2/annotations/sluice.blob",
            json!(blob("gzip").to_string()),
            "blob sha256:",
        ),
        (
            "/layers/2/digest",
            json!(IndexDigest::of(b"index of gzip").to_string()),
            "index sha256:",
        ),
        (
            "/layers/2/annotations/sluice.blob.size",
            json!("0"),
            "blob: 0 is not within",
        ),
        (
            "/layers/2/annotations/sluice.blob.size",
            json!("9223372036854775808"),
            "blob: 9223372036854775808",
        ),
        (
            "/layers/2/annotations/sluice.blob.size",
            json!("+1"),
            "sluice.blob.size is \"+1\" at entry 2",
        ),
        (
            "/layers/3/annotations/sluice.not-lazy",
            Value::Null,
            "annotation sluice.not-lazy is missing at entry 3",
        ),
        (
            "/layers/3/annotations/sluice.not-lazy",
            json!(""),
            "reason: 0 is not within",
        ),
        (
            "/layers/3/annotations/sluice.not-lazy",
            json!("x".repeat(1025)),
            "reason: 1025 is not within",
        ),
        (
            "/layers/3/size",
            json!(1_u64 << 40),
            "a layer that is not lazy of the artifact is not the empty value",
        ),
    ];
    for (pointer, new, expected) in cases {
        let error = parse(&with(pointer, new.clone())).expect_err(pointer);
        let text = error.to_string();
        assert!(text.contains(expected), "{pointer} = {new}: {text}");
        assert!(text.len() < 400, "{text}");
    }
}

#[test]
fn windows_stand_once() {
    let mut value = value();
    let windows = value["layers"][1].clone();
    value["layers"].as_array_mut().unwrap().insert(2, windows);
    let place = "entry 2".to_owned();
    assert_eq!(parse(&value), Err(ArtifactError::Windows { place }));
    // After a layer that has no index they belong to nobody.
    let mut value = self::value();
    let mut windows = value["layers"][1].clone();
    windows["annotations"] = value["layers"][3]["annotations"].clone();
    value["layers"].as_array_mut().unwrap().push(windows);
    let place = "entry 4".to_owned();
    assert_eq!(parse(&value), Err(ArtifactError::Windows { place }));
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_read() {
    let bytes = vec![b' '; usize::try_from(ARTIFACT_MAX_BYTES).unwrap() + 1];
    let error = Artifact::parse(&bytes, subject()).unwrap_err();
    assert!(matches!(error, ArtifactError::TooLarge { .. }), "{error}");
    let deep = "[".repeat(100_000);
    let error = Artifact::parse(deep.as_bytes(), subject()).unwrap_err();
    assert!(matches!(error, ArtifactError::Json { .. }), "{error}");
    let layer = |at: u32| ArtifactLayer {
        blob: BlobDigest::of(&at.to_le_bytes()),
        ..sample().layers[2].clone()
    };
    let of = |count| Artifact {
        layers: (0..count).map(layer).collect(),
        ..sample()
    };
    let most = of(512).to_json().unwrap();
    assert_eq!(Artifact::parse(&most, subject()), Ok(of(512)));
    assert!(matches!(
        of(513).to_json(),
        Err(ArtifactError::Range { what: "layers", .. })
    ));
}

#[test]
fn a_layer_is_found_by_all_that_the_image_says_of_it() {
    let artifact = sample();
    let diff_id = DiffId::of(b"tar");
    let found = artifact.layer(blob("tar"), 1000, diff_id).unwrap();
    assert_eq!(found, Some(&artifact.layers[1]));
    assert_eq!(artifact.layer(blob("none"), 1000, diff_id), Ok(None));
    for (bytes, diff_id, what) in [
        (999, diff_id, "size"),
        (1000, DiffId::of(b"other"), "diff ID"),
    ] {
        let error = artifact.layer(blob("tar"), bytes, diff_id).unwrap_err();
        let expected = matches!(&error, ArtifactError::Disagrees { what: it, .. } if *it == what);
        assert!(expected, "{error}");
    }
}

#[test]
fn generations_apart_artifacts_say_the_same() {
    let mut other = sample();
    other.generation = 9;
    assert!(other.says_the_same(&sample()));
    other.recipe = "2".to_owned();
    assert!(!other.says_the_same(&sample()));
    let mut other = sample();
    other.layers.pop();
    assert!(!other.says_the_same(&sample()));
    assert_eq!(generation_of(&sample().annotations()), Some(3));
    assert_eq!(generation_of(&BTreeMap::new()), None);
}

#[test]
fn reasons_fit() {
    assert_eq!(reason_of("why"), "why");
    assert_eq!(reason_of(""), "no reason given");
    assert_eq!(reason_of(&"ä".repeat(600)), "ä".repeat(512));
}

/// A gzip layer with windows.
fn indexed(seed: u32) -> (IndexedLayer, ArtifactLayer) {
    let mut state = u64::from(seed);
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40).to_le_bytes()[0] & 0x0f
    };
    // Few symbols, no pattern: copies from the 32 KiB before, several blocks.
    let content: Vec<u8> = (0..200_000).map(|_| next()).collect();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    let content = content.as_slice();
    builder.append_data(&mut header, "file", content).unwrap();
    let level = flate2::Compression::new(6);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
    encoder.write_all(&builder.into_inner().unwrap()).unwrap();
    let options = IndexOptions {
        chunk_max_bytes: 16 * 1024,
        ..IndexOptions::default()
    };
    let layer = index_blob(&encoder.finish().unwrap(), options).unwrap();
    let built = layer.index.clone().unwrap();
    assert!(!built.windows.is_empty(), "the sample needs windows");
    let windows = WindowsPin {
        bytes: built.windows.len() as u64,
        digest: *BlobDigest::of(&built.windows).as_bytes(),
    };
    let entry = ArtifactLayer {
        blob: layer.blob,
        blob_bytes: layer.blob_bytes,
        diff_id: layer.diff_id,
        index: Ok(IndexBlobs {
            digest: built.digest,
            bytes: built.payload.len() as u64,
            windows: Some(windows),
        }),
    };
    (layer, entry)
}

#[test]
fn only_the_index_of_the_layer_is_accepted() {
    let (layer, entry) = indexed(1);
    let payload = layer.index.unwrap().payload;
    let index = entry.accept(&payload).unwrap();
    assert_eq!(index.diff_id(), layer.diff_id);

    let refused = |entry: &ArtifactLayer, payload: &[u8], expected: &str| {
        let text = entry.accept(payload).unwrap_err().to_string();
        assert!(text.contains(expected), "{expected:?}: {text}");
    };
    refused(&entry, &payload[1..], "the artifact says");
    let change = |change: &dyn Fn(&mut ArtifactLayer, &mut IndexBlobs)| {
        let mut changed = entry.clone();
        let mut index = *entry.index.as_ref().unwrap();
        change(&mut changed, &mut index);
        changed.index = Ok(index);
        changed
    };
    let other = change(&|layer, _| layer.blob = blob("other"));
    refused(&other, &payload, "blob");
    let other = change(&|layer, _| layer.blob_bytes += 1);
    refused(&other, &payload, "bytes of the blob");
    let other = change(&|layer, _| layer.diff_id = DiffId::of(b"other"));
    refused(&other, &payload, "another diff ID");
    let other = change(&|_, index| index.windows = None);
    refused(&other, &payload, "another file of windows");
    let other = change(&|_, index| index.bytes += 1);
    refused(&other, &payload, "the artifact says");

    // The index of another blob, named as if it were of this one.
    let (_, foreign) = indexed(2);
    let (stolen, _) = indexed(2);
    let stolen = stolen.index.unwrap().payload;
    let claim = ArtifactLayer {
        index: foreign.index,
        ..entry.clone()
    };
    refused(&claim, &stolen, "blob");

    let none = ArtifactLayer {
        index: Err("sparse file".to_owned()),
        ..entry
    };
    refused(&none, &payload, "not lazy: sparse file");
}
