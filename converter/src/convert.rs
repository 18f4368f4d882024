// SPDX-License-Identifier: Apache-2.0
//! Converts one image: reads the documents, plans, packs layers side by side, writes, names it last.
//!
//! ```text
//!  root ─▶ documents and configs ─▶ plan ─▶ layers (bounded, any order) ─▶ manifests ─▶ index ─▶ name
//! ```
//!
//! A failure anywhere leaves the destination's name as it was; blobs that were already stored stay,
//! and the next run finds them. If every layer is known at the destination and the root would be the
//! same, nothing is written at all.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use futures::{StreamExt, TryStreamExt};
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::digest::{BlobDigest, ConfigDigest, DiffId};

use crate::image::document::OCI_LAYER_ZSTD;
use crate::image::{
    Descriptor, Document, DocumentKind, ImageError, ImageReader, ImageWriter, Platform, read_small,
};
use crate::pack::{BodyParts, Caps, Input, PackError, Packed, feed, pack};
use crate::plan::{
    Action, Finish, INDEX_DEPTH_MAX, ImagePlan, LayerFormat, Outcome, PlanError, PlannedLayer,
    Recipe, Reusable, aim, finish_image, finish_index, is_image, plan_image, require_platform,
    select,
};
use crate::pool::{ByteBudget, Pool};
use crate::push::Pusher;
use crate::report::{Event, LayerReporter, Reporter, Summary, Transfer};

mod copy;
mod known;
mod signed;
mod toc;

pub use known::Known;
use signed::Renamed;

#[cfg(test)]
mod tests;

/// Documents read at once from the source.
const DOCUMENTS_AT_ONCE: usize = 8;

/// What the user chose.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which entries of an index; all if empty.
    pub platforms: Vec<Platform>,
    /// Threads that compress.
    pub threads: usize,
    /// Bytes of chunks in flight, over all layers.
    pub memory_bytes: u64,
    /// What is refused.
    pub caps: Caps,
    /// Where spool files go.
    pub work_directory: Option<PathBuf>,
    /// Convert also what the destination is known to have.
    pub force: bool,
    /// Port of the destination's registry, if its name has one: written into the annotations.
    pub port: Option<u16>,
    /// How layers are made.
    pub recipe: Recipe,
    /// Whether layers that were converted by another recipe are converted again.
    pub exact_recipe: bool,
    /// What this call and those before have converted; the same for all images of a call.
    pub known: Arc<Known>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            platforms: Vec::new(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: 256 * 1024 * 1024,
            caps: Caps::default(),
            work_directory: None,
            force: false,
            port: None,
            recipe: Recipe::default(),
            exact_recipe: false,
            known: Arc::default(),
        }
    }
}

impl Options {
    fn finish(&self) -> Finish {
        Finish {
            port: self.port,
            recipe: self.recipe,
            exact_recipe: self.exact_recipe,
        }
    }
}

/// Why a conversion failed. Nothing has the destination's name that had it not before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A document or blob could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image makes no sense.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A layer cannot be converted.
    #[error("convert layer {blob} of {platform}")]
    Layer {
        /// Blob at the source.
        blob: BlobDigest,
        /// The image it belongs to.
        platform: String,
        /// The cause.
        source: PackError,
    },
    /// A thread could not be started, or died.
    #[error("run conversion: {0}")]
    Run(String),
}

/// An image or index at the source, read and decided.
#[derive(Debug)]
pub(crate) enum Node {
    Index {
        source: Document,
        children: Vec<(Descriptor, Node)>,
    },
    Image(Box<ImagePlan>),
    /// Copied with everything it names, unchanged.
    Opaque(Document),
}

/// How the destination came to have a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It was converted just now.
    Converted,
    /// As it was.
    Copied,
    /// An earlier conversion to this destination made it.
    Reused,
    /// Another image of this call had it.
    Shared,
}

/// A layer is the same work in every image that has it.
type LayerKey = (BlobDigest, DiffId);

#[derive(Debug)]
struct Conversion {
    source: Arc<dyn ImageReader>,
    destination: Arc<dyn ImageWriter>,
    pusher: Arc<Pusher>,
    reusable: Reusable,
    pool: Arc<Pool>,
    budget: Arc<ByteBudget>,
    options: Options,
    reporter: Arc<dyn Reporter>,
    /// Manifests and indexes whose digest is another now.
    renamed: Mutex<Vec<Renamed>>,
}

