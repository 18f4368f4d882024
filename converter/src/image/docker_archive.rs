// SPDX-License-Identifier: Apache-2.0
//! What `docker save` writes, read without unpacking it.
//!
//! There are two forms. Docker with its containerd store, nerdctl and buildx write an OCI layout with a
//! `manifest.json` beside it for older readers: that is read as the layout it is. The classic form has
//! only `manifest.json`, which lists for each image the file of its config and the files of its
//! layers, uncompressed. Of that a manifest is made: the config is named by its digest as ever, and the
//! digest of an uncompressed layer is its diff ID, so nothing is read for it. Some tools put
//! compressed layers there; those are read once to learn their digests.
//!
//! Nothing that the archive says is trusted: a layer that is not what its diff ID says is found out by
//! whoever streams it, as with any other source.
//!
//! It cannot be written: layers of such an archive are uncompressed, so a converted image would lose
//! what makes it lazy.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use sluice_blockindex::digest::{BlobDigest, DiffId, Sha256Hasher};
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::sync::OnceCell;

use super::archive::{Archive, beyond, compression, within};
use super::document::{OCI_CONFIG, OCI_LAYER_GZIP, OCI_LAYER_TAR, OCI_LAYER_ZSTD, OCI_MANIFEST};
use super::file_body::{FileExtent, blocking, body, read};
use super::layout_index::is_same_reference;
use super::oci_archive::OciArchiveImage;
use super::{
    BlobBody, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageError, ImageReader, Location,
};

/// Bytes hashed at a time.
const HASH_BYTES: u64 = 1024 * 1024;
/// The most images of an archive, and layers of an image: far more than anybody saves, and a bound
/// for what `manifest.json` can have us do.
const LIST_MAX: usize = 4096;

/// One image of such an archive.
#[derive(Debug)]
pub struct DockerArchiveImage {
    form: Form,
}

#[derive(Debug)]
enum Form {
    Layout(OciArchiveImage),
    Classic(Classic),
}

/// An entry of `manifest.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Debug)]
struct Classic {
    archive: Arc<Archive>,
    saved: Saved,
    label: String,
    contents: OnceCell<Contents>,
}

/// What the archive's image is made of.
#[derive(Debug)]
struct Contents {
    manifest: Document,
    blobs: BTreeMap<BlobDigest, FileExtent>,
}

impl DockerArchiveImage {
    /// An image that exists. Blocks while the headers are read.
    ///
    /// **Errors**: `NotFound` with the names that there are; `Invalid` for what is no such archive, or
    /// is refused, and where several images could be meant.
    pub fn open(path: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let location = Location::DockerArchive {
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
        };
        let archive = Archive::open(path)?;
        let form = match archive.contains("index.json") {
            true => Form::Layout(OciArchiveImage::labelled(archive, tag, &location)?),
            false => Form::Classic(Classic::of(archive, tag, location.to_string())?),
        };
        Ok(Self { form })
    }
}

impl Classic {
    fn of(archive: Archive, tag: Option<&str>, label: String) -> Result<Self, ImageError> {
        let invalid = |reason: String| ImageError::Invalid {
            what: label.clone(),
            reason,
        };
        if !archive.contains("manifest.json") {
            let reason = "neither manifest.json nor index.json in it: not an archive of images";
            return Err(invalid(reason.to_owned()));
        }
        let bytes = archive.read_small("manifest.json", DOCUMENT_MAX_BYTES)?;
        let images: Vec<Saved> =
            serde_json::from_slice(&bytes).map_err(|e| invalid(format!("manifest.json: {e}")))?;
        if images.len() > LIST_MAX || images.iter().any(|image| image.layers.len() > LIST_MAX) {
            return Err(invalid(format!(
                "manifest.json: a list of more than {LIST_MAX}"
            )));
        }
        let names = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
        let known = || images.iter().flat_map(names).collect::<Vec<_>>().join(", ");
        let wanted = |image: &&Saved| {
            tag.is_none_or(|tag| names(image).iter().any(|name| is_same_reference(name, tag)))
        };
        let saved = match images.iter().filter(wanted).collect::<Vec<_>>().as_slice() {
            [image] => (*image).clone(),
            [] => {
                return Err(ImageError::NotFound {
                    what: format!("{label} (images there: {})", known()),
                });
            }
            _ => return Err(invalid(format!("several images: add one of {}", known()))),
        };
        Ok(Self {
            archive: Arc::new(archive),
            saved,
            label,
            contents: OnceCell::new(),
        })
    }

    async fn contents(&self) -> Result<&Contents, ImageError> {
        self.contents
            .get_or_try_init(async || {
                let (archive, saved) = (Arc::clone(&self.archive), self.saved.clone());
                let label = self.label.clone();
                blocking(move || Contents::of(&archive, &saved, &label)).await
            })
            .await
    }

    async fn find(&self, digest: BlobDigest) -> Result<FileExtent, ImageError> {
        let found = self.contents().await?.blobs.get(&digest).copied();
        found.ok_or_else(|| ImageError::NotFound {
            what: format!("blob {digest} in {}", self.label),
        })
    }
}

