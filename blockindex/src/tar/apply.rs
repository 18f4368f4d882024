// SPDX-License-Identifier: Apache-2.0
//! What the entries of a tar make of a tree, as containerd's archive apply does it for overlayfs.
//!
//! **Source**: the behaviour of containerd `pkg/archive` (apply, whiteout conversion for overlay,
//! link, times) and continuity `fs.RootPath`. The rules, in the order in which they are applied:
//!
//! 1. The name is cleaned by its letters; what becomes the root itself is ignored, with its
//!    attributes. Parents are resolved through the layer's symlinks inside the root; missing ones
//!    become implicit directories; a parent that is no directory is refused.
//! 2. `.wh..wh..opq` makes its parent opaque. `.wh.NAME` becomes a whiteout; over an entry of the
//!    same layer that is refused. (Other names after `.wh..wh.` could only hide `.wh.*`, which no
//!    layer can have, and are ignored.)
//! 3. What exists is removed with all below it, unless both are directories: those merge, the later
//!    attributes win, xattrs add up.
//! 4. A hard link joins the inode at its target in this layer and gives it the link's own
//!    attributes.
//! 5. `trusted.*` xattrs are dropped, and `user.*` ones of what is neither file nor directory.
//! 6. Times before 1970 and after 2262 become 1970. At the end each directory entry sets the time of
//!    whatever its path then names.

use crate::extent::{DeviceSpace, Extent};
use crate::tree::{DeviceNumber, FileRun, Inode, InodeId, InodeKind, Timestamp, Tree};
use crate::units::BLOCK_BYTES;

use super::budget::Budget;
use super::path::{PATH_MAX_BYTES, clean, length, resolve};
use super::{NotLazy, shown};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Largest xattr value that Linux takes (`XATTR_SIZE_MAX`), less one: EROFS keeps it in 16 bits.
const XATTR_VALUE_MAX_BYTES: usize = 65_535;
/// Largest xattr name that Linux takes (`XATTR_NAME_MAX`).
const XATTR_NAME_MAX_BYTES: usize = 255;
/// The last second of which containerd keeps the time: 2^63 nanoseconds after 1970.
const LATEST: Timestamp = Timestamp {
    seconds: 9_223_372_036,
    nanoseconds: 854_775_807,
};

/// An entry with all that its header and records say.
#[derive(Debug)]
pub struct Entry {
    /// Type flag, `0` for all that stand for regular files.
    pub kind: u8,
    /// Path as it is written.
    pub name: Vec<u8>,
    /// Target of a link.
    pub link_name: Vec<u8>,
    /// Bytes of the content, if this type has one.
    pub size: i64,
    /// Permissions, with whatever other bits there are.
    pub mode: i64,
    /// User.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Time of modification.
    pub mtime: Timestamp,
    /// Major device number.
    pub major: i64,
    /// Minor device number.
    pub minor: i64,
    /// Extended attributes: name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether its content is the parts of a sparse file.
    pub sparse: bool,
    /// Whether it says what no field here holds and others may look at: times of access or change, or the
    /// size of what has no content.
    pub other_fields: bool,
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    /// A regular file, whose content is its run.
    File,
    /// Anything else; a content that the entry may have belongs to nobody.
    Other,
}

/// The tree so far.
#[derive(Debug, Default)]
pub(crate) struct Apply {
    tree: Tree,
    /// Path and time of each directory entry, for rule 6.
    directories: Vec<(Box<[u8]>, Timestamp)>,
    pub(super) budget: Budget,
    /// Whether the path of the entry applied last had an entry before.
    pub(super) again: bool,
    root_is_named: bool,
}

