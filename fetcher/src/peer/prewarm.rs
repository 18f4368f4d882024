// SPDX-License-Identifier: Apache-2.0
//! Nodes that ask each other to bring an image before anybody asks for it.
//!
//! The request names an image by its repository and the digest of its manifest, and nothing else: the asked
//! node fetches the manifest itself, with its own credentials, as far as its own configuration trusts the
//! repository, and takes the chunks from the zone like any other. A node can so make another fetch what that
//! one may fetch anyway, and no more; how much of that is bounded. The work ends with the stream.
//!
//! **Bounds** streams: [`STREAMS`]; requests: [`STARTS_PER_MINUTE`] on average and a burst of [`STARTS_SAVED`];
//! a report: [`LAYERS_MAX`] layers, texts of [`TEXT_MAX_CHARS`]; silence: [`SILENCE`]. Who asks must be in the
//! view.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use sluice_blockindex::digest::ManifestDigest;
use sluice_proto::peer::{Place, PrewarmReport, PrewarmRequest};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use super::client::{PeerError, Peers};
use super::server::{Shelf, refused, status_of};
use super::wire::WireError;
use crate::clock;
use crate::cluster::bucket::TokenBucket;
use crate::cluster::node::{Node, NodeId};
use crate::registry::{ImageReference, Repository};
use crate::store::lock;

/// Prewarms that other nodes watch at once: as many as the daemon lets run and wait.
const STREAMS: usize = 34;
/// Requests taken, on average and after a rest: a roll-out of some images, not a flood.
const STARTS_PER_MINUTE: u64 = 60;
const STARTS_SAVED: u64 = 32;
/// How long a node may take to say that it begins.
const BEGIN_DEADLINE: Duration = Duration::from_secs(10);
/// A node that says nothing for so long is given up; it says something every ten seconds.
const SILENCE: Duration = Duration::from_secs(45);
/// The most layers of a report: as of a manifest.
const LAYERS_MAX: usize = 1024;
/// The most characters of a text in a report.
const TEXT_MAX_CHARS: usize = 512;
/// The most bytes of a report.
const REPORT_MAX_BYTES: usize = 4 << 20;

/// How far another node is, as it says.
pub type Reports = BoxStream<'static, PrewarmReport>;

/// An image that a node is to bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedPrewarm {
    /// Who asks.
    pub node: NodeId,
    /// The image, by digest.
    pub reference: ImageReference,
    /// Only what its boot list names.
    pub boot: bool,
}

impl WantedPrewarm {
    /// Of an image in a repository.
    #[must_use]
    pub fn new(node: NodeId, place: &Repository, digest: ManifestDigest, boot: bool) -> Self {
        let reference = place.with_digest(digest);
        Self {
            node,
            reference,
            boot,
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn to_proto(&self) -> PrewarmRequest {
        let digest = self.reference.digest();
        PrewarmRequest {
            node: self.node.to_string(),
            place: Some(Place {
                host: self.reference.host().to_owned(),
                repository: self.reference.repository().to_owned(),
            }),
            manifest_digest: digest
                .map(|it| Bytes::copy_from_slice(it.as_bytes()))
                .unwrap_or_default(),
            boot: self.boot,
        }
    }
}

impl TryFrom<PrewarmRequest> for WantedPrewarm {
    type Error = WireError;

    fn try_from(request: PrewarmRequest) -> Result<Self, WireError> {
        let malformed = |field| WireError::Malformed { field };
        let place = request.place.ok_or_else(|| malformed("place"))?;
        let place = Repository::new(&place.host, &place.repository);
        let place = place.map_err(|_| malformed("place"))?;
        let digest: Result<[u8; 32], _> = request.manifest_digest.as_ref().try_into();
        let digest = digest.map_err(|_| malformed("manifest digest"))?;
        let (node, boot) = (NodeId::parse(&request.node)?, request.boot);
        let digest = ManifestDigest::from_bytes(digest);
        Ok(Self::new(node, &place, digest, boot))
    }
}

/// What a node says, cut to what is of use.
fn bounded(mut report: PrewarmReport) -> Result<PrewarmReport, WireError> {
    if report.layers.len() > LAYERS_MAX {
        return Err(WireError::TooMany {
            what: "layers of a report",
            count: report.layers.len() as u64,
            limit: LAYERS_MAX as u64,
        });
    }
    let cut = |text: &mut String| {
        if let Some((end, _)) = text.char_indices().nth(TEXT_MAX_CHARS) {
            text.truncate(end);
        }
    };
    for text in [
        &mut report.phase,
        &mut report.manifest_digest,
        &mut report.error,
        &mut report.note,
    ] {
        cut(text);
    }
    for layer in &mut report.layers {
        for text in [
            &mut layer.phase,
            &mut layer.error,
            &mut layer.diff_id,
            &mut layer.blob_digest,
        ] {
            cut(text);
        }
    }
    Ok(report)
}

impl Peers {
    /// Asks a node to bring an image; the stream says how far it is, and ends with it. Dropped, it ends the
    /// work.
    ///
    /// **Errors** [`PeerError`], within [`BEGIN_DEADLINE`]; those of the stream are its last item.
    pub async fn prewarm(
        &self,
        node: &Node,
        wanted: &WantedPrewarm,
    ) -> Result<BoxStream<'static, Result<PrewarmReport, PeerError>>, PeerError> {
        let mut client = self
            .client(node)?
            .max_decoding_message_size(REPORT_MAX_BYTES);
        let begun = client.prewarm(Request::new(wanted.to_proto()));
        let begun = tokio::time::timeout(BEGIN_DEADLINE, begun).await;
        let begun = begun.map_err(|_| PeerError::Silent(BEGIN_DEADLINE))??;
        let reports = begun.into_inner();
        let stream = futures::stream::unfold(Some(reports), |reports| async move {
            let mut reports = reports?;
            let next = tokio::time::timeout(SILENCE, reports.next()).await;
            match next {
                Err(_) => Some((Err(PeerError::Silent(SILENCE)), None)),
                Ok(None) => None,
                Ok(Some(Err(status))) => Some((Err(status.into()), None)),
                Ok(Some(Ok(report))) => match bounded(report) {
                    Ok(report) => Some((Ok(report), Some(reports))),
                    Err(error) => Some((Err(error.into()), None)),
                },
            }
        });
        Ok(stream.boxed())
    }
}

/// Where other nodes ask for prewarms.
#[derive(Debug)]
pub(super) struct PrewarmDesk {
    streams: Arc<Semaphore>,
    starts: Mutex<TokenBucket>,
}

impl PrewarmDesk {
    pub(super) fn new() -> Self {
        // The bucket counts whole tokens a second.
        let starts = TokenBucket::new(STARTS_PER_MINUTE / 60, STARTS_SAVED, clock::now());
        Self {
            streams: Arc::new(Semaphore::new(STREAMS)),
            starts: Mutex::new(starts),
        }
    }

