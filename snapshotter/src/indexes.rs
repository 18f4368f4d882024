// SPDX-License-Identifier: Apache-2.0
//! Layer index files on disk: `indexes/<hex of the index digest>.idx`, decompressed, mapped.
//!
//! A file is named by the digest of the compressed payload that the manifest pins. It gets its name
//! only after payload, sections and tree have been checked ([`accept`]), so what has a name here was
//! valid when it was written; opening it again checks its crc32 sums against rot.
//! Opened indexes are shared: one mapping per index as long as anybody holds it.
//! A crash leaves a whole file or none. All calls block.
//!
//! Who needs a file that no metadata names yet calls [`IndexFiles::hold`]: from then on the sweep
//! leaves it alone for its grace. A file whose index is open is left alone too.
//!
//! **Locks** `touched` before `open`. `touched` is held while the sweep looks at one file and deletes
//! it, so that a hold comes before the look or finds the file gone.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::chunkmap::DeviceForm;
use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};
use sluice_blockindex::index::{
    INDEX_FILE_MAX_BYTES, Index, IndexError, UncheckedIndex, decompress_index,
};

use crate::sys::map::{MappedFile, WeakFile};
use crate::{durable, sys};

#[cfg(test)]
pub mod sample;

/// A validated index over a mapped file.
pub type LayerIndex = Index<MappedFile>;

/// Ends the name of an index file.
const SUFFIX: &str = ".idx";
/// Ends the name of the file of windows that goes with an index.
const WINDOWS_SUFFIX: &str = ".win";

/// Why a layer's index cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerIndexError {
    /// The payload is not what the manifest pins.
    #[error("index has digest {actual}, want {expected}")]
    Digest {
        /// In the manifest.
        expected: IndexDigest,
        /// Of the bytes that came.
        actual: IndexDigest,
    },
    /// The index breaks a rule of the format.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The index is of another layer than the manifest says.
    #[error("index says {what} {actual}, the manifest {expected}")]
    Disagrees {
        /// On what.
        what: &'static str,
        /// In the manifest.
        expected: String,
        /// In the index.
        actual: String,
    },
    /// The file system failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// In the present tense.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
}

/// What an index must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexPin {
    /// sha256 of its payload.
    pub digest: IndexDigest,
    /// The layer that it is of.
    pub diff_id: DiffId,
    /// Size of the blob that it describes.
    pub blob_bytes: u64,
    /// Which blob that may be.
    pub blob: PinnedBlob,
}

/// Which blob an index must be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinnedBlob {
    /// One that Sluice wrote: the index lies in it, so it says nothing of its digest.
    Written,
    /// This one, which Sluice did not write; the device is its tar.
    Unmodified(BlobDigest),
    /// This one, by the table of contents that its own writer put into it.
    Toc(BlobDigest),
    /// One that Sluice wrote, or this one: the index says which. Its tree is not used.
    Either(BlobDigest),
}

impl From<&LayerAnnotations> for IndexPin {
    fn from(annotations: &LayerAnnotations) -> Self {
        IndexPin {
            digest: annotations.index_digest,
            diff_id: annotations.diff_id,
            blob_bytes: annotations.blob_bytes,
            blob: PinnedBlob::Written,
        }
    }
}

/// Checks a fetched payload against all that is said of it, and gives the bytes of the index file.
pub fn accept(payload: &[u8], pin: &IndexPin) -> Result<Bytes, LayerIndexError> {
    check_digest(payload, pin.digest)?;
    let bytes = Bytes::from(decompress_index(payload, INDEX_FILE_MAX_BYTES)?);
    let unchecked = match pin.blob {
        PinnedBlob::Written => UncheckedIndex::parse(bytes.clone())?,
        PinnedBlob::Unmodified(_) => UncheckedIndex::parse_unmodified(bytes.clone())?,
        PinnedBlob::Toc(_) => UncheckedIndex::parse_contents(bytes.clone())?,
        PinnedBlob::Either(_) => UncheckedIndex::parse_either(bytes.clone())?,
    };
    agrees(&unchecked.validate()?, pin)?;
    Ok(bytes)
}

