// SPDX-License-Identifier: Apache-2.0
//! What `sluice why` and `sluice status` are told later: why a layer was not lazy, which images were
//! seen. Written after the answer to containerd, by tasks of ours; losing one loses an explanation.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sluice_blockindex::digest::ChainId;

use super::Inner;
use crate::boot::Boot;
use crate::plan::Refusal;
use crate::resolve::ResolvedImage;
use crate::snapshots::LABEL_SNAPSHOT_REF;
use crate::store::{DocumentTable, StoreError};

/// How long a document outlives its snapshots: an image is remembered before its first layer is
/// committed, and a pull may take this long.
const DOCUMENT_GRACE_SECONDS: u64 = 3600;

/// Why a layer is as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// The fixed word, see [`crate::plan::RefusalKind`].
    pub kind: String,
    /// For people.
    pub reason: String,
    /// Whether the layer was unpacked here, so that those above could be lazy.
    pub unpacked: bool,
    /// Seconds since 1970.
    pub at: u64,
}

/// A layer of an image that was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// Up to this layer.
    pub chain_id: String,
    /// Of this layer.
    pub diff_id: String,
    /// In the manifest.
    pub blob: String,
    /// In the manifest.
    pub blob_bytes: u64,
}

/// An image that was seen: pulled, with lazy layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDocument {
    /// containerd namespace.
    pub namespace: String,
    /// The manifest that is lazy most.
    pub manifest: String,
    /// The image config.
    pub config: String,
    /// Lowest first.
    pub layers: Vec<ImageLayer>,
    /// Seconds since 1970.
    pub at: u64,
}

/// The key of a [`Decision`].
#[must_use]
pub fn decision_key(namespace: &str, chain_id: ChainId) -> String {
    format!("{namespace}/{chain_id}")
}

pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}

impl Inner {
    /// Remembers why a layer is not lazy.
    pub(super) fn remember(
        self: &Arc<Self>,
        namespace: &str,
        chain_id: ChainId,
        refusal: &Refusal,
        unpacked: bool,
    ) {
        let decision = Decision {
            kind: refusal.kind.as_str().to_owned(),
            reason: refusal.reason.clone(),
            unpacked,
            at: now(),
        };
        let key = decision_key(namespace, chain_id);
        self.write(move |inner| {
            inner
                .parts
                .metadata
                .put_document(DocumentTable::Decisions, &key, &decision)
        });
    }

    /// A layer became lazy: an earlier reason why not is out of date.
    pub(super) fn forget(self: &Arc<Self>, namespace: &str, chain_id: ChainId) {
        let key = decision_key(namespace, chain_id);
        self.write(move |inner| {
            inner
                .parts
                .metadata
                .remove_document(DocumentTable::Decisions, &key)
                .map(drop)
        });
    }

    /// Remembers an image.
    pub(super) fn remember_image(self: &Arc<Self>, namespace: &str, image: &ResolvedImage) {
        let Some(manifest) = image.manifests.first() else {
            return;
        };
        let layers = manifest
            .manifest
            .layers
            .iter()
            .zip(&image.diff_ids)
            .zip(&image.chain_ids);
        let document = ImageDocument {
            namespace: namespace.to_owned(),
            manifest: manifest.digest.to_string(),
            config: image.config.to_string(),
            layers: layers
                .map(|((descriptor, diff_id), chain_id)| ImageLayer {
                    chain_id: chain_id.to_string(),
                    diff_id: diff_id.to_string(),
                    blob: descriptor.digest.clone(),
                    blob_bytes: descriptor.size_bytes,
                })
                .collect(),
            at: now(),
        };
        let key = format!("{namespace}/{}", document.manifest);
        self.write(move |inner| {
            inner
                .parts
                .metadata
                .put_document(DocumentTable::Images, &key, &document)
        });
    }

    /// Drops what is remembered of layers that are gone. Blocks.
    pub(super) fn sweep_documents(&self) -> Result<(), StoreError> {
        let metadata = &self.parts.metadata;
        // By chain ID alone: a snapshot that answered a Prepare serves all namespaces.
        let mut there = BTreeSet::new();
        for record in metadata.list(|_| true)? {
            let wanted = record.labels.get(LABEL_SNAPSHOT_REF).cloned();
            there.extend(
                record
                    .chain_id()
                    .map(|chain_id| chain_id.to_string())
                    .or(wanted),
            );
        }
        let old = |at: u64| now().saturating_sub(at) > DOCUMENT_GRACE_SECONDS;
        for (key, decision) in metadata.documents::<Decision>(DocumentTable::Decisions)? {
            let chain_id = key.split_once('/').map_or("", |(_, chain_id)| chain_id);
            if old(decision.at) && !there.contains(chain_id) {
                metadata.remove_document(DocumentTable::Decisions, &key)?;
            }
        }
        for (key, image) in metadata.documents::<ImageDocument>(DocumentTable::Images)? {
            let alive = image
                .layers
                .iter()
                .any(|layer| there.contains(&layer.chain_id));
            if old(image.at) && !alive {
                metadata.remove_document(DocumentTable::Images, &key)?;
            }
        }
        // Those outlive their image: the next pull of it is what they are for.
        Boot::sweep(metadata)
    }

    /// Runs a short transaction after the answer.
    pub(super) fn write<E: std::fmt::Display>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<(), E> + Send + 'static,
    ) {
        // Called when a future is dropped, too, and that may be the end of the runtime.
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let inner = Arc::clone(self);
        self.tasks.spawn_blocking(move || {
            if let Err(error) = work(&inner) {
                tracing::warn!("failed to remember a decision: {error}");
            }
        });
    }
}
