// SPDX-License-Identifier: Apache-2.0
//! Deciding a Prepare.
//!
//! What the labels say leads to the image's plan (see [`crate::plan`]); the plan's outcome for this
//! layer is the decision. Whatever is wrong makes the layer ordinary with a reason.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sluice_blockindex::annotations::{LayerAnnotations, LayerMark};
use sluice_blockindex::digest::{BlobDigest, ChainId, IndexDigest};
use sluice_fetcher::index_artifact::FoundArtifact;
use sluice_fetcher::registry::ImageReference;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Inner;
use super::places::Places;
use super::unpack_job::UnpackJob;
use crate::config::{IndexPolicy, IndexUse};
use crate::labels::{LayerLabels, port_hint};
use crate::layers::device_key;
use crate::plan::{
    Layout, LayoutLayer, Outcome, Plan, PlanKey, PlanState, PlannedLayer, Refusal, RefusalKind,
    check_layer,
};
use crate::resolve::{ResolveError, ResolvedImage, port_hints, resolve_by_chain, resolve_image};
use crate::snapshots::{
    BlobOrigin, IndexSource, LazyDecision, LazyLayerRecord, PrepareRequest, SnapshotRecord,
};
use crate::unpack::LayerBlob;

/// Left of the budget for the answer itself.
const MARGIN: Duration = Duration::from_millis(150);
/// Indexes fetched at once for one image. Most images have fewer layers; more would only share the
/// line.
const PARALLEL_INDEXES: usize = 16;

type Result<T> = std::result::Result<T, Refusal>;

/// What a Prepare brings to a plan besides its key.
#[derive(Clone, Debug)]
struct Seed {
    chain_id: ChainId,
    labels: LayerLabels,
    /// Found already, by the chain ID.
    image: Option<ResolvedImage>,
    /// Where the image is known to be.
    origins: Vec<BlobOrigin>,
}

impl Seed {
    fn annotations(&self) -> Option<&LayerAnnotations> {
        match &self.labels.mark {
            Ok(LayerMark::Lazy(annotations)) => Some(annotations),
            Ok(_) | Err(_) => None,
        }
    }
}

fn mismatch(reason: String) -> Refusal {
    Refusal::new(RefusalKind::Mismatch, reason)
}

pub(super) fn late() -> Refusal {
    Refusal::new(
        RefusalKind::Budget,
        "the registry did not answer within the budget of Prepare",
    )
}

impl Inner {
    pub(super) async fn decide(self: &Arc<Self>, request: &PrepareRequest) -> LazyDecision {
        let metrics = &self.parts.metrics;
        let Some(namespace) = &request.namespace else {
            let reason = "the key names no containerd namespace".to_owned();
            return LazyDecision::Ordinary { reason };
        };
        let undecided = Undecided {
            inner: Some(self),
            namespace,
            chain_id: request.chain_id,
        };
        let decided = self.decide_in(namespace, request).await;
        undecided.settle();
        match decided {
            Ok(Decided::Lazy(record)) => {
                self.forget(namespace, request.chain_id);
                LazyDecision::Lazy(record)
            }
            // What is remembered depends on how it ends, which the job sees.
            Ok(Decided::Unpack(job)) => {
                metrics.refused(job.refusal.kind);
                LazyDecision::Unpack(job)
            }
            Err(refusal) => {
                metrics.refused(refusal.kind);
                self.remember(namespace, request.chain_id, &refusal, false);
                LazyDecision::Ordinary {
                    reason: refusal.reason,
                }
            }
        }
    }

    async fn decide_in(
        self: &Arc<Self>,
        namespace: &str,
        request: &PrepareRequest,
    ) -> Result<Decided> {
        let deadline = request
            .deadline
            .checked_sub(MARGIN)
            .unwrap_or(request.deadline);
        let labels = LayerLabels::parse(&request.labels);
        let mut plan = self
            .plan(namespace, request, labels.clone(), deadline)
            .await?;
        let mut outcome = plan.outcome(request.chain_id, deadline).await;
        if let Ok(planned) = &outcome
            && !self.hold(planned.record.index_digest).await
        {
            // Planned long ago, and its file is gone since.
            self.plans.forget(&plan);
            plan = self.plan(namespace, request, labels, deadline).await?;
            outcome = plan.outcome(request.chain_id, deadline).await;
        }
        match outcome {
            Ok(planned) => {
                check_chain(request, planned.record.diff_id)?;
                let opened = self
                    .parts
                    .layers
                    .open_with(&planned.record, &planned.index)
                    .await;
                opened.map_err(|error| Refusal::new(RefusalKind::Local, error.to_string()))?;
                self.parts.metrics.lazy(planned.record.index_source);
                Ok(Decided::Lazy(planned.record.clone()))
            }
            Err(refusal) => {
                self.unpack_or_refuse(&plan, request, refusal, deadline)
                    .await
            }
        }
    }

