// SPDX-License-Identifier: Apache-2.0
//! A reader's stream: what is here, then what arrives, or past the cache.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream, Stream};
use sha2::{Digest as _, Sha256};
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::{BlobSpace, Extent};
use tokio::sync::watch;

use super::live::{Live, Look, Reading};
use super::metrics::From;
use super::record::origin_name;
use super::table::{Place, Seat};
use super::{BlobError, Shared, Supply};
use crate::source::{BlobStream, Class, ReadContext, SourceError};
use crate::store::lock;

/// Read from the disk at once.
const READ_BYTES: u64 = 256 << 10;
/// How often one reader has the same place fetched that fails in passing.
const ATTEMPTS: u32 = 3;
/// Pause before the second attempt; doubled for the third.
const PAUSE: Duration = Duration::from_millis(200);

type Body = BoxStream<'static, Result<Bytes, SourceError>>;

/// Opens a reader.
pub(super) async fn open(
    shared: &Arc<Shared>,
    context: &ReadContext,
    blob: BlobDigest,
    size_bytes: u64,
    extent: Extent<BlobSpace>,
    supply: Supply,
    for_node: bool,
) -> Result<BlobStream, BlobError> {
    if extent.is_empty() {
        return Ok(BlobStream::empty(extent));
    }
    let place = lock(&shared.table).seat(blob, size_bytes);
    let seat = match place {
        Place::Seated(seat, going) => {
            shared.evict(going);
            seat
        }
        Place::OtherSize(known) => {
            return Err(BlobError::Size {
                blob,
                known,
                asked: size_bytes,
            });
        }
        Place::Uncached => {
            shared.metrics.uncached();
            let hasher = (extent.len() == size_bytes).then(Sha256::new);
            let body = past(shared, context, &supply, blob, extent, hasher).await?;
            return Ok(BlobStream::new(extent, body));
        }
    };
    shared.note_held();
    let opened = seat.live.get_or_try_init(|| {
        let (shared, seat) = (Arc::clone(shared), Arc::clone(&seat));
        async move {
            let opened =
                tokio::task::spawn_blocking(move || Live::open(&shared.files, &seat).map(Arc::new));
            opened
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())
        }
    });
    let live = match opened.await {
        Ok(live) => Arc::clone(live),
        Err(error) => {
            tracing::warn!(%blob, "failed to open a kept blob, reading past the cache: {error}");
            shared.metrics.uncached();
            let hasher = (extent.len() == size_bytes).then(Sha256::new);
            let body = past(shared, context, &supply, blob, extent, hasher).await?;
            return Ok(BlobStream::new(extent, body));
        }
    };
    let mut supply = supply;
    let mut reading = live.reading(
        extent.start(),
        extent.end(),
        origin_name(supply.origin.label()),
    );
    if for_node {
        reading = Reading::Any;
    }
    // What a node gives is verified with the whole blob only, by this reader or by the node that it reads for.
    if (reading != Reading::Whole && !for_node) || lock(&shared.table).was_bad(blob) {
        supply.nodes = None;
    }
    // What nodes are given is counted where it is given.
    if !for_node {
        shared
            .metrics
            .came(From::Cache, live.here(extent.start(), extent.end()));
    }
    // A blob whose last piece came before a restart was never judged.
    shared.verify(&seat, &live);
    live.enter();
    let from_start = reading == Reading::Whole && extent.start() == 0;
    let hasher = (from_start && !live.is_whole()).then(Sha256::new);
    let reader = Reader {
        shared: Arc::clone(shared),
        context: context.clone(),
        changes: live.changes(),
        live,
        seat,
        supply,
        reading,
        at: extent.start(),
        end: extent.end(),
        attempts: 0,
        past: None,
        hasher,
    };
    Ok(BlobStream::new(extent, reader.stream()))
}

impl Shared {
    /// Removes the files of blobs that are marked to go.
    fn evict(self: &Arc<Self>, going: Vec<BlobDigest>) {
        if going.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        self.tasks.spawn_blocking(move || {
            for blob in going {
                if let Err(error) = shared.files.remove(blob) {
                    tracing::warn!(%blob, "failed to evict a blob: {error}");
                }
                lock(&shared.table).evicted(blob);
                shared.metrics.evicted();
            }
            shared.note_held();
        });
    }
}

struct Reader {
    shared: Arc<Shared>,
    context: ReadContext,
    seat: Arc<Seat>,
    live: Arc<Live>,
    changes: watch::Receiver<u64>,
    supply: Supply,
    reading: Reading,
    at: u64,
    end: u64,
    /// Fetches that this reader began at the place where it stands.
    attempts: u32,
    past: Option<Body>,
    /// Over what this reader was given of a blob that was not verified when he came. A piece that was
    /// given up half-way and came again, from elsewhere, may have been shown to him as it was before.
    hasher: Option<Sha256>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.live.leave();
    }
}

