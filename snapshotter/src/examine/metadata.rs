// SPDX-License-Identifier: Apache-2.0
//! The invariants of the metadata store.

use std::sync::Arc;

use super::{Examiner, Finding, Report, Severity, blocking};

impl Examiner {
    pub(super) async fn metadata(&self, report: Arc<Report<'_>>) {
        report.looks_at("metadata.redb");
        let metadata = Arc::clone(&self.lazy.parts().metadata);
        let Err(error) = blocking(move || metadata.check()).await else {
            return;
        };
        let finding = Finding::new(Severity::Error, "metadata.redb", error).advice(
            "stop containerd and sluiced, move the root directory away, and pull the images again",
        );
        report.finding(finding).await;
    }
}
