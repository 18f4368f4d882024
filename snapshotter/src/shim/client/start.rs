// SPDX-License-Identifier: Apache-2.0
//! Starting the shim, and the socket it connects to.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::process::Command;
use tokio::time::Instant;

use super::{Presence, Shared, ShimError, ShimOptions};
use crate::shim::log::LOG_BYTES;
use crate::shim::{JOURNAL_FLAG, KEEP_SOCKET_NAME, LOCK_NAME, LOG_NAME, SOCKET_NAME};
use crate::sys::fdpass::{PacketListener, PacketSocket};

/// How often the supervisor looks when no worker is attached. A worker's restart takes a fraction
/// of it; a whole shim's start is rare.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How long a holder that runs may take to lock its directory.
const START_PATIENCE: Duration = Duration::from_secs(2);
/// One that ended sooner is not started again before: it would end again.
const QUICK_DEATH: Duration = Duration::from_secs(1);

/// Listens on the socket for workers.
pub(super) fn listen(run_dir: &Path) -> Result<UnixListener, ShimError> {
    listen_at(run_dir, SOCKET_NAME, |path| UnixListener::bind(path))
}

/// Listens on the socket for descriptors.
pub(super) fn listen_for_descriptors(run_dir: &Path) -> Result<PacketListener, ShimError> {
    listen_at(run_dir, KEEP_SOCKET_NAME, PacketListener::bind)
}

/// Binds a socket, mode 0600, taking over the name from a daemon that has died.
fn listen_at<L>(
    run_dir: &Path,
    name: &str,
    bind: impl FnOnce(&Path) -> std::io::Result<L>,
) -> Result<L, ShimError> {
    let path = run_dir.join(name);
    let fresh = run_dir.join(format!("{name}.new"));
    let io = |what, source| ShimError::Io {
        what,
        path: path.clone(),
        source,
    };
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(io("remove a stale socket beside", error));
        }
        _ => {}
    }
    let listener = bind(&fresh).map_err(|e| io("bind", e))?;
    std::fs::set_permissions(&fresh, Permissions::from_mode(0o600))
        .map_err(|e| io("set the mode of", e))?;
    // Renaming takes the place at once: a worker never finds the name missing.
    std::fs::rename(&fresh, &path).map_err(|e| io("take over", e))?;
    Ok(listener)
}

/// Starts a holder whenever there is neither a connection nor a living shim.
pub(super) async fn supervise(shared: Arc<Shared>) {
    let mut current = shared.current.subscribe();
    let mut children: Vec<tokio::process::Child> = Vec::new();
    let mut started: Option<Instant> = None;
    loop {
        if *shared.current.borrow() != Presence::Absent {
            // What was started last is there: when it dies, nobody waits for it.
            started = None;
        }
        if current
            .wait_for(|presence| *presence == Presence::Absent)
            .await
            .is_err()
        {
            return;
        }
        children.retain_mut(|child| child.try_wait().ok().flatten().is_none());
        // The lock shows a holder soon, but not at once.
        let patience = match children.is_empty() {
            true => QUICK_DEATH,
            false => START_PATIENCE,
        };
        if started.is_none_or(|at| at.elapsed() > patience) {
            match is_locked(&shared.options.run_dir) {
                Ok(true) => {}
                Ok(false) => {
                    started = Some(Instant::now());
                    match start_holder(&shared.options) {
                        Ok(child) => {
                            tracing::info!(pid = child.id(), "shim holder started");
                            children.push(child);
                        }
                        Err(error) => {
                            tracing::error!(error = %error, "start the shim holder");
                        }
                    }
                }
                Err(error) => tracing::error!(%error, "look at the shim's lock"),
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Whether a shim lives below `run_dir`.
fn is_locked(run_dir: &Path) -> Result<bool, ShimError> {
    let path = run_dir.join(LOCK_NAME);
    let opened = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path);
    let file = opened.map_err(|source| ShimError::Io {
        what: "open",
        path: path.clone(),
        source,
    })?;
    match file.try_lock() {
        // Closed, it is free again: the holder takes it for itself, and loses against another.
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(source)) => Err(ShimError::Io {
            what: "lock",
            path,
            source,
        }),
    }
}

/// Starts `sluice-shim holder`, which detaches itself.
fn start_holder(options: &ShimOptions) -> Result<tokio::process::Child, ShimError> {
    let (run_dir, binary) = (&options.run_dir, &options.binary);
    let io = |what, path: &Path, source| ShimError::Io {
        what,
        path: path.to_owned(),
        source,
    };
    let path = run_dir.join(LOG_NAME);
    let log = open_log(&path).map_err(|e| io("open the log", &path, e))?;
    let second = log.try_clone().map_err(|e| io("open the log", &path, e))?;
    let reserve = Arc::clone(&options.reserve);
    let handing = (!reserve.is_empty()).then(PacketSocket::pair).transpose();
    let handing = handing.map_err(|e| io("make a socket for", binary, e))?;
    let (ours, theirs) = handing.unzip();
    let stdin = theirs.map_or_else(Stdio::null, |socket| Stdio::from(socket.into_owned()));
    let child = Command::new(binary)
        .arg("holder")
        .arg("--run-dir")
        .arg(run_dir)
        .args(options.journal.then_some(JOURNAL_FLAG))
        .args(ours.is_some().then_some("--restore"))
        .current_dir("/")
        .stdin(stdin)
        .stdout(log)
        .stderr(second)
        .kill_on_drop(false)
        .spawn()
        .map_err(|e| io("start", binary, e))?;
    if let Some(socket) = ours {
        tokio::task::spawn_blocking(move || match reserve.hand_over(&socket) {
            Ok(entries) => {
                tracing::warn!(entries, "the shim died; a new one takes over what was kept")
            }
            Err(error) => tracing::error!(%error, "hand over to the shim"),
        });
    }
    Ok(child)
}

/// A file of its own, not our standard error: a pipe whose reader has died or sleeps would stop the
/// shim, and with it every mount.
fn open_log(path: &Path) -> std::io::Result<File> {
    if std::fs::metadata(path).is_ok_and(|log| log.len() > LOG_BYTES) {
        std::fs::rename(path, path.with_extension("log.old"))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}
