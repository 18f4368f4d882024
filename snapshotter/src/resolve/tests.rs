// SPDX-License-Identifier: Apache-2.0
//! Resolution over the twin in memory.

use super::*;
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};
use sluice_blockindex::extent::Extent;

const NS: &str = "default";

fn config_bytes(diff_ids: &[DiffId]) -> Vec<u8> {
    let ids: Vec<String> = diff_ids.iter().map(ToString::to_string).collect();
    serde_json::to_vec(&serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ids},
    }))
    .unwrap()
}

fn layer(name: &str, diff_id: DiffId, config: Option<ConfigDigest>) -> serde_json::Value {
    let blob = BlobDigest::of(name.as_bytes());
    let annotations = config.map(|config| {
        LayerAnnotations {
            index_extent: Extent::new(10, 20).unwrap(),
            index_digest: IndexDigest::of(name.as_bytes()),
            blob,
            blob_bytes: 100,
            diff_id,
            config,
            port: Some(5000),
            boot: Vec::new(),
        }
        .to_map()
    });
    serde_json::json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
        "digest": blob.to_string(), "size": 100, "annotations": annotations.unwrap_or_default(),
    })
}

fn manifest(config: &str, layers: Vec<serde_json::Value>) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 1},
        "layers": layers,
    }))
    .unwrap()
}

fn source(host: &str) -> String {
    format!("{SOURCE_LABEL_PREFIX}{host}")
}

/// An original and a converted image of two layers that share a config.
struct Images {
    content: MemoryContent,
    config: ConfigDigest,
    diff_ids: Vec<DiffId>,
    converted: String,
}

fn images() -> Images {
    let content = MemoryContent::default();
    let diff_ids = vec![DiffId::of(b"0"), DiffId::of(b"1")];
    let host = source("h:5000");
    let digest = content.put(NS, config_bytes(&diff_ids), &[(&host, "a/plain,a/lazy")]);
    let config: ConfigDigest = digest.parse().unwrap();
    let plain = vec![
        layer("p0", diff_ids[0], None),
        layer("p1", diff_ids[1], None),
    ];
    let label = (CONFIG_LABEL, digest.as_str());
    content.put(NS, manifest(&digest, plain), &[label, (&host, "a/plain")]);
    let lazy = vec![
        layer("l0", diff_ids[0], Some(config)),
        layer("l1", diff_ids[1], Some(config)),
    ];
    let other = source("mirror.example");
    let converted = content.put(NS, manifest(&digest, lazy), &[label, (&other, "b")]);
    Images {
        content,
        config,
        diff_ids,
        converted,
    }
}

#[tokio::test]
async fn the_lazy_manifest_comes_first_and_all_repositories_are_known() {
    let images = images();
    let image = resolve_image(&images.content, NS, images.config)
        .await
        .unwrap();
    assert_eq!(image.manifests.len(), 2);
    assert_eq!(image.manifests[0].digest.to_string(), images.converted);
    assert_eq!(image.diff_ids, images.diff_ids);
    assert_eq!(image.chain_ids[0], ChainId::child(None, images.diff_ids[0]));
    assert_eq!(
        image.chain_ids[1],
        ChainId::child(Some(image.chain_ids[0]), images.diff_ids[1])
    );
    let places: Vec<String> = image.repositories.iter().map(ToString::to_string).collect();
    assert_eq!(
        places,
        ["h:5000/a/lazy", "h:5000/a/plain", "mirror.example/b"]
    );
    assert_eq!(
        port_hints(&image.manifests[0].manifest),
        BTreeSet::from([5000])
    );
}

#[tokio::test]
async fn a_manifest_is_found_by_the_labels_of_who_built_it() {
    let content = MemoryContent::default();
    let diff_ids = vec![DiffId::of(b"0")];
    let digest = content.put(NS, config_bytes(&diff_ids), &[]);
    let layers = || vec![layer("l", diff_ids[0], None)];
    // The first of another's numbered contents may be anything.
    let number = ("containerd.io/gc.ref.content.0", digest.as_str());
    content.put(NS, "not a manifest", &[number]);
    let config: ConfigDigest = digest.parse().unwrap();
    assert!(resolve_image(&content, NS, config).await.is_err());
    let built = content.put(NS, manifest(&digest, layers()), &[number]);
    let image = resolve_image(&content, NS, config).await.unwrap();
    assert_eq!(image.manifests[0].digest.to_string(), built);
}

