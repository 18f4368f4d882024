// SPDX-License-Identifier: Apache-2.0
//! The EROFS structures that we write and read, as they stand on disk.
//!
//! All integers are little-endian and no structure needs alignment. Sizes and offsets are asserted
//! at compile time. `docs/formats/erofs-tree.md` says which values the fields may have.
//!
//! **Source**: Linux `fs/erofs/erofs_fs.h` documents the on-disk format; names here are our own.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a block. 512, because a tar puts each file's content on such a boundary.
pub const BLOCK_BYTES: usize = 512;
/// log2 of [`BLOCK_BYTES`].
pub const BLOCK_BITS: u8 = 9;
/// Where the superblock stands.
pub const SUPERBLOCK_OFFSET: usize = 1024;
/// The superblock's first four bytes.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// Compatible feature: the superblock has a checksum.
pub const COMPAT_CHECKSUM: u32 = 0x1;
/// Compatible feature: inodes record times of modification (always so in extended inodes).
pub const COMPAT_MTIME: u32 = 0x2;
/// Incompatible feature: files may be described by chunks.
pub const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// Incompatible feature: there is a device table.
pub const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
/// The compatible features of each image that we write.
pub const COMPAT_FEATURES: u32 = COMPAT_CHECKSUM | COMPAT_MTIME;
/// The incompatible features of each image that we write.
pub const INCOMPAT_FEATURES: u32 = INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE;
/// Inodes are numbered by their offset in units of this.
pub const SLOT_BYTES: usize = 32;
/// Bytes of a device table slot.
pub const DEVICE_SLOT_BYTES: usize = 128;
/// Where the device table stands: right behind the superblock.
pub const DEVICE_TABLE_OFFSET: usize = SUPERBLOCK_OFFSET + 128;
/// Most devices of a tree. Images have at most 127 layers; this leaves room while the root's number still fits in 16 bits.
pub const MAX_DEVICES: usize = 1024;
/// Bytes of an inode without what follows it.
pub const INODE_BYTES: usize = 64;
/// Bytes of a directory entry without its name.
pub const DIRENT_BYTES: usize = 12;
/// Bytes of the header before inline xattrs.
pub const XATTR_HEADER_BYTES: usize = 12;
/// Bytes of an xattr entry before its name.
pub const XATTR_ENTRY_BYTES: usize = 4;
/// Xattr entries begin at multiples of this.
pub const XATTR_ALIGN: usize = 4;
/// Bytes of a chunk index; it stands at a multiple of this.
pub const CHUNK_INDEX_BYTES: usize = 8;
/// In the chunk format: chunks are described by indexes (with a device), not by bare block numbers.
pub const CHUNK_FORMAT_INDEXES: u16 = 0x20;
/// In the chunk format: log2 of the chunk size, less [`BLOCK_BITS`].
pub const CHUNK_FORMAT_BITS_MASK: u16 = 0x1f;
/// Largest log2 of a chunk: what five bits above a block can say (1 TiB).
pub const MAX_CHUNK_BITS: u8 = BLOCK_BITS + 31;
/// The block number that means a hole; no run may start there.
pub const NULL_BLOCK: u32 = u32::MAX;
/// Longest symlink target: one byte less than the 4096 that Linux has for it.
pub const MAX_SYMLINK_BYTES: usize = 4095;
/// Most directories on the way from the root to a file. Linux resolves no path of more than 4096 bytes.
pub const MAX_DEPTH: u32 = 2048;
/// Mode bits that say what an inode is.
pub const MODE_TYPE_MASK: u16 = 0o170_000;
/// Mode bits that are permissions.
pub const MODE_PERMISSIONS_MASK: u16 = 0o7777;

