// SPDX-License-Identifier: Apache-2.0
//! The threads of an encoder, whatever it writes: one cuts the tar into jobs, the pool does them, one writes what they
//! made, in order.

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

use super::{PackError, SpoolWriter};
use crate::pool::{ByteBudget, LargeClaim, Pool, Reservation};

/// A part of the tar that is compressed by itself.
pub(super) trait Job: Send + 'static {
    /// What it makes.
    type Made: Send + 'static;

    /// Bytes of the part.
    fn tar_bytes(&self) -> u64;

    /// Compresses it.
    fn run(self) -> Result<Self::Made, PackError>;
}

/// Takes a layer's tar and makes jobs of it.
pub(super) trait Encoder {
    type Job: Job;
    /// What is left to be done once all jobs are.
    type Plan;

    /// Takes the next bytes of the tar.
    fn push(&mut self, bytes: &[u8], jobs: &mut Vec<Self::Job>) -> Result<(), PackError>;

    /// About how many bytes of memory it has taken.
    fn held_bytes(&self) -> u64;

    /// The tar is at its end.
    fn finish(self, jobs: &mut Vec<Self::Job>) -> Result<Self::Plan, PackError>;
}

/// What a job makes: the receiver closes without a value if the job died.
pub(super) type Pending<J> = Receiver<(Result<<J as Job>::Made, PackError>, Reservation)>;

pub(super) fn failed(error: impl ToString) -> PackError {
    PackError::Encode {
        reason: error.to_string(),
    }
}

/// Feeds the encoder and hands its jobs to the pool; their receivers go to `frames` in order. The
/// claim, if the layer needs one, is to be kept as long as the plan.
pub(super) fn encode<'a, E: Encoder>(
    mut encoder: E,
    tar: Receiver<Bytes>,
    frames: SyncSender<Pending<E::Job>>,
    pool: &Pool,
    budget: &'a Arc<ByteBudget>,
) -> Result<(E::Plan, Option<LargeClaim<'a>>), PackError> {
    let mut claim = None;
    let mut jobs = Vec::new();
    for part in tar {
        encoder.push(&part, &mut jobs)?;
        submit(&mut jobs, &frames, pool, budget)?;
        if claim.is_none() && budget.is_large(encoder.held_bytes()) {
            claim = Some(budget.claim_large());
        }
    }
    let plan = encoder.finish(&mut jobs)?;
    submit(&mut jobs, &frames, pool, budget)?;
    Ok((plan, claim))
}

fn submit<J: Job>(
    jobs: &mut Vec<J>,
    frames: &SyncSender<Pending<J>>,
    pool: &Pool,
    budget: &Arc<ByteBudget>,
) -> Result<(), PackError> {
    for job in jobs.drain(..) {
        // The part, and what it becomes, which can be about as large.
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

/// Has `append` write what jobs made, in the order of the tar.
pub(super) fn write<J: Job>(
    frames: Receiver<Pending<J>>,
    spool: File,
    mut append: impl FnMut(J::Made, &mut SpoolWriter) -> Result<(), PackError>,
) -> Result<SpoolWriter, PackError> {
    let mut writer = SpoolWriter::new(spool);
    for pending in frames {
        let (made, _reservation) = pending.recv().map_err(|_| failed("a worker died"))?;
        append(made?, &mut writer)?;
    }
    Ok(writer)
}

/// Checks that the blob is as long as its encoder says.
pub(super) fn checked_length(made: u64, said: u64) -> Result<(), PackError> {
    match made == said {
        true => Ok(()),
        false => Err(failed(format!(
            "blob of {made} bytes, the encoder says {said}"
        ))),
    }
}
