// SPDX-License-Identifier: Apache-2.0
//! What every image store promises, checked over all of them.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use futures::StreamExt;
use serde_json::json;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::Extent;

use super::document::{OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST};
use super::memory::MemoryImage;
use super::oci_layout::LayoutImage;
use super::{Descriptor, Document, ImageWriter, read_small};
use crate::spool;

fn spooled(bytes: &[u8]) -> Arc<File> {
    let mut file = spool::create(&std::env::temp_dir()).unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(file)
}

/// The suite. `image` is empty; nothing has its name.
pub(crate) async fn check(image: &dyn ImageWriter) {
    assert!(
        image
            .root()
            .await
            .expect_err("nothing is named")
            .is_not_found()
    );
    let config = br#"{"rootfs":{"diff_ids":[]}}"#.as_slice();
    let layer = vec![7_u8; 300_000];
    let config_digest = BlobDigest::of(config);
    let layer_digest = BlobDigest::of(&layer);

    assert!(!image.has_blob(layer_digest, 300_000).await.unwrap());
    assert!(
        image
            .blob(layer_digest, 300_000)
            .await
            .err()
            .expect("no blob")
            .is_not_found()
    );
    image
        .put_blob(layer_digest, 300_000, spooled(&layer), &|_| {})
        .await
        .unwrap();
    image
        .put_blob(layer_digest, 300_000, spooled(&layer), &|_| {})
        .await
        .expect("twice is fine");
    image
        .put_blob(config_digest, config.len() as u64, spooled(config), &|_| {})
        .await
        .unwrap();
    assert!(image.has_blob(layer_digest, 300_000).await.unwrap());

    let mut body = image.blob(layer_digest, 300_000).await.unwrap();
    let mut read = Vec::new();
    while let Some(part) = body.next().await {
        read.extend_from_slice(&part.unwrap());
    }
    assert_eq!(BlobDigest::of(&read), layer_digest);
    let range = image
        .range(layer_digest, 300_000, Extent::new(10, 20).unwrap())
        .await
        .unwrap();
    assert_eq!(range.as_ref(), [7; 10]);
    assert!(
        image
            .range(
                layer_digest,
                300_000,
                Extent::new(299_999, 300_001).unwrap()
            )
            .await
            .is_err()
    );

    let config_descriptor = Descriptor::new(OCI_CONFIG, config_digest, config.len() as u64);
    assert_eq!(
        read_small(image, &config_descriptor)
            .await
            .unwrap()
            .as_ref(),
        config
    );
    let lie = Descriptor {
        size: 3,
        ..config_descriptor.clone()
    };
    assert!(
        read_small(image, &lie).await.is_err(),
        "a wrong size is refused"
    );

    let document = Document::of_value(
        OCI_MANIFEST,
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config_descriptor,
            "layers": [Descriptor::new(OCI_LAYER_TAR, layer_digest, 300_000)],
        }),
    );
    image.put_document(&document).await.unwrap();
    assert!(
        image
            .root()
            .await
            .expect_err("not named yet")
            .is_not_found()
    );
    let read = image.document(&document.descriptor()).await.unwrap();
    assert_eq!(read.bytes, document.bytes);
    image.name(&document).await.unwrap();
    image.name(&document).await.expect("twice is fine");
    assert_eq!(image.root().await.unwrap().digest, document.digest);
}

#[tokio::test]
async fn memory() {
    check(&MemoryImage::new("memory")).await;
}

#[tokio::test]
async fn oci_layout() {
    let directory = tempfile::tempdir().unwrap();
    for tag in [None, Some("v1"), Some("v2")] {
        // Blobs are shared by all names of a layout, so each starts in its own directory.
        let path = directory.path().join(tag.unwrap_or("none"));
        check(&LayoutImage::create(&path, tag).unwrap()).await;
        let names: Vec<_> = std::fs::read_dir(&path)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names.len(), 3, "no leftovers: {names:?}");
    }
}

#[tokio::test]
async fn a_layout_keeps_its_other_images() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = |n: u32| {
        Document::of_value(
            OCI_MANIFEST,
            json!({"mediaType": OCI_MANIFEST, "layers": [], "n": n}),
        )
    };
    for (tag, n) in [(Some("a"), 1), (Some("b"), 2), (None, 3), (Some("a"), 4)] {
        let image = LayoutImage::create(directory.path(), tag).unwrap();
        image.name(&manifest(n)).await.unwrap();
    }
    use super::ImageReader;
    for (tag, n) in [(Some("a"), 4), (Some("b"), 2), (None, 3)] {
        let image = LayoutImage::open(directory.path(), tag).unwrap();
        assert_eq!(
            image.root().await.unwrap().digest,
            manifest(n).digest,
            "{tag:?}"
        );
    }
    let error = LayoutImage::open(directory.path(), Some("zzz"))
        .unwrap()
        .root()
        .await;
    let error = error.expect_err("no such tag").to_string();
    assert!(
        error.contains("zzz") && error.contains("a") && error.contains("b"),
        "{error}"
    );
    assert!(LayoutImage::open(&directory.path().join("none"), None).is_err());
}

/// A registry of its own, ended by its process id also when the test fails.
struct Registry {
    child: std::process::Child,
    _directory: tempfile::TempDir,
    address: String,
}

impl Registry {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let data = directory.path().join("data");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            data.display()
        );
        let path = directory.path().join("config.yml");
        std::fs::write(&path, config).unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let child = std::process::Command::new("docker-registry")
            .arg("serve")
            .arg(path)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self {
            child,
            _directory: directory,
            address,
        };
        for _ in 0..600 {
            if std::net::TcpStream::connect(&registry.address).is_ok() {
                return registry;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("docker-registry did not start");
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn registry() {
    use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions};
    let registry = Registry::start();
    let client = RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials)).unwrap();
    let reference = format!("{}/contract/image:v1", registry.address)
        .parse()
        .unwrap();
    let image = super::registry::RegistryImage::new(client.clone(), reference);
    check(&image).await;
    // Another repository of the same registry takes blobs without their bytes.
    let reference = format!("{}/other/image:v1", registry.address)
        .parse()
        .unwrap();
    let other = super::registry::RegistryImage::new(client, reference);
    let layer = BlobDigest::of(&vec![7_u8; 300_000]);
    use super::ImageReader;
    assert!(!other.has_blob(layer, 300_000).await.unwrap());
    assert!(
        other
            .mount_blob(layer, &image.repository().unwrap())
            .await
            .unwrap()
    );
    assert!(other.has_blob(layer, 300_000).await.unwrap());
    let absent = BlobDigest::of(b"absent");
    assert!(
        !other
            .mount_blob(absent, &image.repository().unwrap())
            .await
            .unwrap()
    );
}