/// Converts what `source` names and gives the result the name of `destination`.
///
/// **Cancel**: dropping the future stops all threads soon; the destination keeps its name.
pub async fn convert(
    source: Arc<dyn ImageReader>,
    destination: Arc<dyn ImageWriter>,
    options: Options,
    reporter: Arc<dyn Reporter>,
) -> Result<Summary, ConvertError> {
    let done = convert_open(source, Arc::clone(&destination), options, reporter).await;
    destination.close().await;
    done
}

async fn convert_open(
    source: Arc<dyn ImageReader>,
    destination: Arc<dyn ImageWriter>,
    options: Options,
    reporter: Arc<dyn Reporter>,
) -> Result<Summary, ConvertError> {
    let started = std::time::Instant::now();
    let root = source.root().await?;
    let mut root = read_tree(&*source, root, &options.platforms).await?;
    root.aim(options.recipe.format);
    // What is there may be nothing, of another kind, or not readable for us: only a chance is lost.
    let existing = destination.root().await.ok();
    let mut reusable = Reusable::new(options.recipe);
    if let Some(existing) = existing.as_ref().filter(|_| !options.force) {
        remember(&*destination, existing, &mut reusable).await;
    }
    let pool = Pool::new(options.threads).map_err(|e| ConvertError::Run(e.to_string()))?;
    let pusher = Pusher::new(
        Arc::clone(&source),
        Arc::clone(&destination),
        options.work_directory.as_deref(),
    );
    let conversion = Conversion {
        pusher: Arc::new(pusher),
        reusable,
        pool: Arc::new(pool),
        budget: ByteBudget::new(options.memory_bytes.max(1)),
        source: Arc::clone(&source),
        destination: Arc::clone(&destination),
        options,
        reporter: Arc::clone(&reporter),
        renamed: Mutex::default(),
    };
    let mut summary = Summary {
        source: source.label().to_owned(),
        destination: destination.label().to_owned(),
        ..Summary::default()
    };
    let outcomes = conversion.layers(&root, &mut summary).await?;
    let same = |document: &Document| {
        existing
            .as_ref()
            .is_some_and(|existing| existing.digest == document.digest)
    };
    let document = conversion
        .finish(&root, &outcomes, &same, &mut summary)
        .await?;
    if !same(&document) {
        conversion.pusher.name(&document).await?;
    }
    conversion.tell_signed().await;
    summary.digest = document.digest.to_string();
    (summary.uploads, summary.uploaded_bytes) = conversion.pusher.sent();
    summary.seconds = started.elapsed().as_secs_f64();
    reporter.event(&Event::Summary(summary.clone()));
    Ok(summary)
}

/// Reads all documents and configs below the source's root.
pub(crate) async fn read_tree(
    source: &dyn ImageReader,
    root: Document,
    platforms: &[Platform],
) -> Result<Node, ConvertError> {
    if root.kind == DocumentKind::Index {
        return read_node(source, root, platforms, INDEX_DEPTH_MAX).await;
    }
    let node = read_node(source, root, &[], INDEX_DEPTH_MAX).await?;
    if let (Node::Image(plan), false) = (&node, platforms.is_empty()) {
        require_platform(source.label(), &plan.source, &plan.platform, platforms)?;
    }
    Ok(node)
}

async fn read_node(
    source: &dyn ImageReader,
    document: Document,
    platforms: &[Platform],
    depth: usize,
) -> Result<Node, ConvertError> {
    if document.kind == DocumentKind::Manifest {
        if !is_image(&document) {
            return Ok(Node::Opaque(document));
        }
        let config = document
            .single("config")?
            .ok_or_else(|| ImageError::Invalid {
                what: format!("manifest {}", document.digest),
                reason: "no config".to_owned(),
            })?;
        let bytes = read_small(source, &config).await?;
        return Ok(Node::Image(Box::new(plan_image(document, &bytes)?)));
    }
    let Some(depth) = depth.checked_sub(1) else {
        let what = format!("index {}", document.digest);
        let reason = format!("more than {INDEX_DEPTH_MAX} indexes within each other");
        return Err(ImageError::Invalid { what, reason }.into());
    };
    let entries = select(source.label(), &document.list("manifests")?, platforms)?;
    let children = futures::stream::iter(entries)
        .map(|entry| async move {
            let child = source.document(&entry).await?;
            let attestation = entry.platform.as_ref().is_some_and(Platform::is_unknown);
            let node = match attestation {
                true if child.kind == DocumentKind::Manifest => Node::Opaque(child),
                _ => Box::pin(read_node(source, child, &[], depth)).await?,
            };
            Ok::<_, ConvertError>((entry, node))
        })
        .buffered(DOCUMENTS_AT_ONCE)
        .try_collect()
        .await?;
    Ok(Node::Index {
        source: document,
        children,
    })
}

