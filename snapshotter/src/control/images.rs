// SPDX-License-Identifier: Apache-2.0
//! From what a user calls an image to its manifests in containerd's content store.

use std::collections::BTreeSet;

use sluice_blockindex::digest::ConfigDigest;
use sluice_fetcher::registry::ImageReference;

use super::{ControlError, ControlService};
use crate::resolve::{
    ContentError, DOCUMENT_CAP_BYTES, Manifest, ManifestList, manifests_naming, port_hints,
    repositories_of,
};
use crate::snapshots::BlobOrigin;

/// A manifest that an image leads to.
#[derive(Clone, Debug)]
pub(super) struct FoundManifest {
    pub namespace: String,
    pub digest: String,
    pub manifest: Manifest,
    /// Where the image was seen.
    pub origins: Vec<BlobOrigin>,
}

impl FoundManifest {
    pub(super) fn config(&self) -> Result<ConfigDigest, ControlError> {
        let digest = &self.manifest.config.digest;
        digest
            .parse()
            .map_err(|_| ControlError::Digest(digest.clone()))
    }
}

impl ControlService {
    /// The namespaces to look into.
    async fn namespaces(&self, namespace: &str) -> Result<Vec<String>, ContentError> {
        if namespace.is_empty() {
            return self.containerd.namespaces().await;
        }
        Ok(vec![namespace.to_owned()])
    }

    /// The manifests of an image that containerd has, in these namespaces (empty: all).
    ///
    /// **Errors** [`ControlError::NoImage`] when there is none.
    pub(super) async fn find(
        &self,
        image: &str,
        namespace: &str,
    ) -> Result<Vec<FoundManifest>, ControlError> {
        let mut found = Vec::new();
        for namespace in self.namespaces(namespace).await? {
            for target in self.targets(image, &namespace).await? {
                self.manifests_of(&namespace, &target, &mut found).await?;
            }
        }
        if found.is_empty() {
            return Err(ControlError::NoImage(image.to_owned()));
        }
        Ok(found)
    }

    /// Digests of manifests or indexes that the text may mean.
    async fn targets(
        &self,
        image: &str,
        namespace: &str,
    ) -> Result<BTreeSet<String>, ContentError> {
        if image.starts_with("sha256:") {
            let mut targets = BTreeSet::from([image.to_owned()]);
            let manifests = manifests_naming(&*self.content, namespace, image).await?;
            targets.extend(manifests.into_iter().map(|info| info.digest));
            return Ok(targets);
        }
        let mut names = BTreeSet::from([image.to_owned()]);
        if let Ok(reference) = image.parse::<ImageReference>() {
            names.insert(reference.to_string());
        }
        let images = self.containerd.images(namespace, Vec::new()).await?;
        let fits = images.into_iter().filter(|(name, ..)| names.contains(name));
        Ok(fits.map(|(_, digest, _)| digest).collect())
    }

    /// Adds the manifests behind a digest: itself, or those of an index that are there.
    async fn manifests_of(
        &self,
        namespace: &str,
        target: &str,
        found: &mut Vec<FoundManifest>,
    ) -> Result<(), ContentError> {
        let mut origins = BTreeSet::new();
        let mut pending = vec![target.to_owned()];
        while let Some(digest) = pending.pop() {
            let Some(info) = self.content.info(namespace, &digest).await? else {
                continue;
            };
            origins.extend(repositories_of(&info.labels));
            if info.size_bytes > DOCUMENT_CAP_BYTES as u64 {
                continue;
            }
            let read = self
                .content
                .read(namespace, &digest, DOCUMENT_CAP_BYTES)
                .await?;
            let Some(bytes) = read else { continue };
            if let Ok(manifest) = Manifest::parse(&bytes) {
                let origins: Vec<BlobOrigin> = origins.iter().cloned().collect();
                let hints = port_hints(&manifest);
                let origins = self.lazy.candidates(namespace, &origins, hints).await;
                found.push(FoundManifest {
                    namespace: namespace.to_owned(),
                    digest,
                    manifest,
                    origins,
                });
            } else if digest == target
                && let Ok(list) = ManifestList::parse(&bytes)
            {
                pending.extend(list.manifests.into_iter().map(|entry| entry.digest));
            }
        }
        Ok(())
    }

    /// The names of all images of a namespace with the manifests that they lead to; empty when
    /// containerd does not answer.
    pub(super) async fn names(&self, namespace: &str) -> Vec<(String, Vec<String>)> {
        let images = match self.containerd.images(namespace, Vec::new()).await {
            Ok(images) => images,
            Err(error) => {
                tracing::info!(namespace, "leave image names out: {error}");
                return Vec::new();
            }
        };
        let mut names = Vec::with_capacity(images.len());
        for (name, target, _) in images {
            let mut digests = vec![target.clone()];
            let read = self
                .content
                .read(namespace, &target, DOCUMENT_CAP_BYTES)
                .await;
            if let Ok(Some(bytes)) = read
                && let Ok(list) = ManifestList::parse(&bytes)
            {
                digests.extend(list.manifests.into_iter().map(|entry| entry.digest));
            }
            names.push((name, digests));
        }
        names
    }
}
