// SPDX-License-Identifier: Apache-2.0
//! Merges the trees of consecutive layers into one, as overlayfs would show them.
//!
//! The walk goes down all layers at once. A directory of the result has *sources*: the directories
//! of that path in the layers, the highest first, that overlayfs would merge. Their listings are
//! sorted, so one step takes the least name and all entries that have it. The highest decides:
//!
//! - a file of any kind hides what is below it;
//! - a whiteout does too and is itself left out;
//! - a directory is merged with the directories below it, down to the first opaque one, file or
//!   whiteout. Its attributes are those of the highest that is not implicit. An implicit directory
//!   looks for attributes below its own opaque mark too, as an unpacker that creates it would.
//!   If no layer describes it: [`MergeBase::Above`] asks below, and else it is 0755, root, 1970.
//!
//! Above other layers a directory is *open* while something from below may show in it. The root
//! is; a directory in an open one is, unless one of its sources is opaque or the walk found a file
//! or whiteout under it: then it becomes opaque in the result, and nothing in it needs a mark. An
//! open directory keeps its whiteouts, provided there is a directory below: overlayfs shows a
//! whiteout in a listing when the directory has nothing to merge with.
//!
//! overlayfs does not look at an opaque mark on the root of a layer, and neither does the merge.
//!
//! Hard links of one layer stay links of one inode for those names that remain. The walk keeps a
//! stack of its own and never recurses; what is not validated cannot make it run for ever.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use crate::erofs::{
    DeviceSlot, DirEntry, FileType, InodeView, MAX_DEPTH, MAX_DEVICES, NameBudget, Nid, ReadDir,
    TreeError, TreeReader, load_inode,
};
use crate::tree::{
    EditError, IMPLICIT_XATTR, Inode, InodeId, InodeKind, MARK_VALUE, OPAQUE_XATTR,
    RESERVED_XATTR_PREFIXES, Timestamp, Tree,
};

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
    /// The directory at `path` (names from the root on, none for the root itself) as it is seen
    /// below the merged layers. It is asked for few directories: implicit ones, and those with whiteouts.
    ///
    /// **Shape**: `None` must mean that there certainly is no directory, because whiteouts are then
    /// left out, and what they hide would come back.
    /// **Errors**: whatever keeps it from knowing; the merge fails with it.
    fn directory(&self, path: &[&[u8]]) -> Result<Option<DirectoryAttributes>, LowerError>;
}

/// Why [`LowerAttributes`] cannot tell.
pub type LowerError = Box<dyn std::error::Error + Send + Sync>;

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
#[derive(Debug, thiserror::Error)]
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
    /// A layer's tree has not exactly one device.
    #[error("the tree of layer {layer} has {devices} devices")]
    Devices {
        /// Its position, the lowest being 0.
        layer: usize,
        /// How many devices it has.
        devices: usize,
    },
    /// It cannot be told what lies below the layers.
    #[error("look up {:?} below the layers", String::from_utf8_lossy(.path))]
    Lower {
        /// The directory that was looked for.
        path: Box<[u8]>,
        /// Why it was not found out.
        #[source]
        source: LowerError,
    },
    /// There are no layers, or more than a tree can have devices.
    #[error("cannot merge {0} layers")]
    LayerCount(usize),
}

/// Merges layer trees, the lowest first, into one tree whose device i + 1 is the device of layer i.
///
/// **Errors**: [`MergeError::Layer`] when a tree is malformed; after [`crate::erofs::validate`] of each none is left but the counts.
pub fn merge(layers: &[TreeReader<'_>], base: MergeBase<'_>) -> Result<Tree, MergeError> {
    if layers.is_empty() || layers.len() > MAX_DEVICES {
        return Err(MergeError::LayerCount(layers.len()));
    }
    for (layer, reader) in layers.iter().enumerate() {
        let devices = reader.devices().len();
        if devices != 1 {
            return Err(MergeError::Devices { layer, devices });
        }
    }
    let mut merger = Merger {
        layers,
        lower: match base {
            MergeBase::Bottom => None,
            MergeBase::Above(lower) => Some(lower),
        },
        tree: Tree::new(),
        linked: HashMap::new(),
        budgets: layers.iter().map(NameBudget::new).collect(),
    };
    merger.run()?;
    Ok(merger.tree)
}

/// The device table of a merged tree: the device of each layer, in order.
pub fn merged_devices(layers: &[TreeReader<'_>]) -> Vec<DeviceSlot> {
    layers.iter().flat_map(|reader| reader.devices()).collect()
}

/// A directory of one layer.
#[derive(Debug, Clone, Copy)]
struct Source {
    layer: usize,
    view: InodeView,
}

/// The way from the root to a directory, shared by all below it.
#[derive(Debug)]
struct Path<'a> {
    name: &'a [u8],
    parent: Option<Rc<Path<'a>>>,
}

/// A directory of the result whose entries are still to be merged.
#[derive(Debug)]
struct Directory<'a> {
    id: InodeId,
    sources: Vec<Source>,
    /// Whether something from below the layers may show in it.
    open: bool,
    path: Option<Rc<Path<'a>>>,
    depth: u32,
}

