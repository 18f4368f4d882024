// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::io::Write;

use serde_json::json;

use crate::image::document::{OCI_CONFIG, OCI_INDEX, OCI_LAYER_TAR, OCI_MANIFEST};

fn spooled(bytes: &[u8]) -> Arc<File> {
    let mut file = spool::create(&std::env::temp_dir()).unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(file)
}

/// The blobs of a small image, and its manifest.
fn sample(seed: u8) -> (Vec<Vec<u8>>, Document) {
    let blobs: Vec<Vec<u8>> = (0..4)
        .map(|n| vec![seed.wrapping_mul(16) + n; 700 + usize::from(n) * 513])
        .collect();
    let describe = |media_type: &str, blob: &Vec<u8>| {
        Descriptor::new(media_type, BlobDigest::of(blob), blob.len() as u64)
    };
    let layers: Vec<_> = blobs[1..]
        .iter()
        .map(|blob| describe(OCI_LAYER_TAR, blob))
        .collect();
    let config = describe(OCI_CONFIG, &blobs[0]);
    let value =
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
    (blobs, Document::of_value(OCI_MANIFEST, value))
}

async fn put(image: &OciArchiveImage, blob: &[u8]) {
    let bytes = blob.len() as u64;
    let digest = BlobDigest::of(blob);
    let put = image.put_blob(digest, bytes, spooled(blob), &|_| {});
    put.await.unwrap();
}

/// Writes the sample with its blobs in this order.
async fn write(path: &Path, tag: Option<&str>, seed: u8, order: [usize; 4]) -> Document {
    let (blobs, document) = sample(seed);
    let image = OciArchiveImage::create(path, tag).unwrap();
    for n in order {
        put(&image, &blobs[n]).await;
    }
    image.name(&document).await.unwrap();
    document
}

#[tokio::test]
async fn the_bytes_do_not_depend_on_the_order_of_blobs() {
    let directory = tempfile::tempdir().unwrap();
    let mut archives = Vec::new();
    for (n, order) in [[0, 1, 2, 3], [3, 1, 0, 2]].into_iter().enumerate() {
        let path = directory.path().join(format!("{n}.tar"));
        write(&path, Some("v1"), 1, order).await;
        archives.push(std::fs::read(&path).unwrap());
        // Again over itself.
        write(&path, Some("v1"), 1, order).await;
        archives.push(std::fs::read(&path).unwrap());
    }
    assert!(archives.windows(2).all(|pair| pair[0] == pair[1]));
    // An ordinary reader of tars sees what we wrote.
    let mut reader = tar::Archive::new(&archives[0][..]);
    let names: Vec<String> = reader
        .entries()
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            entry.path().unwrap().display().to_string()
        })
        .collect();
    assert_eq!(names[..2], ["oci-layout", "index.json"]);
    assert_eq!(names.len(), 4 + 5, "{names:?}");
}

#[tokio::test]
async fn other_images_of_an_archive_are_kept_and_what_nothing_names_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.tar");
    let first = write(&path, Some("a"), 1, [0, 1, 2, 3]).await;
    let second = write(&path, Some("b"), 2, [0, 1, 2, 3]).await;
    for (tag, document) in [("a", &first), ("b", &second)] {
        let image = OciArchiveImage::open(&path, Some(tag)).unwrap();
        assert_eq!(image.root().await.unwrap().digest, document.digest);
        for layer in document.list("layers").unwrap() {
            assert!(image.has_blob(layer.digest, layer.size).await.unwrap());
        }
    }
    // Another image takes the place of the first, whose blobs nothing names now.
    write(&path, Some("a"), 3, [0, 1, 2, 3]).await;
    let image = OciArchiveImage::open(&path, Some("b")).unwrap();
    for (document, there) in [(&first, false), (&second, true)] {
        for layer in document.list("layers").unwrap() {
            let has = image.has_blob(layer.digest, layer.size).await.unwrap();
            assert_eq!(has, there);
        }
    }
}

#[tokio::test]
async fn a_blob_of_the_old_archive_need_not_come_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.tar");
    write(&path, None, 1, [0, 1, 2, 3]).await;
    let (_, document) = sample(1);
    let index = Document::of_value(
        OCI_INDEX,
        json!({"mediaType": OCI_INDEX, "manifests": [document.descriptor()]}),
    );
    let image = OciArchiveImage::create(&path, None).unwrap();
    image.put_document(&document).await.unwrap();
    image.name(&index).await.unwrap();
    let image = OciArchiveImage::open(&path, None).unwrap();
    assert_eq!(image.root().await.unwrap().digest, index.digest);
    for layer in document.list("layers").unwrap() {
        assert!(image.has_blob(layer.digest, layer.size).await.unwrap());
    }
}

#[tokio::test]
async fn a_damaged_archive_is_not_carried_on_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.tar");
    write(&path, Some("a"), 1, [0, 1, 2, 3]).await;
    let mut bytes = std::fs::read(&path).unwrap();
    let (blobs, _) = sample(1);
    let at = bytes
        .windows(blobs[2].len())
        .position(|part| part == blobs[2])
        .unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let (_, other) = sample(2);
    let image = OciArchiveImage::create(&path, Some("b")).unwrap();
    let error = image.name(&other).await.unwrap_err().to_string();
    let digest = BlobDigest::of(&blobs[2]).to_string();
    assert!(
        error.contains("damaged") && error.contains(&digest),
        "{error}"
    );
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn what_is_no_layout_in_a_tar_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.tar");
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    builder
        .append_data(&mut header, "manifest.json", &b"[]"[..])
        .unwrap();
    let other = builder.into_inner().unwrap();
    for bytes in [&other[..], b"text"] {
        std::fs::write(&path, bytes).unwrap();
        assert!(OciArchiveImage::open(&path, None).is_err());
        assert!(OciArchiveImage::create(&path, None).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
    let missing = directory.path().join("none/x.tar");
    let error = OciArchiveImage::create(&missing, None).unwrap_err();
    assert!(error.to_string().contains("none not found"), "{error}");
}
