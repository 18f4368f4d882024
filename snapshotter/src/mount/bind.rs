// SPDX-License-Identifier: Apache-2.0
//! The `bind` back-end: shows an ordinary directory. It serves tests of everything above a mount:
//! a "tree" is a directory with the files already in it, and devices are not looked at.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use nix::mount::MsFlags;
use tokio::sync::Mutex;

use super::{Backend, ImageMount, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome};
use crate::sys::mountpoint::{self, Unmounted};

/// Bind-mounts `spec.tree`, read-only, at `spec.mountpoint`.
#[derive(Debug, Default)]
pub struct BindMount {
    /// Locked across a mount call: these are short and local, and it makes calls serial.
    mounted: Mutex<BTreeMap<String, PathBuf>>,
}

fn refused(key: &str, error: &std::io::Error) -> MountError {
    MountError::Refused {
        key: key.to_owned(),
        reason: error.to_string(),
    }
}

#[async_trait]
impl ImageMount for BindMount {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        spec.check()?;
        let mut mounted = self.mounted.lock().await;
        if mounted.contains_key(&spec.key) {
            return Ok(Backend::Bind);
        }
        let source = spec.tree.to_str().unwrap_or_default();
        let bind = |flags| mountpoint::attach(source, &spec.mountpoint, "none", flags, "");
        bind(MsFlags::MS_BIND).map_err(|error| refused(&spec.key, &error))?;
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(error) = bind(read_only) {
            let undone = mountpoint::detach(&spec.mountpoint, true);
            tracing::debug!(key = spec.key, ?undone, "undo a bind mount");
            return Err(refused(&spec.key, &error));
        }
        mounted.insert(spec.key.clone(), spec.mountpoint.clone());
        Ok(Backend::Bind)
    }

    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        Ok(match self.mounted.lock().await.contains_key(key) {
            true => MountState::Serving,
            false => MountState::Absent,
        })
    }

    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError> {
        let mut mounted = self.mounted.lock().await;
        let Some(path) = mounted.get(key) else {
            return Ok(UnmountOutcome::Done);
        };
        let detach = mode == UnmountMode::Detach;
        match mountpoint::detach(path, detach).map_err(|error| refused(key, &error))? {
            Unmounted::Busy => Ok(UnmountOutcome::Busy),
            Unmounted::Done | Unmounted::Absent => {
                mounted.remove(key);
                Ok(UnmountOutcome::Done)
            }
        }
    }
}
