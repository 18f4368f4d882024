// SPDX-License-Identifier: Apache-2.0
//! What this node gives of indexes.

use std::sync::Arc;

use futures::{StreamExt as _, stream};
use sluice_proto::peer::{BlobIndexPart, BlobIndexRequest, blob_index_part};
use tokio::sync::mpsc;
use tonic::{Response, Status};

use super::{HeldIndex, PART_BYTES, home_key};
use crate::clock;
use crate::cluster::home::PieceKey;
use crate::cluster::node::Role;
use crate::peer::server::{Parts, Shared, refused};
use crate::peer::wire::{WantedIndex, busy_of};
use crate::store::lock;

fn part(part: blob_index_part::Part) -> Result<BlobIndexPart, Status> {
    Ok(BlobIndexPart { part: Some(part) })
}

/// Answers a request for an index.
pub(in crate::peer) async fn serve(
    shared: &Arc<Shared>,
    request: BlobIndexRequest,
) -> Result<Response<Parts<BlobIndexPart>>, Status> {
    let wanted = WantedIndex::try_from(request).map_err(|error| refused(&error))?;
    if shared.peers.view().me.role == Role::Leech {
        return Err(Status::not_found("this node gives nothing"));
    }
    // Before a slot is taken: most of what is asked for is not here.
    let held = shared.indexes.find(&shared.shelf, wanted.blob).await?;
    let key = PieceKey::of_object(home_key(wanted.blob));
    let upload = match shared.admit(key, &wanted.node, wanted.background, true) {
        Ok(upload) => upload,
        Err(named) => {
            let busy = part(blob_index_part::Part::Busy(busy_of(&named)));
            return Ok(Response::new(Box::pin(stream::iter([busy]))));
        }
    };
    Ok(shared.answer(upload, |shared, parts| async move {
        send(&shared, held, &parts).await
    }))
}

/// Sends an index; says whether that was all of it.
async fn send(
    shared: &Shared,
    held: HeldIndex,
    parts: &mpsc::Sender<Result<BlobIndexPart, Status>>,
) -> bool {
    let sizes = blob_index_part::Part::Sizes(held.sizes.to_proto());
    if parts.send(part(sizes)).await.is_err() {
        return false;
    }
    let mut body = held.body;
    while let Some(piece) = body.next().await {
        let mut bytes = match piece {
            Ok(bytes) => bytes,
            Err(error) => {
                shared.fetcher.metrics().refused("failed");
                let _ = parts
                    .send(Err(Status::unavailable(error.to_string())))
                    .await;
                return false;
            }
        };
        while !bytes.is_empty() {
            let data = bytes.split_to(bytes.len().min(PART_BYTES));
            let length = data.len() as u64;
            let wait = lock(&shared.peers.buckets.upload).take(length, clock::now());
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            if parts
                .send(part(blob_index_part::Part::Data(data)))
                .await
                .is_err()
            {
                return false;
            }
            shared.fetcher.metrics().served("index", length);
        }
    }
    true
}
