// SPDX-License-Identifier: Apache-2.0
//! Collecting what a start read: from a mount that was just made until its recording is complete.
//!
//! The worker is asked now and then for what is new, so that a mount that goes away, which it does when
//! its containers have ended, leaves all but the last second of its recording here.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sluice_blockindex::boot::{BOOT_CHUNKS_MAX, BootChunk, BootKey, BootList};
use sluice_fetcher::scheduler::LayerHandle;
use tokio::time::Instant;

use super::document::{BootDocument, Start, Use};
use super::{Boot, boot_key, indexes};
use crate::chain::RunKey;
use crate::mount::FirstRead;
use crate::snapshots::LazyLayerRecord;

/// How often a recording that grows is asked for; a shorter window is asked for more often.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a mount is asked that nobody has read from for a while.
const LONG_PAUSE: Duration = Duration::from_secs(5);
/// How long a mount has to appear: the back-end may be starting its shim.
const APPEARS: Duration = Duration::from_secs(60);
/// A mount that nobody reads from for so long is not waited for: its start, when it comes, is not
/// recorded, which costs one of many.
const PATIENCE: Duration = Duration::from_secs(600);

/// Which chunks were here when the mount was made, by layer.
type Presence = Vec<Vec<bool>>;

fn presence(handles: &[Arc<LayerHandle>]) -> Presence {
    let of = |handle: &Arc<LayerHandle>| {
        let device = handle.device();
        let count = handle.chunks().count();
        (0..count).map(|chunk| device.is_present(chunk)).collect()
    };
    handles.iter().map(of).collect()
}

/// Milliseconds until nine tenths of these reads were done: the last of many stragglers says nothing.
fn span_ms(reads: &[FirstRead], listed: &HashSet<BootChunk>) -> u64 {
    let on_list = |read: &&FirstRead| listed.is_empty() || listed.contains(&chunk_of(read));
    let after: Vec<Duration> = reads.iter().filter(on_list).map(|it| it.after).collect();
    let tenth = after.len().div_ceil(10);
    let last = after.len().checked_sub(tenth.max(1)).map(|at| after[at]);
    last.map_or(0, |last| {
        u64::try_from(last.as_millis()).unwrap_or(u64::MAX)
    })
}

fn chunk_of(read: &FirstRead) -> BootChunk {
    BootChunk {
        layer: read.device,
        chunk: read.chunk,
    }
}

/// Whether less than a tenth of what was read was here when the mount was made.
fn was_cold(reads: &[FirstRead], present: &Presence) -> bool {
    let was_here = |read: &&FirstRead| {
        let layer = present.get(usize::from(read.device));
        let chunk = usize::try_from(read.chunk).ok();
        layer.zip(chunk).and_then(|(layer, at)| layer.get(at)) == Some(&true)
    };
    reads.iter().filter(was_here).count() * 10 < reads.len()
}

impl Boot {
    /// A run is about to be mounted: its list is loaded if something of it is missing, and what is then
    /// read first is collected. Returns at once.
    ///
    /// **Shape** `handles` are those of `layers`, which are the devices of the mount, in this order.
    pub fn mounting(
        self: &Arc<Self>,
        run: RunKey,
        layers: &[LazyLayerRecord],
        handles: &[Arc<LayerHandle>],
    ) {
        if !self.options.enabled || layers.is_empty() {
            return;
        }
        let present = presence(handles);
        if !handles.iter().all(|handle| handle.device().is_sealed()) {
            self.load(layers.to_vec());
        }
        let (boot, layers) = (Arc::clone(self), layers.to_vec());
        let handles = handles.to_vec();
        self.spawn(async move {
            let reads = boot.collect(&run.to_string()).await;
            if !reads.is_empty() {
                boot.learn(&layers, &handles, &reads, &present).await;
            }
        });
    }

    /// All that is recorded of a mount, when nothing more comes.
    async fn collect(&self, mount: &str) -> Vec<FirstRead> {
        let began = Instant::now();
        let short = (self.options.window / 10).min(PAUSE);
        let mut reads: Vec<FirstRead> = Vec::new();
        let mut recording: Option<String> = None;
        loop {
            let quiet = reads.is_empty() && began.elapsed() > APPEARS;
            tokio::time::sleep(if quiet { LONG_PAUSE } else { short }).await;
            let from = u32::try_from(reads.len()).unwrap_or(u32::MAX);
            match self.backend.first_reads(mount, from, false).await {
                Ok(page) if !page.recorded => {
                    // Not mounted yet, mounted by somebody else before us, or gone.
                    if !reads.is_empty() || began.elapsed() > APPEARS {
                        return reads;
                    }
                }
                // It went, and was made again before we looked.
                Ok(page) if recording.as_ref().is_some_and(|it| *it != page.recording) => {
                    return reads;
                }
                Ok(page) => {
                    recording = Some(page.recording);
                    reads.extend(page.reads);
                    if page.complete {
                        let forgotten = self.backend.first_reads(mount, from, true).await;
                        tracing::debug!(mount, reads = reads.len(), ?forgotten, "start recorded");
                        return reads;
                    }
                }
                Err(error) => tracing::debug!(mount, "ask for first reads: {error}"),
            }
            if began.elapsed() > PATIENCE + self.options.window {
                return reads;
            }
        }
    }

