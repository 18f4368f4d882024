// SPDX-License-Identifier: Apache-2.0
//! Prewarming an image on behalf of the command line, here and on other nodes.

use std::pin::Pin;
use std::sync::Arc;

use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use sluice_blockindex::digest::ManifestDigest;
use sluice_fetcher::cluster::node::Node;
use sluice_fetcher::peer::{Peers, WantedPrewarm};
use sluice_fetcher::registry::{ImageReference, RegistryError};
use sluice_proto::control::{PrewarmLayer, PrewarmProgress, PrewarmRequest};
use sluice_proto::peer::PrewarmReport;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{ControlError, ControlService};
use crate::prewarm::others::{Meant, Selection, SelectionError, report_of};
use crate::prewarm::{Phase, PrewarmRefused, Scope, Watching};

/// Reports that wait for the client; the work does not wait for it.
const QUEUED_REPORTS: usize = 16;
/// Other nodes that are asked at once; further ones when these have ended. What these have brought they give to
/// the others.
const NODES_AT_ONCE: usize = 64;

/// Reports as they come.
pub(super) type PrewarmStream =
    Pin<Box<dyn Stream<Item = Result<PrewarmProgress, Status>> + Send + 'static>>;

type Reports = mpsc::Sender<Result<PrewarmProgress, Status>>;

/// What the command line asks for.
fn parse(request: &PrewarmRequest) -> Result<(ImageReference, Scope), ControlError> {
    let text = request.image.as_str();
    let name = text.strip_prefix("docker://").unwrap_or(text);
    let reference = name.parse().map_err(|error| ControlError::Reference {
        image: text.to_owned(),
        problem: format!("{error}"),
    })?;
    let scope =
        Scope::parse(&request.scope).ok_or_else(|| ControlError::Scope(request.scope.clone()))?;
    Ok((reference, scope))
}

/// What a node says, as the command line hears it.
fn progress_of(node: &str, report: PrewarmReport) -> PrewarmProgress {
    let layers = report.layers.into_iter().map(|layer| PrewarmLayer {
        diff_id: layer.diff_id,
        blob_digest: layer.blob_digest,
        present_bytes: layer.present_bytes,
        total_bytes: layer.total_bytes,
        phase: layer.phase,
        error: layer.error,
    });
    PrewarmProgress {
        phase: report.phase,
        manifest_digest: report.manifest_digest,
        layers: layers.collect(),
        error: report.error,
        note: report.note,
        node: node.to_owned(),
    }
}

/// The work of one request.
struct Round {
    peers: Option<Arc<Peers>>,
    digest: Option<ManifestDigest>,
    reference: ImageReference,
    boot: bool,
    reports: Reports,
}

impl Round {
    async fn tell(&self, node: &str, report: PrewarmReport) {
        // A client that went away is noticed by who waits for it.
        let _ = self.reports.send(Ok(progress_of(node, report))).await;
    }

    /// This node, to the end.
    async fn here(&self, name: &str, watching: Watching) {
        let mut told = std::pin::pin!(watching.told());
        while let Some(progress) = told.next().await {
            self.tell(name, report_of(&progress)).await;
        }
    }

    /// Another node, to the end; what is wrong with it is its failure and nobody else's.
    async fn there(&self, node: &Node) {
        if let Err(error) = self.ask(node).await {
            let report = PrewarmReport {
                phase: Phase::Failed.as_str().to_owned(),
                error,
                ..PrewarmReport::default()
            };
            self.tell(node.id.as_str(), report).await;
        }
    }

