// SPDX-License-Identifier: Apache-2.0
//! Proves that the bytes of a tree hold everything that the kernel or a file server relies on.
//!
//! The tree is walked once from the root, breadth first, without recursion. Each thing that the
//! walk meets (superblock, device table, inode with what follows it, blocks of a directory or of
//! a long symlink) claims its bytes in a bitmap of 32-byte slots, and nothing may be claimed
//! twice. That makes the work linear in the size of the image whatever the bytes say: no data is
//! looked at through two inodes. It also proves that no directory is reached twice, hence that
//! there is no cycle. Only an inode that is no directory may be met again, as often as it says.
//!
//! What is not proved: that unclaimed bytes are zero, and that the devices hold what the tree says.

use std::collections::{BTreeMap, VecDeque};

use crate::erofs::format::{
    BLOCK_BYTES, DataLayout, MAX_DEPTH, MAX_DEVICES, MAX_SYMLINK_BYTES, SLOT_BYTES,
    SUPERBLOCK_OFFSET,
};
use crate::erofs::reader::{DirectoryData, expect_type};
use crate::erofs::{FileType, InodeView, Nid, TreeError, TreeReader};
use crate::tree::{
    IMPLICIT_XATTR, MARK_VALUE, MAX_NAME_BYTES, OPAQUE_XATTR, RESERVED_XATTR_PREFIXES, check_name,
};

/// How large a tree may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeLimits {
    /// Most bytes of the image.
    pub bytes: u64,
    /// Most inodes.
    pub inodes: u64,
    /// Most devices.
    pub devices: usize,
}

impl Default for TreeLimits {
    /// Room for images some ten times larger than any known one: 4 GiB, 2^24 inodes (a tree of a million files takes about 150 MB).
    fn default() -> Self {
        Self {
            bytes: 4 << 30,
            inodes: 1 << 24,
            devices: MAX_DEVICES,
        }
    }
}

/// What the validator counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TreeSummary {
    /// All inodes.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Regular files among them.
    pub files: u64,
    /// Bytes of content of the regular files, each counted once.
    pub content_bytes: u64,
}

/// Proof that a tree was validated; hands out a reader.
#[derive(Debug, Clone, Copy)]
pub struct ValidTree<'a> {
    reader: TreeReader<'a>,
    summary: TreeSummary,
}

impl<'a> ValidTree<'a> {
    /// A reader whose operations succeed on everything that is reached from the root.
    pub fn reader(&self) -> TreeReader<'a> {
        self.reader
    }

    /// What was counted on the way.
    pub fn summary(&self) -> TreeSummary {
        self.summary
    }
}

/// Validates a tree.
///
/// **Errors**: the first fault found; [`TreeError::Limit`] when the tree is larger than allowed. Time and memory are linear in `bytes`.
pub fn validate(bytes: &[u8], limits: TreeLimits) -> Result<ValidTree<'_>, TreeError> {
    limit("image bytes", bytes.len() as u64, limits.bytes)?;
    let reader = TreeReader::open(bytes)?;
    limit(
        "devices",
        reader.devices().len() as u64,
        limits.devices as u64,
    )?;
    limit("inodes", reader.inode_count(), limits.inodes)?;
    let mut walk = Walk {
        reader,
        limits,
        claims: Claims::new(bytes.len()),
        linked: BTreeMap::new(),
        queue: VecDeque::new(),
        summary: TreeSummary::default(),
    };
    walk.run()?;
    Ok(ValidTree {
        reader,
        summary: walk.summary,
    })
}

fn limit(what: &'static str, actual: u64, limit: u64) -> Result<(), TreeError> {
    if actual <= limit {
        Ok(())
    } else {
        Err(TreeError::Limit {
            what,
            actual,
            limit,
        })
    }
}

/// One bit per 32-byte slot of the image.
struct Claims {
    taken: Vec<u64>,
}

impl Claims {
    fn new(bytes: usize) -> Self {
        Self {
            taken: vec![0; bytes.div_ceil(SLOT_BYTES * 64)],
        }
    }

    /// Claims `offset..offset + bytes`, rounded out to slots; the range must lie inside the image.
    fn claim(&mut self, what: &'static str, offset: u64, bytes: u64) -> Result<(), TreeError> {
        let slot = SLOT_BYTES as u64;
        for at in offset / slot..(offset + bytes).div_ceil(slot) {
            let word = usize::try_from(at / 64)
                .ok()
                .and_then(|at| self.taken.get_mut(at));
            let bit = 1u64 << (at % 64);
            match word {
                Some(word) if *word & bit == 0 => *word |= bit,
                _ => {
                    return Err(TreeError::Overlap {
                        what,
                        offset: at * slot,
                    });
                }
            }
        }
        Ok(())
    }
}

