// SPDX-License-Identifier: Apache-2.0
//! Packs the entries of a directory into blocks.
//!
//! Entries go into a block, in order of their names, as long as they fit with their names; all
//! blocks but the last are padded to their full size.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::{Emitter, Sink};
use crate::erofs::format::{BLOCK_BYTES, DIRENT_BYTES, Dirent, FileType};
use crate::tree::{InodeId, InodeKind};

/// How large a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirectorySize {
    /// All blocks, a short last one included.
    pub(super) blocks: u64,
    /// Bytes of the last block when it is short, else 0.
    pub(super) tail_bytes: usize,
}

impl DirectorySize {
    pub(super) fn bytes(&self) -> u64 {
        let padding = match self.tail_bytes {
            0 => 0,
            tail => (BLOCK_BYTES - tail) as u64,
        };
        self.blocks * BLOCK_BYTES as u64 - padding
    }
}

type Entry<'t> = (&'t [u8], InodeId);

pub(super) fn type_of(kind: &InodeKind) -> FileType {
    match kind {
        InodeKind::Directory => FileType::Directory,
        InodeKind::Regular { .. } => FileType::Regular,
        InodeKind::Symlink(_) => FileType::Symlink,
        InodeKind::CharDevice(_) => FileType::CharDevice,
        InodeKind::BlockDevice(_) => FileType::BlockDevice,
        InodeKind::Fifo => FileType::Fifo,
        InodeKind::Socket => FileType::Socket,
    }
}

impl<'t> Emitter<'t> {
    /// The entries in order, `.` and `..` where their names belong: names may sort before them.
    fn entries(&self, directory: InodeId) -> impl Iterator<Item = Entry<'t>> {
        let mut dots = [
            (&b"."[..], directory),
            (b"..", self.survey.parent(directory)),
        ]
        .into_iter()
        .peekable();
        let names = self
            .tree
            .children(directory)
            .iter()
            .map(|(name, id)| (&**name, *id));
        let mut names = names.peekable();
        std::iter::from_fn(move || match (dots.peek(), names.peek()) {
            (Some(dot), Some(name)) if name.0 < dot.0 => names.next(),
            (Some(_), _) => dots.next(),
            (None, _) => names.next(),
        })
    }

    /// Calls back with the entries of each block and the bytes that they take.
    fn for_each_block(&self, directory: InodeId, mut block: impl FnMut(&[Entry<'t>], usize)) {
        let mut pending: Vec<Entry<'t>> = Vec::with_capacity(BLOCK_BYTES / DIRENT_BYTES);
        let mut bytes = 0;
        for entry in self.entries(directory) {
            let more = DIRENT_BYTES + entry.0.len();
            if bytes + more > BLOCK_BYTES {
                block(&pending, bytes);
                pending.clear();
                bytes = 0;
            }
            pending.push(entry);
            bytes += more;
        }
        block(&pending, bytes);
    }

    pub(super) fn directory_size(&self, directory: InodeId) -> DirectorySize {
        let mut size = DirectorySize {
            blocks: 0,
            tail_bytes: 0,
        };
        self.for_each_block(directory, |_, bytes| {
            size.blocks += 1;
            size.tail_bytes = bytes % BLOCK_BYTES;
        });
        size
    }

    /// Puts some blocks of a directory. The last block of the directory is not padded.
    pub(super) fn put_directory(
        &self,
        directory: InodeId,
        wanted: Range<u64>,
        sink: &mut impl Sink,
    ) {
        let mut number = 0;
        let mut end_of_previous = None;
        self.for_each_block(directory, |entries, bytes| {
            let put = wanted.contains(&number);
            number += 1;
            if !put {
                return;
            }
            if let Some(end) = end_of_previous.replace(sink.position() + BLOCK_BYTES as u64) {
                sink.pad_to(end);
                end_of_previous = Some(end + BLOCK_BYTES as u64);
            }
            debug_assert!(bytes <= BLOCK_BYTES);
            self.put_block(entries, sink);
        });
    }

    fn put_block(&self, entries: &[Entry<'t>], sink: &mut impl Sink) {
        let mut name_offset = entries.len() * DIRENT_BYTES;
        for (name, id) in entries {
            let dirent = Dirent {
                nid: self.places.nid(*id).into(),
                // Below 512, because the entries fit into a block.
                name_offset: u16::try_from(name_offset).unwrap_or(u16::MAX).into(),
                file_type: type_of(&self.tree.inode(*id).kind).dirent_number(),
                reserved: 0,
            };
            sink.put(dirent.as_bytes());
            name_offset += name.len();
        }
        entries.iter().for_each(|(name, _)| sink.put(name));
    }
}
