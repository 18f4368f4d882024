// SPDX-License-Identifier: Apache-2.0
//! Makes an image lazy without changing a byte of it: indexes its layers as they are and pushes the indexes
//! beside it, with an artifact that refers to the image's manifest.
//!
//! ```text
//!  root ─▶ manifests and configs ─▶ artifacts that are there ─▶ layers (bounded, any order) ─▶ artifact per manifest
//!                                                      streamed once, each through an indexer of its own
//! ```
//!
//! A layer is the same work in every image that has it, and is done once. What an artifact of the same recipe
//! says already is taken from it, if the index that it names is there and sound; such a layer is not read. Of
//! all others the blob must have its digest and its tar the diff ID that the config names: an image that lies
//! about one gets no artifact. The indexes come first, the artifact last; a run that fails leaves blobs that nothing
//! names, and the next one finds them.
//!
//! There are no temporary files: an index and its windows are small, and bounded, and are held in memory until
//! they are pushed, by as many layers as are under way.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use sluice_blockindex::artifact::{
    ARTIFACT_TYPE, Artifact, ArtifactError, ArtifactLayer, EMPTY_JSON, MANIFEST_TYPE, Subject,
    generation_of, reason_of,
};
use sluice_blockindex::digest::{BlobDigest, DiffId, ManifestDigest};
use sluice_fetcher::index_artifact::{ArtifactsSeen, index_artifacts};
use sluice_fetcher::registry::{
    ImageReference, Listed, NewReferrer, RegistryClient, RegistryError, Repository,
};
use sluice_fetcher::source::{Priority, ReadContext};

use crate::convert::{ConvertError, read_tree};
use crate::image::registry::RegistryImage;
use crate::image::{DocumentKind, ImageError, ImageReader, Platform};
use crate::pack::{Caps, PackError};
use crate::plan::{Action, ImagePlan, Outcome, PlannedLayer};
use crate::pool::ByteBudget;
use crate::report::{Event, IndexSummary, Reporter};

mod layer;
#[cfg(test)]
mod tests;

/// Names everything that decides the bytes of an index besides the blob. To be changed with any change of the
/// indexer, its options or its levels: a stale value would keep old indexes.
pub const RECIPE: &str = "1";
/// Longest time for an artifact, all its requests together; its blobs have bounds of their own.
const ARTIFACT_TIMEOUT: Duration = Duration::from_secs(300);
/// Images whose artifacts are looked for at once.
const LOOKS_AT_ONCE: usize = 4;

/// Which images of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Of this machine's platform.
    Host,
    /// Of these platforms.
    Platforms(Vec<Platform>),
    /// All.
    All,
}

/// What the user chose.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which images. One that stands for itself is taken whatever its platform, unless platforms are named.
    pub selection: Selection,
    /// Layers under way at once.
    pub jobs: usize,
    /// What is refused.
    pub caps: Caps,
    /// Index also what an artifact has already.
    pub force: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            selection: Selection::Host,
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            caps: Caps::default(),
            force: false,
        }
    }
}

/// Why an image could not be indexed. Nothing of it has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Its documents cannot be read, or make no sense.
    #[error(transparent)]
    Documents(#[from] ConvertError),
    /// A blob could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registry refuses something.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A layer is not what the image says, or cannot be decompressed.
    #[error("index layer {blob} of {platform}")]
    Layer {
        /// Its blob.
        blob: BlobDigest,
        /// The image it belongs to.
        platform: String,
        /// The cause.
        source: PackError,
    },
    /// The artifact would break a rule.
    #[error("write the artifact of {manifest}")]
    Artifact {
        /// The image's manifest.
        manifest: BlobDigest,
        /// The cause.
        source: ArtifactError,
    },
    /// Nothing can come after the artifact that counts.
    #[error("an artifact of {manifest} has the last generation there is: delete it")]
    LastGeneration {
        /// The image's manifest.
        manifest: BlobDigest,
    },
    /// A thread died.
    #[error("run the indexer: {0}")]
    Run(String),
}

/// A layer is the same work in every image that has it.
type LayerKey = (BlobDigest, DiffId);

#[derive(Debug)]
struct Indexing {
    client: RegistryClient,
    source: RegistryImage,
    options: Options,
    budget: Arc<ByteBudget>,
    reporter: Arc<dyn Reporter>,
    uploads: AtomicU64,
    uploaded_bytes: AtomicU64,
}

