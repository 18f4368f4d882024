// SPDX-License-Identifier: Apache-2.0
//! Deleting directory trees that somebody else has made.
//!
//! A container may nest directories as deep as it likes and fill them as it likes, so neither the stack
//! nor the number of open files may grow with the depth, nor the memory with the width. A tree is
//! emptied [`BATCH`] entries at a time, down to [`LEVELS`] levels below the graveyard; what lies deeper
//! is moved up into the graveyard, under a name of its own, and emptied in the next round. Every operation names one component relative to its directory's descriptor, and no symbolic
//! link is followed. A crash leaves entries of the graveyard, which the next reap empties as well.
//! Several reaps may work at once: what another one has taken away is done. Blocks.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Levels that are emptied in one round. Each costs a frame of the stack and a descriptor; fewer make
/// more renames, and ordinary trees are not this deep.
const LEVELS: usize = 48;

/// Entries that are listed before they are deleted: a directory that changes while it is listed may
/// hide some. More take memory on each level, fewer make more listings.
const BATCH: usize = 1024;

/// Entries that stay, and why.
type Left = Vec<(CString, Errno)>;

/// A directory whose entries are to be deleted.
#[derive(Debug)]
pub(super) struct Graveyard {
    path: PathBuf,
    /// Of the next directory that is moved up. Names of an earlier process may be taken still.
    next_name: AtomicU64,
}

impl Graveyard {
    /// The directory exists, on the file system of what is buried in it.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            next_name: AtomicU64::new(1),
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes all that is in it; gives how many of its entries could not be deleted.
    pub(super) fn empty(&self) -> io::Result<usize> {
        let path = CString::new(self.path.as_os_str().as_encoded_bytes())?;
        loop {
            let (graveyard, mut listing) = (open(None, &path)?, open(None, &path)?);
            let mut moved_up = 0;
            let left = self.clear(&graveyard, &mut listing, 0, &mut moved_up)?;
            if moved_up > 0 {
                continue;
            }
            for (name, error) in &left {
                let path = self.path.join(&*name.to_string_lossy());
                tracing::warn!(?path, %error, "snapshot directory is not deleted");
            }
            return Ok(left.len());
        }
    }

    /// Deletes what is in a directory of this level, as far as that is possible.
    fn clear(
        &self,
        graveyard: &Dir,
        directory: &mut Dir,
        level: usize,
        moved_up: &mut u64,
    ) -> nix::Result<Left> {
        loop {
            let batch = entries(directory)?;
            let count = batch.len();
            let mut left = Left::new();
            for (name, kind) in batch {
                if let Err(error) = self.remove(graveyard, directory, &name, kind, level, moved_up)
                {
                    left.push((name, error));
                }
            }
            if count < BATCH || left.len() == count {
                return Ok(left);
            }
        }
    }

    /// Deletes one entry of `parent`, or moves it up.
    fn remove(
        &self,
        graveyard: &Dir,
        parent: &Dir,
        name: &CStr,
        kind: Option<Type>,
        level: usize,
        moved_up: &mut u64,
    ) -> nix::Result<()> {
        if !matches!(kind, None | Some(Type::Directory)) {
            return gone_is_done(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir));
        }
        if level >= LEVELS {
            return self.move_up(graveyard, parent, name, moved_up);
        }
        let mut directory = match open(Some(parent), name) {
            Ok(directory) => directory,
            Err(Errno::ENOENT) => return Ok(()),
            // The listing did not tell: it is no directory.
            Err(Errno::ENOTDIR | Errno::ELOOP) if kind.is_none() => {
                return gone_is_done(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir));
            }
            Err(error) => return Err(error),
        };
        let left = self.clear(graveyard, &mut directory, level + 1, moved_up)?;
        if let Some((_, error)) = left.first() {
            return Err(*error);
        }
        gone_is_done(unlinkat(parent, name, UnlinkatFlags::RemoveDir))
    }

    fn move_up(
        &self,
        graveyard: &Dir,
        parent: &Dir,
        name: &CStr,
        moved_up: &mut u64,
    ) -> nix::Result<()> {
        loop {
            let number = self.next_name.fetch_add(1, Ordering::Relaxed);
            let fresh = format!("deep-{}-{number}", std::process::id());
            match renameat(parent.as_fd(), name, graveyard.as_fd(), fresh.as_str()) {
                Ok(()) => {
                    *moved_up += 1;
                    return Ok(());
                }
                // An empty directory of that name would have been replaced, as it should be.
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => continue,
                result => return gone_is_done(result),
            }
        }
    }
}

