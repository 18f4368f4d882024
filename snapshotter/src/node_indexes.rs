// SPDX-License-Identifier: Apache-2.0
//! Indexes that nodes have made of blobs as they are: `node-indexes/<hex of the blob digest>.index` and, where the
//! index has one, `.windows`. Beside one that another node made stands `.peer`, the name of the node that gave it.
//!
//! They outlive the image: a second pull of it is lazy, also when all of its content was dropped meanwhile. What this
//! node made was made of the blob itself and checked against the image's diff ID, so it is as good as the blob; of what
//! another one made that is not known. A budget of bytes holds; what was used least recently goes first.
//!
//! An index is there when its `.index` is: all else is written before it and removed after it. A crash leaves a whole
//! index or orphans that the next trim takes. One writer at a time has a blob; the trim of another leaves it alone. All
//! calls block.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use sluice_blockindex::annotations::INDEX_MAX_BYTES;
use sluice_blockindex::digest::{BlobDigest, IndexDigest};

use crate::durable::{self, Staged};

/// Most bytes of all indexes and windows: those of about 50 GB of layers.
pub const BUDGET_BYTES: u64 = 1 << 30;

const INDEX_SUFFIX: &str = ".index";
const WINDOWS_SUFFIX: &str = ".windows";
const PEER_SUFFIX: &str = ".peer";
/// The most bytes of a name in a `.peer`.
const PEER_MAX_BYTES: usize = 253;

/// The indexes of a node.
#[derive(Debug)]
pub struct NodeIndexes {
    directory: PathBuf,
    budget_bytes: u64,
    /// Blobs whose index is being written.
    writing: Mutex<BTreeSet<BlobDigest>>,
}

/// A blob that nobody else writes an index of. Dropped, others may.
#[derive(Debug)]
struct Writing<'a>(&'a NodeIndexes, BlobDigest);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writing().remove(&self.1);
    }
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
    /// The node that gave it, if this one did not make it.
    pub from: Option<String>,
}

