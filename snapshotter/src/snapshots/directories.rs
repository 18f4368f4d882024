// SPDX-License-Identifier: Apache-2.0
//! The directories of ordinary snapshots: `snapshots/<id>/{fs,work}` and the graveyard.
//!
//! A directory appears under its id by a rename when it is complete, and disappears from there by
//! a rename into the graveyard, where it is deleted at leisure; what a crash leaves in the
//! graveyard the next reap deletes. An id that is being created is *under way* until its
//! [`UnderWay`] is dropped: the reaper leaves such a directory alone although no row names it yet.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::graveyard::Graveyard;
use super::id_map::Owner;
use super::{SnapshotError, SnapshotId, SnapshotKind};

type Result<T> = std::result::Result<T, SnapshotError>;

/// The snapshot directories of one root.
#[derive(Debug, Clone)]
pub struct SnapshotDirectories {
    snapshots: PathBuf,
    graveyard: Arc<Graveyard>,
    /// Locked for a few instructions only, never while anything waits.
    under_way: Arc<Mutex<BTreeSet<SnapshotId>>>,
}

/// Holds an id's directory against the reaper.
#[derive(Debug)]
pub(super) struct UnderWay {
    id: SnapshotId,
    set: Arc<Mutex<BTreeSet<SnapshotId>>>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.set
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.id);
    }
}

impl SnapshotDirectories {
    /// Makes the two directories below `root` if they are missing.
    ///
    /// **Errors**: also when the file system does not tell file types in directory listings, which
    /// overlayfs needs.
    pub fn open(root: &Path) -> Result<Self> {
        let directories = Self {
            snapshots: root.join("snapshots"),
            graveyard: Arc::new(Graveyard::new(root.join("graveyard"))),
            under_way: Arc::default(),
        };
        for path in [&*directories.snapshots, directories.graveyard.path()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(SnapshotError::directory("create directory", path))?;
        }
        directories.check_file_types(root)?;
        Ok(directories)
    }

    fn check_file_types(&self, root: &Path) -> Result<()> {
        let listing = nix::dir::Dir::open(
            root,
            nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_DIRECTORY,
            nix::sys::stat::Mode::empty(),
        );
        let listing = listing
            .map_err(io::Error::from)
            .map_err(SnapshotError::directory("list directory", root))?;
        for entry in listing {
            let entry = entry
                .map_err(io::Error::from)
                .map_err(SnapshotError::directory("list directory", root))?;
            if entry.file_name() == c"snapshots" && entry.file_type().is_none() {
                let no_types = io::Error::other(
                    "the file system has no file types in listings (d_type), overlayfs needs them",
                );
                return Err(SnapshotError::directory("use directory", root)(no_types));
            }
        }
        Ok(())
    }

    /// The files of a snapshot: upper directory while active, lower once committed.
    pub fn fs(&self, id: SnapshotId) -> PathBuf {
        self.directory(id).join("fs")
    }

    /// overlayfs's work directory of an active snapshot.
    pub fn work(&self, id: SnapshotId) -> PathBuf {
        self.directory(id).join("work")
    }

    fn directory(&self, id: SnapshotId) -> PathBuf {
        self.snapshots.join(id.to_string())
    }

    /// Keeps the reaper from this id until the result is dropped.
    pub(super) fn under_way(&self, id: SnapshotId) -> UnderWay {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id);
        UnderWay {
            id,
            set: Arc::clone(&self.under_way),
        }
    }

    /// Makes the directory of a snapshot, durably. The caller holds its [`UnderWay`].
    pub(super) fn create(
        &self,
        id: SnapshotId,
        kind: SnapshotKind,
        owner: Option<Owner>,
    ) -> Result<()> {
        let unnamed = self.snapshots.join(format!("new-{id}"));
        let make = |path: &Path, mode: u32| {
            fs::create_dir(path)
                // Not by mkdir(2), whose mode is cut by the umask.
                .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
                .map_err(SnapshotError::directory("create directory", path))
        };
        make(&unnamed, 0o700)?;
        make(&unnamed.join("fs"), 0o755)?;
        if kind == SnapshotKind::Active {
            make(&unnamed.join("work"), 0o711)?;
        }
        if let Some(owner) = owner {
            chown(&unnamed.join("fs"), owner)?;
        }
        let named = self.directory(id);
        fs::rename(&unnamed, &named).map_err(SnapshotError::directory("rename to", &named))?;
        File::open(&self.snapshots)
            .and_then(|directory| directory.sync_all())
            .map_err(SnapshotError::directory("sync directory", &self.snapshots))
    }

    /// Gives a snapshot's root to this owner.
    pub(super) fn set_owner(&self, id: SnapshotId, owner: Owner) -> Result<()> {
        chown(&self.fs(id), owner)
    }

    /// Moves every directory that is neither in `known` nor under way into the graveyard. `known`
    /// is asked for after the listing, so that what was stored meanwhile counts.
    pub(super) fn bury<E>(
        &self,
        known: impl FnOnce() -> std::result::Result<BTreeSet<SnapshotId>, E>,
    ) -> std::result::Result<usize, E>
    where
        E: From<SnapshotError>,
    {
        let listed = self.list()?;
        // In this order: an id leaves `under_way` only after its row is stored or its directory
        // is given up, so a listed directory in neither set is nobody's.
        let under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let known = known()?;
        let mut buried = 0;
        for name in listed {
            let id = id_of(&name);
            if id.is_some_and(|id| known.contains(&id) || under_way.contains(&id)) {
                continue;
            }
            let from = self.snapshots.join(&name);
            match fs::rename(&from, self.graveyard.path().join(&name)) {
                Ok(()) => buried += 1,
                // Another reap was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                Err(error) => {
                    return Err(SnapshotError::directory("bury directory", from)(error).into());
                }
            }
        }
        Ok(buried)
    }

    /// Deletes what is in the graveyard; answers how many directories could not be deleted.
    pub(super) fn empty_graveyard(&self) -> Result<usize> {
        self.graveyard.empty().map_err(SnapshotError::directory(
            "empty directory",
            self.graveyard.path(),
        ))
    }

    /// The highest id that a directory has.
    pub(super) fn highest_id(&self) -> Result<Option<SnapshotId>> {
        Ok(self.list()?.iter().filter_map(|name| id_of(name)).max())
    }

    /// Those of the ids that have no directory.
    pub(super) fn missing(&self, ids: &BTreeSet<SnapshotId>) -> Vec<SnapshotId> {
        ids.iter()
            .copied()
            .filter(|id| !self.fs(*id).is_dir())
            .collect()
    }

    fn list(&self) -> Result<Vec<String>> {
        let list = || {
            fs::read_dir(&self.snapshots)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<_>>>()
        };
        list().map_err(SnapshotError::directory("list directory", &self.snapshots))
    }
}

/// The id that a directory belongs to, complete or still unnamed.
fn id_of(name: &str) -> Option<SnapshotId> {
    let digits = name.strip_prefix("new-").unwrap_or(name);
    digits
        .parse()
        .ok()
        .filter(|id: &u64| id.to_string() == digits)
        .map(SnapshotId)
}

/// The owner of a directory.
pub(super) fn owner_of(path: &Path) -> Result<Owner> {
    let metadata = fs::metadata(path).map_err(SnapshotError::directory("stat", path))?;
    Ok(Owner {
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

fn chown(path: &Path, owner: Owner) -> Result<()> {
    std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid))
        .map_err(SnapshotError::directory("change owner of", path))
}
