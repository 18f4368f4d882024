// SPDX-License-Identifier: Apache-2.0
//! Brings a tree on disk back into memory.

use std::collections::{BTreeMap, HashMap};

use crate::erofs::format::{DIRENT_BYTES, FileType, MAX_DEPTH};
use crate::erofs::{InodeView, Nid, TreeError, TreeReader};
use crate::tree::{IMPLICIT_XATTR, Inode, InodeId, InodeKind, Tree};

/// Bounds a walk over a tree that nobody has validated.
///
/// Each name takes 12 bytes and more, so a tree in which directories are reached once cannot show
/// more names than this; a walk that meets more goes in circles.
#[derive(Debug)]
pub(crate) struct NameBudget {
    limit: u64,
    spent: u64,
}

impl NameBudget {
    pub(crate) fn new(reader: &TreeReader<'_>) -> Self {
        Self {
            limit: reader.bytes().len() as u64 / DIRENT_BYTES as u64,
            spent: 0,
        }
    }

    pub(crate) fn spend(&mut self) -> Result<(), TreeError> {
        self.spent += 1;
        match self.spent > self.limit {
            true => Err(TreeError::Limit {
                what: "names",
                actual: self.spent,
                limit: self.limit,
            }),
            false => Ok(()),
        }
    }
}

/// Reads an inode with its xattrs, runs and target; the mark of an implicit directory becomes [`Inode::implicit`].
pub(crate) fn load_inode(reader: &TreeReader<'_>, view: &InodeView) -> Result<Inode, TreeError> {
    let mut xattrs = BTreeMap::new();
    let mut implicit = false;
    for xattr in reader.xattrs_of(view)? {
        let (name, value) = xattr?;
        if name.is(IMPLICIT_XATTR) {
            implicit = true;
        } else {
            xattrs.insert(name.to_boxed(), value.into());
        }
    }
    let kind = match view.file_type {
        FileType::Directory => InodeKind::Directory,
        FileType::Regular => InodeKind::Regular {
            size_bytes: view.size_bytes,
            extent: reader.run_of(view)?,
        },
        FileType::Symlink => InodeKind::Symlink(reader.symlink_of(view)?.into()),
        FileType::CharDevice => InodeKind::CharDevice(view.device_number),
        FileType::BlockDevice => InodeKind::BlockDevice(view.device_number),
        FileType::Fifo => InodeKind::Fifo,
        FileType::Socket => InodeKind::Socket,
    };
    Ok(Inode {
        kind,
        permissions: view.permissions,
        uid: view.uid,
        gid: view.gid,
        mtime: view.mtime,
        xattrs,
        implicit: implicit && view.file_type == FileType::Directory,
    })
}

/// Reads a whole tree into memory. Writing the result with the same devices gives the same bytes.
///
/// **Errors**: any [`TreeError`]; on bytes that were not validated too, and then in bounded time.
pub fn to_tree(reader: TreeReader<'_>) -> Result<Tree, TreeError> {
    let mut tree = Tree::new();
    let mut budget = NameBudget::new(&reader);
    let mut linked: HashMap<Nid, InodeId> = HashMap::new();
    let root = reader.inode(reader.root())?;
    *tree.inode_mut(tree.root()) = load_inode(&reader, &root)?;
    let mut pending = vec![(root, tree.root(), 0)];
    while let Some((view, directory, depth)) = pending.pop() {
        if depth > MAX_DEPTH {
            let (actual, limit) = (u64::from(depth), u64::from(MAX_DEPTH));
            return Err(TreeError::Limit {
                what: "depth",
                actual,
                limit,
            });
        }
        for entry in reader.read_dir_of(&view, 0)? {
            let entry = entry?;
            if matches!(entry.name, b"." | b"..") {
                continue;
            }
            budget.spend()?;
            let child = reader.inode(entry.nid)?;
            let edit = |_| TreeError::Directory {
                nid: view.nid,
                block: entry.next_offset / crate::erofs::BLOCK_BYTES,
                fault: "an entry has an invalid name",
            };
            let known = linked.get(&entry.nid).filter(|_| child.links > 1);
            if let Some(id) = known {
                tree.insert(directory, entry.name, *id).map_err(edit)?;
                continue;
            }
            let inode = load_inode(&reader, &child)?;
            let is_directory = inode.is_directory();
            let id = tree
                .insert_new(directory, entry.name, inode)
                .map_err(edit)?;
            if is_directory {
                pending.push((child, id, depth + 1));
            } else if child.links > 1 {
                linked.insert(entry.nid, id);
            }
        }
    }
    Ok(tree)
}