    /// Keeps an index file until the layer is committed; says whether it is there.
    async fn hold(self: &Arc<Self>, index: IndexDigest) -> bool {
        self.blocking(move |inner| inner.parts.layers.indexes().hold(index))
            .await
    }

    /// The plan of the image that the layer belongs to.
    async fn plan(
        self: &Arc<Self>,
        namespace: &str,
        request: &PrepareRequest,
        labels: LayerLabels,
        deadline: Instant,
    ) -> Result<Plan> {
        let chain_id = request.chain_id;
        let seed = Seed {
            chain_id,
            labels,
            image: None,
            origins: Vec::new(),
        };
        match &seed.labels.mark {
            Err(error) => Err(mismatch(error.to_string())),
            Ok(LayerMark::Lazy(annotations)) => {
                self.parts.boot.note_attached(annotations);
                check_chain(request, annotations.diff_id)?;
                let key = PlanKey::Image(namespace.to_owned(), annotations.config);
                let plan = self.start(key, seed.clone(), deadline);
                let Ok(layout) = plan.layout(deadline).await else {
                    return Ok(plan);
                };
                if has_same_index(&layout, chain_id, annotations) {
                    return Ok(plan);
                }
                if let Some(refusal) = self.plans.spent(namespace, annotations.config) {
                    return Err(refusal);
                }
                let key = PlanKey::Layer {
                    namespace: namespace.to_owned(),
                    config: annotations.config,
                    chain_id,
                    index: annotations.index_digest,
                };
                let origins = layout.origins.clone();
                Ok(self.start(key, Seed { origins, ..seed }, deadline))
            }
            Ok(mark @ (LayerMark::NotLazy(_) | LayerMark::Unmarked)) => {
                if let Some(plan) = self.plans.with_chain(namespace, chain_id) {
                    return Ok(plan);
                }
                let refusal = match mark {
                    LayerMark::NotLazy(reason) => {
                        Refusal::new(RefusalKind::NotLazy, format!("not lazy: {reason}"))
                    }
                    _ => Refusal::new(RefusalKind::NotConverted, "not lazy: annotations missing"),
                };
                // Of an image that is not converted only the lowest layer costs a search.
                let search = request.parent.is_none() || refusal.kind == RefusalKind::NotLazy;
                if !search {
                    return Err(refusal);
                }
                let content = &*self.parts.content;
                let unmarked = self.options.index_use != IndexPolicy::NONE;
                let now = SystemTime::now();
                let found = resolve_by_chain(content, namespace, chain_id, now, unmarked);
                match tokio::time::timeout_at(deadline, found).await {
                    Ok(Ok(Some(image))) => {
                        let key = PlanKey::Image(namespace.to_owned(), image.config);
                        let seed = Seed {
                            image: Some(image),
                            ..seed
                        };
                        Ok(self.start(key, seed, deadline))
                    }
                    Ok(Ok(None)) | Err(_) => Err(refusal),
                    Ok(Err(error)) => {
                        tracing::debug!(%chain_id, "search for the image of a layer: {error}");
                        Err(refusal)
                    }
                }
            }
        }
    }

    fn start(self: &Arc<Self>, key: PlanKey, seed: Seed, deadline: Instant) -> Plan {
        let inner = Arc::clone(self);
        self.plans.get_or_start(key.clone(), |sender| {
            let runner = Arc::clone(&inner);
            inner.spawn(async move { runner.run_plan(key, seed, deadline, sender).await });
        })
    }

