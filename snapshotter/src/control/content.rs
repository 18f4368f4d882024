// SPDX-License-Identifier: Apache-2.0
//! Putting the blobs of skipped layers into containerd's content store.
//!
//! For each manifest of the image that containerd has: each layer that is not in the content store is
//! fetched from a registry, compressed as it is there, and written under a lease; then the manifest
//! gets the labels by which containerd's GC keeps its layers, where a client left them out. What is
//! there is not fetched again, and a blob that broke off is continued.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::host_name;
use sluice_proto::control::CompleteContentProgress;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::images::FoundManifest;
use super::ingest::{Ingest, Lease, add_labels};
use super::{ControlError, ControlService, ProgressStream, status_of};
use crate::resolve::{Descriptor, SOURCE_LABEL_PREFIX};
use crate::snapshots::BlobOrigin;

/// Labels of a manifest by which the GC keeps its layers: prefix, then the layer's place.
const LAYER_LABEL_PREFIX: &str = "containerd.io/gc.ref.content.l.";
/// Begins all labels by which a content keeps others.
const REFERENCE_PREFIX: &str = "containerd.io/gc.ref.content";
/// Reports that wait for the client; further ones are left out, except the last of a blob.
const QUEUED_REPORTS: usize = 64;

type Reports = mpsc::Sender<Result<CompleteContentProgress, Status>>;