/// Xattr name prefixes by the number that stands for them on disk. Longer ones come first where one begins another.
pub const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// The superblock.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Superblock {
    /// [`MAGIC`].
    pub magic: U32,
    /// crc32c from here to the end of the block, with this field 0.
    pub checksum: U32,
    /// Features that a reader may ignore.
    pub feature_compat: U32,
    /// [`BLOCK_BITS`].
    pub block_bits: u8,
    /// Extra 16-byte slots behind the superblock: 0.
    pub extension_slots: u8,
    /// Number of the root directory.
    pub root_nid: U16,
    /// How many inodes there are.
    pub inodes: U64,
    /// Base of times in compact inodes: 0, there are none.
    pub epoch: U64,
    /// Nanoseconds of the same: 0.
    pub fixed_nanoseconds: U32,
    /// Blocks of this image, without those of the devices.
    pub blocks: U32,
    /// First block of the inode space: 0.
    pub meta_block: U32,
    /// First block of shared xattrs: 0, there are none.
    pub xattr_block: U32,
    /// Identity: 0.
    pub uuid: [u8; 16],
    /// Name: 0.
    pub volume_name: [u8; 16],
    /// Features that a reader must know.
    pub feature_incompat: U32,
    /// Compression algorithms: 0.
    pub compression: U16,
    /// How many devices there are besides this image.
    pub devices: U16,
    /// Where the device table stands, in units of [`DEVICE_SLOT_BYTES`].
    pub device_table_slot: U16,
    /// log2 of a directory block, less [`BLOCK_BITS`]: 0.
    pub directory_block_bits: u8,
    /// Long xattr prefixes: 0.
    pub xattr_prefixes: u8,
    /// Where those stand: 0.
    pub xattr_prefix_start: U32,
    /// Inode of packed tails: 0.
    pub packed_nid: U64,
    /// Reserved, or of features that we do not use: 0.
    pub reserved: [u8; 24],
}

/// A slot of the device table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceTableSlot {
    /// Names the device; the first byte is not 0.
    pub tag: [u8; 64],
    /// Size of the device in blocks.
    pub blocks: U32,
    /// Where a single-device image would map it: 0.
    pub mapped_block: U32,
    /// 0.
    pub reserved: [u8; 56],
}

/// An extended inode.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DiskInode {
    /// Bit 0: extended; from bit 1: [`DataLayout`].
    pub format: U16,
    /// 0 without xattrs, else 1 + (bytes of xattrs - [`XATTR_HEADER_BYTES`]) / 4.
    pub xattr_count: U16,
    /// Type and permissions.
    pub mode: U16,
    /// 0.
    pub reserved: U16,
    /// Size in bytes.
    pub size: U64,
    /// By kind: first data block, chunk format, or device number.
    pub detail: U32,
    /// Inode number for 32-bit `stat`: the low bits of the nid.
    pub short_number: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Time of modification, seconds.
    pub mtime: I64,
    /// Time of modification, nanoseconds.
    pub mtime_nanoseconds: U32,
    /// Names of the inode.
    pub links: U32,
    /// 0.
    pub reserved_end: [u8; 16],
}

/// A directory entry; the name stands elsewhere in the block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// The inode.
    pub nid: U64,
    /// Where the name begins in the block.
    pub name_offset: U16,
    /// [`FileType`]'s number.
    pub file_type: u8,
    /// 0.
    pub reserved: u8,
}

/// Where a chunk stands on a device.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkIndex {
    /// High bits of the block number: 0, kernels before 6.15 ignore them.
    pub start_block_high: U16,
    /// The device, counted from 1.
    pub device: U16,
    /// First block.
    pub start_block: U32,
}

/// The header before inline xattrs.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    /// Filter of absent names, used only with a feature that we do not set: 0.
    pub name_filter: U32,
    /// Shared xattrs: 0.
    pub shared_count: u8,
    /// 0.
    pub reserved: [u8; 7],
}

/// An inline xattr; its name without prefix and its value follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes of the name without its prefix.
    pub name_bytes: u8,
    /// Number of the prefix, see [`XATTR_PREFIXES`].
    pub prefix: u8,
    /// Bytes of the value.
    pub value_bytes: U16,
}

macro_rules! assert_layout {
    ($type:ty, $size:expr $(, $field:ident @ $offset:expr)*) => {
        const _: () = assert!(size_of::<$type>() == $size);
        $(const _: () = assert!(std::mem::offset_of!($type, $field) == $offset);)*
    };
}

