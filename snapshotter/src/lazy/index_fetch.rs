// SPDX-License-Identifier: Apache-2.0
//! The index of a layer, from disk or from one of the places that have the blob.
//!
//! The places are guesses as often as not: containerd forgets ports. One that swallows packets must
//! not cost the image its laziness, so the next place is asked as well when one has failed or has not
//! answered within [`HEAD_START`]; the first answer wins. An index is a few kilobytes, so what a late
//! answer brings besides costs little.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use sluice_blockindex::annotations::LayerAnnotations;
use sluice_blockindex::extent::{BlobSpace, Extent};
use sluice_fetcher::peer::wire::WantedObject;
use sluice_fetcher::registry::Repository;
use sluice_fetcher::source::{
    BlobSource, BlobStream, Class, OriginSet, Priority, ReadContext, SourceError, SourceKind,
    read_checked,
};
use tokio::time::{Instant, sleep_until};

use super::Inner;
use super::prepare::late;
use crate::indexes::{IndexPin, LayerIndex, LayerIndexError, check_digest};
use crate::plan::{Refusal, RefusalKind};
use crate::shelf::NodeShelf;
use crate::snapshots::BlobOrigin;

/// How long a place is alone before the next one is asked too. Shorter: slow registries are asked
/// twice; longer: several dead places use up the budget of Prepare (5 s by default).
pub(super) const HEAD_START: Duration = Duration::from_millis(800);

impl Inner {
    /// The index of a layer. The place that gave it becomes the first of `sources`.
    pub(super) async fn index(
        self: &Arc<Self>,
        annotations: &LayerAnnotations,
        sources: &mut [BlobOrigin],
        deadline: Instant,
    ) -> Result<Arc<LayerIndex>, Refusal> {
        let pin = IndexPin::from(annotations);
        let found = self
            .blocking(move |inner| inner.parts.layers.indexes().get_checked(&pin))
            .await;
        match found {
            Ok(Some(index)) => return Ok(index),
            Ok(None) => {}
            Err(error @ LayerIndexError::Disagrees { .. }) => return Err(invalid(error)),
            // Damaged and removed: fetch it again.
            Err(error) => tracing::warn!("index on disk is of no use: {error}"),
        }
        let layers = &self.parts.layers;
        let (blob, blob_bytes) = (annotations.blob, annotations.blob_bytes);
        let mut places: Vec<Arc<dyn BlobSource>> = Vec::new();
        let shelf = &self.parts.shelf;
        if shelf.peers().is_some() {
            // The zone first: one node fetches it for all.
            places.push(Arc::new(ZoneIndex::new(shelf, annotations, sources)));
        }
        let before = places.len();
        places.extend(
            sources
                .iter()
                .map(|place| layers.source(blob, blob_bytes, std::slice::from_ref(place))),
        );
        let ask = |place| fetch(place, annotations, deadline);
        let answered = first_of(places, ask, HEAD_START).await;
        let (place, payload) = answered.map_err(|failed| {
            let asked = |place: usize| match place.checked_sub(before) {
                Some(place) => sources[place].to_string(),
                None => "the zone".to_owned(),
            };
            all_failed(failed, asked)
        })?;
        if let Some(place) = place.checked_sub(before) {
            sources[..=place].rotate_right(1);
            self.found_at(&sources[0]);
        }
        shelf.keep(annotations.index_digest, &payload);
        self.parts.metrics.index_fetched(payload.len() as u64);
        self.blocking(move |inner| inner.parts.layers.indexes().put(&payload, &pin))
            .await
            .map_err(invalid)
    }
}

/// The index as the other nodes of the zone give it.
#[derive(Debug)]
struct ZoneIndex {
    shelf: Arc<NodeShelf>,
    annotations: LayerAnnotations,
    places: OriginSet,
}

impl ZoneIndex {
    fn new(shelf: &Arc<NodeShelf>, annotations: &LayerAnnotations, sources: &[BlobOrigin]) -> Self {
        let places = sources
            .iter()
            .filter_map(|it| Repository::new(&it.host, &it.repository).ok());
        Self {
            shelf: Arc::clone(shelf),
            annotations: annotations.clone(),
            places: OriginSet::new(places),
        }
    }
}

#[async_trait]
impl BlobSource for ZoneIndex {
    fn label(&self) -> &str {
        "zone"
    }

    fn kind(&self) -> SourceKind {
        SourceKind::Peer
    }

    async fn open(
        &self,
        context: &ReadContext,
        extent: Extent<BlobSpace>,
    ) -> Result<BlobStream, SourceError> {
        let nowhere = || SourceError::NoSource {
            blob: self.annotations.blob.to_string(),
        };
        let peers = self.shelf.peers().ok_or_else(nowhere)?;
        let wanted = WantedObject {
            node: peers.me(),
            digest: self.annotations.index_digest,
            blob: self.annotations.blob,
            blob_bytes: self.annotations.blob_bytes,
            extent,
            places: self.places.clone(),
            present_only: false,
        };
        let found = context.bound(self.shelf.index_of_zone(&wanted)).await?;
        let payload = found.map_err(|_| nowhere())?;
        let body = futures::stream::once(async move { Ok(payload) });
        Ok(BlobStream::new(extent, body))
    }
}

