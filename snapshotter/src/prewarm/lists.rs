// SPDX-License-Identifier: Apache-2.0
//! Bringing what boot lists name, and no more.

use std::sync::Arc;
use std::time::Duration;

use sluice_fetcher::boot::BootRead;
use sluice_fetcher::scheduler::LayerHandle;

use super::progress::LayerPhase;
use super::work::{LOOK, Opened, Report, STALL, Stall, Work};
use crate::boot::Listed;
use crate::snapshots::LazyLayerRecord;

/// Between two attempts to bring what a burst did not bring.
const BURST_PAUSE: Duration = Duration::from_secs(1);

impl Work {
    /// Brings the boot list of each run of lazy layers.
    pub(super) async fn bring_lists(&self, opened: &[Opened], report: &Report) {
        let apart = |left: &Opened, right: &Opened| left.at + 1 == right.at;
        for run in opened.chunk_by(apart) {
            let records: Vec<LazyLayerRecord> = run.iter().map(|it| it.record.clone()).collect();
            match self.lazy.parts().boot.listed(&records).await {
                Listed::Chunks { handles, reads } => {
                    let ended = self.bring(opened, run, &handles, &reads, report).await;
                    report.send_modify(|it| {
                        for layer in run {
                            match &ended {
                                Ok(()) => it.layers[layer.at].phase = LayerPhase::Done,
                                Err(error) => it.layers[layer.at].fail(error),
                            }
                        }
                    });
                }
                Listed::Nothing => end_run(run, report, "no boot list is known"),
                Listed::Off(why) => {
                    end_run(run, report, &format!("the boot list is off: {why}"));
                }
                Listed::Unopened(error) => report.send_modify(|it| {
                    for layer in run {
                        it.layers[layer.at].fail(&error);
                    }
                }),
            }
        }
    }

    async fn bring(
        &self,
        opened: &[Opened],
        run: &[Opened],
        handles: &[Arc<LayerHandle>],
        reads: &[BootRead],
        report: &Report,
    ) -> Result<(), String> {
        let mut stall = Stall::new();
        let fetcher = self.lazy.parts().layers.fetcher();
        loop {
            let burst = fetcher.load_boot_list(handles, reads);
            let mut ended = std::pin::pin!(burst.join());
            loop {
                let done = tokio::time::timeout(LOOK, &mut ended).await.is_ok();
                self.hold(opened);
                let present = look_at_list(run, handles, reads, report);
                if stall.is_over(present, false) {
                    return Err(format!("no source gave anything for {} s", STALL.as_secs()));
                }
                if done {
                    break;
                }
            }
            let missing = |read: &BootRead| {
                let handle = handles.get(read.layer);
                handle.is_some_and(|handle| !handle.device().is_present(read.chunk))
            };
            if !reads.iter().any(missing) {
                return Ok(());
            }
            tokio::time::sleep(BURST_PAUSE).await;
        }
    }
}

/// Nothing can be brought for a run, and that is no failure: a first start will show what is read.
fn end_run(run: &[Opened], report: &Report, note: &str) {
    report.send_modify(|it| {
        note.clone_into(&mut it.note);
        for layer in run {
            let layer = &mut it.layers[layer.at];
            layer.phase = LayerPhase::Done;
            (layer.present_bytes, layer.total_bytes) = (0, 0);
        }
    });
}

/// The same of what a list names.
fn look_at_list(
    run: &[Opened],
    handles: &[Arc<LayerHandle>],
    reads: &[BootRead],
    report: &Report,
) -> u64 {
    let mut counts = vec![(0, 0); run.len()];
    for read in reads {
        let Some(handle) = handles.get(read.layer) else {
            continue;
        };
        let bytes = handle.chunks().chunk(read.chunk).map(|it| it.device.len());
        let (Some(count), Some(bytes)) = (counts.get_mut(read.layer), bytes) else {
            continue;
        };
        count.1 += bytes;
        if handle.device().is_present(read.chunk) {
            count.0 += bytes;
        }
    }
    report.send_if_modified(|it| {
        let mut changed = false;
        for (layer, count) in run.iter().zip(&counts) {
            let layer = &mut it.layers[layer.at];
            changed |= (layer.present_bytes, layer.total_bytes) != *count;
            (layer.present_bytes, layer.total_bytes) = *count;
        }
        changed
    });
    counts.iter().map(|count| count.0).sum()
}
