// SPDX-License-Identifier: Apache-2.0
//! The `fuse` back-end: mounts are made and served by the shim's worker.

use std::sync::Arc;

use async_trait::async_trait;

use super::{
    Backend, FirstReads, ImageMount, MountError, MountSpec, MountState, UnmountMode, UnmountOutcome,
};
use crate::shim::client::ShimClient;

/// Mounts through the shim.
#[derive(Debug, Clone)]
pub struct FuseMount(Arc<ShimClient>);

impl FuseMount {
    /// Over a client that is attached or will be.
    pub fn new(client: Arc<ShimClient>) -> FuseMount {
        FuseMount(client)
    }
}

#[async_trait]
impl ImageMount for FuseMount {
    async fn mount(&self, spec: &MountSpec) -> Result<Backend, MountError> {
        self.0.mount(spec).await.map(|()| Backend::Fuse)
    }

    async fn check(&self, key: &str) -> Result<MountState, MountError> {
        self.0.check(key).await
    }

    async fn unmount(&self, key: &str, mode: UnmountMode) -> Result<UnmountOutcome, MountError> {
        self.0.unmount(key, mode).await
    }

    async fn first_reads(
        &self,
        key: &str,
        from: u32,
        forget: bool,
    ) -> Result<FirstReads, MountError> {
        self.0.first_reads(key, from, forget).await
    }
}