/// What the place that answers first says, and which it was.
///
/// **Errors** what each place that was asked came to, the last to fail last.
pub(super) async fn first_of<P, T, F>(
    places: Vec<P>,
    ask: impl Fn(P) -> F,
    head_start: Duration,
) -> Result<(usize, T), Vec<(usize, Refusal)>>
where
    F: Future<Output = Result<T, Refusal>>,
{
    let mut coming = places.into_iter().enumerate();
    let mut asked = FuturesUnordered::new();
    let mut failures = Vec::new();
    let mut next_at = Instant::now();
    loop {
        let more = coming.len() > 0;
        if more && (asked.is_empty() || Instant::now() >= next_at) {
            if let Some((number, place)) = coming.next() {
                let answer = ask(place);
                asked.push(async move { (number, answer.await) });
                next_at = Instant::now() + head_start;
            }
            continue;
        }
        tokio::select! {
            biased;
            answer = asked.next() => match answer {
                Some((number, Ok(answer))) => return Ok((number, answer)),
                Some((number, Err(failed))) => {
                    failures.push((number, failed));
                    next_at = Instant::now();
                }
                None => return Err(failures),
            },
            () = sleep_until(next_at), if more => {}
        }
    }
}

/// What the failures of all places come to.
fn all_failed(mut failed: Vec<(usize, Refusal)>, asked: impl Fn(usize) -> String) -> Refusal {
    let kind = match failed.as_slice() {
        [] => return late(),
        [_] => return failed.remove(0).1,
        [.., (_, last)] => last.kind,
    };
    let each = failed.iter();
    let each = each.map(|(place, refusal)| format!("{}: {refusal}", asked(*place)));
    Refusal::new(kind, each.collect::<Vec<_>>().join("; "))
}

async fn fetch(
    place: Arc<dyn BlobSource>,
    annotations: &LayerAnnotations,
    deadline: Instant,
) -> Result<Bytes, Refusal> {
    let mut context = ReadContext::new(Priority::Foreground);
    context.deadline = Some(deadline);
    let extent = annotations.index_extent;
    // What answers at a guessed port may be anything: only the right bytes win.
    let check = |payload: &[u8]| check_digest(payload, annotations.index_digest);
    let payload = read_checked(&*place, &context, extent, check).await;
    payload.map_err(|error| refused(&error))?.map_err(invalid)
}

pub(super) fn refused(error: &SourceError) -> Refusal {
    match error.class() {
        Class::Cancelled => late(),
        // The place was silent for its share of the time.
        Class::Transient if matches!(error, SourceError::Stalled { .. }) => late(),
        Class::Transient | Class::Permanent | Class::Corrupt => {
            Refusal::new(RefusalKind::Fetch, format!("fetch index: {error}"))
        }
    }
}

fn invalid(error: LayerIndexError) -> Refusal {
    let kind = match error {
        LayerIndexError::Io { .. } => RefusalKind::Local,
        _ => RefusalKind::Index,
    };
    Refusal::new(kind, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_fetcher::source::memory::MemorySource;

    /// Swallows packets.
    #[derive(Debug)]
    struct Dead;

    #[async_trait]
    impl BlobSource for Dead {
        fn label(&self) -> &str {
            "dead"
        }

        fn kind(&self) -> SourceKind {
            SourceKind::Origin
        }

        async fn open(
            &self,
            _: &ReadContext,
            _: Extent<BlobSpace>,
        ) -> Result<BlobStream, SourceError> {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn a_dead_place_does_not_cost_the_budget() {
        let (payload, annotations) = crate::indexes::sample::layer();
        let start = usize::try_from(annotations.index_extent.start()).unwrap();
        let good = [&vec![0; start][..], &payload].concat();
        let dead = || Arc::new(Dead) as Arc<dyn BlobSource>;
        let good = || Arc::new(MemorySource::new(good.clone())) as Arc<dyn BlobSource>;
        let wrong = || Arc::new(MemorySource::new(vec![7; 1 << 20])) as Arc<dyn BlobSource>;
        let short = || Arc::new(MemorySource::new(vec![])) as Arc<dyn BlobSource>;
        type Places = Vec<Arc<dyn BlobSource>>;
        // Places, and which one wins or why none does, after how many head starts.
        let cases: [(Places, std::result::Result<usize, RefusalKind>, u32); 7] = [
            (vec![good()], Ok(0), 0),
            (vec![dead(), good()], Ok(1), 1),
            (
                vec![dead(), dead(), dead(), dead(), dead(), good()],
                Ok(5),
                5,
            ),
            (vec![short(), wrong(), good()], Ok(2), 0),
            (vec![dead(), wrong(), good()], Ok(2), 1),
            (vec![short()], Err(RefusalKind::Fetch), 0),
            (vec![wrong()], Err(RefusalKind::Index), 0),
        ];
        for (number, (places, expected, waits)) in cases.into_iter().enumerate() {
            let head_start = Duration::from_millis(20);
            let begun = Instant::now();
            let deadline = begun + Duration::from_secs(60);
            let ask = |place| fetch(place, &annotations, deadline);
            let answer = first_of(places, ask, head_start).await;
            let took = begun.elapsed();
            match (answer, expected) {
                (Ok((place, bytes)), Ok(winner)) => {
                    assert_eq!((place, &bytes[..]), (winner, &payload[..]), "case {number}");
                }
                (Err(failed), Err(kind)) => {
                    assert_eq!(failed.last().unwrap().1.kind, kind, "case {number}");
                }
                (answer, _) => panic!("case {number}: {answer:?}"),
            }
            assert!(took >= head_start * waits, "case {number}: {took:?}");
            assert!(took < deadline - begun, "case {number}: {took:?}");
        }
    }
}