/// Indexes the layers of the image `reference` and pushes an artifact for each manifest.
///
/// **Cancel**: dropping the future stops all threads soon; at most blobs that nothing names are left.
pub async fn index(
    client: RegistryClient,
    reference: ImageReference,
    options: Options,
    reporter: Arc<dyn Reporter>,
) -> Result<IndexSummary, IndexError> {
    let started = std::time::Instant::now();
    let source = RegistryImage::new(client.clone(), reference);
    let root = source.root().await?;
    let digest = root.digest.to_string();
    let platforms = match &options.selection {
        Selection::Host if root.kind == DocumentKind::Index => vec![Platform::host()],
        Selection::Host | Selection::All => Vec::new(),
        Selection::Platforms(platforms) => platforms.clone(),
    };
    let tree = read_tree(&source, root, &platforms).await?;
    let images = tree.images();
    let mut summary = IndexSummary {
        image: source.label().to_owned(),
        digest,
        images: images.len() as u64,
        ..IndexSummary::default()
    };
    let indexing = Indexing {
        client,
        source,
        options,
        // Chunks do not wait here: only the claim of large layers is used.
        budget: ByteBudget::new(1),
        reporter: Arc::clone(&reporter),
        uploads: AtomicU64::new(0),
        uploaded_bytes: AtomicU64::new(0),
    };
    let seen: Vec<ArtifactsSeen> = futures::stream::iter(&images)
        .map(|plan| indexing.look(plan))
        .buffered(LOOKS_AT_ONCE)
        .try_collect()
        .await?;
    let entries = indexing.layers(&images, &seen, &mut summary).await?;
    for (plan, seen) in images.iter().zip(seen) {
        let pushed = indexing.publish(plan, &seen, &entries).await?;
        summary.artifacts_pushed += u64::from(pushed);
    }
    summary.uploads = indexing.uploads.load(Ordering::Relaxed);
    summary.uploaded_bytes = indexing.uploaded_bytes.load(Ordering::Relaxed);
    summary.seconds = started.elapsed().as_secs_f64();
    reporter.event(&Event::IndexSummary(summary.clone()));
    Ok(summary)
}

impl Indexing {
    fn place(&self) -> &Repository {
        self.source.reference().place()
    }

    fn context() -> ReadContext {
        // A user waits; the client bounds each wait by its own time-outs.
        ReadContext::new(Priority::Foreground)
    }

    async fn look(&self, plan: &ImagePlan) -> Result<ArtifactsSeen, IndexError> {
        let manifest = manifest_of(plan);
        let context = Self::context();
        let seen = index_artifacts(&self.client, self.place(), manifest, &context).await?;
        for (digest, reason) in &seen.refused {
            tracing::warn!(%digest, image = %manifest, "an index artifact does not count: {reason}");
        }
        Ok(seen)
    }

    /// What is to be said of each layer, each found out once, several at a time.
    async fn layers(
        &self,
        images: &[&ImagePlan],
        seen: &[ArtifactsSeen],
        summary: &mut IndexSummary,
    ) -> Result<HashMap<LayerKey, ArtifactLayer>, IndexError> {
        let mut known: HashMap<LayerKey, &ArtifactLayer> = HashMap::new();
        let best = seen.iter().filter_map(|seen| seen.best.as_ref());
        let same_recipe = best.filter(|best| best.artifact.recipe == RECIPE);
        for layer in same_recipe.flat_map(|best| &best.artifact.layers) {
            known.entry((layer.blob, layer.diff_id)).or_insert(layer);
        }
        let mut work: HashMap<LayerKey, ()> = HashMap::new();
        let mut queue = Vec::new();
        for plan in images {
            for layer in &plan.layers {
                let key = key_of(layer);
                if work.insert(key, ()).is_none() {
                    queue.push((*plan, layer, known.get(&key).copied()));
                }
            }
        }
        let done: Vec<(LayerKey, Option<ArtifactLayer>, Event)> = futures::stream::iter(queue)
            .map(|(plan, layer, known)| async move {
                let (entry, event) = self.layer(plan, layer, known).await?;
                self.reporter.event(&event);
                Ok::<_, IndexError>((key_of(layer), entry, event))
            })
            .buffer_unordered(self.options.jobs.max(1))
            .try_collect()
            .await?;
        let mut entries = HashMap::new();
        for (key, entry, event) in done {
            summary.add(&event);
            entries.extend(entry.map(|entry| (key, entry)));
        }
        Ok(entries)
    }

