// SPDX-License-Identifier: Apache-2.0
//! Writes a [`Tree`] as an EROFS image.
//!
//! Three steps. The *survey* ([`survey`]) walks the tree breadth first, checks each inode, counts
//! links and fixes the order of inodes, so that those of one directory stand together. The
//! *measure* pass then runs the emitting code with a sink that only counts and notes where each
//! inode and each run of blocks falls; the *write* pass runs the same code again with the bytes as
//! sink, now knowing all those places, so that directories can name inodes that come later.
//!
//! The image is a function of the tree and the device list alone: no clock, no hash order, no
//! randomness. Beside the tree and the image a few dozen bytes per inode are needed.

mod directory;
mod survey;
mod xattrs;

use zerocopy::IntoBytes;

use crate::erofs::DeviceSlot;
use crate::erofs::format::{
    BLOCK_BITS, BLOCK_BYTES, CHUNK_FORMAT_INDEXES, CHUNK_INDEX_BYTES, COMPAT_FEATURES, ChunkIndex,
    DEVICE_SLOT_BYTES, DEVICE_TABLE_OFFSET, DataLayout, DeviceTableSlot, DiskInode, FileType,
    INCOMPAT_FEATURES, INODE_BYTES, MAGIC, MAX_DEVICES, NULL_BLOCK, SLOT_BYTES, SUPERBLOCK_OFFSET,
    Superblock, superblock_checksum,
};
use crate::tree::{FileRun, Inode, InodeId, InodeKind, Tree};
use directory::DirectorySize;
use survey::Survey;
use xattrs::{put_xattrs, xattr_bytes};

/// What about an inode cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InodeFault {
    /// Permission bits beyond 07777.
    #[error("permissions {0:#o} have bits beyond 07777")]
    Permissions(u16),
    /// Nanoseconds of a second or more.
    #[error("{0} nanoseconds are a second or more")]
    Nanoseconds(u32),
    /// A symlink target is empty, has a NUL, or is longer than 4095 bytes.
    #[error("a symlink target of {0} bytes is empty, too long, or has a NUL")]
    SymlinkTarget(usize),
    /// A file with content has no run.
    #[error("{0} bytes of content stand nowhere")]
    NoRun(u64),
    /// A file's run is not inside a device.
    #[error("{blocks} blocks from block {start_block} of device {device} lie outside it")]
    Run {
        /// The device, counted from 1.
        device: u16,
        /// First block.
        start_block: u64,
        /// Blocks needed.
        blocks: u64,
    },
    /// A file is larger than one chunk can be (1 TiB).
    #[error("{0} bytes are more than one run can hold")]
    FileSize(u64),
    /// An xattr name that EROFS has no prefix for, or that no kernel accepts.
    #[error("the xattr name {:?} cannot be stored", String::from_utf8_lossy(.0))]
    XattrName(Box<[u8]>),
    /// An xattr name that is kept for marks, and this is none.
    #[error("the xattr name {:?} is reserved", String::from_utf8_lossy(.0))]
    XattrReserved(Box<[u8]>),
    /// Xattr values that are too large, one by one (65535 bytes) or together (about 256 KiB).
    #[error("{0} bytes of xattrs are too many")]
    XattrBytes(usize),
    /// A directory has more than one name, or contains itself.
    #[error("the directory has more than one name")]
    DirectoryLinked,
    /// A file has more names than a link count can say.
    #[error("the file has too many names")]
    Links,
    /// More directories on the way to it than [`crate::erofs::MAX_DEPTH`].
    #[error("it lies too deep")]
    Depth,
}

/// Why a tree cannot be written. A layer that meets this cannot be lazy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A file of the tree cannot be represented.
    #[error("{:?}: {fault}", String::from_utf8_lossy(.path))]
    Inode {
        /// One of its paths, without a slash at the beginning; empty for the root.
        path: Box<[u8]>,
        /// What is wrong.
        fault: InodeFault,
    },
    /// There are more devices than [`crate::erofs::MAX_DEVICES`].
    #[error("{0} devices are too many")]
    DeviceCount(usize),
    /// A device has an empty tag or 2^32 blocks or more.
    #[error("device {0} has an empty tag or is too large")]
    Device(usize),
    /// The image would be larger than EROFS can address.
    #[error("an image of {0} bytes is too large")]
    ImageBytes(u64),
}

