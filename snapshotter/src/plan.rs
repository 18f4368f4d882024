// SPDX-License-Identifier: Apache-2.0
//! What is to become of each layer of an image, found out once for all its layers.
//!
//! The first `Prepare` of an image starts a plan: its layout is resolved, then the indexes of all
//! lazy layers are fetched at once. Every further `Prepare` of the image finds the plan and waits, if
//! at all, for its own layer only. The plan's deadline is that of the `Prepare` that started it, so
//! an image whose registry swallows packets costs one budget and not one per layer; its failures are
//! remembered for [`FAILURE_MEMORY`], its successes for [`SUCCESS_MEMORY`] (all that is needed later
//! is durable by then). A plan holds the indexes of its layers; it is given up early when a snapshot
//! needs none of them.
//!
//! ```text
//! started --layout--> resolved --one outcome per layer--> complete
//!    |  refusal          | deadline: the missing outcomes are refusals
//!    +-> complete <------+
//! ```
//! **Locks** the table's lock is held for map operations only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sluice_blockindex::annotations::{AnnotationError, LayerAnnotations, LayerMark};
use sluice_blockindex::digest::{
    BlobDigest, ChainId, ConfigDigest, DiffId, IndexDigest, ManifestDigest,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::indexes::LayerIndex;
use crate::labels::mark_of;
use crate::resolve::{Descriptor, ResolvedImage, ResolvedManifest};
use crate::snapshots::{BlobOrigin, LazyLayerRecord};

/// How long an image stays ordinary after its plan failed. Shorter: a dead registry costs each pull
/// of the image a budget; longer: a registry that came back is noticed late.
pub const FAILURE_MEMORY: Duration = Duration::from_secs(60);
/// How long a complete plan is kept: as long as a pull takes to come back for the next layer.
pub const SUCCESS_MEMORY: Duration = Duration::from_secs(600);

/// Why a layer is not lazy, as a fixed word for logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum RefusalKind {
    /// The manifest has no annotations of ours.
    NotConverted,
    /// The converter says that the layer cannot be lazy.
    NotLazy,
    /// Annotations or labels contradict themselves, each other, the manifest or the chain.
    Mismatch,
    /// The configuration does not trust the repository.
    Untrusted,
    /// No registry is known, or containerd does not have manifest and config.
    Unresolved,
    /// The budget of Prepare is used up.
    Budget,
    /// The index could not be fetched.
    Fetch,
    /// The index is not valid.
    Index,
    /// This node's disk or store failed.
    Local,
    /// The layer has no index, and is so small that it is pulled whole on purpose.
    Whole,
}

impl RefusalKind {
    /// The word for metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotConverted => "not_converted",
            Self::NotLazy => "not_lazy",
            Self::Mismatch => "mismatch",
            Self::Untrusted => "untrusted",
            Self::Unresolved => "unresolved",
            Self::Budget => "budget",
            Self::Fetch => "fetch",
            Self::Index => "index",
            Self::Local => "local",
            Self::Whole => "whole",
        }
    }
}

/// Why a layer is not lazy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For metrics.
    pub kind: RefusalKind,
    /// For people.
    pub reason: String,
}

impl Refusal {
    /// Says why.
    pub fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// A layer as the image's manifest describes it.
#[derive(Clone, Debug)]
pub struct LayoutLayer {
    /// Names the stack up to this layer.
    pub chain_id: ChainId,
    /// In the image config.
    pub diff_id: DiffId,
    /// In the manifest; `None` when only the labels of a Prepare are known.
    pub descriptor: Option<Descriptor>,
    /// What the manifest says about its index.
    pub mark: Result<LayerMark, AnnotationError>,
}

impl LayoutLayer {
    /// Of a layer that the manifest describes so.
    #[must_use]
    pub fn of(chain_id: ChainId, diff_id: DiffId, descriptor: Descriptor) -> Self {
        Self {
            chain_id,
            diff_id,
            mark: mark_of(&descriptor.annotations),
            descriptor: Some(descriptor),
        }
    }

