// SPDX-License-Identifier: Apache-2.0
//! containerd's snapshots service: the only place that knows `containerd-snapshots`.
//!
//! The crate brings tonic 0.9 and its generated messages. Known limits, each without effect here:
//! it drops Commit's `parent` (needed for the `rebase` capability alone, which we do not have) and
//! a mount's `target` (we give none). Conversion is in [`convert`], errors in [`status`].

mod convert;
mod limits;
mod status;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use containerd_snapshots::{Info, Snapshotter, api, tonic};
use futures::stream::{self, Iter};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::snapshots::{Prepared, SnapshotError, Snapshots};
use crate::telemetry::SnapshotMetrics;
pub use limits::RequestLimits;
use status::Refusal;

type Result<T> = std::result::Result<T, Refusal>;

/// Serves the snapshots service on a socket until it is told to stop; then requests under way are
/// answered first.
pub async fn serve(
    snapshots: Snapshots,
    listener: UnixListener,
    metrics: SnapshotMetrics,
    limits: RequestLimits,
    stop: CancellationToken,
) -> std::result::Result<(), tonic::transport::Error> {
    let service = containerd_snapshots::server(Arc::new(Service {
        snapshots,
        metrics,
        limits,
    }));
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            stop.cancelled().await
        })
        .await
}

/// The snapshots, as the crate's trait wants them.
#[derive(Debug)]
struct Service {
    snapshots: Snapshots,
    metrics: SnapshotMetrics,
    limits: RequestLimits,
}

impl Service {
    /// Counts and logs a request.
    async fn answer<T>(
        &self,
        method: &'static str,
        key: &str,
        operation: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let limit = self.limits.of(method);
        let subject = format!("{method} {key}");
        let step = self
            .metrics
            .steps()
            .enter(limit.step, "containerd", subject);
        let result = match tokio::time::timeout(limit.deadline, operation).await {
            Ok(result) => result,
            // What was begun is carried through all the same.
            Err(_) => Err(Refusal::Failed(SnapshotError::Deadline {
                waited: limit.deadline,
            })),
        };
        drop(step);
        let code = result.as_ref().err().map_or(tonic::Code::Ok, Refusal::code);
        let took = begun.elapsed();
        self.metrics.requested(method, format!("{code:?}"), took);
        match &result {
            Err(Refusal::Failed(error)) if refusal_is_ours(code) => {
                tracing::error!(method, key, %error, ?took, "request failed");
            }
            _ => tracing::debug!(method, key, ?code, ?took, "request answered"),
        }
        result
    }
}

/// Whether a failure is the node's trouble and not the client's.
fn refusal_is_ours(code: tonic::Code) -> bool {
    matches!(
        code,
        tonic::Code::Internal
            | tonic::Code::DataLoss
            | tonic::Code::ResourceExhausted
            | tonic::Code::DeadlineExceeded
    )
}

#[tonic::async_trait]
impl Snapshotter for Service {
    type Error = Refusal;
    type InfoStream = Iter<std::vec::IntoIter<Result<Info>>>;

    async fn stat(&self, key: String) -> Result<Info> {
        let operation = async { Ok(convert::info(self.snapshots.stat(&key).await?)) };
        self.answer("Stat", &key, operation).await
    }

    async fn update(&self, info: Info, fieldpaths: Option<Vec<String>>) -> Result<Info> {
        let (name, mask) = (info.name, fieldpaths.unwrap_or_default());
        let operation = async {
            let labels = convert::labels(info.labels);
            Ok(convert::info(
                self.snapshots.update(&name, labels, mask).await?,
            ))
        };
        self.answer("Update", &name, operation).await
    }

    async fn usage(&self, key: String) -> Result<containerd_snapshots::Usage> {
        let operation = async { Ok(convert::usage(self.snapshots.usage(&key).await?)) };
        self.answer("Usage", &key, operation).await
    }

    async fn mounts(&self, key: String) -> Result<Vec<api::types::Mount>> {
        let operation = async { Ok(convert::mounts(self.snapshots.mounts(&key).await?)) };
        self.answer("Mounts", &key, operation).await
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<api::types::Mount>> {
        let operation = async {
            match self
                .snapshots
                .prepare(&key, &parent, convert::labels(labels))
                .await?
            {
                Prepared::Mounts(mounts) => Ok(convert::mounts(mounts)),
                Prepared::Exists { name } => Err(Refusal::Exists { name }),
            }
        };
        self.answer("Prepare", &key, operation).await
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<api::types::Mount>> {
        let operation = async {
            let labels = convert::labels(labels);
            Ok(convert::mounts(
                self.snapshots.view(&key, &parent, labels).await?,
            ))
        };
        self.answer("View", &key, operation).await
    }

    async fn commit(
        &self,
        name: String,
        key: String,
        labels: HashMap<String, String>,
    ) -> Result<()> {
        let operation = async {
            Ok(self
                .snapshots
                .commit(&name, &key, convert::labels(labels))
                .await?)
        };
        self.answer("Commit", &key, operation).await
    }

    async fn remove(&self, key: String) -> Result<()> {
        let operation = async { Ok(self.snapshots.remove(&key).await?) };
        self.answer("Remove", &key, operation).await
    }

    async fn clear(&self) -> Result<()> {
        let operation = async { Ok(self.snapshots.cleanup().await?) };
        self.answer("Cleanup", "", operation).await
    }

    async fn list(&self, _snapshotter: String, filters: Vec<String>) -> Result<Self::InfoStream> {
        let operation = async {
            let records = self.snapshots.list(&filters).await?;
            let infos: Vec<_> = records.into_iter().map(|r| Ok(convert::info(r))).collect();
            Ok(stream::iter(infos))
        };
        self.answer("List", "", operation).await
    }
}

#[cfg(test)]
mod tests;
