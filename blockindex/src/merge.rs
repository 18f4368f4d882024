// SPDX-License-Identifier: Apache-2.0
//! Merges the trees of consecutive layers into one, as overlayfs would show them.

use std::collections::BTreeMap;

use crate::erofs::{TreeError, TreeReader};
use crate::tree::{EditError, Timestamp, Tree};

/// The attributes of a directory somewhere below the merged layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryAttributes {
    /// Permission bits with setuid, setgid and sticky.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes by full name; marks of overlayfs are left out.
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

/// Tells what directories look like below the merged layers.
pub trait LowerAttributes {
    /// The directory at `path` (names from the root on, none for the root itself) as it is seen below the merged layers; `None` when there is nothing or no directory.
    fn directory(&self, path: &[&[u8]]) -> Option<DirectoryAttributes>;
}

/// What lies below the merged layers.
#[derive(Clone, Copy)]
pub enum MergeBase<'a> {
    /// Nothing: whiteouts and opaque marks are applied and none is left.
    Bottom,
    /// Something that the result is stacked upon by overlayfs: whiteouts and opaque marks that may hide some of it stay.
    Above(&'a dyn LowerAttributes),
}

impl std::fmt::Debug for MergeBase<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            MergeBase::Bottom => "Bottom",
            MergeBase::Above(_) => "Above",
        })
    }
}

/// Why layers cannot be merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A layer's tree is malformed.
    #[error("read the tree of layer {layer}")]
    Layer {
        /// Its position, the lowest being 0.
        layer: usize,
        /// What is wrong with it.
        #[source]
        source: TreeError,
    },
    /// A layer's tree names what no tree can hold.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// There are no layers, or more than devices.
    #[error("cannot merge {0} layers")]
    LayerCount(usize),
}

/// Merges layer trees, the lowest first, into one tree whose device i + 1 is the device of layer i.
///
/// **Errors**: [`MergeError::Layer`] when a tree is malformed.
pub fn merge(layers: &[TreeReader<'_>], base: MergeBase<'_>) -> Result<Tree, MergeError> {
    let _ = base;
    Err(MergeError::LayerCount(layers.len()))
}
