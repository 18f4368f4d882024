// SPDX-License-Identifier: Apache-2.0
//! containerd's snapshots service: the only place that knows `containerd-snapshots`.
//!
//! The crate brings tonic 0.9 and its generated messages. Known limits, each without effect here:
//! it drops Commit's `parent` (needed for the `rebase` capability alone, which we do not have) and
//! a mount's `target` (we give none). Conversion is in [`convert`], errors in [`status`].

mod convert;
mod status;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_snapshots::{Info, Snapshotter, api, tonic};
use futures::stream::{self, Iter};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::snapshots::{Prepared, Snapshots};
use status::Refusal;

type Result<T> = std::result::Result<T, Refusal>;

/// Serves the snapshots service on a socket until it is told to stop; then requests under way are
/// answered first.
pub async fn serve(
    snapshots: Snapshots,
    listener: UnixListener,
    stop: CancellationToken,
) -> std::result::Result<(), tonic::transport::Error> {
    let service = containerd_snapshots::server(Arc::new(Service(snapshots)));
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            stop.cancelled().await
        })
        .await
}

/// The snapshots, as the crate's trait wants them.
#[derive(Debug)]
struct Service(Snapshots);

#[tonic::async_trait]
impl Snapshotter for Service {
    type Error = Refusal;
    type InfoStream = Iter<std::vec::IntoIter<Result<Info>>>;

    async fn stat(&self, key: String) -> Result<Info> {
        Ok(convert::info(self.0.stat(&key).await?))
    }

    async fn update(&self, info: Info, fieldpaths: Option<Vec<String>>) -> Result<Info> {
        let labels = convert::labels(info.labels);
        let mask = fieldpaths.unwrap_or_default();
        Ok(convert::info(
            self.0.update(&info.name, labels, mask).await?,
        ))
    }

    async fn usage(&self, key: String) -> Result<containerd_snapshots::Usage> {
        Ok(convert::usage(self.0.usage(&key).await?))
    }

    async fn mounts(&self, key: String) -> Result<Vec<api::types::Mount>> {
        Ok(convert::mounts(self.0.mounts(&key).await?))
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<api::types::Mount>> {
        match self
            .0
            .prepare(&key, &parent, convert::labels(labels))
            .await?
        {
            Prepared::Mounts(mounts) => Ok(convert::mounts(mounts)),
            Prepared::Exists { name } => Err(Refusal::Exists { name }),
        }
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<api::types::Mount>> {
        Ok(convert::mounts(
            self.0.view(&key, &parent, convert::labels(labels)).await?,
        ))
    }

    async fn commit(
        &self,
        name: String,
        key: String,
        labels: HashMap<String, String>,
    ) -> Result<()> {
        Ok(self.0.commit(&name, &key, convert::labels(labels)).await?)
    }

    async fn remove(&self, key: String) -> Result<()> {
        Ok(self.0.remove(&key).await?)
    }

    async fn clear(&self) -> Result<()> {
        Ok(self.0.cleanup().await?)
    }

    async fn list(&self, _snapshotter: String, filters: Vec<String>) -> Result<Self::InfoStream> {
        let records = self.0.list(&filters).await?;
        let infos: Vec<_> = records
            .into_iter()
            .map(|record| Ok(convert::info(record)))
            .collect();
        Ok(stream::iter(infos))
    }
}

#[cfg(test)]
mod tests;
