// SPDX-License-Identifier: Apache-2.0
//! What a pull needs of containerd's API, each call in a namespace and under a lease.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    AbortRequest, ApplyRequest, CreateImageRequest, CreateRequest, DeleteRequest, Image, Info,
    InfoRequest, UpdateImageRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::{Descriptor, Mount};
use futures::StreamExt;
use prost_types::{FieldMask, Timestamp};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::PullError;
use crate::grpc;
use crate::image::BlobBody;

/// Bytes of content per message; containerd takes at most 16 MiB, and copies each.
const WRITE_BYTES: usize = 1024 * 1024;
/// Messages on their way to containerd.
const WRITES_AHEAD: usize = 4;
/// How long a call may take that moves no content. Prepare may wait for the snapshotter's network
/// budget and for containerd's lock, which its garbage collection holds for a while.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// After this containerd drops what a pull that died left behind.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// What [`Containerd::prepare`] found.
#[derive(Debug)]
pub(super) enum Prepared {
    /// The snapshotter has the layer: nothing is to be unpacked.
    Exists,
    /// Unpack here, then commit.
    Active(Vec<Mount>),
}

/// containerd, seen from one namespace.
#[derive(Debug)]
pub(super) struct Containerd {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    lease: Option<(String, MetadataValue<Ascii>)>,
    snapshotter: String,
}

fn refused(action: &'static str, what: impl ToString) -> impl FnOnce(Status) -> PullError {
    let what = what.to_string();
    move |status| PullError::Containerd {
        action,
        what,
        reason: status.message().to_owned(),
    }
}

fn header(name: &'static str, value: &str) -> Result<MetadataValue<Ascii>, PullError> {
    value.parse().map_err(|_| PullError::Containerd {
        action: "use",
        what: format!("{name} {value:?}"),
        reason: "not plain ASCII".to_owned(),
    })
}

impl Containerd {
    /// Connects; asks nothing yet.
    pub(super) async fn connect(
        socket: &Path,
        namespace: &str,
        snapshotter: &str,
    ) -> Result<Self, PullError> {
        let channel = grpc::connect(socket)
            .await
            .map_err(|e| PullError::Containerd {
                action: "connect to",
                what: format!("containerd at {}", socket.display()),
                reason: std::error::Error::source(&e).map_or(e.to_string(), ToString::to_string),
            })?;
        let namespace = header("namespace", namespace)?;
        Ok(Self {
            channel,
            namespace,
            lease: None,
            snapshotter: snapshotter.to_owned(),
        })
    }

