// SPDX-License-Identifier: Apache-2.0
//! Reads an EROFS tree in place, from a byte slice that may be a memory map.
//!
//! [`TreeReader`] is two words and a few numbers, is `Copy`, and holds no state: an inode is
//! found from its number by arithmetic, a name by binary search over the directory's blocks and
//! then over the entries of one block. Nothing here allocates except where it says so. Any bytes
//! may be given: all arithmetic is checked and a fault is a [`TreeError`], never a panic. Without
//! a prior [`crate::erofs::validate`] a walk may meet the same directory for ever; a single call
//! always ends.

mod directory;
mod xattrs;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::erofs::format::{
    BLOCK_BITS, BLOCK_BYTES, CHUNK_FORMAT_BITS_MASK, CHUNK_FORMAT_INDEXES, CHUNK_INDEX_BYTES,
    COMPAT_FEATURES, ChunkIndex, DEVICE_SLOT_BYTES, DEVICE_TABLE_OFFSET, DataLayout,
    DeviceTableSlot, DiskInode, FileType, INCOMPAT_FEATURES, INODE_BYTES, MAGIC,
    MODE_PERMISSIONS_MASK, NULL_BLOCK, SLOT_BYTES, SUPERBLOCK_OFFSET, Superblock,
    XATTR_HEADER_BYTES, superblock_checksum,
};
use crate::erofs::{DeviceSlot, TreeError};
use crate::tree::{DeviceNumber, FileRun, Timestamp};

pub(crate) use directory::DirectoryData;
pub use directory::{DirEntry, ReadDir};
pub use xattrs::{XattrName, Xattrs};

/// Names an inode: its offset in the image in units of 32 bytes. Never 0 or 1, so that FUSE, where 1 is the root, can use it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u64);

/// An inode as it stands on disk, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeView {
    /// Its number.
    pub nid: Nid,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits with setuid, setgid and sticky.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes; of a directory the size of its entries, of a symlink that of its target.
    pub size_bytes: u64,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Number of names; of a directory 2 + its subdirectories.
    pub links: u32,
    /// Number of a character or block device, else 0:0.
    pub device_number: DeviceNumber,
    pub(crate) layout: DataLayout,
    /// Bytes of the xattr area, its header included; 0 or more than the header.
    pub(crate) xattr_bytes: usize,
    detail: u32,
}

impl InodeView {
    /// The mode as `stat` gives it: type and permissions.
    pub fn mode(&self) -> u32 {
        u32::from(self.file_type.mode_bits() | self.permissions)
    }

    /// Whether this is an overlayfs whiteout.
    pub fn is_whiteout(&self) -> bool {
        self.file_type == FileType::CharDevice && self.device_number == DeviceNumber::WHITEOUT
    }

    /// Whether there are no xattrs.
    pub fn has_no_xattrs(&self) -> bool {
        self.xattr_bytes == 0
    }

    /// Where the inode begins in the image.
    pub(crate) fn offset(&self) -> u64 {
        self.nid.0 * SLOT_BYTES as u64
    }

    /// Where what follows inode and xattrs begins: the inline tail, or (aligned) the chunk index.
    pub(crate) fn tail_offset(&self) -> u64 {
        let end = self.offset() + (INODE_BYTES + self.xattr_bytes) as u64;
        match self.layout {
            DataLayout::Chunks => end.next_multiple_of(CHUNK_INDEX_BYTES as u64),
            DataLayout::Plain | DataLayout::Inline => end,
        }
    }

    /// Bytes of what follows inode and xattrs.
    pub(crate) fn tail_bytes(&self) -> u64 {
        match self.layout {
            DataLayout::Plain => 0,
            DataLayout::Inline => self.size_bytes % BLOCK_BYTES as u64,
            DataLayout::Chunks => CHUNK_INDEX_BYTES as u64,
        }
    }

    /// The bytes of whole blocks elsewhere in the image, as (offset, length on disk without padding).
    pub(crate) fn block_data(&self) -> (u64, u64) {
        let bytes = match self.layout {
            DataLayout::Plain => self.size_bytes,
            DataLayout::Inline => self.size_bytes - self.tail_bytes(),
            DataLayout::Chunks => 0,
        };
        (u64::from(self.detail) * BLOCK_BYTES as u64, bytes)
    }
}

