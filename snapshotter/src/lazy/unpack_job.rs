// SPDX-License-Identifier: Apache-2.0
//! Unpacking a layer within a Prepare, because layers above it are lazy.

use std::sync::Arc;

use async_trait::async_trait;
use sluice_blockindex::digest::ChainId;
use sluice_fetcher::source::{Priority, RangesSource, ReadContext};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Inner;
use crate::below::{Below, Lower, open_directory};
use crate::plan::Refusal;
use crate::snapshots::{BlobOrigin, SnapshotRecord, UnpackError, UnpackSource, UnpackTarget};
use crate::trees::BelowPath;
use crate::unpack::{LayerBlob, ScannedTar};

/// Fetches, verifies and unpacks one layer.
#[derive(Debug)]
pub(super) struct UnpackJob {
    pub(super) inner: Arc<Inner>,
    pub(super) blob: LayerBlob,
    pub(super) origins: Vec<BlobOrigin>,
    pub(super) deadline: Instant,
    /// Whose decision it is.
    pub(super) namespace: String,
    /// The layer.
    pub(super) chain_id: ChainId,
    /// Why the layer is not lazy.
    pub(super) refusal: Refusal,
    /// How the job ended is remembered.
    pub(super) settled: bool,
}

/// Dropped before its end, the job was not waited for any longer.
impl Drop for UnpackJob {
    fn drop(&mut self) {
        self.settle(Err("the budget of Prepare is used up".to_owned()));
    }
}

impl UnpackJob {
    /// Remembers how the job ended, the first time.
    pub(super) fn settle(&mut self, ended: Result<(), String>) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let mut refusal = self.refusal.clone();
        if let Err(reason) = &ended {
            refusal.reason = format!("{}; unpack it here: {reason}", refusal.reason);
        }
        self.inner
            .remember(&self.namespace, self.chain_id, &refusal, ended.is_ok());
    }

    async fn run(&self, target: &UnpackTarget) -> Result<(), UnpackError> {
        let parts = &self.inner.parts;
        let source = parts
            .layers
            .source(self.blob.blob, self.blob.blob_bytes, &self.origins);
        // All of it is wanted, and containerd waits.
        let source = Arc::new(RangesSource::new(source));
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
        let below = self
            .inner
            .below(lowers_needed(&scanned, &target.chain))
            .await;
        let below = below.map_err(|error| UnpackError(error.into()))?;
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

/// The part of the chain that directories of the layer may take attributes from: all of it for those that
/// the tar implies. The root takes those of the nearest parent; a lazy one is known as part of its run.
fn lowers_needed<'a>(scanned: &ScannedTar, chain: &'a [SnapshotRecord]) -> &'a [SnapshotRecord] {
    match chain {
        [parent, ..] if !parent.is_lazy() && !scanned.has_implicit_directories() => &chain[..1],
        _ => chain,
    }
}

#[async_trait]
impl UnpackSource for UnpackJob {
    async fn unpack(mut self: Box<Self>, target: &UnpackTarget) -> Result<(), UnpackError> {
        let result = self.run(target).await;
        let ended = result.as_ref().map(drop).map_err(ToString::to_string);
        self.settle(ended);
        result
    }
}
