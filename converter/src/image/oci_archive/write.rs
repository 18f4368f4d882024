// SPDX-License-Identifier: Apache-2.0
//! Writes an archive: what its images name, in a fixed order, to a file that replaces the old one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::digest::{BlobDigest, Sha256Hasher};
use sluice_blockindex::extent::Extent;
use tar::{Builder, EntryType, Header};

use super::super::file_body::{FileExtent, FileSpace, read};
use super::super::layout_index::LayoutIndex;
use super::super::{DOCUMENT_MAX_BYTES, Descriptor, Document, ImageError};
use super::entry_name;
use crate::spool;

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1024 * 1024;

/// The bytes of a blob or document.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// In memory.
    Bytes(Bytes),
    /// Within a file.
    Part { file: Arc<File>, extent: FileExtent },
}

impl Content {
    /// How many.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Part { extent, .. } => extent.len(),
        }
    }

    /// All of them. Blocks.
    pub(super) fn read(&self) -> io::Result<Bytes> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::Part { file, extent } => read(file, *extent),
        }
    }
}

/// Copies all of `from` to `extent` of `to`. Blocks.
pub(super) fn copy_into(from: &File, to: &File, extent: FileExtent) -> io::Result<()> {
    let mut done = 0;
    while done < extent.len() {
        let length = COPY_BYTES.min(extent.len() - done);
        let part = Extent::from_length(done, length).ok_or(io::ErrorKind::FileTooLarge)?;
        to.write_all_at(&read(from, part)?, extent.start() + done)?;
        done += length;
    }
    Ok(())
}

/// All that the images of `index` name, as far as it is there: foreign layers are not, and archives
/// may have been written with some platforms only. Blocks.
///
/// **Errors**: a manifest that is there and is damaged; nothing is to be lost by rewriting an archive.
pub(super) fn reachable(
    label: &str,
    index: &LayoutIndex,
    find: &dyn Fn(BlobDigest) -> Option<Content>,
) -> Result<BTreeMap<BlobDigest, Content>, ImageError> {
    let mut todo = index.entries().map_err(|reason| ImageError::Invalid {
        what: label.to_owned(),
        reason,
    })?;
    let mut found = BTreeMap::new();
    while let Some(descriptor) = todo.pop() {
        if found.contains_key(&descriptor.digest) {
            continue;
        }
        let Some(content) = find(descriptor.digest) else {
            continue;
        };
        if names_others(&descriptor) && content.bytes() <= DOCUMENT_MAX_BYTES {
            let what = format!("manifest {} of {label}", descriptor.digest);
            let bytes = content
                .read()
                .map_err(|e| ImageError::failed("read", &what, e))?;
            let document = Document::verified(&what, &descriptor, bytes)?;
            todo.extend(document.list("manifests")?);
            todo.extend(document.list("layers")?);
            todo.extend(document.single("config")?);
        }
        found.insert(descriptor.digest, content);
    }
    Ok(found)
}

fn names_others(descriptor: &Descriptor) -> bool {
    let media_type = &descriptor.media_type;
    media_type.ends_with(".manifest.v1+json")
        || media_type.ends_with(".index.v1+json")
        || media_type.ends_with(".manifest.v2+json")
        || media_type.ends_with(".manifest.list.v2+json")
}

/// Writes the archive to `path`, in `directory`: fsynced, then put in the place of what was there. Blocks.
///
/// **Errors**: also `InvalidData` when what comes from the old archive is not what its name says.
pub(super) fn archive(
    directory: &Path,
    path: &Path,
    index: &LayoutIndex,
    contents: &BTreeMap<BlobDigest, Content>,
) -> io::Result<()> {
    let file = spool::create(directory)?;
    let mut tar = Builder::new(BufWriter::with_capacity(1024 * 1024, file));
    let marker = br#"{"imageLayoutVersion":"1.0.0"}"#;
    append(&mut tar, "oci-layout", marker.len() as u64, &marker[..])?;
    let bytes = index.to_bytes();
    append(&mut tar, "index.json", bytes.len() as u64, &bytes[..])?;
    for name in ["blobs/", "blobs/sha256/"] {
        let mut header = header(0o755, 0);
        header.set_entry_type(EntryType::Directory);
        tar.append_data(&mut header, name, io::empty())?;
    }
    for (digest, content) in contents {
        let name = entry_name(*digest);
        match content {
            Content::Bytes(bytes) => append(&mut tar, &name, bytes.len() as u64, &bytes[..])?,
            Content::Part { file, extent } => {
                let mut part = Hashed::new(file, *extent);
                append(&mut tar, &name, extent.len(), &mut part)?;
                let actual = BlobDigest::from_bytes(part.hasher.finish());
                if actual != *digest {
                    let problem = format!("blob {digest} is damaged: its digest is {actual}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
                }
            }
        }
    }
    let file = tar.into_inner()?.into_inner().map_err(|e| e.into_error())?;
    spool::replace(&file, path)
}

/// What is the same of every entry: no owner, no time.
fn header(mode: u32, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn append(
    tar: &mut Builder<BufWriter<File>>,
    name: &str,
    bytes: u64,
    content: impl Read,
) -> io::Result<()> {
    tar.append_data(&mut header(0o644, bytes), name, content)
}

/// Reads a part of a file and hashes what is read.
struct Hashed<'a> {
    file: &'a File,
    position: u64,
    end: u64,
    hasher: Sha256Hasher,
}

impl<'a> Hashed<'a> {
    fn new(file: &'a File, extent: Extent<FileSpace>) -> Self {
        Self {
            file,
            position: extent.start(),
            end: extent.end(),
            hasher: Sha256Hasher::new(),
        }
    }
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..length], self.position)?;
        self.hasher.update(&buffer[..read]);
        self.position += read as u64;
        Ok(read)
    }
}
