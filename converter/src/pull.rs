// SPDX-License-Identifier: Apache-2.0
//! Pulls an image into containerd the way a modern client does: manifest and config first, then each
//! layer is offered to the snapshotter, and only what it declines is downloaded.
//!
//! `ctr` of containerd 1.x downloads every layer before it asks the snapshotter. For hosts that have
//! nothing else, this does what an unpacker does, through containerd's own services:
//!
//! ```text
//!  lease ─▶ index, manifest, config into the content store ─▶ per layer, lowest first:
//!     snapshot there?       ─▶ next
//!     Prepare(snapshot.ref) ─▶ AlreadyExists, and Stat finds it: lazy, next
//!                           ─▶ mounts: download, apply, compare diff ID, Commit
//!  ─▶ gc.ref.snapshot label on the config ─▶ image record ─▶ end of lease
//! ```
//!
//! The image record comes last: an interrupted pull leaves only what containerd collects.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Deserialize;
use sluice_blockindex::digest::{ChainId, DiffId};

use crate::containerd::{
    Containerd, ContainerdError, SOURCE_LABEL_PREFIX, child_labels, is_label, to_containerd,
};
use crate::image::{
    Descriptor, Document, DocumentKind, ImageError, ImageReader, Platform, read_small,
};
use crate::plan::{INDEX_DEPTH_MAX, PlanError, platform_of, require_platform, select};
use crate::report::{Event, Pulled, Reporter};

mod snapshots;

use snapshots::{Prepared, Snapshots};

/// The label by which a snapshotter learns which chain a Prepare is for.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// Annotations with this prefix are handed to the snapshotter.
const SNAPSHOT_PREFIX: &str = "containerd.io/snapshot/";

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The platform is not there.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// containerd refused, or a layer could not be read.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// An unpacked layer is another than the config says.
    #[error("layer {blob} unpacks to diff ID {actual}, the config says {expected}")]
    DiffId {
        /// The blob.
        blob: String,
        /// From the config.
        expected: String,
        /// From containerd.
        actual: String,
    },
}

/// Where and how to pull.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// containerd's socket.
    pub address: &'a Path,
    /// containerd namespace.
    pub namespace: &'a str,
    /// Name of the snapshotter in containerd.
    pub snapshotter: &'a str,
    /// Name of the image record.
    pub name: &'a str,
    /// Registry host and repository, for the labels by which the snapshotter finds them.
    pub repository: (&'a str, &'a str),
    /// Which image of an index.
    pub platform: Platform,
}

#[derive(Debug, Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Everything read and checked before containerd is changed.
struct Selected {
    root: Document,
    /// Documents with their labels, children first.
    documents: Vec<(Document, HashMap<String, String>)>,
    config: (Descriptor, Bytes),
    layers: Vec<(Descriptor, DiffId)>,
}

/// Pulls what `source` names.
///
/// **Cancel**: the lease expires within a day and takes what was made with it.
pub async fn pull(
    source: &dyn ImageReader,
    target: &Target<'_>,
    reporter: Arc<dyn Reporter>,
) -> Result<(), PullError> {
    let started = Instant::now();
    let selected = read_image(source, &target.platform).await?;
    let containerd = Containerd::connect(target.address, target.namespace).await?;
    let containerd = containerd.leased("sluice-pull").await?;
    let pulled = fill(&containerd, source, target, &selected, &*reporter).await;
    // The lease goes whatever happened; a failure is more interesting than that.
    let released = containerd.release().await;
    let (lazy, bytes) = pulled?;
    released?;
    reporter.event(&Event::PullSummary {
        image: target.name.to_owned(),
        digest: selected.root.digest.to_string(),
        layers: selected.layers.len() as u64,
        lazy,
        bytes,
        seconds: started.elapsed().as_secs_f64(),
    });
    Ok(())
}