/// Writes a tree as an EROFS image.
///
/// **Shape**: a whole number of 512-byte blocks; the same tree and devices always give the same bytes.
/// **Errors**: [`WriteError`], always permanent.
pub fn write_tree(tree: &Tree, devices: &[DeviceSlot]) -> Result<Vec<u8>, WriteError> {
    let devices = device_table(devices)?;
    let survey = Survey::of(tree, &devices)?;
    let mut measure = Measure {
        position: 0,
        places: Places::new(tree),
    };
    Emitter {
        tree,
        survey: &survey,
        devices: &devices,
        places: &Places::new(tree),
        blocks: 0,
    }
    .emit(&mut measure);
    let (bytes, places) = (measure.position, measure.places);
    let too_large = WriteError::ImageBytes(bytes);
    let blocks = u32::try_from(bytes / BLOCK_BYTES as u64).map_err(|_| too_large.clone())?;
    let mut image = Vec::with_capacity(usize::try_from(bytes).map_err(|_| too_large)?);
    Emitter {
        tree,
        survey: &survey,
        devices: &devices,
        places: &places,
        blocks,
    }
    .emit(&mut image);
    debug_assert_eq!(image.len() as u64, bytes);
    let block = &mut image[SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + BLOCK_BYTES];
    let checksum = superblock_checksum(block);
    block[4..8].copy_from_slice(&checksum.to_le_bytes());
    Ok(image)
}

fn device_table(devices: &[DeviceSlot]) -> Result<Vec<DeviceTableSlot>, WriteError> {
    if devices.len() > MAX_DEVICES {
        return Err(WriteError::DeviceCount(devices.len()));
    }
    let slot = |(ordinal, device): (usize, &DeviceSlot)| {
        let blocks = u32::try_from(device.blocks)
            .ok()
            .filter(|_| device.tag[0] != 0);
        Ok(DeviceTableSlot {
            tag: device.tag,
            blocks: blocks.ok_or(WriteError::Device(ordinal + 1))?.into(),
            mapped_block: 0.into(),
            reserved: [0; 56],
        })
    };
    devices.iter().enumerate().map(slot).collect()
}

/// Where things stand in the image, by arena index of the tree.
struct Places {
    /// Inode numbers; 32 bits reach 128 GiB, and an image of that size is refused before they are used.
    nids: Vec<u32>,
    /// First data block of directories and long symlinks.
    blocks: Vec<u32>,
}

impl Places {
    fn new(tree: &Tree) -> Self {
        Self {
            nids: vec![0; tree.arena_len()],
            blocks: vec![0; tree.arena_len()],
        }
    }

    fn nid(&self, id: InodeId) -> u64 {
        u64::from(self.nids[id.index()])
    }
}

/// Takes the image's bytes in order.
trait Sink {
    fn position(&self) -> u64;
    fn put(&mut self, bytes: &[u8]);
    /// Puts zeros up to a position that is not behind the current one.
    fn pad_to(&mut self, position: u64);
    /// Is told that an inode begins here.
    fn inode_here(&mut self, _id: InodeId) {}
    /// Is told that the blocks of an inode begin here.
    fn blocks_here(&mut self, _id: InodeId) {}
}

struct Measure {
    position: u64,
    places: Places,
}

impl Measure {
    /// Saturates: an image that reaches such positions is refused by its size.
    fn unit(&self, bytes: usize) -> u32 {
        u32::try_from(self.position / bytes as u64).unwrap_or(u32::MAX)
    }
}

impl Sink for Measure {
    fn position(&self) -> u64 {
        self.position
    }
    fn put(&mut self, bytes: &[u8]) {
        self.position += bytes.len() as u64;
    }
    fn pad_to(&mut self, position: u64) {
        self.position = position;
    }
    fn inode_here(&mut self, id: InodeId) {
        self.places.nids[id.index()] = self.unit(SLOT_BYTES);
    }
    fn blocks_here(&mut self, id: InodeId) {
        self.places.blocks[id.index()] = self.unit(BLOCK_BYTES);
    }
}

impl Sink for Vec<u8> {
    fn position(&self) -> u64 {
        self.len() as u64
    }
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
    fn pad_to(&mut self, position: u64) {
        // The measure pass has shown that the position fits.
        self.resize(usize::try_from(position).unwrap_or(self.len()), 0);
    }
}

/// The content of an inode that stands in this image.
enum Content<'t> {
    None,
    Directory(DirectorySize),
    Target(&'t [u8]),
}

