// SPDX-License-Identifier: Apache-2.0
//! The lock that keeps two daemons from one root.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Why a root cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another daemon runs on it.
    #[error("{path:?} is locked: another sluiced (process {holder}) uses this root")]
    Held {
        /// The lock file.
        path: PathBuf,
        /// The process that wrote it.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("lock {path:?}: {source}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A locked root, until it is dropped or the process dies.
#[derive(Debug)]
pub struct RootLock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

impl RootLock {
    /// Locks a root directory. Never waits.
    pub fn take(root: &Path) -> Result<Self, LockError> {
        let path = root.join("sluiced.lock");
        let io = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // For the message of whoever comes second; the lock itself is the kernel's.
                let written = lock
                    .set_len(0)
                    .and_then(|()| write!(lock, "{}", std::process::id()));
                written.map_err(io)?;
                Ok(Self(lock))
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                if file.read_to_string(&mut holder).is_err() || holder.is_empty() {
                    holder = "unknown".into();
                }
                Err(LockError::Held { path, holder })
            }
            Err((_, error)) => Err(io(error.into())),
        }
    }
}