    /// Its blob and the size of that, where the image's registry has it: none is known of a layer that is known by
    /// labels alone, and a foreign layer's is elsewhere.
    #[must_use]
    pub fn blob(&self) -> Option<(BlobDigest, u64)> {
        let descriptor = self.descriptor.as_ref().filter(|it| it.urls.is_empty())?;
        Some((descriptor.digest.parse().ok()?, descriptor.size_bytes))
    }
}

/// The layers of an image and where they can be fetched from.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Lowest first.
    pub layers: Vec<LayoutLayer>,
    /// All known.
    pub origins: Vec<BlobOrigin>,
    /// The image's manifest that has them, if it is known.
    pub manifest: Option<ManifestDigest>,
}

impl Layout {
    /// The layout by the manifest that has the blob; by the one that is lazy most when none has it
    /// or no blob is known.
    #[must_use]
    pub fn of_image(image: &ResolvedImage, blob: Option<BlobDigest>) -> Option<Self> {
        let blob = blob.map(|blob| blob.to_string());
        let has_blob = |manifest: &&ResolvedManifest| {
            let mut layers = manifest.manifest.layers.iter();
            blob.as_ref()
                .is_some_and(|blob| layers.any(|layer| layer.digest == *blob))
        };
        let manifests = &image.manifests;
        let chosen = manifests.iter().find(has_blob).or(manifests.first())?;
        let manifest = &chosen.manifest;
        let layers = manifest
            .layers
            .iter()
            .zip(image.diff_ids.iter().zip(&image.chain_ids))
            .map(|(descriptor, (diff_id, chain_id))| {
                LayoutLayer::of(*chain_id, *diff_id, descriptor.clone())
            })
            .collect();
        Some(Self {
            layers,
            origins: image.repositories.clone(),
            manifest: Some(chosen.digest),
        })
    }

    /// The layout when nothing is known but one Prepare's labels and its image reference.
    #[must_use]
    pub fn of_layer(
        chain_id: ChainId,
        annotations: LayerAnnotations,
        origins: Vec<BlobOrigin>,
    ) -> Self {
        let layer = LayoutLayer {
            chain_id,
            diff_id: annotations.diff_id,
            descriptor: None,
            mark: Ok(LayerMark::Lazy(annotations)),
        };
        Self {
            layers: vec![layer],
            origins,
            manifest: None,
        }
    }

    /// Whether it has all layers of the image, and not just one that is known by its labels.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.layers.iter().all(|layer| layer.descriptor.is_some())
    }

    /// The place of a chain ID among the layers.
    #[must_use]
    pub fn position(&self, chain_id: ChainId) -> Option<usize> {
        self.layers
            .iter()
            .position(|layer| layer.chain_id == chain_id)
    }
}

/// Checks that annotations, descriptor and config speak of the same layer.
pub fn check_layer(layer: &LayoutLayer) -> Result<LayerAnnotations, Refusal> {
    let mismatch = |reason: String| Refusal::new(RefusalKind::Mismatch, reason);
    let annotations = match &layer.mark {
        Ok(LayerMark::Lazy(annotations)) => annotations.clone(),
        Ok(LayerMark::NotLazy(reason)) => {
            return Err(Refusal::new(
                RefusalKind::NotLazy,
                format!("not lazy: {reason}"),
            ));
        }
        Ok(LayerMark::Unmarked) => {
            return Err(Refusal::new(
                RefusalKind::NotConverted,
                "not lazy: annotations missing",
            ));
        }
        Err(error) => return Err(mismatch(error.to_string())),
    };
    if annotations.diff_id != layer.diff_id {
        let (theirs, ours) = (annotations.diff_id, layer.diff_id);
        return Err(mismatch(format!(
            "annotated diff ID {theirs}, config says {ours}"
        )));
    }
    if let Some(descriptor) = &layer.descriptor {
        let blob = annotations.blob.to_string();
        if blob != descriptor.digest || annotations.blob_bytes != descriptor.size_bytes {
            return Err(mismatch(format!(
                "annotated blob {blob} of {} bytes, manifest has {} of {} bytes",
                annotations.blob_bytes, descriptor.digest, descriptor.size_bytes
            )));
        }
    }
    Ok(annotations)
}

