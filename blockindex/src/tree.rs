// SPDX-License-Identifier: Apache-2.0
//! The files of a layer or of a chain in memory, as they are gathered before they become an EROFS image.
//!
//! A [`Tree`] is an arena of inodes addressed by [`InodeId`]; a directory has an ordered map from
//! name to inode. The tar scanner fills one by insertion and removal, the merger builds one from
//! layer trees, [`crate::erofs::write_tree`] turns one into bytes. A hard link is one inode with
//! several names. Link counts are not kept: the writer computes them.
//!
//! Invariants: names obey [`check_name`]; the root is a directory and has no name. A directory
//! must have exactly one name when the tree is written, which the writer checks; an inode that
//! lost its last name stays in the arena and is not written. Nothing here recurses, so a path may
//! be as deep as memory allows (the writer has a limit).
//!
//! ## Marks
//!
//! Three facts about layers have no place in an ordinary file system and are expressed as
//! overlayfs expresses them: a *whiteout* is a character device 0:0; an *opaque* directory has the
//! xattr [`OPAQUE_XATTR`]; an *implicit* directory (the tar names a path below it but not the
//! directory itself, so its attributes are those of the layers below) has [`Inode::implicit`],
//! on disk the xattr [`IMPLICIT_XATTR`]. The last is ours and never leaves a merge.

use std::collections::BTreeMap;
use std::fmt;

/// The xattr that makes an overlayfs directory hide the directories below it; its value is [`MARK_VALUE`].
pub const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";
/// The xattr by which a layer tree on disk says that the tar implies a directory without containing it.
pub const IMPLICIT_XATTR: &[u8] = b"trusted.sluice.implicit";
/// Xattr names that begin so are overlayfs's and ours: no file may have one, except for the two marks.
pub const RESERVED_XATTR_PREFIXES: [&[u8]; 2] = [b"trusted.overlay.", b"trusted.sluice."];
/// The value of both marks, as overlayfs writes it.
pub const MARK_VALUE: &[u8] = b"y";
/// Longest name of a directory entry, in bytes: the limit of Linux and of EROFS.
pub const MAX_NAME_BYTES: usize = 255;
/// Permissions of a directory that a tar implies and no layer describes.
pub const DEFAULT_DIRECTORY_PERMISSIONS: u16 = 0o755;

/// A point in time as file systems keep it.
///
/// **Units**: seconds since 1970 (negative before), plus nanoseconds, always forward, below 10^9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds since 1970-01-01T00:00:00Z, rounded down.
    pub seconds: i64,
    /// The rest, `0..1_000_000_000`.
    pub nanoseconds: u32,
}

/// The number of a character or block device, kept as Linux's `new_encode_dev` writes it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DeviceNumber(u32);

impl DeviceNumber {
    /// The number of an overlayfs whiteout.
    pub const WHITEOUT: DeviceNumber = DeviceNumber(0);

    /// Joins a major (below 2^12) and a minor number (below 2^20); `None` when one is too large.
    pub fn new(major: u32, minor: u32) -> Option<Self> {
        if major >= 1 << 12 || minor >= 1 << 20 {
            return None;
        }
        Some(Self(
            (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        ))
    }

    /// Takes the form that EROFS and FUSE carry; each value is valid.
    pub const fn from_encoded(encoded: u32) -> Self {
        Self(encoded)
    }

    /// The form that EROFS and FUSE carry (`new_encode_dev`).
    pub const fn encoded(self) -> u32 {
        self.0
    }

    /// The major number.
    pub const fn major(self) -> u32 {
        (self.0 & 0xfff00) >> 8
    }

    /// The minor number.
    pub const fn minor(self) -> u32 {
        (self.0 & 0xff) | ((self.0 >> 12) & 0xfff00)
    }
}

impl fmt::Debug for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major(), self.minor())
    }
}

/// Where the content of a regular file stands: one run of blocks on a layer device.
///
/// **Units**: blocks of [`crate::erofs::BLOCK_BYTES`]; the run's length follows from the file's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileRun {
    /// Which device of the tree, counted from 1 (0 is the tree itself and never used).
    pub device: u16,
    /// First block of the run on that device.
    pub start_block: u64,
}

