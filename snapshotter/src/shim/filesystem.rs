// SPDX-License-Identifier: Apache-2.0
//! A merged tree as a FUSE file system. It holds no state: an inode number is the EROFS nid of the
//! inode (the root's is 1, as FUSE wants it), a directory position is the one of the tree, and no
//! handle is ever given out. So any worker can answer any request of a connection that it has just
//! taken over.
//!
//! All that can be cached is cached for ever, negative lookups too: a tree never changes.
//!
//! Answered once with ENOSYS, after which the kernel does not ask again: open and opendir (it then
//! keeps file pages and listings cached), flush, fsync, access, and in a tree without xattrs, these.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyXattr, Request,
};
use sluice_blockindex::erofs::{self, InodeView, Nid, TreeError, TreeReader};
use sluice_blockindex::tree::Timestamp;
use sluice_blockindex::units::BLOCK_BYTES;

use super::device::{DeviceRead, OpenDevice};
use super::reads::ReadRecorder;
use super::waiting::{self, PendingRead, Reply, WaitingReads};
use crate::mount::MountSpec;
use crate::sys::map::MappedTree;

/// How long the kernel may keep what we say: for ever, as far as it can count.
const TTL: Duration = Duration::from_secs(1 << 30);
/// Inode number that FUSE gives to the root.
const ROOT: u64 = 1;
/// What `stat` names as the best size of a read.
const IO_BYTES: u32 = 4096;
const GENERATION: Generation = Generation(0);
/// The names under which POSIX ACLs stand.
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// A tree and its devices, served.
#[derive(Debug)]
pub struct TreeFilesystem {
    key: String,
    tree: MappedTree,
    root: Nid,
    devices: Vec<Arc<OpenDevice>>,
    waiting: Arc<WaitingReads>,
    read_deadline: Option<Duration>,
    recorder: Option<Arc<ReadRecorder>>,
    xattrs: XattrUse,
    /// Requests are kept in a journal.
    small_requests: bool,
}

/// Bytes on a device.
#[derive(Debug)]
struct Place<'a> {
    /// The device's place in the mount.
    number: usize,
    device: &'a Arc<OpenDevice>,
    start: u64,
    length: usize,
}

/// Which xattrs a tree has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum XattrUse {
    /// None at all. The kernel need not ask, and it asks often: `ls -l` for two of each file.
    None,
    /// Some, or nobody has looked: a connection that was taken over keeps what it agreed to.
    Some,
    /// POSIX ACLs among them.
    Acl,
}

