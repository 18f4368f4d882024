// SPDX-License-Identifier: Apache-2.0
//! The `fuse` back-end behind a shim that is started or found when it is first needed.
//!
//! The daemon starts, and serves images that are not lazy, also when the shim cannot be started; a
//! mount then fails and says why, and the next one tries again. Whoever comes first attaches; others
//! wait for it.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::OnceCell;

use super::choice::Watcher;
use super::fuse::FuseMount;
use super::{
    Backend, FirstReads, ImageMount, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome,
};
use crate::shim::client::{FillService, ShimClient, ShimError, ShimOptions, ShimPeer};

/// Mounts through a shim that may not be there yet.
#[derive(Debug)]
pub struct AttachedMount {
    options: ShimOptions,
    fills: Arc<dyn FillService>,
    client: OnceCell<Arc<ShimClient>>,
}

impl AttachedMount {
    /// Attaches when first used; `fills` answers the shim's questions.
    #[must_use]
    pub fn new(options: ShimOptions, fills: Arc<dyn FillService>) -> Self {
        Self {
            options,
            fills,
            client: OnceCell::new(),
        }
    }

    /// The client, attached. **Cancel** safe.
    pub async fn attach(&self) -> Result<&Arc<ShimClient>, ShimError> {
        let start = || async {
            let fills = Arc::clone(&self.fills);
            let client = ShimClient::start_or_attach(self.options.clone(), fills).await?;
            match client.upgrade().await {
                Ok(true) => tracing::info!("the shim goes on as the new program"),
                Ok(false) => {}
                // It serves on as the old one.
                Err(error) => tracing::error!("failed to upgrade the shim: {error}"),
            }
            Ok(Arc::new(client))
        };
        self.client.get_or_try_init(start).await
    }

    /// Who serves now; `None`: nobody, or nobody was needed yet. Waits for nothing.
    #[must_use]
    pub fn peer(&self) -> Option<ShimPeer> {
        self.client.get()?.peer()
    }

    /// The shim's program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.options.binary
    }

    async fn backend(&self) -> Result<FuseMount, MountError> {
        Ok(FuseMount::new(Arc::clone(self.shim().await?)))
    }

    async fn shim(&self) -> Result<&Arc<ShimClient>, MountError> {
        match self.attach().await {
            Ok(client) => Ok(client),
            Err(error) => {
                tracing::error!("failed to attach to the shim: {error}");
                let reason = error.to_string();
                Err(MountError::NoShim { reason })
            }
        }
    }
}

#[async_trait]
impl ImageMount for AttachedMount {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        self.backend().await?.mount(spec).await
    }

    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        self.backend().await?.check(key).await
    }

    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError> {
        self.backend().await?.unmount(key, mode).await
    }

    async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        self.backend().await?.first_reads(key, from, forget).await
    }
}

#[async_trait]
impl Watcher for AttachedMount {
    async fn watch(&self, spec: &MountSpec) -> Result<(), MountError> {
        self.shim().await?.watch(spec).await
    }

    async fn unwatch(&self, key: &str) -> Result<UnmountOutcome, MountError> {
        self.shim().await?.unwatch(key).await
    }

    async fn watched(&self) -> Result<Vec<String>, MountError> {
        self.shim().await?.watched().await
    }
}
