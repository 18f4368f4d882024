// SPDX-License-Identifier: Apache-2.0
//! What directories look like below a run of lazy layers.
//!
//! A directory that a tar only implies takes its attributes from the layers below. These are trees of
//! lower runs and directories of ordinary snapshots, seen as overlayfs would stack them: the highest
//! layer that has the name decides; a whiteout or a file there means that there is no directory; an
//! opaque directory on the way hides what is below.
//!
//! No path of an image is resolved on the host: an ordinary directory is walked one component at a
//! time by `openat` with `O_NOFOLLOW | O_DIRECTORY`, so no symbolic link is ever followed.
//! Runs on a blocking thread.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use sluice_blockindex::erofs::{FileType, Nid, TreeError, TreeReader};
use sluice_blockindex::merge::{DirectoryAttributes, LowerAttributes, LowerError};
use sluice_blockindex::tree::{MARK_VALUE, OPAQUE_XATTR, RESERVED_XATTR_PREFIXES, Timestamp};
use xattr::FileExt as _;

/// One lower directory.
#[derive(Debug)]
pub enum Lower<'a> {
    /// A merged tree.
    Tree(TreeReader<'a>),
    /// The directory of an ordinary snapshot.
    Directory(File),
}

/// All lower directories, highest first.
#[derive(Debug)]
pub struct Below<'a> {
    lowers: Vec<Lower<'a>>,
}

/// What one layer says about a path.
enum Verdict {
    /// It has this directory.
    Directory(DirectoryAttributes),
    /// The path ends here: a whiteout, a file, or hidden by an opaque directory.
    Nothing,
    /// It does not say; ask the next lower one.
    Silent,
}

impl<'a> Below<'a> {
    /// **Shape** highest first.
    #[must_use]
    pub fn new(lowers: Vec<Lower<'a>>) -> Self {
        Self { lowers }
    }
}

/// Opens the directory of an ordinary snapshot for [`Lower::Directory`].
pub fn open_directory(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(File::from(nix::fcntl::open(path, flags, Mode::empty())?))
}

impl LowerAttributes for Below<'_> {
    fn directory(&self, path: &[&[u8]]) -> Result<Option<DirectoryAttributes>, LowerError> {
        for lower in &self.lowers {
            let verdict = match lower {
                Lower::Tree(tree) => in_tree(tree, path)?,
                Lower::Directory(root) => in_directory(root, path)?,
            };
            match verdict {
                Verdict::Directory(attributes) => return Ok(Some(attributes)),
                Verdict::Nothing => return Ok(None),
                Verdict::Silent => {}
            }
        }
        Ok(None)
    }
}

fn in_tree(tree: &TreeReader<'_>, path: &[&[u8]]) -> Result<Verdict, TreeError> {
    let mut nid: Nid = tree.root();
    let mut opaque = false;
    for (depth, name) in path.iter().enumerate() {
        // overlayfs does not look at the mark on the root of a layer.
        opaque |= depth > 0 && tree.xattr(nid, OPAQUE_XATTR)? == Some(MARK_VALUE);
        let Some(child) = tree.lookup(nid, name)? else {
            return Ok(if opaque {
                Verdict::Nothing
            } else {
                Verdict::Silent
            });
        };
        if tree.inode(child)?.file_type != FileType::Directory {
            return Ok(Verdict::Nothing);
        }
        nid = child;
    }
    let inode = tree.inode(nid)?;
    let mut xattrs = BTreeMap::new();
    for entry in tree.xattrs_of(&inode)? {
        let (name, value) = entry?;
        if !RESERVED_XATTR_PREFIXES
            .iter()
            .any(|prefix| name.begins_with(prefix))
        {
            xattrs.insert(name.to_boxed(), value.into());
        }
    }
    Ok(Verdict::Directory(DirectoryAttributes {
        permissions: inode.permissions,
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
        xattrs,
    }))
}

fn in_directory(root: &File, path: &[&[u8]]) -> io::Result<Verdict> {
    let mut here = root.try_clone()?;
    let mut opaque = false;
    for (depth, name) in path.iter().enumerate() {
        // overlayfs does not look at the mark on the root of a layer.
        opaque |= depth > 0
            && here.get_xattr(OsStr::from_bytes(OPAQUE_XATTR))?.as_deref() == Some(MARK_VALUE);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let next: Result<OwnedFd, _> = openat(&here, OsStr::from_bytes(name), flags, Mode::empty());
        here = match next {
            Ok(fd) => File::from(fd),
            Err(nix::errno::Errno::ENOENT) => {
                return Ok(if opaque {
                    Verdict::Nothing
                } else {
                    Verdict::Silent
                });
            }
            // A file or whiteout, or a symbolic link.
            Err(nix::errno::Errno::ENOTDIR | nix::errno::Errno::ELOOP) => {
                return Ok(Verdict::Nothing);
            }
            Err(error) => return Err(error.into()),
        };
    }
    let metadata = here.metadata()?;
    let mut xattrs = BTreeMap::new();
    for name in here.list_xattr()? {
        let bytes = name.as_bytes();
        if RESERVED_XATTR_PREFIXES
            .iter()
            .any(|prefix| bytes.starts_with(prefix))
        {
            continue;
        }
        if let Some(value) = here.get_xattr(&name)? {
            xattrs.insert(bytes.into(), value.into());
        }
    }
    let permissions = u16::try_from(metadata.permissions().mode() & 0o7777).unwrap_or(0o755);
    Ok(Verdict::Directory(DirectoryAttributes {
        permissions,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: Timestamp {
            seconds: metadata.mtime(),
            nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
        },
        xattrs,
    }))
}
