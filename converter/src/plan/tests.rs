// SPDX-License-Identifier: Apache-2.0
use super::*;
use serde_json::json;
use sluice_blockindex::digest::IndexDigest;
use sluice_blockindex::extent::Extent;

use crate::image::document::{DOCKER_INDEX, DOCKER_MANIFEST, OCI_LAYER_GZIP};

const USUAL: Recipe = Recipe {
    format: LayerFormat::Sluice,
    level: 6,
    chunk_bytes: 128 * 1024,
};

const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

fn config(diff_ids: &[DiffId]) -> String {
    let ids: Vec<String> = diff_ids.iter().map(DiffId::to_string).collect();
    json!({"architecture": "arm64", "os": "linux", "variant": "v8", "rootfs": {"type": "layers", "diff_ids": ids}})
        .to_string()
}

fn manifest(media_type: &str, config: &str, layers: &[Descriptor]) -> Document {
    let config_type = if media_type == DOCKER_MANIFEST {
        DOCKER_CONFIG
    } else {
        OCI_CONFIG
    };
    let config = Descriptor::new(
        config_type,
        BlobDigest::of(config.as_bytes()),
        config.len() as u64,
    );
    let value = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers, "annotations": {"z": "1", "a": "2"}});
    Document::of_value(media_type, value)
}

fn lazy(plan: &ImagePlan, layer: &PlannedLayer) -> Outcome {
    Outcome::Lazy(LayerAnnotations {
        index_extent: Extent::new(10, 20).unwrap(),
        index_digest: IndexDigest::of(b"i"),
        blob: BlobDigest::of(b"new"),
        blob_bytes: 100,
        diff_id: layer.diff_id,
        config: plan.config_digest,
        port: None,
        boot: Vec::new(),
    })
}

fn planned(media_type: &str, layer: Descriptor) -> ImagePlan {
    let config = config(&[DiffId::of(b"tar")]);
    plan_image(manifest(media_type, &config, &[layer]), config.as_bytes()).unwrap()
}

#[test]
fn docker_manifests_become_oci_and_keep_what_is_not_ours() {
    let mut layer = Descriptor::new(DOCKER_LAYER, BlobDigest::of(b"old"), 3);
    layer.annotations.insert("keep".into(), "me".into());
    layer.annotations.insert(
        "containerd.io/snapshot/stargz/toc.digest".into(),
        "stale".into(),
    );
    layer.other.insert("data".into(), "b2xk".into());
    let plan = planned(DOCKER_MANIFEST, layer);
    assert_eq!(plan.platform.to_string(), "linux/arm64/v8");
    let outcome = lazy(&plan, &plan.layers[0]);
    let document = finish_image(&plan, std::slice::from_ref(&outcome), Finish::default());
    assert_eq!(document.media_type, OCI_MANIFEST);
    assert_eq!(document.value["mediaType"], OCI_MANIFEST);
    assert_eq!(document.value["annotations"], json!({"z": "1", "a": "2"}));
    let config = document.single("config").unwrap().unwrap();
    assert_eq!(
        (config.media_type.as_str(), config.digest),
        (OCI_CONFIG, plan.config.digest)
    );
    let layers = document.list("layers").unwrap();
    let [layer] = layers.as_slice() else {
        panic!("one layer")
    };
    assert_eq!(
        (layer.media_type.as_str(), layer.size),
        (OCI_LAYER_ZSTD, 100)
    );
    assert_eq!(layer.annotations["keep"], "me");
    assert_eq!(
        layer.annotations[SOURCE],
        BlobDigest::of(b"old").to_string()
    );
    assert!(
        !layer
            .annotations
            .contains_key("containerd.io/snapshot/stargz/toc.digest")
    );
    assert!(!layer.other.contains_key("data"));
    assert!(
        layer
            .annotations
            .iter()
            .all(|(k, v)| k.len() < 4096 && v.len() < 4096)
    );
    // The same once more gives the same bytes.
    assert_eq!(
        finish_image(&plan, &[outcome], Finish::default()).bytes,
        document.bytes
    );
}