impl ControlService {
    /// Starts the work; it ends when the client goes away.
    pub(super) fn complete_content(self, image: String, namespace: String) -> ProgressStream {
        let (reports, receiver) = mpsc::channel(QUEUED_REPORTS);
        let tasks = self.tasks.clone();
        tasks.spawn(async move {
            let work = self.complete_image(&image, &namespace, &reports);
            let result = tokio::select! {
                result = work => result,
                () = reports.closed() => return,
                () = self.stop.cancelled() => Err(ControlError::Stopping),
            };
            if let Err(error) = result {
                tracing::warn!(image, namespace, "failed to complete content: {error}");
                // A client that is gone needs no answer.
                let _ = reports.send(Err(status_of(&error))).await;
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }

    async fn complete_image(
        &self,
        image: &str,
        namespace: &str,
        reports: &Reports,
    ) -> Result<(), ControlError> {
        for manifest in self.find(image, namespace).await? {
            let lease = Lease::take(&self.containerd, &manifest.namespace).await?;
            let completed = self.complete_manifest(&manifest, &lease, reports).await;
            let released = lease.release().await;
            completed?;
            released?;
        }
        Ok(())
    }

    async fn complete_manifest(
        &self,
        found: &FoundManifest,
        lease: &Lease,
        reports: &Reports,
    ) -> Result<(), ControlError> {
        for layer in &found.manifest.layers {
            // A foreign layer is not in the registry, and no client fetches it.
            if layer.urls.is_empty() {
                self.complete_layer(found, layer, lease, reports).await?;
            }
        }
        let info = self.content.info(&found.namespace, &found.digest).await?;
        let labels = info.map(|info| info.labels).unwrap_or_default();
        let missing = missing_references(&found.manifest.layers, &labels);
        if !missing.is_empty() {
            add_labels(&self.containerd, &found.namespace, &found.digest, missing).await?;
        }
        Ok(())
    }

    async fn complete_layer(
        &self,
        found: &FoundManifest,
        layer: &Descriptor,
        lease: &Lease,
        reports: &Reports,
    ) -> Result<(), ControlError> {
        let digest = &layer.digest;
        let blob: BlobDigest = digest
            .parse()
            .map_err(|_| ControlError::Digest(digest.clone()))?;
        let report = |offset: u64, done: bool| CompleteContentProgress {
            blob_digest: digest.clone(),
            offset,
            total: layer.size_bytes,
            done,
        };
        let there = self.content.info(&found.namespace, digest).await?.is_some();
        if !there {
            let origins = self.origins(found, blob).await?;
            if origins.is_empty() {
                return Err(ControlError::NoSource(digest.clone()));
            }
            let layers = &self.lazy.parts().layers;
            let source = layers.source(blob, layer.size_bytes, &origins);
            let labels = source_labels(&origins);
            let ingest = Ingest {
                blob,
                blob_bytes: layer.size_bytes,
                labels,
            };
            let mut progress = |offset| {
                // A full queue drops a report; the last one of a blob is sent below.
                let _ = reports.try_send(Ok(report(offset, false)));
            };
            ingest.run(lease, &*source, &mut progress).await?;
        }
        let _ = reports.send(Ok(report(layer.size_bytes, true))).await;
        Ok(())
    }

    /// Where the blob can be fetched from.
    async fn origins(
        &self,
        found: &FoundManifest,
        blob: BlobDigest,
    ) -> Result<Vec<BlobOrigin>, ControlError> {
        let layers = self.metadata(|metadata| metadata.layers()).await?;
        let mut origins = found.origins.clone();
        let same = layers
            .into_iter()
            .filter(|(_, layer)| layer.blob_digest == blob);
        for origin in same.flat_map(|(_, layer)| layer.sources) {
            if !origins.contains(&origin) {
                origins.push(origin);
            }
        }
        Ok(origins)
    }
}

/// The labels by which clients know where a content came from.
fn source_labels(origins: &[BlobOrigin]) -> HashMap<String, String> {
    // As containerd writes them: without the port, and without the brackets of an IPv6 address.
    let mut by_host: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for origin in origins {
        let host = host_name(&origin.host);
        let inner = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
        let host = inner.unwrap_or(host);
        by_host.entry(host).or_default().insert(&origin.repository);
    }
    by_host
        .into_iter()
        .map(|(host, repositories)| {
            (
                format!("{SOURCE_LABEL_PREFIX}{host}"),
                repositories.into_iter().collect::<Vec<_>>().join(","),
            )
        })
        .collect()
}

/// The labels that a manifest lacks to keep its layers.
fn missing_references(
    layers: &[Descriptor],
    labels: &BTreeMap<String, String>,
) -> HashMap<String, String> {
    let kept: BTreeSet<&str> = labels
        .iter()
        .filter(|(key, _)| key.starts_with(REFERENCE_PREFIX))
        .map(|(_, value)| value.as_str())
        .collect();
    let lacking = layers.iter().enumerate();
    lacking
        .filter(|(_, layer)| layer.urls.is_empty() && !kept.contains(layer.digest.as_str()))
        .map(|(place, layer)| (format!("{LAYER_LABEL_PREFIX}{place}"), layer.digest.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(digest: &str) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: digest.into(),
            size_bytes: 1,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
        }
    }

    #[test]
    fn only_layers_that_nothing_keeps_get_a_label() {
        let mut foreign = layer("f");
        foreign.urls.push("https://elsewhere.example/".into());
        let layers = [layer("a"), layer("b"), foreign];
        let kept = (
            "containerd.io/gc.ref.content.l.0".to_owned(),
            "a".to_owned(),
        );
        let labels = BTreeMap::from([kept, ("other".to_owned(), "b".to_owned())]);
        let want = HashMap::from([(format!("{LAYER_LABEL_PREFIX}1"), "b".to_owned())]);
        assert_eq!(missing_references(&layers, &labels), want);
    }

    #[test]
    fn repositories_of_a_host_share_a_label() {
        let origin = |host: &str, repository: &str| BlobOrigin {
            host: host.into(),
            repository: repository.into(),
        };
        let origins = [
            origin("h:1", "a"),
            origin("h:1", "b"),
            origin("g", "c"),
            origin("[::1]:5000", "d"),
            origin("[::1]", "e"),
        ];
        let want = HashMap::from([
            (format!("{SOURCE_LABEL_PREFIX}::1"), "d,e".to_owned()),
            (format!("{SOURCE_LABEL_PREFIX}h"), "a,b".to_owned()),
            (format!("{SOURCE_LABEL_PREFIX}g"), "c".to_owned()),
        ]);
        assert_eq!(source_labels(&origins), want);
    }
}