    /// Pushes what is said of an image, unless the artifact that counts says it already.
    async fn publish(
        &self,
        plan: &ImagePlan,
        seen: &ArtifactsSeen,
        entries: &HashMap<LayerKey, ArtifactLayer>,
    ) -> Result<bool, IndexError> {
        let done = |artifact: Option<ManifestDigest>, generation: u32, listed: Option<Listed>| {
            let event = Event::ArtifactDone {
                platform: plan.platform.to_string(),
                manifest: plan.source.digest.to_string(),
                artifact: artifact.map(|digest| digest.to_string()),
                generation,
                pushed: listed.is_some(),
                listed: listed.map(|listed| match listed {
                    Listed::ByRegistry => "by the registry",
                    Listed::ByTag => "by a tag",
                }),
            };
            self.reporter.event(&event);
        };
        let layers = entries_of(plan, entries);
        if layers.is_empty() {
            // All of them have an index in their blobs.
            done(None, 0, None);
            return Ok(false);
        }
        let manifest = plan.source.digest;
        let mut artifact = Artifact {
            subject: Subject {
                media_type: plan.source.media_type.clone(),
                digest: manifest_of(plan),
                bytes: plan.source.bytes.len() as u64,
            },
            generation: 1,
            recipe: RECIPE.to_owned(),
            layers,
        };
        if let Some(best) = &seen.best
            && best.artifact.says_the_same(&artifact)
        {
            done(Some(best.digest), best.artifact.generation, None);
            return Ok(false);
        }
        let next = seen.highest_generation.checked_add(1);
        artifact.generation = next.ok_or(IndexError::LastGeneration { manifest })?;
        let bytes = artifact
            .to_json()
            .map_err(|source| IndexError::Artifact { manifest, source })?;
        let context = Self::context().with_timeout(ARTIFACT_TIMEOUT);
        let empty = Bytes::from_static(EMPTY_JSON);
        self.push(&context, BlobDigest::of(&empty), empty).await?;
        let new = NewReferrer {
            bytes: Bytes::from(bytes),
            media_type: MANIFEST_TYPE.to_owned(),
            artifact_type: ARTIFACT_TYPE.to_owned(),
            annotations: artifact.annotations(),
            subject: artifact.subject.digest,
        };
        let generation = artifact.generation;
        let listed = self
            .client
            .put_referrer(&context, self.place(), &new, |found| {
                generation_of(&found.annotations).is_none_or(|of| of < generation)
            })
            .await?;
        self.count(new.bytes.len() as u64);
        done(
            Some(ManifestDigest::of(&new.bytes)),
            generation,
            Some(listed),
        );
        Ok(true)
    }

    /// Pushes a blob that is not there. Says whether it was pushed.
    async fn push(
        &self,
        context: &ReadContext,
        digest: BlobDigest,
        bytes: Bytes,
    ) -> Result<bool, IndexError> {
        if self.has(context, digest, bytes.len() as u64).await? {
            return Ok(false);
        }
        let count = bytes.len() as u64;
        let place = self.place();
        self.client.push_blob(context, place, digest, bytes).await?;
        self.count(count);
        Ok(true)
    }

    async fn has(
        &self,
        context: &ReadContext,
        digest: BlobDigest,
        bytes: u64,
    ) -> Result<bool, IndexError> {
        let size = self.client.blob_size(context, self.place(), digest).await?;
        Ok(size == Some(bytes))
    }

    fn count(&self, bytes: u64) {
        self.uploads.fetch_add(1, Ordering::Relaxed);
        self.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn key_of(layer: &PlannedLayer) -> LayerKey {
    (layer.descriptor.digest, layer.diff_id)
}

fn manifest_of(plan: &ImagePlan) -> ManifestDigest {
    ManifestDigest::from_bytes(*plan.source.digest.as_bytes())
}

/// The entries of an image's artifact, in the order of its layers, each blob once.
fn entries_of(plan: &ImagePlan, entries: &HashMap<LayerKey, ArtifactLayer>) -> Vec<ArtifactLayer> {
    let mut found: Vec<ArtifactLayer> = Vec::new();
    for layer in &plan.layers {
        let blob = layer.descriptor.digest;
        if let Some(entry) = entries.get(&key_of(layer))
            && found.iter().all(|other| other.blob != blob)
        {
            found.push(entry.clone());
        }
    }
    found
}

/// Why a layer is not even looked at, if it is not: `None` for one with an index of its own.
fn decided(action: &Action) -> Option<Option<String>> {
    match action {
        Action::Convert => None,
        Action::Foreign => Some(Some("its bytes live outside the registry".to_owned())),
        // Only a conversion to another format plans that.
        Action::Copy(Outcome::Toc(_)) => None,
        Action::Copy(Outcome::Lazy(_)) => Some(None),
        Action::Copy(Outcome::NotLazy { reason, .. }) => Some(Some(reason_of(reason))),
        Action::Copy(Outcome::Foreign) => Some(Some("its bytes live elsewhere".to_owned())),
    }
}
