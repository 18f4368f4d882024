// SPDX-License-Identifier: Apache-2.0
//! Carries a plan out, on a thread that may block.

use std::io::Cursor;

use bytes::Bytes;
use sluice_blockindex::chunkmap::Chunk;
use sluice_blockindex::extent::Extent;
use sluice_blockindex::frames::verify_chunk;
use sluice_blockindex::skeleton::Segments;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::assemble::Assembly;
use super::{ReuseError, ReusePlan, Reused, ReusedFile};
use crate::metrics::{FROM_STORE, priority_word};
use crate::scheduler::{Core, Urgency, WRITE_STEP};
use crate::source::Priority;
use crate::store::lock;

pub(super) struct Work<'a> {
    core: &'a Core,
    plan: &'a ReusePlan,
    stop: &'a CancellationToken,
    runtime: &'a Handle,
    /// A reader's chunk is decoded before.
    urgency: Urgency,
    reused: Reused,
    failed: Option<ReuseError>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        core: &'a Core,
        plan: &'a ReusePlan,
        stop: &'a CancellationToken,
        runtime: &'a Handle,
    ) -> Self {
        Self {
            core,
            plan,
            stop,
            runtime,
            urgency: Urgency::new(Priority::Boot),
            reused: Reused::default(),
            failed: None,
        }
    }

    /// Makes the chunks; of what is between the files the skeleton's `payload` tells. **Blocks**.
    pub(super) fn run(mut self, payload: Option<Bytes>) -> Result<Reused, ReuseError> {
        let plan = self.plan;
        let chunks = plan.chunks.iter();
        let chunks = chunks.filter_map(|ordinal| plan.layer.chunks().chunk(*ordinal));
        let mut assembly = Assembly::new(chunks);
        match payload {
            None => {
                let mut files = plan.files.iter();
                while files.next().is_some_and(|it| self.file(&mut assembly, it)) {}
            }
            Some(payload) => self.with_skeleton(payload, &mut assembly)?,
        }
        match self.failed {
            Some(failure) => Err(failure),
            None => Ok(self.reused),
        }
    }

    fn with_skeleton(
        &mut self,
        payload: Bytes,
        assembly: &mut Assembly<impl Iterator<Item = Chunk>>,
    ) -> Result<(), ReuseError> {
        let device_bytes = self.plan.layer.device().device_bytes();
        let mut segments = Segments::open(Cursor::new(payload), device_bytes)?;
        // The table of files has the same contents in the same order.
        let mut files = self.plan.files.iter();
        while !assembly.is_done()
            && let Some(segment) = segments.advance()?
        {
            let literal = segment.literal;
            let read = |offset: u64, buffer: &mut [u8]| {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = literal.get(from..).and_then(|it| it.get(..buffer.len()));
                part.map(|part| buffer.copy_from_slice(part)).is_some()
            };
            let between = Extent::new(segment.start, segment.content.start());
            let between = between.filter(|it| !it.is_empty());
            let done = |chunk: &Chunk, bytes: &[u8]| self.commit(chunk, bytes);
            if between.is_some_and(|it| !assembly.piece(it, read, done)) {
                break;
            }
            if segment.content.is_empty() {
                continue;
            }
            let file = files.next().filter(|it| it.run == segment.content);
            if !file.is_some_and(|file| self.file(assembly, file)) {
                break;
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        assembly: &mut Assembly<impl Iterator<Item = Chunk>>,
        file: &ReusedFile,
    ) -> bool {
        let read = |offset: u64, buffer: &mut [u8]| copy(file, offset, buffer);
        let done = |chunk: &Chunk, bytes: &[u8]| self.commit(chunk, bytes);
        assembly.piece(file.run, read, done)
    }

    /// Takes a chunk that is whole; false when there is no use in going on.
    fn commit(&mut self, chunk: &Chunk, bytes: &[u8]) -> bool {
        let layer = &self.plan.layer;
        if self.stop.is_cancelled() {
            self.failed = Some(ReuseError::Closed);
            return false;
        }
        if !layer.device().is_present(chunk.ordinal) {
            let _slot = self.runtime.block_on(self.core.decodes.take(&self.urgency));
            let (key, ordinal) = (layer.key(), chunk.ordinal);
            let subject = std::fmt::from_fn(move |f| write!(f, "chunk {ordinal} of {key}"));
            let whom = priority_word(Priority::Boot);
            let _step = self.core.metrics.steps().enter(WRITE_STEP, whom, subject);
            if verify_chunk(bytes, chunk).is_err() {
                self.reused.wrong += 1;
            } else if let Err(error) = layer.device().commit(chunk.ordinal, bytes) {
                self.failed = Some(error.into());
                return false;
            } else {
                layer.flights.finish(chunk.ordinal, None);
                self.core.metrics.committed(FROM_STORE);
                layer.found_in_store(chunk.device.len());
                self.reused.chunks += 1;
                self.reused.device_bytes += chunk.device.len();
            }
        }
        lock(&layer.expected).remove(&chunk.ordinal);
        true
    }
}

/// Reads a part of a file from where the node has it; false when it has not.
fn copy(file: &ReusedFile, offset: u64, buffer: &mut [u8]) -> bool {
    let Some(copy) = &file.copy else {
        return false;
    };
    let at = copy.start.checked_add(offset);
    at.is_some_and(|at| copy.donor.device().read_at(at, buffer).is_ok())
}