impl TreeFilesystem {
    /// Over a tree and open devices.
    ///
    /// **Errors** `InvalidData` when they do not belong together.
    pub fn new(
        spec: &MountSpec,
        tree: MappedTree,
        devices: Vec<Arc<OpenDevice>>,
        waiting: Arc<WaitingReads>,
    ) -> io::Result<TreeFilesystem> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let reader = tree.reader();
        let root = reader.root();
        if root.0 == ROOT {
            return Err(invalid(
                "the tree's root is inode 1, which FUSE keeps for itself".into(),
            ));
        }
        let slots = reader.devices();
        if slots.len() != devices.len() {
            let (wants, has) = (slots.len(), devices.len());
            return Err(invalid(format!(
                "the tree has {wants} devices, the mount {has}"
            )));
        }
        for (number, (slot, device)) in slots.zip(&devices).enumerate() {
            let blocks = device.device_bytes().div_ceil(BLOCK_BYTES);
            if slot.blocks > blocks {
                let wants = slot.blocks;
                return Err(invalid(format!(
                    "device {number} has {blocks} of {wants} blocks"
                )));
            }
        }
        let read_deadline = spec.read_deadline;
        let key = spec.key.clone();
        Ok(TreeFilesystem {
            key,
            tree,
            root,
            devices,
            waiting,
            read_deadline,
            recorder: None,
            xattrs: XattrUse::Some,
            small_requests: false,
        })
    }

    /// Has the kernel send no request that is larger than a slot of a journal.
    pub(super) fn keep_requests_small(&mut self) {
        self.small_requests = true;
    }

    /// From now on records for so long, from the first read on, which chunks are read.
    pub fn record(&mut self, window: Duration) -> Arc<ReadRecorder> {
        let counts = self.devices.iter().map(|device| device.chunk_count());
        let recorder = Arc::new(ReadRecorder::new(window, counts));
        self.recorder = Some(recorder.clone());
        recorder
    }

    /// Looks which xattrs the tree has; before a new connection begins.
    ///
    /// POSIX ACLs need the kernel's own check: without it the mode alone decides, which can grant
    /// what an ACL denies, because the group bits of a file with an ACL are its mask. It costs a
    /// message for each inode, so trees without ACLs do without.
    pub fn look_for_xattrs(&mut self) -> Result<(), TreeError> {
        self.xattrs = self.xattr_use()?;
        self.tree.release_pages();
        Ok(())
    }

    fn xattr_use(&self) -> Result<XattrUse, TreeError> {
        let reader = self.tree.reader();
        let mut found = XattrUse::None;
        let mut todo = vec![self.root];
        while let Some(directory) = todo.pop() {
            for entry in reader.read_dir(directory, 0)? {
                let entry = entry?;
                let below = entry.name != b"." && entry.name != b"..";
                if below && entry.file_type == erofs::FileType::Directory {
                    todo.push(entry.nid);
                }
                if !below && entry.nid != self.root {
                    continue;
                }
                let inode = reader.inode(entry.nid)?;
                if inode.has_no_xattrs() {
                    continue;
                }
                found = XattrUse::Some;
                for xattr in reader.xattrs_of(&inode)? {
                    let (name, _) = xattr?;
                    if ACLS.iter().any(|acl| name.is(acl)) {
                        return Ok(XattrUse::Acl);
                    }
                }
            }
        }
        Ok(found)
    }

    fn reader(&self) -> TreeReader<'_> {
        self.tree.reader()
    }

    fn nid(&self, ino: INodeNo) -> Nid {
        match u64::from(ino) {
            ROOT => self.root,
            nid => Nid(nid),
        }
    }

    fn ino(&self, nid: Nid) -> INodeNo {
        if nid == self.root {
            INodeNo(ROOT)
        } else {
            INodeNo(nid.0)
        }
    }

    fn attributes(&self, nid: Nid) -> Result<FileAttr, Errno> {
        let inode = self
            .reader()
            .inode(nid)
            .map_err(|error| self.broken(&error))?;
        Ok(self.attributes_of(&inode))
    }

    fn attributes_of(&self, inode: &InodeView) -> FileAttr {
        let time = moment(inode.mtime);
        FileAttr {
            ino: self.ino(inode.nid),
            size: inode.size_bytes,
            blocks: inode.size_bytes.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: kind(inode.file_type),
            perm: inode.permissions,
            nlink: inode.links,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.device_number.encoded(),
            blksize: IO_BYTES,
            flags: 0,
        }
    }

    /// A tree is validated before it is mounted, so this is damage since then.
    fn broken(&self, error: &TreeError) -> Errno {
        tracing::error!(key = self.key, %error, "the tree is damaged");
        Errno::EIO
    }

    /// Where the bytes `offset..offset + size` of a file stand; `None` behind its end.
    fn place(&self, nid: Nid, offset: u64, size: u32) -> Result<Option<Place<'_>>, Errno> {
        let reader = self.reader();
        let inode = reader.inode(nid).map_err(|error| self.broken(&error))?;
        if inode.file_type != erofs::FileType::Regular {
            return Err(Errno::EINVAL);
        }
        let length = inode.size_bytes.saturating_sub(offset).min(u64::from(size));
        let length = usize::try_from(length).map_err(|_| Errno::EINVAL)?;
        let run = reader.run_of(&inode).map_err(|error| self.broken(&error))?;
        let (Some(run), true) = (run, length > 0) else {
            return Ok(None);
        };
        let number = usize::from(run.device).checked_sub(1);
        let device = number.and_then(|number| Some((number, self.devices.get(number)?)));
        let start = run
            .start_block
            .checked_mul(BLOCK_BYTES)
            .and_then(|s| s.checked_add(offset));
        match (device, start) {
            (Some((number, device)), Some(start)) => Ok(Some(Place {
                number,
                device,
                start,
                length,
            })),
            _ => {
                tracing::error!(key = self.key, ?run, "a file lies on no device");
                Err(Errno::EIO)
            }
        }
    }

    fn find_xattr(&self, ino: INodeNo, name: &OsStr) -> Result<&[u8], Errno> {
        if self.xattrs == XattrUse::None {
            return Err(Errno::ENOSYS);
        }
        let found = self.reader().xattr(self.nid(ino), name.as_bytes());
        found
            .map_err(|error| self.broken(&error))?
            .ok_or(Errno::NO_XATTR)
    }

    /// All names, each with a NUL behind it.
    fn xattr_names(&self, ino: INodeNo) -> Result<Vec<u8>, Errno> {
        if self.xattrs == XattrUse::None {
            return Err(Errno::ENOSYS);
        }
        let mut names = Vec::new();
        let xattrs = self
            .reader()
            .xattrs(self.nid(ino))
            .map_err(|error| self.broken(&error))?;
        for xattr in xattrs {
            let (name, _) = xattr.map_err(|error| self.broken(&error))?;
            names.extend_from_slice(name.prefix);
            names.extend_from_slice(name.suffix);
            names.push(0);
        }
        Ok(names)
    }
}

