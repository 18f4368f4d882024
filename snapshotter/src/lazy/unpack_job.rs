// SPDX-License-Identifier: Apache-2.0
//! Unpacking a layer within a Prepare, because layers above it are lazy.

use std::sync::Arc;

use async_trait::async_trait;
use sluice_fetcher::source::{Priority, ReadContext};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Inner;
use crate::below::{Below, Lower, open_directory};
use crate::snapshots::{BlobOrigin, UnpackError, UnpackSource, UnpackTarget};
use crate::store::DocumentTable;
use crate::trees::BelowPath;
use crate::unpack::LayerBlob;

/// Fetches, verifies and unpacks one layer.
#[derive(Debug)]
pub(super) struct UnpackJob {
    pub(super) inner: Arc<Inner>,
    pub(super) blob: LayerBlob,
    pub(super) origins: Vec<BlobOrigin>,
    pub(super) deadline: Instant,
    /// Of the decision that is remembered, to take it back on failure.
    pub(super) key: String,
}

impl UnpackJob {
    async fn run(&self, target: &UnpackTarget) -> Result<(), UnpackError> {
        let parts = &self.inner.parts;
        let source = parts
            .layers
            .source(self.blob.blob, self.blob.blob_bytes, &self.origins);
        let cancel = CancellationToken::new();
        // Dropped with this future: blocking work then stops at its next step.
        let _guard = cancel.clone().drop_guard();
        let mut context = ReadContext::new(Priority::Foreground).with_cancel(cancel.clone());
        context.deadline = Some(self.deadline);
        let fetched = self
            .blob
            .fetch(source, context, &self.inner.options.root)
            .await;
        let scanned = fetched.map_err(|error| UnpackError(error.into()))?;
        let below = if scanned.has_implicit_directories() {
            let below = self.inner.below(&target.chain).await;
            below.map_err(|error| UnpackError(error.into()))?
        } else {
            Vec::new()
        };
        let directory = target.directory.clone();
        let work = self.inner.tasks.spawn_blocking(move || {
            let maps = below
                .iter()
                .map(|below| match below {
                    BelowPath::Tree(path) => crate::sys::map::read_only(path).map(Some),
                    BelowPath::Directory(_) => Ok(None),
                })
                .collect::<Result<Vec<_>, _>>()?;
            let lowers = below
                .iter()
                .zip(&maps)
                .map(|(below, map)| match (below, map) {
                    (BelowPath::Directory(path), _) => open_directory(path).map(Lower::Directory),
                    (BelowPath::Tree(_), map) => {
                        let bytes: &[u8] = map.as_ref().map_or(&[], |map| map);
                        let tree = sluice_blockindex::erofs::TreeReader::open(bytes);
                        tree.map(Lower::Tree).map_err(std::io::Error::other)
                    }
                })
                .collect::<Result<Vec<_>, _>>()?;
            let done = scanned.materialise(&directory, &Below::new(lowers), &cancel);
            done.map_err(std::io::Error::other)
        });
        match work.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(UnpackError(error.into())),
            Err(error) => Err(UnpackError(error.into())),
        }
    }
}

#[async_trait]
impl UnpackSource for UnpackJob {
    async fn unpack(self: Box<Self>, target: &UnpackTarget) -> Result<(), UnpackError> {
        let result = self.run(target).await;
        if let Err(error) = &result {
            let (key, reason) = (self.key.clone(), error.to_string());
            let changed = self.inner.blocking(move |inner| {
                let table = DocumentTable::Decisions;
                inner
                    .parts
                    .metadata
                    .change_document(table, &key, |decision| {
                        decision.map(|decision: super::Decision| super::Decision {
                            unpacked: false,
                            reason: format!("{}; unpack it here: {reason}", decision.reason),
                            ..decision
                        })
                    })
            });
            if let Err(error) = changed.await {
                tracing::warn!("failed to remember a decision: {error}");
            }
        }
        result
    }
}
