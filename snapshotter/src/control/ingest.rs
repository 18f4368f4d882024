// SPDX-License-Identifier: Apache-2.0
//! Writing a blob into containerd's content store, as a pulling client does.
//!
//! A lease with an expiry holds what is written until the manifest refers to it, so that containerd's
//! GC neither takes a blob before its label is there nor keeps it for ever when we die. The ingest has
//! a name made from the blob's digest: a second try goes on where the first one broke. containerd
//! verifies the digest at commit; bytes that do not fit are aborted, so a retry starts afresh.
//!
//! Never called from a snapshots RPC: these are writes.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use containerd_client::services::v1 as api;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use futures::StreamExt as _;
use prost_types::FieldMask;
use sluice_blockindex::digest::BlobDigest;
use sluice_blockindex::extent::Extent;
use sluice_fetcher::source::{BlobSource, Priority, ReadContext, SourceError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use crate::resolve::{Containerd, ContentError};

/// The metadata key of a lease.
const LEASE_HEADER: &str = "containerd-lease";
/// A lease lives this long if nobody deletes it. Longer than any blob takes.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Bytes in one message: containerd takes up to 16 MiB; larger ones cost memory, smaller ones time.
const MESSAGE_BYTES: usize = 1 << 20;
/// Keys and values of labels together must stay below this, or containerd refuses them.
const LABEL_CAP_BYTES: usize = 4096;

/// The slowest disk on which containerd is still waited for while it hashes what it has of a blob, or
/// syncs all of it. Faster: large blobs fail on slow disks; slower: a stuck containerd is noticed late.
const SLOWEST_BYTES_PER_SECOND: u64 = 8 << 20;

/// How long containerd may take for what goes through a whole blob.
fn whole_blob_deadline(rpc_deadline: Duration, blob_bytes: u64) -> Duration {
    rpc_deadline + Duration::from_secs(blob_bytes / SLOWEST_BYTES_PER_SECOND)
}

/// Why a blob could not be put into the content store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IngestError {
    /// containerd did not answer or refused.
    #[error(transparent)]
    Containerd(#[from] ContentError),
    /// containerd's answer makes no sense.
    #[error("containerd answers a write of {blob} with offset {actual}, expected {expected}")]
    Offset {
        /// What was being written.
        blob: BlobDigest,
        /// Sent so far.
        expected: u64,
        /// Said by containerd.
        actual: i64,
    },
    /// The bytes could not be fetched.
    #[error("fetch blob {blob}: {source}")]
    Source {
        /// What was being fetched.
        blob: BlobDigest,
        /// Why it failed.
        source: SourceError,
    },
    /// The bytes that came are not the blob.
    #[error("blob {blob} does not have its digest: {message}")]
    Digest {
        /// What was being written.
        blob: BlobDigest,
        /// What containerd said.
        message: String,
    },
}

/// A lease in a namespace; [`Lease::release`] ends it, its expiry does otherwise.
#[derive(Debug)]
pub struct Lease {
    containerd: Containerd,
    namespace: String,
    id: String,
}

impl Lease {
    /// Takes a lease.
    pub async fn take(containerd: &Containerd, namespace: &str) -> Result<Self, ContentError> {
        let now = SystemTime::now();
        let nanos = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |age| age.as_nanos());
        let id = format!("sluice-content-{nanos}-{}", std::process::id());
        let expiry = prost_types::Timestamp::from(now + LEASE_LIFE).to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expiry)]);
        let call = async {
            let message = api::CreateRequest {
                id: id.clone(),
                labels,
            };
            let request = containerd.request(namespace, message)?;
            LeasesClient::new(containerd.channel())
                .create(request)
                .await
        };
        containerd.bounded("create a lease", call).await?;
        Ok(Self {
            containerd: containerd.clone(),
            namespace: namespace.to_owned(),
            id,
        })
    }

    /// Its name, for the metadata key `containerd-lease` of other requests.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Ends the lease.
    pub async fn release(self) -> Result<(), ContentError> {
        let call = async {
            let message = api::DeleteRequest {
                id: self.id.clone(),
                sync: false,
            };
            let request = self.containerd.request(&self.namespace, message)?;
            LeasesClient::new(self.containerd.channel())
                .delete(request)
                .await
        };
        self.containerd.bounded("delete a lease", call).await?;
        Ok(())
    }
}

