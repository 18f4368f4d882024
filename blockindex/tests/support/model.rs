// SPDX-License-Identifier: Apache-2.0
//! The naive model of layers: nested maps to which change sets are applied one after the other.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test support")]

use std::collections::BTreeMap;
use std::collections::HashMap;

use sluice_blockindex::merge::{DirectoryAttributes, LowerAttributes, LowerError};
use sluice_blockindex::tree::{Inode, InodeId, InodeKind, Tree};

/// Which inode of which layer a file is, so that hard links can be told from copies.
type Identity = (usize, InodeId);

/// A file or directory with what is in it.
#[derive(Debug, Clone)]
pub enum Node {
    Directory(Directory),
    File(Inode, Identity),
}

/// A directory; in a layer its inode may have marks.
#[derive(Debug, Clone)]
pub struct Directory {
    pub inode: Inode,
    pub children: BTreeMap<Vec<u8>, Node>,
}

impl Directory {
    /// A directory that nobody has described.
    pub fn nothing() -> Self {
        let inode = Inode {
            implicit: false,
            ..Inode::implicit_directory()
        };
        Self {
            inode,
            children: BTreeMap::new(),
        }
    }

    /// The tree of a layer, which has this number; runs get the device of that number if `device` is so.
    pub fn of(tree: &Tree, layer: usize, device: Option<u16>) -> Self {
        Self::of_directory(tree, tree.root(), layer, device)
    }

    fn of_directory(tree: &Tree, id: InodeId, layer: usize, device: Option<u16>) -> Self {
        let child = |id: InodeId| {
            let mut inode = tree.inode(id).clone();
            if inode.is_directory() {
                return Node::Directory(Self::of_directory(tree, id, layer, device));
            }
            match &mut inode.kind {
                InodeKind::Regular {
                    extent: Some(run), ..
                } if device.is_some() => {
                    run.device = device.unwrap();
                }
                _ => {}
            }
            Node::File(inode, (layer, id))
        };
        let children = tree
            .children(id)
            .iter()
            .map(|(name, id)| (name.to_vec(), child(*id)));
        Self {
            inode: tree.inode(id).clone(),
            children: children.collect(),
        }
    }

    /// Applies the root of a layer. An opaque mark there means nothing, as in overlayfs.
    pub fn apply(&mut self, layer: &Directory) {
        let opaque = false;
        self.apply_directory(layer, opaque);
    }

    fn apply_directory(&mut self, layer: &Directory, opaque: bool) {
        if !layer.inode.implicit {
            self.inode = layer.inode.clone();
            let overlay = sluice_blockindex::tree::OPAQUE_XATTR;
            self.inode.xattrs.remove(overlay);
        }
        if opaque {
            self.children.clear();
        }
        for (name, node) in &layer.children {
            match node {
                Node::File(inode, _) if inode.is_whiteout() => {
                    self.children.remove(name);
                }
                Node::File(..) => {
                    self.children.insert(name.clone(), node.clone());
                }
                Node::Directory(change) => {
                    let known = self.children.remove(name);
                    let mut directory = match known {
                        Some(Node::Directory(directory)) => directory,
                        _ => Directory::nothing(),
                    };
                    directory.apply_directory(change, change.inode.is_opaque());
                    self.children
                        .insert(name.clone(), Node::Directory(directory));
                }
            }
        }
    }

    fn find(&self, path: &[&[u8]]) -> Option<&Directory> {
        path.iter()
            .try_fold(self, |at, name| match at.children.get(*name) {
                Some(Node::Directory(directory)) => Some(directory),
                _ => None,
            })
    }

    /// One line per path. A further name of an inode says which name came first.
    pub fn lines(&self) -> BTreeMap<Vec<u8>, String> {
        let mut lines = BTreeMap::new();
        let mut first = HashMap::new();
        self.add_lines(&mut Vec::new(), &mut lines, &mut first);
        lines
    }

    fn add_lines(
        &self,
        path: &mut Vec<u8>,
        lines: &mut BTreeMap<Vec<u8>, String>,
        first: &mut HashMap<Identity, Vec<u8>>,
    ) {
        lines.insert(path.clone(), format!("{:?}", self.inode));
        for (name, node) in &self.children {
            let length = path.len();
            path.push(b'/');
            path.extend(name);
            match node {
                Node::Directory(directory) => directory.add_lines(path, lines, first),
                Node::File(inode, identity) => {
                    let original = first.entry(*identity).or_insert_with(|| path.clone());
                    let original = String::from_utf8_lossy(original);
                    lines.insert(path.clone(), format!("{inode:?} as {original}"));
                }
            }
            path.truncate(length);
        }
    }
}

impl LowerAttributes for Directory {
    fn directory(&self, path: &[&[u8]]) -> Result<Option<DirectoryAttributes>, LowerError> {
        Ok(self.find(path).map(|directory| {
            let inode = directory.inode.clone();
            let Inode {
                permissions,
                uid,
                gid,
                mtime,
                xattrs,
                ..
            } = inode;
            DirectoryAttributes {
                permissions,
                uid,
                gid,
                mtime,
                xattrs,
            }
        }))
    }
}