/// Collects what the destination's image was made from.
async fn remember(destination: &dyn ImageWriter, existing: &Document, reusable: &mut Reusable) {
    if existing.kind == DocumentKind::Manifest {
        reusable.add(existing);
        return;
    }
    for entry in existing.list("manifests").unwrap_or_default() {
        if let Ok(manifest) = destination.document(&entry).await
            && manifest.kind == DocumentKind::Manifest
        {
            reusable.add(&manifest);
        }
    }
}

impl Node {
    /// Has all layers planned for this format.
    fn aim(&mut self, format: LayerFormat) {
        match self {
            Self::Index { children, .. } => {
                children.iter_mut().for_each(|(_, it)| it.aim(format));
            }
            Self::Image(plan) => aim(plan, format),
            Self::Opaque(_) => {}
        }
    }

    /// All images, in their order.
    pub(crate) fn images(&self) -> Vec<&ImagePlan> {
        match self {
            Self::Index { children, .. } => children
                .iter()
                .flat_map(|(_, child)| child.images())
                .collect(),
            Self::Image(plan) => vec![plan],
            Self::Opaque(_) => Vec::new(),
        }
    }
}

impl Conversion {
    /// Brings every layer to the destination, each once, several at a time.
    async fn layers(
        &self,
        root: &Node,
        summary: &mut Summary,
    ) -> Result<HashMap<LayerKey, Outcome>, ConvertError> {
        let mut unique: HashMap<LayerKey, ()> = HashMap::new();
        let mut work = Vec::new();
        for plan in root.images() {
            for layer in &plan.layers {
                let key = (layer.descriptor.digest, layer.diff_id);
                if unique.insert(key, ()).is_none() {
                    work.push((plan, layer));
                }
            }
        }
        // Twice the threads: while some layers wait for the network, others compress.
        let at_once = self.options.threads.clamp(1, 8) * 2;
        let done: Vec<(LayerKey, Outcome, Event)> = futures::stream::iter(work)
            .map(|(plan, layer)| async move {
                let (outcome, event) = self.layer(plan, layer).await?;
                self.reporter.event(&event);
                Ok::<_, ConvertError>(((layer.descriptor.digest, layer.diff_id), outcome, event))
            })
            .buffer_unordered(at_once)
            .try_collect()
            .await?;
        let mut outcomes = HashMap::new();
        for (key, outcome, event) in done {
            tally(summary, &event);
            outcomes.insert(key, outcome);
        }
        Ok(outcomes)
    }

    async fn layer(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
    ) -> Result<(Outcome, Event), ConvertError> {
        let descriptor = &layer.descriptor;
        let (source, bytes) = (descriptor.digest.to_string(), descriptor.size);
        self.reporter.event(&Event::LayerStarted {
            source: source.clone(),
            bytes,
        });
        let reporter = LayerReporter::new(&*self.reporter, &source);
        let action = match &layer.action {
            Action::Copy(_) if self.options.finish().remakes(layer) => &Action::Convert,
            action => action,
        };
        let (outcome, transfer, how) = match action {
            Action::Foreign => {
                // With URLs the bytes are fetched from there; without, they can only be here.
                let elsewhere = descriptor.other.contains_key("urls");
                let transfer = match elsewhere {
                    true => Transfer::Foreign,
                    false => self.pusher.copy(descriptor, reporter).await?,
                };
                (Outcome::Foreign, transfer, How::Copied)
            }
            Action::Copy(annotated) => {
                let copied = self.copy_as_annotated(plan, layer, annotated, reporter);
                match copied.await? {
                    Some(transfer) => (annotated.clone(), transfer, How::Copied),
                    None => self.pack_and_send(plan, layer, reporter).await?,
                }
            }
            Action::Convert => match self.bring_known(plan, layer, reporter).await? {
                Some(brought) => brought,
                None => self.pack_and_send(plan, layer, reporter).await?,
            },
        };
        self.remember_layer(layer, &outcome, how);
        let event = layer_done(descriptor, &outcome, transfer, how);
        Ok((outcome, event))
    }