/// Checks that a payload is the one that the manifest pins.
pub fn check_digest(payload: &[u8], expected: IndexDigest) -> Result<(), LayerIndexError> {
    let actual = IndexDigest::from_bytes(Sha256::digest(payload).into());
    if actual == expected {
        Ok(())
    } else {
        Err(LayerIndexError::Digest { expected, actual })
    }
}

fn agrees<B: AsRef<[u8]> + Send + Sync + 'static>(
    index: &Index<B>,
    pin: &IndexPin,
) -> Result<(), LayerIndexError> {
    let (expected, actual) = (pin.diff_id, index.diff_id());
    if expected != actual {
        return Err(LayerIndexError::Disagrees {
            what: "diff ID",
            expected: expected.to_string(),
            actual: actual.to_string(),
        });
    }
    let wanted = match pin.blob {
        PinnedBlob::Written | PinnedBlob::Unmodified(_) => Some(DeviceForm::Tar),
        PinnedBlob::Toc(_) => Some(DeviceForm::Contents),
        PinnedBlob::Either(_) => None,
    };
    if let Some(wanted) = wanted.filter(|wanted| *wanted != index.form()) {
        return Err(LayerIndexError::Disagrees {
            what: "that its device is",
            expected: form_name(wanted).to_owned(),
            actual: form_name(index.form()).to_owned(),
        });
    }
    match (pin.blob, index.metadata().unmodified.is_some()) {
        (PinnedBlob::Unmodified(blob) | PinnedBlob::Toc(blob), _)
        | (PinnedBlob::Either(blob), true) => {
            index.check_blob(blob, pin.blob_bytes)?;
        }
        (PinnedBlob::Written, true) => {
            return Err(LayerIndexError::Disagrees {
                what: "that it is of",
                expected: "a blob that Sluice wrote".to_owned(),
                actual: "an unmodified blob".to_owned(),
            });
        }
        (PinnedBlob::Written | PinnedBlob::Either(_), false) => {}
    }
    if !index.fits_blob(pin.blob_bytes) {
        return Err(LayerIndexError::Disagrees {
            what: "frames up to byte",
            expected: format!("{} at most", pin.blob_bytes),
            actual: index.metadata().skeleton.extent.end().to_string(),
        });
    }
    Ok(())
}

fn form_name(form: DeviceForm) -> &'static str {
    match form {
        DeviceForm::Tar => "a tar",
        DeviceForm::Contents => "the contents of a table of contents",
    }
}

/// The directory of index files.
#[derive(Debug)]
pub struct IndexFiles {
    directory: PathBuf,
    open: Mutex<HashMap<IndexDigest, Weak<LayerIndex>>>,
    /// What is mapped. The chunk map of a layer that is open keeps its file mapped without the index.
    mapped: Mutex<Vec<WeakFile>>,
    /// When an index was last handed out. A layer is in no metadata yet while its `Prepare` is being
    /// decided; this keeps its file from being swept meanwhile.
    touched: Mutex<HashMap<IndexDigest, Instant>>,
}