#[tokio::test]
async fn namespaces_do_not_see_each_other() {
    let images = images();
    let error = resolve_image(&images.content, "other", images.config)
        .await
        .unwrap_err();
    assert!(matches!(error, ResolveError::NoManifest(_)), "{error}");
}

#[tokio::test]
async fn corrupt_content_and_a_dead_containerd_are_errors() {
    let images = images();
    images.content.corrupt(NS, &images.config.to_string());
    let error = resolve_image(&images.content, NS, images.config)
        .await
        .unwrap_err();
    assert!(
        matches!(error, ResolveError::Content(ContentError::Corrupt { .. })),
        "{error}"
    );
    images.content.kill();
    let error = resolve_image(&images.content, NS, images.config)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            ResolveError::Content(ContentError::Unavailable { .. })
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_manifest_with_another_number_of_layers_is_passed_over() {
    let images = images();
    let digest = images.config.to_string();
    let one = vec![layer("x", images.diff_ids[0], Some(images.config)); 3];
    images
        .content
        .put(NS, manifest(&digest, one), &[(CONFIG_LABEL, &digest)]);
    images
        .content
        .put(NS, "not a manifest", &[(CONFIG_LABEL, &digest)]);
    let image = resolve_image(&images.content, NS, images.config)
        .await
        .unwrap();
    assert_eq!(image.manifests.len(), 2);
}

#[tokio::test]
async fn a_layer_that_says_nothing_is_found_by_its_chain() {
    let images = images();
    let chain = ChainId::child(None, images.diff_ids[0]);
    let now = SystemTime::now();
    let image = resolve_by_chain(&images.content, NS, chain, now, false)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(image.config, images.config);
    let stranger = ChainId::child(None, DiffId::of(b"stranger"));
    assert!(
        resolve_by_chain(&images.content, NS, stranger, now, false)
            .await
            .unwrap()
            .is_none()
    );
    let later = now + RECENT * 2;
    assert!(
        resolve_by_chain(&images.content, NS, chain, later, false)
            .await
            .unwrap()
            .is_none()
    );
}

#[test]
fn documents_are_parsed_or_refused() {
    assert!(Manifest::parse(b"{}").is_err());
    assert!(Config::parse(br#"{"rootfs":{"diff_ids":["md5:00"]}}"#).is_err());
    assert_eq!(Config::parse(br#"{"rootfs":{}}"#).unwrap().diff_ids, []);
    let labels = BTreeMap::from([
        (source(""), "x".to_owned()),
        (source("h"), " ,a, b".to_owned()),
        ("other".to_owned(), "c".to_owned()),
    ]);
    let all: Vec<String> = repositories_of(&labels)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(all, ["h/a", "h/b"]);
}

#[test]
fn ipv6_addresses_get_their_brackets_back() {
    for (host, want) in [
        ("h", "h"),
        ("h:5000", "h:5000"),
        ("::1", "[::1]"),
        ("[::1]:5", "[::1]:5"),
    ] {
        assert_eq!(bracketed(host), want);
    }
}

#[tokio::test]
async fn one_bad_manifest_does_not_hide_the_good_ones() {
    let images = images();
    let config = images.config.to_string();
    let label = (CONFIG_LABEL, config.as_str());
    let bad = images.content.put(NS, &b"{}"[..], &[label]);
    images.content.corrupt(NS, &bad);
    let image = resolve_image(&images.content, NS, images.config)
        .await
        .unwrap();
    assert_eq!(image.manifests.len(), 2);
    assert_eq!(image.manifests[0].digest.to_string(), images.converted);
    let chain = chain_ids(&images.diff_ids)[0];
    let found = resolve_by_chain(&images.content, NS, chain, SystemTime::now(), false).await;
    assert_eq!(found.unwrap().unwrap().config, images.config);
}
