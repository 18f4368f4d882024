// SPDX-License-Identifier: Apache-2.0
//! Reading what the judges of this module's siblings are given, and the repairs that need no daemon.
//!
//! **Deadlines** each function ends within [`LIMIT`] or says that it could not: its blocking part may go on
//! in a thread that nobody waits for. No mount is touched, only named to the kernel.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use prost::Message as _;
use sluice_fetcher::store::{DeviceState, PresenceMap};

use super::kernel_mounts::{self, Completeness};
use super::mountinfo::{FuseMount, KernelMount, erofs_mounts, fuse_mounts, is_locked, is_top};
use super::{Done, Finding, Severity, clock, connections, containerd, kernel};
use crate::setup::Wanted;

/// How long one look may take besides [`WATCH`].
const LIMIT: Duration = Duration::from_secs(10);
/// For how long it is watched whether requests wait without a pause: longer than a fetch over a slow line.
const WATCH: Duration = Duration::from_secs(3);
/// Between two looks of these.
const STEP: Duration = Duration::from_millis(100);
/// How long a socket of this machine may take to answer.
const CONNECT: Duration = Duration::from_secs(3);

/// The mounts of our namespace.
const MOUNTINFO: &str = "/proc/self/mountinfo";
const FUSE_CONTROL: &str = "/sys/fs/fuse/connections";
/// The lock that the shim holds, in the run directory.
const SHIM_LOCK: &str = "shim.lock";

/// What a look brought.
pub type Looked = (Vec<Finding>, Done);

fn done(check: &str, looked_at: usize) -> Done {
    Done {
        check: check.to_owned(),
        looked_at: u64::try_from(looked_at).unwrap_or(u64::MAX),
    }
}

/// Runs blocking work within the limit; a finding where it takes longer.
async fn bounded(check: &'static str, work: impl FnOnce() -> Looked + Send + 'static) -> Looked {
    let work = tokio::task::spawn_blocking(work);
    match tokio::time::timeout(LIMIT, work).await {
        Ok(Ok(looked)) => looked,
        Ok(Err(_)) | Err(_) => {
            let problem = format!("no answer within {} s", LIMIT.as_secs());
            let finding = Finding::new(check, Severity::Error, check, problem).advice(
                "look for processes that hang (state D) and for a disk that does not answer",
            );
            (vec![finding], done(check, 0))
        }
    }
}

/// The kernel.
pub async fn kernel() -> Looked {
    bounded(kernel::CHECK, || {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let device = std::fs::symlink_metadata("/dev/fuse");
        let found = kernel::judge(
            text("/proc/sys/kernel/osrelease").trim(),
            &text("/proc/filesystems"),
            device.is_ok_and(|it| it.file_type().is_char_device()),
        );
        (found, done(kernel::CHECK, 3))
    })
    .await
}

/// containerd's configuration.
pub async fn containerd(config: PathBuf, wanted: Wanted) -> Looked {
    bounded(containerd::CHECK, move || {
        let subject = config.display().to_string();
        let found = match std::fs::read_to_string(&config) {
            Ok(text) => containerd::judge(&subject, &text, &wanted),
            Err(error) => {
                let problem = format!("cannot be read: {error}");
                let advice = "name it with --containerd-config, or run `sluice setup containerd`";
                let finding = Finding::new(containerd::CHECK, Severity::Error, subject, problem);
                vec![finding.advice(advice)]
            }
        };
        (found, done(containerd::CHECK, 1))
    })
    .await
}

/// The sockets of sluiced.
pub async fn sockets(run: &Path) -> Looked {
    const CHECK: &str = "sockets";
    let mut found = Vec::new();
    let names = ["snapshots.sock", "control.sock"];
    for name in names {
        let path = run.join(name);
        let finding =
            |severity, problem: String| Finding::new(CHECK, severity, path.display(), problem);
        let advice = "start sluiced; its log says why it does not listen";
        match tokio::fs::symlink_metadata(&path).await {
            Err(error) => {
                let problem = format!("is not there: {error}");
                found.push(finding(Severity::Error, problem).advice(advice));
                continue;
            }
            Ok(metadata) if !metadata.file_type().is_socket() => {
                let problem = "is no socket".to_owned();
                found.push(finding(Severity::Error, problem).advice("remove it, start sluiced"));
                continue;
            }
            Ok(metadata) if metadata.mode() & 0o077 != 0 => {
                let problem = format!("has mode {:o}: others may use it", metadata.mode() & 0o777);
                found.push(finding(Severity::Warning, problem).advice("chmod 600"));
            }
            Ok(_) => {}
        }
        let connected = tokio::time::timeout(CONNECT, tokio::net::UnixStream::connect(&path));
        let problem = match connected.await {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => format!("nobody listens: {error}"),
            Err(_) => format!("takes no connection within {} s", CONNECT.as_secs()),
        };
        found.push(finding(Severity::Error, problem).advice(advice));
    }
    (found, done(CHECK, names.len()))
}

