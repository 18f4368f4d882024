// SPDX-License-Identifier: Apache-2.0
//! What a conversion will do, decided from documents alone. Pure: no I/O, no clock.
//!
//! A root is a manifest or an index of them. [`select`] keeps the entries of an index that the user
//! asked for; [`plan_image`] decides layer by layer; once the layers are done, [`finish_image`] and
//! [`finish_index`] write the documents. The output depends on the input and on the [`Recipe`] alone, so
//! that converting twice gives the same digests, and so that a layer that the destination already
//! has, annotated with its source and the recipe, need not be converted again ([`Reusable`]).
//!
//! Never changed: the config's bytes, and with them diff IDs, history and the config digest; but for eStargz,
//! whose diff IDs are others ([`with_diff_ids`]).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use sluice_blockindex::annotations::{INDEX_DIGEST, LayerAnnotations, LayerMark, PORT};
use sluice_blockindex::digest::{BlobDigest, ConfigDigest, DiffId};

use crate::image::document::{DOCKER_CONFIG, OCI_CONFIG, OCI_INDEX, OCI_LAYER_ZSTD, OCI_MANIFEST};
use crate::image::{Descriptor, Document, DocumentKind, Platform};

mod format;
mod recipe;

pub use format::{LayerFormat, TocBlob, aim, media_type};
pub use recipe::Recipe;

#[cfg(test)]
mod tests;

/// Annotation of a converted layer: digest of the blob that it was made from.
pub const SOURCE: &str = "sluice.source";
/// Annotation of a converted layer: the [`Recipe`] by which it was made.
pub const RECIPE_NAME: &str = "sluice.recipe";
/// Indexes within indexes that are followed. Real ones have one level; a cycle cannot exist (digests),
/// but a chain could be long.
pub(crate) const INDEX_DEPTH_MAX: usize = 4;

/// All annotations of ours that tell about a blob begin so.
const OURS: &str = "containerd.io/snapshot/sluice.";
/// Annotations that describe the byte layout of the source blob; on another blob they would lie.
const LAYOUT_ANNOTATIONS: &[&str] = &[
    "containerd.io/snapshot/stargz/",
    "containerd.io/snapshot/overlaybd/",
    "containerd.io/snapshot/nydus-",
    OURS,
    "io.containers.estargz.",
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
    SOURCE,
    RECIPE_NAME,
    format::DIFF,
    format::NO_TOC,
];

/// Docker's annotation of an attestation: the digest of the manifest it speaks of.
const ATTESTED: &str = "vnd.docker.reference.digest";

/// Why an image cannot be converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The user asked for a platform that the image does not have.
    #[error("platform {asked} is not in {what}; it has {}", available.join(", "))]
    NoSuchPlatform {
        /// What the user asked for.
        asked: String,
        /// The image.
        what: String,
        /// What there is.
        available: Vec<String>,
    },
    /// Manifest and config contradict each other or themselves.
    #[error("manifest {manifest}: {reason}")]
    Inconsistent {
        /// Its digest.
        manifest: BlobDigest,
        /// How.
        reason: String,
    },
}

/// One image manifest and what is done to it.
#[derive(Debug, Clone)]
pub struct ImagePlan {
    /// As it is at the source.
    pub source: Document,
    /// The config as the output names it: same bytes, OCI media type.
    pub config: Descriptor,
    /// Its digest.
    pub config_digest: ConfigDigest,
    /// What the config says it is for.
    pub platform: Platform,
    /// Lowest first.
    pub layers: Vec<PlannedLayer>,
}

/// One layer and what is done to it.
#[derive(Debug, Clone)]
pub struct PlannedLayer {
    /// As the source manifest has it.
    pub descriptor: Descriptor,
    /// From the config.
    pub diff_id: DiffId,
    /// What to do.
    pub action: Action,
}

