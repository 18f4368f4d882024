// SPDX-License-Identifier: Apache-2.0
//! Every byte of the store against its digest: what `--deep` is for.
//!
//! Runs at the lowest priority and stands still while readers wait. A rotten chunk is dropped with `fix` and
//! brought again at once, so that a sealed layer is sealed again; where its registry does not answer, it is
//! brought when it is read.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use sluice_fetcher::scheduler::LayerHandle;
use sluice_fetcher::store::{Audit, OnRot, StoreError};

use super::{Examiner, Finding, Report, Severity, blocking};

/// How long dropped chunks of a layer may take to come again while the client waits.
const REFETCH_DEADLINE: Duration = Duration::from_secs(120);

impl Examiner {
    pub(super) async fn content(&self, report: Arc<Report<'_>>) {
        let records = match self.records().await {
            Ok(records) => records,
            Err(error) => return report.failed("metadata.redb", error).await,
        };
        let layers = &self.lazy.parts().layers;
        let store = Arc::clone(layers.fetcher().store());
        let there: BTreeSet<_> = match blocking(move || store.keys()).await {
            Ok(keys) => keys.into_iter().collect(),
            Err(error) => return report.failed("store", error).await,
        };
        let on_rot = match self.wanted.fix {
            true => OnRot::Drop,
            false => OnRot::Keep,
        };
        for (key, record) in records {
            if !there.contains(&key) {
                continue;
            }
            report.looks_at(record.diff_id);
            let name = self.name(&record);
            // What cannot be opened was told of by the check of layers.
            let Ok(handle) = layers.open(&record).await else {
                continue;
            };
            let sealed = handle.device().is_sealed();
            match layers.fetcher().audit(&handle, on_rot).await {
                Ok(audit) => self.judge(&report, name, &handle, sealed, audit).await,
                // Failed before, and told of; or being removed.
                Err(StoreError::Failed(_) | StoreError::Cancelled | StoreError::Removed) => {}
                Err(error) => report.failed(&name, error).await,
            }
        }
    }

    async fn judge(
        &self,
        report: &Report<'_>,
        name: String,
        handle: &Arc<LayerHandle>,
        sealed: bool,
        audit: Audit,
    ) {
        if let Some(actual) = audit.other_diff_id {
            let problem = format!("is sealed, and its bytes have {actual}");
            let finding = Finding::new(Severity::Error, name, problem)
                .advice("--fix makes it unreadable; use --fix again when its containers are gone");
            return report.finding(finding.repairable(self.wanted.fix)).await;
        }
        if audit.rotten.is_empty() {
            return;
        }
        let problem = format!(
            "{} of {} chunks rotted on the disk",
            audit.rotten.len(),
            audit.checked_chunks
        );
        let finding = Finding::new(Severity::Error, name, problem);
        if !audit.dropped {
            let advice = "--fix drops them and brings them again; look at the health of the disk";
            return report
                .finding(finding.advice(advice).repairable(false))
                .await;
        }
        let again = self.bring_again(handle, sealed, &audit).await;
        let advice = match again {
            true => "look at the health of the disk",
            false => "dropped; they come again when they are read. Look at the health of the disk",
        };
        report
            .finding(finding.advice(advice).repairable(true))
            .await;
    }

    /// Whether what was dropped came again, and a seal that was lost was won again.
    async fn bring_again(&self, handle: &Arc<LayerHandle>, sealed: bool, audit: &Audit) -> bool {
        let fetcher = self.lazy.parts().layers.fetcher();
        let device = handle.device();
        let all = async {
            if sealed {
                fetcher.prefetch(vec![Arc::clone(handle)]).join().await;
                return;
            }
            for chunk in &audit.rotten {
                let Some(chunk) = device.chunks().chunk(*chunk) else {
                    continue;
                };
                let priority = sluice_fetcher::source::Priority::Background;
                let filled = fetcher.fill(handle, chunk.device, priority, Some(REFETCH_DEADLINE));
                if let Err(error) = filled.await {
                    tracing::info!(device = %device.key(), "a dropped chunk does not come again: {error}");
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(REFETCH_DEADLINE, all).await;
        audit.rotten.iter().all(|chunk| device.is_present(*chunk))
    }
}
