// SPDX-License-Identifier: Apache-2.0
//! Whether each layer that a snapshot has can be served: its index is here, and its seal did not fail.
//!
//! # A failed seal
//! The layer is not what its image says, and nothing of it is readable any more. Nothing here can make it
//! right: the repair forgets the device, its record and its index, so that a pull brings all of it anew.
//! The snapshots belong to containerd, which holds them until the image is removed; they are left alone. A
//! layer that a mount or a container stands on is not touched.

use std::sync::Arc;

use sluice_fetcher::store::DeviceKey;

use super::{Examiner, Finding, Report, Severity, blocking};
use crate::layers::OpenLayerError;
use crate::snapshots::LazyLayerRecord;

const PULL_AGAIN: &str = "remove the image from containerd and pull it again";

impl Examiner {
    pub(super) async fn layers(&self, report: Arc<Report<'_>>) {
        let records = match self.records().await {
            Ok(records) => records,
            Err(error) => return report.failed("metadata.redb", error).await,
        };
        for (key, record) in &records {
            report.looks_at(record.diff_id);
            let name = self.name(record);
            match self.lazy.parts().layers.open(record).await {
                Ok(handle) => {
                    let failure = handle.device().failure();
                    drop(handle);
                    if let Some(failure) = failure {
                        let why = failure.described(record.diff_id);
                        let problem = format!(
                            "is forged or damaged in its registry: {why}; it is not readable"
                        );
                        let finding = Finding::new(Severity::Error, name, problem);
                        self.failed_seal(&report, key, record, finding).await;
                    }
                }
                Err(error @ (OpenLayerError::NoIndex(_) | OpenLayerError::Index { .. })) => {
                    let finding = Finding::new(Severity::Error, name, error).advice(PULL_AGAIN);
                    report.finding(finding).await;
                }
                Err(error) => report.failed(&name, error).await,
            }
        }
    }

    async fn failed_seal(
        &self,
        report: &Report<'_>,
        key: &DeviceKey,
        record: &LazyLayerRecord,
        finding: Finding,
    ) {
        let cached = match self.lazy.cached().await {
            Ok(cached) => cached,
            Err(error) => return report.failed(&finding.subject, error).await,
        };
        let stays = cached.into_iter().find(|layer| layer.key == *key);
        if let Some(reason) = stays.and_then(|layer| layer.stays) {
            let advice = format!(
                "remove its containers, then use --fix ({reason}); do not trust its registry"
            );
            return report.finding(finding.advice(advice)).await;
        }
        let mut repaired = false;
        if self.wanted.fix {
            let layers = &self.lazy.parts().layers;
            if let Err(error) = layers.remove(key).await {
                return report.failed(&finding.subject, error).await;
            }
            let path = layers.indexes().path(record.index_digest);
            if let Err(error) = blocking(move || std::fs::remove_file(path)).await {
                tracing::debug!(device = %key, "keep index of a failed layer: {error}");
            }
            repaired = true;
        }
        let advice = format!("--fix forgets its bytes and its index; then {PULL_AGAIN}");
        report
            .finding(finding.advice(advice).repairable(repaired))
            .await;
    }
}