impl Reader {
    fn stream(self) -> impl Stream<Item = Result<Bytes, SourceError>> + Send + 'static {
        stream::try_unfold(self, |mut reader| async move {
            let bytes = reader.next().await?;
            Ok(bytes.map(|bytes| (bytes, reader)))
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            if let Some(past) = &mut self.past {
                return past.next().await.transpose();
            }
            if self.at >= self.end {
                return Ok(None);
            }
            self.context.check()?;
            // Before the look: a change after it is not missed.
            self.changes.borrow_and_update();
            match self.live.look(self.at, self.end, &self.reading) {
                Look::Ready(to) => return self.read(to).await.map(Some),
                Look::Failed(actual) => {
                    return Err(SourceError::DigestMismatch {
                        expected: self.live.blob,
                        actual,
                    });
                }
                Look::Missing(number, failure) => self.fetch(number, failure).await?,
                Look::Wait => self.wait().await?,
                Look::Past => {
                    self.shared.metrics.uncached();
                    let rest = Extent::new(self.at, self.end).unwrap_or_else(Extent::empty);
                    let (blob, hasher) = (self.live.blob, self.hasher.take());
                    let past = past(
                        &self.shared,
                        &self.context,
                        &self.supply,
                        blob,
                        rest,
                        hasher,
                    );
                    self.past = Some(past.await?);
                }
            }
        }
    }

    async fn read(&mut self, to: u64) -> Result<Bytes, SourceError> {
        let (live, at) = (Arc::clone(&self.live), self.at);
        let length = usize::try_from((to - at).min(READ_BYTES)).unwrap_or(0);
        let mut hasher = self.hasher.take();
        let read = tokio::task::spawn_blocking(move || {
            let bytes = live
                .read_at(at, length)
                .map_err(|error| error.to_string())?;
            if let Some(hasher) = &mut hasher {
                hasher.update(&bytes);
            }
            Ok::<_, String>((bytes, hasher))
        });
        let read = read.await.unwrap_or_else(|error| Err(error.to_string()));
        let (bytes, hasher) = read.map_err(|reason| SourceError::Io {
            path: self.live.blob.to_string().into(),
            reason,
        })?;
        if let Some(hasher) = hasher {
            let end = at + bytes.len() as u64 == self.live.size_bytes;
            if end {
                let actual = BlobDigest::from_bytes(hasher.clone().finalize().into());
                let expected = self.live.blob;
                if actual != expected {
                    return Err(SourceError::DigestMismatch { expected, actual });
                }
            }
            self.hasher = Some(hasher);
        }
        self.at += bytes.len() as u64;
        self.attempts = 0;
        Ok(bytes)
    }

    /// Has a missing piece fetched, unless it failed too often for this reader.
    async fn fetch(
        &mut self,
        number: u32,
        failure: Option<SourceError>,
    ) -> Result<(), SourceError> {
        if self.attempts > 0
            && let Some(error) = failure
        {
            if self.attempts >= ATTEMPTS || error.class() != Class::Transient {
                return Err(error);
            }
            let pause = PAUSE * 2_u32.saturating_pow(self.attempts - 1);
            let pause = error
                .retry_after()
                .unwrap_or(pause)
                .min(self.shared.options.stall);
            self.context.bound(tokio::time::sleep(pause)).await?;
        }
        let (seat, live) = (&self.seat, &self.live);
        let until = self.end;
        if self.shared.launch(seat, live, number, until, &self.supply) {
            self.attempts += 1;
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<(), SourceError> {
        let stall = self.shared.options.stall;
        let stopping = self.shared.stop.clone();
        let changed = tokio::time::timeout(stall, self.changes.changed());
        let waited = self.context.bound(stopping.run_until_cancelled(changed));
        match waited.await? {
            None => Err(SourceError::Cancelled),
            Some(Ok(_)) => Ok(()),
            Some(Err(_)) => Err(SourceError::Stalled {
                after: stall,
                offset: self.at,
            }),
        }
    }
}

/// Straight from the origin. With the hash over what a reader of all of the blob has already, he gets the end
/// of it when it was verified here, too.
async fn past(
    shared: &Arc<Shared>,
    context: &ReadContext,
    supply: &Supply,
    blob: BlobDigest,
    extent: Extent<BlobSpace>,
    hasher: Option<Sha256>,
) -> Result<Body, SourceError> {
    let stream = supply.origin.open(context, extent).await?.narrow(extent)?;
    let metrics = shared.metrics.clone();
    let counted = stream.body.inspect(move |bytes| {
        if let Ok(bytes) = bytes {
            metrics.came(From::Origin, bytes.len() as u64);
        }
    });
    Ok(match hasher {
        Some(hasher) => verified(blob, hasher, counted.boxed()).boxed(),
        None => counted.boxed(),
    })
}

/// Passes a blob on, its last bytes only if all of it has the digest.
fn verified(
    blob: BlobDigest,
    hasher: Sha256,
    body: Body,
) -> impl Stream<Item = Result<Bytes, SourceError>> + Send {
    let state = (body, hasher, None::<Bytes>);
    stream::try_unfold(state, move |(mut body, mut hasher, mut held)| async move {
        loop {
            match body.next().await.transpose()? {
                Some(bytes) => {
                    hasher.update(&bytes);
                    if let Some(before) = held.replace(bytes) {
                        return Ok(Some((before, (body, hasher, held))));
                    }
                }
                None => {
                    let Some(last) = held.take() else {
                        return Ok(None);
                    };
                    let actual = BlobDigest::from_bytes(hasher.clone().finalize().into());
                    if actual != blob {
                        return Err(SourceError::DigestMismatch {
                            expected: blob,
                            actual,
                        });
                    }
                    return Ok(Some((last, (body, hasher, None))));
                }
            }
        }
    })
}
