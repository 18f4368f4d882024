// SPDX-License-Identifier: Apache-2.0
//! What a pull needs of containerd's snapshots and diff services.

use std::collections::HashMap;

use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::types::{Descriptor, Mount};
use tonic::Code;
use tonic::transport::Channel;

use crate::containerd::{Containerd, ContainerdError, refused};

/// What [`Snapshots::prepare`] found.
#[derive(Debug)]
pub(super) enum Prepared {
    /// The snapshotter has the layer: nothing is to be unpacked.
    Exists,
    /// Unpack here, then commit.
    Active(Vec<Mount>),
}

/// One snapshotter of containerd.
#[derive(Debug, Clone, Copy)]
pub(super) struct Snapshots<'a> {
    /// The connection, under the pull's lease.
    pub(super) containerd: &'a Containerd,
    /// Its name.
    pub(super) snapshotter: &'a str,
}

impl Snapshots<'_> {
    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.containerd.channel())
    }

    /// Whether a snapshot of this name is committed.
    pub(super) async fn has_snapshot(&self, name: &str) -> Result<bool, ContainerdError> {
        let request = StatSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: name.to_owned(),
        };
        match self
            .snapshots()
            .stat(self.containerd.request(request))
            .await
        {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(refused("look for snapshot", name)(status)),
        }
    }

    /// Asks for a place to unpack to; `labels` lets a lazy snapshotter decline.
    pub(super) async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Prepared, ContainerdError> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        match self
            .snapshots()
            .prepare(self.containerd.request(request))
            .await
        {
            Ok(answer) => Ok(Prepared::Active(answer.into_inner().mounts)),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Prepared::Exists),
            Err(status) => Err(refused("prepare snapshot", key)(status)),
        }
    }

    /// Unpacks a blob of the content store to `mounts`; returns the digest of its tar.
    pub(super) async fn apply(
        &self,
        blob: Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<String, ContainerdError> {
        let what = format!("blob {}", blob.digest);
        let request = ApplyRequest {
            diff: Some(blob),
            mounts,
            ..ApplyRequest::default()
        };
        // As long as it takes: containerd works on local files.
        let applied = DiffClient::new(self.containerd.channel())
            .apply(self.containerd.unlimited(request))
            .await;
        let applied = applied
            .map_err(refused("unpack", what))?
            .into_inner()
            .applied;
        Ok(applied
            .map(|descriptor| descriptor.digest)
            .unwrap_or_default())
    }

    /// Makes an active snapshot a committed one. That it exists already is success.
    pub(super) async fn commit(&self, name: &str, key: &str) -> Result<(), ContainerdError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            ..CommitSnapshotRequest::default()
        };
        match self
            .snapshots()
            .commit(self.containerd.request(request))
            .await
        {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                self.remove(key).await;
                Ok(())
            }
            Err(status) => Err(refused("commit snapshot", name)(status)),
        }
    }

    /// Drops an active snapshot; what cannot be dropped now goes with the lease.
    pub(super) async fn remove(&self, key: &str) {
        let request = RemoveSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.to_owned(),
        };
        if let Err(status) = self
            .snapshots()
            .remove(self.containerd.request(request))
            .await
        {
            tracing::debug!(
                key,
                status = status.message(),
                "active snapshot is left to its lease"
            );
        }
    }
}
