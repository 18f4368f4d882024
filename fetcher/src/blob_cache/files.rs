// SPDX-License-Identifier: Apache-2.0
//! The files of the cache. All calls block.
//!
//! ```text
//! whole/<sha256>            a verified blob
//! partial/<sha256>.data     its bytes as far as they are here, sparse
//! partial/<sha256>.pieces   the record of them
//! ```
//! **Crash** A whole blob was synced before it got its name. Of a partial one nothing is synced: what a
//! power cut tore does not fit its checksum and counts as missing. A record without data, or data without
//! a record, is removed at the next start.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sluice_blockindex::digest::BlobDigest;

use super::{pieces, record};

const DATA: &str = "data";
const PIECES: &str = "pieces";
/// The largest record that is read.
const RECORD_MAX_BYTES: u64 = 33 << 20;

/// A blob that was there at the start.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) blob: BlobDigest,
    pub(super) size_bytes: u64,
    pub(super) whole: bool,
    pub(super) used: SystemTime,
}

/// The files of a blob that is not whole.
#[derive(Debug)]
pub(super) struct PartialFiles {
    pub(super) data: File,
    pub(super) record: File,
    /// Pieces that are here and fit their checksums, by whose they are.
    pub(super) present: Vec<Option<record::OriginName>>,
}

#[derive(Debug)]
pub(super) struct Files {
    whole: PathBuf,
    partial: PathBuf,
}

impl Files {
    pub(super) fn open(directory: &Path) -> io::Result<(Self, Vec<Found>)> {
        let files = Files {
            whole: directory.join("whole"),
            partial: directory.join("partial"),
        };
        for path in [&files.whole, &files.partial] {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        let mut found = files.scan_whole()?;
        let whole: Vec<BlobDigest> = found.iter().map(|it| it.blob).collect();
        found.extend(files.scan_partial(&whole)?);
        Ok((files, found))
    }

    fn scan_whole(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.whole)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // What has another name is not ours.
            let Ok(blob) = BlobDigest::from_hex(&name) else {
                continue;
            };
            let metadata = entry.metadata()?;
            found.push(Found {
                blob,
                size_bytes: metadata.len(),
                whole: true,
                used: metadata.modified()?,
            });
        }
        Ok(found)
    }

    /// Blobs with data and a record; anything else of a blob is removed.
    fn scan_partial(&self, whole: &[BlobDigest]) -> io::Result<Vec<Found>> {
        let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for entry in fs::read_dir(&self.partial)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some((blob, kind)) = name.split_once('.') {
                kinds
                    .entry(blob.to_owned())
                    .or_default()
                    .push(kind.to_owned());
            }
        }
        let mut found = Vec::new();
        for (name, kinds) in kinds {
            let Ok(blob) = BlobDigest::from_hex(&name) else {
                continue;
            };
            let size_bytes = self.recorded(blob);
            match size_bytes {
                Some(size_bytes) if kinds.len() == 2 && !whole.contains(&blob) => {
                    let used = fs::metadata(self.part(blob, PIECES))?.modified()?;
                    found.push(Found {
                        blob,
                        size_bytes,
                        whole: false,
                        used,
                    });
                }
                _ => self.remove_partial(blob)?,
            }
        }
        Ok(found)
    }

    fn recorded(&self, blob: BlobDigest) -> Option<u64> {
        let file = File::open(self.part(blob, PIECES)).ok()?;
        Some(read_record(&file)?.size_bytes)
    }

    fn place(&self, blob: BlobDigest) -> PathBuf {
        self.whole.join(blob.hex())
    }

    fn part(&self, blob: BlobDigest, kind: &str) -> PathBuf {
        self.partial.join(format!("{}.{kind}", blob.hex()))
    }

    /// Opens a verified blob, and notes that it was used.
    pub(super) fn open_whole(&self, blob: BlobDigest) -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.place(blob))?;
        // Orders evictions after a restart, and nothing else.
        let _ = file.set_modified(SystemTime::now());
        Ok(file)
    }

    /// Opens what is here of a blob, making the files where there are none that fit.
    pub(super) fn open_partial(
        &self,
        blob: BlobDigest,
        size_bytes: u64,
    ) -> io::Result<PartialFiles> {
        let open = |kind| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.mode(0o600).open(self.part(blob, kind))
        };
        let (record, data) = (open(PIECES)?, open(DATA)?);
        let known = read_record(&record).filter(|it| it.size_bytes == size_bytes);
        let fits = known.is_some() && data.metadata()?.len() == size_bytes;
        let present = match known.filter(|_| fits) {
            Some(known) => checked(&data, &known)?,
            None => {
                data.set_len(0)?;
                data.set_len(size_bytes)?;
                record.set_len(0)?;
                record.write_all_at(&record::empty(size_bytes), 0)?;
                vec![None; usize::try_from(pieces::count(size_bytes)).unwrap_or(0)]
            }
        };
        Ok(PartialFiles {
            data,
            record,
            present,
        })
    }

    /// Makes a blob that was verified one of the whole ones.
    pub(super) fn seal(&self, blob: BlobDigest, data: &File) -> io::Result<()> {
        data.sync_all()?;
        fs::rename(self.part(blob, DATA), self.place(blob))?;
        File::open(&self.whole)?.sync_all()?;
        self.remove_partial(blob)
    }

    /// Removes all of a blob. Fine when there is nothing.
    pub(super) fn remove(&self, blob: BlobDigest) -> io::Result<()> {
        remove_file(&self.place(blob))?;
        self.remove_partial(blob)
    }

    fn remove_partial(&self, blob: BlobDigest) -> io::Result<()> {
        // The record first: data without one is nothing.
        remove_file(&self.part(blob, PIECES))?;
        remove_file(&self.part(blob, DATA))
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn read_record(file: &File) -> Option<record::Record> {
    let length = file.metadata().ok()?.len();
    if length > RECORD_MAX_BYTES {
        return None;
    }
    let mut bytes = Vec::new();
    let mut file = file;
    file.read_to_end(&mut bytes).ok()?;
    record::parse(&bytes)
}

/// Which recorded pieces are what the record says.
fn checked(data: &File, known: &record::Record) -> io::Result<Vec<Option<record::OriginName>>> {
    let mut buffer = vec![0; usize::try_from(pieces::PIECE_BYTES).unwrap_or(0)];
    let mut present = Vec::with_capacity(known.pieces.len());
    for (number, here) in (0_u32..).zip(&known.pieces) {
        let extent = pieces::extent(known.size_bytes, number);
        let length = usize::try_from(extent.len()).unwrap_or(0);
        let fits = match here {
            Some(here) => {
                data.read_exact_at(&mut buffer[..length], extent.start())?;
                (crc32fast::hash(&buffer[..length]) == here.crc).then_some(here.origin)
            }
            None => None,
        };
        present.push(fits);
    }
    Ok(present)
}