/// One blob to write.
#[derive(Clone, Debug)]
pub struct Ingest {
    /// Its digest.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Labels for the content; those too long for containerd are left out.
    pub labels: HashMap<String, String>,
}

impl Ingest {
    /// Fetches the blob and writes it; returns when containerd has committed it, or had it already.
    ///
    /// **Cancel** safe: the next call goes on from where this one stopped.
    pub async fn run(
        &self,
        lease: &Lease,
        source: &dyn BlobSource,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), IngestError> {
        let Some(mut writer) = Writer::open(lease, self).await? else {
            progress(self.blob_bytes);
            return Ok(());
        };
        let offset = writer.offset;
        progress(offset);
        if let Some(rest) = Extent::new(offset, self.blob_bytes).filter(|e| !e.is_empty()) {
            let failed = |source| IngestError::Source {
                blob: self.blob,
                source,
            };
            let context = ReadContext::new(Priority::Background);
            let stream = source.open(&context, rest).await.map_err(failed)?;
            let mut body = stream.narrow(rest).map_err(failed)?.body;
            while let Some(piece) = body.next().await {
                let mut piece = piece.map_err(failed)?;
                while !piece.is_empty() {
                    let part = piece.split_to(piece.len().min(MESSAGE_BYTES));
                    writer.write(part).await?;
                    progress(writer.offset);
                }
            }
        }
        writer.commit(self).await
    }
}

/// An open write stream.
struct Writer<'a> {
    lease: &'a Lease,
    blob: BlobDigest,
    reference: String,
    requests: mpsc::Sender<api::WriteContentRequest>,
    replies: Streaming<api::WriteContentResponse>,
    offset: u64,
}

impl<'a> Writer<'a> {
    /// Opens or resumes the ingest; `None` when the content is there.
    async fn open(lease: &'a Lease, ingest: &Ingest) -> Result<Option<Self>, IngestError> {
        let (requests, receiver) = mpsc::channel(1);
        let reference = format!("sluice-{}", ingest.blob.hex());
        let stat = api::WriteContentRequest {
            action: api::WriteAction::Stat.into(),
            r#ref: reference.clone(),
            total: signed(ingest.blob_bytes),
            expected: ingest.blob.to_string(),
            ..Default::default()
        };
        // The channel holds one message and this is its first, so this never waits.
        let _ = requests.send(stat).await;
        let containerd = &lease.containerd;
        let call = async {
            let mut request =
                containerd.request(&lease.namespace, ReceiverStream::new(receiver))?;
            // The stream lives as long as the blob takes; each message has its own deadline.
            request.metadata_mut().remove("grpc-timeout");
            insert_lease(&mut request, &lease.id)?;
            let mut replies = match ContentClient::new(containerd.channel())
                .write(request)
                .await
            {
                Err(status) if status.code() == Code::AlreadyExists => return Ok(None),
                reply => reply?.into_inner(),
            };
            match replies.message().await {
                Err(status) if status.code() == Code::AlreadyExists => Ok(None),
                Err(status) => Err(status),
                Ok(None) => Err(Status::unavailable("the write stream ended")),
                Ok(Some(first)) => Ok(Some((replies, first.offset))),
            }
        };
        // What an earlier try has written is hashed first.
        let deadline = whole_blob_deadline(containerd.rpc_deadline(), ingest.blob_bytes);
        let opened = containerd.bounded_by(deadline, "start a write", call);
        let Some((replies, offset)) = opened.await? else {
            return Ok(None);
        };
        let blob = ingest.blob;
        let offset = u64::try_from(offset)
            .ok()
            .filter(|offset| *offset <= ingest.blob_bytes)
            .ok_or(IngestError::Offset {
                blob,
                expected: 0,
                actual: offset,
            })?;
        Ok(Some(Self {
            lease,
            blob,
            reference,
            requests,
            replies,
            offset,
        }))
    }

