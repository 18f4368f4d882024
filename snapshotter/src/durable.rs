// SPDX-License-Identifier: Apache-2.0
//! The one way in which the daemon makes a file appear: wholly, durably, or not at all.
//!
//! Write under a temporary name in the same directory, fsync, rename, fsync the directory. A crash
//! leaves a temporary file at most, which [`sweep_temporary`] removes at the next start. Files made
//! here are never changed afterwards, so mapping them is sound. All calls block.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Begins the names of files that are not complete.
const TEMPORARY_PREFIX: &str = ".tmp-";

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A file without a name, for what nobody shall find: the kernel frees it with its last descriptor, also after a
/// crash.
///
/// **Errors** of the file system.
pub fn unnamed(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(directory)
}

/// Makes `directory/name` hold these bytes.
///
/// **Errors** of the file system; the name then is as before.
pub fn write(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_in(directory);
    let result = write_through(directory, &temporary, &directory.join(name), bytes);
    if result.is_err() {
        // After a failed rename or fsync the file is of no use; a leftover is swept at start.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// A file that is being written under a temporary name, for what does not fit in memory. Dropped, it is gone.
#[derive(Debug)]
pub struct Staged {
    file: File,
    temporary: PathBuf,
}

impl Staged {
    /// An empty one in this directory.
    ///
    /// **Errors** of the file system.
    pub fn create(directory: &Path) -> io::Result<Self> {
        let temporary = temporary_in(directory);
        let file = create_private(&temporary)?;
        Ok(Self { file, temporary })
    }

    /// Adds bytes at its end.
    ///
    /// **Errors** of the file system; it is of no use then.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Makes `directory/name` be this file, durably. The directory is the one that it was created in.
    ///
    /// **Errors** of the file system; the name then is as before.
    pub fn commit(self, directory: &Path, name: &str) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, directory.join(name))?;
        File::open(directory)?.sync_all()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a commit there is none; a leftover is swept at start.
        let _ = fs::remove_file(&self.temporary);
    }
}

fn temporary_in(directory: &Path) -> PathBuf {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    directory.join(format!("{TEMPORARY_PREFIX}{}-{number}", std::process::id()))
}

fn create_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true);
    options.mode(0o600).open(path)
}

fn write_through(directory: &Path, temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = create_private(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(temporary, path)?;
    File::open(directory)?.sync_all()
}

/// Makes a directory that only root may enter, and its parents.
pub fn create_private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Removes what an earlier process did not complete. Only before anything writes there.
pub fn sweep_temporary(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(TEMPORARY_PREFIX)
        {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_appear_whole_and_replace_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a", b"one").unwrap();
        write(dir.path(), "a", b"three").unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"three");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("taken")).unwrap();
        fs::write(dir.path().join("taken/x"), b"").unwrap();
        assert!(write(dir.path(), "taken", b"bytes").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_staged_file_appears_when_it_is_committed_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(dir.path()).unwrap().count();
        let mut staged = Staged::create(dir.path()).unwrap();
        staged.push(b"one").unwrap();
        drop(staged);
        assert_eq!(names(), 0);
        let mut staged = Staged::create(dir.path()).unwrap();
        staged.push(b"one").unwrap();
        staged.push(b" two").unwrap();
        staged.commit(dir.path(), "a").unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"one two");
        assert_eq!(names(), 1);
    }

    #[test]
    fn leftovers_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".tmp-1-1"), b"half").unwrap();
        fs::write(dir.path().join("whole"), b"").unwrap();
        sweep_temporary(dir.path()).unwrap();
        assert!(dir.path().join("whole").exists() && !dir.path().join(".tmp-1-1").exists());
    }
}