/// What an inode is, with what only that kind has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InodeKind {
    /// A directory; its entries are kept by the [`Tree`].
    Directory,
    /// A regular file.
    Regular {
        /// Length of the content in bytes.
        size_bytes: u64,
        /// The content; `None` exactly when the file is empty.
        extent: Option<FileRun>,
    },
    /// A symbolic link and its target, 1 to 4095 bytes without NUL.
    Symlink(Box<[u8]>),
    /// A character device; number 0:0 is a whiteout.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
    /// A unix socket.
    Socket,
}

/// One file of whatever kind, apart from its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// What it is.
    pub kind: InodeKind,
    /// Permission bits with setuid, setgid and sticky: `0..=0o7777`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes by full name.
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// Of a directory in a layer tree: the tar implies it but does not contain it.
    pub implicit: bool,
}

impl Inode {
    /// An inode of this kind owned by root, of 1970, without permissions or xattrs.
    pub fn new(kind: InodeKind) -> Self {
        Self {
            kind,
            permissions: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: BTreeMap::new(),
            implicit: false,
        }
    }

    /// A directory that the tar implies: 0755, root, 1970, marked implicit.
    pub fn implicit_directory() -> Self {
        Self {
            permissions: DEFAULT_DIRECTORY_PERMISSIONS,
            implicit: true,
            ..Self::new(InodeKind::Directory)
        }
    }

    /// A whiteout: a name with it hides whatever the layers below have under that name.
    pub fn whiteout() -> Self {
        Self::new(InodeKind::CharDevice(DeviceNumber::WHITEOUT))
    }

    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, InodeKind::Directory)
    }

    /// Whether this is a whiteout.
    pub fn is_whiteout(&self) -> bool {
        matches!(self.kind, InodeKind::CharDevice(DeviceNumber::WHITEOUT))
    }

    /// Whether this directory hides the directories below it.
    pub fn is_opaque(&self) -> bool {
        self.xattrs
            .get(OPAQUE_XATTR)
            .is_some_and(|value| &**value == MARK_VALUE)
    }

    /// Makes this directory hide the directories below it.
    pub fn set_opaque(&mut self) {
        self.xattrs.insert(OPAQUE_XATTR.into(), MARK_VALUE.into());
    }
}

/// Why a tree refuses a change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// The inode that should get or lose an entry is no directory.
    #[error("inode {0:?} is not a directory")]
    NotADirectory(InodeId),
    /// The name is empty, `.` or `..`, has a slash or a NUL, or is longer than 255 bytes.
    #[error("{:?} is no valid file name", String::from_utf8_lossy(.0))]
    Name(Box<[u8]>),
    /// The arena is full.
    #[error("a tree cannot hold more than {0} inodes")]
    TooManyInodes(u32),
}

/// Checks that `name` can name a directory entry.
///
/// **Errors**: [`EditError::Name`] when it is empty, `.` or `..`, has a slash or NUL, or is longer than [`MAX_NAME_BYTES`].
pub fn check_name(name: &[u8]) -> Result<(), EditError> {
    let valid = !matches!(name, b"" | b"." | b"..")
        && name.len() <= MAX_NAME_BYTES
        && !name.iter().any(|byte| matches!(byte, b'/' | 0));
    if valid {
        Ok(())
    } else {
        Err(EditError::Name(name.into()))
    }
}

/// Names an inode of one [`Tree`]; meaningless for any other tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(u32);

impl InodeId {
    /// The position in the arena, for tables beside the tree.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The entries of a directory, ordered by the bytes of their names.
pub type Children = BTreeMap<Box<[u8]>, InodeId>;

static NO_CHILDREN: Children = Children::new();

#[derive(Debug, Clone)]
struct Node {
    inode: Inode,
    /// Boxed, because most inodes are files and trees have a million of them.
    children: Option<Box<Children>>,
}

/// An in-memory file tree; see the module's text.
#[derive(Debug, Clone)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree with nothing but an implicit root directory.
    pub fn new() -> Self {
        Self {
            nodes: vec![Node {
                inode: Inode::implicit_directory(),
                children: None,
            }],
        }
    }

    /// The root directory.
    pub fn root(&self) -> InodeId {
        InodeId(0)
    }

    /// How many inodes the arena holds, those without a name included.
    pub fn arena_len(&self) -> usize {
        self.nodes.len()
    }