/// Reads down to the config of the platform's image.
async fn read_image(source: &dyn ImageReader, platform: &Platform) -> Result<Selected, PullError> {
    let root = source.root().await?;
    let mut documents = Vec::new();
    let mut document = root.clone();
    while document.kind == DocumentKind::Index {
        if documents.len() >= INDEX_DEPTH_MAX {
            let what = format!("index {}", document.digest);
            let reason = format!("more than {INDEX_DEPTH_MAX} indexes within each other");
            return Err(ImageError::Invalid { what, reason }.into());
        }
        let entries = document.list("manifests")?;
        let wanted = std::slice::from_ref(platform);
        let chosen = select(source.label(), &entries, wanted)?;
        // An attestation is chosen with its image, and may stand before it.
        let is_image = |entry: &&Descriptor| {
            let found = entry.platform.as_ref();
            found.is_some_and(|found| !found.is_unknown() && platform.accepts(found))
        };
        let entry = chosen.iter().find(is_image).cloned();
        let entry = entry.ok_or_else(|| ImageError::Invalid {
            what: source.label().to_owned(),
            reason: "the index is empty".to_owned(),
        })?;
        let child = source.document(&entry).await?;
        documents.push((document.clone(), child_labels(&entries)));
        document = child;
    }
    let config = document
        .single("config")?
        .ok_or_else(|| ImageError::Invalid {
            what: format!("manifest {}", document.digest),
            reason: "no config".to_owned(),
        })?;
    let descriptors = document.list("layers")?;
    let bytes = read_small(source, &config).await?;
    let invalid = |reason: String| ImageError::Invalid {
        what: format!("config {} of {}", config.digest, source.label()),
        reason,
    };
    let parsed: Config = serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
    if documents.is_empty() {
        // No index has told the platform, but the config does.
        let found = platform_of(&bytes).map_err(|e| invalid(e.to_string()))?;
        // One that names none, as simple tools write it, contradicts nobody.
        if !found.is_unnamed() {
            let wanted = std::slice::from_ref(platform);
            require_platform(source.label(), &document, &found, wanted)?;
        }
    }
    let diff_ids = parsed
        .rootfs
        .diff_ids
        .iter()
        .map(|text| text.parse::<DiffId>());
    let diff_ids: Vec<DiffId> = diff_ids
        .collect::<Result<_, _>>()
        .map_err(|e| invalid(e.to_string()))?;
    if diff_ids.len() != descriptors.len() {
        let (layers, ids) = (descriptors.len(), diff_ids.len());
        return Err(invalid(format!("{ids} diff IDs for {layers} layers")).into());
    }
    let mut children = vec![config.clone()];
    children.extend(descriptors.iter().cloned());
    documents.push((document, child_labels(&children)));
    documents.reverse();
    let layers = descriptors.into_iter().zip(diff_ids).collect();
    Ok(Selected {
        root,
        documents,
        config: (config, bytes),
        layers,
    })
}

/// Does the work under the lease; returns the lazy layers and the bytes downloaded.
async fn fill(
    containerd: &Containerd,
    source: &dyn ImageReader,
    target: &Target<'_>,
    selected: &Selected,
    reporter: &dyn Reporter,
) -> Result<(u64, u64), PullError> {
    let mut origin = HashMap::new();
    let (host, repository) = target.repository;
    let name = format!("{SOURCE_LABEL_PREFIX}{host}");
    if is_label(&name, repository) {
        origin.insert(name, repository.to_owned());
    }
    let config_digest = selected.config.0.digest.to_string();
    containerd
        .write_small(&config_digest, &selected.config.1, origin.clone())
        .await?;
    for (document, labels) in &selected.documents {
        let mut labels = labels.clone();
        labels.extend(origin.clone());
        let digest = document.digest.to_string();
        containerd
            .write_small(&digest, &document.bytes, labels)
            .await?;
    }
    let snapshots = Snapshots {
        containerd,
        snapshotter: target.snapshotter,
    };
    let mut parent: Option<ChainId> = None;
    let (mut lazy, mut downloaded) = (0, 0);
    for (layer, diff_id) in &selected.layers {
        let chain = ChainId::child(parent, *diff_id);
        let unpack = Layer {
            descriptor: layer,
            diff_id: *diff_id,
            parent,
            chain,
        };
        let (how, bytes) = unpack.pull(snapshots, source, &origin, reporter).await?;
        reporter.event(&Event::LayerPulled {
            diff_id: diff_id.to_string(),
            blob: layer.digest.to_string(),
            how,
            bytes,
        });
        lazy += u64::from(how == Pulled::Lazy);
        downloaded += bytes;
        parent = Some(chain);
    }
    if let Some(chain) = parent {
        let name = format!("containerd.io/gc.ref.snapshot.{}", target.snapshotter);
        let labels = HashMap::from([(name, chain.to_string())]);
        containerd.label_content(&config_digest, &labels).await?;
    }
    containerd
        .put_image(target.name, to_containerd(&selected.root.descriptor()))
        .await?;
    Ok((lazy, downloaded))
}

