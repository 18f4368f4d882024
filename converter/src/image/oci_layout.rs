// SPDX-License-Identifier: Apache-2.0
//! OCI image layouts: a directory with `oci-layout`, `index.json` and `blobs/sha256/*`.
//!
//! Writers take a lock on the directory while they change `index.json`, and replace files by rename,
//! so that readers and concurrent writers see whole files only. Blobs come first, the name last. A
//! crash can leave blobs that nothing names (other tools collect them), never a name without blobs.
//! A directory that is not there is made with the first blob, so that a conversion that is refused
//! leaves nothing behind.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::file_body::blocking;
use super::layout_index::LayoutIndex;
use super::{
    BlobBody, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageError, ImageReader, ImageWriter,
};
use crate::spool;

/// Bytes read from a blob file at a time: as large as a network read, small against any layer.
const READ_BYTES: usize = 256 * 1024;

/// One image in a layout directory.
#[derive(Debug)]
pub struct LayoutImage {
    directory: PathBuf,
    /// Of a layout to be written: the directory, or the nearest one above it that exists.
    spool_directory: Option<PathBuf>,
    tag: Option<String>,
    label: String,
}

impl LayoutImage {
    /// An image that exists. **Errors**: `NotFound` if the directory is not a layout.
    pub fn open(directory: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let image = Self::at(directory, tag);
        match directory.join("index.json").is_file() {
            true => Ok(image),
            false => Err(ImageError::NotFound {
                what: format!("OCI layout {}", directory.display()),
            }),
        }
    }

    /// An image that is to be written; its directory may be missing.
    ///
    /// **Errors**: there is something that is no directory.
    pub fn create(directory: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let mut image = Self::at(directory, tag);
        if directory.exists() && !directory.is_dir() {
            let what = directory.display();
            return Err(ImageError::failed(
                "make OCI layout",
                what,
                "not a directory",
            ));
        }
        // A missing directory will be on the same file system.
        let there = directory.ancestors().find(|path| path.is_dir());
        image.spool_directory = Some(there.unwrap_or(Path::new(".")).to_owned());
        Ok(image)
    }

    /// Makes what is missing of the directory.
    fn make(&self) -> Result<(), ImageError> {
        let failed =
            |e: io::Error| ImageError::failed("make OCI layout", self.directory.display(), e);
        fs::create_dir_all(self.directory.join("blobs/sha256")).map_err(failed)?;
        let marker = self.directory.join("oci-layout");
        if !marker.exists() {
            replace(&marker, br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(failed)?;
        }
        Ok(())
    }

    fn at(directory: &Path, tag: Option<&str>) -> Self {
        let tag = tag.map(str::to_owned);
        let location = super::Location::Layout {
            path: directory.to_owned(),
            tag: tag.clone(),
        };
        Self {
            directory: directory.to_owned(),
            spool_directory: None,
            tag,
            label: location.to_string(),
        }
    }

    fn blob_path(&self, digest: BlobDigest) -> PathBuf {
        self.directory.join("blobs/sha256").join(digest.hex())
    }

    fn open_blob(&self, digest: BlobDigest) -> Result<File, ImageError> {
        File::open(self.blob_path(digest)).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => self.blob_not_found(digest),
            _ => ImageError::failed("open blob", digest, e),
        })
    }

    fn blob_not_found(&self, digest: BlobDigest) -> ImageError {
        ImageError::NotFound {
            what: format!("blob {digest} in {}", self.label),
        }
    }

    /// `index.json`, or an empty index where there is none yet.
    fn index(&self) -> Result<LayoutIndex, ImageError> {
        let path = self.directory.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => LayoutIndex::parse(&path.display().to_string(), &bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(LayoutIndex::empty()),
            Err(e) => Err(ImageError::failed("read", path.display(), e)),
        }
    }

    /// Puts `descriptor` into `index.json` in place of what had this name.
    fn name_blocking(&self, descriptor: Descriptor) -> io::Result<()> {
        let lock = File::open(&self.directory)?;
        lock.lock()?;
        let mut index = self.index().map_err(io::Error::other)?;
        index.put(descriptor, self.tag.as_deref());
        replace(&self.directory.join("index.json"), &index.to_bytes())
    }
}

