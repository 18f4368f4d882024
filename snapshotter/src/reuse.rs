// SPDX-License-Identifier: Apache-2.0
//! Files of a new image that this node has already, in layers of other images.
//!
//! When the indexes of an image are here, its files are looked up by their strong digests in the indexes of all layers
//! of this node, and what is found is made into chunks without the network ([`sluice_fetcher::reuse`]). Nothing is kept
//! for that: the tables of files are in the mapped indexes.
//!
//! **Bounds** one image at a time; files that are looked for: [`FILES_MAX`]; layers that are looked at: [`DONORS_MAX`];
//! places that are remembered: [`PLACES_MAX`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::digest::StrongAlgorithm;
use sluice_blockindex::extent::Extent;
use sluice_blockindex::index::SkeletonPin;
use sluice_fetcher::reuse::{FileCopy, ReusePlan, ReusedFile};
use sluice_fetcher::scheduler::LayerHandle;
use sluice_fetcher::store::DeviceKey;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::indexes::IndexFiles;
use crate::layers::{Layers, device_key};
use crate::snapshots::LazyLayerRecord;
use crate::store::MetadataStore;

/// Files of an image that are looked for; 24 bytes each while they are.
const FILES_MAX: usize = 1 << 20;
/// Layers that are looked at.
const DONORS_MAX: usize = 4096;
/// Places of files that are found; the first ones are as good as any.
const PLACES_MAX: usize = 1 << 20;
/// Who loads a boot list waits so long at most for what it need not bring.
const PLANS: Duration = Duration::from_millis(100);

/// What of a digest is compared here: whether files really are equal is proven by their chunks.
type Short = [u8; 16];

/// Says that it is known what is being made. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Planned(watch::Receiver<bool>);

impl Planned {
    /// Waits until it is, a moment at most. Cancel-safe.
    pub async fn wait(mut self) {
        // A sender that is gone has planned all that it ever will.
        let _ = tokio::time::timeout(PLANS, self.0.wait_for(|planned| *planned)).await;
    }
}

