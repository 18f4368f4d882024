// SPDX-License-Identifier: Apache-2.0
//! Devices and trees that no snapshot needs.
//!
//! The sweeper takes them away by itself, after the grace of the configuration; what is older than that and
//! still there is worth knowing. The repair is one pass of the sweeper.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Examiner, Finding, Report, Severity, blocking};

impl Examiner {
    pub(super) async fn leftovers(&self, report: Arc<Report<'_>>) {
        let before = match self.left_over(&report).await {
            Ok(left) => left,
            Err(error) => return report.failed("store", error).await,
        };
        if before.is_empty() {
            return;
        }
        let mut left = before.clone();
        if self.wanted.fix {
            self.lazy.sweep_now().await;
            left = match self.left_over(&report).await {
                Ok(left) => left,
                Err(error) => return report.failed("store", error).await,
            };
        }
        for path in before {
            let repaired = !left.contains(&path);
            let problem = "no snapshot needs it; the sweeper takes it away by itself";
            let finding = Finding::new(Severity::Info, path, problem)
                .advice("--fix takes it away now, unless somebody is just using it")
                .repairable(repaired);
            report.finding(finding).await;
        }
    }

    async fn left_over(&self, report: &Report<'_>) -> Result<BTreeSet<String>, String> {
        let needed = self.lazy.needed().await.map_err(|it| it.to_string())?;
        let parts = self.lazy.parts();
        let (store, trees) = (
            Arc::clone(parts.layers.fetcher().store()),
            Arc::clone(&parts.trees),
        );
        let grace = self.lazy.file_grace();
        let listed = blocking(move || {
            let keys = store.keys().map_err(|error| error.to_string())?;
            let trees = trees.older_than(grace).map_err(|error| error.to_string())?;
            Ok::<_, String>((keys, trees))
        });
        let (keys, trees) = listed.await?;
        let mounted = parts.mounts.devices();
        let fosters = parts.shelf.fosters();
        let indexes = parts.layers.indexes();
        let mut left = BTreeSet::new();
        for key in keys {
            report.looks_at(key);
            let young = indexes.touched_within(key.index, grace);
            let used = mounted.contains(&key) || fosters.contains(&key);
            if !needed.devices.contains(&key) && !used && !young {
                left.insert(format!("device {key}"));
            }
        }
        for key in trees {
            report.looks_at(key);
            if !needed.kept.contains(&key) && !parts.mounts.knows(key) {
                left.insert(format!("tree {key}"));
            }
        }
        Ok(left)
    }
}
