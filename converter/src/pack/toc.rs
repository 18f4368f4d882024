// SPDX-License-Identifier: Apache-2.0
//! Packs a layer into a format with a table of contents (TOC), by the same threads as [`super::pack`].

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::toc::write::{
    TocEncoder, TocFrames, TocJob, TocOptions, TocPlan, TocRecords, TocWriteError,
};

use super::{BodyParts, Input, PENDING_FRAMES, PackError, SpoolWriter, checked_diff_id, pipeline};
use crate::pool::{ByteBudget, LargeClaim, Pool, Reservation};

/// A layer as it was packed: verified, and not yet anywhere.
#[derive(Debug)]
pub struct PackedToc {
    /// Digest of the new blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_bytes: u64,
    /// Its bytes.
    pub spool: Arc<File>,
    /// Its diff ID.
    pub diff_id: DiffId,
    /// The annotations that pin its TOC, or why it has none.
    pub toc: Result<BTreeMap<String, String>, String>,
}

/// Frames that are being made: their receiver closes without a value if the job died.
type Pending = Receiver<(Result<TocFrames, TocWriteError>, Reservation)>;

fn failed(error: impl ToString) -> PackError {
    PackError::Encode {
        reason: error.to_string(),
    }
}

/// Packs one layer into `spool`. Blocks, as [`super::pack`] does, and reports progress likewise.
///
/// **Errors**: [`PackError`]; nothing of the output is to be used then. **Cancel**: drop the sender of
/// `body`; all threads end soon after.
pub fn pack_toc(
    input: &Input,
    options: TocOptions,
    body: BodyParts,
    spool: File,
    (pool, budget): (&Pool, &Arc<ByteBudget>),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<PackedToc, PackError> {
    let (frames_tx, frames_rx) = sync_channel(PENDING_FRAMES);
    let ((plan, _claim), (mut writer, records)) = pipeline(
        input,
        body,
        progress,
        |tar| encode(tar, frames_tx, pool, budget, options),
        || write(frames_rx, spool),
    )?;
    checked_diff_id(input, plan.diff_id())?;
    let trailer = plan.assemble(&records).map_err(failed)?;
    writer.append(&trailer.bytes)?;
    let (spool, blob, blob_bytes) = writer.finish()?;
    if blob_bytes != trailer.blob_bytes {
        let (made, said) = (blob_bytes, trailer.blob_bytes);
        return Err(failed(format!(
            "blob of {made} bytes, the encoder says {said}"
        )));
    }
    Ok(PackedToc {
        blob,
        blob_bytes,
        spool,
        diff_id: trailer.diff_id,
        toc: trailer.toc,
    })
}

fn encode<'a>(
    tar: Receiver<Bytes>,
    frames: SyncSender<Pending>,
    pool: &Pool,
    budget: &'a Arc<ByteBudget>,
    options: TocOptions,
) -> Result<(TocPlan, Option<LargeClaim<'a>>), PackError> {
    let mut claim = None;
    let mut encoder = TocEncoder::new(options).map_err(failed)?;
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
    jobs: &mut Vec<TocJob>,
    frames: &SyncSender<Pending>,
    pool: &Pool,
    budget: &Arc<ByteBudget>,
) -> Result<(), PackError> {
    for job in jobs.drain(..) {
        // The pieces, and frames that can be about as large.
        let reservation = budget.reserve(job.tar_bytes() * 2);
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

fn write(frames: Receiver<Pending>, spool: File) -> Result<(SpoolWriter, TocRecords), PackError> {
    let mut writer = SpoolWriter::new(spool);
    let mut records = TocRecords::default();
    for pending in frames {
        let (made, _reservation) = pending.recv().map_err(|_| failed("a worker died"))?;
        let made = made.map_err(failed)?;
        writer.append(&made.bytes)?;
        records.add(&made);
    }
    Ok((writer, records))
}
