// SPDX-License-Identifier: Apache-2.0
//! One prewarm, from the reference to the last chunk.
//!
//! Resolve, fetch all indexes, open the layers as fosters, bring what is wanted. Of a layer that nobody has indexed
//! the blob is read once, which gives its index and its chunks. A layer that fails or is
//! refused does not hold the others up. What came before a failure or a cancel stays as long as what came
//! before the end: [`PrewarmOptions::grace`].

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use sluice_blockindex::annotations::LayerMark;
use sluice_fetcher::registry::{ImageReference, RegistryClient};
use sluice_fetcher::scheduler::LayerHandle;
use tokio::sync::watch;
use tokio::time::Instant;

use super::PrewarmOptions;
use super::image::{FoundImage, find};
use super::progress::{LayerPhase, LayerProgress, Phase, Progress, Scope};
use crate::layers::device_key;
use crate::lazy::Lazy;
use crate::plan::{PlannedLayer, Refusal, RefusalKind};
use crate::snapshots::LazyLayerRecord;

/// Indexes fetched at once.
const PARALLEL_INDEXES: usize = 8;
/// How long an index may take: as many sources as there are, each at leisure.
const INDEX_DEADLINE: Duration = Duration::from_secs(60);
/// How often it is looked how far the layers are.
pub(super) const LOOK: Duration = Duration::from_millis(250);
/// A hold lasts so long at least while the work goes on: it is renewed at every look.
const HOLD: Duration = Duration::from_secs(10);
/// Without a further chunk for so long the work is given up: a slot is not to wait for a registry that is
/// gone. Longer than a registry's usual `Retry-After`.
pub(super) const STALL: Duration = Duration::from_secs(120);

pub(super) type Report = watch::Sender<Progress>;

/// A layer that can be brought, and its place in the image.
pub(super) struct Opened {
    pub(super) at: usize,
    pub(super) record: LazyLayerRecord,
    pub(super) handle: Arc<LayerHandle>,
}

/// Why a layer is not brought.
enum NotOpened {
    /// It cannot be lazy, or its index could not be had.
    Refused(Refusal),
    /// In words.
    Failed(String),
}

/// What a prewarm works with.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) lazy: Lazy,
    pub(super) client: RegistryClient,
    pub(super) options: PrewarmOptions,
}

impl Work {
    /// Does it all; how it ended is in the report.
    pub(super) async fn run(&self, reference: &ImageReference, scope: Scope, report: &Report) {
        report.send_modify(|it| it.phase = Phase::Resolving);
        let found = find(&self.client, &self.lazy.parts().layers, reference).await;
        let image = match found {
            Ok(image) => image,
            Err(error) => {
                report.send_modify(|it| it.fail(error));
                return;
            }
        };
        report.send_modify(|it| {
            it.phase = Phase::Indexing;
            it.manifest = Some(image.manifest);
            it.layers = image.layout.layers.iter().map(LayerProgress::of).collect();
        });
        let opened = self.open_all(&image, scope, report).await;
        report.send_modify(|it| it.phase = Phase::Fetching);
        let records = opened.iter().map(|it| it.record.clone()).collect();
        if let Some(planned) = self.lazy.parts().reuse.begin(records) {
            planned.wait().await;
        }
        match scope {
            Scope::Full => self.complete(&opened, report).await,
            Scope::Boot => self.bring_lists(&opened, report).await,
        }
        self.hold(&opened);
        report.send_modify(Progress::end);
    }

    pub(super) fn hold(&self, opened: &[Opened]) {
        let life = self.options.grace.max(HOLD);
        for layer in opened {
            let key = layer.handle.key();
            self.lazy.parts().shelf.hold(key, life);
        }
    }

    /// Fetches the indexes, and opens the layers that have one; lowest first.
    async fn open_all(&self, image: &FoundImage, scope: Scope, report: &Report) -> Vec<Opened> {
        let deadline = Instant::now() + INDEX_DEADLINE;
        let artifact = self.lazy.artifact_of(&image.layout, deadline).await;
        let artifact = artifact.as_ref();
        let open = |at: usize| async move {
            let layer = &image.layout.layers[at];
            if let Ok(LayerMark::Lazy(annotations)) = &layer.mark {
                self.lazy.parts().boot.note_attached(annotations);
            }
            let planned = self
                .lazy
                .plan_layer(layer, &image.layout.origins, artifact, deadline);
            let planned = match tokio::time::timeout_at(deadline, planned).await {
                Ok(Ok(planned)) => planned,
                Ok(Err(refusal))
                    if refusal.kind == RefusalKind::NotConverted && scope == Scope::Full =>
                {
                    return self.index_and_open(image, at, refusal).await;
                }
                Ok(Err(refusal)) => return Err(NotOpened::Refused(refusal)),
                Err(_) => {
                    let reason = "its index did not come in time";
                    return Err(NotOpened::Failed(reason.to_owned()));
                }
            };
            self.open(at, &planned).await
        };
        let open = |at: usize| async move { (at, open(at).await) };
        let mut opened = Vec::new();
        let mut work = futures::stream::iter((0..image.layout.layers.len()).map(open))
            .buffer_unordered(PARALLEL_INDEXES);
        while let Some((at, layer)) = work.next().await {
            report.send_modify(|it| match &layer {
                Ok(Opened { handle, .. }) => {
                    let device = handle.device();
                    it.layers[at].phase = LayerPhase::Fetching;
                    it.layers[at].total_bytes = device.device_bytes();
                    it.layers[at].present_bytes = device.present_bytes();
                }
                Err(NotOpened::Refused(refusal)) => it.layers[at].refuse(refusal),
                Err(NotOpened::Failed(error)) => it.layers[at].fail(error),
            });
            opened.extend(layer.ok());
        }
        opened.sort_by_key(|layer| layer.at);
        opened
    }