    async fn exchange(
        &mut self,
        what: &'static str,
        deadline: Duration,
        message: api::WriteContentRequest,
    ) -> Result<Result<api::WriteContentResponse, Status>, ContentError> {
        let Self {
            requests,
            replies,
            lease,
            ..
        } = self;
        let call = async {
            // A closed channel means that the stream failed; the reply says why.
            let _ = requests.send(message).await;
            Ok(match replies.message().await {
                Ok(Some(reply)) => Ok(reply),
                Ok(None) => Err(Status::unavailable("the write stream ended")),
                Err(status) => Err(status),
            })
        };
        lease.containerd.bounded_by(deadline, what, call).await
    }

    async fn write(&mut self, data: Bytes) -> Result<(), IngestError> {
        let end = self.offset + data.len() as u64;
        let message = api::WriteContentRequest {
            action: api::WriteAction::Write.into(),
            offset: signed(self.offset),
            data: data.into(),
            ..Default::default()
        };
        let deadline = self.lease.containerd.rpc_deadline();
        let reply = self
            .exchange("write content", deadline, message)
            .await?
            .map_err(refused)?;
        if reply.offset != signed(end) {
            let (blob, actual) = (self.blob, reply.offset);
            return Err(IngestError::Offset {
                blob,
                expected: end,
                actual,
            });
        }
        self.offset = end;
        Ok(())
    }

    async fn commit(mut self, ingest: &Ingest) -> Result<(), IngestError> {
        let labels = ingest
            .labels
            .iter()
            .filter(|(key, value)| key.len() + value.len() < LABEL_CAP_BYTES)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let message = api::WriteContentRequest {
            action: api::WriteAction::Commit.into(),
            offset: signed(self.offset),
            total: signed(ingest.blob_bytes),
            expected: ingest.blob.to_string(),
            labels,
            ..Default::default()
        };
        let rpc_deadline = self.lease.containerd.rpc_deadline();
        let deadline = whole_blob_deadline(rpc_deadline, ingest.blob_bytes);
        match self.exchange("commit content", deadline, message).await? {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => {
                self.abort().await?;
                let message = status.message().to_owned();
                Err(IngestError::Digest {
                    blob: ingest.blob,
                    message,
                })
            }
            Err(status) => Err(refused(status)),
        }
    }

    async fn abort(self) -> Result<(), ContentError> {
        let Self {
            lease,
            reference,
            requests,
            replies,
            ..
        } = self;
        drop((requests, replies));
        let call = async {
            let message = api::AbortRequest { r#ref: reference };
            let request = lease.containerd.request(&lease.namespace, message)?;
            ContentClient::new(lease.containerd.channel())
                .abort(request)
                .await
        };
        lease.containerd.bounded("abort a write", call).await?;
        Ok(())
    }
}

/// Adds labels to a content that is there; its other labels stay.
pub async fn add_labels(
    containerd: &Containerd,
    namespace: &str,
    digest: &str,
    labels: HashMap<String, String>,
) -> Result<(), ContentError> {
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let call = async {
        let message = api::UpdateRequest {
            info: Some(api::Info {
                digest: digest.to_owned(),
                labels,
                ..Default::default()
            }),
            update_mask: Some(FieldMask { paths }),
        };
        let request = containerd.request(namespace, message)?;
        ContentClient::new(containerd.channel())
            .update(request)
            .await
    };
    containerd.bounded("label content", call).await?;
    Ok(())
}

fn insert_lease<T>(request: &mut Request<T>, lease: &str) -> Result<(), Status> {
    let value = lease
        .parse()
        .map_err(|_| Status::invalid_argument("lease"))?;
    request.metadata_mut().insert(LEASE_HEADER, value);
    Ok(())
}

fn refused(status: Status) -> IngestError {
    let message = format!("{:?}: {}", status.code(), status.message());
    IngestError::Containerd(ContentError::Unavailable {
        what: "write content",
        message,
    })
}

/// containerd's API counts in `int64`; a blob never comes near its end.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_blob_has_more_time() {
        let rpc = Duration::from_secs(30);
        for (bytes, seconds) in [(0, 30), (1 << 20, 30), (1 << 30, 158), (20 << 30, 2590)] {
            let expected = Duration::from_secs(seconds);
            assert_eq!(whole_blob_deadline(rpc, bytes), expected, "{bytes}");
        }
    }
}
