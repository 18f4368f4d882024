// SPDX-License-Identifier: Apache-2.0
//! The third part of the self-test: whether EROFS reads devices that stand on FUSE, past FUSE's own pages, waits for
//! them, and shows an error as one.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    Request, Session, SessionACL,
};
use nix::mount::MsFlags;

use super::asks::{Results, judge};
use super::{content, failed, sample_tree};
use crate::sys::newmount::Caching;
use crate::sys::{fusefd, mountpoint, newmount};

/// How long the reader may take. When it is over the connection is aborted, and the kernel lets him go on.
const DEADLINE: Duration = Duration::from_secs(5);
const TTL: Duration = Duration::from_secs(60);
/// Inode of the first device; the root's is 1.
const FIRST: u64 = 2;

/// Two devices as files: the first is given, a little late, the second refused.
#[derive(Debug)]
struct Scratch {
    device: Vec<u8>,
}

impl Scratch {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let directory = u64::from(ino) < FIRST;
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size: if directory {
                0
            } else {
                self.device.len() as u64
            },
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: match directory {
                true => FileType::Directory,
                false => FileType::RegularFile,
            },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Scratch {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _not_offered = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str().and_then(|name| name.parse::<u64>().ok()) {
            Some(number @ 0..=1) => {
                let attributes = self.attributes(INodeNo(FIRST + number));
                reply.entry(&TTL, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
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
        if u64::from(ino) != FIRST {
            return reply.error(Errno::EIO);
        }
        std::thread::sleep(Duration::from_millis(2));
        let place = |at: u64| {
            usize::try_from(at)
                .unwrap_or(usize::MAX)
                .min(self.device.len())
        };
        let range = place(offset)..place(offset.saturating_add(size.into()));
        reply.data(&self.device[range]);
    }
}

/// Mounts EROFS over two devices that this very process serves.
pub(super) fn try_in(scratch: &Path) -> Result<(), String> {
    let at = |name: &str| scratch.join(name);
    for name in ["served", "over"] {
        fs::create_dir(at(name)).map_err(failed("make scratch directory"))?;
    }
    let device = content(1);
    serve(&at("served"), device.clone()).map_err(failed("serve scratch devices over FUSE"))?;
    let tree = at("over.erofs");
    let image = sample_tree().ok_or("build scratch tree")?;
    fs::write(&tree, image).map_err(failed("write scratch tree"))?;

    let (done, reader) = channel();
    let (served, over) = (at("served"), at("over"));
    // He may hang, so nobody waits for him but by the channel.
    std::thread::spawn(move || {
        let _gone = done.send(read(&served, &over, &tree));
    });
    let results = match reader.recv_timeout(DEADLINE) {
        Ok(results) => results,
        Err(RecvTimeoutError::Timeout) => {
            Err(format!("a reader is not served within {DEADLINE:?}"))
        }
        Err(RecvTimeoutError::Disconnected) => Err("a reader has ended".into()),
    };
    let gone = (
        mountpoint::detach(&at("over"), true),
        mountpoint::abort(&at("served")),
        mountpoint::detach(&at("served"), true),
    );
    tracing::debug!(?gone, "unmount the self-test's mounts");
    judge(results?, &device)
}

/// Mounts FUSE; its server ends with the connection.
fn serve(mountpoint: &Path, device: Vec<u8>) -> io::Result<()> {
    let fuse = fusefd::open()?;
    let options = format!(
        "fd={},rootmode=40755,user_id=0,group_id=0,default_permissions",
        fuse.as_raw_fd()
    );
    mountpoint::attach("sluice", mountpoint, "fuse", MsFlags::MS_RDONLY, &options)?;
    let session = Session::from_fd(Scratch { device }, fuse, SessionACL::All, Config::default())?;
    let serving = std::thread::Builder::new().name("selftest".into());
    serving.spawn(move || session.run()).map(drop)
}

fn read(served: &Path, over: &Path, tree: &Path) -> Result<Results, String> {
    let open = |number: usize| File::open(served.join(number.to_string()));
    let devices = [open(0), open(1)]
        .into_iter()
        .collect::<io::Result<Vec<_>>>();
    let devices = devices.map_err(failed("open scratch devices over FUSE"))?;
    newmount::erofs(tree, &devices, over, Caching::Once).map_err(|error| error.to_string())?;
    let read = |number: usize| fs::read(over.join(format!("directory/file{number}")));
    Ok([read(0), read(1)])
}
