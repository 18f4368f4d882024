// SPDX-License-Identifier: Apache-2.0
//! Which back-end makes a mount: the kernel's EROFS where that is able to, else the shim.
//!
//! | run | made by |
//! | --- | --- |
//! | all layers sealed, kernel able | the kernel; no process of ours is needed from then on |
//! | some not, kernel able to ask before they are read, and wanted | the kernel, while the shim watches them |
//! | some not, kernel able to read devices that the shim serves | the kernel, over FUSE for bytes alone |
//! | anything else | the shim, over FUSE |
//!
//! What is mounted stays with what serves it: containers stand on it, and a mount below them cannot be
//! exchanged. The next mount of the same run is chosen anew. A kernel that refuses a mount costs a
//! warning, and the run is served over FUSE.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sluice_fetcher::steps::{StepGuard, StepKind};

use super::erofs::{self, Devices, KernelMount, KernelMounts};
use super::over_fuse::OverFuse;
use super::{
    Backend, FirstReads, ImageMount, MountError, MountMetrics, MountSpec, MountState, UnmountMode,
    UnmountOutcome,
};
use crate::shim::session;
use crate::sys::mountpoint::{self, Unmounted};

/// A mount or unmount by the kernel: local and short, unless a disk or somebody else's file system hangs.
const KERNEL_STEP: StepKind = StepKind::new("kernel mount", Duration::from_secs(5));

/// Whether something may be done; if not, why not. An empty reason: nobody asked for it.
pub type Ability = Result<(), String>;

/// What the kernel may serve.
#[derive(Debug, Clone)]
pub struct Abilities {
    /// Runs whose layers are all sealed.
    pub sealed: Ability,
    /// Others, from the chunk store, asking before it reads.
    pub lazy: Ability,
    /// Others, from files that the shim serves.
    pub over_fuse: Ability,
}

/// Watches devices for the kernel's mounts: the shim.
#[async_trait]
pub trait Watcher: Send + Sync + Debug {
    /// Watches the devices of a run; again is fine. **Cancel**: it may be watched all the same.
    async fn watch(&self, spec: &MountSpec) -> Result<(), MountError>;

    /// Ends the watch of a run whose mount is gone, unless something still uses the file system.
    async fn unwatch(&self, key: &str) -> Result<UnmountOutcome, MountError>;

    /// The runs that are watched.
    async fn watched(&self) -> Result<Vec<String>, MountError>;
}

/// Chooses a back-end for each mount.
#[derive(Debug)]
pub struct MountChoice {
    fuse: Arc<dyn ImageMount>,
    watcher: Arc<dyn Watcher>,
    kernel: Arc<KernelMounts>,
    over_fuse: OverFuse,
    abilities: Abilities,
    metrics: MountMetrics,
    /// Runs that are being mounted: they may be watched already. Locked for set operations only.
    mounting: Mutex<BTreeSet<String>>,
}

impl MountChoice {
    /// Over the shim and the kernel. Without the ability the kernel makes no mounts, but what it serves
    /// already is known and can be taken away.
    #[must_use]
    pub fn new(
        fuse: Arc<dyn ImageMount>,
        watcher: Arc<dyn Watcher>,
        kernel: Arc<KernelMounts>,
        abilities: Abilities,
        metrics: MountMetrics,
    ) -> Self {
        Self {
            over_fuse: OverFuse::new(Arc::clone(&fuse), Arc::clone(&kernel)),
            fuse,
            watcher,
            kernel,
            abilities,
            metrics,
            mounting: Mutex::default(),
        }
    }

