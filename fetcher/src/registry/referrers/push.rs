// SPDX-License-Identifier: Apache-2.0
//! Pushes a referrer, and lists it where the registry does not.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Value, json};
use sluice_blockindex::digest::ManifestDigest;

use super::list::fallback_reference;
use super::{Referrer, entry_of};
use crate::registry::endpoint::Endpoint;
use crate::registry::manifests::FetchedManifest;
use crate::registry::{ImageReference, RegistryClient, RegistryError, Repository, media};
use crate::source::{Attempts, ReadContext};

/// A referrer to be pushed. Its blobs must be there already.
#[derive(Clone, Debug)]
pub struct NewReferrer {
    /// The bytes of its manifest.
    pub bytes: Bytes,
    /// Its media type.
    pub media_type: String,
    /// What it is, as it says itself.
    pub artifact_type: String,
    /// Its annotations, as it has them itself.
    pub annotations: BTreeMap<String, String>,
    /// Its subject, as it says itself.
    pub subject: ManifestDigest,
}

/// How readers find what was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// The registry lists referrers.
    ByRegistry,
    /// It stands in the index under the tag.
    ByTag,
}

impl RegistryClient {
    /// Pushes a referrer and has it listed. Of what the index under the tag lists already, entries of the same
    /// type that `supersedes` go; all others stay as they are. Safe to repeat: what is listed already is
    /// not written again.
    ///
    /// Goes to the registry itself, never to a mirror.
    ///
    /// **Errors** [`RegistryError::Contended`] when others keep changing the index under the tag;
    /// [`RegistryError::Protocol`] when that tag stands for something else. **Cancel** leaves at most a
    /// manifest that nothing lists.
    pub async fn put_referrer(
        &self,
        context: &ReadContext,
        place: &Repository,
        new: &NewReferrer,
        supersedes: impl Fn(&Referrer) -> bool,
    ) -> Result<Listed, RegistryError> {
        let digest = ManifestDigest::of(&new.bytes);
        let reference = place.with_digest(digest);
        let bytes = new.bytes.clone();
        let (_, answer) = self
            .store_manifest(context, &reference, &new.media_type, bytes)
            .await?;
        let subject = answer.header("oci-subject").map(str::to_owned);
        let endpoint = answer.endpoint.clone();
        // Its place in the queue is free for what follows.
        drop(answer);
        match subject {
            Some(subject) if subject == new.subject.to_string() => return Ok(Listed::ByRegistry),
            Some(subject) => {
                return Err(RegistryError::Protocol {
                    endpoint,
                    what: format!("manifest {reference}"),
                    problem: format!("it takes {subject:?} for the subject"),
                });
            }
            None => {}
        }
        self.list_by_tag(context, place, new, &supersedes).await?;
        Ok(Listed::ByTag)
    }

    async fn list_by_tag(
        &self,
        context: &ReadContext,
        place: &Repository,
        new: &NewReferrer,
        supersedes: &impl Fn(&Referrer) -> bool,
    ) -> Result<(), RegistryError> {
        let tag = fallback_reference(place, new.subject)?;
        let origin = Endpoint::origin(&self.inner.options, place.host())?;
        let mut attempts = Attempts::new(&self.inner.options.retry);
        loop {
            let before = self.index_under(context, &origin, &tag).await?;
            let before = before.as_ref();
            let edited = edit(before.map(|it| it.bytes.as_ref()), new, supersedes);
            let edited = edited.map_err(|problem| RegistryError::Protocol {
                endpoint: origin.label.to_string(),
                what: format!("manifest {tag}"),
                problem,
            })?;
            let Some(after) = edited else {
                return Ok(());
            };
            let digest = ManifestDigest::of(&after);
            // As late as can be, because there is no way to say "only if it is still that one".
            let unchanged =
                self.index_digest(context, &origin, &tag).await? == before.map(|it| it.digest);
            if unchanged {
                self.put_manifest(context, &tag, media::OCI_INDEX, after)
                    .await?;
                if self.index_digest(context, &origin, &tag).await? == Some(digest) {
                    return Ok(());
                }
            }
            let contended = RegistryError::Contended {
                endpoint: origin.label.to_string(),
                what: format!("manifest {tag}"),
            };
            attempts.wait_after(context, contended).await?;
        }
    }

    /// The index under the tag, if there is one.
    async fn index_under(
        &self,
        context: &ReadContext,
        origin: &Endpoint,
        tag: &ImageReference,
    ) -> Result<Option<FetchedManifest>, RegistryError> {
        let found = match self.manifest_at(context, origin, tag, false).await {
            Ok(found) => found,
            Err(RegistryError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        match media::is_image_index(&found.media_type) {
            true => Ok(Some(found)),
            false => Err(RegistryError::Protocol {
                endpoint: origin.label.to_string(),
                what: format!("manifest {tag}"),
                problem: "the tag is taken by something that is no index".to_owned(),
            }),
        }
    }

    async fn index_digest(
        &self,
        context: &ReadContext,
        origin: &Endpoint,
        tag: &ImageReference,
    ) -> Result<Option<ManifestDigest>, RegistryError> {
        match self.resolve_at(context, origin, tag).await {
            Ok(resolved) => Ok(Some(resolved.digest)),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The index with the entry in it; `None` when it is as it should be. Whatever else stands in it stays.
///
/// **Errors** what is wrong with the index.
pub(super) fn edit(
    before: Option<&[u8]>,
    new: &NewReferrer,
    supersedes: impl Fn(&Referrer) -> bool,
) -> Result<Option<Bytes>, String> {
    let mut index: Value = match before {
        Some(bytes) => serde_json::from_slice(bytes).map_err(|error| error.to_string())?,
        None => json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": []}),
    };
    let digest = ManifestDigest::of(&new.bytes);
    let mut entry = json!({
        "mediaType": new.media_type,
        "digest": digest.to_string(),
        "size": new.bytes.len(),
        "artifactType": new.artifact_type,
    });
    if !new.annotations.is_empty() {
        entry["annotations"] = json!(new.annotations);
    }
    let wanted = entry_of(entry.clone());
    let list = index.get_mut("manifests").and_then(Value::as_array_mut);
    let list = list.ok_or("it has no list of manifests")?;
    let (length, mut listed) = (list.len(), false);
    list.retain(|value| match entry_of(value.clone()) {
        Some(found) if found.digest == digest => {
            let first = !listed && Some(found) == wanted;
            listed |= first;
            first
        }
        Some(found) => found.artifact_type != new.artifact_type || !supersedes(&found),
        None => true,
    });
    if listed && list.len() == length {
        return Ok(None);
    }
    if !listed {
        list.push(entry);
    }
    Ok(Some(Bytes::from(index.to_string())))
}