/// Whether the shim of this run directory lives.
fn shim_lives(run: &Path) -> bool {
    let inode = std::fs::symlink_metadata(run.join(SHIM_LOCK)).map(|it| it.ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    inode.is_ok_and(|inode| is_locked(&locks, inode))
}

fn waiting(mount: &FuseMount) -> Option<u64> {
    let path = Path::new(FUSE_CONTROL).join(mount.connection.to_string());
    let text = std::fs::read_to_string(path.join("waiting")).ok()?;
    text.trim().parse().ok()
}

/// Gives a mount up: its readers get an error, and it is no mount any more.
///
/// **Errors** those of umount2(2); `ResourceBusy` where something else is mounted over it, which stays.
fn give_up(mount: &FuseMount) -> io::Result<()> {
    let path = Path::new(FUSE_CONTROL).join(mount.connection.to_string());
    // Where all descriptors of a server are gone, the kernel has done so already.
    let _ = std::fs::write(path.join("abort"), "1");
    if !is_top(&std::fs::read(MOUNTINFO)?, mount) {
        let problem = "another mount lies on it";
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, problem));
    }
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    if let Some(above) = above(&mount.mountpoint) {
        // EINVAL: it is gone already.
        match umount2(&above, flags) {
            Err(Errno::EINVAL | Errno::ENOENT) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    umount2(&mount.mountpoint, flags)?;
    Ok(())
}

/// Where the kernel's mount is whose devices this one serves, if it serves devices.
///
/// **Source** `mount/over_fuse.rs` of the daemon.
fn above(mountpoint: &Path) -> Option<PathBuf> {
    let name = mountpoint.file_name()?.to_str()?;
    let run = name.strip_suffix(".devices")?;
    Some(mountpoint.with_file_name(run))
}

/// Whether the layers below a mount of the kernel are sealed, as its note in the run directory names them, or can at
/// least not be read as zeros.
fn completeness(run: &Path, mount: &KernelMount) -> Completeness {
    let sealed = || -> Option<bool> {
        let name = mount.mountpoint.file_name()?.to_str()?;
        let note = std::fs::read(run.join("mounts").join(format!("{name}.mount"))).ok()?;
        let note = sluice_proto::shim::Mount::decode(&*note).ok()?;
        if note.over_fuse {
            // What is missing gives errors; the mount below is looked at by itself.
            return Some(true);
        }
        let mut states = note.devices.iter().map(|device| {
            let present = Path::new(&device.directory).join("present");
            let state = PresenceMap::open(&present).ok()?.state();
            Some(state == DeviceState::Sealed)
        });
        states.try_fold(true, |all, one| Some(all && one?))
    };
    match sealed() {
        Some(true) => Completeness::Sealed,
        Some(false) => Completeness::Lazy,
        None => Completeness::Unknown,
    }
}

/// The mounts below the root: whether somebody serves them, and whether requests hang.
pub async fn connections(root: &Path, run: &Path, fix: bool) -> Looked {
    const CHECK: &str = connections::CHECK;
    // mountinfo has no symbolic links; neither the root nor its parents are mounts of ours.
    let real = tokio::fs::canonicalize(root).await;
    let directory = real.unwrap_or_else(|_| root.to_owned()).join("mnt");
    let (mounts, kernels) = match tokio::fs::read(MOUNTINFO).await {
        Ok(text) => (
            fuse_mounts(&text, &directory),
            erofs_mounts(&text, &directory),
        ),
        Err(error) => {
            let finding = Finding::new(CHECK, Severity::Error, MOUNTINFO, error);
            return (vec![finding], done(CHECK, 0));
        }
    };
    let looked_at = mounts.len() + kernels.len();
    if looked_at == 0 {
        return (Vec::new(), done(CHECK, 0));
    }
    let mut lives = shim_lives(run);
    let mut waited: Vec<Vec<u64>> = vec![Vec::new(); mounts.len()];
    let end = tokio::time::Instant::now() + WATCH;
    while tokio::time::Instant::now() < end {
        for (mount, waited) in mounts.iter().zip(&mut waited) {
            waited.extend(waiting(mount));
        }
        // A shim that died is started again by the daemon: only one that stays away is dead.
        lives |= shim_lives(run);
        if lives && mounts.is_empty() {
            break;
        }
        tokio::time::sleep(STEP).await;
    }
    let mut found = Vec::new();
    for (mount, waited) in mounts.iter().zip(&waited) {
        let Some(mut finding) = connections::judge(mount, waited, WATCH.as_secs(), lives) else {
            continue;
        };
        if fix && finding.repairable {
            match give_up(mount) {
                Ok(()) => finding.repaired = true,
                Err(error) => finding
                    .problem
                    .push_str(&format!("; not unmounted: {error}")),
            }
        }
        found.push(finding);
    }
    if !lives {
        let run = run.to_owned();
        let judged = bounded(CHECK, move || {
            let judge = |mount: &KernelMount| {
                kernel_mounts::judge(CHECK, &mount.mountpoint, completeness(&run, mount))
            };
            (kernels.iter().filter_map(judge).collect(), done(CHECK, 0))
        });
        found.extend(judged.await.0);
    }
    (found, done(CHECK, looked_at))
}

/// The clock, by the registry of `host` as well where there is one.
pub async fn clock(host: Option<&str>) -> Looked {
    let theirs = match host {
        Some(host) => registry_time(host).await.map(|time| (host, time)),
        None => None,
    };
    let finding = clock::judge(SystemTime::now(), theirs);
    (finding.into_iter().collect(), done(clock::CHECK, 1))
}

/// The `Date` of a registry's answer, whatever the answer is; nothing of ours is sent.
async fn registry_time(host: &str) -> Option<SystemTime> {
    // A wrong clock makes right certificates look wrong, and the time that is read here decides nothing
    // but what is shown.
    let client = reqwest::Client::builder()
        .danger_accept_invalid_certs(true)
        .timeout(LIMIT / 2)
        .build()
        .ok()?;
    for scheme in ["https", "http"] {
        let answer = client.head(format!("{scheme}://{host}/v2/")).send().await;
        let Ok(answer) = answer else { continue };
        let date = answer.headers().get(reqwest::header::DATE)?;
        return httpdate::parse_http_date(date.to_str().ok()?).ok();
    }
    None
}
