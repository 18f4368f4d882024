// SPDX-License-Identifier: Apache-2.0
//! OCI image layouts in a tar, read without unpacking them.
//!
//! What is to be written is gathered beside the archive, in files without names, and becomes an archive
//! when the image is named ([`write`]): a new file that takes the old one's place whole, or not at
//! all. Images that the old archive has by other names are kept, with all that they name. The bytes
//! follow from the images alone: entries in a fixed order, no times, no owners.
//!
//! A crash leaves the old archive. What was gathered vanishes, so an interrupted conversion into an
//! archive begins again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::archive::{Archive, beyond, within};
use super::file_body::{FileExtent, blocking, body, read};
use super::layout_index::LayoutIndex;
use super::{
    BlobBody, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageError, ImageReader, ImageWriter,
    Location,
};
use crate::spool;

mod write;

use write::Content;

/// One image in an archive.
#[derive(Debug)]
pub struct OciArchiveImage {
    path: PathBuf,
    tag: Option<String>,
    label: String,
    /// Of an archive to be written: where it is, or will be.
    directory: Option<PathBuf>,
    state: Mutex<State>,
}

/// Never locked across I/O.
#[derive(Debug, Default)]
struct State {
    /// The archive as it is.
    present: Option<Arc<Archive>>,
    added: Added,
}

/// What the next archive has and the present one may not.
#[derive(Debug, Default, Clone)]
struct Added {
    /// Blobs one after another, in the order in which they came.
    heap: Option<Arc<File>>,
    heap_bytes: u64,
    blobs: BTreeMap<BlobDigest, FileExtent>,
    documents: BTreeMap<BlobDigest, Bytes>,
}

impl Added {
    fn find(&self, digest: BlobDigest) -> Option<Content> {
        if let Some(bytes) = self.documents.get(&digest) {
            return Some(Content::Bytes(bytes.clone()));
        }
        let extent = *self.blobs.get(&digest)?;
        let file = Arc::clone(self.heap.as_ref()?);
        Some(Content::Part { file, extent })
    }
}