    /// Indexes a layer that nobody has indexed, from its registry, and opens it with all that was read.
    async fn index_and_open(
        &self,
        image: &FoundImage,
        at: usize,
        refusal: Refusal,
    ) -> Result<Opened, NotOpened> {
        let (layer, origins) = (&image.layout.layers[at], &image.layout.origins);
        let device = self.lazy.index_from_registry(layer, origins).await;
        let device = match device {
            Ok(Some(device)) => device,
            Ok(None) => return Err(NotOpened::Refused(refusal)),
            Err(reason) => {
                let reason = format!("no index was made of it: {reason}");
                return Err(NotOpened::Failed(reason));
            }
        };
        let deadline = Instant::now() + INDEX_DEADLINE;
        let planned = self.lazy.plan_layer(layer, origins, None, deadline);
        let planned = planned.await.map_err(NotOpened::Refused)?;
        let opened = self.open(at, &planned).await?;
        let handle = Arc::clone(&opened.handle);
        let kept = tokio::task::spawn_blocking(move || keep(&handle, &device)).await;
        if let Err(error) = kept.map_err(std::io::Error::other).flatten() {
            // What is missing is fetched.
            tracing::warn!("keep what was read of a layer: {error}");
        }
        Ok(opened)
    }

    async fn open(&self, at: usize, planned: &PlannedLayer) -> Result<Opened, NotOpened> {
        let parts = self.lazy.parts();
        let record = planned.record.clone();
        // Before it is opened: the sweep must not find it without a reason to be.
        let life = self.options.grace.max(HOLD);
        parts.shelf.hold(device_key(&record), life);
        let opened = parts.layers.open_with(&record, &planned.index).await;
        let handle = opened.map_err(|error| NotOpened::Failed(error.to_string()))?;
        Ok(Opened { at, record, handle })
    }

    /// Completes all layers, until each is sealed or has failed.
    async fn complete(&self, opened: &[Opened], report: &Report) {
        let handles = opened.iter().map(|layer| Arc::clone(&layer.handle));
        // Dropped with this future, it is cancelled.
        let job = self
            .lazy
            .parts()
            .layers
            .fetcher()
            .prefetch(handles.collect());
        let mut stall = Stall::new();
        while !job.is_finished() {
            tokio::time::sleep(LOOK).await;
            self.hold(opened);
            let present = look(opened, report);
            // A seal reads the whole layer and brings nothing.
            let sealing = opened.iter().any(|it| {
                let device = it.handle.device();
                device.is_complete() && !device.is_sealed()
            });
            if stall.is_over(present, sealing) {
                job.cancel();
                break;
            }
        }
        job.join().await;
        look(opened, report);
        let stalled = stall.over;
        report.send_modify(|it| {
            for Opened { at, record, handle } in opened {
                let layer = &mut it.layers[*at];
                if handle.device().is_sealed() {
                    layer.phase = LayerPhase::Done;
                } else if let Some(failure) = handle.device().failure() {
                    layer.fail(failure.described(record.diff_id));
                } else if stalled {
                    layer.fail(format!("no source gave anything for {} s", STALL.as_secs()));
                } else {
                    layer.fail("it was evicted or removed meanwhile");
                }
            }
        });
    }
}

/// Makes all chunks of a layer present, from a file that holds its device. **Blocks**.
fn keep(handle: &LayerHandle, device: &File) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    for chunk in handle.device().chunks().chunks().flatten() {
        let length = usize::try_from(chunk.device.len()).map_err(std::io::Error::other)?;
        buffer.resize(length, 0);
        device.read_exact_at(&mut buffer, chunk.device.start())?;
        let committed = handle.device().commit(chunk.ordinal, &buffer);
        committed.map_err(std::io::Error::other)?;
    }
    Ok(())
}

/// Reports how far the devices are; says how many bytes are here.
fn look(opened: &[Opened], report: &Report) -> u64 {
    let mut sum = 0;
    report.send_if_modified(|it| {
        let mut changed = false;
        for Opened { at, handle, .. } in opened {
            let present = handle.device().present_bytes();
            let layer = &mut it.layers[*at];
            changed |= layer.present_bytes != present;
            layer.present_bytes = present;
            if handle.device().is_sealed() && layer.phase != LayerPhase::Done {
                (layer.phase, changed) = (LayerPhase::Done, true);
            }
            sum += present;
        }
        changed
    });
    sum
}

/// Notices that nothing comes any more.
pub(super) struct Stall {
    bytes: u64,
    since: Instant,
    over: bool,
}

impl Stall {
    pub(super) fn new() -> Self {
        Self {
            bytes: 0,
            since: Instant::now(),
            over: false,
        }
    }

    pub(super) fn is_over(&mut self, bytes: u64, excused: bool) -> bool {
        if bytes != self.bytes || excused {
            (self.bytes, self.since) = (bytes, Instant::now());
        }
        self.over = self.since.elapsed() >= STALL;
        self.over
    }
}
