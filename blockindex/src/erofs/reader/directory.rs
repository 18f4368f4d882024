// SPDX-License-Identifier: Apache-2.0
//! Directories in place: lookup by binary search and listing from an offset.
//!
//! A directory is a sequence of 512-byte blocks; only the last may be shorter. A block begins with
//! its entries, 12 bytes each, and ends with their names in the same order; the first entry's name
//! offset therefore tells how many there are. Names ascend by bytes within and across blocks, so
//! a lookup first finds the last block whose first name is not greater, then the name in it.
//!
//! A position in a listing is the byte offset of the next entry in the directory. It depends on
//! the image alone and stays valid across processes.

use zerocopy::FromBytes;

use super::{InodeView, Nid, TreeReader, expect_type, slice};
use crate::erofs::TreeError;
use crate::erofs::format::{BLOCK_BYTES, DIRENT_BYTES, Dirent, FileType};

/// One entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name; `.` and `..` are among them.
    pub name: &'a [u8],
    /// The inode.
    pub nid: Nid,
    /// Its type, as the entry says.
    pub file_type: FileType,
    /// Where a listing goes on behind this entry; never 0.
    pub next_offset: u64,
}

/// The entries of a directory from some position on; ends after the first error.
#[derive(Debug, Clone)]
pub struct ReadDir<'a> {
    data: DirectoryData<'a>,
    /// The block being listed, and its number.
    block: Option<DirectoryBlock<'a>>,
    number: u64,
    entry: usize,
}

/// The bytes of a directory, which stand in up to two places.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectoryData<'a> {
    nid: Nid,
    /// Blocks in the data area; the last may be short.
    blocks: &'a [u8],
    /// The short last block, when it follows the inode.
    tail: &'a [u8],
}

impl<'a> DirectoryData<'a> {
    pub(crate) fn new(reader: &TreeReader<'a>, inode: &InodeView) -> Result<Self, TreeError> {
        expect_type(inode, FileType::Directory)?;
        let (offset, bytes) = inode.block_data();
        let blocks = match bytes {
            0 => &[][..],
            _ => slice(reader.bytes, offset, bytes, "directory blocks")?,
        };
        let tail = slice(
            reader.bytes,
            inode.tail_offset(),
            inode.tail_bytes(),
            "directory tail",
        )?;
        Ok(Self {
            nid: inode.nid,
            blocks,
            tail,
        })
    }

    pub(crate) fn block_count(&self) -> u64 {
        self.blocks.len().div_ceil(BLOCK_BYTES) as u64 + u64::from(!self.tail.is_empty())
    }

    pub(crate) fn block(&self, number: u64) -> Result<DirectoryBlock<'a>, TreeError> {
        let start = usize::try_from(number)
            .ok()
            .and_then(|n| n.checked_mul(BLOCK_BYTES));
        let bytes = match start {
            Some(start) if start < self.blocks.len() => {
                &self.blocks[start..self.blocks.len().min(start + BLOCK_BYTES)]
            }
            _ => self.tail,
        };
        DirectoryBlock::new(self.nid, number, bytes)
    }

    fn lookup(&self, name: &[u8]) -> Result<Option<(Nid, FileType)>, TreeError> {
        let (mut low, mut high) = (0, self.block_count());
        // Blocks before `low` begin with a name that is not greater, blocks from `high` on with a greater one.
        while low < high {
            let middle = low + (high - low) / 2;
            if self.block(middle)?.name(0)? <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        match low.checked_sub(1) {
            Some(number) => self.block(number)?.lookup(name),
            None => Ok(None),
        }
    }
}

/// One block of a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectoryBlock<'a> {
    nid: Nid,
    number: u64,
    bytes: &'a [u8],
    entries: &'a [Dirent],
}

impl<'a> DirectoryBlock<'a> {
    fn new(nid: Nid, number: u64, bytes: &'a [u8]) -> Result<Self, TreeError> {
        let entries = Dirent::ref_from_prefix(bytes).ok().and_then(|(first, _)| {
            let names = usize::from(first.name_offset.get());
            if names < DIRENT_BYTES || !names.is_multiple_of(DIRENT_BYTES) {
                return None;
            }
            <[Dirent]>::ref_from_bytes(bytes.get(..names)?).ok()
        });
        let fault = "the first name offset is not behind whole entries";
        match entries {
            Some(entries) => Ok(Self {
                nid,
                number,
                bytes,
                entries,
            }),
            None => Err(TreeError::Directory {
                nid,
                block: number,
                fault,
            }),
        }
    }

