// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::io::Write;

use tar::{Builder, EntryType, Header};

fn add(builder: &mut Builder<Vec<u8>>, name: &str, content: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content).unwrap();
}

fn config_of(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers
        .iter()
        .map(|layer| DiffId::of(layer).to_string())
        .collect();
    json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": diff_ids}})
        .to_string()
        .into_bytes()
}

fn written(builder: Builder<Vec<u8>>) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&builder.into_inner().unwrap()).unwrap();
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// What `docker save` of old writes for one image of these layers, the last a link to the first.
fn classic(layers: &[&[u8]], names: &[&str]) -> tempfile::NamedTempFile {
    let mut builder = Builder::new(Vec::new());
    let mut files = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        let file = format!("l{n}/layer.tar");
        if n > 0 && *layer == layers[0] {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Symlink);
            header.set_size(0);
            builder
                .append_link(&mut header, &file, "../l0/layer.tar")
                .unwrap();
        } else {
            add(&mut builder, &file, layer);
        }
        files.push(file);
    }
    add(&mut builder, "c.json", &config_of(layers));
    let manifest = json!([{"Config": "c.json", "RepoTags": names, "Layers": files}]);
    add(
        &mut builder,
        "manifest.json",
        manifest.to_string().as_bytes(),
    );
    written(builder)
}

async fn root_of(
    file: &tempfile::NamedTempFile,
    tag: Option<&str>,
) -> Result<Document, ImageError> {
    DockerArchiveImage::open(file.path(), tag)?.root().await
}

#[tokio::test]
async fn the_classic_form_keeps_config_and_diff_ids() {
    let (one, two) = (vec![1; 70_000], vec![2; 1024]);
    let file = classic(&[&one, &two, &one], &["app:v1", "registry.test/app:v2"]);
    for tag in [
        None,
        Some("app:v1"),
        Some("docker.io/library/app:v1"),
        Some("registry.test/app:v2"),
    ] {
        let root = root_of(&file, tag).await.unwrap();
        let config = root.single("config").unwrap().unwrap();
        assert_eq!(
            config.digest,
            BlobDigest::of(&config_of(&[&one, &two, &one]))
        );
        let digests: Vec<_> = root
            .list("layers")
            .unwrap()
            .iter()
            .map(|layer| (layer.digest, layer.size))
            .collect();
        let of = |layer: &[u8]| (BlobDigest::of(layer), layer.len() as u64);
        assert_eq!(digests, [of(&one), of(&two), of(&one)]);
    }
    let error = root_of(&file, Some("app:v3")).await.unwrap_err();
    assert!(error.is_not_found());
    assert!(error.to_string().contains("app:v1, registry.test/app:v2"));
}

#[tokio::test]
async fn compressed_layers_are_named_by_their_own_digests() {
    let tars = [vec![1; 30_000], vec![2; 30_000]];
    let blobs = [gzip(&tars[0]), zstd::encode_all(&tars[1][..], 1).unwrap()];
    let mut builder = Builder::new(Vec::new());
    add(&mut builder, "a.tar.gz", &blobs[0]);
    add(&mut builder, "b.tar.zst", &blobs[1]);
    let config = config_of(&[&tars[0], &tars[1]]);
    add(&mut builder, "c.json", &config);
    let manifest = br#"[{"Config":"c.json","RepoTags":null,"Layers":["a.tar.gz","b.tar.zst"]}]"#;
    add(&mut builder, "manifest.json", manifest);
    let root = root_of(&written(builder), None).await.unwrap();
    let layers = root.list("layers").unwrap();
    for ((layer, blob), media_type) in layers
        .iter()
        .zip(&blobs)
        .zip([OCI_LAYER_GZIP, OCI_LAYER_ZSTD])
    {
        assert_eq!(layer.digest, BlobDigest::of(blob));
        assert_eq!(layer.media_type, media_type);
    }
}

#[tokio::test]
async fn what_contradicts_itself_is_refused() {
    let layer: &[u8] = &[1; 1024];
    let config = config_of(&[layer]);
    let build = |manifest: &str| {
        let mut builder = Builder::new(Vec::new());
        add(&mut builder, "l.tar", layer);
        add(&mut builder, "c.json", &config);
        add(&mut builder, "manifest.json", manifest.as_bytes());
        written(builder)
    };
    let two = r#"[{"Config":"c.json","RepoTags":["a:1"],"Layers":["l.tar"]},
                  {"Config":"c.json","RepoTags":["b:1"],"Layers":["l.tar"]}]"#;
    let cases = [
        (two, "several images: add one of a:1, b:1"),
        ("[]", "not found"),
        ("{}", "manifest.json"),
        (
            r#"[{"Config":"c.json","Layers":["l.tar","l.tar"]}]"#,
            "2 layers, but the config has 1 diff IDs",
        ),
        (
            r#"[{"Config":"c.json","Layers":["../l.tar"]}]"#,
            "which it lacks",
        ),
        (r#"[{"Config":"d.json","Layers":["l.tar"]}]"#, "\"d.json\""),
        (r#"[{"Config":"l.tar","Layers":["l.tar"]}]"#, "config"),
    ];
    for (manifest, message) in cases {
        let error = root_of(&build(manifest), None).await.unwrap_err();
        assert!(error.to_string().contains(message), "{manifest}: {error}");
    }
    let mut builder = Builder::new(Vec::new());
    add(&mut builder, "other", b"x");
    let error = root_of(&written(builder), None).await.unwrap_err();
    assert!(error.to_string().contains("not an archive of images"));
}

#[tokio::test]
async fn both_forms_are_read_as_every_image_is() {
    let layer = vec![7; 300_000];
    let file = classic(&[&layer], &["app:v1"]);
    let image = DockerArchiveImage::open(file.path(), None).unwrap();
    crate::image::contract::check_reader(&image, &config_of(&[&layer]), &layer).await;

    // Newer Docker: a layout with both descriptions.
    let config = config_of(&[&layer]);
    let describe = |media_type: &str, bytes: &[u8]| {
        Descriptor::new(media_type, BlobDigest::of(bytes), bytes.len() as u64)
    };
    let manifest = Document::of_value(
        OCI_MANIFEST,
        json!({
            "schemaVersion": 2,
            "config": describe(OCI_CONFIG, &config),
            "layers": [describe(OCI_LAYER_TAR, &layer)],
        }),
    );
    let mut entry = manifest.descriptor();
    entry.annotations.insert(
        "io.containerd.image.name".into(),
        "docker.io/library/app:v1".into(),
    );
    let mut builder = Builder::new(Vec::new());
    for bytes in [&config[..], &layer, &manifest.bytes] {
        let name = format!("blobs/sha256/{}", BlobDigest::of(bytes).hex());
        add(&mut builder, &name, bytes);
    }
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    add(&mut builder, "index.json", index.as_bytes());
    add(&mut builder, "manifest.json", b"[]");
    let file = written(builder);
    for tag in [None, Some("app:v1")] {
        let image = DockerArchiveImage::open(file.path(), tag).unwrap();
        assert!(image.label().starts_with("docker-archive:"));
        crate::image::contract::check_reader(&image, &config, &layer).await;
    }
}