/// Writes a file whole or not at all: temporary name, fsync, rename, fsync of the directory.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(mode)?;
    file.persist(path).map_err(|e| e.error)?;
    File::open(directory)?.sync_all()
}

#[async_trait]
impl ImageReader for LayoutImage {
    fn label(&self) -> &str {
        &self.label
    }

    async fn root(&self) -> Result<Document, ImageError> {
        let entry = self.index()?.entry(&self.label, self.tag.as_deref())?;
        self.document(&entry).await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        let what = format!("manifest {} in {}", descriptor.digest, self.label);
        let mut bytes = Vec::new();
        let file = self.open_blob(descriptor.digest)?;
        file.take(DOCUMENT_MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| ImageError::failed("read", &what, e))?;
        Document::verified(&what, descriptor, bytes.into())
    }

    async fn signers(&self, manifest: BlobDigest) -> Vec<&'static str> {
        let signed = self.index().is_ok_and(|index| index.is_signed(manifest));
        signed.then_some("cosign").into_iter().collect()
    }

    async fn blob(&self, digest: BlobDigest, _bytes: u64) -> Result<BlobBody, ImageError> {
        let file = tokio::fs::File::from_std(self.open_blob(digest)?);
        let stream = tokio_util::io::ReaderStream::with_capacity(file, READ_BYTES);
        Ok(Box::pin(futures::StreamExt::map(stream, move |part| {
            part.map_err(|e| ImageError::failed("read blob", digest, e))
        })))
    }

    async fn range(
        &self,
        digest: BlobDigest,
        _blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        let file = self.open_blob(digest)?;
        blocking(move || {
            let failed = |e: io::Error| ImageError::failed("read blob", digest, e);
            let length = usize::try_from(extent.len()).map_err(|e| failed(io::Error::other(e)))?;
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, extent.start())
                .map_err(failed)?;
            Ok(bytes.into())
        })
        .await
    }
}

#[async_trait]
impl ImageWriter for LayoutImage {
    async fn has_blob(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError> {
        match fs::metadata(self.blob_path(digest)) {
            Ok(metadata) => Ok(metadata.is_file() && metadata.len() == bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(ImageError::failed("stat blob", digest, e)),
        }
    }

    async fn put_blob(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        _progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ImageError> {
        self.make()?;
        let path = self.blob_path(digest);
        blocking(move || {
            let done = || -> io::Result<()> {
                spool.sync_all()?;
                if fs::metadata(&path).is_ok_and(|found| found.len() == bytes) {
                    return Ok(());
                }
                // A leftover of another size would make the link fail for ever.
                let _ = fs::remove_file(&path);
                if spool::link(&spool, &path).is_ok() {
                    return Ok(());
                }
                let directory = path.parent().unwrap_or(Path::new("."));
                let mut copy = tempfile::NamedTempFile::new_in(directory)?;
                (&*spool).seek(SeekFrom::Start(0))?;
                io::copy(&mut &*spool, &mut copy)?;
                copy.as_file().sync_all()?;
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
                copy.as_file().set_permissions(mode)?;
                copy.persist(&path).map_err(|e| e.error)?;
                Ok(())
            };
            done().map_err(|e| ImageError::failed("write blob", path.display(), e))
        })
        .await
    }

    async fn put_document(&self, document: &Document) -> Result<(), ImageError> {
        self.make()?;
        let path = self.blob_path(document.digest);
        replace(&path, &document.bytes)
            .map_err(|e| ImageError::failed("write manifest", path.display(), e))
    }

    async fn name(&self, document: &Document) -> Result<(), ImageError> {
        self.put_document(document).await?;
        let image = Self::at(&self.directory, self.tag.as_deref());
        let descriptor = document.descriptor();
        blocking(move || {
            image
                .name_blocking(descriptor)
                .map_err(|e| ImageError::failed("write index.json of", &image.label, e))
        })
        .await
    }

    fn spool_directory(&self) -> Option<&Path> {
        self.spool_directory.as_deref()
    }
}
