// SPDX-License-Identifier: Apache-2.0
//! Our own format, for the threads of [`super::jobs`].

use std::fs::File;
use std::sync::mpsc::Receiver;

use sluice_blockindex::chunkmap::ChunkRecord;
use sluice_blockindex::encode::{ChunkJob, LayerEncoder, LayerPlan};
use sluice_blockindex::frames::EncodedChunk;

use super::jobs::{self, Encoder, Job, Pending, checked_length, failed};
use super::{IndexPlace, PackError, Packed, SpoolWriter};

impl Job for ChunkJob {
    type Made = EncodedChunk;

    fn tar_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn run(self) -> Result<EncodedChunk, PackError> {
        ChunkJob::run(&self).map_err(failed)
    }
}

impl Encoder for LayerEncoder {
    type Job = ChunkJob;
    type Plan = LayerPlan;

    fn push(&mut self, bytes: &[u8], jobs: &mut Vec<ChunkJob>) -> Result<(), PackError> {
        LayerEncoder::push(self, bytes, jobs).map_err(failed)
    }

    fn held_bytes(&self) -> u64 {
        LayerEncoder::held_bytes(self)
    }

    fn finish(self, jobs: &mut Vec<ChunkJob>) -> Result<LayerPlan, PackError> {
        LayerEncoder::finish(self, jobs).map_err(failed)
    }
}

/// Writes frames in the order of their chunks.
pub(super) fn write_frames(
    frames: Receiver<Pending<ChunkJob>>,
    spool: File,
) -> Result<(SpoolWriter, Vec<ChunkRecord>), PackError> {
    let mut records = Vec::new();
    let writer = jobs::write::<ChunkJob>(frames, spool, |chunk, writer| {
        records.push(chunk.record);
        writer.append(&chunk.frame)
    })?;
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
    checked_length(blob_bytes, trailer.blob_bytes)?;
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