    /// Remembers what a start read, and judges the list that was loaded for it.
    async fn learn(
        self: &Arc<Self>,
        layers: &[LazyLayerRecord],
        handles: &[Arc<LayerHandle>],
        reads: &[FirstRead],
        present: &Presence,
    ) {
        let key = boot_key(layers);
        let chunks = reads.iter().map(chunk_of).take(BOOT_CHUNKS_MAX).collect();
        let list = match BootList::new(indexes(layers), chunks) {
            Ok(list) => list,
            Err(error) => {
                tracing::warn!(%key, "ignore what the shim recorded: {error}");
                return;
            }
        };
        let start = self.start(key, handles, reads, present).await;
        let recorded = self.change(key, indexes(layers), move |document| {
            document.record(list, start);
        });
        match recorded.await {
            Ok(document) => {
                self.say(key, &document, reads.len(), start);
                self.tell(key, &document);
            }
            Err(error) => tracing::warn!(%key, "failed to remember a start: {error}"),
        }
    }

    /// How the start was served.
    async fn start(
        &self,
        key: BootKey,
        handles: &[Arc<LayerHandle>],
        reads: &[FirstRead],
        present: &Presence,
    ) -> Start {
        let listed = self.document(key).await.map(|it| it.chunks());
        let listed: HashSet<BootChunk> = listed.unwrap_or_default().into_iter().collect();
        let span_ms = span_ms(reads, &listed);
        let read: HashSet<(usize, u32)> = reads
            .iter()
            .map(|read| (usize::from(read.device), read.chunk))
            .collect();
        let loaded = self.take_load(key, handles, |it| read.contains(&(it.layer, it.chunk)));
        self.metrics.recorded(
            loaded.map_or(0, |it| it.read_chunks),
            loaded.map_or(0, |it| it.read_bytes),
        );
        match loaded {
            Some(loaded) => Start::Loaded(Use {
                loaded_bytes: loaded.loaded_bytes,
                read_bytes: loaded.read_bytes,
                span_ms,
            }),
            None if was_cold(reads, present) => Start::Cold(span_ms),
            None => Start::Warm,
        }
    }

    fn say(&self, key: BootKey, document: &BootDocument, reads: usize, start: Start) {
        // Only a start that turns it off has forgotten its own recording.
        match &document.off {
            Some(off) if document.starts() == 0 => {
                self.metrics.turned_off();
                tracing::info!(%key, reason = off.reason, "boot list turned off");
            }
            _ => tracing::info!(
                %key, reads, ?start, chunks = document.chunks().len(), starts = document.starts(),
                "learnt from a start"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: u16, chunk: u32, after: u64) -> FirstRead {
        FirstRead {
            device,
            chunk,
            after: Duration::from_millis(after),
        }
    }

    #[test]
    fn spans_end_at_nine_tenths_of_the_list() {
        let reads: Vec<FirstRead> = (0..20).map(|n| read(0, n, u64::from(n) * 10)).collect();
        let all = HashSet::new();
        assert_eq!(span_ms(&reads, &all), 180);
        let some: HashSet<BootChunk> = reads[..5].iter().map(chunk_of).collect();
        assert_eq!(span_ms(&reads, &some), 40);
        assert_eq!(span_ms(&[], &all), 0);
        assert_eq!(span_ms(&reads[3..4], &all), 30);
    }

    #[test]
    fn a_start_is_cold_when_nearly_nothing_was_here() {
        let reads: Vec<FirstRead> = (0..20).map(|n| read(0, n, 0)).collect();
        let here = |count: usize| vec![(0..20).map(|n| n < count).collect()];
        for (count, cold) in [(0, true), (1, true), (2, false), (20, false)] {
            assert_eq!(was_cold(&reads, &here(count)), cold, "{count}");
        }
        assert!(was_cold(&[read(3, 0, 0)], &here(20)));
    }
}