/// One layer on its way.
struct Layer<'a> {
    descriptor: &'a Descriptor,
    diff_id: DiffId,
    parent: Option<ChainId>,
    chain: ChainId,
}

impl Layer<'_> {
    async fn pull(
        &self,
        snapshots: Snapshots<'_>,
        source: &dyn ImageReader,
        origin: &HashMap<String, String>,
        reporter: &dyn Reporter,
    ) -> Result<(Pulled, u64), PullError> {
        let chain = self.chain.to_string();
        if snapshots.has_snapshot(&chain).await? {
            return Ok((Pulled::Present, 0));
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        let parent = self
            .parent
            .map(|parent| parent.to_string())
            .unwrap_or_default();
        let mut attempt = 0;
        let (key, mounts) = loop {
            let key = format!("extract-{now}-{attempt} {chain}");
            match snapshots.prepare(&key, &parent, self.labels()).await? {
                Prepared::Active(mounts) => break (key, mounts),
                Prepared::Exists if snapshots.has_snapshot(&chain).await? => {
                    return Ok((Pulled::Lazy, 0));
                }
                // Somebody removed it between the two calls: ask again, but not for ever.
                Prepared::Exists if attempt < 3 => attempt += 1,
                Prepared::Exists => {
                    return Err(ContainerdError::Refused {
                        action: "prepare snapshot",
                        what: chain,
                        reason: "it exists, and it does not".to_owned(),
                    }
                    .into());
                }
            }
        };
        let unpacked = self
            .unpack(snapshots, source, origin, mounts, reporter)
            .await;
        match unpacked {
            Ok(bytes) => {
                snapshots.commit(&chain, &key).await?;
                Ok((Pulled::Unpacked, bytes))
            }
            Err(e) => {
                snapshots.remove(&key).await;
                Err(e)
            }
        }
    }

    /// What an unpacker tells the snapshotter.
    fn labels(&self) -> HashMap<String, String> {
        let mut labels: HashMap<String, String> = self
            .descriptor
            .annotations
            .iter()
            .filter(|(name, value)| name.starts_with(SNAPSHOT_PREFIX) && is_label(name, value))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        labels.insert(SNAPSHOT_REF.to_owned(), self.chain.to_string());
        labels
    }

    async fn unpack(
        &self,
        snapshots: Snapshots<'_>,
        source: &dyn ImageReader,
        origin: &HashMap<String, String>,
        mounts: Vec<containerd_client::types::Mount>,
        reporter: &dyn Reporter,
    ) -> Result<u64, PullError> {
        let containerd = snapshots.containerd;
        let (digest, total) = (self.descriptor.digest, self.descriptor.size);
        let name = digest.to_string();
        let mut labels = origin.clone();
        labels.insert(
            "containerd.io/uncompressed".to_owned(),
            self.diff_id.to_string(),
        );
        let mut downloaded = 0;
        if !containerd.label_content(&name, &labels).await? {
            reporter.event(&Event::LayerStarted {
                source: name.clone(),
                bytes: total,
            });
            let body = source.blob(digest, total).await?;
            let progress = |bytes| reporter.progress(&name, bytes);
            containerd
                .write_content(&name, total, labels, body, &progress)
                .await?;
            downloaded = total;
        }
        let actual = snapshots
            .apply(to_containerd(self.descriptor), mounts)
            .await?;
        if actual != self.diff_id.to_string() {
            let (blob, expected) = (name, self.diff_id.to_string());
            return Err(PullError::DiffId {
                blob,
                expected,
                actual,
            });
        }
        Ok(downloaded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::document::{OCI_CONFIG, OCI_INDEX, OCI_MANIFEST};
    use crate::image::memory::MemoryImage;
    use serde_json::json;
    use sluice_blockindex::digest::BlobDigest;

    /// A store with one image for `platform`, and that image's manifest.
    fn single(platform: &str) -> (MemoryImage, Document) {
        let store = MemoryImage::new("store");
        let (os, architecture) = platform.split_once('/').unwrap();
        let config = json!({"os": os, "architecture": architecture, "rootfs": {"diff_ids": []}});
        let config = config.to_string().into_bytes();
        let bytes = config.len() as u64;
        let config = Descriptor::new(OCI_CONFIG, store.insert_blob(config), bytes);
        let value =
            json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []});
        let manifest = Document::of_value(OCI_MANIFEST, value);
        store.insert_document(&manifest, true);
        (store, manifest)
    }

    fn index_of(store: &MemoryImage, entries: &[Descriptor]) -> Document {
        let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        let index = Document::of_value(OCI_INDEX, value);
        store.insert_document(&index, true);
        index
    }

    fn linux(architecture: &str) -> Platform {
        Platform::parse(&format!("linux/{architecture}")).unwrap()
    }

    #[tokio::test]
    async fn a_single_image_of_another_platform_is_refused() {
        let (store, manifest) = single("linux/arm64");
        let error = read_image(&store, &linux("amd64")).await.err().unwrap();
        assert!(matches!(
            &error,
            PullError::Plan(PlanError::NoSuchPlatform { available, .. }) if *available == ["linux/arm64"]
        ));
        let selected = read_image(&store, &linux("arm64")).await.unwrap();
        assert_eq!(selected.root.digest, manifest.digest);
        let (unnamed, _) = single("/");
        assert!(read_image(&unnamed, &linux("amd64")).await.is_ok());
    }

    #[tokio::test]
    async fn an_attestation_before_its_image_is_not_pulled() {
        let (store, manifest) = single("linux/amd64");
        let mut entry = manifest.descriptor();
        entry.platform = Some(linux("amd64"));
        let mut attestation = Descriptor::new(OCI_MANIFEST, BlobDigest::of(b"attestation"), 1);
        attestation.platform = Some(Platform::parse("unknown/unknown").unwrap());
        attestation.annotations.insert(
            "vnd.docker.reference.digest".into(),
            manifest.digest.to_string(),
        );
        index_of(&store, &[attestation, entry]);
        let selected = read_image(&store, &linux("amd64")).await.unwrap();
        let digests: Vec<_> = selected.documents.iter().map(|(d, _)| d.digest).collect();
        assert_eq!(digests[0], manifest.digest);
    }

    #[tokio::test]
    async fn indexes_are_followed_to_a_depth() {
        for (depth, allowed) in [(INDEX_DEPTH_MAX, true), (INDEX_DEPTH_MAX + 1, false)] {
            let (store, manifest) = single("linux/amd64");
            let mut document = manifest;
            for _ in 0..depth {
                let mut entry = document.descriptor();
                entry.platform = Some(linux("amd64"));
                document = index_of(&store, &[entry]);
            }
            let selected = read_image(&store, &linux("amd64")).await;
            assert_eq!(selected.is_ok(), allowed, "{depth} indexes");
        }
    }

    #[test]
    fn only_snapshot_annotations_that_fit_are_handed_over() {
        let mut descriptor = Descriptor::new("x", BlobDigest::of(b"l"), 1);
        for (name, value) in [
            ("containerd.io/snapshot/sluice.index.size", "7".to_owned()),
            ("containerd.io/snapshot/long", "x".repeat(4096)),
            ("sluice.source", "s".to_owned()),
        ] {
            descriptor.annotations.insert(name.to_owned(), value);
        }
        let diff_id = DiffId::of(b"tar");
        let chain = ChainId::child(None, diff_id);
        let labels = Layer {
            descriptor: &descriptor,
            diff_id,
            parent: None,
            chain,
        }
        .labels();
        assert_eq!(labels.len(), 2);
        assert_eq!(labels["containerd.io/snapshot/sluice.index.size"], "7");
        assert_eq!(labels[SNAPSHOT_REF], chain.to_string());
    }
}
