// SPDX-License-Identifier: Apache-2.0
//! What lazy snapshots hold of this node's disk: allocated blocks and inodes, each counted once.
//!
//! A device, an index or a tree may serve several snapshots: the same layer on other parents, or in another
//! namespace of containerd. It is charged to one of them, the oldest, so that the usages of all snapshots add
//! up to what the disk holds; when that one is removed, the next pays. Holes of a device that is not complete
//! are no bytes. Not charged to anybody: metadata, mount points, and the mirror's blobs, which have a budget
//! of their own.
//!
//! **Locks** the table of who pays is locked to be copied or replaced, never while metadata is read.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sluice_blockindex::digest::ChainId;
use sluice_fetcher::store::DeviceKey;

use super::Inner;
use crate::chain::run_keys;
use crate::layers::device_key;
use crate::snapshots::{SnapshotId, SnapshotRecord, Usage, usage_of_file, usage_of_tree};
use crate::store::StoreError;

/// How long it is remembered who pays: containerd asks for the usage of every snapshot each ten seconds, and
/// finding it out reads all layers.
const REMEMBERED: Duration = Duration::from_secs(5);

/// Who pays for what: the oldest snapshot that has it.
#[derive(Debug, Default)]
struct Payers {
    devices: HashMap<DeviceKey, SnapshotId>,
    /// Of merged trees, by the chain that ends with their highest layer.
    chains: HashMap<ChainId, SnapshotId>,
}

/// What was found out last.
#[derive(Debug, Default)]
pub(super) struct Remembered(Mutex<Option<(Instant, Arc<Payers>)>>);

impl Remembered {
    fn get(&self, now: Instant) -> Option<Arc<Payers>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, payers) = known.as_ref()?;
        (now.saturating_duration_since(*at) < REMEMBERED).then(|| Arc::clone(payers))
    }

    fn set(&self, now: Instant, payers: &Arc<Payers>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some((now, Arc::clone(payers)));
    }
}

/// Why usage cannot be counted.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    /// The metadata cannot be read.
    #[error("read metadata: {0}")]
    Metadata(#[from] StoreError),
    /// The disk cannot be looked at.
    #[error("look at files: {0}")]
    Disk(#[from] io::Error),
}

/// What is not there takes nothing.
fn or_nothing(usage: io::Result<Usage>) -> io::Result<Usage> {
    match usage {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Usage::default()),
        usage => usage,
    }
}

fn add(total: &mut Usage, more: Usage) {
    total.inodes += more.inodes;
    total.size_bytes += more.size_bytes;
}

impl Inner {
    /// What a lazy snapshot pays for. Blocks, shortly.
    ///
    /// **Errors** of the metadata, and of a disk that cannot be looked at.
    fn usage(&self, record: &SnapshotRecord) -> Result<Usage, UsageError> {
        let Some(layer) = &record.layer else {
            return Ok(Usage::default());
        };
        let key = device_key(layer);
        let payers = self.payers(&key)?;
        let mut total = Usage::default();
        if payers.devices.get(&key) == Some(&record.id) {
            add(&mut total, or_nothing(self.device_usage(&key))?);
            let index = self.parts.layers.indexes().path(layer.index_digest);
            add(&mut total, or_nothing(usage_of_file(&index))?);
        }
        if payers.chains.get(&layer.chain_id) == Some(&record.id) {
            let chain = self.parts.metadata.chain(Some(&record.name))?;
            // The highest run ends with this layer.
            if let Some(run) = run_keys(&chain).last() {
                let tree = self.parts.trees.path(*run);
                add(&mut total, or_nothing(usage_of_file(&tree))?);
            }
        }
        Ok(total)
    }

    /// The device's directory with all in it, and the one above, which has the name of the diff ID.
    fn device_usage(&self, key: &DeviceKey) -> io::Result<Usage> {
        let above = self.options.root.join("devices").join(key.diff_id.hex());
        let mut usage = usage_of_tree(&above.join(key.index.hex()))?;
        add(&mut usage, usage_of_file(&above)?);
        Ok(usage)
    }

    fn payers(&self, wanted: &DeviceKey) -> Result<Arc<Payers>, StoreError> {
        let now = Instant::now();
        let known = self.payers.get(now);
        if let Some(known) = known.filter(|known| known.devices.contains_key(wanted)) {
            return Ok(known);
        }
        let mut payers = Payers::default();
        for (id, layer) in self.parts.metadata.layers()? {
            let oldest = |known: &mut SnapshotId| *known = id.min(*known);
            let device = payers.devices.entry(device_key(&layer));
            device.and_modify(oldest).or_insert(id);
            let chain = payers.chains.entry(layer.chain_id);
            chain.and_modify(oldest).or_insert(id);
        }
        let payers = Arc::new(payers);
        self.payers.set(now, &payers);
        Ok(payers)
    }
}

/// For the life cycle: a disk that cannot be looked at has no usage, and the log says so.
pub(super) fn of(inner: &Inner, record: &SnapshotRecord) -> Usage {
    inner.usage(record).unwrap_or_else(|error| {
        tracing::warn!(snapshot = record.name, "failed to count usage: {error}");
        Usage::default()
    })
}
