// SPDX-License-Identifier: Apache-2.0
//! Deleting directory trees that somebody else has made.
//!
//! A container may nest directories as deep as it likes, so neither the stack nor the number of open
//! files may grow with the depth. A tree is emptied down to [`LEVELS`] levels below the graveyard;
//! what lies deeper is moved up into the graveyard, under a name of its own, and emptied in the next
//! round. Every operation names one component relative to its directory's descriptor, and no symbolic
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

/// A directory whose entries are to be deleted.
#[derive(Debug)]
pub(super) struct Graveyard {
    path: PathBuf,
    /// Of the next directory that is moved up. Names of an earlier process may be taken still.
    next_name: AtomicU64,
}

/// What one round did.
#[derive(Debug, Default)]
struct Round {
    moved_up: u64,
    /// Entries of the graveyard that stay, and why.
    failed: Vec<(CString, Errno)>,
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
        loop {
            let round = self.round()?;
            if round.moved_up > 0 {
                continue;
            }
            for (name, error) in &round.failed {
                let path = self.path.join(&*name.to_string_lossy());
                tracing::warn!(?path, %error, "snapshot directory is not deleted");
            }
            return Ok(round.failed.len());
        }
    }

    fn round(&self) -> io::Result<Round> {
        let mut round = Round::default();
        let mut graveyard = open(
            None,
            &CString::new(self.path.as_os_str().as_encoded_bytes())?,
        )?;
        for (name, kind) in entries(&mut graveyard)? {
            if let Err(error) = self.remove(&graveyard, &graveyard, &name, kind, 0, &mut round) {
                round.failed.push((name, error));
            }
        }
        Ok(round)
    }

    /// Deletes one entry of `parent`, or moves it up. Goes on after a failure and gives the first.
    fn remove(
        &self,
        graveyard: &Dir,
        parent: &Dir,
        name: &CStr,
        kind: Option<Type>,
        level: usize,
        round: &mut Round,
    ) -> nix::Result<()> {
        if !matches!(kind, None | Some(Type::Directory)) {
            return gone_is_done(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir));
        }
        if level >= LEVELS {
            return self.move_up(graveyard, parent, name, round);
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
        let mut result = Ok(());
        for (child, kind) in entries(&mut directory)? {
            let removed = self.remove(graveyard, &directory, &child, kind, level + 1, round);
            result = result.and(removed);
        }
        result?;
        match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
            // Another reap moves into the graveyard what it finds deep in the tree; and a process
            // that still stands in it may write. The next reap comes back.
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(()),
            removed => gone_is_done(removed),
        }
    }

    fn move_up(
        &self,
        graveyard: &Dir,
        parent: &Dir,
        name: &CStr,
        round: &mut Round,
    ) -> nix::Result<()> {
        loop {
            let number = self.next_name.fetch_add(1, Ordering::Relaxed);
            let fresh = format!("deep-{}-{number}", std::process::id());
            match renameat(parent.as_fd(), name, graveyard.as_fd(), fresh.as_str()) {
                Ok(()) => {
                    round.moved_up += 1;
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

/// What is in a directory. Listed before anything is deleted: a directory that changes while it is
/// listed may hide entries.
fn entries(directory: &mut Dir) -> nix::Result<Vec<(CString, Option<Type>)>> {
    directory
        .iter()
        .map(|entry| entry.map(|entry| (entry.file_name().to_owned(), entry.file_type())))
        .filter(|entry| !matches!(entry, Ok((name, _)) if **name == *c"." || **name == *c".."))
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
        let root = tempfile::tempdir().unwrap();
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
        let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
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
    fn reaps_at_the_same_time_leave_nothing() {
        let root = tempfile::tempdir().unwrap();
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