    /// The inode behind an id of this tree.
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.nodes[id.index()].inode
    }

    /// The inode behind an id of this tree, to change. Making a directory something else leaves its entries unreachable.
    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.nodes[id.index()].inode
    }

    /// Puts an inode in the arena; it has no name until [`Tree::insert`].
    pub fn add(&mut self, inode: Inode) -> Result<InodeId, EditError> {
        let id = u32::try_from(self.nodes.len()).map_err(|_| EditError::TooManyInodes(u32::MAX))?;
        self.nodes.push(Node {
            inode,
            children: None,
        });
        Ok(InodeId(id))
    }

    /// The entries of a directory; empty for any other inode.
    pub fn children(&self, directory: InodeId) -> &Children {
        let node = &self.nodes[directory.index()];
        match &node.children {
            Some(children) if node.inode.is_directory() => children,
            _ => &NO_CHILDREN,
        }
    }

    /// The inode that `name` has in `directory`.
    pub fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        self.children(directory).get(name).copied()
    }

    /// Follows `path` from the root by exact names, through no symlink.
    pub fn lookup<'n>(&self, path: impl IntoIterator<Item = &'n [u8]>) -> Option<InodeId> {
        path.into_iter()
            .try_fold(self.root(), |at, name| self.child(at, name))
    }

    /// Gives an inode a name, and returns the inode that had the name before, if any.
    pub fn insert(
        &mut self,
        directory: InodeId,
        name: &[u8],
        id: InodeId,
    ) -> Result<Option<InodeId>, EditError> {
        check_name(name)?;
        let node = &mut self.nodes[directory.index()];
        if !node.inode.is_directory() {
            return Err(EditError::NotADirectory(directory));
        }
        Ok(node
            .children
            .get_or_insert_default()
            .insert(name.into(), id))
    }

    /// Adds an inode and names it in one step, replacing what had the name.
    pub fn insert_new(
        &mut self,
        directory: InodeId,
        name: &[u8],
        inode: Inode,
    ) -> Result<InodeId, EditError> {
        let id = self.add(inode)?;
        self.insert(directory, name, id)?;
        Ok(id)
    }

    /// Takes a name away, with all that is below it; returns the inode that had it.
    pub fn remove(&mut self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        self.nodes[directory.index()]
            .children
            .as_mut()?
            .remove(name)
    }

    /// Takes all names of a directory away.
    pub fn clear(&mut self, directory: InodeId) {
        self.nodes[directory.index()].children = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_linux_does() {
        for (major, minor, encoded) in [
            (0, 0, 0),
            (1, 3, 0x103),
            (8, 1, 0x801),
            (4095, 1_048_575, 0xffff_ffff),
            (5, 256, 0x10_0500),
        ] {
            let number = DeviceNumber::new(major, minor).unwrap();
            assert_eq!(number.encoded(), encoded);
            assert_eq!((number.major(), number.minor()), (major, minor));
        }
        assert_eq!(DeviceNumber::new(4096, 0), None);
        assert_eq!(DeviceNumber::new(0, 1 << 20), None);
    }

    #[test]
    fn bad_names_are_refused() {
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            assert_eq!(check_name(name), Err(EditError::Name(name.into())));
        }
        for name in [&b"..."[..], b".a", b"\xff\n", &[b'x'; 255]] {
            assert_eq!(check_name(name), Ok(()));
        }
    }

    #[test]
    fn insertion_replaces_and_removal_takes_the_subtree() {
        let mut tree = Tree::new();
        let directory = tree
            .insert_new(tree.root(), b"a", Inode::implicit_directory())
            .unwrap();
        let file = tree
            .insert_new(directory, b"f", Inode::new(InodeKind::Fifo))
            .unwrap();
        assert_eq!(tree.lookup([&b"a"[..], b"f"]), Some(file));
        assert_eq!(
            tree.insert(file, b"x", directory),
            Err(EditError::NotADirectory(file))
        );
        let other = tree.add(Inode::whiteout()).unwrap();
        assert_eq!(tree.insert(tree.root(), b"a", other), Ok(Some(directory)));
        assert_eq!(tree.lookup([&b"a"[..], b"f"]), None);
        assert_eq!(tree.remove(tree.root(), b"a"), Some(other));
        assert!(tree.children(tree.root()).is_empty());
    }
}
