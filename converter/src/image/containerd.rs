// SPDX-License-Identifier: Apache-2.0
//! One image in containerd's own store: its record names a manifest or index in the content store.
//!
//! An image that was pulled for one platform, or lazily, lacks blobs. They are read from where it came
//! from: the `containerd.io/distribution.source.<host>` labels of what is there say the repository, and so
//! does the image's name. They say no port; the name may, and so may the annotations of converted
//! layers. What comes from there is verified like all else, so a wrong label costs a request.
//!
//! Writing goes on under a lease: blobs first, then documents with the labels that keep what they name,
//! the image record last, so that source and destination may be one name. [`ImageWriter::close`] ends
//! the lease; who dies leaves it to expire within a day, and until then a second run finds the blobs.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use sluice_blockindex::annotations::PORT;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_fetcher::registry::{ImageReference, RegistryClient, host_name, port_of};
use tokio::sync::OnceCell;

use super::file_body::body;
use super::registry::RegistryImage;
use super::{
    BlobBody, DOCUMENT_MAX_BYTES, Descriptor, Document, ImageError, ImageReader, ImageWriter,
    Location, Repository,
};
use crate::containerd::{
    Containerd, ContainerdError, SOURCE_LABEL_PREFIX, child_labels, to_containerd,
};

/// Repositories that are asked for a blob. An image has one, or one for each mirror that it came by.
const ORIGINS_MAX: usize = 16;

/// Where containerd is.
#[derive(Debug, Clone)]
pub struct Store {
    /// Its socket.
    pub address: PathBuf,
    /// The namespace.
    pub namespace: String,
}

/// One image by its name there.
#[derive(Debug)]
pub struct ContainerdImage {
    store: Store,
    /// As the user wrote it.
    name: String,
    label: String,
    registries: RegistryClient,
    connection: OnceCell<Containerd>,
    /// The connection under a lease, from the first write on.
    writing: OnceCell<Containerd>,
    origins: Mutex<Origins>,
}

fn failed(error: ContainerdError) -> ImageError {
    match error {
        ContainerdError::Refused {
            action,
            what,
            reason,
        } => ImageError::failed(action, what, format!("containerd: {reason}")),
        ContainerdError::Source(error) => error,
    }
}

impl ContainerdImage {
    /// The image of this name; nothing is asked yet. `registries` are asked for what is missing.
    pub fn new(store: Store, name: &str, registries: RegistryClient) -> Self {
        let location = Location::Containerd(name.to_owned());
        Self {
            store,
            name: name.to_owned(),
            label: location.to_string(),
            registries,
            connection: OnceCell::new(),
            writing: OnceCell::new(),
            origins: Mutex::new(Origins::of_name(name)),
        }
    }

    async fn connection(&self) -> Result<&Containerd, ImageError> {
        let connect = || Containerd::connect(&self.store.address, &self.store.namespace);
        let connected = self.connection.get_or_try_init(connect).await;
        connected.map_err(failed)
    }

    async fn writing(&self) -> Result<&Containerd, ImageError> {
        let connection = self.connection().await?;
        let lease = || connection.leased("sluice-convert");
        let leased = self.writing.get_or_try_init(lease).await;
        leased.map_err(failed)
    }

    /// The names by which containerd may know the image: as written, and with Docker's defaults, as
    /// nerdctl and Kubernetes write them.
    fn names(&self) -> Vec<String> {
        let mut names = vec![self.name.clone()];
        if let Ok(reference) = self.name.parse::<ImageReference>() {
            names.push(reference.to_string());
        }
        names.dedup();
        names
    }

