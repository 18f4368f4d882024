// SPDX-License-Identifier: Apache-2.0
//! A tar archive that is read by offset: an index of its entries, made in one pass over the headers.
//!
//! Nothing is unpacked. Images come from anywhere, so what could mean two things or lead out of the
//! archive is refused when it is opened: a name twice, a name or a link with `..` above the top, an
//! entry that ends beyond the file, a device, a sparse file. Links are kept as names, because
//! `docker save` writes equal layers once; whoever expects none refuses them.
//!
//! The archive's file is held open: one that is replaced meanwhile is read as it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::ImageError;
use super::file_body::{FileExtent, read};

mod scan;

use scan::{Member, Scan};

/// The most entries. An image has at most 127 layers for each of some twenty platforms, and an archive
/// a few images; each entry takes some 200 bytes of memory.
const ENTRIES_MAX: usize = 65_536;
/// Links that lead to links: `docker save` writes one step.
const LINKS_MAX: usize = 8;

/// An opened archive.
#[derive(Debug)]
pub(super) struct Archive {
    file: Arc<File>,
    label: String,
    entries: BTreeMap<String, Member>,
}

impl Archive {
    /// Reads the headers of the archive. Blocks.
    ///
    /// **Errors**: `NotFound`; `Invalid` for what is no tar, is compressed, or is refused.
    pub(super) fn open(path: &Path) -> Result<Self, ImageError> {
        let label = format!("archive {}", path.display());
        let file = File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ImageError::NotFound {
                what: label.clone(),
            },
            _ => ImageError::failed("open", &label, e),
        })?;
        let metadata = file
            .metadata()
            .map_err(|e| ImageError::failed("stat", &label, e))?;
        let invalid = |reason: String| ImageError::Invalid {
            what: label.clone(),
            reason,
        };
        if !metadata.is_file() {
            return Err(invalid(
                "not a regular file; parts of it must be readable in any order".to_owned(),
            ));
        }
        let mut magic = [0; 6];
        let _ = file.read_exact_at(&mut magic, 0);
        if let Some(compression) = compression(&magic) {
            return Err(invalid(format!(
                "compressed with {compression}; decompress it first: layers are read where they stand"
            )));
        }
        let mut entries = BTreeMap::new();
        for member in Scan::new(&file, metadata.len()) {
            let (name, member) = member.map_err(invalid)?;
            if entries.len() >= ENTRIES_MAX {
                return Err(invalid(format!("more than {ENTRIES_MAX} entries")));
            }
            if entries.insert(name.clone(), member).is_some() {
                return Err(invalid(format!("{name:?} stands in it twice")));
            }
        }
        Ok(Self {
            file: Arc::new(file),
            label,
            entries,
        })
    }

    /// Names it in messages.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Whether there is an entry of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The first entry that is a link, if any is.
    pub(super) fn first_link(&self) -> Option<&str> {
        let mut entries = self.entries.iter();
        entries
            .find_map(|(name, member)| matches!(member, Member::Link(_)).then_some(name.as_str()))
    }

    /// Where the content of an entry stands; links are followed. `None` if there is no such file.
    pub(super) fn find(&self, name: &str) -> Option<FileExtent> {
        let mut name = name;
        for _ in 0..=LINKS_MAX {
            match self.entries.get(name)? {
                Member::File(extent) => return Some(*extent),
                Member::Link(target) => name = target,
            }
        }
        None
    }

    /// The whole content of a small entry. Blocks.
    ///
    /// **Errors**: `NotFound`; `Invalid` if it is above `max_bytes`.
    pub(super) fn read_small(&self, name: &str, max_bytes: u64) -> Result<Bytes, ImageError> {
        let what = || format!("{name} in {}", self.label);
        let extent = self
            .find(name)
            .ok_or_else(|| ImageError::NotFound { what: what() })?;
        if extent.len() > max_bytes {
            return Err(ImageError::Invalid {
                what: what(),
                reason: format!("{} bytes, at most {max_bytes} are read", extent.len()),
            });
        }
        read(&self.file, extent).map_err(|e| ImageError::failed("read", what(), e))
    }

    /// The file, to copy from.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// A part of a content, where it stands in the file; `None` if it goes beyond the content.
pub(super) fn within(content: FileExtent, part: Extent<BlobSpace>) -> Option<FileExtent> {
    let start = content.start().checked_add(part.start())?;
    let end = content.start().checked_add(part.end())?;
    Extent::new(start, end).filter(|part| part.end() <= content.end())
}

/// A part goes beyond the content it is of.
pub(super) fn beyond() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the blob is shorter")
}

/// What a file is compressed with, by its first bytes.
pub(super) fn compression(magic: &[u8]) -> Option<&'static str> {
    match magic {
        [0x1f, 0x8b, ..] => Some("gzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("zstd"),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Some("xz"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some("bzip2"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
