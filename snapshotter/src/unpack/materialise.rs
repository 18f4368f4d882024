// SPDX-License-Identifier: Apache-2.0
//! A tree in memory made real below a directory.
//!
//! Walks the tree depth first. A layer may be nested as deep as a path is long, so the walk keeps its
//! place on the heap, and one descriptor, that of the directory where it is; it goes up by `..`, which
//! nobody else can move. Every operation names a single component relative to its directory's
//! descriptor, and nothing is followed, so no name can lead outside. A directory's own attributes are
//! set after its children, or their creation would change its mtime. Order per inode: create, owner,
//! xattrs, mode, times, because a change of owner clears set-user-ID bits and file capabilities. At the
//! end all is synced: the row that names the directory must not outlive the files in a power loss.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};
use sluice_blockindex::merge::LowerAttributes;
use sluice_blockindex::tree::{
    DEFAULT_DIRECTORY_PERMISSIONS, FileRun, IMPLICIT_XATTR, Inode, InodeId, InodeKind, Timestamp,
    Tree,
};
use sluice_blockindex::units::BLOCK_BYTES;
use tokio_util::sync::CancellationToken;

use crate::below::{Below, open_directory};

/// Bytes copied at once.
const BUFFER_BYTES: usize = 128 << 10;

/// Why a tree could not be made real.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaterialiseError {
    /// The file system failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// In the present tense.
        what: &'static str,
        /// In the layer.
        path: String,
        /// How it failed.
        source: io::Error,
    },
    /// The work was called off.
    #[error("cancelled")]
    Cancelled,
}

struct Writer<'a> {
    tree: &'a Tree,
    tar: &'a File,
    below: &'a Below<'a>,
    root: OwnedFd,
    /// Where each file with several names was made first.
    first_names: HashMap<InodeId, Vec<Box<[u8]>>>,
    path: Vec<Box<[u8]>>,
    buffer: Vec<u8>,
    cancel: &'a CancellationToken,
}

/// Writes the whole tree into `directory`, which is empty.
pub(super) fn materialise(
    tree: &Tree,
    tar: &File,
    directory: &Path,
    below: &Below<'_>,
    cancel: &CancellationToken,
) -> Result<(), MaterialiseError> {
    let failed = |source| MaterialiseError::Io {
        what: "open directory",
        path: directory.display().to_string(),
        source,
    };
    let root = open_directory(directory).map_err(failed)?;
    let here = OwnedFd::from(root.try_clone().map_err(failed)?);
    let mut writer = Writer {
        tree,
        tar,
        below,
        root: root.into(),
        first_names: HashMap::new(),
        path: Vec::new(),
        buffer: vec![0; BUFFER_BYTES],
        cancel,
    };
    writer.walk(here)?;
    writer.directory(tree.root(), &writer.root, b".")?;
    nix::unistd::syncfs(&writer.root).map_err(writer.failed("sync the file system of"))
}