    /// Finds out all about an image; every outcome is sent as soon as it is known.
    async fn run_plan(
        self: Arc<Self>,
        key: PlanKey,
        seed: Seed,
        deadline: Instant,
        state: watch::Sender<PlanState>,
    ) {
        let layout = tokio::time::timeout_at(deadline, self.layout(&key, seed)).await;
        let layout = layout.unwrap_or_else(|_| Err(late())).map(Arc::new);
        state.send_modify(|state| state.layout = Some(layout.clone()));
        let Ok(layout) = layout else { return };
        // A layer that is known by its labels alone may have others below and above it.
        let whole = matches!(key, PlanKey::Image(..)) && layout.is_whole();
        if whole {
            self.seek_boot_lists(&layout);
        }
        let mut places = Places::from(layout.origins.as_slice());
        let mut artifact = None;
        if whole {
            // One after the other: what the zone has the registry is not asked for.
            self.bring_indexes(&layout, deadline).await;
            places = self.located(key.namespace(), &layout, deadline).await;
            if places.unreachable.is_none() {
                let origins = &places.origins;
                artifact = self.artifact_of(&layout, origins, deadline).await;
            }
        }
        let slots = Arc::new(tokio::sync::Semaphore::new(PARALLEL_INDEXES));
        let mut work: FuturesUnordered<_> = layout
            .layers
            .iter()
            .map(|layer| {
                let (inner, slots, places) = (&self, Arc::clone(&slots), &places);
                let artifact = artifact.as_ref();
                async move {
                    let outcome = async {
                        let _slot = slots.acquire().await;
                        inner.outcome(layer, places, artifact, deadline).await
                    };
                    let outcome = tokio::time::timeout_at(deadline, outcome).await;
                    (layer.chain_id, outcome.unwrap_or_else(|_| Err(late())))
                }
            })
            .collect();
        while let Some((chain_id, outcome)) = work.next().await {
            state.send_modify(|state| {
                state.outcomes.insert(chain_id, outcome);
            });
        }
        if whole {
            self.load_boot_lists(&layout, &state.borrow().outcomes);
            self.index_refused(key.namespace(), &layout, &state.borrow().outcomes);
        }
    }

    /// While the indexes load other nodes are asked for the lists of the runs that there will be, where the
    /// image has none itself.
    fn seek_boot_lists(&self, layout: &Layout) {
        let annotations = |layer: &LayoutLayer| match &layer.mark {
            Ok(LayerMark::Lazy(annotations)) => Some(annotations.clone()),
            Ok(LayerMark::NotLazy(_) | LayerMark::Unmarked) | Err(_) => None,
        };
        let layers: Vec<_> = layout.layers.iter().map(annotations).collect();
        for run in layers.split(Option::is_none) {
            let run = || run.iter().flatten();
            if run().all(|annotations| annotations.boot.is_empty()) {
                let indexes: Vec<_> = run().map(|it| it.index_digest).collect();
                self.parts.boot.seek(&indexes);
            }
        }
    }

    /// Layers that are ordinary for want of an index get one while they are unpacked.
    fn index_refused(
        self: &Arc<Self>,
        namespace: &str,
        layout: &Layout,
        outcomes: &BTreeMap<ChainId, Outcome>,
    ) {
        if self.options.index_use.node == IndexUse::Off {
            return;
        }
        let wants = |layer: &&LayoutLayer| {
            let outcome = outcomes.get(&layer.chain_id);
            let refusal = outcome.and_then(|outcome| outcome.as_ref().err());
            refusal.is_some_and(|refusal| refusal.kind == RefusalKind::NotConverted)
        };
        for layer in layout.layers.iter().filter(wants) {
            self.index_when_there(namespace, layer);
        }
    }

    /// Every index is here: what a container of the image reads while it starts begins to load, as far as it is not
    /// made of what the node has.
    fn load_boot_lists(&self, layout: &Layout, outcomes: &BTreeMap<ChainId, Outcome>) {
        for layer in &layout.layers {
            if let Ok(LayerMark::Lazy(annotations)) = &layer.mark {
                self.parts.boot.note_attached(annotations);
            }
        }
        let outcomes = layout.layers.iter().map(|it| outcomes.get(&it.chain_id));
        let records = outcomes.map(|outcome| match outcome {
            Some(Ok(planned)) => Some(planned.record.clone()),
            Some(Err(_)) | None => None,
        });
        let records: Vec<Option<LazyLayerRecord>> = records.collect();
        let lazy = records.iter().flatten().cloned().collect();
        let planned = self.parts.reuse.begin(lazy);
        for run in records.split(Option::is_none) {
            let run = run.iter().flatten().cloned().collect();
            self.parts.boot.load_after(run, planned.clone());
        }
    }

