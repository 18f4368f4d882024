// SPDX-License-Identifier: Apache-2.0
//! Uploading blobs (distribution specification 1.1, "Pushing blobs").
//!
//! What is in memory goes by POST and one PUT, and is repeated whole when it fails in passing. What
//! comes as a stream of unknown length goes by POST, PATCH for each piece, PUT with the digest. A
//! piece is kept until the registry has it; after a failure in passing the registry is asked how far
//! it got, and the rest of the piece is sent again. So memory per upload is one piece.
//!
//! An upload's `Location` may lead to another host; no `Authorization` goes there.

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use reqwest::Method;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderValue};
use sluice_blockindex::digest::BlobDigest;
use url::Url;

use super::transport::{Answer, Call};
use super::{RegistryClient, RegistryError, Repository, push_scope};
use crate::source::{Attempts, Class, ReadContext};

/// How a mount across repositories went.
#[derive(Debug)]
pub enum MountOutcome {
    /// The blob is now in the repository; nothing was uploaded.
    Mounted,
    /// The registry does not share it and has opened an upload instead.
    Upload(Upload),
}

/// An upload that has been opened: `write` any number of times, then `finish` with the digest.
///
/// **Cancel** Dropping it leaves an unfinished upload, which registries purge; `abort` tells them.
/// After a dropped or failed `write` or `finish` it can only be aborted or dropped.
#[derive(Debug)]
pub struct Upload {
    client: RegistryClient,
    place: Repository,
    location: Url,
    /// Bytes that the registry has acknowledged.
    sent_bytes: u64,
    piece: BytesMut,
    piece_bytes: usize,
}

impl RegistryClient {
    /// Makes `blob` of `from` known in `to` without sending it. Both are at the same host.
    ///
    /// Where the registry refuses the mount (no access to `from`, not supported), an upload is opened.
    pub async fn mount_blob(
        &self,
        context: &ReadContext,
        to: &Repository,
        from: &Repository,
        blob: BlobDigest,
    ) -> Result<MountOutcome, RegistryError> {
        if to.host() != from.host() {
            return Ok(MountOutcome::Upload(self.start_upload(context, to).await?));
        }
        let mut url = self.inner.url(to, "blobs/uploads/")?;
        url.query_pairs_mut()
            .append_pair("mount", &blob.to_string())
            .append_pair("from", from.name());
        let call = Call::new(
            Method::POST,
            url,
            format!("mount of {blob} from {from} to {to}"),
        );
        let scope = format!("{} repository:{}:pull", push_scope(to), from.name());
        match self
            .inner
            .ask(context, &call, to, &scope, &[201, 202])
            .await
        {
            Ok(answer) if answer.status().as_u16() == 201 => Ok(MountOutcome::Mounted),
            Ok(answer) => Ok(MountOutcome::Upload(self.upload_of(to, &call, &answer)?)),
            Err(error) if error.class() == Class::Permanent => {
                tracing::debug!(%error, "mount refused, open an upload");
                Ok(MountOutcome::Upload(self.start_upload(context, to).await?))
            }
            Err(error) => Err(error),
        }
    }

    /// Uploads a blob that is in memory (POST, then one PUT). Safe to repeat.
    ///
    /// **Errors** transient ones are repeated before; a wrong digest is [`RegistryError::Refused`].
    pub async fn push_blob(
        &self,
        context: &ReadContext,
        place: &Repository,
        blob: BlobDigest,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let mut attempts = Attempts::new(&self.inner.options.retry);
        loop {
            let upload = self.start_upload(context, place).await?;
            match upload.put_all(context, blob, bytes.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => attempts.wait_after(context, error).await?,
            }
        }
    }

    /// Uploads a stream whose digest its end tells: `digest` is called after the last byte.
    ///
    /// **Errors** [`RegistryError::Input`] when the stream fails; the upload is then aborted.
    pub async fn push_stream<S, E>(
        &self,
        context: &ReadContext,
        place: &Repository,
        mut stream: S,
        digest: impl FnOnce() -> BlobDigest,
    ) -> Result<BlobDigest, RegistryError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: std::fmt::Display,
    {
        let mut upload = self.start_upload(context, place).await?;
        loop {
            let piece = match context.bound(stream.next()).await? {
                Some(Ok(piece)) => piece,
                Some(Err(error)) => {
                    let reason = error.to_string();
                    // The stream's error is what matters, whatever becomes of the abort.
                    let _ = upload.abort(context).await;
                    return Err(RegistryError::Input { reason });
                }
                None => break,
            };
            upload.write(context, piece).await?;
        }
        let blob = digest();
        upload.finish(context, blob).await?;
        Ok(blob)
    }

