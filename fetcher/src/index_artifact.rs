// SPDX-License-Identifier: Apache-2.0
//! Finds the index artifact of an image that nobody converted.
//!
//! **The rule.** Referrers of the image's manifest with the artifact's type are looked at in the order of the
//! generation that the list tells (those of which it tells none first, of equal ones the greatest digest first),
//! eight at most. Of those that are valid the one with the highest generation *of its own word* counts, of equal
//! ones the one with the greatest digest. So a list that repeats annotations costs one manifest, and one
//! that does not, or exaggerates, changes nothing about the outcome.
//!
//! Valid means: the bytes have the digest and size that the list names, keep all rules of the format, and
//! name the manifest asked about as their subject. What the layers say is checked by who uses them:
//! [`Artifact::layer`] against the image, [`sluice_blockindex::artifact::ArtifactLayer::accept`] for the index.
//!
//! Nothing is kept: who wants to ask less often remembers the answer.

use std::cmp::Reverse;
use std::time::Duration;

use sluice_blockindex::artifact::{
    ARTIFACT_MAX_BYTES, ARTIFACT_TYPE, Artifact, ArtifactError, generation_of,
};
use sluice_blockindex::digest::ManifestDigest;

use crate::registry::{FetchedManifest, Referrer, RegistryClient, RegistryError, Repository};
use crate::source::{Class, ReadContext};

#[cfg(test)]
mod tests;

/// The most artifacts of one image that are read. More than one or two are accidents, or meant to keep us busy.
const CANDIDATES_MAX: usize = 8;
/// Longest search, for callers without a deadline of their own: some requests, each repeated a few times.
const FIND_TIMEOUT: Duration = Duration::from_secs(120);

/// An artifact, valid for the image asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundArtifact {
    /// Digest of its manifest.
    pub digest: ManifestDigest,
    /// What it says.
    pub artifact: Artifact,
}

/// Why an artifact does not count.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefusedArtifact {
    /// It breaks a rule of the format, or is of another image.
    #[error(transparent)]
    Format(#[from] ArtifactError),
    /// The list names another size.
    #[error("it has {actual_bytes} bytes, the list says {listed_bytes}")]
    Size {
        /// By the list.
        listed_bytes: u64,
        /// Of its manifest.
        actual_bytes: u64,
    },
    /// The registry lists it, but does not give it.
    #[error(transparent)]
    Registry(RegistryError),
}

/// Why an image's artifact could not be found.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindArtifactError {
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// There are artifacts, but none is valid; this is the first.
    #[error("index artifact {digest} is refused: {reason}")]
    Refused {
        /// Digest of its manifest.
        digest: ManifestDigest,
        /// Why.
        reason: RefusedArtifact,
    },
}

impl FindArtifactError {
    /// What a caller may do about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Registry(error) => error.class(),
            Self::Refused { .. } => Class::Permanent,
        }
    }
}

/// All that was seen of an image's artifacts.
#[derive(Clone, Debug, Default)]
pub struct ArtifactsSeen {
    /// The one that counts.
    pub best: Option<FoundArtifact>,
    /// Those that do not, and why.
    pub refused: Vec<(ManifestDigest, RefusedArtifact)>,
    /// The highest generation that any claims, valid or not; 0: none does.
    pub highest_generation: u32,
}

/// The index artifact of the image `manifest` in `place`, by the rule of this module; `None`: it has none.
///
/// Mirrors and credentials are used as for any manifest. Waits until the context's deadline, and for two
/// minutes at most.
///
/// **Errors** [`FindArtifactError::Refused`] where artifacts are there and none is valid; failures of the
/// registry, after repetition. **Cancel** safe.
pub async fn find_index_artifact(
    client: &RegistryClient,
    place: &Repository,
    manifest: ManifestDigest,
    context: &ReadContext,
) -> Result<Option<FoundArtifact>, FindArtifactError> {
    let seen = index_artifacts(client, place, manifest, context).await?;
    match (seen.best, seen.refused.into_iter().next()) {
        (None, Some((digest, reason))) => Err(FindArtifactError::Refused { digest, reason }),
        (best, _) => Ok(best),
    }
}