/// Reads a tree from its bytes; see the module's text.
#[derive(Debug, Clone, Copy)]
pub struct TreeReader<'a> {
    bytes: &'a [u8],
    root: Nid,
    inodes: u64,
    devices: u16,
    device_table: u64,
}

impl<'a> TreeReader<'a> {
    /// Reads and checks the superblock.
    ///
    /// **Errors**: [`TreeError::Field`] when it is not a superblock as [`crate::erofs::write_tree`] writes it, [`TreeError::OutOfBounds`] when bytes are missing.
    pub fn open(bytes: &'a [u8]) -> Result<Self, TreeError> {
        let superblock: &Superblock = record(bytes, SUPERBLOCK_OFFSET as u64, "superblock")?;
        field("magic", MAGIC, superblock.magic.get())?;
        field(
            "feature_incompat",
            INCOMPAT_FEATURES,
            superblock.feature_incompat.get(),
        )?;
        field(
            "feature_compat",
            COMPAT_FEATURES,
            superblock.feature_compat.get(),
        )?;
        field("block bits", BLOCK_BITS, superblock.block_bits)?;
        field("extension slots", 0, superblock.extension_slots)?;
        field("time base", 0u64, superblock.epoch.get())?;
        field(
            "time base nanoseconds",
            0u32,
            superblock.fixed_nanoseconds.get(),
        )?;
        field("UUID", false, superblock.uuid != [0; 16])?;
        field("volume name", false, superblock.volume_name != [0; 16])?;
        field("meta block", 0u32, superblock.meta_block.get())?;
        field("xattr block", 0u32, superblock.xattr_block.get())?;
        field("compression", 0u16, superblock.compression.get())?;
        field("directory block bits", 0, superblock.directory_block_bits)?;
        field("xattr prefixes", 0, superblock.xattr_prefixes)?;
        field(
            "xattr prefix start",
            0u32,
            superblock.xattr_prefix_start.get(),
        )?;
        field("packed nid", 0u64, superblock.packed_nid.get())?;
        field("reserved", false, superblock.reserved != [0; 24])?;
        let checked = slice(
            bytes,
            SUPERBLOCK_OFFSET as u64,
            BLOCK_BYTES as u64,
            "superblock",
        )?;
        field(
            "checksum",
            superblock_checksum(checked),
            superblock.checksum.get(),
        )?;
        let image_blocks = bytes.len() as u64 / BLOCK_BYTES as u64;
        field("blocks", image_blocks, u64::from(superblock.blocks.get()))?;
        let device_table = u64::from(superblock.device_table_slot.get()) * DEVICE_SLOT_BYTES as u64;
        field(
            "place of the device table",
            DEVICE_TABLE_OFFSET as u64,
            device_table,
        )?;
        let devices = superblock.devices.get();
        let table_bytes = u64::from(devices) * DEVICE_SLOT_BYTES as u64;
        slice(bytes, device_table, table_bytes, "device table")?;
        Ok(Self {
            bytes,
            root: Nid(u64::from(superblock.root_nid.get())),
            inodes: superblock.inodes.get(),
            devices,
            device_table,
        })
    }