/// Looks for files of new images.
#[derive(Debug)]
pub struct Reuse {
    enabled: bool,
    layers: Arc<Layers>,
    metadata: Arc<MetadataStore>,
    turn: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Where a file that is looked for was found: which of all files, and where it begins.
type Place = (u32, u64);

/// A layer that may get something.
struct Target {
    handle: Arc<LayerHandle>,
    skeleton: Option<SkeletonPin>,
    files: Vec<ReusedFile>,
}

/// What the layers of this node have.
struct Found {
    targets: Vec<Target>,
    places: Vec<(LazyLayerRecord, Vec<Place>)>,
}

impl Reuse {
    /// Over the layers of this node; looks for nothing unless `enabled`.
    #[must_use]
    pub fn new(enabled: bool, layers: Arc<Layers>, metadata: Arc<MetadataStore>) -> Self {
        Self {
            enabled,
            layers,
            metadata,
            turn: Arc::new(Semaphore::new(1)),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Begins to make what it can of these layers, the lazy ones of an image, whose indexes are on disk. Returns at
    /// once; `None` when nothing is looked for.
    pub fn begin(&self, records: Vec<LazyLayerRecord>) -> Option<Planned> {
        if !self.enabled || records.is_empty() || self.stop.is_cancelled() {
            return None;
        }
        let (say, planned) = watch::channel(false);
        let (layers, metadata) = (Arc::clone(&self.layers), Arc::clone(&self.metadata));
        let (turn, stop) = (Arc::clone(&self.turn), self.stop.clone());
        self.tasks.spawn(async move {
            let work = async {
                let _turn = turn.acquire_owned().await;
                let plans = plan(&layers, metadata, records).await;
                say.send_replace(true);
                for plan in plans {
                    carry_out(&layers, plan).await;
                }
            };
            stop.run_until_cancelled(work).await;
        });
        Some(Planned(planned))
    }

    /// Ends what runs and waits for it.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn carry_out(layers: &Layers, plan: ReusePlan) {
    let (planned, bytes) = plan.size();
    let (device, began) = (plan.key(), Instant::now());
    match layers.fetcher().reuse(plan).await {
        Ok(reused) => tracing::info!(
            %device, planned, chunks = reused.chunks, wrong = reused.wrong, bytes,
            seconds = began.elapsed().as_secs_f64(), "made of files of other layers"
        ),
        Err(error) => {
            tracing::info!(%device, planned, "files of other layers are not used: {error}");
        }
    }
}

/// What can be made of these layers.
async fn plan(
    layers: &Arc<Layers>,
    metadata: Arc<MetadataStore>,
    records: Vec<LazyLayerRecord>,
) -> Vec<ReusePlan> {
    let mut open = Vec::new();
    for record in records {
        match layers.open(&record).await {
            Ok(handle) if handle.device().is_complete() => {}
            Ok(handle) => open.push((record, handle)),
            Err(error) => tracing::debug!("look for no files of a layer: {error}"),
        }
    }
    if open.is_empty() {
        return Vec::new();
    }
    let indexes = Arc::clone(layers.indexes());
    let store = Arc::clone(layers.fetcher().store());
    let look = tokio::task::spawn_blocking(move || {
        // What was evicted has nothing to give.
        let here = store.keys().ok()?.into_iter().collect();
        look(&indexes, &metadata, &here, open)
    });
    let Ok(Some(Found {
        mut targets,
        places,
    })) = look.await
    else {
        return Vec::new();
    };
    let files = targets.iter_mut().flat_map(|target| &mut target.files);
    let mut files: Vec<&mut ReusedFile> = files.collect();
    for (record, places) in places {
        let donor = match layers.open(&record).await {
            Ok(donor) => donor,
            Err(error) => {
                tracing::debug!("take no files of a layer: {error}");
                continue;
            }
        };
        for (file, start) in places {
            let file = usize::try_from(file).ok().and_then(|at| files.get_mut(at));
            let Some(file) = file.filter(|file| file.copy.is_none()) else {
                continue;
            };
            let run = Extent::from_length(start, file.run.len());
            if run.is_some_and(|run| donor.device().missing(run).next().is_none()) {
                let donor = Arc::clone(&donor);
                file.copy = Some(FileCopy { donor, start });
            }
        }
    }
    let plan = |it: Target| ReusePlan::new(it.handle, it.files, it.skeleton);
    targets.into_iter().filter_map(plan).collect()
}

/// Looks the files of `open` up in the indexes of all other layers whose devices are `here`. **Blocks**.
fn look(
    indexes: &IndexFiles,
    metadata: &MetadataStore,
    here: &BTreeSet<DeviceKey>,
    open: Vec<(LazyLayerRecord, Arc<LayerHandle>)>,
) -> Option<Found> {
    let read = |record: &LazyLayerRecord| match indexes.get(record.index_digest) {
        Ok(index) => index,
        Err(error) => {
            tracing::debug!("pass over an index: {error}");
            None
        }
    };
    let mut wanted: Vec<(StrongAlgorithm, Short, u32)> = Vec::new();
    let mut targets = Vec::new();
    let mut ours: BTreeSet<DeviceKey> = BTreeSet::new();
    for (record, handle) in open {
        let Some(index) = read(&record) else {
            continue;
        };
        let table = index.files().ok()?;
        if wanted.len() + table.len() > FILES_MAX {
            tracing::debug!("too many files to look for");
            break;
        }
        ours.insert(device_key(&record));
        let mut files = Vec::with_capacity(table.len());
        for content in table.contents() {
            let number = u32::try_from(wanted.len()).ok()?;
            wanted.push((table.algorithm(), short(&content.digest.0), number));
            files.push(ReusedFile {
                run: content.run,
                copy: None,
            });
        }
        let metadata = index.metadata();
        let skeleton = metadata.unmodified.is_none().then_some(metadata.skeleton);
        targets.push(Target {
            handle,
            skeleton,
            files,
        });
        index.source().release_pages();
    }
    wanted.sort_unstable();
    let all = metadata.layers().ok()?;
    let mut others: BTreeMap<DeviceKey, LazyLayerRecord> = BTreeMap::new();
    // The latest are the likeliest to have an earlier version.
    for (_, record) in all.into_iter().rev() {
        let key = device_key(&record);
        if others.len() < DONORS_MAX && here.contains(&key) && !ours.contains(&key) {
            others.entry(key).or_insert(record);
        }
    }
    let (mut places, mut count) = (Vec::new(), 0);
    for record in others.into_values() {
        let Some(index) = read(&record) else {
            continue;
        };
        let Ok(table) = index.files() else {
            continue;
        };
        let mut of_layer: Vec<Place> = Vec::new();
        for content in table.contents() {
            let key = (table.algorithm(), short(&content.digest.0), 0);
            let from = wanted.partition_point(|it| *it < key);
            let same = wanted[from..].iter();
            let same = same.take_while(|it| (it.0, it.1) == (key.0, key.1));
            of_layer.extend(same.map(|(.., number)| (*number, content.run.start())));
        }
        index.source().release_pages();
        count += of_layer.len();
        if !of_layer.is_empty() {
            places.push((record, of_layer));
        }
        if count > PLACES_MAX {
            break;
        }
    }
    // Who has most is opened first, and maybe alone.
    places.sort_by_key(|(_, places)| std::cmp::Reverse(places.len()));
    Some(Found { targets, places })
}

fn short(digest: &[u8; 32]) -> Short {
    let mut short = Short::default();
    short.copy_from_slice(&digest[..16]);
    short
}