    async fn layout(self: &Arc<Self>, key: &PlanKey, seed: Seed) -> Result<Layout> {
        let named = origin_of(seed.labels.image_reference.as_deref());
        let mut extra = seed.origins.clone();
        let resolved = match (key, seed.image.clone()) {
            (_, Some(image)) => Ok(image),
            (PlanKey::Image(namespace, config), None) => {
                resolve_image(&*self.parts.content, namespace, *config).await
            }
            (PlanKey::Layer { .. }, None) => match seed.annotations() {
                Some(annotations) => Err(ResolveError::NoManifest(annotations.config)),
                None => {
                    return Err(Refusal::new(
                        RefusalKind::Unresolved,
                        "no manifest is known",
                    ));
                }
            },
        };
        let error = match resolved {
            Ok(image) => {
                self.remember_image(key.namespace(), &image);
                let blob = seed.annotations().map(|annotations| annotations.blob);
                if let Some(mut layout) = Layout::of_image(&image, blob) {
                    add_origins(&mut layout.origins, extra);
                    let hint = seed.labels.port;
                    return Ok(self.placed(key.namespace(), layout, named, hint).await);
                }
                ResolveError::NoManifest(image.config)
            }
            Err(error) => error,
        };
        // The labels pin the index as well as the manifest does; only the place is missing.
        let Some(annotations) = seed.annotations().cloned() else {
            return Err(Refusal::new(RefusalKind::Unresolved, error.to_string()));
        };
        let blob = annotations.blob;
        add_origins(&mut extra, self.known_origins(blob).await);
        if extra.is_empty() && named.is_empty() {
            return Err(Refusal::new(RefusalKind::Unresolved, error.to_string()));
        }
        let layout = Layout::of_layer(seed.chain_id, annotations, extra);
        let hint = seed.labels.port;
        Ok(self.placed(key.namespace(), layout, named, hint).await)
    }

    /// The layout with the ports that its registries are known to have; what the client `named` comes first as it is.
    async fn placed(
        self: &Arc<Self>,
        namespace: &str,
        mut layout: Layout,
        named: Vec<BlobOrigin>,
        hint: Option<u16>,
    ) -> Layout {
        let descriptors = layout.layers.iter().filter_map(|l| l.descriptor.as_ref());
        let hints = descriptors
            .filter_map(|descriptor| port_hint(&descriptor.annotations))
            .chain(hint)
            .collect();
        let said = [named.clone(), std::mem::take(&mut layout.origins)].concat();
        let candidates = self.candidates(namespace, &said, hints).await;
        layout.origins = named;
        add_origins(&mut layout.origins, candidates);
        layout
    }

    /// Where layers that exist have this blob from.
    async fn known_origins(self: &Arc<Self>, blob: BlobDigest) -> Vec<BlobOrigin> {
        let layers = self.blocking(|inner| inner.parts.metadata.layers()).await;
        let same = layers
            .unwrap_or_default()
            .into_iter()
            .map(|(_, layer)| layer);
        same.filter(|layer| layer.blob_digest == blob)
            .flat_map(|layer| layer.sources)
            .collect()
    }

    /// What becomes of one layer.
    pub(super) async fn outcome(
        self: &Arc<Self>,
        layer: &LayoutLayer,
        places: &Places,
        artifact: Option<&FoundArtifact>,
        deadline: Instant,
    ) -> Outcome {
        let annotations = match check_layer(layer) {
            Err(refusal) if refusal.kind == RefusalKind::NotConverted => {
                let refusal = match self.toc_outcome(layer, &places.origins, deadline).await {
                    None => refusal,
                    Some(Ok(planned)) => return Ok(planned),
                    // Another index may do.
                    Some(Err(refusal)) => refusal,
                };
                return self
                    .unmodified_outcome(layer, places, artifact, deadline, refusal)
                    .await;
            }
            checked => checked?,
        };
        let mut sources = self
            .trusted_sources(annotations.blob, &places.origins)
            .await?;
        let index = self.index(&annotations, &mut sources, deadline).await?;
        let record = LazyLayerRecord {
            chain_id: layer.chain_id,
            diff_id: annotations.diff_id,
            index_digest: annotations.index_digest,
            blob_digest: annotations.blob,
            blob_bytes: annotations.blob_bytes,
            device_bytes: index.device_bytes(),
            sources,
            index_source: IndexSource::Blob,
        };
        Ok(Arc::new(PlannedLayer { record, index }))
    }