/// As [`find_index_artifact`], with what was refused, and why: for who writes artifacts.
///
/// **Errors** failures of the registry, after repetition. **Cancel** safe.
pub async fn index_artifacts(
    client: &RegistryClient,
    place: &Repository,
    manifest: ManifestDigest,
    context: &ReadContext,
) -> Result<ArtifactsSeen, RegistryError> {
    let context = &context.clone().with_timeout(FIND_TIMEOUT);
    let listed = client
        .referrers(context, place, manifest, ARTIFACT_TYPE)
        .await?;
    let mut seen = ArtifactsSeen::default();
    for candidate in in_order(listed) {
        let claims = generation_of(&candidate.annotations);
        seen.highest_generation = seen.highest_generation.max(claims.unwrap_or(0));
        if let (Some(best), Some(claims)) = (&seen.best, claims)
            && rank(best) > (claims, candidate.digest)
        {
            continue;
        }
        let read = read(client, context, place, &candidate).await?;
        let digest = candidate.digest;
        let artifact = match read.and_then(|read| judge(&candidate, &read, manifest)) {
            Ok(artifact) => artifact,
            Err(reason) => {
                tracing::debug!(%place, %digest, "index artifact is refused: {reason}");
                seen.refused.push((digest, reason));
                continue;
            }
        };
        seen.highest_generation = seen.highest_generation.max(artifact.generation);
        let found = FoundArtifact { digest, artifact };
        if seen
            .best
            .as_ref()
            .is_none_or(|best| rank(best) < rank(&found))
        {
            seen.best = Some(found);
        }
    }
    Ok(seen)
}

/// The higher one counts.
fn rank(of: &FoundArtifact) -> (u32, ManifestDigest) {
    (of.artifact.generation, of.digest)
}

/// Those that are looked at, in their order.
fn in_order(mut listed: Vec<Referrer>) -> Vec<Referrer> {
    let key = |it: &Referrer| {
        (
            generation_of(&it.annotations).unwrap_or(u32::MAX),
            it.digest,
        )
    };
    listed.sort_by_key(|it| Reverse(key(it)));
    listed.dedup_by_key(|it| it.digest);
    listed.truncate(CANDIDATES_MAX);
    listed
}

/// Its manifest, or why it does not count; failures that may pass end the search instead.
async fn read(
    client: &RegistryClient,
    context: &ReadContext,
    place: &Repository,
    candidate: &Referrer,
) -> Result<Result<FetchedManifest, RefusedArtifact>, RegistryError> {
    if candidate.size_bytes > ARTIFACT_MAX_BYTES {
        let (bytes, limit_bytes) = (candidate.size_bytes, ARTIFACT_MAX_BYTES);
        return Ok(Err(ArtifactError::TooLarge { bytes, limit_bytes }.into()));
    }
    let reference = place.with_digest(candidate.digest);
    match client.manifest(context, &reference).await {
        Ok(manifest) => Ok(Ok(manifest)),
        Err(error) => match error.class() {
            Class::Transient | Class::Cancelled => Err(error),
            Class::Permanent | Class::Corrupt => Ok(Err(RefusedArtifact::Registry(error))),
        },
    }
}

fn judge(
    candidate: &Referrer,
    read: &FetchedManifest,
    subject: ManifestDigest,
) -> Result<Artifact, RefusedArtifact> {
    let (listed_bytes, actual_bytes) = (candidate.size_bytes, read.bytes.len() as u64);
    if listed_bytes != actual_bytes {
        return Err(RefusedArtifact::Size {
            listed_bytes,
            actual_bytes,
        });
    }
    Ok(Artifact::parse(&read.bytes, subject)?)
}
