// SPDX-License-Identifier: Apache-2.0
//! Taking an index that another node gives: checked, then kept.
//!
//! The payload comes first, and is checked before a byte of windows is written: it must be a valid index of this very
//! blob, and name windows of the size that was said. The windows go to a temporary file and must have the digest that the
//! index names. What fails leaves nothing.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use sluice_blockindex::digest::{DIGEST_BYTES, IndexDigest, Sha256Hasher};
use sluice_blockindex::index::{
    INDEX_FILE_MAX_BYTES, UncheckedIndex, WindowsPin, decompress_index,
};
use sluice_fetcher::peer::GivenIndex;
use sluice_fetcher::peer::client::PeerError;
use tokio::sync::{Semaphore, mpsc};

use super::WantedBlob;
use crate::durable::Staged;
use crate::node_indexes::NodeIndexes;

/// Parts that wait to be written.
const PARTS_WAITING: usize = 4;

/// Why an index is not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The node, or the way to it, failed.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// It is not what was asked for.
    #[error("{0}")]
    False(String),
    /// This node's disk failed.
    #[error(transparent)]
    Disk(#[from] io::Error),
}

fn wrong(error: impl std::fmt::Display) -> ReceiveError {
    ReceiveError::False(error.to_string())
}

/// Takes what a node gives, checks it, and keeps it.
///
/// **Errors** [`ReceiveError`]. **Cancel** safe: nothing is kept.
pub(super) async fn receive(
    mut given: GivenIndex,
    wanted: WantedBlob,
    indexes: &Arc<NodeIndexes>,
    room: &Semaphore,
    is_forged: impl Fn(IndexDigest) -> bool,
) -> Result<(), ReceiveError> {
    let kib = given.sizes.index_bytes.div_ceil(1 << 10);
    let kib = u32::try_from(kib).unwrap_or(u32::MAX);
    let stopping = |_| ReceiveError::Disk(io::ErrorKind::Interrupted.into());
    // Until it is kept or refused.
    let _room = room.acquire_many(kib).await.map_err(stopping)?;
    let index_bytes = usize::try_from(given.sizes.index_bytes).map_err(wrong)?;
    let (payload, first) = payload_of(&mut given, index_bytes).await?;
    if is_forged(IndexDigest::of(&payload)) {
        return Err(wrong("it was found to be forged before"));
    }
    let checked = payload.clone();
    let examined = tokio::task::spawn_blocking(move || examine(&checked, wanted));
    let named = examined.await.map_err(io::Error::other)??;
    let named_bytes = named.map_or(0, |pin| pin.bytes);
    if named_bytes != given.sizes.windows_bytes {
        let said = given.sizes.windows_bytes;
        let reason = format!("it names {named_bytes} bytes of windows, and {said} come with it");
        return Err(ReceiveError::False(reason));
    }
    let windows = match named {
        None => None,
        Some(pin) => Some(windows_of(&mut given, first, pin, Arc::clone(indexes)).await?),
    };
    let (from, indexes) = (given.node.to_string(), Arc::clone(indexes));
    let keep = move || indexes.keep_given(wanted.blob, &payload, windows, &from);
    let kept = tokio::task::spawn_blocking(keep).await;
    Ok(kept.map_err(io::Error::other)??)
}

/// The payload, and what came with its last part of what follows it.
async fn payload_of(
    given: &mut GivenIndex,
    index_bytes: usize,
) -> Result<(Bytes, Bytes), ReceiveError> {
    let mut payload = BytesMut::with_capacity(index_bytes);
    loop {
        let Some(part) = given.body.next().await else {
            return Err(wrong("it ends in the middle"));
        };
        let mut part = part?;
        let own = part.split_to(part.len().min(index_bytes - payload.len()));
        payload.extend_from_slice(&own);
        if payload.len() == index_bytes {
            return Ok((payload.freeze(), part));
        }
    }
}

/// Checks a payload against what is known of the blob; gives the windows that it names. **Blocks**.
fn examine(payload: &[u8], wanted: WantedBlob) -> Result<Option<WindowsPin>, ReceiveError> {
    let bytes = decompress_index(payload, INDEX_FILE_MAX_BYTES).map_err(wrong)?;
    let index = UncheckedIndex::parse_unmodified(bytes).map_err(wrong)?;
    let index = index.validate().map_err(wrong)?;
    let of = index.metadata().unmodified;
    let of = of.ok_or_else(|| wrong("it is of a blob that Sluice wrote"))?;
    let blob_bytes = wanted.expected.map_or(of.bytes, |(_, bytes)| bytes);
    index.check_blob(wanted.blob, blob_bytes).map_err(wrong)?;
    if !index.fits_blob(blob_bytes) {
        return Err(wrong("its frames are beyond the end of the blob"));
    }
    if let Some((expected, _)) = wanted.expected
        && index.diff_id() != expected
    {
        let actual = index.diff_id();
        return Err(ReceiveError::False(format!(
            "it is of {actual}, the image has {expected}"
        )));
    }
    Ok(of.windows)
}

/// Writes the windows to a file as they come, and checks their digest.
async fn windows_of(
    given: &mut GivenIndex,
    first: Bytes,
    pin: WindowsPin,
    indexes: Arc<NodeIndexes>,
) -> Result<Staged, ReceiveError> {
    let (parts, written) = mpsc::channel(PARTS_WAITING);
    let writing = tokio::task::spawn_blocking(move || write(&indexes, written));
    // Who does not take a part says why.
    let mut taken = first.is_empty() || parts.send(first).await.is_ok();
    while let Some(part) = given.body.next().await {
        taken = taken && parts.send(part?).await.is_ok();
        if !taken {
            break;
        }
    }
    drop(parts);
    let (staged, digest) = writing.await.map_err(io::Error::other)??;
    if digest != pin.digest {
        return Err(wrong("its windows are not those that it names"));
    }
    Ok(staged)
}

/// Writes what comes to a temporary file; gives that and its sha256. **Blocks**.
fn write(
    indexes: &NodeIndexes,
    mut parts: mpsc::Receiver<Bytes>,
) -> io::Result<(Staged, [u8; DIGEST_BYTES])> {
    let (mut staged, mut hasher) = (indexes.stage()?, Sha256Hasher::new());
    while let Some(part) = parts.blocking_recv() {
        hasher.update(&part);
        staged.push(&part)?;
    }
    Ok((staged, hasher.finish()))
}