struct Walk<'a> {
    reader: TreeReader<'a>,
    limits: TreeLimits,
    claims: Claims,
    /// Inodes with several names: what they say, and how often they were met.
    linked: BTreeMap<Nid, (FileType, u32, u32)>,
    /// Directories to look into: inode, parent, depth.
    queue: VecDeque<(InodeView, Nid, u32)>,
    summary: TreeSummary,
}

impl<'a> Walk<'a> {
    fn run(&mut self) -> Result<(), TreeError> {
        self.claims
            .claim("superblock", SUPERBLOCK_OFFSET as u64, 128)?;
        let (offset, bytes) = self.reader.device_table();
        self.claims.claim("device table", offset, bytes)?;
        if let Some(number) = self.reader.devices().position(|device| device.tag[0] == 0) {
            let actual = number as u64 + 1;
            return Err(TreeError::Field {
                field: "device without a tag",
                expected: 0,
                actual,
            });
        }
        if let Some(actual) = self.reader.bad_device_slot() {
            return Err(TreeError::Field {
                field: "device with reserved bytes",
                expected: 0,
                actual,
            });
        }
        let root = self.reader.inode(self.reader.root())?;
        expect_type(&root, FileType::Directory)?;
        self.enter(root, root.nid, 0)?;
        while let Some((view, parent, depth)) = self.queue.pop_front() {
            self.directory(&view, parent, depth)?;
        }
        for (nid, (_, stated, met)) in &self.linked {
            links(*nid, *stated, u64::from(*met))?;
        }
        let (expected, actual) = (self.summary.inodes, self.reader.inode_count());
        if expected != actual {
            return Err(TreeError::Field {
                field: "inode count",
                expected,
                actual,
            });
        }
        Ok(())
    }

    /// Checks an inode that is met for the first time, and what belongs to it alone.
    fn enter(&mut self, view: InodeView, parent: Nid, depth: u32) -> Result<(), TreeError> {
        self.summary.inodes += 1;
        limit("inodes", self.summary.inodes, self.limits.inodes)?;
        let bytes = view.tail_offset() + view.tail_bytes() - view.offset();
        let image_bytes = self.reader.bytes().len() as u64;
        if view.offset() + bytes > image_bytes {
            let offset = view.offset();
            return Err(TreeError::OutOfBounds {
                what: "inode",
                offset,
                bytes,
                image_bytes,
            });
        }
        self.claims.claim("inode", view.offset(), bytes)?;
        self.inode(&view)?;
        self.xattrs(&view)?;
        if view.file_type == FileType::Directory {
            limit("depth", u64::from(depth), u64::from(MAX_DEPTH))?;
            self.queue.push_back((view, parent, depth));
        }
        Ok(())
    }

    fn inode(&mut self, view: &InodeView) -> Result<(), TreeError> {
        let bad = |field, value| TreeError::Inode {
            nid: view.nid,
            field,
            value,
        };
        let tail_start = view.tail_offset() % BLOCK_BYTES as u64;
        if view.layout == DataLayout::Inline {
            // Kernels refuse a tail in two blocks, and an inode that says inline has one.
            let tail = view.tail_bytes();
            if tail == 0 || tail_start + tail > BLOCK_BYTES as u64 {
                return Err(bad("inline size", view.size_bytes));
            }
        }
        match view.file_type {
            FileType::Regular => {
                self.reader.run_of(view)?;
                self.summary.files += 1;
                let sum = self.summary.content_bytes.saturating_add(view.size_bytes);
                self.summary.content_bytes = sum;
            }
            FileType::Directory => {
                self.summary.directories += 1;
                self.blocks(view, "directory blocks")?;
            }
            FileType::Symlink => {
                let target = self.reader.symlink_of(view)?;
                if target.is_empty() || target.len() > MAX_SYMLINK_BYTES || target.contains(&0) {
                    return Err(bad("symlink size", view.size_bytes));
                }
                self.blocks(view, "symlink target")?;
            }
            FileType::CharDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket => {
                if view.layout != DataLayout::Plain || view.size_bytes != 0 {
                    return Err(bad("size of a special file", view.size_bytes));
                }
            }
        }
        Ok(())
    }

