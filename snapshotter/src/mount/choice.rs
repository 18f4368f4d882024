// SPDX-License-Identifier: Apache-2.0
//! Which back-end makes a mount: the kernel's EROFS where that is able to, else the shim.
//!
//! | run | made by |
//! | --- | --- |
//! | all layers sealed, kernel able | the kernel; no process of ours is needed from then on |
//! | anything else | the shim, over FUSE |
//!
//! What is mounted stays with what serves it: containers stand on it, and a mount below them cannot be
//! exchanged. The next mount of the same run is chosen anew. A kernel that refuses a mount costs a
//! warning, and the run is served over FUSE.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;

use super::erofs::{self, KernelMounts};
use super::{
    Backend, FirstReads, ImageMount, MountError, MountMetrics, MountSpec, MountState, UnmountMode,
    UnmountOutcome,
};
use crate::shim::session;
use crate::sys::mountpoint::{self, Unmounted};

/// Whether the kernel may serve sealed runs; if not, why not.
pub type Ability = Result<(), String>;

/// Chooses a back-end for each mount.
#[derive(Debug)]
pub struct MountChoice {
    fuse: Arc<dyn ImageMount>,
    kernel: Arc<KernelMounts>,
    sealed: Ability,
    metrics: MountMetrics,
}

impl MountChoice {
    /// Over the shim and the kernel. Without the ability the kernel makes no mounts, but what it serves
    /// already is known and can be taken away.
    #[must_use]
    pub fn new(
        fuse: Arc<dyn ImageMount>,
        kernel: Arc<KernelMounts>,
        sealed: Ability,
        metrics: MountMetrics,
    ) -> Self {
        Self {
            fuse,
            kernel,
            sealed,
            metrics,
        }
    }

    /// Has the kernel mount the run if all of it is sealed; says whether it did.
    async fn mount_sealed(&self, spec: &MountSpec) -> io::Result<bool> {
        let kept = spec.clone();
        let Some(devices) = blocking(move || erofs::open_sealed(&kept)).await? else {
            return Ok(false);
        };
        let at = spec.mountpoint.clone();
        let there = blocking(move || mountpoint::mount_at(&at)).await?;
        if there.is_some_and(|line| line.kind == session::KIND) {
            match self.fuse.check(&spec.key).await {
                Ok(MountState::Serving) => return Ok(false),
                // What a dead shim left.
                Ok(MountState::Absent) | Err(MountError::NoShim { .. }) => {}
                Err(error) => return Err(io::Error::other(error)),
            }
            let at = spec.mountpoint.clone();
            blocking(move || mountpoint::detach(&at, true)).await?;
        }
        let (kernel, spec) = (Arc::clone(&self.kernel), spec.clone());
        blocking(move || kernel.mount(&spec, &devices)).await?;
        Ok(true)
    }
}

/// On a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other)?
}

fn refused(key: &str, error: &io::Error) -> MountError {
    MountError::Refused {
        key: key.to_owned(),
        reason: error.to_string(),
    }
}

#[async_trait]
impl ImageMount for MountChoice {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        spec.check()?;
        if self.sealed.is_ok() {
            match self.mount_sealed(spec).await {
                Ok(true) => {
                    self.metrics.made(Backend::Erofs);
                    return Ok(Backend::Erofs);
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(key = spec.key, "mount by FUSE instead of EROFS: {error}");
                    self.metrics.fell_back();
                }
            }
        }
        let backend = self.fuse.mount(spec).await?;
        self.metrics.made(backend);
        Ok(backend)
    }

    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        let (kernel, name) = (Arc::clone(&self.kernel), key.to_owned());
        let in_place = blocking(move || kernel.in_place(&name)).await;
        match in_place.map_err(|error| refused(key, &error))? {
            Some(_) => Ok(MountState::Serving),
            None => self.fuse.check(key).await,
        }
    }

    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError> {
        let (kernel, name) = (Arc::clone(&self.kernel), key.to_owned());
        let outcome = blocking(move || kernel.unmount(&name, mode)).await;
        match outcome.map_err(|error| refused(key, &error))? {
            Unmounted::Busy => Ok(UnmountOutcome::Busy),
            // An older mount of the run may still be leaving.
            Unmounted::Done | Unmounted::Absent => self.fuse.unmount(key, mode).await,
        }
    }

    async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        self.fuse.first_reads(key, from, forget).await
    }
}