    async fn ask(&self, node: &Node) -> Result<(), String> {
        let (peers, digest) = self.peers.as_ref().zip(self.digest).ok_or("no cluster")?;
        let wanted = WantedPrewarm::new(peers.me(), self.reference.place(), digest, self.boot);
        let begun = peers.prewarm(node, &wanted).await;
        let mut reports = begun.map_err(|error| error.to_string())?;
        let mut ended = false;
        while let Some(report) = reports.next().await {
            let report = report.map_err(|error| error.to_string())?;
            ended = [Phase::Done, Phase::Failed]
                .map(Phase::as_str)
                .contains(&report.phase.as_str());
            self.tell(node.id.as_str(), report).await;
        }
        match ended {
            true => Ok(()),
            false => Err("it ended without a last word".to_owned()),
        }
    }

    async fn all(&self, here: Option<(String, Watching)>, others: &[Node]) {
        let others = async {
            let mut rest = others.iter();
            let mut asked: FuturesUnordered<_> = rest
                .by_ref()
                .take(NODES_AT_ONCE)
                .map(|it| self.there(it))
                .collect();
            while asked.next().await.is_some() {
                asked.extend(rest.next().map(|it| self.there(it)));
            }
        };
        let here = async {
            if let Some((name, watching)) = here {
                self.here(&name, watching).await;
            }
        };
        tokio::join!(here, others);
    }
}

impl ControlService {
    /// Starts the work; it ends when the client goes away, unless it is detached.
    pub(super) async fn prewarm(
        &self,
        request: PrewarmRequest,
    ) -> Result<PrewarmStream, ControlError> {
        let (mut reference, scope) = parse(&request)?;
        let PrewarmRequest {
            nodes,
            zone,
            supernodes,
            detach,
            ..
        } = request;
        let selection = Selection {
            nodes,
            zone,
            supernodes,
        };
        let view = self.cluster.as_ref().map(|view| Arc::clone(&view.borrow()));
        let Meant { me, others } = selection.of(view.as_deref())?;
        if !others.is_empty() {
            // All are to bring the same, whoever moves the tag meanwhile.
            let pinned = self.prewarms.pin(&reference).await;
            reference = pinned.map_err(|error| ControlError::Registry(Box::new(error)))?;
        }
        let here = match me {
            Some(name) => Some((name, self.prewarms.start(reference.clone(), scope, detach)?)),
            None => None,
        };
        let (reports, receiver) = mpsc::channel(QUEUED_REPORTS);
        let (stop, closed) = (self.stop.clone(), reports.clone());
        let round = Round {
            peers: self.lazy.parts().shelf.peers().cloned(),
            digest: reference.digest(),
            reference,
            boot: scope == Scope::Boot,
            reports,
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = round.all(here, &others) => {}
                () = closed.closed(), if !detach => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

impl From<PrewarmRefused> for ControlError {
    fn from(refused: PrewarmRefused) -> Self {
        match refused {
            PrewarmRefused::Full => Self::Busy(refused.to_string()),
            PrewarmRefused::Stopping => Self::Stopping,
        }
    }
}

impl From<SelectionError> for ControlError {
    fn from(error: SelectionError) -> Self {
        Self::Nodes(error)
    }
}

/// Whether a registry's refusal is the caller's to mend.
pub(super) fn is_unknown(error: &RegistryError) -> bool {
    matches!(error, RegistryError::NotFound { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_the_command_line_writes_them() {
        let request = |image: &str, scope: &str| PrewarmRequest {
            image: image.to_owned(),
            scope: scope.to_owned(),
            ..PrewarmRequest::default()
        };
        for image in ["docker://r.test/a/b:1", "r.test/a/b:1"] {
            let (reference, scope) = parse(&request(image, "boot")).unwrap();
            assert_eq!(
                (reference.to_string().as_str(), scope),
                ("r.test/a/b:1", Scope::Boot)
            );
        }
        let bad = parse(&request("R.test//", ""));
        assert!(
            matches!(bad, Err(ControlError::Reference { .. })),
            "{bad:?}"
        );
        let bad = parse(&request("r.test/a:1", "half"));
        assert!(matches!(bad, Err(ControlError::Scope(_))), "{bad:?}");
    }
}
