// SPDX-License-Identifier: Apache-2.0
//! Answers as clients of the distribution API expect them.

use axum::body::Body;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, WARNING};
use axum::http::{HeaderName, HeaderValue, Response, StatusCode};
use sluice_blockindex::digest::BlobDigest;
use sluice_fetcher::registry::PassedAnswer;

/// The header with the digest of what is sent.
pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// The header of answers to a version check.
pub(super) const API_VERSION: HeaderName =
    HeaderName::from_static("docker-distribution-api-version");
/// What clients look for in it.
const REGISTRY: &str = "registry/2.0";

pub(super) fn empty(status: u16) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    set(&mut response, API_VERSION, REGISTRY);
    response
}

/// Sets a header, if the value can be one.
pub(super) fn set(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// An error in the specification's form.
pub(super) fn error(status: u16, code: &str, message: &str) -> Response<Body> {
    let mut response = empty(status);
    let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
    set(&mut response, CONTENT_TYPE, "application/json");
    *response.body_mut() = Body::from(body.to_string());
    response
}

/// The registry's refusal as an answer of ours, with what tells the client how to go on.
pub(super) fn refusal(answer: &PassedAnswer) -> Response<Body> {
    let (code, message) = match answer.status {
        401 => ("UNAUTHORIZED", "the registry asks for authentication"),
        403 => ("DENIED", "the registry denies it"),
        404 => ("NAME_UNKNOWN", "the registry does not have it"),
        429 => ("TOOMANYREQUESTS", "the registry throttles"),
        _ => ("UNAVAILABLE", "the registry cannot answer"),
    };
    // A status that a redirect's target chose is not the registry's word.
    let status = match answer.redirected {
        true if answer.status != 404 => 502,
        _ => answer.status,
    };
    let mut response = error(status, code, message);
    for (name, value) in answer.guidance() {
        response.headers_mut().append(name, value);
    }
    response
}

/// The registry cannot be reached.
pub(super) fn unreachable(why: &str) -> Response<Body> {
    error(502, "UNAVAILABLE", why)
}

/// The head of an answer with content of this digest.
pub(super) fn content(
    status: u16,
    digest: BlobDigest,
    media_type: &str,
    length: u64,
) -> Response<Body> {
    let mut response = empty(status);
    set(&mut response, CONTENT_TYPE, media_type);
    set(&mut response, CONTENT_LENGTH, &length.to_string());
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    set(&mut response, ETAG, &etag(digest));
    response
}

pub(super) fn etag(digest: BlobDigest) -> String {
    format!("\"{digest}\"")
}

/// Whether the client says that it has this.
pub(super) fn is_known(unless: Option<&str>, digest: BlobDigest) -> bool {
    let digest = digest.to_string();
    unless.is_some_and(|known| {
        known.split(',').any(|tag| {
            let tag = tag.trim().trim_start_matches("W/").trim_matches('"');
            tag == "*" || tag == digest
        })
    })
}

/// Marks an answer that was not checked with the registry (RFC 7234, section 5.5.1).
pub(super) fn mark_stale(response: &mut Response<Body>) {
    set(response, WARNING, "110 - \"Response is Stale\"");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entity_tags_are_digests() {
        let digest = BlobDigest::of(b"x");
        for (unless, known) in [
            (None, false),
            (Some(etag(digest)), true),
            (Some(format!("W/\"{digest}\"")), true),
            (Some(format!("\"a\", \"{digest}\"")), true),
            (Some("*".into()), true),
            (Some(etag(BlobDigest::of(b"y"))), false),
        ] {
            assert_eq!(is_known(unless.as_deref(), digest), known, "{unless:?}");
        }
    }
}