    fn fault(&self, fault: &'static str) -> TreeError {
        TreeError::Directory {
            nid: self.nid,
            block: self.number,
            fault,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn name(&self, entry: usize) -> Result<&'a [u8], TreeError> {
        let outside = || self.fault("a name lies outside the block");
        let start = usize::from(
            self.entries
                .get(entry)
                .ok_or_else(outside)?
                .name_offset
                .get(),
        );
        let name = match self.entries.get(entry + 1) {
            Some(next) => self
                .bytes
                .get(start..usize::from(next.name_offset.get()))
                .ok_or_else(outside)?,
            None => {
                // The last name ends at the padding, if there is any.
                let rest = self.bytes.get(start..).ok_or_else(outside)?;
                &rest[..rest
                    .iter()
                    .position(|byte| *byte == 0)
                    .unwrap_or(rest.len())]
            }
        };
        Ok(name)
    }

    pub(crate) fn entry(&self, entry: usize) -> Result<DirEntry<'a>, TreeError> {
        let name = self.name(entry)?;
        let (nid, file_type) = self.target(entry)?;
        let next = if entry + 1 < self.entries.len() {
            self.number * BLOCK_BYTES as u64 + ((entry + 1) * DIRENT_BYTES) as u64
        } else {
            (self.number + 1) * BLOCK_BYTES as u64
        };
        Ok(DirEntry {
            name,
            nid,
            file_type,
            next_offset: next,
        })
    }

    fn target(&self, entry: usize) -> Result<(Nid, FileType), TreeError> {
        let dirent = &self.entries[entry];
        let file_type = FileType::from_dirent_number(dirent.file_type)
            .ok_or_else(|| self.fault("an entry has no valid file type"))?;
        Ok((Nid(dirent.nid.get()), file_type))
    }

    fn lookup(&self, name: &[u8]) -> Result<Option<(Nid, FileType)>, TreeError> {
        let (mut low, mut high) = (0, self.entries.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.name(middle)?.cmp(name) {
                std::cmp::Ordering::Equal => return self.target(middle).map(Some),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

impl<'a> Iterator for ReadDir<'a> {
    type Item = Result<DirEntry<'a>, TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.number >= self.data.block_count() {
                return None;
            }
            let block = match self.block {
                Some(block) => block,
                None => match self.data.block(self.number) {
                    Ok(block) => *self.block.insert(block),
                    Err(error) => return self.fail(error),
                },
            };
            if self.entry < block.len() {
                let entry = block.entry(self.entry);
                self.entry += 1;
                return match entry {
                    Ok(entry) => Some(Ok(entry)),
                    Err(error) => self.fail(error),
                };
            }
            self.block = None;
            self.number += 1;
            self.entry = 0;
        }
    }
}

impl<'a> ReadDir<'a> {
    fn fail(&mut self, error: TreeError) -> Option<Result<DirEntry<'a>, TreeError>> {
        self.number = u64::MAX;
        Some(Err(error))
    }
}

impl<'a> TreeReader<'a> {
    /// Finds a name in a directory; `.` and `..` are found too.
    ///
    /// **Errors**: [`TreeError::Type`] when `directory` is none.
    pub fn lookup(&self, directory: Nid, name: &[u8]) -> Result<Option<Nid>, TreeError> {
        let inode = self.inode(directory)?;
        Ok(DirectoryData::new(self, &inode)?
            .lookup(name)?
            .map(|(nid, _)| nid))
    }

    /// Lists a directory from a position on: 0 for the first entry, or any [`DirEntry::next_offset`].
    ///
    /// **Shape**: entries ascend by name. A position that is not one of those goes on with the next entry behind it; one behind the end lists nothing.
    /// **Errors**: [`TreeError::Type`] when `directory` is none; malformed blocks show up while listing.
    pub fn read_dir(&self, directory: Nid, from: u64) -> Result<ReadDir<'a>, TreeError> {
        let inode = self.inode(directory)?;
        self.read_dir_of(&inode, from)
    }

    /// Lists a directory whose inode is at hand.
    pub fn read_dir_of(&self, inode: &InodeView, from: u64) -> Result<ReadDir<'a>, TreeError> {
        let data = DirectoryData::new(self, inode)?;
        let block = BLOCK_BYTES as u64;
        let entry = usize::try_from((from % block).div_ceil(DIRENT_BYTES as u64));
        Ok(ReadDir {
            data,
            block: None,
            number: from / block,
            entry: entry.unwrap_or(usize::MAX),
        })
    }
}
