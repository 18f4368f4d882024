// SPDX-License-Identifier: Apache-2.0
//! How the fake registry answers.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use sluice_blockindex::digest::BlobDigest;

use super::{Access, Inner, Misbehaviour, Seen, Shared};

/// Largest body that tests send.
const BODY_BYTES: usize = 64 * 1024 * 1024;

pub(super) async fn answer(
    shared: Arc<Shared>,
    storage: bool,
    request: Request<Body>,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let header = |name: &str| {
        head.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let seen = Seen {
        storage,
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        range: header("range"),
        authorization: header("authorization"),
        headers: head
            .headers
            .iter()
            .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
            .collect(),
    };
    let fault = {
        let mut inner = shared.lock();
        inner.seen.push(seen.clone());
        inner.strike(&seen)
    };
    match &fault {
        Some(Misbehaviour::Status(status, retry_after)) => {
            let mut response = plain(*status);
            if let Some(value) = retry_after {
                set(&mut response, "retry-after", value);
            }
            return response;
        }
        Some(Misbehaviour::Redirect(to)) => {
            let mut response = plain(307);
            set(&mut response, "location", to);
            return response;
        }
        Some(Misbehaviour::Answer(media_type, bytes)) => {
            let mut response = Response::new(Body::from(bytes.clone()));
            set(&mut response, "content-type", media_type);
            return response;
        }
        Some(Misbehaviour::NoAnswer) => std::future::pending().await,
        _ => {}
    }
    let Ok(body) = to_bytes(body, BODY_BYTES).await else {
        return plain(400);
    };
    let mut response = {
        let mut inner = shared.lock();
        if let Some(Misbehaviour::Meanwhile([name, tag, media_type], bytes)) = &fault {
            inner.put(name, tag, media_type, bytes.clone());
        }
        if storage {
            inner.storage(&seen, fault.as_ref())
        } else if seen.path == "/token" {
            inner.token(&seen, &body)
        } else if let Some(refusal) = inner.refuse(&shared, &seen) {
            refusal
        } else {
            inner.api(&shared, &seen, &head.headers, body, fault.as_ref())
        }
    };
    match fault {
        Some(Misbehaviour::Link(link)) => {
            set(&mut response, "link", &link);
            response
        }
        Some(Misbehaviour::LostAnswer) => {
            // A body that fails before its first byte breaks the connection; hyper has then sent the
            // head at most, so the length is a lie that the client cannot take for an answer.
            let broken = stream::once(async { Err::<Bytes, _>(std::io::Error::other("lost")) });
            let mut response = Response::new(Body::from_stream(broken));
            *response.status_mut() = axum::http::StatusCode::GATEWAY_TIMEOUT;
            set(&mut response, "content-length", "1");
            response
        }
        _ => response,
    }
}

pub(super) fn plain(status: u16) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = axum::http::StatusCode::from_u16(status).expect("a status");
    response
}

pub(super) fn set(response: &mut Response<Body>, name: &'static str, value: &str) {
    response
        .headers_mut()
        .insert(name, value.parse().expect("a header value"));
}

pub(super) fn query_value(query: &str, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
}

impl Inner {
    /// The fault that hits this request, if one does.
    fn strike(&mut self, seen: &Seen) -> Option<Misbehaviour> {
        let port = if seen.storage { "storage " } else { "" };
        let subject = format!("{port}{}", seen.path);
        let rule = self.rules.iter_mut().find(|rule| {
            rule.strikes > 0
                && (rule.method.is_empty() || rule.method == seen.method)
                && subject.contains(&rule.path_part)
        })?;
        if rule.pass > 0 {
            rule.pass -= 1;
            return None;
        }
        rule.strikes -= 1;
        Some(rule.what.clone())
    }

    /// The answer to who is not let in.
    fn refuse(&self, shared: &Shared, seen: &Seen) -> Option<Response<Body>> {
        let given = seen.authorization.as_deref();
        match &self.access {
            Access::Open => None,
            Access::Basic { username, password } => {
                let wanted = basic(username, password);
                if given == Some(wanted.as_str()) {
                    return None;
                }
                let mut response = plain(401);
                set(&mut response, "www-authenticate", "Basic realm=\"fake\"");
                Some(response)
            }
            Access::Bearer { refusal, .. } => {
                let token = given.and_then(|value| value.strip_prefix("Bearer "));
                if token.is_some_and(|token| self.tokens.contains(token)) {
                    return None;
                }
                let status = if token.is_some() { *refusal } else { 401 };
                let mut response = plain(status);
                if status == 401 {
                    let realm = format!("http://{}/token", shared.address);
                    let challenge = format!("Bearer realm=\"{realm}\",service=\"fake\"");
                    set(&mut response, "www-authenticate", &challenge);
                }
                Some(response)
            }
        }
    }