impl Content<'_> {
    fn size(&self) -> u64 {
        match self {
            Content::None => 0,
            Content::Directory(size) => size.bytes(),
            Content::Target(target) => target.len() as u64,
        }
    }

    /// Bytes that could follow the inode: the short last block of a directory, a target in one piece.
    fn tail(&self) -> usize {
        match self {
            Content::None => 0,
            Content::Directory(size) => size.tail_bytes,
            Content::Target(target) if target.len() < BLOCK_BYTES => target.len(),
            Content::Target(_) => 0,
        }
    }
}

/// Where an inode goes and how its data is laid out.
struct Placement {
    position: u64,
    layout: DataLayout,
    /// Data blocks that stand elsewhere in the image.
    blocks_elsewhere: u64,
}

struct Emitter<'t> {
    tree: &'t Tree,
    survey: &'t Survey,
    devices: &'t [DeviceTableSlot],
    places: &'t Places,
    blocks: u32,
}

impl<'t> Emitter<'t> {
    fn emit(&self, sink: &mut impl Sink) {
        sink.pad_to(SUPERBLOCK_OFFSET as u64);
        sink.put(self.superblock().as_bytes());
        sink.pad_to(DEVICE_TABLE_OFFSET as u64);
        self.devices
            .iter()
            .for_each(|slot| sink.put(slot.as_bytes()));
        // What is not inline goes behind all inodes, in their order.
        let mut elsewhere = Vec::new();
        for id in &self.survey.order {
            let blocks = self.put_inode(*id, sink);
            if blocks > 0 {
                elsewhere.push((*id, blocks));
            }
        }
        let block = BLOCK_BYTES as u64;
        for (id, blocks) in elsewhere {
            sink.pad_to(sink.position().next_multiple_of(block));
            sink.blocks_here(id);
            match &self.tree.inode(id).kind {
                InodeKind::Symlink(target) => sink.put(target),
                _ => self.put_directory(id, 0..blocks, sink),
            }
        }
        sink.pad_to(sink.position().next_multiple_of(block));
    }

    fn superblock(&self) -> Superblock {
        // Counts were checked: devices against `MAX_DEVICES`, and the root stands right behind their table.
        let root = self.places.nid(self.tree.root());
        let slot = DEVICE_TABLE_OFFSET / DEVICE_SLOT_BYTES;
        Superblock {
            magic: MAGIC.into(),
            checksum: 0.into(),
            feature_compat: COMPAT_FEATURES.into(),
            block_bits: BLOCK_BITS,
            extension_slots: 0,
            root_nid: u16::try_from(root).unwrap_or(u16::MAX).into(),
            inodes: (self.survey.order.len() as u64).into(),
            epoch: 0.into(),
            fixed_nanoseconds: 0.into(),
            blocks: self.blocks.into(),
            meta_block: 0.into(),
            xattr_block: 0.into(),
            uuid: [0; 16],
            volume_name: [0; 16],
            feature_incompat: INCOMPAT_FEATURES.into(),
            compression: 0.into(),
            devices: u16::try_from(self.devices.len()).unwrap_or(u16::MAX).into(),
            device_table_slot: u16::try_from(slot).unwrap_or(u16::MAX).into(),
            directory_block_bits: 0,
            xattr_prefixes: 0,
            xattr_prefix_start: 0.into(),
            packed_nid: 0.into(),
            reserved: [0; 24],
        }
    }

