// SPDX-License-Identifier: Apache-2.0
//! Copies a blob as it is while it is proved to be what it is said to be.

use std::io::Write;
use std::sync::mpsc::{Receiver, sync_channel};

use super::{
    Arc, AtomicBool, BodyParts, Bytes, CHANNEL_PARTS, DiffId, File, Input, PackError, Sha256Hasher,
    first_error, inflate, join, read_source, spool_error,
};

/// Writes the blob to `spool` and returns it, if the blob has its digest and its tar the diff ID.
/// Blocks, as [`super::pack`] does, and reports progress likewise.
///
/// **Errors**: [`PackError`]; the bytes are not to be used then. **Cancel**: drop the sender of `body`.
pub fn check(
    input: &Input,
    body: BodyParts,
    mut spool: File,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Arc<File>, PackError> {
    let (blob_tx, blob_rx) = sync_channel(CHANNEL_PARTS);
    let (tar_tx, tar_rx) = sync_channel(CHANNEL_PARTS);
    let drain = AtomicBool::new(false);
    let cap = input.caps.for_blob(input.blob_bytes);
    let (source, inflated, actual) = std::thread::scope(|scope| {
        let source = scope.spawn(|| {
            read_source(input, body, blob_tx, &drain, |part| {
                progress(part.len() as u64);
                spool.write_all(part).map_err(spool_error)
            })
        });
        let inflate = scope.spawn(|| inflate::inflate(blob_rx, cap, tar_tx, &drain));
        let actual = diff_id(tar_rx);
        (join(source), join(inflate), actual)
    });
    if let Some(error) = first_error([source.err(), inflated.err()]) {
        return Err(error);
    }
    let expected = input.diff_id;
    match actual == expected {
        true => Ok(Arc::new(spool)),
        false => Err(PackError::DiffId { expected, actual }),
    }
}

fn diff_id(tar: Receiver<Bytes>) -> DiffId {
    let mut hasher = Sha256Hasher::new();
    for part in tar {
        hasher.update(&part);
    }
    DiffId::from_bytes(hasher.finish())
}
