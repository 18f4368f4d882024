// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with the bytes of a tree.

use crate::erofs::{FileType, Nid};

/// What is wrong with the bytes of a tree. All of these mean corruption or malice; a retry on the same bytes is pointless.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// Something lies outside the image.
    #[error("{what} at {offset}+{bytes} lies outside the image of {image_bytes} bytes")]
    OutOfBounds {
        /// What should be there.
        what: &'static str,
        /// Where it begins.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// The image's length.
        image_bytes: u64,
    },
    /// A field of the superblock or of a device slot has a value that we never write and cannot serve.
    #[error("{field} is {actual:#x}, not {expected:#x}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it should be.
        expected: u64,
        /// What it is.
        actual: u64,
    },
    /// A field of an inode has a value that cannot be.
    #[error("inode {}: {field} is {value:#x}", nid.0)]
    Inode {
        /// Which inode.
        nid: Nid,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// An operation met an inode of another type than it is for.
    #[error("inode {} is a {actual:?}, not a {expected:?}", nid.0)]
    Type {
        /// Which inode.
        nid: Nid,
        /// The type needed.
        expected: FileType,
        /// The type found.
        actual: FileType,
    },
    /// A directory block is malformed.
    #[error("directory {}, block {block}: {fault}", nid.0)]
    Directory {
        /// The directory.
        nid: Nid,
        /// Which of its blocks.
        block: u64,
        /// What is wrong.
        fault: &'static str,
    },
    /// The xattrs of an inode are malformed.
    #[error("xattrs of inode {}, byte {at}: {fault}", nid.0)]
    Xattr {
        /// The inode.
        nid: Nid,
        /// Where, counted from the first entry.
        at: u64,
        /// What is wrong.
        fault: &'static str,
    },
    /// A file's content lies outside its device.
    #[error("file {}: {blocks} blocks from block {start_block} of device {device} lie outside it", nid.0)]
    Run {
        /// The file.
        nid: Nid,
        /// The device.
        device: u16,
        /// First block.
        start_block: u64,
        /// Number of blocks.
        blocks: u64,
    },
    /// Two things claim the same bytes, or a directory is reached twice.
    #[error("{what} at byte {offset} overlaps something else or is reached twice")]
    Overlap {
        /// What was met second.
        what: &'static str,
        /// Where.
        offset: u64,
    },
    /// An inode has another number of names than it says.
    #[error("inode {} has {actual} names but says {stated}", nid.0)]
    Links {
        /// The inode.
        nid: Nid,
        /// What it says.
        stated: u64,
        /// What was found, at least.
        actual: u64,
    },
    /// A limit is exceeded.
    #[error("{what}: {actual} is more than the limit of {limit}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// What was found, at least.
        actual: u64,
        /// The limit.
        limit: u64,
    },
}
