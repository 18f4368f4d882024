// SPDX-License-Identifier: Apache-2.0
//! Looks the whole tree over before anything is written: what is reachable, in which order it is
//! written, how many names it has, and whether all of it can be written.

use super::xattrs::check_xattrs;
use super::{InodeFault, WriteError};
use crate::erofs::format::{
    BLOCK_BYTES, DeviceTableSlot, MAX_CHUNK_BITS, MAX_DEPTH, MAX_SYMLINK_BYTES, NULL_BLOCK,
};
use crate::tree::{Inode, InodeId, InodeKind, Tree};

/// What the survey found; tables are by arena index.
pub(super) struct Survey {
    /// The inodes to write, breadth first, so that those of one directory stand together.
    pub(super) order: Vec<InodeId>,
    links: Vec<u32>,
    parents: Vec<InodeId>,
}

impl Survey {
    pub(super) fn of(tree: &Tree, devices: &[DeviceTableSlot]) -> Result<Self, WriteError> {
        let root = tree.root();
        let mut survey = Self {
            order: vec![root],
            links: vec![0; tree.arena_len()],
            parents: vec![root; tree.arena_len()],
        };
        survey.links[root.index()] = 2;
        let mut depth = 0;
        let mut level_end = 1;
        let mut at = 0;
        while let Some(id) = survey.order.get(at).copied() {
            if at == level_end {
                depth += 1;
                level_end = survey.order.len();
            }
            at += 1;
            let fault = |survey: &Self, fault| survey.fault(tree, id, fault);
            check_inode(tree.inode(id), devices).map_err(|found| fault(&survey, found))?;
            if depth > MAX_DEPTH && tree.inode(id).is_directory() {
                return Err(fault(&survey, InodeFault::Depth));
            }
            for child in tree.children(id).values() {
                survey
                    .link(tree, id, *child)
                    .map_err(|found| survey.fault(tree, *child, found))?;
            }
        }
        Ok(survey)
    }

    fn link(&mut self, tree: &Tree, parent: InodeId, child: InodeId) -> Result<(), InodeFault> {
        let directory = tree.inode(child).is_directory();
        let links = self.links[child.index()];
        if links == 0 {
            self.order.push(child);
            self.parents[child.index()] = parent;
        } else if directory {
            return Err(InodeFault::DirectoryLinked);
        }
        self.links[child.index()] = match directory {
            true => 2,
            false => links.checked_add(1).ok_or(InodeFault::Links)?,
        };
        if directory {
            let links = &mut self.links[parent.index()];
            *links = links.checked_add(1).ok_or(InodeFault::Links)?;
        }
        Ok(())
    }

    /// Names of an inode; of a directory 2 + its subdirectories.
    pub(super) fn links(&self, id: InodeId) -> u32 {
        self.links[id.index()]
    }

    /// The directory in which an inode was first met; the root is its own.
    pub(super) fn parent(&self, id: InodeId) -> InodeId {
        self.parents[id.index()]
    }

    /// Names the file for an error; slow.
    fn fault(&self, tree: &Tree, id: InodeId, fault: InodeFault) -> WriteError {
        let mut names = Vec::new();
        let mut at = id;
        while at != tree.root() {
            let parent = self.parent(at);
            let entry = tree
                .children(parent)
                .iter()
                .find(|(_, child)| **child == at);
            names.push(entry.map_or(&b"?"[..], |(name, _)| name));
            at = parent;
        }
        names.reverse();
        WriteError::Inode {
            path: names.join(&b'/').into(),
            fault,
        }
    }
}

fn check_inode(inode: &Inode, devices: &[DeviceTableSlot]) -> Result<(), InodeFault> {
    if inode.permissions > 0o7777 {
        return Err(InodeFault::Permissions(inode.permissions));
    }
    if inode.mtime.nanoseconds >= 1_000_000_000 {
        return Err(InodeFault::Nanoseconds(inode.mtime.nanoseconds));
    }
    check_xattrs(inode)?;
    match &inode.kind {
        InodeKind::Symlink(target)
            if target.is_empty() || target.len() > MAX_SYMLINK_BYTES || target.contains(&0) =>
        {
            Err(InodeFault::SymlinkTarget(target.len()))
        }
        InodeKind::Regular {
            size_bytes: size_bytes @ 1..,
            extent,
        } => {
            if *size_bytes > 1 << MAX_CHUNK_BITS {
                return Err(InodeFault::FileSize(*size_bytes));
            }
            let run = extent.ok_or(InodeFault::NoRun(*size_bytes))?;
            let blocks = size_bytes.div_ceil(BLOCK_BYTES as u64);
            let slot = usize::from(run.device)
                .checked_sub(1)
                .and_then(|at| devices.get(at));
            let end = run.start_block.checked_add(blocks);
            let inside = slot.zip(end).is_some_and(|(slot, end)| {
                end <= u64::from(slot.blocks.get()) && run.start_block < u64::from(NULL_BLOCK)
            });
            let (device, start_block) = (run.device, run.start_block);
            if inside {
                Ok(())
            } else {
                Err(InodeFault::Run {
                    device,
                    start_block,
                    blocks,
                })
            }
        }
        _ => Ok(()),
    }
}
