// SPDX-License-Identifier: Apache-2.0
//! The fetcher's scriptable registry, for tests that are not asynchronous.

use std::ops::Deref;
use std::path::Path;

use anyhow::{Context, Result};
use sluice_fetcher::registry::fake::FakeRegistry;
use tokio::runtime::Runtime;

/// A registry that can be told to misbehave; see [`FakeRegistry`]. It stops when dropped.
#[derive(Debug)]
pub struct FaultyRegistry {
    registry: Option<FakeRegistry>,
    runtime: Runtime,
}

impl FaultyRegistry {
    /// Starts one that holds the image of `layout` as `repository:sluice`.
    pub fn start(repository: &str, layout: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start a runtime")?;
        let registry = runtime.block_on(FakeRegistry::start());
        registry.add_layout(repository, "sluice", layout);
        Ok(Self {
            registry: Some(registry),
            runtime,
        })
    }
}

impl Deref for FaultyRegistry {
    type Target = FakeRegistry;

    fn deref(&self) -> &FakeRegistry {
        self.registry.as_ref().expect("it is there until it drops")
    }
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        let _inside = self.runtime.enter();
        self.registry.take();
    }
}