    fn token(&mut self, seen: &Seen, body: &Bytes) -> Response<Body> {
        let Access::Bearer {
            password,
            identity,
            expires_in,
            ..
        } = &self.access
        else {
            return plain(404);
        };
        let form = String::from_utf8_lossy(body);
        let good = match (password, identity) {
            (None, None) => true,
            _ if seen.method == "POST" => {
                query_value(&form, "grant_type").as_deref() == Some("refresh_token")
                    && identity.is_some()
                    && query_value(&form, "refresh_token") == *identity
            }
            (Some((username, password)), _) => {
                seen.authorization.as_deref() == Some(basic(username, password).as_str())
            }
            (None, Some(_)) => false,
        };
        if !good {
            return plain(401);
        }
        let expires_in = *expires_in;
        self.counter += 1;
        let token = format!("token-{}", self.counter);
        self.tokens.insert(token.clone());
        Response::new(Body::from(format!(
            "{{\"token\":\"{token}\",\"expires_in\":{expires_in}}}"
        )))
    }

    fn storage(&self, seen: &Seen, fault: Option<&Misbehaviour>) -> Response<Body> {
        if query_value(&seen.query, "signature") != Some(self.signature.to_string()) {
            return plain(403);
        }
        let digest = seen.path.rsplit('/').next().unwrap_or_default();
        match self
            .blobs
            .iter()
            .find(|((_, present), _)| present == digest)
        {
            Some((_, bytes)) => serve(bytes, seen, fault),
            None => plain(404),
        }
    }

    fn api(
        &mut self,
        shared: &Shared,
        seen: &Seen,
        headers: &HeaderMap,
        body: Bytes,
        fault: Option<&Misbehaviour>,
    ) -> Response<Body> {
        let Some(path) = seen.path.strip_prefix("/v2/") else {
            return plain(404);
        };
        if let Some((name, id)) = path.split_once("/blobs/uploads/") {
            return self.upload(seen, headers, name, id, body);
        }
        if let Some((name, digest)) = path.split_once("/blobs/") {
            let Some(bytes) = self.blobs.get(&(name.to_owned(), digest.to_owned())) else {
                return plain(404);
            };
            if self.redirects && seen.method == "GET" {
                let mut response = plain(307);
                let to = format!(
                    "http://{}/{digest}?signature={}",
                    shared.storage, self.signature
                );
                set(&mut response, "location", &to);
                return response;
            }
            return serve(bytes, seen, fault);
        }
        if let Some((name, subject)) = path.split_once("/referrers/") {
            return self.list_referrers(seen, name, subject);
        }
        match path.split_once("/manifests/") {
            Some((name, target)) => self.manifest(seen, headers, name, target, body, fault),
            None => plain(404),
        }
    }

    /// Stores a manifest under its digest and `target`.
    fn put(&mut self, name: &str, target: &str, media_type: &str, bytes: Bytes) {
        let digest = BlobDigest::of(&bytes).to_string();
        for target in [target.to_owned(), digest] {
            let value = (media_type.to_owned(), bytes.clone());
            self.manifests.insert((name.to_owned(), target), value);
        }
    }

    fn manifest(
        &mut self,
        seen: &Seen,
        headers: &HeaderMap,
        name: &str,
        target: &str,
        body: Bytes,
        fault: Option<&Misbehaviour>,
    ) -> Response<Body> {
        if seen.method == "PUT" {
            let media_type = headers
                .get("content-type")
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned();
            let digest = BlobDigest::of(&body).to_string();
            self.put(name, target, &media_type, body.clone());
            let mut response = plain(201);
            set(&mut response, "docker-content-digest", &digest);
            if let Some(subject) = self.subject_of(&body) {
                set(&mut response, "oci-subject", &subject);
            }
            return response;
        }
        let Some((media_type, bytes)) = self.manifests.get(&(name.to_owned(), target.to_owned()))
        else {
            return plain(404);
        };
        let mut response = serve(bytes, seen, fault);
        set(&mut response, "content-type", media_type);
        if !matches!(fault, Some(Misbehaviour::NoDigestHeader)) {
            let digest = BlobDigest::of(bytes).to_string();
            set(&mut response, "docker-content-digest", &digest);
        }
        response
    }