#[test]
fn a_converted_image_is_recognised_and_kept_to_the_byte() {
    let plan = planned(
        OCI_MANIFEST,
        Descriptor::new(OCI_LAYER_GZIP, BlobDigest::of(b"old"), 3),
    );
    let outcome = lazy(&plan, &plan.layers[0]);
    let converted = finish_image(&plan, &[outcome], Finish::default());
    let config = config(&[DiffId::of(b"tar")]);
    let again = plan_image(converted.clone(), config.as_bytes()).unwrap();
    let Action::Copy(outcome) = &again.layers[0].action else {
        panic!("copied")
    };
    assert!(is_converted(&again));
    let outcome = outcome.clone();
    assert_eq!(
        finish_image(&again, &[outcome], Finish::default()).bytes,
        converted.bytes
    );

    let mut reusable = Reusable::default();
    reusable.add(&converted);
    let found = reusable.find(&plan.layers[0], &plan);
    assert!(matches!(found, Some(Outcome::Lazy(found)) if found.blob == BlobDigest::of(b"new")));
    let other = PlannedLayer {
        diff_id: DiffId::of(b"another"),
        ..plan.layers[0].clone()
    };
    assert_eq!(reusable.find(&other, &plan), None, "the diff ID counts too");
}

#[test]
fn annotations_of_another_blob_are_not_believed() {
    let plan = planned(
        OCI_MANIFEST,
        Descriptor::new(OCI_LAYER_GZIP, BlobDigest::of(b"old"), 3),
    );
    let outcome = lazy(&plan, &plan.layers[0]);
    let mut layer = finish_layer(&plan.layers[0], &outcome, Finish::default());
    layer.digest = BlobDigest::of(b"replaced by some tool");
    let again = planned(OCI_MANIFEST, layer);
    assert_eq!(again.layers[0].action, Action::Convert);
}

#[test]
fn layers_that_are_not_lazy_keep_their_reason_and_are_found_again() {
    let plan = planned(
        DOCKER_MANIFEST,
        Descriptor::new(DOCKER_LAYER, BlobDigest::of(b"old"), 3),
    );
    let outcome = Outcome::NotLazy {
        reason: "sparse file x".into(),
        media_type: OCI_LAYER_ZSTD.into(),
        blob: BlobDigest::of(b"plain"),
        blob_bytes: 9,
    };
    let document = finish_image(&plan, std::slice::from_ref(&outcome), Finish::default());
    let mut reusable = Reusable::default();
    reusable.add(&document);
    assert_eq!(reusable.find(&plan.layers[0], &plan), Some(outcome));
    let config = config(&[DiffId::of(b"tar")]);
    let again = plan_image(document, config.as_bytes()).unwrap();
    assert!(is_converted(&again));
}

#[test]
fn foreign_and_encrypted_layers_stay() {
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let mut layer = Descriptor::new(foreign, BlobDigest::of(b"w"), 1);
    layer
        .other
        .insert("urls".into(), json!(["https://example.test/x"]));
    let plan = planned(DOCKER_MANIFEST, layer);
    assert_eq!(plan.layers[0].action, Action::Foreign);
    let layer = finish_layer(&plan.layers[0], &Outcome::Foreign, Finish::default());
    assert!(layer.is_foreign() && layer.media_type.contains("nondistributable"));
    assert_eq!(layer.other["urls"], json!(["https://example.test/x"]));
    assert!(layer.annotations.is_empty());

    let encrypted = format!("{OCI_LAYER_GZIP}+encrypted");
    let plan = planned(
        OCI_MANIFEST,
        Descriptor::new(&encrypted, BlobDigest::of(b"e"), 1),
    );
    assert!(
        matches!(&plan.layers[0].action, Action::Copy(Outcome::NotLazy { reason, .. }) if reason.contains("encrypted"))
    );
}

#[test]
fn a_config_that_does_not_fit_is_refused() {
    let layer = Descriptor::new(DOCKER_LAYER, BlobDigest::of(b"old"), 3);
    let one = config(&[DiffId::of(b"tar")]);
    let cases = [
        (config(&[]), "1 layers, but config"),
        ("{}".to_owned(), "rootfs"),
        (one.replace("sha256:", "md5:"), "diff ID"),
        ("[".to_owned(), "config sha256:"),
    ];
    for (config, message) in cases {
        let document = manifest(DOCKER_MANIFEST, &config, std::slice::from_ref(&layer));
        let error = plan_image(document, config.as_bytes())
            .expect_err(message)
            .to_string();
        assert!(error.contains(message), "{error}");
    }
}

fn entry(platform: &str, bytes: &[u8]) -> Descriptor {
    let mut entry = Descriptor::new(OCI_MANIFEST, BlobDigest::of(bytes), 1);
    entry.platform = Some(Platform::parse(platform).unwrap());
    entry
}