impl Apply {
    /// Applies one entry, whose content stands at `content`.
    pub(crate) fn entry(
        &mut self,
        entry: &Entry,
        content: Extent<DeviceSpace>,
    ) -> Result<Applied, NotLazy> {
        let path = || shown(&entry.name);
        self.budget.entry()?;
        self.again = false;
        if entry.sparse {
            return Err(NotLazy::Sparse { path: path() });
        }
        let components = clean(&entry.name);
        if length(&components) > PATH_MAX_BYTES {
            return Err(NotLazy::PathTooLong { path: path() });
        }
        let Some((name, parents)) = components.split_last() else {
            self.again = std::mem::replace(&mut self.root_is_named, true);
            return Ok(Applied::Other);
        };
        let directory = self.parent(parents, entry)?;
        if *name == OPAQUE_NAME {
            self.again = self.tree.inode(directory).is_opaque();
            self.tree.inode_mut(directory).set_opaque();
            return Ok(Applied::Other);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            self.whiteout(directory, hidden, entry)?;
            return Ok(Applied::Other);
        }
        let existing = self.tree.child(directory, name);
        self.again = existing.is_some_and(|existing| !self.tree.inode(existing).implicit);
        let merges = entry.kind == b'5'
            && existing.is_some_and(|existing| self.tree.inode(existing).is_directory());
        let kind = match entry.kind {
            b'1' => {
                self.tree.remove(directory, name);
                let target = self.link_target(entry)?;
                self.put(directory, name, target, entry)?;
                self.set_attributes(target, entry)?;
                return Ok(Applied::Other);
            }
            b'0' => InodeKind::Regular {
                size_bytes: content.len(),
                extent: (!content.is_empty()).then_some(FileRun {
                    device: 1,
                    start_block: content.start() / BLOCK_BYTES,
                }),
            },
            b'2' => {
                self.budget.tree_bytes.take(entry.link_name.len())?;
                symlink(entry)?
            }
            b'3' => InodeKind::CharDevice(device_number(entry)?),
            b'4' => InodeKind::BlockDevice(device_number(entry)?),
            b'5' => InodeKind::Directory,
            b'6' => InodeKind::Fifo,
            kind => {
                return Err(NotLazy::EntryType {
                    path: path(),
                    kind: kind.into(),
                });
            }
        };
        let file = matches!(kind, InodeKind::Regular { .. });
        let id = match existing.filter(|_| merges) {
            Some(existing) => {
                self.tree.inode_mut(existing).implicit = false;
                existing
            }
            None => {
                let id = self.tree.add(Inode::new(kind)).map_err(tree_error)?;
                self.put(directory, name, id, entry)?;
                id
            }
        };
        self.set_attributes(id, entry)?;
        if entry.kind == b'5' {
            let path = components.join(&b'/');
            self.budget.tree_bytes.take(path.len())?;
            self.directories.push((path.into(), bounded(entry.mtime)));
        }
        Ok(if file { Applied::File } else { Applied::Other })
    }

    /// The tree, once all entries were applied.
    pub(crate) fn finish(mut self) -> Result<Tree, NotLazy> {
        for (path, mtime) in std::mem::take(&mut self.directories) {
            let components: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
            let resolved = resolve(&self.tree, &components, &mut self.budget.steps)?;
            let id = self.lookup(&resolved);
            let id = id.ok_or_else(|| NotLazy::DirectoryGone { path: shown(&path) })?;
            self.tree.inode_mut(id).mtime = mtime;
        }
        Ok(self.tree)
    }

    fn lookup(&self, path: &[Vec<u8>]) -> Option<InodeId> {
        self.tree.lookup(path.iter().map(Vec::as_slice))
    }

    /// The directory that holds the entry; it and those above it are made where they are missing.
    fn parent(&mut self, parents: &[&[u8]], entry: &Entry) -> Result<InodeId, NotLazy> {
        // Most entries stand where nothing is a symlink and all exists.
        let mut at = self.tree.root();
        let plain = parents.iter().all(|name| match self.tree.child(at, name) {
            Some(child) => {
                at = child;
                self.tree.inode(child).is_directory()
            }
            None => false,
        });
        if plain {
            return Ok(at);
        }
        let mut at = self.tree.root();
        for name in resolve(&self.tree, parents, &mut self.budget.steps)? {
            at = match self.tree.child(at, &name) {
                Some(child) if self.tree.inode(child).is_directory() => child,
                Some(_) => {
                    return Err(NotLazy::ParentNotDirectory {
                        path: shown(&entry.name),
                    });
                }
                None => {
                    self.budget.entries.take(1)?;
                    let id = self
                        .tree
                        .add(Inode::implicit_directory())
                        .map_err(tree_error)?;
                    self.put(at, &name, id, entry)?;
                    id
                }
            };
        }
        Ok(at)
    }

    fn put(
        &mut self,
        directory: InodeId,
        name: &[u8],
        id: InodeId,
        entry: &Entry,
    ) -> Result<(), NotLazy> {
        self.budget.tree_bytes.take(name.len())?;
        match self.tree.insert(directory, name, id) {
            Ok(_) => Ok(()),
            Err(_) => Err(NotLazy::Name {
                path: shown(&entry.name),
            }),
        }
    }