    fn upload(
        &mut self,
        seen: &Seen,
        headers: &HeaderMap,
        name: &str,
        id: &str,
        body: Bytes,
    ) -> Response<Body> {
        if seen.method == "POST" {
            return self.open_upload(seen, name);
        }
        let Ok(id) = id.parse::<u64>() else {
            return plain(404);
        };
        let Some(present) = self.uploads.get_mut(&id) else {
            return plain(404);
        };
        match seen.method.as_str() {
            "PATCH" => {
                let first = headers.get("content-range").and_then(|value| {
                    value
                        .to_str()
                        .ok()?
                        .split('-')
                        .next()?
                        .parse::<usize>()
                        .ok()
                });
                if first != Some(present.len()) {
                    return plain(416);
                }
                present.extend_from_slice(&body);
            }
            "PUT" => {
                let mut all = self.uploads.remove(&id).unwrap_or_default();
                all.extend_from_slice(&body);
                let digest = BlobDigest::of(&all).to_string();
                if query_value(&seen.query, "digest").as_ref() != Some(&digest) {
                    let mut response = plain(400);
                    let words = r#"{"errors":[{"code":"DIGEST_INVALID","message":"no match"}]}"#;
                    *response.body_mut() = Body::from(words);
                    return response;
                }
                self.blobs
                    .insert((name.to_owned(), digest), Bytes::from(all));
                return plain(201);
            }
            "DELETE" => {
                self.uploads.remove(&id);
                return plain(204);
            }
            _ => {}
        }
        let has = self.uploads.get(&id).map_or(0, Vec::len);
        let mut response = plain(if seen.method == "PATCH" { 202 } else { 204 });
        set(
            &mut response,
            "range",
            &format!("0-{}", has.saturating_sub(1)),
        );
        set(
            &mut response,
            "location",
            &format!("/v2/{name}/blobs/uploads/{id}?state={has}"),
        );
        response
    }

    fn open_upload(&mut self, seen: &Seen, name: &str) -> Response<Body> {
        if let (Some(digest), Some(from), true) = (
            query_value(&seen.query, "mount"),
            query_value(&seen.query, "from"),
            self.mounts,
        ) && let Some(bytes) = self.blobs.get(&(from, digest.clone())).cloned()
        {
            self.blobs.insert((name.to_owned(), digest), bytes);
            return plain(201);
        }
        self.counter += 1;
        let id = self.counter;
        self.uploads.insert(id, Vec::new());
        let mut response = plain(202);
        set(
            &mut response,
            "location",
            &format!("/v2/{name}/blobs/uploads/{id}?state=0"),
        );
        response
    }
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{username}:{password}")))
}

/// A blob or a part of it, with the faults of bodies.
fn serve(bytes: &Bytes, seen: &Seen, fault: Option<&Misbehaviour>) -> Response<Body> {
    let range = seen.range.as_deref().and_then(|value| {
        let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
    });
    let range = range.filter(|_| !matches!(fault, Some(Misbehaviour::IgnoreRange)));
    let (mut part, content_range) = match range {
        Some((first, last)) => {
            if first >= bytes.len() {
                return plain(416);
            }
            let shift = usize::from(matches!(fault, Some(Misbehaviour::ShiftedRange)));
            let (first, end) = (first + shift, (last + 1 + shift).min(bytes.len()));
            let stated = format!("bytes {first}-{}/{}", end - 1, bytes.len());
            (bytes.slice(first.min(end)..end), Some(stated))
        }
        None => (bytes.clone(), None),
    };
    match fault {
        Some(Misbehaviour::ShortLength(missing)) => {
            part.truncate(part.len().saturating_sub(*missing));
        }
        Some(Misbehaviour::FlipByte) => {
            let mut copy = part.to_vec();
            copy[0] = !copy[0];
            part = Bytes::from(copy);
        }
        _ => {}
    }
    let length = part.len();
    let mut response = plain(if content_range.is_some() { 206 } else { 200 });
    if let Some(stated) = content_range {
        set(&mut response, "content-range", &stated);
    }
    if seen.method != "HEAD" {
        *response.body_mut() = body_of(part, fault);
    }
    set(&mut response, "content-length", &length.to_string());
    response
}

fn body_of(part: Bytes, fault: Option<&Misbehaviour>) -> Body {
    match fault {
        Some(Misbehaviour::CutBody(after)) if *after < part.len() => {
            let head = stream::iter([Ok(part.slice(..*after))]);
            // The pause lets the bytes go out before the connection breaks.
            let tail = stream::once(async {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(head.chain(tail))
        }
        Some(Misbehaviour::StallBody(after)) if *after < part.len() => {
            let head = stream::iter([Ok::<_, std::io::Error>(part.slice(..*after))]);
            Body::from_stream(head.chain(stream::pending()))
        }
        Some(Misbehaviour::SlowBody(piece_bytes, pause)) => {
            let (piece_bytes, pause) = (*piece_bytes, *pause);
            let pieces: Vec<Bytes> = (0..part.len())
                .step_by(piece_bytes)
                .map(|at| part.slice(at..(at + piece_bytes).min(part.len())))
                .collect();
            Body::from_stream(stream::iter(pieces).then(move |piece| async move {
                tokio::time::sleep(pause).await;
                Ok::<_, std::io::Error>(piece)
            }))
        }
        _ => Body::from(part),
    }
}