assert_layout!(Superblock, 128, checksum @ 4, feature_compat @ 8, block_bits @ 12, root_nid @ 14,
    inodes @ 16, epoch @ 24, blocks @ 36, meta_block @ 40, xattr_block @ 44, uuid @ 48,
    volume_name @ 64, feature_incompat @ 80, compression @ 84, devices @ 86,
    device_table_slot @ 88, directory_block_bits @ 90, xattr_prefixes @ 91, packed_nid @ 96,
    reserved @ 104);
assert_layout!(DeviceTableSlot, DEVICE_SLOT_BYTES, blocks @ 64, mapped_block @ 68, reserved @ 72);
assert_layout!(DiskInode, INODE_BYTES, xattr_count @ 2, mode @ 4, size @ 8, detail @ 16,
    short_number @ 20, uid @ 24, gid @ 28, mtime @ 32, mtime_nanoseconds @ 40, links @ 44,
    reserved_end @ 48);
assert_layout!(Dirent, DIRENT_BYTES, name_offset @ 8, file_type @ 10, reserved @ 11);
assert_layout!(ChunkIndex, CHUNK_INDEX_BYTES, device @ 2, start_block @ 4);
assert_layout!(XattrHeader, XATTR_HEADER_BYTES, shared_count @ 4, reserved @ 5);
assert_layout!(XattrEntry, XATTR_ENTRY_BYTES, prefix @ 1, value_bytes @ 2);
const _: () = assert!(DEVICE_TABLE_OFFSET.is_multiple_of(DEVICE_SLOT_BYTES));
const _: () = assert!(1 << BLOCK_BITS == BLOCK_BYTES);

/// How an inode's data is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DataLayout {
    /// In consecutive blocks of this image.
    Plain,
    /// As plain, but the bytes of the last, partial block follow the inode.
    Inline,
    /// In chunks on a device.
    Chunks,
}

impl DataLayout {
    /// The number on disk.
    pub const fn number(self) -> u16 {
        match self {
            DataLayout::Plain => 0,
            DataLayout::Inline => 2,
            DataLayout::Chunks => 4,
        }
    }

    /// The layout of a number on disk; `None` for those that we do not use.
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            0 => Some(DataLayout::Plain),
            2 => Some(DataLayout::Inline),
            4 => Some(DataLayout::Chunks),
            _ => None,
        }
    }
}

/// What an inode is, as mode bits and directory entries say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Symbolic link.
    Symlink,
}

impl FileType {
    /// All of them, in the order of their directory entry numbers, which begin at 1.
    pub const ALL: [FileType; 7] = [
        FileType::Regular,
        FileType::Directory,
        FileType::CharDevice,
        FileType::BlockDevice,
        FileType::Fifo,
        FileType::Socket,
        FileType::Symlink,
    ];

    /// The number in a directory entry.
    pub const fn dirent_number(self) -> u8 {
        match self {
            FileType::Regular => 1,
            FileType::Directory => 2,
            FileType::CharDevice => 3,
            FileType::BlockDevice => 4,
            FileType::Fifo => 5,
            FileType::Socket => 6,
            FileType::Symlink => 7,
        }
    }

    /// The type of a directory entry's number.
    pub fn from_dirent_number(number: u8) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.dirent_number() == number)
    }

    /// The type bits of a mode (`S_IFMT`).
    pub const fn mode_bits(self) -> u16 {
        match self {
            FileType::Regular => 0o100_000,
            FileType::Directory => 0o040_000,
            FileType::CharDevice => 0o020_000,
            FileType::BlockDevice => 0o060_000,
            FileType::Fifo => 0o010_000,
            FileType::Socket => 0o140_000,
            FileType::Symlink => 0o120_000,
        }
    }

    /// The type that a mode says.
    pub fn from_mode(mode: u16) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.mode_bits() == mode & MODE_TYPE_MASK)
    }
}

/// The superblock's checksum: crc32c (Castagnoli, reflected) from the superblock to the end of the
/// first block that has it, with the checksum itself as zeros, and without the final inversion.
///
/// **Source**: Linux `fs/erofs/super.c`, superblock checksum.
pub fn superblock_checksum(block: &[u8]) -> u32 {
    let bytes = block.iter().enumerate();
    let bytes = bytes.map(|(at, byte)| if (4..8).contains(&at) { 0 } else { *byte });
    bytes.fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & 0u32.wrapping_sub(crc & 1))
        })
    })
}