    fn mounting(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.mounting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the kernel mount the run if it may; says how it did.
    async fn mount_by_kernel(&self, spec: &MountSpec) -> io::Result<Option<Backend>> {
        if let Some(mount) = self.in_place(&spec.key).await? {
            if mount.devices == Devices::Store || self.is_served(&spec.key).await? {
                return Ok(Some(mount.backend()));
            }
            // All that it does not have in memory gives errors by now.
            tracing::warn!(key = spec.key, "replace a mount whose server is gone");
            let (kernel, key) = (Arc::clone(&self.kernel), spec.key.clone());
            blocking(move || kernel.unmount(&key, UnmountMode::Detach)).await?;
        }
        if self.abilities.sealed.is_err() || !self.is_free(spec).await? {
            return Ok(None);
        }
        let subject = format!("mount {}", spec.mountpoint.display());
        let steps = self.metrics.steps();
        let step = steps.enter(KERNEL_STEP, "containerd", subject);
        if is_sealed(spec).await? {
            self.mount_store(spec, step).await?;
            return Ok(Some(Backend::Erofs));
        }
        if self.abilities.lazy.is_ok() {
            self.watcher.watch(spec).await.map_err(io::Error::other)?;
            let mounted = self.mount_store(spec, step).await;
            if mounted.is_err() {
                let undone = self.watcher.unwatch(&spec.key).await;
                tracing::debug!(key = spec.key, ?undone, "undo a watch");
            }
            return mounted.map(|()| Some(Backend::Erofs));
        }
        if self.abilities.over_fuse.is_ok() {
            let mounted = self.over_fuse.mount(spec).await;
            return mounted.map(|()| Some(Backend::ErofsFuse));
        }
        Ok(None)
    }

    /// Has the kernel mount the run over the files of the chunk store.
    async fn mount_store(&self, spec: &MountSpec, step: StepGuard) -> io::Result<()> {
        let (kernel, spec) = (Arc::clone(&self.kernel), spec.clone());
        let mounted = blocking(move || {
            // For as long as the call lasts, also when nobody waits for it any more.
            let _step = step;
            let devices = erofs::open_devices(&spec)?;
            kernel.mount(&spec, &devices, Devices::Store)
        });
        mounted.await
    }

    async fn in_place(&self, key: &str) -> io::Result<Option<KernelMount>> {
        let (kernel, key) = (Arc::clone(&self.kernel), key.to_owned());
        blocking(move || kernel.in_place(&key)).await
    }

    /// Whether the shim serves the files below a mount of the kernel.
    async fn is_served(&self, key: &str) -> io::Result<bool> {
        match self.over_fuse.is_served(key).await {
            Err(MountError::NoShim { .. }) => Ok(false),
            served => served.map_err(io::Error::other),
        }
    }

    /// Whether no mount of the shim that serves is in the place of the run; a dead one is removed.
    async fn is_free(&self, spec: &MountSpec) -> io::Result<bool> {
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
        Ok(true)
    }

    /// Watches again what has lost its watch.
    async fn watch_again(&self, spec: &MountSpec) -> Result<(), MountError> {
        tracing::error!(
            key = spec.key,
            "nobody watched a mount that is not complete: what was read of it meanwhile may be zeros"
        );
        self.watcher.watch(spec).await
    }

    /// Puts mounts and watches in agreement: once at the start, and every now and then, because shim and
    /// daemon may die at any moment.
    pub async fn tend(&self) -> Result<(), MountError> {
        let watched = self.watcher.watched().await?;
        let mounts = self.kernel.all();
        let of_store = mounts.iter().filter(|it| it.devices == Devices::Store);
        let specs: Vec<_> = of_store.map(|mount| &mount.spec).collect();
        for spec in specs.iter().filter(|spec| !watched.contains(&spec.key)) {
            let sealed = is_sealed(spec).await;
            if !sealed.map_err(|error| refused(&spec.key, &error))? {
                self.watch_again(spec).await?;
            }
        }
        for key in watched {
            let mounted = specs.iter().any(|spec| spec.key == key);
            if !mounted && !self.mounting().contains(&key) {
                self.watcher.unwatch(&key).await?;
            }
        }
        Ok(())
    }
}

async fn is_sealed(spec: &MountSpec) -> io::Result<bool> {
    let spec = spec.clone();
    blocking(move || erofs::all_sealed(&spec)).await
}

/// On a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
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

/// Takes a run from those that are being mounted when it is dropped.
struct Mounting<'a>(&'a MountChoice, &'a str);

impl Drop for Mounting<'_> {
    fn drop(&mut self) {
        self.0.mounting().remove(self.1);
    }
}

#[async_trait]
impl ImageMount for MountChoice {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        spec.check()?;
        self.mounting().insert(spec.key.clone());
        let _mounting = Mounting(self, &spec.key);
        match self.mount_by_kernel(spec).await {
            Ok(Some(backend)) => {
                self.metrics.made(backend);
                return Ok(backend);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(key = spec.key, "mount by FUSE instead of EROFS: {error}");
                self.metrics.fell_back();
            }
        }
        let backend = self.fuse.mount(spec).await?;
        self.metrics.made(backend);
        Ok(backend)
    }

    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        let io = |error| refused(key, &error);
        let Some(KernelMount { spec, devices }) = self.in_place(key).await.map_err(io)? else {
            return self.fuse.check(key).await;
        };
        if devices == Devices::OverFuse {
            return Ok(match self.over_fuse.is_served(key).await? {
                true => MountState::Serving,
                false => MountState::Absent,
            });
        }
        if !is_sealed(&spec).await.map_err(io)?
            && !self.watcher.watched().await?.contains(&spec.key)
        {
            self.watch_again(&spec).await?;
        }
        Ok(MountState::Serving)
    }

    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError> {
        let (kernel, name) = (Arc::clone(&self.kernel), key.to_owned());
        let subject = format!("unmount {key}");
        let step = self.metrics.steps().enter(KERNEL_STEP, "sluiced", subject);
        let outcome = blocking(move || {
            let _step = step;
            kernel.unmount(&name, mode)
        });
        let outcome = outcome.await;
        if outcome.map_err(|error| refused(key, &error))? == Unmounted::Busy {
            return Ok(UnmountOutcome::Busy);
        }
        // Containers may stand on it all the same.
        let watched = match self.watcher.watched().await?.iter().any(|it| it == key) {
            true => self.watcher.unwatch(key).await?,
            false => UnmountOutcome::Done,
        };
        // Older mounts of the run may still be leaving.
        let outcomes = [
            watched,
            self.over_fuse.unmount(key, mode).await?,
            self.fuse.unmount(key, mode).await?,
        ];
        let all_done = outcomes.iter().all(|it| *it == UnmountOutcome::Done);
        Ok(match all_done {
            true => UnmountOutcome::Done,
            false => UnmountOutcome::Busy,
        })
    }

    async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        match self.kernel.known(key).map(|mount| mount.devices) {
            Some(Devices::OverFuse) => self.over_fuse.first_reads(key, from, forget).await,
            Some(Devices::Store) | None => self.fuse.first_reads(key, from, forget).await,
        }
    }
}