    /// The image itself.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.root
    }

    /// How many inodes the superblock says there are.
    pub fn inode_count(&self) -> u64 {
        self.inodes
    }

    /// The device table, in the order of device numbers, the first being device 1.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = DeviceSlot> + use<'a> {
        let start = usize::try_from(self.device_table).unwrap_or(usize::MAX);
        let bytes = self.bytes;
        (0..self.devices).map(move |ordinal| {
            let offset = (start + usize::from(ordinal) * DEVICE_SLOT_BYTES) as u64;
            match record::<DeviceTableSlot>(bytes, offset, "device slot") {
                Ok(slot) => DeviceSlot {
                    tag: slot.tag,
                    blocks: u64::from(slot.blocks.get()),
                },
                // `open` has seen the whole table.
                Err(_) => DeviceSlot {
                    tag: [0; 64],
                    blocks: 0,
                },
            }
        })
    }

    /// The device of a number that counts from 1.
    pub fn device(&self, number: u16) -> Option<DeviceSlot> {
        self.devices().nth(usize::from(number.checked_sub(1)?))
    }

    /// The first device, counted from 1, whose slot has bytes set that must be 0.
    pub(crate) fn bad_device_slot(&self) -> Option<u64> {
        (0..u64::from(self.devices))
            .find(|ordinal| {
                let offset = self.device_table + ordinal * DEVICE_SLOT_BYTES as u64;
                record::<DeviceTableSlot>(self.bytes, offset, "device slot")
                    .is_ok_and(|slot| slot.mapped_block.get() != 0 || slot.reserved != [0; 56])
            })
            .map(|ordinal| ordinal + 1)
    }

    /// Where the device table stands: offset and bytes.
    pub(crate) fn device_table(&self) -> (u64, u64) {
        (
            self.device_table,
            u64::from(self.devices) * DEVICE_SLOT_BYTES as u64,
        )
    }

    /// Decodes an inode.
    ///
    /// **Errors**: [`TreeError::OutOfBounds`] for a number outside the image, [`TreeError::Inode`] for fields that cannot be.
    pub fn inode(&self, nid: Nid) -> Result<InodeView, TreeError> {
        let offset = nid.0.saturating_mul(SLOT_BYTES as u64);
        let inode: &DiskInode = record(self.bytes, offset, "inode")?;
        let bad = |field, value: u64| TreeError::Inode { nid, field, value };
        let format = inode.format.get();
        let layout = (format & 1 == 1)
            .then(|| DataLayout::from_number(format >> 1))
            .flatten()
            .ok_or(bad("format", u64::from(format)))?;
        let mode = inode.mode.get();
        let file_type = FileType::from_mode(mode).ok_or(bad("mode", u64::from(mode)))?;
        if layout == DataLayout::Chunks && file_type != FileType::Regular {
            return Err(bad("format", u64::from(format)));
        }
        let size_bytes = inode.size.get();
        if i64::try_from(size_bytes).is_err() {
            return Err(bad("size", size_bytes));
        }
        if inode.reserved.get() != 0 || inode.reserved_end != [0; 16] {
            return Err(bad("reserved", 1));
        }
        let nanoseconds = inode.mtime_nanoseconds.get();
        if nanoseconds >= 1_000_000_000 {
            return Err(bad("mtime nanoseconds", u64::from(nanoseconds)));
        }
        let xattr_bytes = match usize::from(inode.xattr_count.get()) {
            0 => 0,
            // A header and nothing else is what kernels refuse.
            1 => return Err(bad("xattr count", 1)),
            count => XATTR_HEADER_BYTES + (count - 1) * 4,
        };
        let detail = inode.detail.get();
        let device_number = match file_type {
            FileType::CharDevice | FileType::BlockDevice => DeviceNumber::from_encoded(detail),
            _ => DeviceNumber::default(),
        };
        Ok(InodeView {
            nid,
            file_type,
            permissions: mode & MODE_PERMISSIONS_MASK,
            uid: inode.uid.get(),
            gid: inode.gid.get(),
            size_bytes,
            mtime: Timestamp {
                seconds: inode.mtime.get(),
                nanoseconds,
            },
            links: inode.links.get(),
            device_number,
            layout,
            xattr_bytes,
            detail,
        })
    }

    /// The target of a symlink.
    ///
    /// **Errors**: [`TreeError::Type`] when it is none.
    pub fn symlink(&self, nid: Nid) -> Result<&'a [u8], TreeError> {
        self.symlink_of(&self.inode_of_type(nid, FileType::Symlink)?)
    }

    /// The target of a symlink whose inode is at hand.
    pub fn symlink_of(&self, inode: &InodeView) -> Result<&'a [u8], TreeError> {
        expect_type(inode, FileType::Symlink)?;
        let (offset, bytes) = inode.block_data();
        match (bytes, inode.tail_bytes()) {
            (0, tail) => slice(self.bytes, inode.tail_offset(), tail, "symlink target"),
            (_, 0) => slice(self.bytes, offset, bytes, "symlink target"),
            // A target in two pieces cannot be lent as one slice; the writer never makes one.
            _ => Err(TreeError::Inode {
                nid: inode.nid,
                field: "symlink size",
                value: inode.size_bytes,
            }),
        }
    }

    /// Where the content of a regular file stands; `None` when it is empty.
    ///
    /// **Errors**: [`TreeError::Type`] when it is no regular file, [`TreeError::Run`] when the run is not inside a device.
    pub fn run(&self, nid: Nid) -> Result<Option<FileRun>, TreeError> {
        self.run_of(&self.inode_of_type(nid, FileType::Regular)?)
    }

    /// Where the content of a regular file stands whose inode is at hand.
    pub fn run_of(&self, inode: &InodeView) -> Result<Option<FileRun>, TreeError> {
        expect_type(inode, FileType::Regular)?;
        let bad = |field, value: u64| TreeError::Inode {
            nid: inode.nid,
            field,
            value,
        };
        if inode.layout != DataLayout::Chunks {
            return match inode.size_bytes {
                0 => Ok(None),
                // Content inside the image: the writer never does that.
                size => Err(bad("size of a file without chunks", size)),
            };
        }
        let chunk_format = u16::try_from(inode.detail)
            .map_err(|_| bad("chunk format", u64::from(inode.detail)))?;
        let chunk_bits = BLOCK_BITS as u16 + (chunk_format & CHUNK_FORMAT_BITS_MASK);
        if chunk_format & !CHUNK_FORMAT_BITS_MASK != CHUNK_FORMAT_INDEXES {
            return Err(bad("chunk format", u64::from(chunk_format)));
        }
        if inode.size_bytes == 0 || inode.size_bytes > 1u64 << chunk_bits {
            return Err(bad("size of a file of one chunk", inode.size_bytes));
        }
        let index: &ChunkIndex = record(self.bytes, inode.tail_offset(), "chunk index")?;
        let run = FileRun {
            device: index.device.get(),
            start_block: u64::from(index.start_block.get()),
        };
        let blocks = inode.size_bytes.div_ceil(BLOCK_BYTES as u64);
        let inside = index.start_block_high.get() == 0
            && index.start_block.get() != NULL_BLOCK
            && self
                .device(run.device)
                .is_some_and(|device| run.start_block + blocks <= device.blocks);
        if !inside {
            let FileRun {
                device,
                start_block,
            } = run;
            return Err(TreeError::Run {
                nid: inode.nid,
                device,
                start_block,
                blocks,
            });
        }
        Ok(Some(run))
    }

    fn inode_of_type(&self, nid: Nid, expected: FileType) -> Result<InodeView, TreeError> {
        let inode = self.inode(nid)?;
        expect_type(&inode, expected)?;
        Ok(inode)
    }
}