    /// The places of a blob that may be lazy: these, or where layers that exist have it from.
    pub(super) async fn trusted_sources(
        self: &Arc<Self>,
        blob: BlobDigest,
        origins: &[BlobOrigin],
    ) -> Result<Vec<BlobOrigin>> {
        let mut sources: Vec<BlobOrigin> = origins.to_vec();
        if sources.is_empty() {
            sources = self.known_origins(blob).await;
        }
        if sources.is_empty() {
            let reason = "containerd's content store names no registry for this image";
            return Err(Refusal::new(RefusalKind::Unresolved, reason));
        }
        let trust = &self.options.trust;
        let names = sources
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        sources.retain(|origin| trust.allows(origin));
        if sources.is_empty() {
            let reason = format!("[trust] lazy does not allow {names}");
            return Err(Refusal::new(RefusalKind::Untrusted, reason));
        }
        Ok(sources)
    }

    /// What a layer's refusal comes to when it is so small that laziness would save nothing: one request brings all of
    /// it, as many as its index and its chunks take. Where its index cannot be had, that is no reason to give up
    /// the layers above it.
    fn whole_on_purpose(&self, layer: &LayoutLayer, refusal: Refusal) -> Refusal {
        let (
            Some((_, blob_bytes)),
            RefusalKind::NotLazy
            | RefusalKind::NotConverted
            | RefusalKind::Fetch
            | RefusalKind::Index,
        ) = (layer.blob(), refusal.kind)
        else {
            return refusal;
        };
        if blob_bytes > self.options.whole_below_bytes {
            return refusal;
        }
        self.parts.metrics.whole(blob_bytes);
        let reason = format!("pulled whole: {blob_bytes} bytes; {}", refusal.reason);
        Refusal::new(RefusalKind::Whole, reason)
    }

    /// A layer that cannot be lazy is unpacked here if one above it in the image can be.
    async fn unpack_or_refuse(
        self: &Arc<Self>,
        plan: &Plan,
        request: &PrepareRequest,
        refusal: Refusal,
        deadline: Instant,
    ) -> Result<Decided> {
        let Ok(layout) = plan.layout(deadline).await else {
            return Err(refusal);
        };
        let Some(position) = layout.position(request.chain_id) else {
            return Err(refusal);
        };
        let layer = &layout.layers[position];
        let refusal = self.whole_on_purpose(layer, refusal);
        if !matches!(
            refusal.kind,
            RefusalKind::NotLazy | RefusalKind::NotConverted | RefusalKind::Whole
        ) {
            return Err(refusal);
        }
        check_chain(request, layer.diff_id)?;
        let outcomes = plan.now().outcomes;
        let lazy_above =
            layout.layers[position + 1..]
                .iter()
                .any(|above| match outcomes.get(&above.chain_id) {
                    Some(outcome) => outcome.is_ok(),
                    None => matches!(above.mark, Ok(LayerMark::Lazy(_))),
                });
        let (Some(descriptor), Some((blob, blob_bytes))) = (&layer.descriptor, layer.blob()) else {
            return Err(refusal);
        };
        if !lazy_above || layout.origins.is_empty() {
            return Err(refusal);
        }
        let job = UnpackJob {
            inner: Arc::clone(self),
            blob: LayerBlob {
                blob,
                blob_bytes,
                media_type: descriptor.media_type.clone(),
                diff_id: layer.diff_id,
            },
            origins: layout.origins.clone(),
            deadline,
            namespace: request.namespace.clone().unwrap_or_default(),
            chain_id: request.chain_id,
            refusal,
            settled: false,
        };
        Ok(Decided::Unpack(Box::new(job)))
    }

