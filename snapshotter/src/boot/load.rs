// SPDX-License-Identifier: Apache-2.0
//! Loading lists: as soon as the indexes of a run are here, and again when it is mounted.

use std::collections::BTreeSet;
use std::sync::Arc;

use sluice_blockindex::boot::{BootChunk, BootKey};
use sluice_fetcher::boot::{BootRead, whole_pages};
use sluice_fetcher::scheduler::LayerHandle;
use tokio::time::Instant;

use super::document::BootDocument;
use super::{Boot, LOADS_MAX, Load, OfferError, State, boot_key, indexes};
use crate::layers::OpenLayerError;
use crate::reuse::Planned;
use crate::snapshots::LazyLayerRecord;

impl State {
    /// Whether nobody loads the list at this moment; from now on the caller does.
    pub(super) fn begin(&mut self, key: BootKey) -> bool {
        let load = self.loads.entry(key).or_insert_with(|| Load {
            claimed: BTreeSet::new(),
            running: false,
            started: Instant::now(),
        });
        let free = !std::mem::replace(&mut load.running, true);
        if self.loads.len() > LOADS_MAX {
            let idle = self.loads.iter().filter(|(_, load)| !load.running);
            let oldest = idle.min_by_key(|(_, load)| load.started);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.loads.remove(&oldest);
            }
        }
        free
    }

    pub(super) fn claimed(&mut self, key: BootKey, claimed: &[BootRead]) {
        if let Some(load) = self.loads.get_mut(&key) {
            // A chunk may come twice, if the layer was evicted in between.
            load.claimed.extend(claimed.iter().copied());
        }
    }

    pub(super) fn end(&mut self, key: BootKey) {
        if let Some(load) = self.loads.get_mut(&key) {
            load.running = false;
            if load.claimed.is_empty() {
                self.loads.remove(&key);
            }
        }
    }
}

/// What there is to load for a run.
#[derive(Debug)]
pub enum Listed {
    /// No list is known.
    Nothing,
    /// It is not used, and why.
    Off(String),
    /// A layer cannot be opened.
    Unopened(OpenLayerError),
    /// These chunks, the most urgent first; their layers are places in `handles`.
    Chunks {
        /// The layers of the run, lowest first.
        handles: Vec<Arc<LayerHandle>>,
        /// The chunks.
        reads: Vec<BootRead>,
    },
}

/// Ends a load, however it ends.
struct Loading<'a> {
    boot: &'a Boot,
    key: BootKey,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.boot.state().end(self.key);
    }
}

/// Compressed bytes of those chunks that are here.
fn present_bytes<'a>(
    handles: &[Arc<LayerHandle>],
    chunks: impl Iterator<Item = &'a BootRead>,
) -> (u64, u64) {
    let (mut count, mut bytes) = (0, 0);
    for read in chunks {
        let Some(handle) = handles.get(read.layer) else {
            continue;
        };
        if handle.device().is_present(read.chunk)
            && let Some(chunk) = handle.chunks().chunk(read.chunk)
        {
            count += 1;
            bytes += chunk.blob.len();
        }
    }
    (count, bytes)
}

impl Boot {
    /// Loads the list of a run, if there is one, unless that is under way. Returns at once; the indexes
    /// of the layers are on disk.
    pub fn load(self: &Arc<Self>, layers: Vec<LazyLayerRecord>) {
        self.load_after(layers, None);
    }

    /// As [`Self::load`], once it is known what need not be loaded.
    pub fn load_after(self: &Arc<Self>, layers: Vec<LazyLayerRecord>, planned: Option<Planned>) {
        let key = boot_key(&layers);
        if !self.options.enabled || layers.is_empty() || !self.state().begin(key) {
            return;
        }
        let boot = Arc::clone(self);
        self.spawn(async move {
            let _loading = Loading { boot: &boot, key };
            if let Some(planned) = planned {
                planned.wait().await;
            }
            boot.load_now(key, &layers).await;
        });
    }

    /// Loads it, and waits until what came of it has come; says how many chunks it set out to bring.
    pub(super) async fn load_now(
        self: &Arc<Self>,
        key: BootKey,
        layers: &[LazyLayerRecord],
    ) -> usize {
        let (handles, reads) = match self.listed(layers).await {
            Listed::Chunks { handles, reads } => (handles, reads),
            Listed::Nothing => return 0,
            Listed::Off(reason) => {
                tracing::debug!(%key, reason, "the boot list is off");
                return 0;
            }
            Listed::Unopened(error) => {
                tracing::debug!(%key, "do without a boot list: {error}");
                return 0;
            }
        };
        let began = Instant::now();
        let burst = self.layers.fetcher().load_boot_list(&handles, &reads);
        if burst.requests() == 0 {
            return 0;
        }
        // Before it ends: a start may be over by then.
        self.state().claimed(key, burst.claimed());
        let requests = burst.requests();
        let claimed = burst.join().await;
        let (count, bytes) = present_bytes(&handles, claimed.iter());
        self.metrics.loaded(count, bytes);
        tracing::info!(
            %key, listed = reads.len(), missing = claimed.len(), loaded = count, bytes, requests,
            seconds = began.elapsed().as_secs_f64(), "boot list loaded"
        );
        claimed.len()
    }