pub(crate) fn expect_type(inode: &InodeView, expected: FileType) -> Result<(), TreeError> {
    if inode.file_type == expected {
        return Ok(());
    }
    Err(TreeError::Type {
        nid: inode.nid,
        expected,
        actual: inode.file_type,
    })
}

fn field<T: Into<u64> + Copy + PartialEq>(
    field: &'static str,
    expected: T,
    actual: T,
) -> Result<(), TreeError> {
    if expected == actual {
        return Ok(());
    }
    Err(TreeError::Field {
        field,
        expected: expected.into(),
        actual: actual.into(),
    })
}

/// Lends a part of the image.
pub(crate) fn slice<'a>(
    image: &'a [u8],
    offset: u64,
    bytes: u64,
    what: &'static str,
) -> Result<&'a [u8], TreeError> {
    let range = || {
        let start = usize::try_from(offset).ok()?;
        image.get(start..start.checked_add(usize::try_from(bytes).ok()?)?)
    };
    range().ok_or(TreeError::OutOfBounds {
        what,
        offset,
        bytes,
        image_bytes: image.len() as u64,
    })
}

/// Lends a structure of the image.
pub(crate) fn record<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    image: &'a [u8],
    offset: u64,
    what: &'static str,
) -> Result<&'a T, TreeError> {
    let bytes = size_of::<T>() as u64;
    let exact = slice(image, offset, bytes, what)?;
    T::ref_from_bytes(exact).map_err(|_| TreeError::OutOfBounds {
        what,
        offset,
        bytes,
        image_bytes: image.len() as u64,
    })
}