    /// Begins what a node asks for.
    pub(super) async fn take(
        &self,
        peers: &Peers,
        shelf: &Arc<dyn Shelf>,
        request: PrewarmRequest,
        stop: CancellationToken,
    ) -> Result<impl Stream<Item = Result<PrewarmReport, Status>> + Send + use<>, Status> {
        let wanted = WantedPrewarm::try_from(request).map_err(|error| refused(&error))?;
        if peers.view().node(&wanted.node).is_none() {
            return Err(Status::permission_denied(
                "the asker is no member of the cluster",
            ));
        }
        let busy = |_| Status::resource_exhausted("too many prewarms are watched");
        let turn = Arc::clone(&self.streams).try_acquire_owned();
        let turn = turn.map_err(busy)?;
        if !lock(&self.starts).try_take(1, clock::now()) {
            let text = "too many prewarms are asked for";
            return Err(Status::resource_exhausted(text));
        }
        let begun = tokio::time::timeout(BEGIN_DEADLINE, shelf.prewarm(wanted)).await;
        let begun = begun.map_err(|_| Status::unavailable("too slow"))?;
        let reports = begun.map_err(|refused| status_of(&refused))?;
        let reports = reports.map(move |report| {
            let _held = &turn;
            Ok(report)
        });
        Ok(reports.take_until(stop.cancelled_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::peer::PrewarmedLayer;

    #[test]
    fn requests_are_read_back_and_checked() {
        let place = Repository::new("r.test:5000", "a/b").unwrap();
        let node = NodeId::parse("n").unwrap();
        let wanted = WantedPrewarm::new(node, &place, ManifestDigest::of(b"m"), true);
        let sent = wanted.to_proto();
        assert_eq!(WantedPrewarm::try_from(sent.clone()), Ok(wanted));
        let wrong: [fn(&mut PrewarmRequest); 4] = [
            |it| it.node = String::new(),
            |it| it.place = None,
            |it| it.place.as_mut().unwrap().repository = "../etc".into(),
            |it| it.manifest_digest = Bytes::from_static(b"short"),
        ];
        for (number, wrong) in wrong.into_iter().enumerate() {
            let mut bad = sent.clone();
            wrong(&mut bad);
            assert!(WantedPrewarm::try_from(bad).is_err(), "{number}");
        }
    }

    #[test]
    fn a_report_is_cut_to_what_is_of_use() {
        let layer = PrewarmedLayer {
            error: "\u{e4}".repeat(2 * TEXT_MAX_CHARS),
            ..PrewarmedLayer::default()
        };
        let report = PrewarmReport {
            layers: vec![layer.clone(); LAYERS_MAX],
            ..PrewarmReport::default()
        };
        let short = bounded(report.clone()).unwrap();
        assert_eq!(short.layers[7].error.chars().count(), TEXT_MAX_CHARS);
        let mut long = report;
        long.layers.push(layer);
        assert!(bounded(long).is_err());
    }
}