    fn content(&self, id: InodeId) -> Content<'t> {
        match &self.tree.inode(id).kind {
            InodeKind::Directory => Content::Directory(self.directory_size(id)),
            InodeKind::Symlink(target) => Content::Target(target),
            _ => Content::None,
        }
    }

    /// The kernel wants an inline tail inside one block. Where it would cross one, the inode moves
    /// to the next block; where even that does not help, the tail becomes a block of its own.
    fn placement(
        &self,
        position: u64,
        inode: &Inode,
        content: &Content<'_>,
        header: u64,
    ) -> Placement {
        let block = BLOCK_BYTES as u64;
        let here = position.next_multiple_of(SLOT_BYTES as u64);
        let chunked = matches!(
            inode.kind,
            InodeKind::Regular {
                size_bytes: 1..,
                ..
            }
        );
        if chunked {
            return Placement {
                position: here,
                layout: DataLayout::Chunks,
                blocks_elsewhere: 0,
            };
        }
        let blocks = content.size().div_ceil(block);
        let tail = content.tail() as u64;
        let next = here.next_multiple_of(block);
        let inline_at = [here, next]
            .into_iter()
            .find(|at| tail > 0 && (at + header) % block + tail <= block);
        match inline_at {
            Some(position) => Placement {
                position,
                layout: DataLayout::Inline,
                blocks_elsewhere: blocks - 1,
            },
            None => Placement {
                position: here,
                layout: DataLayout::Plain,
                blocks_elsewhere: blocks,
            },
        }
    }

    /// Puts an inode with what follows it; returns how many data blocks must stand elsewhere.
    fn put_inode(&self, id: InodeId, sink: &mut impl Sink) -> u64 {
        let inode = self.tree.inode(id);
        let content = self.content(id);
        let xattrs = xattr_bytes(inode);
        let header = (INODE_BYTES + xattrs) as u64;
        let Placement {
            position,
            layout,
            blocks_elsewhere,
        } = self.placement(sink.position(), inode, &content, header);
        sink.pad_to(position);
        sink.inode_here(id);
        sink.put(self.disk_inode(id, layout, &content, xattrs).as_bytes());
        put_xattrs(inode, sink);
        match (layout, &inode.kind) {
            (
                DataLayout::Chunks,
                InodeKind::Regular {
                    extent: Some(run), ..
                },
            ) => {
                sink.pad_to(sink.position().next_multiple_of(CHUNK_INDEX_BYTES as u64));
                sink.put(chunk_index(*run).as_bytes());
            }
            (DataLayout::Inline, InodeKind::Symlink(target)) => sink.put(target),
            (DataLayout::Inline, InodeKind::Directory) => {
                self.put_directory(id, blocks_elsewhere..blocks_elsewhere + 1, sink);
            }
            _ => {}
        }
        blocks_elsewhere
    }

    fn disk_inode(
        &self,
        id: InodeId,
        layout: DataLayout,
        content: &Content<'_>,
        xattrs: usize,
    ) -> DiskInode {
        let inode = self.tree.inode(id);
        let nid = self.places.nid(id);
        let (file_type, size, detail) = match inode.kind {
            InodeKind::Regular { size_bytes, .. } => {
                (FileType::Regular, size_bytes, chunk_format(size_bytes))
            }
            InodeKind::Directory => (
                FileType::Directory,
                content.size(),
                self.places.blocks[id.index()],
            ),
            InodeKind::Symlink(_) => (
                FileType::Symlink,
                content.size(),
                self.places.blocks[id.index()],
            ),
            InodeKind::CharDevice(number) => (FileType::CharDevice, 0, number.encoded()),
            InodeKind::BlockDevice(number) => (FileType::BlockDevice, 0, number.encoded()),
            InodeKind::Fifo => (FileType::Fifo, 0, 0),
            InodeKind::Socket => (FileType::Socket, 0, 0),
        };
        DiskInode {
            format: (1 | layout.number() << 1).into(),
            xattr_count: xattrs::xattr_count(xattrs).into(),
            mode: (file_type.mode_bits() | inode.permissions).into(),
            reserved: 0.into(),
            size: size.into(),
            detail: detail.into(),
            short_number: u32::try_from(nid).unwrap_or(u32::MAX).into(),
            uid: inode.uid.into(),
            gid: inode.gid.into(),
            mtime: inode.mtime.seconds.into(),
            mtime_nanoseconds: inode.mtime.nanoseconds.into(),
            links: self.survey.links(id).into(),
            reserved_end: [0; 16],
        }
    }
}

/// The chunk format of a file: one chunk that is large enough for all of it. 0 for an empty file.
fn chunk_format(size_bytes: u64) -> u32 {
    if size_bytes == 0 {
        return 0;
    }
    let bits = size_bytes
        .next_power_of_two()
        .trailing_zeros()
        .max(u32::from(BLOCK_BITS));
    u32::from(CHUNK_FORMAT_INDEXES) | (bits - u32::from(BLOCK_BITS))
}

fn chunk_index(run: FileRun) -> ChunkIndex {
    ChunkIndex {
        start_block_high: 0.into(),
        device: run.device.into(),
        // The survey has checked the run against its device.
        start_block: u32::try_from(run.start_block).unwrap_or(NULL_BLOCK).into(),
    }
}