    /// All of a small blob of the content store; `None` if it is not there.
    async fn small(&self, digest: BlobDigest) -> Result<Option<Bytes>, ImageError> {
        use futures::TryStreamExt;
        let containerd = self.connection().await?;
        let digest = digest.to_string();
        let Some(info) = containerd.content(&digest).await.map_err(failed)? else {
            return Ok(None);
        };
        self.origins().add_labels(&info.labels);
        if info.bytes > DOCUMENT_MAX_BYTES {
            return Err(ImageError::Invalid {
                what: format!("{digest} in {}", self.label),
                reason: format!("a manifest of {} bytes is too large", info.bytes),
            });
        }
        let body = containerd.read_content(&digest, 0, 0).await;
        let parts: Vec<Bytes> = body.map_err(failed)?.try_collect().await?;
        Ok(Some(parts.concat().into()))
    }

    fn origins(&self) -> std::sync::MutexGuard<'_, Origins> {
        self.origins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image in each repository that may have what the content store lacks.
    fn origin_images(&self) -> Vec<RegistryImage> {
        let places = self.origins().repositories().into_iter();
        // Only digests are asked for; the tag is none of them.
        let references = places.filter_map(|place| place.tagged("latest").ok());
        references
            .map(|reference| RegistryImage::new(self.registries.clone(), reference))
            .collect()
    }

    /// The name that the record has, or is to have.
    async fn record(&self) -> Result<String, ImageError> {
        let containerd = self.connection().await?;
        let mut names = self.names();
        for name in &names {
            if containerd.image(name).await.map_err(failed)?.is_some() {
                return Ok(name.clone());
            }
        }
        Ok(names.pop().unwrap_or_default())
    }
}

#[async_trait]
impl ImageReader for ContainerdImage {
    fn label(&self) -> &str {
        &self.label
    }