/// A layer that can be lazy: its index is on disk.
#[derive(Clone, Debug)]
pub struct PlannedLayer {
    /// For the metadata store.
    pub record: LazyLayerRecord,
    /// Opened.
    pub index: Arc<LayerIndex>,
}

/// What becomes of a layer.
pub type Outcome = Result<Arc<PlannedLayer>, Refusal>;

/// How far a plan is.
#[derive(Clone, Debug, Default)]
pub struct PlanState {
    /// `None` until the image is resolved.
    pub layout: Option<Result<Arc<Layout>, Refusal>>,
    /// By chain ID, as they become known.
    pub outcomes: BTreeMap<ChainId, Outcome>,
}

impl PlanState {
    /// What is known of a layer; `None`: not yet.
    fn outcome(&self, chain_id: ChainId) -> Option<Outcome> {
        match self.layout.as_ref()? {
            Err(refusal) => Some(Err(refusal.clone())),
            Ok(layout) if layout.position(chain_id).is_none() => Some(Err(Refusal::new(
                RefusalKind::Mismatch,
                format!("the image config has no layer with chain ID {chain_id}"),
            ))),
            Ok(_) => self.outcomes.get(&chain_id).cloned(),
        }
    }

    fn failed(&self) -> bool {
        let passing = |refusal: &Refusal| {
            !matches!(
                refusal.kind,
                RefusalKind::NotLazy | RefusalKind::NotConverted
            )
        };
        !matches!(&self.layout, Some(Ok(_)))
            || self
                .outcomes
                .values()
                .any(|outcome| outcome.as_ref().is_err_and(passing))
    }
}

/// A plan in the making or complete.
#[derive(Clone, Debug)]
pub struct Plan {
    state: watch::Receiver<PlanState>,
    started: Instant,
}

impl Plan {
    /// What becomes of the layer, waiting until it is known.
    pub async fn outcome(&self, chain_id: ChainId, deadline: Instant) -> Outcome {
        let late = || Refusal::new(RefusalKind::Budget, "the budget of Prepare is used up");
        let mut state = self.state.clone();
        let known = state.wait_for(|state| state.outcome(chain_id).is_some());
        match tokio::time::timeout_at(deadline, known).await {
            Ok(Ok(state)) => state.outcome(chain_id).unwrap_or_else(|| Err(late())),
            // The plan's task ended without an outcome: its deadline passed or the daemon stops.
            Ok(Err(_)) | Err(_) => Err(late()),
        }
    }

    /// The layout, waiting until it is known.
    pub async fn layout(&self, deadline: Instant) -> Result<Arc<Layout>, Refusal> {
        let late = || Refusal::new(RefusalKind::Budget, "the budget of Prepare is used up");
        let mut state = self.state.clone();
        let known = state.wait_for(|state| state.layout.is_some());
        match tokio::time::timeout_at(deadline, known).await {
            Ok(Ok(state)) => state.layout.clone().unwrap_or_else(|| Err(late())),
            Ok(Err(_)) | Err(_) => Err(late()),
        }
    }

    /// What is known now.
    #[must_use]
    pub fn now(&self) -> PlanState {
        self.state.borrow().clone()
    }

    /// Whether no snapshot needs any of the layers that it found; never of one that runs, or that
    /// found none and is a memory of that.
    fn is_left(&self, needed: &BTreeSet<IndexDigest>) -> bool {
        let state = self.state.borrow();
        let found: Vec<IndexDigest> = state
            .outcomes
            .values()
            .filter_map(|outcome| Some(outcome.as_ref().ok()?.record.index_digest))
            .collect();
        self.state.has_changed().is_err()
            && !found.is_empty()
            && found.iter().all(|index| !needed.contains(index))
    }

    /// The refusal of a layer for which the budget was used up.
    fn spent(&self) -> Option<Refusal> {
        let state = self.state.borrow();
        let mut refusals = state.outcomes.values().filter_map(|it| it.as_ref().err());
        refusals
            .find(|refusal| refusal.kind == RefusalKind::Budget)
            .cloned()
    }

    fn fresh(&self) -> bool {
        let state = self.state.borrow();
        let complete = self.state.has_changed().is_err();
        let life = if complete && state.failed() {
            FAILURE_MEMORY
        } else {
            SUCCESS_MEMORY
        };
        self.started.elapsed() < life
    }