    /// What the layer became in an earlier run, if the destination still has it.
    async fn reuse(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
    ) -> Result<Option<Outcome>, ConvertError> {
        let Some(outcome) = self.reusable.find(layer, plan) else {
            return Ok(None);
        };
        let (blob, bytes) = match &outcome {
            Outcome::Lazy(annotations) => (annotations.blob, annotations.blob_bytes),
            Outcome::NotLazy {
                blob, blob_bytes, ..
            } => (*blob, *blob_bytes),
            Outcome::Toc(toc) => (toc.blob, toc.blob_bytes),
            Outcome::Foreign => return Ok(Some(outcome)),
        };
        Ok(self.pusher.has(blob, bytes).await?.then_some(outcome))
    }

    async fn pack_and_send(
        &self,
        plan: &ImagePlan,
        layer: &PlannedLayer,
        reporter: LayerReporter<'_>,
    ) -> Result<(Outcome, Transfer, How), ConvertError> {
        if let LayerFormat::Toc(format) = self.options.recipe.format {
            return self.pack_toc_and_send(plan, layer, format, reporter).await;
        }
        let (pool, budget) = (Arc::clone(&self.pool), Arc::clone(&self.budget));
        let descriptor = &layer.descriptor;
        // What is zstd already stays if it cannot be lazy, which only its end tells.
        let keep = match descriptor.media_type.ends_with("zstd") {
            true => Some(Arc::new(self.pusher.spool()?)),
            false => None,
        };
        let kept = keep.clone();
        let packing = self.stream(layer, move |input, body, spool, progress| {
            let input = Input {
                keep,
                ..input.clone()
            };
            pack(&input, body, spool, &pool, &budget, progress)
        });
        let packed: Packed = packing.await?.map_err(Self::layer_error(plan, layer))?;
        let outcome = match (packed.annotations(layer.diff_id, plan.config_digest), kept) {
            (Ok(annotations), _) => Outcome::Lazy(annotations),
            (Err(reason), Some(kept)) => {
                // It is what it should be already, and now known to be intact.
                let (blob, blob_bytes) = (descriptor.digest, descriptor.size);
                let outcome = Outcome::NotLazy {
                    reason: reason.to_owned(),
                    media_type: descriptor.media_type.clone(),
                    blob,
                    blob_bytes,
                };
                let transfer = match self.pusher.place(descriptor).await? {
                    Some(transfer) => transfer,
                    None => self.pusher.send(blob, blob_bytes, kept, reporter).await?,
                };
                return Ok((outcome, transfer, How::Converted));
            }
            (Err(reason), None) => Outcome::NotLazy {
                reason: reason.to_owned(),
                media_type: OCI_LAYER_ZSTD.to_owned(),
                blob: packed.blob,
                blob_bytes: packed.blob_bytes,
            },
        };
        let sent = self
            .pusher
            .send(packed.blob, packed.blob_bytes, packed.spool, reporter);
        Ok((outcome, sent.await?, How::Converted))
    }

    fn layer_error(
        plan: &ImagePlan,
        layer: &PlannedLayer,
    ) -> impl FnOnce(PackError) -> ConvertError {
        let (blob, platform) = (layer.descriptor.digest, plan.platform.to_string());
        move |source| ConvertError::Layer {
            blob,
            platform,
            source,
        }
    }