    /// Opens an upload for a blob whose digest and size are known only at its end.
    pub async fn start_upload(
        &self,
        context: &ReadContext,
        place: &Repository,
    ) -> Result<Upload, RegistryError> {
        let url = self.inner.url(place, "blobs/uploads/")?;
        let call = Call::new(Method::POST, url, format!("an upload to {place}"));
        let answer = self
            .inner
            .ask(context, &call, place, &push_scope(place), &[202])
            .await?;
        self.upload_of(place, &call, &answer)
    }

    fn upload_of(
        &self,
        place: &Repository,
        call: &Call,
        answer: &Answer,
    ) -> Result<Upload, RegistryError> {
        let location = self
            .inner
            .transport
            .next_url(&call.url, answer.header("location"))?;
        // Some registries (object stores behind them) refuse smaller pieces than this.
        let minimum = answer
            .header("oci-chunk-min-length")
            .and_then(|text| text.parse().ok());
        let piece_bytes = self
            .inner
            .options
            .upload_piece_bytes
            .max(1)
            .max(minimum.unwrap_or(0));
        Ok(Upload {
            client: self.clone(),
            place: place.clone(),
            location,
            sent_bytes: 0,
            piece: BytesMut::new(),
            // A registry that asks for more than memory is good for does not get it.
            piece_bytes: piece_bytes.min(256 * 1024 * 1024),
        })
    }
}

impl Upload {
    /// Adds bytes. Sends a piece whenever enough have come together, and waits for it (back pressure).
    ///
    /// **Errors** transient ones are repeated before, from where the registry got to.
    pub async fn write(
        &mut self,
        context: &ReadContext,
        mut bytes: Bytes,
    ) -> Result<(), RegistryError> {
        while !bytes.is_empty() {
            let room = self.piece_bytes.saturating_sub(self.piece.len());
            let taken = bytes.split_to(room.min(bytes.len()));
            self.piece.extend_from_slice(&taken);
            if self.piece.len() >= self.piece_bytes {
                self.send_piece(context).await?;
            }
        }
        Ok(())
    }

    /// Bytes written so far.
    pub fn written_bytes(&self) -> u64 {
        self.sent_bytes
            .saturating_add(u64::try_from(self.piece.len()).unwrap_or(u64::MAX))
    }

