// SPDX-License-Identifier: Apache-2.0
//! The temporary root of one set-up.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use super::mounts;

/// How long a process that was killed may go on.
const DIES: Duration = Duration::from_secs(5);

/// A directory under which everything of one set-up lives: state, sockets, mounts, logs.
///
/// Dropped after the processes, it aborts FUSE connections and unmounts what they left, then
/// deletes the directory; it deletes nothing while a mount is left below it. The name is short because unix socket paths
/// end at 107 bytes.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    keep: bool,
    /// One set-up at a time: they measure, and two cores are few. A part of a set-up leaves it to the whole.
    _turn: Option<Flock<File>>,
}

impl Root {
    /// Makes a root below `$SLUICE_TEST_ROOT`, by default `/var/tmp` (overlayfs upper directories
    /// and containerd's root need a real disk file system, which `/tmp` often is not).
    /// `SLUICE_KEEP=1` keeps the files for inspection.
    pub fn new(name: &str) -> Result<Self> {
        let base = base();
        let turn = File::create(base.join("sluice-e2e.lock")).context("create the lock file")?;
        let turn = Flock::lock(turn, FlockArg::LockExclusive)
            .map_err(|(_, e)| e)
            .context("wait for another set-up")?;
        let directory = tempfile::Builder::new()
            .prefix(&format!("sl-{name}-"))
            .tempdir_in(&base)
            .with_context(|| format!("create a root in {}", base.display()))?;
        let keep = std::env::var_os("SLUICE_KEEP").is_some();
        Ok(Self {
            path: directory.keep(),
            keep,
            _turn: Some(turn),
        })
    }

    /// A root below this one, for a part of the set-up that comes and goes by itself.
    pub fn part(&self, name: &str) -> Result<Self> {
        Ok(Self {
            path: self.directory(name)?,
            keep: self.keep,
            _turn: None,
        })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path below it, whose parent directories are made.
    pub fn join(&self, relative: &str) -> Result<PathBuf> {
        let path = self.path.join(relative);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        Ok(path)
    }

    /// A directory below it, made when missing.
    pub fn directory(&self, relative: &str) -> Result<PathBuf> {
        let path = self.path.join(relative);
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }
}

/// Where roots are made.
#[must_use]
pub fn base() -> PathBuf {
    std::env::var_os("SLUICE_TEST_ROOT").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

impl Drop for Root {
    fn drop(&mut self) {
        mounts::abort_fuse(&self.path);
        let left = mounts::unmount_all(&self.path);
        if !left.is_empty() {
            eprintln!(
                "harness: still mounted below {}: {left:?}",
                self.path.display()
            );
            return;
        }
        if self.keep {
            eprintln!("harness: kept {}", self.path.display());
        } else if let Err(e) = remove(&self.path) {
            eprintln!("harness: remove {}: {e}", self.path.display());
        }
    }
}

/// Removes a directory in which processes that were killed may write for a moment still.
fn remove(path: &Path) -> std::io::Result<()> {
    let begun = Instant::now();
    loop {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(_) if begun.elapsed() < DIES => std::thread::sleep(DIES / 50),
            result => return result,
        }
    }
}