    /// Runs `work` on threads beside the download; it gets the parts, a spool file, and whom to tell
    /// the bytes read.
    async fn stream<T: Send + 'static>(
        &self,
        layer: &PlannedLayer,
        work: impl FnOnce(&Input, BodyParts, File, &(dyn Fn(u64) + Sync)) -> Result<T, PackError>
        + Send
        + 'static,
    ) -> Result<Result<T, PackError>, ConvertError> {
        let descriptor = &layer.descriptor;
        let body = self.source.blob(descriptor.digest, descriptor.size).await?;
        let spool = self.pusher.spool()?;
        let (feed, parts) = feed(body);
        let input = Input {
            what: format!("blob {} of {}", descriptor.digest, self.source.label()),
            blob: descriptor.digest,
            blob_bytes: descriptor.size,
            diff_id: layer.diff_id,
            caps: self.options.caps,
            encode: self.options.recipe.options(),
            keep: None,
        };
        let (reporter, source) = (Arc::clone(&self.reporter), descriptor.digest.to_string());
        let packing = tokio::task::spawn_blocking(move || {
            let progress = |bytes| reporter.progress(&source, bytes);
            work(&input, parts, spool, &progress)
        });
        let ((), packed) = tokio::join!(feed, packing);
        packed.map_err(|e| ConvertError::Run(e.to_string()))
    }

    /// Stores what is below `node` and returns its document, which is stored by the caller.
    async fn finish(
        &self,
        node: &Node,
        outcomes: &HashMap<LayerKey, Outcome>,
        same: &(dyn Fn(&Document) -> bool + Sync),
        summary: &mut Summary,
    ) -> Result<Document, ConvertError> {
        match node {
            Node::Opaque(document) => {
                let blobs = document
                    .list("layers")?
                    .into_iter()
                    .chain(document.single("config")?);
                for blob in blobs {
                    self.pusher.copy(&blob, LayerReporter::silent()).await?;
                }
                Ok(document.clone())
            }
            Node::Image(plan) => {
                let mut ordered = Vec::with_capacity(plan.layers.len());
                for layer in &plan.layers {
                    let found = outcomes.get(&(layer.descriptor.digest, layer.diff_id));
                    let found =
                        found.ok_or_else(|| ConvertError::Run("a layer was lost".into()))?;
                    ordered.push(with_config(found, plan.config_digest));
                }
                let changed = self.with_diff_ids(plan, &ordered).await?;
                let plan = match &changed {
                    Some(changed) => changed,
                    None => {
                        let config = &plan.config;
                        self.pusher.copy(config, LayerReporter::silent()).await?;
                        plan
                    }
                };
                let document = finish_image(plan, &ordered, self.options.finish());
                self.rename(&plan.source, &document);
                summary.images += 1;
                self.reporter.event(&Event::ManifestDone {
                    platform: plan.platform.to_string(),
                    source: plan.source.digest.to_string(),
                    digest: document.digest.to_string(),
                });
                Ok(document)
            }
            Node::Index { source, children } => {
                let mut finished = Vec::with_capacity(children.len());
                for (entry, child) in children {
                    let document = Box::pin(self.finish(child, outcomes, same, summary)).await?;
                    finished.push((entry.clone(), document));
                }
                let pairs: Vec<_> = finished
                    .iter()
                    .map(|(entry, document)| (entry.clone(), document.descriptor()))
                    .collect();
                let index = finish_index(source, &pairs);
                self.rename(source, &index);
                if !same(&index) {
                    for (_, document) in &finished {
                        self.pusher.document(document).await?;
                    }
                }
                Ok(index)
            }
        }
    }
}

/// The same blob in an image with another config.
fn with_config(outcome: &Outcome, config: ConfigDigest) -> Outcome {
    match outcome {
        Outcome::Lazy(found) => Outcome::Lazy(LayerAnnotations {
            config,
            ..found.clone()
        }),
        other => other.clone(),
    }
}

fn layer_done(descriptor: &Descriptor, outcome: &Outcome, transfer: Transfer, how: How) -> Event {
    let (blob, blob_bytes, reason) = match outcome {
        Outcome::Lazy(found) => (found.blob, found.blob_bytes, None),
        Outcome::NotLazy {
            reason,
            blob,
            blob_bytes,
            ..
        } => (*blob, *blob_bytes, Some(reason.clone())),
        Outcome::Toc(toc) => (toc.blob, toc.blob_bytes, toc.toc.clone().err()),
        Outcome::Foreign => {
            let reason = "its bytes live outside the registry".to_owned();
            (descriptor.digest, descriptor.size, Some(reason))
        }
    };
    Event::LayerDone {
        source: descriptor.digest.to_string(),
        source_bytes: descriptor.size,
        blob: blob.to_string(),
        blob_bytes,
        lazy: reason.is_none(),
        reason,
        converted: how == How::Converted,
        shared: how == How::Shared,
        transfer,
    }
}

fn tally(summary: &mut Summary, event: &Event) {
    if let Event::LayerDone {
        source_bytes,
        blob_bytes,
        lazy,
        converted,
        shared,
        transfer,
        ..
    } = event
    {
        summary.layers += 1;
        summary.source_bytes += source_bytes;
        summary.blob_bytes += blob_bytes;
        summary.layers_not_lazy += u64::from(!lazy);
        summary.layers_converted += u64::from(*converted);
        summary.layers_shared += u64::from(*shared);
        let reused = !converted && !shared && *transfer == Transfer::Present;
        summary.layers_reused += u64::from(reused);
    }
}
