// SPDX-License-Identifier: Apache-2.0
//! One served mount: made new, or taken over from a dead worker.
//!
//! A new mount goes through these steps; a crash after any of them is put right by the record's one
//! rule ([`super::record`]):
//! 1. open tree and devices, open `/dev/fuse`, have descriptor, record (`Prepared`) and, where requests are
//!    kept, the journal kept;
//! 2. mount(2); answer FUSE_INIT; set readahead;
//! 3. record `Serving`; serve; tell the daemon.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use nix::mount::MsFlags;
use sluice_proto::shim as wire;

use super::device::OpenDevices;
use super::filesystem::TreeFilesystem;
use super::journal::Journal;
use super::pump::Pump;
use super::reads::ReadRecorder;
use super::record::{Record, RecordState};
use super::waiting::WaitingReads;
use crate::mount::MountSpec;
use crate::sys::map::MappedTree;
use crate::sys::{fusefd, mountpoint};

/// File system type as the mount table shows it.
pub const KIND: &str = "fuse.sluice";

/// What the kernel reads ahead of a sequential reader, and around a page fault. One chunk: more makes
/// a cold start fetch what nobody asked for, and pages that are present are read fast enough
/// (docs/decisions/010-fuse-requests.md).
const READAHEAD_KIB: u32 = 128;

/// Most threads that serve one mount. They copy from the page cache; a mount's load is rarely more
/// than a few processes, and threads cost memory in each of a hundred mounts.
const MOST_THREADS: usize = 4;

/// What sessions share.
#[derive(Debug)]
pub struct Serving {
    /// Devices, each open once.
    pub devices: Arc<OpenDevices>,
    /// Reads of missing data.
    pub waiting: Arc<WaitingReads>,
    /// Whether requests of new mounts are kept in a [`Journal`].
    pub journaled: bool,
}

/// A mount that is served by this process.
#[derive(Debug)]
pub struct Served {
    /// What is mounted.
    pub spec: MountSpec,
    /// Its record, with the holder too.
    pub record: Record,
    /// Name under which the holder keeps descriptor and record.
    pub entry: String,
    /// Minor number of the mount's device.
    pub connection: u32,
    /// What is read first, if that is recorded.
    pub recorder: Option<Arc<ReadRecorder>>,
    ended: Arc<Ended>,
}

/// Whether the kernel has ended the connection.
#[derive(Debug, Default)]
struct Ended {
    flag: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    fn set(&self) {
        *self.flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn wait(&self, longest: Duration) -> bool {
        let flag = self.flag.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .changed
            .wait_timeout_while(flag, longest, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Served {
    /// Waits until nothing uses the mount any more; says whether that is so.
    pub fn wait_end(&self, longest: Duration) -> bool {
        self.ended.wait(longest)
    }
}

fn threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores + 1).clamp(2, MOST_THREADS)
}

fn config() -> Config {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads());
    // One queue: the kernel does not hand out again what was read from a cloned descriptor.
    config.clone_fd = false;
    config
}

fn filesystem(spec: &MountSpec, serving: &Serving) -> io::Result<TreeFilesystem> {
    let context = |path: &Path, error: io::Error| {
        io::Error::new(error.kind(), format!("open {}: {error}", path.display()))
    };
    let tree = MappedTree::open(&spec.tree).map_err(|error| context(&spec.tree, error))?;
    let mut devices = Vec::with_capacity(spec.devices.len());
    for device in &spec.devices {
        let open = serving.devices.get(device);
        devices.push(open.map_err(|error| context(&device.directory, error))?);
    }
    TreeFilesystem::new(spec, tree, devices, serving.waiting.clone())
}

fn payload(spec: &MountSpec, connection: u32) -> wire::MountRecord {
    wire::MountRecord {
        mount: Some(spec.into()),
        connection,
    }
}

/// A mount on its way; what was done is undone when it is dropped early.
struct Making<'a> {
    mountpoint: &'a Path,
    mounted: bool,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = mountpoint::detach(self.mountpoint, true)
        {
            let mountpoint = self.mountpoint.display();
            tracing::error!(%mountpoint, %error, "undo a mount");
        }
    }
}

