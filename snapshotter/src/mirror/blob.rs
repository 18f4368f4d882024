// SPDX-License-Identifier: Apache-2.0
//! Blobs: whole or in one range, from what is here and while the rest arrives.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, IF_NONE_MATCH, IF_RANGE, RANGE, RETRY_AFTER,
};
use futures::{StreamExt as _, stream};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_fetcher::blob_cache::{BlobError, Supply};
use sluice_fetcher::registry::{Passed, PassedBlob, RegistryError, Repository};
use sluice_fetcher::source::{Class, Priority, ReadContext, SourceError};
use tokio::time::Instant;

use super::access::Standing;
use super::answer;
use super::manifest::Named;
use super::request::{self, Ranged};
use super::{Answered, BODY_DEADLINE, BODY_PATIENCE, Client, Kind, Outcome, Shared};

/// What blobs are, whatever is in them.
const BLOB_TYPE: &str = "application/octet-stream";

impl Shared {
    pub(super) async fn blob(
        self: &Arc<Self>,
        place: &Repository,
        digest: BlobDigest,
        client: &Client,
    ) -> Answered {
        let (size_bytes, outcome) = match self.size(place, digest, client).await {
            Ok(known) => known,
            Err(answered) => return *answered,
        };
        if answer::is_known(client.header(IF_NONE_MATCH), digest) {
            return (Kind::Blob, outcome, answer::empty(304));
        }
        // A range of another version of the blob: there is none, but the client may think of one.
        let applies = client
            .header(IF_RANGE)
            .is_none_or(|tag| answer::is_known(Some(tag), digest));
        let header = client.header(RANGE).filter(|_| applies);
        let whole = Extent::new(0, size_bytes).unwrap_or_else(Extent::empty);
        let (extent, status) = match request::range(header, size_bytes) {
            Ranged::Whole => (whole, 200),
            Ranged::Part(extent) => (extent, 206),
            Ranged::Beyond => {
                let mut response = answer::error(416, "SIZE_INVALID", "beyond the end");
                answer::set(
                    &mut response,
                    CONTENT_RANGE,
                    &format!("bytes */{size_bytes}"),
                );
                return (Kind::Blob, outcome, response);
            }
        };
        let mut response = answer::content(status, digest, BLOB_TYPE, extent.len());
        answer::set(&mut response, ACCEPT_RANGES, "bytes");
        if status == 206 {
            // Inclusive, as HTTP has it.
            let range = format!("bytes {}-{}/{size_bytes}", extent.start(), extent.end() - 1);
            answer::set(&mut response, CONTENT_RANGE, &range);
        }
        if outcome == Outcome::Stale {
            answer::mark_stale(&mut response);
        }
        if client.head {
            return (Kind::Blob, outcome, response);
        }
        match self.body(place, digest, size_bytes, extent, client).await {
            Ok(body) => {
                *response.body_mut() = body;
                (Kind::Blob, outcome, response)
            }
            Err((outcome, response)) => (Kind::Blob, outcome, *response),
        }
    }