/// What is done to a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Change the compression.
    Convert,
    /// Copy the blob; the outcome is what its annotations say, and holds only if they do.
    Copy(Outcome),
    /// Its bytes live elsewhere by licence; only the descriptor is kept.
    Foreign,
}

/// What became of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It has an index.
    Lazy(LayerAnnotations),
    /// It is in a format that others read too, with a table of contents or without.
    Toc(TocBlob),
    /// It has none.
    NotLazy {
        /// Why, for the user.
        reason: String,
        /// What the blob is now.
        media_type: String,
        /// Its digest now.
        blob: BlobDigest,
        /// Its size now.
        blob_bytes: u64,
    },
    /// The descriptor is as it was.
    Foreign,
}

#[derive(Debug, Deserialize)]
struct Config {
    #[serde(flatten)]
    platform: Platform,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Whether a manifest is a container image; all else (attestations, charts, signatures) is copied as
/// it is.
pub fn is_image(manifest: &Document) -> bool {
    let config = manifest.single("config").ok().flatten();
    let layers = manifest.list("layers");
    manifest.kind == DocumentKind::Manifest
        && config.is_some_and(|c| c.media_type == OCI_CONFIG || c.media_type == DOCKER_CONFIG)
        && layers.is_ok_and(|layers| layers.iter().all(Descriptor::is_layer))
}

/// The entries of an index that the user asked for; all if `asked` is empty.
///
/// Attestations follow the manifest they speak of. **Errors**: a platform that matches no entry.
pub fn select(
    what: &str,
    entries: &[Descriptor],
    asked: &[Platform],
) -> Result<Vec<Descriptor>, PlanError> {
    if asked.is_empty() {
        return Ok(entries.to_vec());
    }
    let platform = |entry: &Descriptor| entry.platform.clone().filter(|p| !p.is_unknown());
    for wanted in asked {
        if !entries
            .iter()
            .filter_map(platform)
            .any(|found| wanted.accepts(&found))
        {
            let mut available: Vec<String> = entries
                .iter()
                .filter_map(platform)
                .map(|found| found.to_string())
                .collect();
            available.sort();
            available.dedup();
            let asked = wanted.to_string();
            return Err(PlanError::NoSuchPlatform {
                asked,
                what: what.to_owned(),
                available,
            });
        }
    }
    let chosen = |entry: &Descriptor| {
        platform(entry).is_some_and(|found| asked.iter().any(|wanted| wanted.accepts(&found)))
    };
    let kept: Vec<String> = entries
        .iter()
        .filter(|e| chosen(e))
        .map(|entry| entry.digest.to_string())
        .collect();
    let attests = |entry: &Descriptor| {
        entry
            .annotations
            .get(ATTESTED)
            .is_some_and(|digest| kept.contains(digest))
    };
    Ok(entries
        .iter()
        .filter(|entry| chosen(entry) || attests(entry))
        .cloned()
        .collect())
}

/// Refuses an image that stands for itself, outside of any index, and is for no platform asked for.
///
/// A single image is an index of one, whose platform only the config tells.
pub fn require_platform(
    what: &str,
    manifest: &Document,
    found: &Platform,
    asked: &[Platform],
) -> Result<(), PlanError> {
    let mut entry = manifest.descriptor();
    entry.platform = Some(found.clone());
    select(what, &[entry], asked).map(|_| ())
}

/// The platform that a config is for. **Errors**: it is not JSON, or of another shape.
pub fn platform_of(config: &[u8]) -> Result<Platform, serde_json::Error> {
    let platform: Platform = serde_json::from_slice(config)?;
    Ok(Platform {
        other: serde_json::Map::new(),
        ..platform
    })
}

/// Decides what is done to an image. `config` are the verified bytes of its config.
///
/// **Errors**: a config that does not belong to the manifest.
pub fn plan_image(manifest: Document, config: &[u8]) -> Result<ImagePlan, PlanError> {
    let inconsistent = |reason: String| PlanError::Inconsistent {
        manifest: manifest.digest,
        reason,
    };
    let mut config_descriptor = manifest
        .single("config")
        .map_err(|e| inconsistent(e.to_string()))?
        .ok_or_else(|| inconsistent("no config".to_owned()))?;
    let descriptors = manifest
        .list("layers")
        .map_err(|e| inconsistent(e.to_string()))?;
    let parsed: Config = serde_json::from_slice(config)
        .map_err(|e| inconsistent(format!("config {}: {e}", config_descriptor.digest)))?;
    let diff_ids = &parsed.rootfs.diff_ids;
    if diff_ids.len() != descriptors.len() {
        return Err(inconsistent(format!(
            "{} layers, but config {} has {} diff IDs",
            descriptors.len(),
            config_descriptor.digest,
            diff_ids.len()
        )));
    }
    let config_digest = ConfigDigest::of(config);
    let mut layers = Vec::with_capacity(descriptors.len());
    for (descriptor, diff_id) in descriptors.into_iter().zip(diff_ids) {
        let diff_id: DiffId = diff_id
            .parse()
            .map_err(|e| inconsistent(format!("diff ID {diff_id:?}: {e}")))?;
        let action = decide(&descriptor, diff_id, config_digest);
        layers.push(PlannedLayer {
            descriptor,
            diff_id,
            action,
        });
    }
    config_descriptor.media_type = OCI_CONFIG.to_owned();
    let platform = Platform {
        other: serde_json::Map::new(),
        ..parsed.platform
    };
    Ok(ImagePlan {
        source: manifest,
        config: config_descriptor,
        config_digest,
        platform,
        layers,
    })
}

fn decide(descriptor: &Descriptor, diff_id: DiffId, config: ConfigDigest) -> Action {
    if descriptor.is_foreign() {
        return Action::Foreign;
    }
    let unchanged = |reason: String| {
        Action::Copy(Outcome::NotLazy {
            reason,
            media_type: descriptor.media_type.clone(),
            blob: descriptor.digest,
            blob_bytes: descriptor.size,
        })
    };
    if descriptor.is_encrypted() {
        return unchanged("the blob is encrypted".to_owned());
    }
    match LayerMark::parse(|name| descriptor.annotations.get(name).map(String::as_str)) {
        Ok(LayerMark::Lazy(found))
            if found.blob == descriptor.digest
                && found.blob_bytes == descriptor.size
                && found.diff_id == diff_id =>
        {
            // A child image keeps the blobs of its parent; only the config is another.
            Action::Copy(Outcome::Lazy(LayerAnnotations { config, ..found }))
        }
        Ok(LayerMark::NotLazy(reason)) => unchanged(reason),
        // Ours, but of another blob, or damaged: made anew.
        Ok(LayerMark::Lazy(_) | LayerMark::Unmarked) | Err(_) => Action::Convert,
    }
}

/// Whether nothing about an image changes.
pub fn is_converted(plan: &ImagePlan) -> bool {
    plan.source.media_type == OCI_MANIFEST
        && plan.layers.iter().all(|layer| match &layer.action {
            Action::Convert => false,
            Action::Copy(Outcome::Lazy(annotations)) => annotations
                .to_map()
                .iter()
                .all(|(name, value)| layer.descriptor.annotations.get(name) == Some(value)),
            Action::Copy(_) | Action::Foreign => true,
        })
}

/// What descriptors of converted layers say besides what the layers became.
#[derive(Debug, Clone, Copy, Default)]
pub struct Finish {
    /// Port of the registry that the image goes to, if its name has one.
    pub port: Option<u16>,
    /// How layers were made.
    pub recipe: Recipe,
    /// Whether layers by another recipe were made anew.
    pub exact_recipe: bool,
}

impl Finish {
    /// Whether a layer that was converted before was made anew. Its bytes may be the same nonetheless.
    pub fn remakes(&self, layer: &PlannedLayer) -> bool {
        self.exact_recipe
            && matches!(
                layer.action,
                Action::Copy(Outcome::Lazy(_) | Outcome::Toc(_))
            )
            && !self.recipe.made(&layer.descriptor)
    }
}

/// The config of an image whose layers have these diff IDs now; all else in it stays as it is.
///
/// **Errors**: it is no JSON with a list of diff IDs, which [`plan_image`] has read before.
pub fn with_diff_ids(config: &[u8], diff_ids: &[DiffId]) -> Result<Vec<u8>, serde_json::Error> {
    let mut value: Value = serde_json::from_slice(config)?;
    value["rootfs"]["diff_ids"] = diff_ids.iter().map(ToString::to_string).collect();
    serde_json::to_vec(&value)
}

/// The manifest of a converted image. `outcomes` are those of `plan.layers`, in order.
pub fn finish_image(plan: &ImagePlan, outcomes: &[Outcome], finish: Finish) -> Document {
    let port = finish.port;
    debug_assert_eq!(plan.layers.len(), outcomes.len());
    let as_annotated = plan.layers.iter().zip(outcomes).all(|(layer, outcome)| {
        let Action::Copy(annotated) = &layer.action else {
            return true;
        };
        annotated == outcome && !finish.remakes(layer)
    });
    if as_annotated && is_converted(plan) && plan.layers.iter().all(|layer| has_port(layer, port)) {
        return plan.source.clone();
    }
    let layers: Vec<Descriptor> = plan
        .layers
        .iter()
        .zip(outcomes)
        .map(|(layer, outcome)| {
            let mut descriptor = finish_layer(layer, outcome, finish);
            match (outcome, port) {
                (Outcome::Lazy(_), Some(port)) => {
                    descriptor
                        .annotations
                        .insert(PORT.to_owned(), port.to_string());
                }
                _ => {
                    descriptor.annotations.remove(PORT);
                }
            }
            descriptor
        })
        .collect();
    let mut value = plan.source.value.clone();
    value["schemaVersion"] = 2.into();
    value["mediaType"] = OCI_MANIFEST.into();
    value["config"] = to_value(&plan.config);
    value["layers"] = layers.iter().map(to_value).collect();
    Document::of_value(OCI_MANIFEST, value)
}

/// Whether the layer's port hint, if it can have one, says `port`.
fn has_port(layer: &PlannedLayer, port: Option<u16>) -> bool {
    let annotations = &layer.descriptor.annotations;
    !annotations.contains_key(INDEX_DIGEST)
        || annotations.get(PORT).map(String::as_str) == port.map(|p| p.to_string()).as_deref()
}

/// The descriptor of a layer in the output.
pub fn finish_layer(layer: &PlannedLayer, outcome: &Outcome, finish: Finish) -> Descriptor {
    let recipe = finish.recipe;
    let mut descriptor = layer.descriptor.clone();
    let (mark, media_type, blob, blob_bytes) = match outcome {
        Outcome::Toc(toc) => return finish_toc(layer, toc, finish),
        Outcome::Foreign => {
            descriptor.media_type = oci_layer_type(&descriptor.media_type);
            return descriptor;
        }
        Outcome::Lazy(annotations) => (
            LayerMark::Lazy(annotations.clone()),
            OCI_LAYER_ZSTD.to_owned(),
            annotations.blob,
            annotations.blob_bytes,
        ),
        Outcome::NotLazy {
            reason,
            media_type,
            blob,
            blob_bytes,
        } => {
            let media_type = oci_layer_type(media_type);
            (
                LayerMark::NotLazy(reason.clone()),
                media_type,
                *blob,
                *blob_bytes,
            )
        }
    };
    if blob == descriptor.digest {
        // The blob is as it was: whatever else describes it still holds; what we said of it may not.
        descriptor
            .annotations
            .retain(|name, _| !name.starts_with(OURS));
        if finish.remakes(layer) {
            let recipe = (RECIPE_NAME.to_owned(), recipe.to_string());
            descriptor.annotations.extend([recipe]);
        }
        if matches!(mark, LayerMark::NotLazy(_)) {
            // Found out by reading all of it; the next conversion shall not have to.
            let made = [
                (SOURCE, blob.to_string()),
                (RECIPE_NAME, recipe.to_string()),
            ];
            for (name, value) in made {
                descriptor
                    .annotations
                    .entry(name.to_owned())
                    .or_insert(value);
            }
        }
        descriptor.annotations.extend(mark.to_map());
    } else {
        remake(&mut descriptor, mark.to_map(), recipe);
    }
    descriptor.media_type = media_type;
    descriptor.digest = blob;
    descriptor.size = blob_bytes;
    descriptor
}

/// Has the descriptor of a blob speak of what was made of that, by this recipe.
fn remake(descriptor: &mut Descriptor, said: BTreeMap<String, String>, recipe: Recipe) {
    let source = descriptor.digest.to_string();
    descriptor.annotations.retain(|name, _| {
        !LAYOUT_ANNOTATIONS
            .iter()
            .any(|prefix| name.starts_with(prefix))
    });
    descriptor.annotations.extend(said);
    descriptor.annotations.insert(SOURCE.to_owned(), source);
    descriptor
        .annotations
        .insert(RECIPE_NAME.to_owned(), recipe.to_string());
    // Inlined content would be that of the old blob.
    descriptor.other.remove("data");
}

fn finish_toc(layer: &PlannedLayer, toc: &TocBlob, finish: Finish) -> Descriptor {
    let mut descriptor = layer.descriptor.clone();
    if matches!(&layer.action, Action::Copy(Outcome::Toc(copied)) if copied == toc)
        && !finish.remakes(layer)
    {
        descriptor.media_type = oci_layer_type(&descriptor.media_type);
        return descriptor;
    }
    remake(&mut descriptor, toc.to_map(layer.diff_id), finish.recipe);
    descriptor.media_type.clone_from(&toc.media_type);
    (descriptor.digest, descriptor.size) = (toc.blob, toc.blob_bytes);
    descriptor
}

/// The index of converted manifests. `children` are the kept entries with what replaces them; what
/// an attestation speaks of is named by its new digest.
pub fn finish_index(source: &Document, children: &[(Descriptor, Descriptor)]) -> Document {
    let renamed: BTreeMap<String, String> = children
        .iter()
        .map(|(entry, new)| (entry.digest.to_string(), new.digest.to_string()))
        .collect();
    let manifests: Vec<Descriptor> = children
        .iter()
        .map(|(entry, new)| {
            let mut descriptor = entry.clone();
            if entry.digest != new.digest {
                descriptor.other.remove("data");
            }
            descriptor.media_type = new.media_type.clone();
            descriptor.digest = new.digest;
            descriptor.size = new.size;
            if let Some(attested) = descriptor.annotations.get_mut(ATTESTED)
                && let Some(new) = renamed.get(attested)
            {
                attested.clone_from(new);
            }
            descriptor
        })
        .collect();
    let unchanged = source.media_type == OCI_INDEX
        && source
            .list("manifests")
            .is_ok_and(|before| before == manifests);
    if unchanged {
        return source.clone();
    }
    let mut value = source.value.clone();
    value["schemaVersion"] = 2.into();
    value["mediaType"] = OCI_INDEX.into();
    value["manifests"] = manifests.iter().map(to_value).collect();
    Document::of_value(OCI_INDEX, value)
}

fn to_value(descriptor: &Descriptor) -> Value {
    serde_json::to_value(descriptor).expect("descriptors are plain JSON")
}

/// Docker's layer media types in OCI's words; others stay.
fn oci_layer_type(media_type: &str) -> String {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.v1.tar+gzip"
        }
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => OCI_LAYER_ZSTD,
        "application/vnd.docker.image.rootfs.diff.tar" => "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        }
        "application/vnd.docker.image.rootfs.foreign.diff.tar" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar"
        }
        other => other,
    }
    .to_owned()
}

