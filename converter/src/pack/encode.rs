// SPDX-License-Identifier: Apache-2.0
//! The encoder's threads: one cuts the tar into chunks, the pool compresses them, one writes frames in
//! order.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use sluice_blockindex::chunkmap::ChunkRecord;
use sluice_blockindex::encode::{ChunkJob, EncodeOptions, LayerEncoder, LayerPlan};
use sluice_blockindex::frames::{EncodeFrameError, EncodedChunk};

use super::{IndexPlace, PackError, Packed, SpoolWriter};
use crate::pool::{ByteBudget, LargeClaim, Pool, Reservation};

/// A frame that is being made: its receiver closes without a value if the job died.
pub(super) type Pending = Receiver<(Result<EncodedChunk, EncodeFrameError>, Reservation)>;

fn failed(error: impl ToString) -> PackError {
    PackError::Encode {
        reason: error.to_string(),
    }
}

/// Feeds the encoder and hands its jobs to the pool; their receivers go to `frames` in order. The
/// claim, if the layer needs one, is to be kept as long as the plan.
pub(super) fn encode<'a>(
    tar: Receiver<Bytes>,
    frames: SyncSender<Pending>,
    pool: &Pool,
    budget: &'a Arc<ByteBudget>,
    options: EncodeOptions,
) -> Result<(LayerPlan, Option<LargeClaim<'a>>), PackError> {
    let mut claim = None;
    let mut encoder = LayerEncoder::new(options).map_err(failed)?;
    let mut jobs = Vec::new();
    for part in tar {
        encoder.push(&part, &mut jobs).map_err(failed)?;
        submit(&mut jobs, &frames, pool, budget)?;
        if claim.is_none() && budget.is_large(encoder.held_bytes()) {
            claim = Some(budget.claim_large());
        }
    }
    let plan = encoder.finish(&mut jobs).map_err(failed)?;
    submit(&mut jobs, &frames, pool, budget)?;
    Ok((plan, claim))
}

fn submit(
    jobs: &mut Vec<ChunkJob>,
    frames: &SyncSender<Pending>,
    pool: &Pool,
    budget: &Arc<ByteBudget>,
) -> Result<(), PackError> {
    for job in jobs.drain(..) {
        // The chunk, and a frame that can be about as large.
        let reservation = budget.reserve(job.bytes.len() as u64 * 2);
        let (done, pending) = sync_channel(1);
        pool.run(move || {
            let result = job.run();
            // Nobody waits if the layer has failed elsewhere.
            let _ = done.send((result, reservation));
        });
        frames.send(pending).map_err(|_| PackError::Stopped)?;
    }
    Ok(())
}

/// Writes frames in the order of their chunks.
pub(super) fn write_frames(
    frames: Receiver<Pending>,
    spool: File,
) -> Result<(SpoolWriter, Vec<ChunkRecord>), PackError> {
    let mut writer = SpoolWriter::new(spool);
    let mut records = Vec::new();
    for pending in frames {
        let (chunk, _reservation) = pending.recv().map_err(|_| failed("a worker died"))?;
        let chunk = chunk.map_err(failed)?;
        writer.append(&chunk.frame)?;
        records.push(chunk.record);
    }
    Ok((writer, records))
}

/// Appends the trailer.
pub(super) fn finish(
    plan: LayerPlan,
    (mut writer, records): (SpoolWriter, Vec<ChunkRecord>),
) -> Result<Packed, PackError> {
    let trailer = plan.assemble(&records).map_err(failed)?;
    writer.append(&trailer.bytes)?;
    let (spool, blob, blob_bytes) = writer.finish()?;
    if blob_bytes != trailer.blob_bytes {
        let (made, said) = (blob_bytes, trailer.blob_bytes);
        return Err(failed(format!(
            "blob of {made} bytes, the encoder says {said}"
        )));
    }
    let index = trailer.index.map(|pin| IndexPlace {
        extent: pin.extent,
        digest: pin.digest,
    });
    Ok(Packed {
        blob,
        blob_bytes,
        spool,
        tar_bytes: trailer.device_bytes,
        index,
    })
}
