// SPDX-License-Identifier: Apache-2.0
//! Prewarming an image on behalf of the command line.

use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use sluice_fetcher::registry::ImageReference;
use sluice_proto::control::{PrewarmLayer, PrewarmProgress, PrewarmRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{ControlError, ControlService};
use crate::prewarm::{LayerProgress, PrewarmRefused, Progress, Scope, Watching};

/// Reports that wait for the client; the work does not wait for it.
const QUEUED_REPORTS: usize = 4;
/// A client hears of the work this often even if nothing changes: it would take silence for a hang.
const BEAT: Duration = Duration::from_secs(10);
/// Reports are this far apart at least.
const PAUSE: Duration = Duration::from_millis(100);

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

fn layer_of(layer: &LayerProgress) -> PrewarmLayer {
    PrewarmLayer {
        diff_id: layer.diff_id.clone(),
        blob_digest: layer.blob.clone(),
        present_bytes: layer.present_bytes,
        total_bytes: layer.total_bytes,
        phase: layer.phase.as_str().to_owned(),
        error: layer.error.clone(),
    }
}

fn report_of(progress: &Progress) -> PrewarmProgress {
    let manifest = progress.manifest.map(|digest| digest.to_string());
    PrewarmProgress {
        phase: progress.phase.as_str().to_owned(),
        manifest_digest: manifest.unwrap_or_default(),
        layers: progress.layers.iter().map(layer_of).collect(),
        error: progress.error.clone(),
        note: progress.note.clone(),
        node: String::new(),
    }
}

impl ControlService {
    /// Starts the work; it ends when the client goes away, unless it is detached.
    pub(super) fn prewarm(&self, request: &PrewarmRequest) -> Result<PrewarmStream, ControlError> {
        let (reference, scope) = parse(request)?;
        let watching = self.prewarms.start(reference, scope, request.detach)?;
        let (reports, receiver) = mpsc::channel(QUEUED_REPORTS);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = tell(watching, &reports) => {}
                () = reports.closed() => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

/// Tells a client how far it is, to the end.
async fn tell(mut watching: Watching, reports: &Reports) {
    let progress = watching.progress();
    loop {
        let (report, is_last) = {
            let now = progress.borrow_and_update();
            (report_of(&now), now.phase.is_last())
        };
        if reports.send(Ok(report)).await.is_err() || is_last {
            return;
        }
        tokio::time::sleep(PAUSE).await;
        if let Ok(Err(_)) = tokio::time::timeout(BEAT, progress.changed()).await {
            // It ended without a last word: the client sees the stream end without one.
            return;
        }
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