    /// What the list of a run names, ready to be loaded; the layers are opened, and their indexes are on
    /// disk.
    pub async fn listed(self: &Arc<Self>, layers: &[LazyLayerRecord]) -> Listed {
        let key = boot_key(layers);
        if !self.options.enabled {
            return Listed::Off("[boot] enabled is false".to_owned());
        }
        let Some(document) = self.wanted(key, layers).await else {
            return Listed::Nothing;
        };
        if let Some(off) = &document.off {
            return Listed::Off(off.reason.clone());
        }
        let mut handles: Vec<Arc<LayerHandle>> = Vec::new();
        for record in layers {
            match self.layers.open(record).await {
                Ok(handle) => handles.push(handle),
                Err(error) => return Listed::Unopened(error),
            }
        }
        let mut chunks = document.chunks();
        let listed = chunks.len();
        if listed == 0 {
            return Listed::Nothing;
        }
        let there = |at: &BootChunk| {
            let handle = handles.get(usize::from(at.layer));
            handle.is_some_and(|handle| at.chunk < handle.chunks().count())
        };
        chunks.retain(there);
        if chunks.len() < listed {
            // Somebody told nonsense; what others said besides is as good as ever.
            let unknown = listed - chunks.len();
            tracing::warn!(%key, listed, unknown, "a boot list names chunks that there are not");
            self.metrics.ignored("no_such_chunk");
        }
        let reads = chunks.iter().map(|at| BootRead {
            layer: usize::from(at.layer),
            chunk: at.chunk,
        });
        let mut reads: Vec<BootRead> = reads.collect();
        if self.options.whole_pages {
            let page_bytes = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
            reads = whole_pages(&handles, &reads, page_bytes);
        }
        Listed::Chunks { handles, reads }
    }

    /// The document of a list that could be used. What is attached to the layers is remembered; where
    /// nothing is known, other nodes are asked.
    async fn wanted(
        self: &Arc<Self>,
        key: BootKey,
        layers: &[LazyLayerRecord],
    ) -> Option<BootDocument> {
        let mut document = self.document(key).await;
        if let Some(list) = self.attached(layers) {
            let known = document.as_ref().and_then(|it| it.attached.as_ref());
            if known.is_none_or(|known| known.0 != list) {
                let attach = move |document: &mut BootDocument| {
                    document.attach(list);
                };
                match self.change(key, indexes(layers), attach).await {
                    Ok(changed) => document = Some(changed),
                    Err(OfferError::Stopping) => return None,
                    Err(error) => tracing::warn!(%key, "failed to remember a boot list: {error}"),
                }
            }
        }
        let known = document.as_ref().is_some_and(|it| it.origin().is_some());
        let is_off = document.as_ref().is_some_and(|it| it.off.is_some());
        if !known && !is_off && self.peers.get().is_some() {
            self.ask(key).await;
            document = self.document(key).await;
        }
        document
    }

    /// What was loaded for a run since its last start: chunks and compressed bytes, and which of them
    /// `read` has. `None` when nothing was.
    pub(super) fn take_load(
        &self,
        key: BootKey,
        handles: &[Arc<LayerHandle>],
        read: impl Fn(&BootRead) -> bool,
    ) -> Option<LoadedRead> {
        let claimed = {
            let mut state = self.state();
            let load = state.loads.get_mut(&key)?;
            let claimed = std::mem::take(&mut load.claimed);
            if !load.running {
                state.loads.remove(&key);
            }
            claimed
        };
        let (loaded_chunks, loaded_bytes) = present_bytes(handles, claimed.iter());
        let were_read = claimed.iter().filter(|it| read(it));
        let (read_chunks, read_bytes) = present_bytes(handles, were_read);
        (loaded_chunks > 0).then_some(LoadedRead {
            loaded_bytes,
            read_chunks,
            read_bytes,
        })
    }
}

/// What became of what a list loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadedRead {
    pub(super) loaded_bytes: u64,
    pub(super) read_chunks: u64,
    pub(super) read_bytes: u64,
}