impl IndexFiles {
    /// Opens the directory, which is created if need be, and sweeps leftovers.
    pub fn open(directory: &Path) -> io::Result<Self> {
        durable::create_private_directory(directory)?;
        durable::sweep_temporary(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
            open: Mutex::default(),
            mapped: Mutex::default(),
            touched: Mutex::default(),
        })
    }

    /// Where the index with this digest is or would be.
    #[must_use]
    pub fn path(&self, digest: IndexDigest) -> PathBuf {
        self.directory.join(format!("{}{SUFFIX}", digest.hex()))
    }

    /// Where the windows of the index with this digest are, if this node has them.
    #[must_use]
    pub fn windows(&self, digest: IndexDigest) -> Option<PathBuf> {
        let path = self.windows_path(digest);
        path.exists().then_some(path)
    }

    fn windows_path(&self, digest: IndexDigest) -> PathBuf {
        let name = format!("{}{WINDOWS_SUFFIX}", digest.hex());
        self.directory.join(name)
    }

    /// Has the index keep these windows, a file on the same file system that is never written to again.
    pub fn keep_windows(&self, digest: IndexDigest, windows: &Path) -> io::Result<()> {
        self.touch(digest);
        match std::fs::hard_link(windows, self.windows_path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    /// Opens an index that is on disk; `None` when it is not. A file that is damaged is removed and
    /// reported as an error, so that it is fetched again.
    pub fn get(&self, digest: IndexDigest) -> Result<Option<Arc<LayerIndex>>, LayerIndexError> {
        let path = self.path(digest);
        let there = self.hold(digest);
        // What is open but lost its file would not survive a restart: it is fetched again.
        if let Some(index) = self.opened().get(&digest).and_then(Weak::upgrade)
            && there
        {
            return Ok(Some(index));
        }
        let map = match sys::map::read_only(&path) {
            Ok(map) => map,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(LayerIndexError::Io {
                    what: "map index file",
                    path,
                    source,
                });
            }
        };
        // Which kind it was to be was checked before it was stored.
        let index = match UncheckedIndex::parse_either(map).and_then(UncheckedIndex::reopen) {
            Ok(index) => Arc::new(index),
            Err(error) => {
                tracing::error!(path = %path.display(), "index file is damaged: {error}");
                let _ = std::fs::remove_file(&path);
                return Err(error.into());
            }
        };
        // Its checksums were a pass over all of it. Of a thousand layers that are open, what is used is little.
        index.source().release_pages();
        self.mapped().push(index.source().downgrade());
        let mut opened = self.opened();
        if let Some(earlier) = opened.get(&digest).and_then(Weak::upgrade) {
            return Ok(Some(earlier));
        }
        opened.retain(|_, index| index.strong_count() > 0);
        opened.insert(digest, Arc::downgrade(&index));
        Ok(Some(index))
    }

    /// Checks a payload, stores the index durably and opens it.
    pub fn put(&self, payload: &[u8], pin: &IndexPin) -> Result<Arc<LayerIndex>, LayerIndexError> {
        let digest = pin.digest;
        self.touch(digest);
        let bytes = accept(payload, pin)?;
        let path = self.path(digest);
        let io = |what| move |source| LayerIndexError::Io { what, path, source };
        durable::write(
            &self.directory,
            &format!("{}{SUFFIX}", digest.hex()),
            &bytes,
        )
        .map_err(io("write index file"))?;
        self.get(digest)?.ok_or_else(|| LayerIndexError::Io {
            what: "find index file",
            path: self.path(digest),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// As [`IndexFiles::get`], and checks that the index is the one that the manifest describes.
    pub fn get_checked(&self, pin: &IndexPin) -> Result<Option<Arc<LayerIndex>>, LayerIndexError> {
        let index = self.get(pin.digest)?;
        if let Some(index) = &index {
            agrees(index, pin)?;
        }
        Ok(index)
    }

    /// Keeps the file from being swept for the sweep's grace; says whether it is there.
    pub fn hold(&self, digest: IndexDigest) -> bool {
        self.touch(digest);
        self.path(digest).exists()
    }

    /// Removes the files that `keep` does not want, that nobody has open and that nobody asked for
    /// within `grace`.
    pub fn sweep(&self, keep: impl Fn(IndexDigest) -> bool, grace: Duration) -> io::Result<u64> {
        let mut removed = 0;
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str();
            let suffixes = [SUFFIX, WINDOWS_SUFFIX];
            let digest =
                name.and_then(|name| suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)));
            let Some(digest) = digest.and_then(|hex| IndexDigest::from_hex(hex).ok()) else {
                continue;
            };
            let touched = self.touched();
            let young = touched.get(&digest).is_some_and(|at| at.elapsed() < grace);
            let open = self
                .opened()
                .get(&digest)
                .is_some_and(|index| index.strong_count() > 0);
            if !young && !open && !keep(digest) {
                std::fs::remove_file(entry.path())?;
                removed += 1;
            }
            drop(touched);
        }
        self.touched().retain(|_, at| at.elapsed() < grace);
        Ok(removed)
    }

    /// Takes the pages of all indexes that are mapped out of this process; those in use come back as they are read.
    /// Each chunk that was ever looked up leaves some behind: the kernel maps 64 KiB around it.
    pub fn release_pages(&self) {
        let mapped: Vec<MappedFile> = {
            let mut mapped = self.mapped();
            mapped.retain(|file| file.upgrade().is_some());
            mapped.iter().filter_map(WeakFile::upgrade).collect()
        };
        mapped.iter().for_each(MappedFile::release_pages);
    }

    /// Whether somebody asked for the index within this time.
    #[must_use]
    pub fn touched_within(&self, digest: IndexDigest, time: Duration) -> bool {
        self.touched()
            .get(&digest)
            .is_some_and(|at| at.elapsed() < time)
    }

    fn touch(&self, digest: IndexDigest) {
        self.touched().insert(digest, Instant::now());
    }

    fn mapped(&self) -> std::sync::MutexGuard<'_, Vec<WeakFile>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, HashMap<IndexDigest, Weak<LayerIndex>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touched(&self) -> std::sync::MutexGuard<'_, HashMap<IndexDigest, Instant>> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sample::layer;

    #[test]
    fn the_sweep_leaves_what_is_held_or_open() {
        let directory = tempfile::tempdir().unwrap();
        let files = IndexFiles::open(directory.path()).unwrap();
        let (payload, annotations) = layer();
        let digest = annotations.index_digest;
        assert!(!files.hold(digest));
        let nobody = |_: IndexDigest| false;
        let (none, long) = (Duration::ZERO, Duration::from_secs(3600));

        let index = files.put(&payload, &(&annotations).into()).unwrap();
        assert_eq!(files.sweep(nobody, none).unwrap(), 0, "open");
        drop(index);
        assert!(files.hold(digest));
        assert_eq!(files.sweep(nobody, long).unwrap(), 0, "held");
        assert_eq!(files.sweep(|it| it == digest, none).unwrap(), 0, "wanted");
        assert_eq!(files.sweep(nobody, none).unwrap(), 1);
        assert!(!files.hold(digest));
        assert!(files.get(digest).unwrap().is_none());
    }

    /// Bytes of this process' page tables that stand in the file.
    fn resident(path: &Path) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps
            .lines()
            .skip_while(|line| !line.ends_with(path.to_str().unwrap()));
        let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    #[test]
    fn an_index_costs_what_is_read_of_it_until_its_pages_are_released() {
        let directory = tempfile::tempdir().unwrap();
        let files = IndexFiles::open(directory.path()).unwrap();
        let (payload, annotations) = layer();
        let digest = annotations.index_digest;
        let index = files.put(&payload, &(&annotations).into()).unwrap();
        let path = files.path(digest);
        assert_eq!(resident(&path), 0, "opened");
        let chunks = index.chunk_map().clone();
        drop(index);
        assert!(chunks.chunk(0).is_some());
        assert!(resident(&path) > 0, "a chunk was looked up");
        files.release_pages();
        assert_eq!(resident(&path), 0);
        let first = chunks.chunk(0);
        assert!(first.is_some() && resident(&path) > 0, "they come back");
        drop(chunks);
        files.release_pages();
        assert!(files.mapped().is_empty());
    }

    #[test]
    fn an_open_index_without_its_file_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let files = IndexFiles::open(directory.path()).unwrap();
        let (payload, annotations) = layer();
        let digest = annotations.index_digest;
        let index = files.put(&payload, &(&annotations).into()).unwrap();
        std::fs::remove_file(files.path(digest)).unwrap();
        assert!(files.get(digest).unwrap().is_none());
        let again = files.put(&payload, &(&annotations).into()).unwrap();
        assert!(files.hold(digest));
        assert_eq!(again.diff_id(), index.diff_id());
    }
}
