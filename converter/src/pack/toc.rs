// SPDX-License-Identifier: Apache-2.0
//! Packs a layer into a format with a table of contents (TOC), by the same threads as [`super::pack`].

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use sluice_blockindex::digest::{BlobDigest, DiffId};
use sluice_blockindex::toc::write::{
    TocEncoder, TocFrames, TocJob, TocOptions, TocPlan, TocRecords,
};

use super::jobs::{self, Encoder, Job, Pending, checked_length, failed};
use super::{BodyParts, Input, PENDING_FRAMES, PackError, SpoolWriter, checked_diff_id, pipeline};
use crate::pool::{ByteBudget, Pool};

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

impl Job for TocJob {
    type Made = TocFrames;

    fn tar_bytes(&self) -> u64 {
        TocJob::tar_bytes(self)
    }

    fn run(self) -> Result<TocFrames, PackError> {
        TocJob::run(&self).map_err(failed)
    }
}

impl Encoder for TocEncoder {
    type Job = TocJob;
    type Plan = TocPlan;

    fn push(&mut self, bytes: &[u8], jobs: &mut Vec<TocJob>) -> Result<(), PackError> {
        TocEncoder::push(self, bytes, jobs).map_err(failed)
    }

    fn held_bytes(&self) -> u64 {
        TocEncoder::held_bytes(self)
    }

    fn finish(self, jobs: &mut Vec<TocJob>) -> Result<TocPlan, PackError> {
        TocEncoder::finish(self, jobs).map_err(failed)
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
    let encoder = TocEncoder::new(options).map_err(failed)?;
    let (frames_tx, frames_rx) = sync_channel(PENDING_FRAMES);
    let ((plan, _claim), (mut writer, records)) = pipeline(
        input,
        body,
        progress,
        |tar| jobs::encode(encoder, tar, frames_tx, pool, budget),
        || write(frames_rx, spool),
    )?;
    checked_diff_id(input, plan.diff_id())?;
    let trailer = plan.assemble(&records).map_err(failed)?;
    writer.append(&trailer.bytes)?;
    let (spool, blob, blob_bytes) = writer.finish()?;
    checked_length(blob_bytes, trailer.blob_bytes)?;
    Ok(PackedToc {
        blob,
        blob_bytes,
        spool,
        diff_id: trailer.diff_id,
        toc: trailer.toc,
    })
}

fn write(
    frames: Receiver<Pending<TocJob>>,
    spool: File,
) -> Result<(SpoolWriter, TocRecords), PackError> {
    let mut records = TocRecords::default();
    let writer = jobs::write::<TocJob>(frames, spool, |made, writer| {
        records.add(&made);
        writer.append(&made.bytes)
    })?;
    Ok((writer, records))
}