    fn whiteout(
        &mut self,
        directory: InodeId,
        hidden: &[u8],
        entry: &Entry,
    ) -> Result<(), NotLazy> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(NotLazy::Whiteout {
                path: shown(&entry.name),
            });
        }
        if hidden.starts_with(WHITEOUT_PREFIX) {
            return Ok(());
        }
        match self.tree.child(directory, hidden) {
            Some(existing) if self.tree.inode(existing).is_whiteout() => {
                self.again = true;
                Ok(())
            }
            Some(_) => Err(NotLazy::WhiteoutOfOwn {
                path: shown(&entry.name),
            }),
            None => {
                let id = self.tree.add(Inode::whiteout()).map_err(tree_error)?;
                self.put(directory, hidden, id, entry)
            }
        }
    }

    fn link_target(&mut self, entry: &Entry) -> Result<InodeId, NotLazy> {
        let error = || NotLazy::HardLinkTarget {
            path: shown(&entry.name),
            target: shown(&entry.link_name),
        };
        if entry.link_name.len() > PATH_MAX_BYTES {
            return Err(error());
        }
        let components: Vec<&[u8]> = entry.link_name.split(|byte| *byte == b'/').collect();
        let (base, parents) = components.split_last().ok_or_else(error)?;
        if matches!(*base, b"" | b"." | b"..") {
            return Err(error());
        }
        let mut target = resolve(&self.tree, parents, &mut self.budget.steps)?;
        target.push(base.to_vec());
        self.lookup(&target)
            .filter(|id| {
                let inode = self.tree.inode(*id);
                !inode.is_directory() && !inode.is_whiteout()
            })
            .ok_or_else(error)
    }

    fn set_attributes(&mut self, id: InodeId, entry: &Entry) -> Result<(), NotLazy> {
        let owner = |id: i64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        let (Some(uid), Some(gid)) = (owner(entry.uid), owner(entry.gid)) else {
            return Err(NotLazy::Owner {
                path: shown(&entry.name),
                uid: entry.uid,
                gid: entry.gid,
            });
        };
        let inode = self.tree.inode_mut(id);
        inode.uid = uid;
        inode.gid = gid;
        inode.mtime = bounded(entry.mtime);
        // Masked to 12 bits, so it fits.
        let permissions = u16::try_from(entry.mode & 0o7777).unwrap_or_default();
        inode.permissions = if matches!(inode.kind, InodeKind::Symlink(_)) {
            0o777
        } else {
            permissions
        };
        let takes_user = matches!(inode.kind, InodeKind::Regular { .. } | InodeKind::Directory);
        for (name, value) in &entry.xattrs {
            if name.starts_with(b"trusted.") || (name.starts_with(b"user.") && !takes_user) {
                continue;
            }
            let held = [&b"user."[..], b"security."].iter().any(|prefix| {
                name.strip_prefix(*prefix)
                    .is_some_and(|suffix| !suffix.is_empty())
            });
            if !held || name.len() > XATTR_NAME_MAX_BYTES || value.len() > XATTR_VALUE_MAX_BYTES {
                return Err(NotLazy::Xattr {
                    path: shown(&entry.name),
                    name: shown(name),
                    bytes: value.len(),
                });
            }
            self.budget.tree_bytes.take(name.len() + value.len())?;
            inode
                .xattrs
                .insert(name.as_slice().into(), value.as_slice().into());
        }
        Ok(())
    }
}

fn tree_error(error: crate::tree::EditError) -> NotLazy {
    NotLazy::Tree {
        reason: error.to_string(),
    }
}

fn symlink(entry: &Entry) -> Result<InodeKind, NotLazy> {
    let bytes = entry.link_name.len();
    if bytes == 0 || bytes > PATH_MAX_BYTES {
        return Err(NotLazy::SymlinkTarget {
            path: shown(&entry.name),
            bytes,
        });
    }
    Ok(InodeKind::Symlink(entry.link_name.as_slice().into()))
}

fn device_number(entry: &Entry) -> Result<DeviceNumber, NotLazy> {
    let part = |number: i64| u32::try_from(number).ok();
    part(entry.major)
        .zip(part(entry.minor))
        .and_then(|(major, minor)| DeviceNumber::new(major, minor))
        .ok_or_else(|| NotLazy::DeviceNumber {
            path: shown(&entry.name),
            major: entry.major,
            minor: entry.minor,
        })
}

fn bounded(time: Timestamp) -> Timestamp {
    let epoch = Timestamp::default();
    if time < epoch || time > LATEST {
        epoch
    } else {
        time
    }
}