/// Where the parts of an index are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexParts {
    /// Its payload.
    pub payload: PathBuf,
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
            writing: Mutex::default(),
        })
    }

    fn writing(&self) -> MutexGuard<'_, BTreeSet<BlobDigest>> {
        // Every critical section leaves the set whole.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_to_write(&self, blob: BlobDigest) -> io::Result<Writing<'_>> {
        match self.writing().insert(blob) {
            true => Ok(Writing(self, blob)),
            false => Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "another index of the blob is being written",
            )),
        }
    }

    fn path(&self, blob: BlobDigest, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}{suffix}", blob.hex()))
    }

    /// Whether there is an index of this blob.
    #[must_use]
    pub fn has(&self, blob: BlobDigest) -> bool {
        self.path(blob, INDEX_SUFFIX).exists()
    }

    /// Whether there is an index of this blob that this node made.
    #[must_use]
    pub fn has_own(&self, blob: BlobDigest) -> bool {
        self.has(blob) && !self.path(blob, PEER_SUFFIX).exists()
    }

    /// Where the index of a blob is, for who passes it on; it counts as used.
    pub fn parts(&self, blob: BlobDigest) -> io::Result<Option<IndexParts>> {
        let payload = self.path(blob, INDEX_SUFFIX);
        match self.use_now(&payload) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(()) => Ok(Some(IndexParts {
                payload,
                windows: self.windows(blob),
            })),
        }
    }

    fn windows(&self, blob: BlobDigest) -> Option<PathBuf> {
        let windows = self.path(blob, WINDOWS_SUFFIX);
        windows.exists().then_some(windows)
    }

    fn use_now(&self, path: &Path) -> io::Result<()> {
        let now = fs::FileTimes::new().set_modified(SystemTime::now());
        fs::File::options().write(true).open(path)?.set_times(now)
    }

    /// The index of a blob; it counts as used.
    pub fn find(&self, blob: BlobDigest) -> io::Result<Option<NodeIndex>> {
        let path = self.path(blob, INDEX_SUFFIX);
        let payload = match fs::read(&path) {
            Ok(payload) => payload,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        self.use_now(&path)?;
        let from = match fs::read_to_string(self.path(blob, PEER_SUFFIX)) {
            Ok(from) => Some(from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Some(NodeIndex {
            digest: IndexDigest::of(&payload),
            payload: payload.into(),
            windows: self.windows(blob),
            from,
        }))
    }

    /// A file to write windows to, for [`NodeIndexes::keep_given`].
    pub fn stage(&self) -> io::Result<Staged> {
        Staged::create(&self.directory)
    }

    /// Keeps an index that this node made, then makes room: it may be the only one that stays.
    ///
    /// **Errors** of the disk; it is not kept then.
    pub fn keep(&self, blob: BlobDigest, payload: &[u8], windows: &[u8]) -> io::Result<()> {
        let staged = match windows.is_empty() {
            true => None,
            false => {
                let mut staged = self.stage()?;
                staged.push(windows)?;
                Some(staged)
            }
        };
        self.keep_from(blob, payload, staged, None)
    }

    /// As [`NodeIndexes::keep`], of an index that the node `from` gave.
    pub fn keep_given(
        &self,
        blob: BlobDigest,
        payload: &[u8],
        windows: Option<Staged>,
        from: &str,
    ) -> io::Result<()> {
        let from = from.get(..PEER_MAX_BYTES).unwrap_or(from);
        self.keep_from(blob, payload, windows, Some(from))
    }

    fn keep_from(
        &self,
        blob: BlobDigest,
        payload: &[u8],
        windows: Option<Staged>,
        from: Option<&str>,
    ) -> io::Result<()> {
        if payload.len() as u64 > INDEX_MAX_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the index is too large",
            ));
        }
        let _alone = self.begin_to_write(blob)?;
        // Of the one before nothing may stay.
        self.remove(blob)?;
        let name = |suffix: &str| format!("{}{suffix}", blob.hex());
        if let Some(windows) = windows {
            windows.commit(&self.directory, &name(WINDOWS_SUFFIX))?;
        }
        if let Some(from) = from {
            durable::write(&self.directory, &name(PEER_SUFFIX), from.as_bytes())?;
        }
        durable::write(&self.directory, &name(INDEX_SUFFIX), payload)?;
        self.trim()
    }

    /// Removes the index of a blob.
    pub fn remove(&self, blob: BlobDigest) -> io::Result<()> {
        for suffix in [INDEX_SUFFIX, WINDOWS_SUFFIX, PEER_SUFFIX] {
            match fs::remove_file(self.path(blob, suffix)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes orphans, and what was used least recently until the budget holds; nothing that is being written.
    fn trim(&self) -> io::Result<()> {
        let mut all = self.all()?;
        all.sort_by_key(|kept| (kept.whole, kept.used));
        let mut held: u64 = all.iter().map(|kept| kept.bytes).sum();
        for kept in all {
            if kept.whole && held <= self.budget_bytes {
                break;
            }
            // Also the one for which room is made.
            let Ok(_alone) = self.begin_to_write(kept.blob) else {
                continue;
            };
            self.remove(kept.blob)?;
            held -= kept.bytes;
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
    fn what_another_node_gave_is_told_from_what_this_one_made() {
        let dir = tempfile::tempdir().unwrap();
        let indexes = NodeIndexes::open(dir.path(), 1000).unwrap();
        let mut windows = indexes.stage().unwrap();
        windows.push(b"windows").unwrap();
        indexes
            .keep_given(blob(1), b"theirs", Some(windows), "node-b")
            .unwrap();
        assert!(indexes.has(blob(1)) && !indexes.has_own(blob(1)));
        let found = indexes.find(blob(1)).unwrap().unwrap();
        assert_eq!(found.from.as_deref(), Some("node-b"));
        let parts = indexes.parts(blob(1)).unwrap().unwrap();
        assert_eq!(fs::read(&parts.payload).unwrap(), b"theirs");
        assert_eq!(fs::read(parts.windows.unwrap()).unwrap(), b"windows");
        assert_eq!(indexes.parts(blob(2)).unwrap(), None);
        // Nothing of theirs stays beside what this node makes.
        indexes.keep(blob(1), b"ours", b"").unwrap();
        let found = indexes.find(blob(1)).unwrap().unwrap();
        assert_eq!((found.windows, found.from), (None, None));
        assert!(indexes.has_own(blob(1)));
        // Two writers of one index would mix their parts.
        let alone = indexes.begin_to_write(blob(1)).unwrap();
        let busy = indexes.keep(blob(1), b"others", b"").unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        drop(alone);
        indexes.keep(blob(1), b"others", b"").unwrap();
        // What is being written is no orphan of the trim of another.
        let alone = indexes.begin_to_write(blob(3)).unwrap();
        fs::write(indexes.path(blob(3), WINDOWS_SUFFIX), b"w").unwrap();
        indexes.keep(blob(4), b"four", b"").unwrap();
        assert!(indexes.path(blob(3), WINDOWS_SUFFIX).exists());
        drop(alone);
        indexes.keep(blob(4), b"four", b"").unwrap();
        assert!(!indexes.path(blob(3), WINDOWS_SUFFIX).exists());
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