/// The name of a blob's entry.
fn entry_name(digest: BlobDigest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl OciArchiveImage {
    /// An image that exists. Blocks while the headers are read.
    ///
    /// **Errors**: `NotFound`; `Invalid` for what is no OCI layout in a tar, or is refused.
    pub fn open(path: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        Ok(Self::at(path, tag, Some(open_layout(path)?)))
    }

    /// An image of an opened archive that has an `index.json`, which the user named as `location`.
    pub(super) fn labelled(
        archive: Archive,
        tag: Option<&str>,
        location: &Location,
    ) -> Result<Self, ImageError> {
        no_links(&archive)?;
        let mut image = Self::at(Path::new(""), tag, Some(archive));
        image.label = location.to_string();
        Ok(image)
    }

    /// An image that is to be written; the archive may be missing. Blocks while its headers are read.
    ///
    /// **Errors**: there is something that is no such archive, or no directory to hold it.
    pub fn create(path: &Path, tag: Option<&str>) -> Result<Self, ImageError> {
        let present = match open_layout(path) {
            Ok(archive) => Some(archive),
            Err(e) if e.is_not_found() => None,
            Err(e) => return Err(e),
        };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if !directory.is_dir() {
            return Err(ImageError::NotFound {
                what: format!("directory {}", directory.display()),
            });
        }
        let mut image = Self::at(path, tag, present);
        image.directory = Some(directory.to_owned());
        Ok(image)
    }

    fn at(path: &Path, tag: Option<&str>, present: Option<Archive>) -> Self {
        let tag = tag.map(str::to_owned);
        let location = Location::OciArchive {
            path: path.to_owned(),
            tag: tag.clone(),
        };
        let present = present.map(Arc::new);
        Self {
            path: path.to_owned(),
            tag,
            label: location.to_string(),
            directory: None,
            state: Mutex::new(State {
                present,
                added: Added::default(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bytes of a blob or document are.
    fn find(&self, digest: BlobDigest) -> Result<Content, ImageError> {
        let state = self.state();
        if let Some(added) = state.added.find(digest) {
            return Ok(added);
        }
        let present = state.present.as_ref();
        let found = present.and_then(|archive| {
            let extent = archive.find(&entry_name(digest))?;
            let file = Arc::clone(archive.file());
            Some(Content::Part { file, extent })
        });
        found.ok_or_else(|| ImageError::NotFound {
            what: format!("blob {digest} in {}", self.label),
        })
    }

    /// Room for `bytes` bytes at the end of the heap.
    fn reserve(&self, bytes: u64) -> Result<(Arc<File>, FileExtent), ImageError> {
        let failed = |e: io::Error| ImageError::failed("make a spool file for", &self.label, e);
        let known = self.state().added.heap.clone();
        let spool = match known {
            Some(heap) => heap,
            None => {
                let directory = self.directory.as_deref().unwrap_or(Path::new("."));
                Arc::new(spool::create(directory).map_err(failed)?)
            }
        };
        let mut state = self.state();
        let added = &mut state.added;
        // Another blob may have come first.
        let heap = Arc::clone(added.heap.get_or_insert(spool));
        let extent = Extent::from_length(added.heap_bytes, bytes);
        let extent = extent.ok_or_else(|| failed(io::ErrorKind::FileTooLarge.into()))?;
        added.heap_bytes = extent.end();
        Ok((heap, extent))
    }
}

/// An archive that has a layout in it.
fn open_layout(path: &Path) -> Result<Archive, ImageError> {
    let archive = Archive::open(path)?;
    let invalid = |reason: String| ImageError::Invalid {
        what: archive.label().to_owned(),
        reason,
    };
    if !archive.contains("index.json") {
        return Err(invalid("no index.json in it: not an OCI layout".to_owned()));
    }
    no_links(&archive)?;
    Ok(archive)
}

fn no_links(archive: &Archive) -> Result<(), ImageError> {
    let link = archive.first_link();
    link.map_or(Ok(()), |link| {
        Err(ImageError::Invalid {
            what: archive.label().to_owned(),
            reason: format!("{link:?} is a link; a layout has none"),
        })
    })
}

/// `index.json` of an archive.
fn index_of(archive: &Archive) -> Result<LayoutIndex, ImageError> {
    let bytes = archive.read_small("index.json", DOCUMENT_MAX_BYTES)?;
    LayoutIndex::parse(&format!("index.json in {}", archive.label()), &bytes)
}

#[async_trait]
impl ImageReader for OciArchiveImage {
    fn label(&self) -> &str {
        &self.label
    }

    async fn root(&self) -> Result<Document, ImageError> {
        let Some(present) = self.state().present.clone() else {
            return Err(ImageError::NotFound {
                what: self.label.clone(),
            });
        };
        let index = blocking(move || index_of(&present)).await?;
        let entry = index.entry(&self.label, self.tag.as_deref())?;
        self.document(&entry).await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        let what = format!("manifest {} in {}", descriptor.digest, self.label);
        let content = self.find(descriptor.digest)?;
        if content.bytes() > DOCUMENT_MAX_BYTES {
            let reason = format!("manifest of {} bytes is too large", content.bytes());
            return Err(ImageError::Invalid { what, reason });
        }
        let name = what.clone();
        let bytes = blocking(move || {
            content
                .read()
                .map_err(|e| ImageError::failed("read", name, e))
        });
        Document::verified(&what, descriptor, bytes.await?)
    }

    async fn blob(&self, digest: BlobDigest, _bytes: u64) -> Result<BlobBody, ImageError> {
        let what = format!("blob {digest} in {}", self.label);
        Ok(match self.find(digest)? {
            Content::Bytes(bytes) => Box::pin(futures::stream::iter([Ok(bytes)])),
            Content::Part { file, extent } => body(file, extent, what),
        })
    }

    async fn range(
        &self,
        digest: BlobDigest,
        _blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        let content = self.find(digest)?;
        let what = format!("blob {digest} in {}", self.label);
        blocking(move || {
            let read = || match content {
                Content::Bytes(bytes) => {
                    let whole = Extent::from_length(0, bytes.len() as u64).ok_or_else(beyond)?;
                    let part = within(whole, extent).ok_or_else(beyond)?;
                    let at = |offset| usize::try_from(offset).map_err(io::Error::other);
                    Ok(bytes.slice(at(part.start())?..at(part.end())?))
                }
                Content::Part { file, extent: all } => {
                    read(&file, within(all, extent).ok_or_else(beyond)?)
                }
            };
            read().map_err(|e| ImageError::failed("read", what, e))
        })
        .await
    }
}

#[async_trait]
impl ImageWriter for OciArchiveImage {
    async fn has_blob(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError> {
        Ok(self.find(digest).is_ok_and(|found| found.bytes() == bytes))
    }

    async fn put_blob(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        _progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ImageError> {
        if self.has_blob(digest, bytes).await? {
            return Ok(());
        }
        let (heap, extent) = self.reserve(bytes)?;
        let what = format!("blob {digest} for {}", self.label);
        blocking(move || {
            write::copy_into(&spool, &heap, extent)
                .map_err(|e| ImageError::failed("write", what, e))
        })
        .await?;
        self.state().added.blobs.insert(digest, extent);
        Ok(())
    }

    async fn put_document(&self, document: &Document) -> Result<(), ImageError> {
        let bytes = document.bytes.clone();
        self.state().added.documents.insert(document.digest, bytes);
        Ok(())
    }

    async fn name(&self, document: &Document) -> Result<(), ImageError> {
        self.put_document(document).await?;
        let (present, added) = {
            let state = self.state();
            (state.present.clone(), state.added.clone())
        };
        let (path, tag) = (self.path.clone(), self.tag.clone());
        let directory = self.directory.clone().unwrap_or_else(|| ".".into());
        let (named, label) = (document.descriptor(), self.label.clone());
        let written = blocking(move || {
            let mut index = match &present {
                Some(archive) => index_of(archive)?,
                None => LayoutIndex::empty(),
            };
            index.put(named, tag.as_deref());
            let find = |digest| {
                added.find(digest).or_else(|| {
                    let archive = present.as_ref()?;
                    let extent = archive.find(&entry_name(digest))?;
                    let file = Arc::clone(archive.file());
                    Some(Content::Part { file, extent })
                })
            };
            let contents = write::reachable(&label, &index, &find)?;
            write::archive(&directory, &path, &index, &contents)
                .map_err(|e| ImageError::failed("write", &label, e))?;
            Archive::open(&path)
        });
        let written = written.await?;
        *self.state() = State {
            present: Some(Arc::new(written)),
            added: Added::default(),
        };
        Ok(())
    }

    fn spool_directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }
}

#[cfg(test)]
mod tests;
