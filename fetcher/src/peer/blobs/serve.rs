// SPDX-License-Identifier: Apache-2.0
//! What this node gives of raw blobs.

use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream;
use sluice_proto::peer::{self as proto, BlobPart, BlobRequest, blob_part};
use tokio::sync::mpsc;
use tonic::{Response, Status};

use super::super::server::{Parts, Refused, Shared, WORKING_EVERY, status_of};
use super::super::wire::busy_of;
use super::WantedPiece;
use crate::clock;
use crate::cluster::node::Role;
use crate::registry::RegistryError;
use crate::source::{BlobStream, SourceError};
use crate::store::lock;

/// Bytes of one message.
const PART_BYTES: usize = 256 << 10;

fn part(part: blob_part::Part) -> BlobPart {
    BlobPart { part: Some(part) }
}

/// Answers a request for a piece.
pub(in super::super) async fn serve(
    shared: &Arc<Shared>,
    request: BlobRequest,
) -> Result<Response<Parts<BlobPart>>, Status> {
    let wanted = WantedPiece::try_from(request)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    if shared.peers.view().me.role == Role::Leech {
        return Err(Status::permission_denied("this node gives nothing"));
    }
    let upload = match shared.admit(
        wanted.piece.key(),
        &wanted.node,
        false,
        !wanted.present_only,
    ) {
        Ok(upload) => upload,
        Err(named) => {
            let busy = Ok(part(blob_part::Part::Busy(busy_of(&named))));
            return Ok(Response::new(Box::pin(stream::iter([busy]))));
        }
    };
    Ok(shared.answer(upload, |shared, parts| async move {
        send(&shared, &wanted, &parts).await
    }))
}

/// Sends a piece as it arrives; says whether that was all of it.
async fn send(
    shared: &Shared,
    wanted: &WantedPiece,
    parts: &mpsc::Sender<Result<BlobPart, Status>>,
) -> bool {
    let mut beat = tokio::time::interval(WORKING_EVERY);
    let working = || Ok(part(blob_part::Part::Working(proto::Working {})));
    let mut opening = shared.shelf.blob(wanted);
    let opened = loop {
        tokio::select! {
            biased;
            opened = &mut opening => break opened,
            () = parts.closed() => return false,
            _ = beat.tick() => if parts.send(working()).await.is_err() { return false },
        }
    };
    let mut body = match opened {
        Ok(stream) => stream.body,
        Err(refused) => {
            shared.fetcher.metrics().refused(refused.word());
            let _ = parts.send(Err(status_of(&refused))).await;
            return false;
        }
    };
    loop {
        let piece = tokio::select! {
            biased;
            () = parts.closed() => return false,
            piece = body.next() => piece,
            _ = beat.tick() => {
                if parts.send(working()).await.is_err() {
                    return false;
                }
                continue;
            }
        };
        match piece {
            None => return true,
            Some(Ok(mut bytes)) => {
                while !bytes.is_empty() {
                    let data = bytes.split_to(bytes.len().min(PART_BYTES));
                    let length = data.len() as u64;
                    shared.fetcher.metrics().served("blob", length);
                    let wait = lock(&shared.peers.buckets.upload).take(length, clock::now());
                    if !wait.is_zero() {
                        tokio::time::sleep(wait).await;
                    }
                    if parts
                        .send(Ok(part(blob_part::Part::Data(data))))
                        .await
                        .is_err()
                    {
                        return false;
                    }
                }
                beat.reset();
            }
            Some(Err(error)) => {
                let status = match &error {
                    SourceError::NoSource { .. }
                    | SourceError::Registry(
                        RegistryError::Denied { .. } | RegistryError::NotFound { .. },
                    ) => Status::permission_denied("this node cannot fetch it"),
                    other => Status::unavailable(other.to_string()),
                };
                shared.fetcher.metrics().refused("failed");
                let _ = parts.send(Err(status)).await;
                return false;
            }
        }
    }
}

/// A shelf without blobs.
pub(in super::super) fn none(_: &WantedPiece) -> Result<BlobStream, Refused> {
    Err(Refused::NotHere)
}
