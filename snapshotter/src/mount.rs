// SPDX-License-Identifier: Apache-2.0
//! Mounts of merged chains: what to mount, and the trait that each back-end fulfils.
//!
//! A mount shows one merged tree (a maximal run of lazy layers) whose file contents stand in layer
//! devices. Who mounts gives a [`MountSpec`] that names durable files only: no network is ever
//! needed to mount.

pub mod attached;
pub mod bind;
pub mod choice;
pub mod erofs;
pub mod errno;
pub mod fuse;
mod metrics;
pub mod over_fuse;
pub mod selftest;

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use sluice_blockindex::digest::{DiffId, IndexDigest};
use thiserror::Error;

pub use metrics::MountMetrics;

/// What serves a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backend {
    /// The shim, over FUSE.
    Fuse,
    /// The kernel's own EROFS.
    Erofs,
    /// The kernel's own EROFS, whose devices the shim serves over FUSE.
    ErofsFuse,
    /// A bind mount, in tests.
    Bind,
}

impl Backend {
    /// The word for it in logs, metrics and the control API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Backend::Fuse => "fuse",
            Backend::Erofs => "erofs",
            Backend::ErofsFuse => "erofs-fuse",
            Backend::Bind => "bind",
        }
    }
}

/// What to mount where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSpec {
    /// Names the mount: the run's key. Up to 200 bytes of letters, digits, `-`, `_`, `.`, `:`.
    pub key: String,
    /// An existing directory.
    pub mountpoint: PathBuf,
    /// The merged EROFS tree, validated.
    pub tree: PathBuf,
    /// Device `i` of the tree is `devices[i - 1]`.
    pub devices: Vec<DeviceSpec>,
    /// How long a read of missing data may wait; `None`: for ever.
    pub read_deadline: Option<Duration>,
    /// How long it is recorded which chunks are read first, from the first read on; `None`: not at all.
    pub record: Option<Duration>,
}

/// A layer device below a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The layer.
    pub diff_id: DiffId,
    /// The index that the device belongs to.
    pub index_digest: IndexDigest,
    /// Its directory in the chunk store, which holds `data` and `present`.
    pub directory: PathBuf,
}

/// Whether a mount is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountState {
    /// Mounted, and its server answers for it.
    Serving,
    /// Not mounted by this back-end.
    Absent,
}

/// How to take a mount away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnmountMode {
    /// Only if nothing uses it.
    IfUnused,
    /// Take it out of the namespace at once; who uses it keeps it until he is done.
    Detach,
}

/// How an unmount ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnmountOutcome {
    /// Nothing uses the mount any more; its tree and devices may be deleted.
    Done,
    /// Still in use: delete nothing, ask again later.
    Busy,
}

/// The first read of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstRead {
    /// The device's place in the mount, from 0.
    pub device: u16,
    /// The chunk.
    pub chunk: u32,
    /// Since the first read of all.
    pub after: Duration,
}

/// Which chunks of a mount were read first, or the next ones of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FirstReads {
    /// Whether there is a recording of the mount.
    pub recorded: bool,
    /// Names it: a mount that was made anew has another one.
    pub recording: String,
    /// Whether nothing comes after these.
    pub complete: bool,
    /// In their order, each chunk once.
    pub reads: Vec<FirstRead>,
}

/// Why a mount operation failed.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MountError {
    /// No shim answered in time; the operation may be repeated.
    #[error("the shim did not answer within {waited:?}")]
    Unanswered {
        /// How long we waited.
        waited: Duration,
    },
    /// There is no shim, and none could be started.
    #[error("no shim: {reason}")]
    NoShim {
        /// Why not.
        reason: String,
    },
    /// The back-end says no.
    #[error("mount {key}: {reason}")]
    Refused {
        /// The mount.
        key: String,
        /// What the back-end said.
        reason: String,
    },
    /// The specification itself is wrong.
    #[error("mount {key}: {what}")]
    InvalidSpec {
        /// The mount.
        key: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The client was shut down.
    #[error("the shim client is closed")]
    Closed,
}

impl MountError {
    /// Whether the same call can succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            MountError::Unanswered { .. } | MountError::NoShim { .. } => true,
            MountError::Refused { .. } | MountError::InvalidSpec { .. } | MountError::Closed => {
                false
            }
        }
    }
}

/// Mounts merged chains.
///
/// Promises: a failed mount leaves no trace; mounting again what is mounted by the same
/// specification succeeds and changes nothing; unmounting what is not mounted is [`UnmountOutcome::Done`].
#[async_trait]
pub trait ImageMount: Send + Sync + Debug {
    /// Mounts; when it returns, the files are there, served by the back-end that it names. **Cancel**:
    /// the mount may be made all the same; mount again or unmount to know.
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError>;

    /// Says whether the mount is served. Touches no file on it.
    async fn check(&self, key: &str) -> Result<MountState, MountError>;

    /// Unmounts. **Cancel**: as for [`ImageMount::mount`].
    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError>;

    /// The first reads that were recorded, from number `from` on; `forget` when nobody will ask again.
    /// A back-end that records nothing says so.
    async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        let _nothing = (key, from, forget);
        Ok(FirstReads::default())
    }
}

impl MountSpec {
    /// Checks what can be checked without looking at files.
    pub fn check(&self) -> Result<(), MountError> {
        let wrong = |what| MountError::InvalidSpec {
            key: self.key.clone(),
            what,
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
        if self.key.is_empty() || self.key.len() > 200 || !self.key.bytes().all(plain) {
            return Err(wrong("the key is not a plain name"));
        }
        let paths = [&self.mountpoint, &self.tree].into_iter();
        let device_paths = self.devices.iter().map(|device| &device.directory);
        for path in paths.chain(device_paths) {
            if !path.is_absolute() || path.to_str().is_none() {
                return Err(wrong("a path is not absolute or not UTF-8"));
            }
        }
        if self.devices.len() > usize::from(u16::MAX) {
            return Err(wrong("more devices than a tree can name"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(key: &str, tree: &str) -> MountSpec {
        MountSpec {
            key: key.into(),
            mountpoint: "/mnt/x".into(),
            tree: tree.into(),
            devices: Vec::new(),
            read_deadline: None,
            record: None,
        }
    }

    #[test]
    fn specifications_are_checked() {
        assert_eq!(spec("sha256:ab-c_1.x", "/t").check(), Ok(()));
        for (key, tree) in [("", "/t"), ("a/b", "/t"), ("a b", "/t"), ("ok", "t")] {
            assert!(spec(key, tree).check().is_err(), "{key} {tree}");
        }
        assert!(spec(&"k".repeat(201), "/t").check().is_err());
    }
}