    fn unlimited<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("containerd-namespace", self.namespace.clone());
        if let Some((_, lease)) = &self.lease {
            request
                .metadata_mut()
                .insert("containerd-lease", lease.clone());
        }
        request
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.unlimited(message);
        request.set_timeout(CALL_TIMEOUT);
        request
    }

    /// From here on what is made is kept from garbage collection until [`Self::release`].
    pub(super) async fn lease(&mut self, id: &str) -> Result<(), PullError> {
        let expire = Timestamp::from(SystemTime::now() + LEASE_LIFE).to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expire)]);
        let request = self.request(CreateRequest {
            id: id.to_owned(),
            labels,
        });
        let created = LeasesClient::new(self.channel.clone())
            .create(request)
            .await;
        created.map_err(refused("create", "lease"))?;
        self.lease = Some((id.to_owned(), header("lease", id)?));
        Ok(())
    }

    /// Ends the lease.
    pub(super) async fn release(&mut self) -> Result<(), PullError> {
        let Some((id, _)) = self.lease.take() else {
            return Ok(());
        };
        let request = self.request(DeleteRequest { id, sync: false });
        let deleted = LeasesClient::new(self.channel.clone())
            .delete(request)
            .await;
        deleted.map(|_| ()).map_err(refused("delete", "lease"))
    }

    /// Whether the content store has a blob; gives it `labels` if so.
    pub(super) async fn label_content(
        &self,
        digest: &str,
        labels: &HashMap<String, String>,
    ) -> Result<bool, PullError> {
        let mut client = ContentClient::new(self.channel.clone());
        let request = self.request(InfoRequest {
            digest: digest.to_owned(),
        });
        match client.info(request).await {
            Ok(_) => {}
            Err(status) if status.code() == Code::NotFound => return Ok(false),
            Err(status) => return Err(refused("look for", digest)(status)),
        }
        let info = Info {
            digest: digest.to_owned(),
            labels: labels.clone(),
            ..Info::default()
        };
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let update = UpdateRequest {
            info: Some(info),
            update_mask: Some(FieldMask { paths }),
        };
        client
            .update(self.request(update))
            .await
            .map_err(refused("label", digest))?;
        Ok(true)
    }

    /// Writes a blob to the content store, which verifies it.
    pub(super) async fn write_content(
        &self,
        digest: &str,
        total: u64,
        labels: HashMap<String, String>,
        mut body: BlobBody,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), PullError> {
        let total = i64::try_from(total).unwrap_or(i64::MAX);
        let lease = self.lease.as_ref().map_or("", |(id, _)| id.as_str());
        // Unique to this run: two pulls of one blob do not wait for each other's lock.
        let reference = format!("sluice-pull-{lease}-{digest}");
        let (messages, stream) = tokio::sync::mpsc::channel(WRITES_AHEAD);
        let message = |action: WriteAction, offset: i64, data: Bytes| WriteContentRequest {
            action: action.into(),
            r#ref: reference.clone(),
            total,
            expected: digest.to_owned(),
            offset,
            data: data.into(),
            labels: HashMap::new(),
        };
        let feed = async {
            let mut offset = 0_i64;
            while let Some(part) = body.next().await {
                let mut part = part?;
                progress(part.len() as u64);
                while !part.is_empty() {
                    let piece = part.split_to(part.len().min(WRITE_BYTES));
                    let length = i64::try_from(piece.len()).unwrap_or(i64::MAX);
                    if messages
                        .send(message(WriteAction::Write, offset, piece))
                        .await
                        .is_err()
                    {
                        // containerd has ended the call; its answer says why.
                        return Ok(());
                    }
                    offset = offset.saturating_add(length);
                }
            }
            let mut commit = message(WriteAction::Commit, offset, Bytes::new());
            commit.labels = labels;
            let _ = messages.send(commit).await;
            drop(messages);
            Ok::<(), PullError>(())
        };
        let write = async {
            let stream = futures::stream::unfold(stream, |mut stream| async move {
                stream.recv().await.map(|message| (message, stream))
            });
            let mut client = ContentClient::new(self.channel.clone());
            let mut answers = client.write(self.unlimited(stream)).await?.into_inner();
            let mut committed = false;
            while let Some(answer) = answers.message().await? {
                committed = answer.action == i32::from(WriteAction::Commit);
            }
            match committed {
                true => Ok(()),
                false => Err(Status::aborted("the write ended before its commit")),
            }
        };
        // A failed body ends the feed, which closes the call.
        let result = tokio::try_join!(feed, async {
            match write.await {
                Ok(()) => Ok(()),
                Err(status) if status.code() == Code::AlreadyExists => Ok(()),
                Err(status) => Err(refused("write", format!("blob {digest}"))(status)),
            }
        });
        if result.is_err() {
            let abort = self.request(AbortRequest {
                r#ref: reference.clone(),
            });
            let _ = ContentClient::new(self.channel.clone()).abort(abort).await;
        }
        result.map(|_| ())
    }

    /// Creates the image record, or lets an existing one point to `target`.
    pub(super) async fn put_image(&self, name: &str, target: Descriptor) -> Result<(), PullError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let image = Image {
            name: name.to_owned(),
            target: Some(target),
            ..Image::default()
        };
        let create = CreateImageRequest {
            image: Some(image.clone()),
            source_date_epoch: None,
        };
        match client.create(self.request(create)).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(refused("create image", name)(status)),
        }
        let update = UpdateImageRequest {
            image: Some(image),
            update_mask: Some(FieldMask {
                paths: vec!["target".to_owned()],
            }),
            source_date_epoch: None,
        };
        let updated = client.update(self.request(update)).await;
        updated.map(|_| ()).map_err(refused("update image", name))
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    /// Whether a snapshot of this name is committed.
    pub(super) async fn has_snapshot(&self, name: &str) -> Result<bool, PullError> {
        let request = StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: name.to_owned(),
        };
        match self.snapshots().stat(self.request(request)).await {
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
    ) -> Result<Prepared, PullError> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        match self.snapshots().prepare(self.request(request)).await {
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
    ) -> Result<String, PullError> {
        let what = format!("blob {}", blob.digest);
        let request = ApplyRequest {
            diff: Some(blob),
            mounts,
            ..ApplyRequest::default()
        };
        // As long as it takes: containerd works on local files.
        let applied = DiffClient::new(self.channel.clone())
            .apply(self.unlimited(request))
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
    pub(super) async fn commit(&self, name: &str, key: &str) -> Result<(), PullError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            ..CommitSnapshotRequest::default()
        };
        match self.snapshots().commit(self.request(request)).await {
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
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        };
        if let Err(status) = self.snapshots().remove(self.request(request)).await {
            tracing::debug!(
                key,
                status = status.message(),
                "active snapshot is left to its lease"
            );
        }
    }
}