    /// Claims the blocks of an inode. They are whole on disk, so the last one's padding counts.
    fn blocks(&mut self, view: &InodeView, what: &'static str) -> Result<(), TreeError> {
        let (offset, bytes) = view.block_data();
        if bytes == 0 {
            return Ok(());
        }
        let bytes = bytes.next_multiple_of(BLOCK_BYTES as u64);
        let image_bytes = self.reader.bytes().len() as u64;
        if offset
            .checked_add(bytes)
            .is_none_or(|end| end > image_bytes)
        {
            return Err(TreeError::OutOfBounds {
                what,
                offset,
                bytes,
                image_bytes,
            });
        }
        self.claims.claim(what, offset, bytes)
    }

    fn xattrs(&mut self, view: &InodeView) -> Result<(), TreeError> {
        let bad = |fault| TreeError::Xattr {
            nid: view.nid,
            at: 0,
            fault,
        };
        let mut names = std::collections::BTreeSet::new();
        for xattr in self.reader.xattrs_of(view)? {
            let (name, value) = xattr?;
            let whole = !name.prefix.ends_with(b".");
            if whole != name.suffix.is_empty() || name.suffix.contains(&0) {
                return Err(bad("an entry has an invalid name"));
            }
            if name.bytes() > MAX_NAME_BYTES {
                return Err(bad("an entry has a name that is too long"));
            }
            if !names.insert((name.prefix, name.suffix)) {
                return Err(bad("a name occurs twice"));
            }
            let directory = view.file_type == FileType::Directory;
            let mark = (name.is(OPAQUE_XATTR) || name.is(IMPLICIT_XATTR)) && value == MARK_VALUE;
            let reserved = RESERVED_XATTR_PREFIXES
                .iter()
                .any(|prefix| name.begins_with(prefix));
            if reserved && !(mark && directory) {
                return Err(bad("a reserved name is no mark of a directory"));
            }
        }
        Ok(())
    }

    fn directory(&mut self, view: &InodeView, parent: Nid, depth: u32) -> Result<(), TreeError> {
        let data = DirectoryData::new(&self.reader, view)?;
        let mut previous: Option<&[u8]> = None;
        let mut subdirectories = 0u64;
        let mut dots = 0;
        for number in 0..data.block_count() {
            let block = data.block(number)?;
            let fault = |fault| TreeError::Directory {
                nid: view.nid,
                block: number,
                fault,
            };
            for entry in 0..block.len() {
                let entry = block.entry(entry)?;
                if previous.is_some_and(|previous| previous >= entry.name) {
                    return Err(fault("names do not ascend"));
                }
                previous = Some(entry.name);
                let dot_target = match entry.name {
                    b"." => Some(view.nid),
                    b".." => Some(parent),
                    name => check_name(name)
                        .map(|()| None)
                        .map_err(|_| fault("a name is invalid"))?,
                };
                if let Some(target) = dot_target {
                    if entry.nid != target || entry.file_type != FileType::Directory {
                        return Err(fault("'.' or '..' leads elsewhere"));
                    }
                    dots += 1;
                    continue;
                }
                self.child(view.nid, entry.nid, entry.file_type, depth)?;
                subdirectories += u64::from(entry.file_type == FileType::Directory);
            }
        }
        if dots != 2 {
            let fault = "'.' or '..' is missing";
            return Err(TreeError::Directory {
                nid: view.nid,
                block: 0,
                fault,
            });
        }
        links(view.nid, view.links, 2 + subdirectories)
    }

    fn child(
        &mut self,
        parent: Nid,
        nid: Nid,
        file_type: FileType,
        depth: u32,
    ) -> Result<(), TreeError> {
        if let Some((known, stated, met)) = self.linked.get_mut(&nid) {
            *met = met.saturating_add(1);
            if *met > *stated {
                return Err(TreeError::Links {
                    nid,
                    stated: u64::from(*stated),
                    actual: u64::from(*met),
                });
            }
            let actual = *known;
            return match actual == file_type {
                true => Ok(()),
                false => Err(TreeError::Type {
                    nid,
                    expected: file_type,
                    actual,
                }),
            };
        }
        let view = self.reader.inode(nid)?;
        expect_type(&view, file_type)?;
        if file_type != FileType::Directory {
            match view.links {
                0 => return links(nid, 0, 1),
                1 => {}
                stated => {
                    self.linked.insert(nid, (file_type, stated, 1));
                }
            }
        }
        // A second way to a directory, or to a file that says it has one name, fails here.
        self.enter(view, parent, depth + 1)
    }
}

fn links(nid: Nid, stated: u32, actual: u64) -> Result<(), TreeError> {
    let stated = u64::from(stated);
    if stated == actual {
        Ok(())
    } else {
        Err(TreeError::Links {
            nid,
            stated,
            actual,
        })
    }
}
