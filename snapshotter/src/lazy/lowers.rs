// SPDX-License-Identifier: Apache-2.0
//! The lower directories of a chain: merged trees are built if need be, and mounted.
//!
//! Durable inputs only: metadata records, index files, directories of ordinary snapshots.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::digest::ChainId;
use sluice_fetcher::source::Class;
use sluice_fetcher::steps::StepKind;

use super::Inner;
use crate::chain::{Run, Segment, segments};
use crate::indexes::LayerIndexError;
use crate::layers::OpenLayerError;
use crate::mount::{DeviceSpec, MountSpec};
use crate::mounts::EnsureError;
use crate::snapshots::{MountError, SnapshotId, SnapshotRecord};
use crate::trees::{BelowPath, TreeBuildError, TreeInputs};

/// The largest trees that are accepted are merged and written in a few seconds.
const MERGE_STEP: StepKind = StepKind::new("tree merge", Duration::from_secs(15));

/// Why a run cannot be made ready.
#[derive(Debug, thiserror::Error)]
enum ReadyError {
    #[error(transparent)]
    Layer(#[from] OpenLayerError),
    #[error(transparent)]
    Tree(#[from] TreeBuildError),
}

impl Inner {
    /// The directory of an ordinary snapshot.
    fn directory(&self, id: SnapshotId) -> PathBuf {
        self.options
            .root
            .join("snapshots")
            .join(id.to_string())
            .join("fs")
    }

    /// Highest first.
    pub(super) async fn lowers(
        self: &Arc<Self>,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<PathBuf>, MountError> {
        let segments = segments(chain);
        let mut lowers = Vec::with_capacity(segments.len());
        for (position, segment) in segments.iter().enumerate() {
            lowers.push(match segment {
                Segment::Directory(id) => self.directory(*id),
                Segment::Run(run) => self.mounted(&segments[..position], run).await?,
            });
        }
        lowers.reverse();
        Ok(lowers)
    }

    /// What lies below a snapshot that stands on this chain, highest first; no mounts are made.
    pub(super) async fn below(
        self: &Arc<Self>,
        chain: &[SnapshotRecord],
    ) -> Result<Vec<BelowPath>, TreeOrLayerError> {
        self.below_segments(&segments(chain))
            .await
            .map_err(TreeOrLayerError)
    }

    async fn mounted(
        self: &Arc<Self>,
        lower: &[Segment],
        run: &Run,
    ) -> Result<PathBuf, MountError> {
        let chain_id = run.layers.last().map(|layer| layer.chain_id);
        let result = self
            .parts
            .mounts
            .ensure(run.key, self.ready(lower, run))
            .await;
        result.map_err(|error| mount_error(chain_id, error))
    }

    /// Builds the run's tree and opens its devices.
    async fn ready(
        self: &Arc<Self>,
        lower: &[Segment],
        run: &Run,
    ) -> Result<MountSpec, ReadyError> {
        let below = self.below_segments(lower).await?;
        let tree = self.tree(run, below).await?;
        let mut devices = Vec::with_capacity(run.layers.len());
        let mut handles = Vec::with_capacity(run.layers.len());
        for record in &run.layers {
            let handle = self.parts.layers.open(record).await?;
            let key = handle.key();
            handles.push(handle);
            let directory = self.options.root.join("devices");
            devices.push(DeviceSpec {
                diff_id: record.diff_id,
                index_digest: record.index_digest,
                directory: directory.join(key.diff_id.hex()).join(key.index.hex()),
            });
        }
        let boot = &self.parts.boot;
        boot.mounting(run.key, &run.layers, &handles);
        Ok(MountSpec {
            key: run.key.to_string(),
            mountpoint: self.parts.mounts.mountpoint(run.key),
            tree,
            devices,
            read_deadline: self.options.read_deadline,
            record: boot.recorded(),
        })
    }

    async fn below_segments(
        self: &Arc<Self>,
        segments: &[Segment],
    ) -> Result<Vec<BelowPath>, ReadyError> {
        let mut below: Vec<BelowPath> = Vec::with_capacity(segments.len());
        for segment in segments {
            let path = match segment {
                Segment::Directory(id) => BelowPath::Directory(self.directory(*id)),
                Segment::Run(run) => BelowPath::Tree(self.tree(run, below.clone()).await?),
            };
            below.insert(0, path);
        }
        Ok(below)
    }

    async fn tree(
        self: &Arc<Self>,
        run: &Run,
        below: Vec<BelowPath>,
    ) -> Result<PathBuf, ReadyError> {
        let mut layers = Vec::with_capacity(run.layers.len());
        for record in &run.layers {
            layers.push(self.parts.layers.index(record).await?);
        }
        let inputs = TreeInputs {
            key: run.key,
            layers,
            below,
        };
        let steps = self.parts.layers.fetcher().metrics().steps();
        let step = steps.enter(MERGE_STEP, "containerd", format!("run {}", run.key));
        let merged = self.blocking(move |inner| {
            let _step = step;
            inner.parts.trees.ensure(&inputs)
        });
        Ok(merged.await?)
    }
}

/// What lies below a chain cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct TreeOrLayerError(ReadyError);

fn mount_error(chain_id: Option<ChainId>, error: EnsureError<ReadyError>) -> MountError {
    // A run is never empty.
    let chain_id = chain_id.unwrap_or(ChainId::from_bytes([0; 32]));
    let reason = error.to_string();
    let passing = !is_lost(&error);
    if passing {
        MountError::Unavailable { chain_id, reason }
    } else {
        MountError::Unusable { chain_id, reason }
    }
}

/// Whether something that the mount needs is missing or damaged, so that the image must be pulled
/// again. Everything else may be different the next time.
fn is_lost(error: &EnsureError<ReadyError>) -> bool {
    match error {
        EnsureError::Prepare(ReadyError::Layer(error)) => match error {
            OpenLayerError::NoIndex(_) => true,
            OpenLayerError::Index { source, .. } => !matches!(source, LayerIndexError::Io { .. }),
            OpenLayerError::Device { source, .. } => source.class() == Class::Corrupt,
            OpenLayerError::Metadata(_) | OpenLayerError::Stopping => false,
        },
        EnsureError::Prepare(ReadyError::Tree(error)) => match error {
            TreeBuildError::Merge(_) | TreeBuildError::Write(_) | TreeBuildError::Tree(_) => true,
            TreeBuildError::Io { .. } => false,
        },
        EnsureError::Mount(_) | EnsureError::Stuck(_) | EnsureError::Mountpoint { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::RunKey;
    use crate::layers::device_key;
    use crate::mount::MountError as BackendError;
    use crate::snapshots::LazyLayerRecord;
    use sluice_blockindex::digest::{BlobDigest, DiffId, IndexDigest};
    use sluice_blockindex::erofs::TreeReader;
    use sluice_fetcher::store::StoreError as ChunkStoreError;
    use std::io;

    #[test]
    fn only_what_is_lost_is_reported_as_lost() {
        let key = device_key(&LazyLayerRecord {
            chain_id: ChainId::of(b"c"),
            diff_id: DiffId::of(b"d"),
            index_digest: IndexDigest::of(b"i"),
            blob_digest: BlobDigest::of(b"b"),
            blob_bytes: 1,
            index_source: crate::snapshots::IndexSource::Blob,
            device_bytes: 1,
            sources: Vec::new(),
        });
        let io = || io::Error::from_raw_os_error(libc::EMFILE);
        let layer = |error| EnsureError::Prepare(ReadyError::Layer(error));
        let tree = |error| EnsureError::Prepare(ReadyError::Tree(error));
        let index = |source| layer(OpenLayerError::Index { key, source });
        let path = || PathBuf::from("/x");
        let (expected, actual) = (IndexDigest::of(b"i"), IndexDigest::of(b"j"));
        let run = RunKey::from_hex(&"00".repeat(32)).unwrap();
        let damaged = TreeReader::open(b"no tree").map(drop).unwrap_err();
        let refused = BackendError::Refused {
            key: "k".into(),
            reason: "x".into(),
        };
        let no_shim = BackendError::NoShim { reason: "x".into() };
        let cases = [
            (layer(OpenLayerError::NoIndex(key)), true),
            (index(LayerIndexError::Digest { expected, actual }), true),
            (
                index(LayerIndexError::Io {
                    what: "map",
                    path: path(),
                    source: io(),
                }),
                false,
            ),
            (
                layer(OpenLayerError::Device {
                    key,
                    source: ChunkStoreError::Stopped,
                }),
                false,
            ),
            (layer(OpenLayerError::Stopping), false),
            (tree(TreeBuildError::Tree(damaged)), true),
            (
                tree(TreeBuildError::Io {
                    what: "write",
                    path: path(),
                    source: io(),
                }),
                false,
            ),
            (EnsureError::Mount(refused), false),
            (EnsureError::Mount(no_shim), false),
            (EnsureError::Stuck(run), false),
        ];
        for (error, lost) in cases {
            let text = error.to_string();
            let mapped = mount_error(None, error);
            let unusable = matches!(mapped, MountError::Unusable { .. });
            assert_eq!(unusable, lost, "{text}");
        }
    }
}