/// The directories of the layers under one name, put together.
#[derive(Debug, Default)]
struct Stack {
    sources: Vec<Source>,
    /// The highest directory that is not implicit.
    attributes: Option<Source>,
    /// A source is opaque: nothing below it shows.
    opaque: bool,
    /// A file or whiteout ends the stack: nothing below it shows, and attributes do not come from there.
    cut: bool,
}

struct Merger<'m, 'a> {
    layers: &'m [TreeReader<'a>],
    lower: Option<&'m dyn LowerAttributes>,
    tree: Tree,
    /// Inodes with several names that are in the result, by layer and number there.
    linked: HashMap<(usize, Nid), InodeId>,
    budgets: Vec<NameBudget>,
}

impl<'a> Merger<'_, 'a> {
    fn run(&mut self) -> Result<(), MergeError> {
        let mut stack = Stack::default();
        for layer in (0..self.layers.len()).rev() {
            let reader = self.layers[layer];
            let view = in_layer(layer, reader.inode(reader.root()))?;
            let source = Source { layer, view };
            stack.sources.push(source);
            if stack.attributes.is_none() && !self.is_marked(source, IMPLICIT_XATTR)? {
                stack.attributes = Some(source);
            }
        }
        let mut open = self.lower.is_some();
        let root = self.directory_inode(&stack, &None, &mut open)?;
        let id = self.tree.root();
        *self.tree.inode_mut(id) = root;
        let root = Directory {
            id,
            sources: stack.sources,
            open,
            path: None,
            depth: 0,
        };
        let mut pending = vec![root];
        while let Some(directory) = pending.pop() {
            self.merge_directory(directory, &mut pending)?;
        }
        Ok(())
    }

    fn merge_directory(
        &mut self,
        directory: Directory<'a>,
        pending: &mut Vec<Directory<'a>>,
    ) -> Result<(), MergeError> {
        if directory.depth > MAX_DEPTH {
            let (actual, limit) = (u64::from(directory.depth), u64::from(MAX_DEPTH));
            let source = TreeError::Limit {
                what: "depth",
                actual,
                limit,
            };
            return Err(MergeError::Layer {
                layer: directory.sources[0].layer,
                source,
            });
        }
        let mut listings = Vec::with_capacity(directory.sources.len());
        for source in &directory.sources {
            let listing = self.layers[source.layer].read_dir_of(&source.view, 0);
            let mut listing = Listing {
                layer: source.layer,
                rest: in_layer(source.layer, listing)?,
                head: None,
            };
            listing.advance(&mut self.budgets)?;
            listings.push(listing);
        }
        let mut open = directory.open;
        // There always is a root below.
        let mut asked = directory.path.is_none();
        let mut entries: Vec<(usize, DirEntry<'a>)> = Vec::new();
        while let Some(name) = listings.iter().filter_map(|l| l.head).map(|e| e.name).min() {
            entries.clear();
            for listing in &mut listings {
                if let Some(entry) = listing.head.filter(|entry| entry.name == name) {
                    entries.push((listing.layer, entry));
                    listing.advance(&mut self.budgets)?;
                }
            }
            let (layer, top) = entries[0];
            let view = in_layer(layer, self.layers[layer].inode(top.nid))?;
            if view.file_type == FileType::Directory {
                let child = self.stack(&entries)?;
                let child = self.merge_child(child, name, &directory, open)?;
                pending.push(child);
                continue;
            }
            if view.is_whiteout() {
                if open && !asked {
                    asked = true;
                    open = self.lower_directory(&directory.path)?.is_some();
                }
                if !open {
                    continue;
                }
            }
            self.insert_file(directory.id, name, Source { layer, view })?;
        }
        Ok(())
    }

    /// Puts the directories under one name together, given all entries of that name, the highest first, of which the first is a directory.
    fn stack(&self, entries: &[(usize, DirEntry<'a>)]) -> Result<Stack, MergeError> {
        let mut stack = Stack::default();
        for (layer, entry) in entries {
            let view = in_layer(*layer, self.layers[*layer].inode(entry.nid))?;
            if view.file_type != FileType::Directory {
                stack.cut = true;
                break;
            }
            let source = Source {
                layer: *layer,
                view,
            };
            if stack.attributes.is_none() && !self.is_marked(source, IMPLICIT_XATTR)? {
                stack.attributes = Some(source);
            }
            if !stack.opaque {
                stack.sources.push(source);
                stack.opaque = self.is_marked(source, OPAQUE_XATTR)?;
            }
            if stack.opaque && stack.attributes.is_some() {
                break;
            }
        }
        Ok(stack)
    }

    fn merge_child(
        &mut self,
        stack: Stack,
        name: &'a [u8],
        parent: &Directory<'a>,
        parent_open: bool,
    ) -> Result<Directory<'a>, MergeError> {
        let path = Some(Rc::new(Path {
            name,
            parent: parent.path.clone(),
        }));
        let hides = stack.opaque || stack.cut;
        let mut open = parent_open && !stack.cut;
        let mut inode = self.directory_inode(&stack, &path, &mut open)?;
        if parent_open && hides {
            inode.set_opaque();
        }
        let id = self.tree.insert_new(parent.id, name, inode)?;
        let open = open && !hides;
        Ok(Directory {
            id,
            sources: stack.sources,
            open,
            path,
            depth: parent.depth + 1,
        })
    }

    /// The inode of a merged directory, without marks. Closes `open` when it turns out that there is no directory below.
    fn directory_inode(
        &self,
        stack: &Stack,
        path: &Option<Rc<Path<'a>>>,
        open: &mut bool,
    ) -> Result<Inode, MergeError> {
        if let Some(Source { layer, view }) = stack.attributes {
            let mut inode = in_layer(layer, load_inode(&self.layers[layer], &view))?;
            inode.xattrs.remove(OPAQUE_XATTR);
            return Ok(inode);
        }
        let mut inode = Inode {
            implicit: false,
            ..Inode::implicit_directory()
        };
        if *open {
            match self.lower_directory(path)? {
                Some(lower) => {
                    let DirectoryAttributes {
                        permissions,
                        uid,
                        gid,
                        mtime,
                        xattrs,
                    } = lower;
                    inode = Inode {
                        permissions,
                        uid,
                        gid,
                        mtime,
                        xattrs,
                        ..inode
                    };
                    inode.xattrs.retain(|name, _| {
                        !RESERVED_XATTR_PREFIXES
                            .iter()
                            .any(|prefix| name.starts_with(prefix))
                    });
                }
                None => *open = path.is_none(),
            }
        }
        Ok(inode)
    }

    fn lower_directory(
        &self,
        path: &Option<Rc<Path<'a>>>,
    ) -> Result<Option<DirectoryAttributes>, MergeError> {
        let Some(lower) = self.lower else {
            return Ok(None);
        };
        let mut names = Vec::new();
        let mut at = path;
        while let Some(step) = at {
            names.push(step.name);
            at = &step.parent;
        }
        names.reverse();
        lower.directory(&names).map_err(|source| {
            let path = names.join(&b'/').into();
            MergeError::Lower { path, source }
        })
    }

    /// Names a file in the result, and adds its inode unless another of its names has done so.
    fn insert_file(
        &mut self,
        directory: InodeId,
        name: &[u8],
        source: Source,
    ) -> Result<(), MergeError> {
        let Source { layer, view } = source;
        let key = (layer, view.nid);
        if let Some(id) = self.linked.get(&key).filter(|_| view.links > 1) {
            self.tree.insert(directory, name, *id)?;
            return Ok(());
        }
        let mut inode = in_layer(layer, load_inode(&self.layers[layer], &view))?;
        if let InodeKind::Regular {
            extent: Some(run), ..
        } = &mut inode.kind
        {
            run.device = u16::try_from(layer + 1).map_err(|_| MergeError::LayerCount(layer + 1))?;
        }
        let id = self.tree.insert_new(directory, name, inode)?;
        if view.links > 1 {
            self.linked.insert(key, id);
        }
        Ok(())
    }

    fn is_marked(&self, source: Source, mark: &[u8]) -> Result<bool, MergeError> {
        let Source { layer, view } = source;
        let value = in_layer(layer, self.layers[layer].xattr_of(&view, mark))?;
        Ok(value == Some(MARK_VALUE))
    }
}

/// The listing of one source, with the entry that comes next.
struct Listing<'a> {
    layer: usize,
    rest: ReadDir<'a>,
    head: Option<DirEntry<'a>>,
}

impl Listing<'_> {
    /// Goes to the next entry that is not `.` or `..`.
    fn advance(&mut self, budgets: &mut [NameBudget]) -> Result<(), MergeError> {
        loop {
            self.head = in_layer(self.layer, self.rest.next().transpose())?;
            in_layer(self.layer, budgets[self.layer].spend())?;
            if self
                .head
                .is_none_or(|entry| !matches!(entry.name, b"." | b".."))
            {
                return Ok(());
            }
        }
    }
}

fn in_layer<T>(layer: usize, result: Result<T, TreeError>) -> Result<T, MergeError> {
    result.map_err(|source| MergeError::Layer { layer, source })
}