impl Writer<'_> {
    fn failed<E: Into<io::Error>>(&self, what: &'static str) -> impl FnOnce(E) -> MaterialiseError {
        let path = String::from_utf8_lossy(&self.path.join(&b'/')).into_owned();
        move |source| MaterialiseError::Io {
            what,
            path,
            source: source.into(),
        }
    }

    /// Makes all that is below the root, which `here` is.
    fn walk(&mut self, mut here: OwnedFd) -> Result<(), MaterialiseError> {
        let tree = self.tree;
        let children = |directory| (directory, tree.children(directory).iter());
        let mut levels = vec![children(tree.root())];
        while let Some((directory, left)) = levels.last_mut() {
            if self.cancel.is_cancelled() {
                return Err(MaterialiseError::Cancelled);
            }
            if let Some((name, child)) = left.next() {
                self.path.push(name.clone());
                match self.entry(*child, &here, name)? {
                    Some(inside) => {
                        here = inside;
                        levels.push(children(*child));
                    }
                    None => drop(self.path.pop()),
                }
                continue;
            }
            let directory = *directory;
            levels.pop();
            // Only the root has no name.
            if let Some(name) = self.path.last().cloned() {
                let up = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                here = self.open(&here, OsStr::new(".."), up)?;
                self.directory(directory, &here, &name)?;
                self.path.pop();
            }
        }
        Ok(())
    }

    /// Gives a directory its own attributes, when all that is in it is there.
    fn directory(
        &self,
        id: InodeId,
        parent: &OwnedFd,
        name: &[u8],
    ) -> Result<(), MaterialiseError> {
        let inode = self.tree.inode(id);
        if inode.implicit {
            return self.attributes(&self.implicit(inode)?, parent, name);
        }
        self.attributes(inode, parent, name)
    }

    /// Makes one entry; of a directory it gives the descriptor, for what is in it.
    fn entry(
        &mut self,
        id: InodeId,
        parent: &OwnedFd,
        name: &[u8],
    ) -> Result<Option<OwnedFd>, MaterialiseError> {
        let inode = self.tree.inode(id);
        let os_name = OsStr::from_bytes(name);
        if !inode.is_directory() {
            if let Some(first) = self.first_names.get(&id).cloned() {
                return self.link(&first, parent, os_name).map(|()| None);
            }
            self.first_names.insert(id, self.path.clone());
        }
        let node =
            |kind, rdev| mknodat(parent, os_name, kind, Mode::from_bits_truncate(0o600), rdev);
        match &inode.kind {
            InodeKind::Directory => {
                mkdirat(parent, os_name, Mode::from_bits_truncate(0o700))
                    .map_err(self.failed("create directory"))?;
                let inside = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                return self.open(parent, os_name, inside).map(Some);
            }
            InodeKind::Regular { size_bytes, extent } => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                let fd = self.open(parent, os_name, flags)?;
                self.content(&File::from(fd), *size_bytes, *extent)?;
            }
            InodeKind::Symlink(target) => {
                symlinkat(OsStr::from_bytes(target), parent, os_name)
                    .map_err(self.failed("create symbolic link"))?;
            }
            InodeKind::CharDevice(number) => {
                let rdev = libc::makedev(number.major(), number.minor());
                node(SFlag::S_IFCHR, rdev).map_err(self.failed("create device"))?;
            }
            InodeKind::BlockDevice(number) => {
                let rdev = libc::makedev(number.major(), number.minor());
                node(SFlag::S_IFBLK, rdev).map_err(self.failed("create device"))?;
            }
            InodeKind::Fifo => node(SFlag::S_IFIFO, 0).map_err(self.failed("create FIFO"))?,
            InodeKind::Socket => node(SFlag::S_IFSOCK, 0).map_err(self.failed("create socket"))?,
        }
        self.attributes(inode, parent, name).map(|()| None)
    }

    fn open(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        flags: OFlag,
    ) -> Result<OwnedFd, MaterialiseError> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(parent, name, flags, Mode::from_bits_truncate(0o600)).map_err(self.failed("open"))
    }

    /// A directory that the tar only implies looks like the one below, or like a new one.
    fn implicit(&self, inode: &Inode) -> Result<Inode, MaterialiseError> {
        let path: Vec<&[u8]> = self.path.iter().map(|name| &**name).collect();
        let mut resolved = inode.clone();
        resolved.implicit = false;
        let below = self.below.directory(&path).map_err(io::Error::other);
        match below.map_err(self.failed("look below"))? {
            Some(attributes) => {
                resolved.permissions = attributes.permissions;
                (resolved.uid, resolved.gid) = (attributes.uid, attributes.gid);
                resolved.mtime = attributes.mtime;
                resolved.xattrs.extend(attributes.xattrs);
            }
            None => resolved.permissions = DEFAULT_DIRECTORY_PERMISSIONS,
        }
        Ok(resolved)
    }

    fn link(
        &self,
        first: &[Box<[u8]>],
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<(), MaterialiseError> {
        let Some((last, directories)) = first.split_last() else {
            return Ok(());
        };
        let mut here = self.root.try_clone().map_err(self.failed("open"))?;
        for directory in directories {
            here = self.open(
                &here,
                OsStr::from_bytes(directory),
                OFlag::O_PATH | OFlag::O_DIRECTORY,
            )?;
        }
        linkat(
            &here,
            OsStr::from_bytes(last),
            parent,
            name,
            AtFlags::empty(),
        )
        .map_err(self.failed("create hard link"))
    }

    fn content(
        &mut self,
        file: &File,
        size_bytes: u64,
        run: Option<FileRun>,
    ) -> Result<(), MaterialiseError> {
        if let Some(run) = run {
            let start = run.start_block * BLOCK_BYTES;
            let mut done = 0;
            while done < size_bytes {
                let want = usize::try_from(size_bytes - done).unwrap_or(usize::MAX);
                let mut buffer = std::mem::take(&mut self.buffer);
                let part = want.min(buffer.len());
                let read = self.tar.read_exact_at(&mut buffer[..part], start + done);
                // Zeros stay holes: an expanded sparse file then costs what it did in the tar.
                let written = read.and_then(|()| {
                    if buffer[..part].iter().all(|byte| *byte == 0) {
                        return Ok(());
                    }
                    file.write_all_at(&buffer[..part], done)
                });
                self.buffer = buffer;
                written.map_err(self.failed("write"))?;
                done += part as u64;
                if self.cancel.is_cancelled() {
                    return Err(MaterialiseError::Cancelled);
                }
            }
        }
        file.set_len(size_bytes).map_err(self.failed("set size of"))
    }

    fn attributes(
        &self,
        inode: &Inode,
        parent: &OwnedFd,
        name: &[u8],
    ) -> Result<(), MaterialiseError> {
        let os_name = OsStr::from_bytes(name);
        let (uid, gid) = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
        let no_follow = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(parent, os_name, Some(uid), Some(gid), no_follow)
            .map_err(self.failed("set owner of"))?;
        // The magic link leads to the directory itself; only the last name is looked up there.
        let by_parent =
            PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(os_name);
        for (key, value) in &inode.xattrs {
            if **key != *IMPLICIT_XATTR {
                xattr::set(&by_parent, OsStr::from_bytes(key), value)
                    .map_err(self.failed("set extended attribute of"))?;
            }
        }
        if !matches!(inode.kind, InodeKind::Symlink(_)) {
            let mode = std::fs::Permissions::from_mode(u32::from(inode.permissions));
            std::fs::set_permissions(&by_parent, mode).map_err(self.failed("set mode of"))?;
        }
        let time = time_of(inode.mtime);
        utimensat(
            parent,
            os_name,
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .map_err(self.failed("set times of"))
    }
}

fn time_of(time: Timestamp) -> TimeSpec {
    TimeSpec::new(time.seconds, i64::from(time.nanoseconds))
}