    async fn root(&self) -> Result<Document, ImageError> {
        let containerd = self.connection().await?;
        for name in self.names() {
            let Some(target) = containerd.image(&name).await.map_err(failed)? else {
                continue;
            };
            let invalid = |reason: String| ImageError::Invalid {
                what: self.label.clone(),
                reason,
            };
            let digest = target.digest.parse();
            let digest = digest.map_err(|e| invalid(format!("digest {:?}: {e}", target.digest)))?;
            let size = u64::try_from(target.size).map_err(|e| invalid(e.to_string()))?;
            let descriptor = Descriptor::new(&target.media_type, digest, size);
            return self.document(&descriptor).await;
        }
        Err(ImageError::NotFound {
            what: format!("{} in namespace {}", self.label, self.store.namespace),
        })
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, ImageError> {
        let what = format!("manifest {} in {}", descriptor.digest, self.label);
        let document = match self.small(descriptor.digest).await? {
            Some(bytes) => Document::verified(&what, descriptor, bytes)?,
            None => {
                let mut missing = Missing::new(what);
                let mut found = None;
                for origin in self.origin_images() {
                    match origin.document(descriptor).await {
                        Ok(document) => {
                            found = Some(document);
                            break;
                        }
                        Err(e) => missing.add(e),
                    }
                }
                found.ok_or_else(|| missing.error())?
            }
        };
        for layer in document.list("layers").unwrap_or_default() {
            if let Some(Ok(port)) = layer.annotations.get(PORT).map(|port| port.parse()) {
                self.origins().add_port(port);
            }
        }
        Ok(document)
    }

    async fn blob(&self, digest: BlobDigest, bytes: u64) -> Result<BlobBody, ImageError> {
        let containerd = self.connection().await?;
        let name = digest.to_string();
        if let Some(info) = containerd.content(&name).await.map_err(failed)? {
            self.origins().add_labels(&info.labels);
            return containerd.read_content(&name, 0, 0).await.map_err(failed);
        }
        let mut missing = Missing::new(format!("blob {digest} in {}", self.label));
        for origin in self.origin_images() {
            match origin.blob(digest, bytes).await {
                Ok(body) => return Ok(body),
                Err(e) => missing.add(e),
            }
        }
        Err(missing.error())
    }

    async fn range(
        &self,
        digest: BlobDigest,
        blob_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Bytes, ImageError> {
        use futures::TryStreamExt;
        let containerd = self.connection().await?;
        let name = digest.to_string();
        let what = format!("blob {digest} in {}", self.label);
        let Some(info) = containerd.content(&name).await.map_err(failed)? else {
            let mut missing = Missing::new(what);
            for origin in self.origin_images() {
                match origin.range(digest, blob_bytes, extent).await {
                    Ok(part) => return Ok(part),
                    Err(e) => missing.add(e),
                }
            }
            return Err(missing.error());
        };
        if extent.end() > info.bytes {
            let reason = format!("{} bytes, asked up to {}", info.bytes, extent.end());
            return Err(ImageError::failed("read", what, reason));
        }
        if extent.is_empty() {
            return Ok(Bytes::new());
        }
        let body = containerd.read_content(&name, extent.start(), extent.len());
        let parts: Vec<Bytes> = body.await.map_err(failed)?.try_collect().await?;
        Ok(parts.concat().into())
    }
}

#[async_trait]
impl ImageWriter for ContainerdImage {
    async fn has_blob(&self, digest: BlobDigest, bytes: u64) -> Result<bool, ImageError> {
        let containerd = self.writing().await?;
        let digest = digest.to_string();
        // Before the look, so that what is seen stays.
        containerd.keep(&digest).await.map_err(failed)?;
        let info = containerd.content(&digest).await.map_err(failed)?;
        Ok(info.is_some_and(|info| info.bytes == bytes))
    }

    async fn put_blob(
        &self,
        digest: BlobDigest,
        bytes: u64,
        spool: Arc<File>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ImageError> {
        let containerd = self.writing().await?;
        let what = format!("blob {digest}");
        let all = Extent::from_length(0, bytes)
            .ok_or_else(|| ImageError::failed("read", &what, "too large"))?;
        let body = body(spool, all, what);
        let digest = digest.to_string();
        let written = containerd.write_content(&digest, bytes, HashMap::new(), body, progress);
        written.await.map_err(failed)
    }

    async fn put_document(&self, document: &Document) -> Result<(), ImageError> {
        let containerd = self.writing().await?;
        let mut children = document.list("manifests")?;
        children.extend(document.single("config")?);
        children.extend(document.list("layers")?);
        let labels = child_labels(&children);
        let digest = document.digest.to_string();
        let written = containerd.write_small(&digest, &document.bytes, labels);
        written.await.map_err(failed)
    }

    async fn name(&self, document: &Document) -> Result<(), ImageError> {
        self.put_document(document).await?;
        let containerd = self.writing().await?;
        let target = to_containerd(&document.descriptor());
        let name = self.record().await?;
        containerd.put_image(&name, target).await.map_err(failed)
    }

    async fn close(&self) {
        if let Some(containerd) = self.writing.get()
            && let Err(e) = containerd.release().await
        {
            tracing::warn!("lease stays until it expires: {e}");
        }
    }
}

/// What no repository gave, and why the last did not.
#[derive(Debug)]
struct Missing {
    what: String,
    last: Option<ImageError>,
}

impl Missing {
    fn new(what: String) -> Self {
        Self { what, last: None }
    }

    fn add(&mut self, error: ImageError) {
        tracing::debug!(what = self.what, %error, "origin has not what is missing");
        // That it is not there says less than that somebody could not be asked.
        if !error.is_not_found() || self.last.is_none() {
            self.last = Some(error);
        }
    }

    fn error(self) -> ImageError {
        let what = self.what;
        match self.last {
            Some(ImageError::Failed { action, reason, .. }) => ImageError::Failed {
                action,
                what: format!("{what}, which is not in the content store,"),
                reason,
            },
            _ => ImageError::NotFound { what },
        }
    }
}

/// Repositories that an image may have come from, best first.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Origins {
    named: Option<Repository>,
    /// Host without a port, and repository.
    labelled: Vec<(String, String)>,
    ports: Vec<u16>,
}

impl Origins {
    fn of_name(name: &str) -> Self {
        let reference = name.parse::<ImageReference>().ok();
        Self {
            named: reference.map(|reference| reference.place().clone()),
            ..Self::default()
        }
    }

    fn add_labels(&mut self, labels: &HashMap<String, String>) {
        let mut found: Vec<(String, String)> = labels
            .iter()
            .filter_map(|(name, value)| Some((name.strip_prefix(SOURCE_LABEL_PREFIX)?, value)))
            .flat_map(|(host, value)| {
                let names = value.split(',');
                names.map(move |name| (host.to_owned(), name.to_owned()))
            })
            .collect();
        found.sort();
        for origin in found {
            if self.labelled.len() < ORIGINS_MAX && !self.labelled.contains(&origin) {
                self.labelled.push(origin);
            }
        }
    }

    fn add_port(&mut self, port: u16) {
        if self.ports.len() < ORIGINS_MAX && !self.ports.contains(&port) {
            self.ports.push(port);
        }
    }

    /// The hosts that a label may mean: labels have no ports.
    fn hosts(&self, host: &str) -> Vec<String> {
        let named = self.named.as_ref().map(Repository::host);
        let mut hosts = Vec::new();
        if let Some(named) = named
            && host_name(named) == host
            && port_of(named).is_some()
        {
            hosts.push(named.to_owned());
        }
        hosts.extend(self.ports.iter().map(|port| format!("{host}:{port}")));
        hosts.push(host.to_owned());
        hosts
    }

    fn repositories(&self) -> Vec<Repository> {
        let labelled = self.labelled.iter().flat_map(|(host, name)| {
            let hosts = self.hosts(host).into_iter();
            hosts.filter_map(|host| Repository::new(&host, name).ok())
        });
        let mut places: Vec<Repository> = Vec::new();
        // Last the name, which may be a local one that says nothing.
        for place in labelled.chain(self.named.iter().cloned()) {
            if places.len() < ORIGINS_MAX && !places.contains(&place) {
                places.push(place);
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(name: &str, labels: &[(&str, &str)], ports: &[u16]) -> Vec<String> {
        let mut origins = Origins::of_name(name);
        let labels = labels
            .iter()
            .map(|(host, value)| (format!("{SOURCE_LABEL_PREFIX}{host}"), (*value).to_owned()));
        origins.add_labels(&labels.collect());
        ports.iter().for_each(|port| origins.add_port(*port));
        let places = origins.repositories();
        places.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_missing_is_asked_where_the_image_came_from() {
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [u16], &'a [&'a str]);
        let cases: [Case<'_>; 5] = [
            ("registry.test/a:1", &[], &[], &["registry.test/a"]),
            (
                "registry.test:5000/a:1",
                &[("registry.test", "a,team/b"), ("other.test", "a")],
                &[],
                &[
                    "other.test/a",
                    "registry.test:5000/a",
                    "registry.test/a",
                    "registry.test:5000/team/b",
                    "registry.test/team/b",
                ],
            ),
            (
                "mine/renamed",
                &[("registry.test", "a")],
                &[5001],
                &[
                    "registry.test:5001/a",
                    "registry.test/a",
                    "docker.io/mine/renamed",
                ],
            ),
            (
                "UPPER",
                &[("registry.test", "a")],
                &[],
                &["registry.test/a"],
            ),
            ("UPPER", &[("bad host/", "a"), ("x", "..")], &[], &[]),
        ];
        for (name, labels, ports, expected) in cases {
            assert_eq!(places(name, labels, ports), expected, "{name}");
        }
        let many: Vec<String> = (0..100).map(|n| format!("r{n}")).collect();
        let many = many.join(",");
        assert_eq!(places("a", &[("h.test", &many)], &[]).len(), ORIGINS_MAX);
    }
}
