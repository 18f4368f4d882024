// SPDX-License-Identifier: Apache-2.0
//! What a reference stands for, by the registry's own word: containerd knows nothing of the image yet.

use std::time::Duration;

use bytes::Bytes;
use oci_spec::image::{Arch, Os};
use sluice_blockindex::digest::{BlobDigest, ManifestDigest};
use sluice_blockindex::extent::Extent;
use sluice_fetcher::registry::{
    FetchedManifest, ImageReference, ManifestBody, RegistryClient, RegistryError,
};
use sluice_fetcher::source::{Priority, ReadContext, SourceError, read_checked};

use crate::layers::Layers;
use crate::plan::{Layout, LayoutLayer};
use crate::resolve::{Config, DOCUMENT_CAP_BYTES, Descriptor, Manifest, ManifestError, chain_ids};
use crate::snapshots::BlobOrigin;

/// How long the registry may take to say what an image is. Nobody waits for a prewarm as for a Prepare,
/// but it holds one of few slots.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(60);

/// Why the image is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The registry has no such image, or does not give it.
    #[error("{0}")]
    Registry(#[from] RegistryError),
    /// An index has nothing for this node.
    #[error("{reference} is not for linux/{architecture}, this node's platform")]
    Platform {
        /// The image.
        reference: String,
        /// Of this node.
        architecture: Arch,
    },
    /// A manifest or config cannot be read.
    #[error("read {what} of {reference}: {source}")]
    Document {
        /// Which.
        what: &'static str,
        /// The image.
        reference: String,
        /// What is wrong.
        source: ManifestError,
    },
    /// The config could not be fetched.
    #[error("fetch config of {reference}: {source}")]
    Config {
        /// The image.
        reference: String,
        /// What failed.
        source: SourceError,
    },
    /// Manifest and config contradict each other, or the config is not what the manifest pins.
    #[error("{reference}: {problem}")]
    Contradiction {
        /// The image.
        reference: String,
        /// What is wrong.
        problem: String,
    },
}

/// An image in a registry.
#[derive(Clone, Debug)]
pub(super) struct FoundImage {
    /// Its manifest for this node's platform.
    pub(super) manifest: ManifestDigest,
    /// Its layers and where they are.
    pub(super) layout: Layout,
}

/// Asks the registry what a reference stands for.
///
/// **Errors** [`ImageError`], within a deadline of its own. **Cancel** safe.
pub(super) async fn find(
    client: &RegistryClient,
    layers: &Layers,
    reference: &ImageReference,
) -> Result<FoundImage, ImageError> {
    let context = ReadContext::new(Priority::Background).with_timeout(RESOLVE_DEADLINE);
    let mut fetched = client.manifest(&context, reference).await?;
    if let ManifestBody::Index(index) = fetched.parse()? {
        let node = Arch::default();
        let ours = |entry: &&oci_spec::image::Descriptor| {
            let platform = entry.platform().as_ref();
            platform.is_some_and(|it| *it.os() == Os::Linux && *it.architecture() == node)
        };
        let entry = index.manifests().iter().find(ours);
        let digest = entry.and_then(|it| it.digest().to_string().parse().ok());
        let digest: ManifestDigest = digest.ok_or_else(|| ImageError::Platform {
            reference: reference.to_string(),
            architecture: node.clone(),
        })?;
        let entry = reference.place().with_digest(digest);
        fetched = client.manifest(&context, &entry).await?;
    }
    layout(&context, layers, reference, &fetched).await
}

async fn layout(
    context: &ReadContext,
    layers: &Layers,
    reference: &ImageReference,
    fetched: &FetchedManifest,
) -> Result<FoundImage, ImageError> {
    let document = |what| {
        move |source| ImageError::Document {
            what,
            reference: reference.to_string(),
            source,
        }
    };
    let contradiction = |problem: String| ImageError::Contradiction {
        reference: reference.to_string(),
        problem,
    };
    let manifest = Manifest::parse(&fetched.bytes).map_err(document("manifest"))?;
    let origin = BlobOrigin::from(reference.place());
    let config = config(context, layers, reference, &origin, &manifest.config).await?;
    let config = Config::parse(&config).map_err(document("config"))?;
    let (count, diff_ids) = (manifest.layers.len(), config.diff_ids.len());
    if count != diff_ids {
        let problem = format!("the manifest has {count} layers, the config {diff_ids}");
        return Err(contradiction(problem));
    }
    let chain_ids = chain_ids(&config.diff_ids);
    let layers = manifest.layers.into_iter();
    let layers = layers.zip(config.diff_ids.into_iter().zip(chain_ids));
    let layers = layers
        .map(|(descriptor, (diff_id, chain_id))| LayoutLayer::of(chain_id, diff_id, descriptor));
    Ok(FoundImage {
        manifest: fetched.digest,
        layout: Layout {
            manifest: Some(fetched.digest),
            layers: layers.collect(),
            origins: vec![origin],
        },
    })
}

/// The image config, checked against what the manifest pins.
async fn config(
    context: &ReadContext,
    layers: &Layers,
    reference: &ImageReference,
    origin: &BlobOrigin,
    descriptor: &Descriptor,
) -> Result<Bytes, ImageError> {
    let contradiction = |problem: String| ImageError::Contradiction {
        reference: reference.to_string(),
        problem,
    };
    let bytes = descriptor.size_bytes;
    let cap = u64::try_from(DOCUMENT_CAP_BYTES).unwrap_or(u64::MAX);
    let digest: Option<BlobDigest> = descriptor.digest.parse().ok();
    let (Some(digest), Some(extent)) = (digest, Extent::new(0, bytes).filter(|_| bytes <= cap))
    else {
        let problem = format!("its config {} cannot be read", descriptor.digest);
        return Err(contradiction(problem));
    };
    let source = layers.source(digest, bytes, std::slice::from_ref(origin));
    let check = |read: &[u8]| match BlobDigest::of(read) == digest {
        true => Ok(()),
        false => Err(contradiction(format!("its config is not {digest}"))),
    };
    let read = read_checked(&*source, context, extent, check).await;
    read.map_err(|source| ImageError::Config {
        reference: reference.to_string(),
        source,
    })?
}