/// A session that is ready to run, and what to know of it.
pub struct Ready {
    session: Session<TreeFilesystem>,
    /// The mount.
    pub served: Arc<Served>,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready")
            .field("served", &self.served)
            .finish_non_exhaustive()
    }
}

impl Ready {
    /// Starts the threads that serve; `then` runs on one of them when the connection has ended.
    pub fn run(self, then: impl FnOnce(&Arc<Served>) + Send + 'static) -> io::Result<()> {
        let Ready { session, served } = self;
        super::worker::thread("serve", move || {
            if let Err(error) = session.run() {
                tracing::error!(key = served.spec.key, %error, "session ends");
            }
            served.ended.set();
            then(&served);
        })
    }
}

/// Makes a new mount. `keep` hands descriptor and record to the holder.
pub fn make(
    spec: MountSpec,
    entry: String,
    serving: &Serving,
    keep: impl FnOnce(&[BorrowedFd<'_>]) -> io::Result<()>,
) -> io::Result<Ready> {
    let mut files = filesystem(&spec, serving)?;
    files
        .look_for_xattrs()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let recorder = spec.record.map(|window| files.record(window));
    let fuse = fusefd::open()?;
    let record = Record::create(&payload(&spec, 0))?;
    let journal = serving.journaled.then(Journal::create).transpose()?;
    let mut kept = vec![fuse.as_fd(), record.as_fd()];
    kept.extend(journal.as_ref().map(AsFd::as_fd));
    keep(&kept)?;
    let mut making = Making {
        mountpoint: &spec.mountpoint,
        mounted: false,
    };
    attach(&fuse, &spec.mountpoint)?;
    making.mounted = true;
    let connection = connection_at(&spec.mountpoint)?;
    let server = match journal {
        None => fuse,
        Some(journal) => {
            files.keep_requests_small();
            let (end, pump) = Pump::new(fuse.as_fd(), Arc::new(journal))?;
            pump.start(threads())?;
            end
        }
    };
    let session = Session::from_fd(files, server, SessionACL::All, config())?;
    set_readahead(connection);
    record.write(&payload(&spec, connection))?;
    record.set_state(RecordState::Serving)?;
    making.mounted = false;
    drop(making);
    let ended = Arc::default();
    Ok(Ready {
        session,
        served: Arc::new(Served {
            spec,
            record,
            entry,
            connection,
            recorder,
            ended,
        }),
    })
}

fn attach(fuse: &OwnedFd, target: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let fd = fuse.as_raw_fd();
    let options =
        format!("fd={fd},rootmode=40755,user_id=0,group_id=0,default_permissions,allow_other");
    mountpoint::attach("sluice", target, KIND, MsFlags::MS_RDONLY, &options)
}

/// The connection's number: the minor device number of what is mounted.
fn connection_at(target: &Path) -> io::Result<u32> {
    match mountpoint::mount_at(target)? {
        Some(line) if line.kind == KIND => Ok(line.device.1),
        other => Err(io::Error::other(format!(
            "expected our mount, found {other:?}"
        ))),
    }
}

/// Left as it is where sysfs is not there or not ours.
fn set_readahead(connection: u32) {
    let path = format!("/sys/class/bdi/0:{connection}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, READAHEAD_KIB.to_string()) {
        tracing::debug!(path, %error, "set readahead");
    }
}

/// What a dead worker left, as the holder kept it.
#[derive(Debug)]
pub struct Left {
    /// Name with the holder.
    pub entry: String,
    /// `/dev/fuse`, connected.
    pub fuse: OwnedFd,
    /// Its record.
    pub record: Record,
    /// Its requests that were not answered; `None`: the kernel hands them out again.
    journal: Option<Arc<Journal>>,
    /// What is mounted.
    pub spec: MountSpec,
    /// How far it had come.
    pub state: RecordState,
    /// Minor number of the mount's device.
    pub connection: u32,
}

impl Left {
    /// Reads an entry that the holder kept.
    pub fn read(entry: String, fds: Vec<OwnedFd>) -> io::Result<Left> {
        let mut fds = fds.into_iter();
        let (Some(fuse), Some(record)) = (fds.next(), fds.next()) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "descriptors are missing",
            ));
        };
        let journal = fds.next().map(Journal::open).transpose()?;
        let (record, state, payload) = Record::open(record)?;
        let mount = payload
            .mount
            .ok_or(io::Error::other("a record without a mount"))?;
        let spec = MountSpec::try_from(mount).map_err(io::Error::other)?;
        Ok(Left {
            entry,
            fuse,
            record,
            journal: journal.map(Arc::new),
            spec,
            state,
            connection: payload.connection,
        })
    }

    /// Takes a mount down that nobody was told of.
    pub fn take_down(&self) -> io::Result<()> {
        match mountpoint::mount_at(&self.spec.mountpoint)? {
            // It could only be another mount's if the dead worker had not come to mount(2); but
            // then nothing of ours was there when it looked, and it looked last.
            Some(line) if line.kind == KIND => {
                mountpoint::detach(&self.spec.mountpoint, true)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the connection over: from now on its requests come to this process, beginning with
    /// those that the dead worker had read and not answered.
    ///
    /// **Errors** gives what was left back, to be tried again.
    pub fn take_over(self, serving: &Serving) -> Result<Ready, (Box<Left>, io::Error)> {
        let begun = Instant::now();
        let session = match self.connect(serving) {
            Ok(session) => session,
            Err(error) => return Err((Box::new(self), error)),
        };
        let Left {
            entry,
            record,
            spec,
            connection,
            ..
        } = self;
        tracing::info!(key = spec.key, connection, took = ?begun.elapsed(), "mount taken over");
        let ended = Arc::default();
        Ok(Ready {
            session,
            served: Arc::new(Served {
                spec,
                record,
                entry,
                connection,
                recorder: None,
                ended,
            }),
        })
    }

    fn connect(&self, serving: &Serving) -> io::Result<Session<TreeFilesystem>> {
        let mut files = filesystem(&self.spec, serving)?;
        if let Some(journal) = &self.journal {
            files.keep_requests_small();
            let (end, pump) = Pump::new(self.fuse.as_fd(), Arc::clone(journal))?;
            pump.greet()?;
            let session = Session::from_fd(files, end, SessionACL::All, config())?;
            pump.start(threads())?;
            return Ok(session);
        }
        let (socket, kernel) = fusefd::synthetic_connection()?;
        let session = Session::from_fd(files, socket, SessionACL::All, config())?;
        fusefd::replace(session.as_fd(), self.fuse.as_fd())?;
        drop(kernel);
        taken_over_all_the_same(&self.spec.key, fusefd::resend(self.fuse.as_fd()))?;
        Ok(session)
    }
}

/// Whether the session may serve after it has asked for the requests that the dead worker had read.
fn taken_over_all_the_same(key: &str, resent: io::Result<()>) -> io::Result<()> {
    match resent {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            // Trying again would keep everybody waiting and bring nothing.
            tracing::error!(
                key,
                "the kernel cannot hand out requests again (it can from Linux 6.9): what the dead \
                 worker was answering hangs until its reader is killed; all else goes on"
            );
            Ok(())
        }
        // The connection has ended meanwhile: the session will see it.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        resent => resent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_served_without_what_it_cannot_do() {
        let resent = |errno| taken_over_all_the_same("k", Err(io::Error::from_raw_os_error(errno)));
        assert!(taken_over_all_the_same("k", Ok(())).is_ok());
        assert!(resent(libc::EINVAL).is_ok() && resent(libc::ENODEV).is_ok());
        assert!(resent(libc::EIO).is_err());
    }
}
