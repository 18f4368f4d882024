// SPDX-License-Identifier: Apache-2.0
//! Goes over the headers of a tar by offset: ustar, GNU and pax, as tools write archives of images.
//!
//! Contents are skipped, whatever their size, so that an archive of many GiB costs a read of 512 bytes
//! per entry. Sizes and positions are checked against the file before they are used; names and pax
//! records have a cap, because they are held in memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use sluice_blockindex::extent::Extent;
use tar::{EntryType, Header, PaxExtensions};

use super::super::file_body::{FileExtent, read};

const BLOCK_BYTES: u64 = 512;
/// The most bytes of a name or of the pax records of an entry: Linux' own limit for a path is 4096, and
/// no writer of images has records besides path, link and size.
const EXTENSION_MAX_BYTES: u64 = 64 * 1024;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Member {
    /// Its content.
    File(FileExtent),
    /// The name that it stands for, from the top of the archive.
    Link(String),
}

/// What extension headers say of the entry after them.
#[derive(Debug, Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    bytes: Option<u64>,
}

/// The files and links of a tar, with cleaned names. Ends after the first error.
#[derive(Debug)]
pub(super) struct Scan<'a> {
    file: &'a File,
    file_bytes: u64,
    position: u64,
    ended: bool,
}

impl<'a> Scan<'a> {
    pub(super) fn new(file: &'a File, file_bytes: u64) -> Self {
        Self {
            file,
            file_bytes,
            position: 0,
            ended: false,
        }
    }

    /// The next header and where its content begins; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, String> {
        let left = self.file_bytes - self.position;
        if left == 0 && self.position > 0 {
            // Some writers leave the two blocks of zeros out that should end it.
            return Ok(None);
        }
        if left < BLOCK_BYTES {
            return Err(self.at("not a tar, or cut off"));
        }
        let mut header = Header::new_old();
        self.file
            .read_exact_at(header.as_mut_bytes(), self.position)
            .map_err(|e| self.at(&e.to_string()))?;
        let block = header.as_bytes();
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The checksum's own eight bytes count as spaces.
        let sum = block.iter().map(|byte| u32::from(*byte)).sum::<u32>()
            - block[148..156]
                .iter()
                .map(|byte| u32::from(*byte))
                .sum::<u32>()
            + 8 * 32;
        if header.cksum().ok() != Some(sum) {
            return Err(self.at("not a tar: a header's checksum is wrong"));
        }
        self.position += BLOCK_BYTES;
        Ok(Some(header))
    }

    fn at(&self, problem: &str) -> String {
        format!("{problem}, at byte {}", self.position)
    }

    /// The content of `bytes` bytes that begins here, and steps over it.
    fn content(&mut self, bytes: u64) -> Result<FileExtent, String> {
        let extent = Extent::from_length(self.position, bytes)
            .filter(|extent| extent.end() <= self.file_bytes);
        let Some(extent) = extent else {
            return Err(self.at(&format!(
                "an entry of {bytes} bytes ends beyond the archive"
            )));
        };
        // The last content's padding may be missing.
        let padded = bytes.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES);
        self.position = self.position.saturating_add(padded).min(self.file_bytes);
        Ok(extent)
    }

    /// The content of an extension header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, String> {
        let bytes = header.entry_size().map_err(|e| self.at(&e.to_string()))?;
        if bytes > EXTENSION_MAX_BYTES {
            return Err(self.at(&format!("a name or its attributes take {bytes} bytes")));
        }
        let extent = self.content(bytes)?;
        let content = read(self.file, extent).map_err(|e| self.at(&e.to_string()))?;
        Ok(content.into())
    }

    fn pax(&mut self, header: &Header, known: &mut Extensions) -> Result<(), String> {
        let content = self.extension(header)?;
        for record in PaxExtensions::new(&content) {
            let record = record.map_err(|e| self.at(&format!("pax: {e}")))?;
            let value = record.value_bytes();
            match record.key_bytes() {
                b"path" => known.name = Some(value.to_vec()),
                b"linkpath" => known.link = Some(value.to_vec()),
                b"size" => {
                    let number = record.value().ok().and_then(|text| text.parse().ok());
                    let number = number.ok_or_else(|| self.at("pax: size is no number"))?;
                    known.bytes = Some(number);
                }
                key if key.starts_with(b"GNU.sparse") => {
                    return Err(self.at("a sparse file, which cannot be read in place"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn member(&mut self) -> Result<Option<(String, Member)>, String> {
        let mut known = Extensions::default();
        while let Some(header) = self.header()? {
            let kind = header.entry_type();
            match kind {
                EntryType::GNULongName => {
                    known.name = Some(until_nul(self.extension(&header)?));
                    continue;
                }
                EntryType::GNULongLink => {
                    known.link = Some(until_nul(self.extension(&header)?));
                    continue;
                }
                EntryType::XHeader => {
                    self.pax(&header, &mut known)?;
                    continue;
                }
                EntryType::XGlobalHeader => {
                    // Comments, as `git archive` writes them; what would rename every entry is not.
                    let mut global = Extensions::default();
                    self.pax(&header, &mut global)?;
                    if global.name.is_some() || global.link.is_some() || global.bytes.is_some() {
                        return Err(self.at("a global header with a name or a size"));
                    }
                    continue;
                }
                _ => {}
            }
            let known = std::mem::take(&mut known);
            let name = known
                .name
                .unwrap_or_else(|| header.path_bytes().into_owned());
            let name = clean("", &name).map_err(|problem| self.at(&problem))?;
            let bytes = match known.bytes {
                Some(bytes) => bytes,
                None => header.entry_size().map_err(|e| self.at(&e.to_string()))?,
            };
            let link = || {
                let of_header = || header.link_name_bytes().map(|link| link.into_owned());
                known.link.clone().or_else(of_header).unwrap_or_default()
            };
            let member = match kind {
                EntryType::Regular | EntryType::Continuous => Member::File(self.content(bytes)?),
                EntryType::Directory => continue,
                EntryType::Link => {
                    Member::Link(clean("", &link()).map_err(|problem| self.at(&problem))?)
                }
                EntryType::Symlink => {
                    let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                    Member::Link(clean(parent, &link()).map_err(|problem| self.at(&problem))?)
                }
                _ => {
                    return Err(self.at(&format!(
                        "{name:?} is neither file, directory nor link (type {:?})",
                        char::from(kind.as_byte())
                    )));
                }
            };
            return Ok(Some((name, member)));
        }
        Ok(None)
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<(String, Member), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.member().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0);
    bytes.truncate(end.unwrap_or(bytes.len()));
    bytes
}

/// A name from the top of the archive, without `.`, `..` and doubled slashes; `parent` is where it is
/// relative to. **Errors**: it leads out, or is no text.
fn clean(parent: &str, name: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(name)
        .map_err(|_| format!("the name {:?} is not UTF-8", String::from_utf8_lossy(name)))?;
    if text.starts_with('/') {
        return Err(format!("the name {text:?} begins at the root"));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in parent.split('/').chain(text.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts
                    .pop()
                    .ok_or_else(|| format!("the name {text:?} leads out of the archive"))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}
