// SPDX-License-Identifier: Apache-2.0
//! Trees on disk: EROFS metadata images of 512-byte blocks whose files point into layer devices.
//!
//! [`write_tree`] makes an image of a [`crate::tree::Tree`], [`TreeReader`] reads one in place,
//! [`validate`] proves that one holds everything that the kernel or a file server relies on, and
//! [`to_tree`] brings one back into memory. `docs/formats/erofs-tree.md` is the byte-level
//! description.

mod error;
pub mod format;
mod load;
mod reader;
mod validate;
mod writer;

pub use error::TreeError;
pub use format::{FileType, MAX_DEPTH, MAX_DEVICES, MAX_SYMLINK_BYTES};
pub use load::to_tree;
pub(crate) use load::{NameBudget, load_inode};
pub use reader::{DirEntry, InodeView, Nid, ReadDir, TreeReader, XattrName, Xattrs};
pub use validate::{TreeLimits, TreeSummary, ValidTree, validate};
pub use writer::{InodeFault, WriteError, write_tree};

pub use crate::units::BLOCK_BYTES;

const _: () = assert!(format::BLOCK_BYTES as u64 == BLOCK_BYTES);

/// A device as the device table describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Names the device, first byte not 0; by convention the 64 hex digits of the diff ID.
    pub tag: [u8; 64],
    /// Size of the device, in blocks of [`BLOCK_BYTES`].
    pub blocks: u64,
}
