// SPDX-License-Identifier: Apache-2.0
//! containerd's content store: blobs by digest, with labels by which its garbage collection and others
//! know what a blob belongs to.

use std::collections::HashMap;

use bytes::Bytes;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction,
    WriteContentRequest,
};
use futures::StreamExt;
use prost_types::FieldMask;
use tonic::{Code, Status};

use super::{Containerd, ContainerdError, refused};
use crate::image::document::{
    DOCKER_CONFIG, DOCKER_INDEX, DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST,
};
use crate::image::{BlobBody, Descriptor, ImageError};

/// Bytes of content per message; containerd takes at most 16 MiB, and copies each.
const WRITE_BYTES: usize = 1024 * 1024;
/// Messages on their way to containerd.
const WRITES_AHEAD: usize = 4;
/// Labels that begin so name a host, without its port, and their values the repositories there.
pub(crate) const SOURCE_LABEL_PREFIX: &str = "containerd.io/distribution.source.";
/// containerd refuses labels whose key and value are longer together.
const LABEL_MAX_BYTES: usize = 4096;

/// Whether containerd takes such a label.
pub(crate) fn is_label(name: &str, value: &str) -> bool {
    name.len() + value.len() <= LABEL_MAX_BYTES
}

/// What the content store says of a blob.
#[derive(Debug, Clone)]
pub(crate) struct ContentInfo {
    /// Its size.
    pub(crate) bytes: u64,
    /// Its labels.
    pub(crate) labels: HashMap<String, String>,
}

/// The labels by which containerd's garbage collection keeps what a document names.
pub(crate) fn child_labels(children: &[Descriptor]) -> HashMap<String, String> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    let mut labels = HashMap::new();
    for child in children {
        let group = match child.media_type.as_str() {
            OCI_CONFIG | DOCKER_CONFIG => "config",
            OCI_MANIFEST | DOCKER_MANIFEST | OCI_INDEX | DOCKER_INDEX => "m.",
            _ if child.is_layer() => "l.",
            _ => "",
        };
        let count = counts.entry(group).or_default();
        let name = match group {
            "config" => group.to_owned(),
            _ => format!("{group}{count}"),
        };
        *count += 1;
        labels.insert(
            format!("containerd.io/gc.ref.content.{name}"),
            child.digest.to_string(),
        );
    }
    labels
}

impl Containerd {
    /// What the content store says of a blob; `None` if it has none.
    pub(crate) async fn content(
        &self,
        digest: &str,
    ) -> Result<Option<ContentInfo>, ContainerdError> {
        let request = self.request(InfoRequest {
            digest: digest.to_owned(),
        });
        match ContentClient::new(self.channel()).info(request).await {
            Ok(answer) => Ok(answer.into_inner().info.map(|info| ContentInfo {
                bytes: u64::try_from(info.size).unwrap_or(0),
                labels: info.labels,
            })),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused("look for", digest)(status)),
        }
    }

    /// Part of a blob as it comes, NOT verified; all from `offset` on if `bytes` is 0.
    ///
    /// **Errors**: there is no such blob, or it is shorter.
    pub(crate) async fn read_content(
        &self,
        digest: &str,
        offset: u64,
        bytes: u64,
    ) -> Result<BlobBody, ContainerdError> {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let request = self.unlimited(ReadContentRequest {
            digest: digest.to_owned(),
            offset: number(offset),
            size: number(bytes),
        });
        let what = format!("blob {digest}");
        let answers = ContentClient::new(self.channel()).read(request).await;
        let answers = answers.map_err(refused("read", &what))?.into_inner();
        Ok(Box::pin(answers.map(move |answer| {
            answer
                .map(|answer| Bytes::from(answer.data))
                .map_err(|status| ImageError::failed("read", &what, refused("read", "")(status)))
        })))
    }

    /// Whether the content store has a blob; gives it `labels` if so.
    pub(crate) async fn label_content(
        &self,
        digest: &str,
        labels: &HashMap<String, String>,
    ) -> Result<bool, ContainerdError> {
        let mut client = ContentClient::new(self.channel());
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

    /// As [`Self::write_content`], of what is in memory; what is there gets the labels.
    pub(crate) async fn write_small(
        &self,
        digest: &str,
        bytes: &Bytes,
        labels: HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        if self.label_content(digest, &labels).await? {
            return Ok(());
        }
        let body: BlobBody = Box::pin(futures::stream::iter([Ok(bytes.clone())]));
        let total = bytes.len() as u64;
        self.write_content(digest, total, labels, body, &|_| {})
            .await
    }

    /// Writes a blob to the content store, which verifies it.
    pub(crate) async fn write_content(
        &self,
        digest: &str,
        total: u64,
        labels: HashMap<String, String>,
        mut body: BlobBody,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ContainerdError> {
        let total = i64::try_from(total).unwrap_or(i64::MAX);
        let lease = self.lease.as_ref().map_or("", |(id, _)| id.as_str());
        // Unique to this run: two writers of one blob do not wait for each other's lock.
        let reference = format!("{lease}-{digest}");
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
            Ok::<(), ContainerdError>(())
        };
        let write = async {
            let stream = futures::stream::unfold(stream, |mut stream| async move {
                stream.recv().await.map(|message| (message, stream))
            });
            let mut client = ContentClient::new(self.channel());
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
            let _ = ContentClient::new(self.channel()).abort(abort).await;
        }
        result.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_blockindex::digest::BlobDigest;

    #[test]
    fn children_are_labelled_as_containerd_does() {
        let descriptor = |media_type: &str, text: &str| {
            Descriptor::new(media_type, BlobDigest::of(text.as_bytes()), 1)
        };
        let labels = child_labels(&[
            descriptor(OCI_CONFIG, "c"),
            descriptor("application/vnd.oci.image.layer.v1.tar+zstd", "l0"),
            descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", "l1"),
            descriptor(OCI_MANIFEST, "m0"),
            descriptor("application/x", "x"),
        ]);
        let mut names: Vec<&str> = labels.keys().map(String::as_str).collect();
        names.sort_unstable();
        let prefix = "containerd.io/gc.ref.content.";
        let expected = ["0", "config", "l.0", "l.1", "m.0"].map(|name| format!("{prefix}{name}"));
        assert_eq!(names, expected);
        assert_eq!(
            labels[&format!("{prefix}l.1")],
            BlobDigest::of(b"l1").to_string()
        );
    }
}