/// FUSE's answer to both xattr requests: the size for an empty buffer, else the bytes if they fit.
fn answer_xattr(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    match u32::try_from(bytes.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(bytes),
        Ok(_) => reply.error(Errno::ERANGE),
        Err(_) => reply.error(Errno::E2BIG),
    }
}

/// A timestamp as fuser takes it. What the platform cannot express becomes the epoch.
fn moment(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = match time.seconds >= 0 {
        true => SystemTime::UNIX_EPOCH.checked_add(seconds),
        false => SystemTime::UNIX_EPOCH.checked_sub(seconds),
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(time.nanoseconds.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn kind(kind: erofs::FileType) -> FileType {
    match kind {
        erofs::FileType::Regular => FileType::RegularFile,
        erofs::FileType::Directory => FileType::Directory,
        erofs::FileType::CharDevice => FileType::CharDevice,
        erofs::FileType::BlockDevice => FileType::BlockDevice,
        erofs::FileType::Fifo => FileType::NamedPipe,
        erofs::FileType::Socket => FileType::Socket,
        erofs::FileType::Symlink => FileType::Symlink,
    }
}

impl Filesystem for TreeFilesystem {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_HAS_RESEND
            // Safe because the kernel checks permissions (default_permissions) and we never look at
            // who asks.
            | InitFlags::FUSE_ALLOW_IDMAP;
        if self.xattrs == XattrUse::Acl {
            wanted |= InitFlags::FUSE_POSIX_ACL;
        }
        for flag in wanted.iter() {
            if config.add_capabilities(flag).is_ok() {
                continue;
            }
            if flag == InitFlags::FUSE_HAS_RESEND && !self.small_requests {
                tracing::warn!(
                    "the kernel cannot hand out FUSE requests again (it can from Linux 6.9): reads \
                     that are being answered when this process dies will hang"
                );
            } else {
                tracing::debug!(?flag, "the kernel does not offer");
            }
        }
        // Readahead of missing data holds a background request until the data is there. At the
        // limit, readahead of present data would wait behind it: so there is no limit.
        let _previous = config.set_max_background(u16::MAX);
        let _previous = config.set_congestion_threshold(u16::MAX);
        if self.small_requests {
            // Nothing is ever written. The kernel wants room for the largest write in each read.
            let _previous = config.set_max_write(IO_BYTES);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.reader().lookup(self.nid(parent), name.as_bytes()) {
            Ok(Some(nid)) => match self.attributes(nid) {
                Ok(attributes) => reply.entry(&TTL, &attributes, GENERATION),
                Err(errno) => reply.error(errno),
            },
            // Inode 0 is an entry too: "there is none", to be remembered.
            Ok(None) => reply.entry(&TTL, &NONE, GENERATION),
            Err(error) => reply.error(self.broken(&error)),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.attributes(self.nid(ino)) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.reader().symlink(self.nid(ino)) {
            Ok(target) => reply.data(target),
            Err(error) => reply.error(self.broken(&error)),
        }
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Place {
            number,
            device,
            start,
            length,
        } = match self.place(self.nid(ino), offset, size) {
            Ok(Some(place)) => place,
            Ok(None) => return reply.data(&[]),
            Err(errno) => return reply.error(errno),
        };
        if let Some(recorder) = &self.recorder {
            recorder.note(number, device, start, length);
        }
        waiting::with_read(device, start, length, |outcome, bytes| match outcome {
            DeviceRead::Done => reply.data(bytes),
            DeviceRead::Failed(failure) => reply.error(waiting::errno(failure)),
            DeviceRead::Missing => {
                let deadline = self
                    .read_deadline
                    .and_then(|d| Instant::now().checked_add(d));
                let reply = Reply::Fuse(reply);
                let read = PendingRead::new(device.clone(), start, length, deadline, reply);
                self.waiting.enter(read);
            }
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.reader().read_dir(self.nid(ino), offset) {
            Ok(entries) => entries,
            Err(error) => return reply.error(self.broken(&error)),
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return reply.error(self.broken(&error)),
            };
            let name = OsStr::from_bytes(entry.name);
            let ino = self.ino(entry.nid);
            if reply.add(ino, entry.next_offset, kind(entry.file_type), name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let entries = match self.reader().read_dir(self.nid(ino), offset) {
            Ok(entries) => entries,
            Err(error) => return reply.error(self.broken(&error)),
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return reply.error(self.broken(&error)),
            };
            let attributes = match self.attributes(entry.nid) {
                Ok(attributes) => attributes,
                Err(errno) => return reply.error(errno),
            };
            let name = OsStr::from_bytes(entry.name);
            let next = entry.next_offset;
            if reply.add(attributes.ino, next, name, &TTL, &attributes, GENERATION) {
                break;
            }
        }
        reply.ok();
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        match self.find_xattr(ino, name) {
            Ok(value) => answer_xattr(reply, size, value),
            Err(errno) => reply.error(errno),
        }
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.xattr_names(ino) {
            Ok(names) => answer_xattr(reply, size, &names),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let reader = self.reader();
        let blocks: u64 = reader.devices().map(|slot| slot.blocks).sum();
        let block = u32::try_from(BLOCK_BYTES).unwrap_or(512);
        reply.statfs(blocks, 0, 0, reader.inode_count(), 0, block, 255, block);
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    /// The kernel then answers SEEK_DATA and SEEK_HOLE itself: files have no holes.
    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// Asked for file flags by `lsattr`, and by overlayfs when it copies a file up.
    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}

/// The entry that says that there is none.
const NONE: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: SystemTime::UNIX_EPOCH,
    mtime: SystemTime::UNIX_EPOCH,
    ctime: SystemTime::UNIX_EPOCH,
    crtime: SystemTime::UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_and_beyond_reason() {
        let time = |seconds, nanoseconds| {
            moment(Timestamp {
                seconds,
                nanoseconds,
            })
        };
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(time(5, 7), epoch + Duration::new(5, 7));
        assert_eq!(time(-2, 800_000_000), epoch - Duration::new(1, 200_000_000));
        let _no_panic = (time(i64::MIN, 0), time(i64::MAX, 999_999_999));
    }
}
