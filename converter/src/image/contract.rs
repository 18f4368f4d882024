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
use super::oci_archive::OciArchiveImage;
use super::oci_layout::LayoutImage;
use super::{Descriptor, Document, ImageReader, ImageWriter, read_small};
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

    check_blobs(image, config, &layer).await;

    let config_descriptor = Descriptor::new(OCI_CONFIG, config_digest, config.len() as u64);
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
    check_reader(image, config, &layer).await;
}

/// What every reader promises of an image with this config and one layer.
pub(crate) async fn check_reader(image: &dyn ImageReader, config: &[u8], layer: &[u8]) {
    let root = image.root().await.unwrap();
    let described = root.single("config").unwrap().unwrap();
    assert_eq!(described.digest, BlobDigest::of(config));
    let layers = root.list("layers").unwrap();
    assert_eq!(layers.len(), 1);
    assert_eq!(
        (layers[0].digest, layers[0].size),
        (BlobDigest::of(layer), layer.len() as u64)
    );
    let again = image.document(&root.descriptor()).await.unwrap();
    assert_eq!(again.bytes, root.bytes);
    let absent = Descriptor::new(OCI_MANIFEST, BlobDigest::of(b"absent"), 6);
    assert!(image.document(&absent).await.unwrap_err().is_not_found());
    check_blobs(image, config, layer).await;
}

async fn check_blobs(image: &dyn ImageReader, config: &[u8], layer: &[u8]) {
    let (digest, bytes) = (BlobDigest::of(layer), layer.len() as u64);
    let mut body = image.blob(digest, bytes).await.unwrap();
    let mut read = Vec::new();
    while let Some(part) = body.next().await {
        read.extend_from_slice(&part.unwrap());
    }
    assert!(read == layer);
    let range = |start, end| image.range(digest, bytes, Extent::new(start, end).unwrap());
    assert_eq!(range(10, 20).await.unwrap().as_ref(), &layer[10..20]);
    assert!(range(bytes - 1, bytes + 1).await.is_err());
    let absent = BlobDigest::of(b"absent");
    assert!(image.blob(absent, 6).await.err().unwrap().is_not_found());

    let descriptor = Descriptor::new(OCI_CONFIG, BlobDigest::of(config), config.len() as u64);
    assert_eq!(read_small(image, &descriptor).await.unwrap(), config);
    let lie = Descriptor {
        size: 3,
        ..descriptor
    };
    assert!(
        read_small(image, &lie).await.is_err(),
        "a wrong size is refused"
    );
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
async fn oci_archive() {
    let directory = tempfile::tempdir().unwrap();
    for tag in [None, Some("v1"), Some("registry.test:5000/app:v2")] {
        let path = directory.path().join("image.tar");
        let open = || OciArchiveImage::open(&path, tag);
        check(&OciArchiveImage::create(&path, tag).unwrap()).await;
        let names = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 1, "no leftovers");
        let config = br#"{"rootfs":{"diff_ids":[]}}"#.as_slice();
        check_reader(&open().unwrap(), config, &[7; 300_000]).await;
        std::fs::remove_file(&path).unwrap();
        assert!(open().unwrap_err().is_not_found());
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

/// A containerd of its own, ended by its process id also when the test fails.
struct OwnContainerd {
    child: std::process::Child,
    directory: tempfile::TempDir,
}

impl OwnContainerd {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        let kept = [
            "io.containerd.content.v1.content",
            "io.containerd.metadata.v1.bolt",
            "io.containerd.gc.v1.scheduler",
            "io.containerd.grpc.v1.content",
            "io.containerd.grpc.v1.images",
            "io.containerd.grpc.v1.leases",
            "io.containerd.grpc.v1.version",
            "io.containerd.service.v1.content-service",
            "io.containerd.service.v1.images-service",
            "io.containerd.service.v1.leases-service",
            "io.containerd.snapshotter.v1.native",
            "io.containerd.event.v1.exchange",
        ];
        let required = kept.map(|plugin| format!("{plugin:?}")).join(", ");
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             required_plugins = [{required}]\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{path}/c.sock\"\n\
             [plugins.\"io.containerd.gc.v1.scheduler\"]\n\
             mutation_threshold = 1\nschedule_delay = \"0ms\"\nstartup_delay = \"1ms\"\n"
        );
        let file = directory.path().join("config.toml");
        std::fs::write(&file, config).unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let child = std::process::Command::new("containerd")
            .arg("--config")
            .arg(file)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd is installed");
        Self { child, directory }
    }

    async fn image(&self, name: &str) -> super::containerd::ContainerdImage {
        use sluice_fetcher::registry::{NoCredentials, RegistryClient, RegistryOptions};
        let store = super::containerd::Store {
            address: self.directory.path().join("c.sock"),
            namespace: "contract".to_owned(),
        };
        let registries =
            RegistryClient::new(RegistryOptions::default(), Arc::new(NoCredentials)).unwrap();
        for _ in 0..600 {
            let image =
                super::containerd::ContainerdImage::new(store.clone(), name, registries.clone());
            match image.root().await {
                Err(e) if !e.is_not_found() => {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                _ => return image,
            }
        }
        let log = std::fs::read_to_string(self.directory.path().join("log"));
        panic!("containerd did not start: {}", log.unwrap_or_default());
    }
}

impl Drop for OwnContainerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn containerd() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: containerd needs root");
        return;
    }
    let containerd = OwnContainerd::start();
    // A name that needs no registry, so that what is absent is asked of nobody.
    let image = containerd.image("CONTRACT").await;
    check(&image).await;
    image.close().await;
    // What the record names survives the lease: this write and the removal of its lease make
    // containerd collect its garbage.
    let other = containerd.image("OTHER").await;
    let lost = b"nothing names it".as_slice();
    let digest = BlobDigest::of(lost);
    let bytes = lost.len() as u64;
    other
        .put_blob(digest, bytes, spooled(lost), &|_| {})
        .await
        .unwrap();
    assert!(other.has_blob(digest, bytes).await.unwrap());
    other.close().await;
    let mut gone = false;
    for _ in 0..200 {
        let reader = containerd.image("OTHER").await;
        gone = reader.blob(digest, bytes).await.is_err();
        if gone {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(gone, "what nothing names is collected");
    let config = br#"{"rootfs":{"diff_ids":[]}}"#.as_slice();
    let reader = containerd.image("CONTRACT").await;
    check_reader(&reader, config, &[7; 300_000]).await;
}