    fn has(&self, chain_id: ChainId) -> bool {
        match &self.state.borrow().layout {
            Some(Ok(layout)) => layout.position(chain_id).is_some(),
            _ => false,
        }
    }
}

/// What a plan is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PlanKey {
    /// An image in a namespace.
    Image(String, ConfigDigest),
    /// One layer by its own labels, when the image's plan does not have it so.
    Layer {
        /// containerd namespace.
        namespace: String,
        /// Of the image.
        config: ConfigDigest,
        /// The layer.
        chain_id: ChainId,
        /// Its index: images with one config may have several.
        index: IndexDigest,
    },
}

impl PlanKey {
    /// containerd namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        match self {
            Self::Image(namespace, _) | Self::Layer { namespace, .. } => namespace,
        }
    }

    fn config(&self) -> ConfigDigest {
        match self {
            Self::Image(_, config) | Self::Layer { config, .. } => *config,
        }
    }
}

/// The plans of this daemon.
#[derive(Debug, Default)]
pub struct Plans {
    table: Mutex<HashMap<PlanKey, Plan>>,
}

impl Plans {
    /// The plan with this key; `start` is called for a new one, gets its write end, and must only
    /// spawn the work.
    pub fn get_or_start(&self, key: PlanKey, start: impl FnOnce(watch::Sender<PlanState>)) -> Plan {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, plan| plan.fresh());
        if let Some(plan) = table.get(&key) {
            return plan.clone();
        }
        let (sender, state) = watch::channel(PlanState::default());
        let plan = Plan {
            state,
            started: Instant::now(),
        };
        table.insert(key, plan.clone());
        drop(table);
        start(sender);
        plan
    }

    /// Forgets a plan, so that the next one begins anew.
    pub fn forget(&self, plan: &Plan) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, other| !other.state.same_channel(&plan.state));
    }

    /// Forgets plans in which a layer with this blob is not lazy: it can be now.
    pub fn forget_refused(&self, blob: BlobDigest) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, plan| {
            let state = plan.state.borrow();
            let Some(Ok(layout)) = &state.layout else {
                return true;
            };
            let refused = |layer: &LayoutLayer| {
                let outcome = state.outcomes.get(&layer.chain_id);
                outcome.is_some_and(Result::is_err)
            };
            let of_blob = |layer: &LayoutLayer| layer.blob().is_some_and(|(its, _)| its == blob);
            !layout.layers.iter().any(|it| of_blob(it) && refused(it))
        });
    }

    /// Forgets plans in which a layer is not lazy because nobody knew where its registry is.
    pub fn forget_unresolved(&self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let unresolved = |outcome: &Outcome| {
            let refusal = outcome.as_ref().err();
            refusal.is_some_and(|refusal| refusal.kind == RefusalKind::Unresolved)
        };
        table.retain(|_, plan| !plan.state.borrow().outcomes.values().any(unresolved));
    }

    /// Forgets plans that are older than `grace` and whose layers no snapshot needs, so that their
    /// indexes can go.
    pub fn release(&self, needed: &BTreeSet<IndexDigest>, grace: Duration) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, plan| {
            let left = plan.started.elapsed() >= grace && plan.is_left(needed);
            plan.fresh() && !left
        });
    }

    /// Why a layer of the image was refused after a whole budget: an image whose layers have a plan
    /// each is not to cost a budget each.
    #[must_use]
    pub fn spent(&self, namespace: &str, config: ConfigDigest) -> Option<Refusal> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table
            .iter()
            .filter(|(key, plan)| {
                key.namespace() == namespace && key.config() == config && plan.fresh()
            })
            .find_map(|(_, plan)| plan.spent())
    }

    /// A plan of the namespace whose image has this layer.
    #[must_use]
    pub fn with_chain(&self, namespace: &str, chain_id: ChainId) -> Option<Plan> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut plans = table.iter();
        plans
            .find(|(key, plan)| key.namespace() == namespace && plan.fresh() && plan.has(chain_id))
            .map(|(_, plan)| plan.clone())
    }
}

#[cfg(test)]
mod tests;