fn open(parent: Option<&Dir>, name: &CStr) -> nix::Result<Dir> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match parent {
        Some(parent) => Dir::openat(parent.as_fd(), name, flags, Mode::empty()),
        None => Dir::open(name, flags, Mode::empty()),
    }
}

/// The first entries of a directory.
fn entries(directory: &mut Dir) -> nix::Result<Vec<(CString, Option<Type>)>> {
    directory
        .iter()
        .map(|entry| entry.map(|entry| (entry.file_name().to_owned(), entry.file_type())))
        .filter(|entry| !matches!(entry, Ok((name, _)) if **name == *c"." || **name == *c".."))
        .take(BATCH)
        .collect()
}

fn gone_is_done(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::mkdirat;

    use super::*;

    /// In memory where possible: a busy disk takes a minute for what is made here.
    fn directory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
    }

    /// `top/d/d/d/…`, made without a path of that length.
    fn nest(top: &Path, levels: usize) {
        std::fs::create_dir(top).unwrap();
        let mut here = Dir::open(top, OFlag::O_RDONLY, Mode::empty()).unwrap();
        for level in 0..levels {
            mkdirat(&here, "d", Mode::S_IRWXU).unwrap();
            if level % 1000 == 0 {
                mkdirat(&here, "beside", Mode::S_IRWXU).unwrap();
            }
            here = Dir::openat(&here, "d", OFlag::O_RDONLY, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn any_depth_is_deleted_on_a_small_stack() {
        let root = directory();
        let graveyard = Graveyard::new(root.path().to_owned());
        nest(&root.path().join("deep"), 20_000);
        // What a crash between two rounds has left, and a name that is taken.
        let taken = format!("deep-{}-1", std::process::id());
        nest(&root.path().join(taken), 3);
        let emptied = std::thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || graveyard.empty().unwrap());
        assert_eq!(emptied.unwrap().join().unwrap(), 0);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn all_kinds_of_entries_go_and_links_are_not_followed() {
        let (root, other) = (directory(), directory());
        std::fs::write(other.path().join("kept"), b"x").unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir_all(at("a/b/c")).unwrap();
        std::fs::write(at("a/b/file"), b"x").unwrap();
        std::fs::write(at("file"), b"x").unwrap();
        symlink(other.path(), at("a/link")).unwrap();
        symlink(other.path(), at("link")).unwrap();
        let graveyard = Graveyard::new(root.path().to_owned());
        for _ in 0..2 {
            assert_eq!(graveyard.empty().unwrap(), 0);
        }
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(other.path().join("kept").exists());
    }

    #[test]
    fn wide_directories_go_in_batches() {
        let root = directory();
        let wide = root.path().join("wide");
        std::fs::create_dir(&wide).unwrap();
        for number in 0..BATCH * 2 + 5 {
            std::fs::write(wide.join(number.to_string()), b"").unwrap();
            std::fs::create_dir(root.path().join(format!("d{number}"))).unwrap();
        }
        let graveyard = Graveyard::new(root.path().to_owned());
        assert_eq!(graveyard.empty().unwrap(), 0);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn reaps_at_the_same_time_leave_nothing() {
        let root = directory();
        for name in ["one", "two"] {
            nest(&root.path().join(name), 500);
        }
        let graveyard = Graveyard::new(root.path().to_owned());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| graveyard.empty().unwrap());
            }
        });
        assert_eq!(graveyard.empty().unwrap(), 0);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
