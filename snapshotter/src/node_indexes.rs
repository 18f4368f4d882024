// SPDX-License-Identifier: Apache-2.0
//! Indexes that this node has made of blobs as they are: `node-indexes/<hex of the blob digest>.index` and, where the
//! index has one, `.windows`.
//!
//! They outlive the image: a second pull of it is lazy, also when all of its content was dropped meanwhile. What is here
//! was made of the blob itself and checked against the image's diff ID, so it is as good as the blob. A budget of bytes
//! holds; what was used least recently goes first.
//!
//! An index is there when its `.index` is: windows are written before it and removed after it. A crash leaves a whole
//! pair or an orphan that the next trim takes. All calls block.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use sluice_blockindex::annotations::INDEX_MAX_BYTES;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};

use crate::durable;

/// Most bytes of all indexes and windows: those of about 50 GB of layers.
pub const BUDGET_BYTES: u64 = 1 << 30;

const INDEX_SUFFIX: &str = ".index";
const WINDOWS_SUFFIX: &str = ".windows";

/// The indexes of a node.
#[derive(Debug)]
pub struct NodeIndexes {
    directory: PathBuf,
    budget_bytes: u64,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIndex {
    /// The index as it is stored and sent: compressed.
    pub payload: Bytes,
    /// sha256 of it.
    pub digest: IndexDigest,
    /// The file of windows, where there is one.
    pub windows: Option<PathBuf>,
}

/// A file here, with what a trim wants to know.
struct Kept {
    blob: BlobDigest,
    bytes: u64,
    used: SystemTime,
    whole: bool,
}

impl NodeIndexes {
    /// Opens the directory, which is created if need be, and sweeps leftovers.
    pub fn open(directory: &Path, budget_bytes: u64) -> io::Result<Self> {
        durable::create_private_directory(directory)?;
        durable::sweep_temporary(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
            budget_bytes,
        })
    }

    fn path(&self, blob: BlobDigest, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}{suffix}", blob.hex()))
    }

    /// Whether there is an index of this blob.
    #[must_use]
    pub fn has(&self, blob: BlobDigest) -> bool {
        self.path(blob, INDEX_SUFFIX).exists()
    }

    /// The index of a blob; it counts as used.
    pub fn find(&self, blob: BlobDigest) -> io::Result<Option<NodeIndex>> {
        let path = self.path(blob, INDEX_SUFFIX);
        let payload = match fs::read(&path) {
            Ok(payload) => payload,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let now = fs::FileTimes::new().set_modified(SystemTime::now());
        fs::File::options()
            .write(true)
            .open(&path)?
            .set_times(now)?;
        let windows = self.path(blob, WINDOWS_SUFFIX);
        Ok(Some(NodeIndex {
            digest: IndexDigest::of(&payload),
            payload: payload.into(),
            windows: windows.exists().then_some(windows),
        }))
    }

    /// Keeps an index, then makes room: it may be the only one that stays.
    ///
    /// **Errors** of the disk; it is not kept then.
    pub fn keep(&self, blob: BlobDigest, payload: &[u8], windows: &[u8]) -> io::Result<()> {
        if payload.len() as u64 > INDEX_MAX_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the index is too large",
            ));
        }
        let name = |suffix: &str| format!("{}{suffix}", blob.hex());
        if !windows.is_empty() {
            durable::write(&self.directory, &name(WINDOWS_SUFFIX), windows)?;
        }
        durable::write(&self.directory, &name(INDEX_SUFFIX), payload)?;
        self.trim(Some(blob))
    }

    /// Removes the index of a blob.
    pub fn remove(&self, blob: BlobDigest) -> io::Result<()> {
        for suffix in [INDEX_SUFFIX, WINDOWS_SUFFIX] {
            match fs::remove_file(self.path(blob, suffix)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes orphans, and what was used least recently until the budget holds; not `spared`.
    fn trim(&self, spared: Option<BlobDigest>) -> io::Result<()> {
        let mut all = self.all()?;
        all.sort_by_key(|kept| (kept.whole, kept.used));
        let mut held: u64 = all.iter().map(|kept| kept.bytes).sum();
        for kept in all {
            if kept.whole && held <= self.budget_bytes {
                break;
            }
            if spared != Some(kept.blob) {
                self.remove(kept.blob)?;
                held -= kept.bytes;
            }
        }
        Ok(())
    }

    fn all(&self) -> io::Result<Vec<Kept>> {
        let mut all = std::collections::BTreeMap::<BlobDigest, Kept>::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((hex, suffix)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            let Ok(blob) = BlobDigest::from_hex(hex) else {
                continue;
            };
            let metadata = entry.metadata()?;
            let kept = all.entry(blob).or_insert(Kept {
                blob,
                bytes: 0,
                used: SystemTime::UNIX_EPOCH,
                whole: false,
            });
            kept.bytes += metadata.len();
            if suffix == &INDEX_SUFFIX[1..] {
                kept.whole = true;
                kept.used = metadata.modified()?;
            }
        }
        Ok(all.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn blob(number: u8) -> BlobDigest {
        BlobDigest::of(&[number])
    }

    #[test]
    fn what_is_kept_is_found_with_its_windows() {
        let dir = tempfile::tempdir().unwrap();
        let indexes = NodeIndexes::open(dir.path(), 1000).unwrap();
        assert_eq!(indexes.find(blob(1)).unwrap(), None);
        indexes.keep(blob(1), b"one", b"windows").unwrap();
        indexes.keep(blob(2), b"two", b"").unwrap();
        let found = indexes.find(blob(1)).unwrap().unwrap();
        assert_eq!(
            (&found.payload[..], found.digest),
            (&b"one"[..], IndexDigest::of(b"one"))
        );
        assert_eq!(fs::read(found.windows.unwrap()).unwrap(), b"windows");
        assert_eq!(indexes.find(blob(2)).unwrap().unwrap().windows, None);
        indexes.remove(blob(1)).unwrap();
        indexes.remove(blob(1)).unwrap();
        assert!(!indexes.has(blob(1)) && indexes.has(blob(2)));
    }

    #[test]
    fn what_was_used_least_recently_goes_first_and_orphans_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let indexes = NodeIndexes::open(dir.path(), 40).unwrap();
        let age = |number: u8, seconds: u64| {
            let at = SystemTime::now() - Duration::from_secs(seconds);
            let file = fs::File::options()
                .write(true)
                .open(indexes.path(blob(number), INDEX_SUFFIX))
                .unwrap();
            file.set_times(fs::FileTimes::new().set_modified(at))
                .unwrap();
        };
        for number in 1..=3 {
            indexes
                .keep(blob(number), &[number; 5], &[number; 5])
                .unwrap();
            age(number, 100 - u64::from(number));
        }
        // The first is used again; a crash left windows alone; the fourth does not fit.
        assert!(indexes.find(blob(1)).unwrap().is_some());
        fs::write(indexes.path(blob(9), WINDOWS_SUFFIX), [9; 5]).unwrap();
        indexes.keep(blob(4), &[4; 10], &[4; 5]).unwrap();
        assert!(!indexes.path(blob(9), WINDOWS_SUFFIX).exists());
        let there = [1, 2, 3, 4].map(|number| indexes.has(blob(number)));
        assert_eq!(there, [true, false, true, true]);
        // Alone above the budget, it stays.
        indexes.keep(blob(5), &[5; 100], &[]).unwrap();
        let there = [1, 3, 4, 5].map(|number| indexes.has(blob(number)));
        assert_eq!(there, [false, false, false, true]);
    }
}
