// SPDX-License-Identifier: Apache-2.0
//! Blobs: look for, read whole, read a range.

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{HeaderValue, RANGE};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};

use super::endpoint::Endpoint;
use super::mirrors::Attempt;
use super::transport::{Answer, Call};
use super::{Inner, RegistryClient, RegistryError, Repository, pull_scope};
use crate::source::{
    Attempts, BlobSource, BlobStream, Class, OriginSet, Priority, ReadContext, RegistryBlobSource,
    SourceError,
};

/// What a reader lets pass of a mirror that gives a blob only whole; beyond it the registry is quicker.
const LET_PASS_BYTES: u64 = 4 << 20;

impl RegistryClient {
    /// The size of `blob` in `place`, `None` where it is not there (HEAD).
    ///
    /// **Errors** transient failures are repeated before.
    pub async fn blob_size(
        &self,
        context: &ReadContext,
        place: &Repository,
        blob: BlobDigest,
    ) -> Result<Option<u64>, RegistryError> {
        let url = self.inner.url(place, &format!("blobs/{blob}"))?;
        let call = Call::new(Method::HEAD, url, format!("blob {blob} of {place}"));
        match self
            .inner
            .ask(context, &call, place, &pull_scope(place), &[200])
            .await
        {
            Ok(answer) => match answer
                .header("content-length")
                .and_then(|text| text.parse().ok())
            {
                Some(size_bytes) => Ok(Some(size_bytes)),
                None => Err(RegistryError::Protocol {
                    endpoint: answer.endpoint,
                    what: call.what,
                    problem: "no Content-Length".into(),
                }),
            },
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Streams a whole blob, resuming where a body breaks off. The reader verifies the digest.
    pub async fn blob(
        &self,
        context: &ReadContext,
        place: &Repository,
        blob: BlobDigest,
        size_bytes: u64,
    ) -> Result<BlobStream, SourceError> {
        let source = RegistryBlobSource::new(
            self.clone(),
            blob,
            size_bytes,
            OriginSet::new([place.clone()]),
            self.inner.options.retry.clone(),
        );
        let whole = Extent::from_length(0, size_bytes).unwrap_or_else(Extent::empty);
        source.open(context, whole).await
    }

    /// Reads a small blob (such as a config) whole, at most `cap_bytes`, verified against its digest.
    ///
    /// **Errors** [`RegistryError::TooLarge`], [`RegistryError::DigestMismatch`].
    pub async fn blob_bytes(
        &self,
        context: &ReadContext,
        place: &Repository,
        blob: BlobDigest,
        cap_bytes: u64,
    ) -> Result<Bytes, RegistryError> {
        let url = self.inner.url(place, &format!("blobs/{blob}"))?;
        let call = Call::new(Method::GET, url, format!("blob {blob} of {place}"));
        let mut attempts = Attempts::new(&self.inner.options.retry);
        let bytes = loop {
            let answer = self
                .inner
                .ask(context, &call, place, &pull_scope(place), &[200])
                .await?;
            match self
                .inner
                .transport
                .read_body(context, answer, cap_bytes, &call.what)
                .await
            {
                Ok(bytes) => break bytes,
                Err(error) => attempts.wait_after(context, error).await?,
            }
        };
        let actual = BlobDigest::of(&bytes);
        if actual != blob {
            return Err(RegistryError::DigestMismatch {
                what: call.what,
                expected: blob.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(bytes)
    }

    /// Whether `place` is known to answer ranges of this blob with all of it.
    pub fn ignores_ranges(&self, place: &Repository, blob: BlobDigest) -> bool {
        Endpoint::origin(&self.inner.options, place.host())
            .is_ok_and(|origin| self.inner.ranges.ignores(&origin, place, blob))
    }

    /// One attempt to open a part of `blob`, which has `size_bytes` in all, at each mirror that is admitted.
    /// `None`: none gives it.
    ///
    /// **Errors** only [`Class::Cancelled`]. **Cancel** safe.
    pub(crate) async fn open_at_mirrors(
        &self,
        context: &ReadContext,
        place: &Repository,
        blob: BlobDigest,
        size_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<Option<BlobStream>, RegistryError> {
        let inner = &self.inner;
        let endpoints = inner.mirrors.of(context, place.host()).await?;
        let can_wait = context.priority == Priority::Background || extent.start() <= LET_PASS_BYTES;
        for at in &endpoints.mirrors {
            if !at.can.pull || !inner.mirrors.admits(at, place, Some(blob), can_wait) {
                continue;
            }
            let attempt = Attempt::begin(&inner.mirrors, at, place, Some(blob));
            let open = inner.open(context, at, place, blob, size_bytes, extent);
            let (comes, answer) = match attempt.bounded(context, open).await {
                Ok(opened) => opened,
                Err(error) => {
                    tracing::debug!(mirror = %at.label, %place, %blob, "mirror gives nothing: {error}");
                    let cancelled = error.class() == Class::Cancelled;
                    attempt.failed(context, &error);
                    if cancelled {
                        return Err(error);
                    }
                    continue;
                }
            };
            if comes != extent {
                attempt.whole_only();
                if !can_wait {
                    attempt.declined(context);
                    continue;
                }
            }
            let stall = inner.options.mirrors.stall;
            let (start, end) = (comes.start(), comes.end());
            let body = inner
                .transport
                .body_within(context, answer, start, end, stall);
            let (body, served) = attempt.watch(comes, size_bytes, body);
            return Ok(Some(BlobStream::new(comes, body).served_by(Some(served))));
        }
        Ok(None)
    }

    /// One attempt to open a part of `blob`, which has `size_bytes` in all, at the registry itself.
    pub(crate) async fn open_blob(
        &self,
        context: &ReadContext,
        place: &Repository,
        blob: BlobDigest,
        size_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, RegistryError> {
        let inner = &self.inner;
        let endpoints = inner.mirrors.of(context, place.host()).await?;
        let at = &endpoints.origin;
        let (comes, answer) = inner
            .open(context, at, place, blob, size_bytes, extent)
            .await?;
        if comes != extent && !inner.ranges.ignores(at, place, blob) {
            tracing::info!(%place, %blob, "registry ignores ranges: the whole blob is streamed");
            inner.metrics.registry_did("ranges_ignored");
            inner.ranges.note(at, place, blob);
        }
        let body = inner
            .transport
            .body(context, answer, comes.start(), comes.end());
        Ok(BlobStream::new(comes, body))
    }
}

impl Inner {
    /// Asks an endpoint for a part of `blob`. Says what comes.
    ///
    /// The target of a redirect is tried directly while it is fresh. A 400, 401 or 403 of any target
    /// means that it has expired; whatever else is wrong with a remembered one (gone, its server down)
    /// may be wrong with it alone: the endpoint is asked once more for another.
    async fn open(
        &self,
        context: &ReadContext,
        at: &Endpoint,
        place: &Repository,
        blob: BlobDigest,
        size_bytes: u64,
        extent: Extent<BlobSpace>,
    ) -> Result<(Extent<BlobSpace>, Answer), RegistryError> {
        let what = format!("blob {blob} of {place}");
        let mut call = at.call(Method::GET, place, &format!("blobs/{blob}"), what)?;
        let whole = extent.start() == 0 && extent.end() == size_bytes;
        let ranged = !whole && !self.ranges.ignores(at, place, blob);
        if ranged {
            // The one place where a range becomes inclusive.
            let range = format!(
                "bytes={}-{}",
                extent.start(),
                extent.end().saturating_sub(1)
            );
            let value =
                HeaderValue::from_str(&range).map_err(|_| RegistryError::Configuration {
                    host: place.host().to_owned(),
                    problem: "range is no header".into(),
                })?;
            call.headers.insert(RANGE, value);
        }
        let mut refreshed = false;
        let answer = loop {
            let remembered = if refreshed {
                None
            } else {
                self.redirects.get(at, place, blob)
            };
            let from_memory = remembered.is_some();
            let answer = match remembered {
                Some(target) => {
                    let direct = Call {
                        url: target,
                        ..call.clone()
                    };
                    self.transport.send(context, &direct, &at.base, None).await
                }
                None => {
                    self.exchange_at(context, &call, at, &pull_scope(place))
                        .await
                }
            };
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => {
                    self.redirects.forget(at, place, blob);
                    if from_memory && error.class() != Class::Cancelled {
                        refreshed = true;
                        continue;
                    }
                    return Err(error);
                }
            };
            let status = answer.status().as_u16();
            let expired = matches!(status, 400 | 401 | 403);
            let useless = from_memory && matches!(status, 404 | 410 | 500..=599);
            if answer.redirected.is_some() && (expired || useless) && !refreshed {
                tracing::info!(%place, %blob, status, "target of a redirect expired: ask for another");
                self.metrics.registry_did("redirect_expired");
                self.redirects.forget(at, place, blob);
                refreshed = true;
                continue;
            }
            break answer;
        };
        if let Some(target) = &answer.redirected
            && answer.status().is_success()
        {
            self.redirects.put(at, place, blob, target.clone());
        }
        if answer.status().as_u16() == 416 {
            return Err(SourceError::BeyondEnd { asked: extent }.into());
        }
        let answer = self
            .transport
            .accept(context, answer, &[200, 206], &call.what)
            .await?;
        let comes = judge_extent(&answer, extent, size_bytes, ranged)?;
        Ok((comes, answer))
    }
}

/// What the head of an answer says that comes, if that can be right.
///
/// **Errors** [`SourceError::WrongExtent`].
pub(super) fn judge_extent(
    answer: &Answer,
    asked: Extent<BlobSpace>,
    size_bytes: u64,
    ranged: bool,
) -> Result<Extent<BlobSpace>, SourceError> {
    let status = answer.status().as_u16();
    let wrong = |answered: String| SourceError::WrongExtent { asked, answered };
    let comes = if status == 206 {
        let header = answer.header("content-range").unwrap_or_default();
        let described = || format!("206 with Content-Range {header:?}");
        if !ranged {
            return Err(wrong(described()));
        }
        let (extent, total) = parse_content_range(header).ok_or_else(|| wrong(described()))?;
        if extent != asked || total.is_some_and(|total| total != size_bytes) {
            return Err(wrong(described()));
        }
        extent
    } else {
        Extent::from_length(0, size_bytes).unwrap_or(asked)
    };
    match answer.header("content-length").map(str::parse::<u64>) {
        Some(Ok(length)) if length != comes.len() => Err(wrong(format!(
            "{status} with {length} bytes instead of {}",
            comes.len()
        ))),
        _ => Ok(comes),
    }
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110, section 14.4) as a half-open extent; the total may be `*`.
fn parse_content_range(header: &str) -> Option<(Extent<BlobSpace>, Option<u64>)> {
    let (unit, rest) = header.trim().split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let extent = Extent::new(
        first.trim().parse().ok()?,
        last.trim().parse::<u64>().ok()?.checked_add(1)?,
    )?;
    match total.trim() {
        "*" => Some((extent, None)),
        total => Some((extent, Some(total.parse().ok()?))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_parse_to_half_open_extents() {
        let extent = |start, end| Extent::new(start, end).unwrap();
        let cases = [
            ("bytes 0-0/1", Some((extent(0, 1), Some(1)))),
            ("bytes 5-9/*", Some((extent(5, 10), None))),
            ("Bytes 5-9/100", Some((extent(5, 10), Some(100)))),
            ("bytes 9-5/100", None),
            ("bytes */100", None),
            ("items 0-1/2", None),
            ("bytes 0-18446744073709551615/2", None),
            ("bytes -1-2/3", None),
            ("", None),
        ];
        for (header, expected) in cases {
            assert_eq!(parse_content_range(header), expected, "{header}");
        }
    }
}