    /// The size of a blob that the client may have, and how that is known.
    async fn size(
        self: &Arc<Self>,
        place: &Repository,
        digest: BlobDigest,
        client: &Client,
    ) -> Result<(u64, Outcome), Box<Answered>> {
        let standing = self.access.standing(place, &client.shown, Instant::now());
        let held = self.access.held_bytes(place, digest);
        let whole = self.blobs.whole_bytes(digest);
        if standing == Standing::Fresh
            && let Some(size_bytes) = held
        {
            let here = whole == Some(size_bytes);
            let outcome = if here {
                Outcome::Cached
            } else {
                Outcome::Fetched
            };
            return Ok((size_bytes, outcome));
        }
        let request = Passed {
            head: true,
            rest: format!("blobs/{digest}"),
            accept: Vec::new(),
            unless: None,
            shown: client.shown.clone(),
        };
        let asked = self.client.pass(&self.asking(), place, &request).await;
        let (unavailable, refusal) = match asked {
            Ok(answer) if answer.accepted() => {
                let length = answer.header(&CONTENT_LENGTH);
                let length = length.and_then(|text| text.parse::<u64>().ok()).or(whole);
                let Some(size_bytes) = length else {
                    let response = answer::unreachable("the registry does not say the blob's size");
                    return Err(Box::new((Kind::Blob, Outcome::Unavailable, response)));
                };
                self.accepted(place, client, Named::Blob(digest));
                self.access.holds(place, digest, size_bytes);
                let here = whole == Some(size_bytes);
                let outcome = if here {
                    Outcome::Unchanged
                } else {
                    Outcome::Fetched
                };
                return Ok((size_bytes, outcome));
            }
            Ok(answer) => {
                let outcome = self.judged(place, client, &answer);
                if outcome == Outcome::NotFound {
                    self.access.lacks(place, digest);
                }
                (answer.unavailable(), (outcome, answer::refusal(&answer)))
            }
            Err(error) => {
                let response = answer::unreachable(&error.to_string());
                (true, (Outcome::Unavailable, response))
            }
        };
        if let Some(size_bytes) = held.filter(|_| unavailable) {
            if standing >= Standing::Stale {
                return Ok((size_bytes, Outcome::Stale));
            }
            self.metrics.denied();
        } else if unavailable && whole.is_some() {
            // It is here, but not known to be in this repository.
            self.metrics.denied();
        }
        Err(Box::new((Kind::Blob, refusal.0, refusal.1)))
    }

    /// The bytes. Waits for the first of them, so that a failure to get any is a status.
    async fn body(
        self: &Arc<Self>,
        place: &Repository,
        digest: BlobDigest,
        size_bytes: u64,
        extent: Extent<BlobSpace>,
        client: &Client,
    ) -> Result<Body, (Outcome, Box<Response<Body>>)> {
        let permit = Arc::clone(&self.bodies).acquire_owned();
        let Ok(Ok(permit)) = tokio::time::timeout(BODY_PATIENCE, permit).await else {
            let mut response = answer::error(503, "TOOMANYREQUESTS", "too many pulls at a time");
            answer::set(&mut response, RETRY_AFTER, "5");
            return Err((Outcome::Unavailable, Box::new(response)));
        };
        let origin = PassedBlob::new(
            self.client.clone(),
            place.clone(),
            digest,
            size_bytes,
            client.shown.clone(),
        );
        let supply = Supply {
            origin: Arc::new(origin),
            nodes: (self.nodes)(place),
        };
        let context = ReadContext::new(Priority::Foreground)
            .with_cancel(self.stop.clone())
            .with_timeout(BODY_DEADLINE);
        let opened = self
            .blobs
            .read(&context, digest, size_bytes, extent, supply);
        let mut stream = match opened.await {
            Ok(stream) => stream.body,
            Err(error) => return Err(failed(&error)),
        };
        let first = match stream.next().await {
            Some(Err(error)) => return Err(failed(&BlobError::Source(error))),
            first => first,
        };
        let logged = move |piece: &Result<bytes::Bytes, SourceError>| {
            if let Err(error) = piece
                && error.class() != Class::Cancelled
            {
                tracing::warn!(%digest, "cut a pull: {error}");
            }
        };
        let rest = stream::iter(first).chain(stream).inspect(logged);
        Ok(Body::from_stream(rest.map(move |piece| {
            // Held until the body ends or is dropped.
            let _permit = &permit;
            piece
        })))
    }
}

fn failed(error: &BlobError) -> (Outcome, Box<Response<Body>>) {
    let (outcome, status) = match error {
        BlobError::Source(SourceError::Registry(RegistryError::NotFound { .. })) => {
            (Outcome::NotFound, 404)
        }
        BlobError::Source(SourceError::Registry(RegistryError::Throttled { .. })) => {
            (Outcome::Unavailable, 429)
        }
        _ => (Outcome::Unavailable, 502),
    };
    let response = answer::error(status, "UNAVAILABLE", &error.to_string());
    (outcome, Box::new(response))
}