#[test]
fn selection_keeps_order_and_the_attestations_of_what_is_kept() {
    let mut attestation = entry("unknown/unknown", b"att-arm");
    let attested = BlobDigest::of(b"arm").to_string();
    attestation.annotations.insert(ATTESTED.into(), attested);
    let entries = [
        entry("linux/amd64", b"amd"),
        entry("linux/arm64/v8", b"arm"),
        attestation,
    ];
    let digests = |asked: &[&str]| -> Result<Vec<BlobDigest>, String> {
        let asked: Vec<Platform> = asked.iter().map(|p| Platform::parse(p).unwrap()).collect();
        let kept = select("img", &entries, &asked).map_err(|e| e.to_string())?;
        Ok(kept.iter().map(|entry| entry.digest).collect())
    };
    let (amd, arm, att) = (
        BlobDigest::of(b"amd"),
        BlobDigest::of(b"arm"),
        BlobDigest::of(b"att-arm"),
    );
    assert_eq!(digests(&[]), Ok(vec![amd, arm, att]));
    assert_eq!(digests(&["linux/amd64"]), Ok(vec![amd]));
    assert_eq!(digests(&["linux/arm64"]), Ok(vec![arm, att]));
    let error = digests(&["linux/amd64", "linux/s390x"]).expect_err("no s390x");
    assert_eq!(
        error,
        "platform linux/s390x is not in img; it has linux/amd64, linux/arm64/v8"
    );
    assert!(digests(&["unknown/unknown"]).is_err());
}

#[test]
fn an_index_changes_only_where_its_manifests_do() {
    let entries = vec![entry("linux/amd64", b"a"), entry("linux/arm64", b"b")];
    let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries, "x": 1});
    let source = Document::of_value(OCI_INDEX, value.clone());
    let same: Vec<_> = entries.iter().map(|e| (e.clone(), e.clone())).collect();
    assert_eq!(finish_index(&source, &same).bytes, source.bytes);
    let new = Descriptor::new(OCI_MANIFEST, BlobDigest::of(b"new"), 7);
    let changed = [(entries[0].clone(), new.clone()), same[1].clone()];
    let index = finish_index(&source, &changed);
    assert_eq!(index.value["x"], 1);
    let list = index.list("manifests").unwrap();
    assert_eq!((list[0].digest, list[0].size), (new.digest, 7));
    assert_eq!(list[0].platform, entries[0].platform);
    assert_eq!(list[1], entries[1]);

    let mut docker = value;
    docker["mediaType"] = DOCKER_INDEX.into();
    let docker = Document::of_value(DOCKER_INDEX, docker);
    assert_eq!(finish_index(&docker, &same).media_type, OCI_INDEX);
}

#[test]
fn artifacts_are_not_images() {
    let config = "{}";
    let image = manifest(
        OCI_MANIFEST,
        config,
        &[Descriptor::new(OCI_LAYER_GZIP, BlobDigest::of(b"l"), 1)],
    );
    assert!(is_image(&image));
    let attestation = manifest(
        OCI_MANIFEST,
        config,
        &[Descriptor::new(
            "application/vnd.in-toto+json",
            BlobDigest::of(b"l"),
            1,
        )],
    );
    assert!(!is_image(&attestation));
    let mut value = image.value.clone();
    value["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
    assert!(!is_image(&Document::of_value(OCI_MANIFEST, value)));
}

#[test]
fn a_recipe_names_what_is_not_as_usual() {
    assert_eq!(Recipe::default(), USUAL);
    let other = Recipe {
        format: LayerFormat::Sluice,
        level: 19,
        chunk_bytes: 65_536,
    };
    let level = Recipe {
        level: 1,
        ..Recipe::default()
    };
    for (recipe, text) in [
        (USUAL, "3"),
        (level, "3;level=1"),
        (other, "3;level=19;chunk=65536"),
    ] {
        assert_eq!(recipe.to_string(), text);
    }
    let layer = Descriptor::new(DOCKER_LAYER, BlobDigest::of(b"layer"), 5);
    let plan = planned(DOCKER_MANIFEST, layer);
    let outcome = lazy(&plan, &plan.layers[0]);
    let finish = Finish {
        recipe: other,
        ..Finish::default()
    };
    let made = finish_image(&plan, std::slice::from_ref(&outcome), finish);
    let layer = made.list("layers").unwrap().remove(0);
    for (recipe, same) in [(other, true), (USUAL, false), (level, false)] {
        assert_eq!(recipe.made(&layer), same, "{recipe}");
        let mut reusable = Reusable::new(recipe);
        reusable.add(&made);
        let found = reusable.find(&plan.layers[0], &plan);
        assert_eq!(found.is_some(), same, "{recipe}");
    }
}