#[derive(Debug, Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl Contents {
    /// Makes the manifest that the archive has not. Blocks while compressed layers are read.
    fn of(archive: &Archive, saved: &Saved, label: &str) -> Result<Self, ImageError> {
        let invalid = |reason: String| ImageError::Invalid {
            what: label.to_owned(),
            reason,
        };
        let lost = |name: &String| invalid(format!("manifest.json names {name:?}, which it lacks"));
        let place = archive
            .find(&saved.config)
            .ok_or_else(|| lost(&saved.config))?;
        let config = archive.read_small(&saved.config, DOCUMENT_MAX_BYTES)?;
        let parsed: Config = serde_json::from_slice(&config)
            .map_err(|e| invalid(format!("config {:?}: {e}", saved.config)))?;
        let diff_ids = parsed.rootfs.diff_ids;
        if diff_ids.len() != saved.layers.len() {
            return Err(invalid(format!(
                "{} layers, but the config has {} diff IDs",
                saved.layers.len(),
                diff_ids.len()
            )));
        }
        let digest = BlobDigest::of(&config);
        let mut blobs = BTreeMap::from([(digest, place)]);
        let config = Descriptor::new(OCI_CONFIG, digest, config.len() as u64);
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (name, diff_id) in saved.layers.iter().zip(diff_ids) {
            let diff_id: DiffId = diff_id
                .parse()
                .map_err(|e| invalid(format!("diff ID {diff_id:?}: {e}")))?;
            let place = archive.find(name).ok_or_else(|| lost(name))?;
            let layer = describe(archive, place, diff_id)
                .map_err(|e| ImageError::failed("read", format!("{name} in {label}"), e))?;
            // One diff ID by two files is one layer; a file that is another is found out when read.
            blobs.entry(layer.digest).or_insert(place);
            layers.push(layer);
        }
        let value = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config,
            "layers": layers,
        });
        let manifest = Document::of_value(OCI_MANIFEST, value);
        Ok(Self { manifest, blobs })
    }
}

/// The descriptor of a layer's file.
fn describe(archive: &Archive, place: FileExtent, diff_id: DiffId) -> io::Result<Descriptor> {
    let first = Extent::from_length(place.start(), place.len().min(6));
    let first = read(archive.file(), first.ok_or(io::ErrorKind::InvalidData)?)?;
    let media_type = match compression(&first) {
        None => {
            let digest = BlobDigest::from_bytes(*diff_id.as_bytes());
            return Ok(Descriptor::new(OCI_LAYER_TAR, digest, place.len()));
        }
        Some("zstd") => OCI_LAYER_ZSTD,
        // What is not gzip either is refused by who decompresses it.
        Some(_) => OCI_LAYER_GZIP,
    };
    let mut hasher = Sha256Hasher::new();
    let mut start = place.start();
    while start < place.end() {
        let end = place.end().min(start + HASH_BYTES);
        let part = Extent::new(start, end).ok_or(io::ErrorKind::InvalidData)?;
        hasher.update(&read(archive.file(), part)?);
        start = end;
    }
    let digest = BlobDigest::from_bytes(hasher.finish());
    Ok(Descriptor::new(media_type, digest, place.len()))
}

#[async_trait]
impl ImageReader for Classic {
    fn label(&self) -> &str {
        &self.label
    }

    async fn root(&self) -> Result<Document, ImageError> {
        Ok(self.contents().await?.manifest.clone())
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        let manifest = &self.contents().await?.manifest;
        let what = format!("manifest {} in {}", descriptor.digest, self.label);
        match manifest.digest == descriptor.digest {
            true => Document::verified(&what, descriptor, manifest.bytes.clone()),
            false => Err(ImageError::NotFound { what }),
        }
    }

    async fn blob(&self, digest: BlobDigest, _bytes: u64) -> Result<BlobBody, ImageError> {
        let extent = self.find(digest).await?;
        let what = format!("blob {digest} in {}", self.label);
        Ok(body(Arc::clone(self.archive.file()), extent, what))
    }

    async fn range(
        &self,
        digest: BlobDigest,
        _blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        let place = self.find(digest).await?;
        let what = format!("blob {digest} in {}", self.label);
        let file = Arc::clone(self.archive.file());
        blocking(move || {
            let part = within(place, extent).ok_or_else(beyond);
            let bytes = part.and_then(|part| read(&file, part));
            bytes.map_err(|e| ImageError::failed("read", what, e))
        })
        .await
    }
}

impl DockerArchiveImage {
    fn reader(&self) -> &dyn ImageReader {
        match &self.form {
            Form::Layout(image) => image,
            Form::Classic(image) => image,
        }
    }
}

#[async_trait]
impl ImageReader for DockerArchiveImage {
    fn label(&self) -> &str {
        self.reader().label()
    }

    async fn root(&self) -> Result<Document, ImageError> {
        self.reader().root().await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        self.reader().document(descriptor).await
    }

    async fn blob(&self, digest: BlobDigest, bytes: u64) -> Result<BlobBody, ImageError> {
        self.reader().blob(digest, bytes).await
    }

    async fn range(
        &self,
        digest: BlobDigest,
        blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        self.reader().range(digest, blob_bytes, extent).await
    }
}

#[cfg(test)]
mod tests;