    /// Sends what is left and closes the upload: the registry checks that all bytes have this digest.
    ///
    /// **Errors** [`RegistryError::Refused`] when they have not.
    pub async fn finish(
        mut self,
        context: &ReadContext,
        blob: BlobDigest,
    ) -> Result<(), RegistryError> {
        if self.sent_bytes == 0 {
            let all = std::mem::take(&mut self.piece).freeze();
            let (client, place) = (self.client.clone(), self.place.clone());
            return match self.put_all(context, blob, all.clone()).await {
                // Small enough to be in memory still, so it can be begun anew.
                Err(error) if error.class() == Class::Transient => {
                    client.push_blob(context, &place, blob, all).await
                }
                outcome => outcome,
            };
        }
        if !self.piece.is_empty() {
            self.send_piece(context).await?;
        }
        let call = self.closing_call(blob);
        let inner = &self.client.inner;
        let scope = push_scope(&self.place);
        let mut attempts = Attempts::new(&inner.options.retry);
        loop {
            let outcome = match inner.exchange(context, &call, &self.place, &scope).await {
                Ok(answer) => {
                    inner
                        .transport
                        .accept(context, answer, &[201, 204], &call.what)
                        .await
                }
                Err(error) => Err(error),
            };
            let error = match outcome {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            // The answer to a PUT that did its work may have been lost: then the upload is gone and
            // the blob is there.
            if attempts.happened()
                && matches!(
                    error,
                    RegistryError::NotFound { .. } | RegistryError::Refused { .. }
                )
                && self.client.blob_size(context, &self.place, blob).await? == Some(self.sent_bytes)
            {
                return Ok(());
            }
            attempts.wait_after(context, error).await?;
        }
    }

    /// Tells the registry to forget the upload.
    pub async fn abort(self, context: &ReadContext) -> Result<(), RegistryError> {
        let what = format!("end of an upload to {}", self.place);
        let call = Call::new(Method::DELETE, self.location.clone(), what);
        let scope = push_scope(&self.place);
        // 404 and 405: gone already, or a registry that only purges.
        let accepted = [200, 202, 204, 404, 405];
        self.client
            .inner
            .ask(context, &call, &self.place, &scope, &accepted)
            .await
            .map(drop)
    }

    /// One PUT with all bytes, without repetition.
    async fn put_all(
        self,
        context: &ReadContext,
        blob: BlobDigest,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let mut call = self.closing_call(blob);
        call.headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        call.body = bytes;
        let inner = &self.client.inner;
        let scope = push_scope(&self.place);
        let answer = inner.exchange(context, &call, &self.place, &scope).await?;
        inner
            .transport
            .accept(context, answer, &[201, 204], &call.what)
            .await
            .map(drop)
    }

    fn closing_call(&self, blob: BlobDigest) -> Call {
        let mut url = self.location.clone();
        // `Location` may carry a query of its own, which must stay.
        url.query_pairs_mut()
            .append_pair("digest", &blob.to_string());
        Call::new(Method::PUT, url, format!("blob {blob} to {}", self.place))
    }

    /// Sends the piece until the registry has all of it.
    async fn send_piece(&mut self, context: &ReadContext) -> Result<(), RegistryError> {
        let mut rest = std::mem::take(&mut self.piece).freeze();
        let scope = push_scope(&self.place);
        let client = self.client.clone();
        let mut attempts = Attempts::new(&client.inner.options.retry);
        while !rest.is_empty() {
            let length = u64::try_from(rest.len()).unwrap_or(u64::MAX);
            let after = self.sent_bytes.saturating_add(length);
            let what = format!(
                "bytes {}..{after} of an upload to {}",
                self.sent_bytes, self.place
            );
            let mut call = Call::new(Method::PATCH, self.location.clone(), what);
            call.headers.insert(
                CONTENT_TYPE,
                HeaderValue::from_static("application/octet-stream"),
            );
            let range = format!("{}-{}", self.sent_bytes, after.saturating_sub(1));
            if let Ok(range) = HeaderValue::from_str(&range) {
                call.headers.insert(CONTENT_RANGE, range);
            }
            call.body = rest.clone();
            let outcome = match client
                .inner
                .exchange(context, &call, &self.place, &scope)
                .await
            {
                Ok(answer) => {
                    client
                        .inner
                        .transport
                        .accept(context, answer, &[202, 201, 204], &call.what)
                        .await
                }
                Err(error) => Err(error),
            };
            match outcome {
                Ok(answer) => {
                    if answer.header("location").is_some() {
                        self.location = client
                            .inner
                            .transport
                            .next_url(&call.url, answer.header("location"))?;
                    }
                    self.sent_bytes = after;
                    return Ok(());
                }
                Err(error) => {
                    attempts.wait_after(context, error).await?;
                    let has = self.acknowledged(context).await?;
                    let progress = has
                        .checked_sub(self.sent_bytes)
                        .and_then(|more| usize::try_from(more).ok())
                        .filter(|more| *more <= rest.len());
                    let Some(progress) = progress else {
                        return Err(RegistryError::Protocol {
                            endpoint: self.place.host().to_owned(),
                            what: call.what,
                            problem: format!("it has {has} bytes, of {} sent", self.sent_bytes),
                        });
                    };
                    let _ = rest.split_to(progress);
                    self.sent_bytes = has;
                }
            }
        }
        Ok(())
    }

    /// How many bytes the registry has.
    async fn acknowledged(&mut self, context: &ReadContext) -> Result<u64, RegistryError> {
        let what = format!("state of an upload to {}", self.place);
        let call = Call::new(Method::GET, self.location.clone(), what);
        let scope = push_scope(&self.place);
        let inner = &self.client.inner;
        let answer = inner
            .ask(context, &call, &self.place, &scope, &[204, 200, 202])
            .await?;
        if answer.header("location").is_some() {
            self.location = inner
                .transport
                .next_url(&call.url, answer.header("location"))?;
        }
        // `Range: 0-LAST`; registries say `0-0` both for one byte and for none.
        let last = answer
            .header("range")
            .and_then(|text| text.rsplit('-').next()?.parse::<u64>().ok());
        Ok(match last {
            None | Some(0) => 0,
            Some(last) => last.saturating_add(1),
        })
    }
}
