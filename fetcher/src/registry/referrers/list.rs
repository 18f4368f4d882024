// SPDX-License-Identifier: Apache-2.0
//! Lists referrers.

use std::collections::HashSet;
use std::sync::Arc;

use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderValue};
use sluice_blockindex::digest::ManifestDigest;
use url::Url;

use super::{PAGES_MAX, REFERRERS_MAX, Referrer, entries_of, fallback_tag, next_link};
use crate::registry::endpoint::Endpoint;
use crate::registry::media;
use crate::registry::transport::Call;
use crate::registry::{ImageReference, RegistryClient, RegistryError, Repository, pull_scope};
use crate::source::ReadContext;

/// What registries answer that do not know the request. 404 is what the specification says; others call
/// the path malformed, the method not allowed, or the whole not implemented.
const UNKNOWN: [u16; 4] = [404, 400, 405, 501];

impl RegistryClient {
    /// The manifests of `artifact_type` that have `subject` as theirs, in the registry's order. Mirrors that may
    /// say what tags stand for are asked first; one that knows of none does not decide.
    ///
    /// **Errors** [`RegistryError::Protocol`] for lists without an end, [`RegistryError::TooLarge`] over
    /// [`crate::registry::RegistryOptions::manifest_cap_bytes`] per page; transient ones are repeated before.
    /// **Cancel** safe.
    pub async fn referrers(
        &self,
        context: &ReadContext,
        place: &Repository,
        subject: ManifestDigest,
        artifact_type: &str,
    ) -> Result<Vec<Referrer>, RegistryError> {
        let tag = fallback_reference(place, subject)?;
        let tag = &tag;
        let list = |at: Arc<Endpoint>, others_follow: bool| async move {
            let asked = Asked {
                place,
                subject,
                artifact_type,
            };
            let found = match self.listed_at(context, &at, &asked, others_follow).await? {
                Some(found) => found,
                None => {
                    self.tagged_at(context, &at, tag, &asked, others_follow)
                        .await?
                }
            };
            match found.is_empty() && others_follow {
                true => Err(RegistryError::NotFound {
                    endpoint: at.label.to_string(),
                    what: asked.what(),
                }),
                false => Ok(found),
            }
        };
        self.first_of(context, tag, list).await
    }

    /// What the endpoint itself lists; `None` where it does not know the request.
    async fn listed_at(
        &self,
        context: &ReadContext,
        at: &Endpoint,
        asked: &Asked<'_>,
        once: bool,
    ) -> Result<Option<Vec<Referrer>>, RegistryError> {
        let rest = format!("referrers/{}", asked.subject);
        let mut call = at.call(Method::GET, asked.place, &rest, asked.what())?;
        let accept = HeaderValue::from_static(media::OCI_INDEX);
        call.headers.insert(ACCEPT, accept);
        call.url
            .query_pairs_mut()
            .append_pair("artifactType", asked.artifact_type);
        let scope = pull_scope(asked.place);
        let mut seen: HashSet<Url> = HashSet::new();
        let mut found = Vec::new();
        let wrong = |problem: String| RegistryError::Protocol {
            endpoint: at.label.to_string(),
            what: asked.what(),
            problem,
        };
        let accepted = [&[200], &UNKNOWN[..]].concat();
        while seen.insert(call.url.clone()) {
            if seen.len() > PAGES_MAX {
                return Err(wrong(format!("a list of more than {PAGES_MAX} pages")));
            }
            let page = self
                .inner
                .ask_document(context, &call, at, &scope, &accepted, once)
                .await?;
            let is_list = page.media_type().as_deref() == Some(media::OCI_INDEX);
            if page.status != 200 || !is_list {
                // Some answer what they do not know with a page for people.
                return match seen.len() {
                    1 => Ok(None),
                    page => Err(wrong(format!("page {page} is no list"))),
                };
            }
            let entries = entries_of(&page.bytes, asked.artifact_type);
            found.extend(entries.map_err(|problem| wrong(format!("malformed: {problem}")))?);
            if found.len() > REFERRERS_MAX {
                return Err(wrong(format!("more than {REFERRERS_MAX} of them")));
            }
            let Some(next) = page.header("link").and_then(next_link) else {
                return Ok(Some(found));
            };
            call.url = next_page(&call, at, next).map_err(wrong)?;
        }
        Err(wrong(
            "a list whose pages lead to each other in a circle".to_owned(),
        ))
    }

    /// What stands under the tag.
    async fn tagged_at(
        &self,
        context: &ReadContext,
        at: &Endpoint,
        tag: &ImageReference,
        asked: &Asked<'_>,
        once: bool,
    ) -> Result<Vec<Referrer>, RegistryError> {
        let index = match self.manifest_at(context, at, tag, once).await {
            Ok(index) => index,
            Err(RegistryError::NotFound { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let wrong = |problem: String| RegistryError::Protocol {
            endpoint: at.label.to_string(),
            what: asked.what(),
            problem,
        };
        if !media::is_image_index(&index.media_type) {
            return Err(wrong(format!("{tag} is no index")));
        }
        let entries = entries_of(&index.bytes, asked.artifact_type);
        let found = entries.map_err(|problem| wrong(format!("{tag} is malformed: {problem}")))?;
        match found.len() > REFERRERS_MAX {
            true => Err(wrong(format!("more than {REFERRERS_MAX} of them"))),
            false => Ok(found),
        }
    }
}

/// What is asked.
struct Asked<'a> {
    place: &'a Repository,
    subject: ManifestDigest,
    artifact_type: &'a str,
}

impl Asked<'_> {
    fn what(&self) -> String {
        format!("referrers of {} in {}", self.subject, self.place)
    }
}

/// The name under which referrers stand where the registry does not list them.
pub(super) fn fallback_reference(
    place: &Repository,
    subject: ManifestDigest,
) -> Result<ImageReference, RegistryError> {
    let tag = place.tagged(&fallback_tag(subject));
    tag.map_err(|error| RegistryError::Configuration {
        host: place.host().to_owned(),
        problem: error.to_string(),
    })
}

/// The URL of the next page.
///
/// **Errors** it is elsewhere: no list needs that, and our `Authorization` would go there.
fn next_page(call: &Call, at: &Endpoint, link: &str) -> Result<Url, String> {
    let joined = call.url.join(link);
    let mut next = joined.map_err(|_| "a malformed link to the next page".to_owned())?;
    let stays = next.origin() == call.url.origin() && next.path() == call.url.path();
    if !stays || !next.username().is_empty() || next.password().is_some() {
        return Err("the next page is elsewhere".to_owned());
    }
    next.set_fragment(None);
    if let Some(namespace) = &at.namespace
        && !next.query_pairs().any(|(name, _)| name == "ns")
    {
        next.query_pairs_mut().append_pair("ns", namespace);
    }
    Ok(next)
}
