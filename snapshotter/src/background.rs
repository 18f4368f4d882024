// SPDX-License-Identifier: Apache-2.0
//! Completing images in the background, once a container of them runs.
//!
//! A job is started when a container's snapshot is prepared (and, for containers that exist, when the
//! daemon starts), and runs at the lowest priority until every layer is sealed. Where a boot list foresees what a start
//! reads, it fetches for a moment only while a reader waits nevertheless. It is cancelled when a layer of it is gone, and stands
//! still while less of the disk is free than `[store] reserve` says.
//!
//! Every job is a tracked task; [`Background::stop`] joins them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sluice_blockindex::digest::ChainId;
use sluice_fetcher::scheduler::LayerHandle;
use sluice_fetcher::store::DeviceKey;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::disk::DiskReserve;
use crate::layers::{Layers, device_key};
use crate::snapshots::LazyLayerRecord;

/// How often it is looked whether the disk has room: a line of 10 Gbit/s brings 1 GB meanwhile.
const RESERVE_LOOK: Duration = Duration::from_secs(1);

/// When a job begins, after its container was prepared.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    /// By itself.
    pub delay: Duration,
    /// Before that, as [`sluice_fetcher::prefetch`] goes beside readers.
    pub beside_readers: bool,
}

#[derive(Debug)]
struct Job {
    layers: BTreeSet<DeviceKey>,
    cancel: CancellationToken,
}

/// The jobs of this daemon, one per image.
#[derive(Debug)]
pub struct Background {
    layers: Arc<Layers>,
    /// `None`: never start a job.
    begin: Option<Begin>,
    reserve: DiskReserve,
    jobs: Arc<Mutex<HashMap<ChainId, Job>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Background {
    /// Starts nothing yet.
    #[must_use]
    pub fn new(layers: Arc<Layers>, begin: Option<Begin>, reserve: DiskReserve) -> Self {
        Self {
            layers,
            begin,
            reserve,
            jobs: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Completes these layers, the lazy ones of one chain, lowest first, unless that is under way.
    pub fn want(&self, records: Vec<LazyLayerRecord>) {
        let (Some(begin), Some(top)) = (self.begin, records.last()) else {
            return;
        };
        let chain_id = top.chain_id;
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.contains_key(&chain_id) || self.stop.is_cancelled() {
            return;
        }
        let cancel = self.stop.child_token();
        let layers = records.iter().map(device_key).collect();
        jobs.insert(
            chain_id,
            Job {
                layers,
                cancel: cancel.clone(),
            },
        );
        drop(jobs);
        let (layers, jobs) = (Arc::clone(&self.layers), Arc::clone(&self.jobs));
        let reserve = self.reserve.clone();
        self.tasks.spawn(async move {
            let work = complete(layers, records, begin, reserve);
            cancel.run_until_cancelled(work).await;
            jobs.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&chain_id);
        });
    }

    /// Cancels the jobs of images that have lost a layer.
    pub fn retain(&self, live: &BTreeSet<DeviceKey>) {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        for job in jobs.values().filter(|job| !job.layers.is_subset(live)) {
            job.cancel.cancel();
        }
    }

    /// Ends all jobs and waits for them.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn complete(
    layers: Arc<Layers>,
    records: Vec<LazyLayerRecord>,
    begin: Begin,
    reserve: DiskReserve,
) {
    let began = tokio::time::Instant::now();
    if !begin.beside_readers {
        tokio::time::sleep(begin.delay).await;
    }
    let mut handles: Vec<Arc<LayerHandle>> = Vec::new();
    for record in &records {
        match layers.open(record).await {
            Ok(handle) => handles.push(handle),
            Err(error) => tracing::warn!("leave a layer out of the background: {error}"),
        }
    }
    if handles.iter().all(|handle| handle.device().is_sealed()) {
        return;
    }
    let progress = loop {
        while reserve.is_broken().await {
            tokio::time::sleep(RESERVE_LOOK).await;
        }
        let beside = begin.delay.saturating_sub(began.elapsed());
        let fetcher = layers.fetcher();
        let job = fetcher.prefetch_beside_readers(handles.clone(), beside);
        // Dropped, it cancels the job.
        let mut done = std::pin::pin!(job.join());
        let ended = loop {
            tokio::select! {
                progress = &mut done => break Some(progress),
                () = tokio::time::sleep(RESERVE_LOOK) => {
                    if reserve.is_broken().await {
                        break None;
                    }
                }
            }
        };
        if let Some(progress) = ended {
            break progress;
        }
        tracing::info!(
            "stop completing an image: less of the disk is free than [store] reserve says"
        );
    };
    tracing::info!(
        layers = progress.layers,
        sealed = progress.sealed_layers,
        failed = progress.failed_layers,
        bytes = progress.present_bytes,
        "image is complete"
    );
}