    /// A snapshot answered already: what this image knows of places for the blob is added.
    pub(super) fn reused(self: &Arc<Self>, request: &PrepareRequest, existing: &SnapshotRecord) {
        let (Some(layer), Some(namespace)) = (&existing.layer, &request.namespace) else {
            return;
        };
        let labels = LayerLabels::parse(&request.labels);
        if let Ok(LayerMark::Lazy(annotations)) = &labels.mark {
            // The layer is the same, what is attached to it may be new.
            self.parts.boot.note_attached(annotations);
        }
        let Some(config) = labels.config() else {
            return;
        };
        let (inner, namespace) = (Arc::clone(self), namespace.clone());
        let (layer, name) = (layer.clone(), existing.name.clone());
        self.spawn(async move {
            let mut origins = origin_of(labels.image_reference.as_deref());
            match resolve_image(&*inner.parts.content, &namespace, config).await {
                Ok(image) => {
                    inner.remember_image(&namespace, &image);
                    let manifests = image.manifests.iter();
                    let hints = manifests.flat_map(|it| port_hints(&it.manifest)).collect();
                    let said = &image.repositories;
                    let candidates = inner.candidates(&namespace, said, hints).await;
                    add_origins(&mut origins, candidates);
                }
                Err(error) => tracing::debug!(%config, "resolve a reused layer: {error}"),
            }
            origins.retain(|origin| inner.options.trust.allows(origin));
            origins.retain(|origin| !layer.sources.contains(origin));
            if !origins.is_empty() {
                inner.add_sources(layer, name, origins).await;
            }
        });
    }

    async fn add_sources(
        self: &Arc<Self>,
        mut layer: LazyLayerRecord,
        name: String,
        origins: Vec<BlobOrigin>,
    ) {
        let new = origins.clone();
        let updated = self.blocking(move |inner| {
            inner
                .parts
                .metadata
                .update_layer(&name, |layer| add_origins(&mut layer.sources, new))
        });
        if let Err(error) = updated.await {
            tracing::warn!("failed to remember a repository: {error}");
        }
        layer.sources = origins;
        if self
            .parts
            .layers
            .fetcher()
            .layer(&device_key(&layer))
            .is_some()
            && let Err(error) = self.parts.layers.open(&layer).await
        {
            tracing::warn!("failed to add a repository to a layer: {error}");
        }
    }
}

/// A decision under way. Dropped with its future, at the deadline, it leaves the reason behind.
struct Undecided<'a> {
    inner: Option<&'a Arc<Inner>>,
    namespace: &'a str,
    chain_id: ChainId,
}

impl Undecided<'_> {
    fn settle(mut self) {
        self.inner = None;
    }
}

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        if let Some(inner) = self.inner {
            inner.remember(self.namespace, self.chain_id, &late(), false);
        }
    }
}

/// What a Prepare comes to.
enum Decided {
    Lazy(LazyLayerRecord),
    Unpack(Box<UnpackJob>),
}

/// The chain ID that is asked for must be that of the parent with this layer on top.
fn check_chain(request: &PrepareRequest, diff_id: sluice_blockindex::digest::DiffId) -> Result<()> {
    if request.parent.is_some() && request.parent_chain.is_none() {
        return Err(mismatch("the parent's chain ID is not known".to_owned()));
    }
    let chain_id = ChainId::child(request.parent_chain, diff_id);
    if chain_id == request.chain_id {
        return Ok(());
    }
    let asked = request.chain_id;
    Err(mismatch(format!(
        "layer {diff_id} on this parent is chain {chain_id}, not {asked}"
    )))
}

/// Whether the layout has the layer with the index that the annotations name. A layer whose own
/// annotations are wrong counts: it is refused, whatever the labels say.
fn has_same_index(layout: &Layout, chain_id: ChainId, annotations: &LayerAnnotations) -> bool {
    let position = layout.position(chain_id);
    position.is_some_and(|position| match &layout.layers[position].mark {
        Ok(LayerMark::Lazy(theirs)) => theirs.index_digest == annotations.index_digest,
        Ok(LayerMark::NotLazy(_) | LayerMark::Unmarked) => false,
        Err(_) => true,
    })
}

fn add_origins(to: &mut Vec<BlobOrigin>, from: Vec<BlobOrigin>) {
    for origin in from {
        if !to.contains(&origin) {
            to.push(origin);
        }
    }
}

/// The place that an image reference names.
fn origin_of(reference: Option<&str>) -> Vec<BlobOrigin> {
    let parsed = reference.and_then(|text| text.parse::<ImageReference>().ok());
    let origin = parsed.map(|reference| BlobOrigin::from(reference.place()));
    origin.into_iter().collect()
}