/// Layers that a destination already has, by what they were made from.
///
/// Believed of the destination's own manifest, which whoever may write there could have written: no
/// more trust than its tag already needs. Whether the blobs still exist is checked by the caller.
#[derive(Debug, Default)]
pub struct Reusable {
    /// By what recipe they must be made.
    recipe: Recipe,
    lazy: BTreeMap<(BlobDigest, DiffId), LayerAnnotations>,
    /// What it says of its lazy blobs, whatever they were made from.
    annotated: BTreeMap<(BlobDigest, DiffId), LayerAnnotations>,
    /// Layers that are not lazy carry no diff ID; the config stands for it.
    not_lazy: BTreeMap<(BlobDigest, BlobDigest), Outcome>,
    toc: BTreeMap<(BlobDigest, DiffId), TocBlob>,
}

impl Reusable {
    /// Knows nothing yet.
    pub fn new(recipe: Recipe) -> Self {
        Self {
            recipe,
            ..Self::default()
        }
    }

    /// Remembers the layers of one converted manifest.
    pub fn add(&mut self, manifest: &Document) {
        let Ok(Some(config)) = manifest.single("config") else {
            return;
        };
        for descriptor in manifest.list("layers").unwrap_or_default() {
            let get = |name: &str| descriptor.annotations.get(name).map(String::as_str);
            if let Ok(LayerMark::Lazy(found)) = LayerMark::parse(get)
                && (found.blob, found.blob_bytes) == (descriptor.digest, descriptor.size)
            {
                self.annotated.insert((found.blob, found.diff_id), found);
            }
            let Some(Ok(source)) = get(SOURCE).map(str::parse::<BlobDigest>) else {
                continue;
            };
            if !self.recipe.made(&descriptor) {
                continue;
            }
            if self.recipe.format != LayerFormat::Sluice {
                if let Some((diff_id, toc)) = TocBlob::of_annotations(&descriptor) {
                    self.toc.insert((source, diff_id), toc);
                }
                continue;
            }
            match LayerMark::parse(get) {
                Ok(LayerMark::Lazy(found))
                    if found.blob == descriptor.digest && found.blob_bytes == descriptor.size =>
                {
                    self.lazy.insert((source, found.diff_id), found);
                }
                Ok(LayerMark::NotLazy(reason)) => {
                    let outcome = Outcome::NotLazy {
                        reason,
                        media_type: descriptor.media_type.clone(),
                        blob: descriptor.digest,
                        blob_bytes: descriptor.size,
                    };
                    self.not_lazy.insert((source, config.digest), outcome);
                }
                _ => {}
            }
        }
    }

    /// Whether the destination's manifest says the same of this blob: then it was checked before.
    pub fn confirms(&self, annotations: &LayerAnnotations) -> bool {
        let known = self.annotated.get(&(annotations.blob, annotations.diff_id));
        known.is_some_and(|known| {
            let pin = |of: &LayerAnnotations| (of.index_extent, of.index_digest, of.blob_bytes);
            pin(known) == pin(annotations)
        })
    }

    /// What `layer` of the image with `config` would become, if the destination has it.
    pub fn find(&self, layer: &PlannedLayer, config: &ImagePlan) -> Option<Outcome> {
        let source = layer.descriptor.digest;
        if let Some(found) = self.toc.get(&(source, layer.diff_id)) {
            return Some(Outcome::Toc(found.clone()));
        }
        if let Some(found) = self.lazy.get(&(source, layer.diff_id)) {
            let config = config.config_digest;
            return Some(Outcome::Lazy(LayerAnnotations {
                config,
                ..found.clone()
            }));
        }
        self.not_lazy.get(&(source, config.config.digest)).cloned()
    }
}
