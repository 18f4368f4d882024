// SPDX-License-Identifier: Apache-2.0
//! The store against its budget, and the disk that it lies on.

use std::sync::Arc;

use super::{Examiner, Finding, Report, Severity, blocking};

/// With less than this part of a disk free, other programs of the node soon have none ...
const FREE_PERCENT: u64 = 5;
/// ... unless the disk is so large that a small part of it is room enough for images.
const FREE_BYTES: u64 = 16 << 30;

/// What the budget and what cannot be evicted say together.
fn judge(budget_bytes: Option<u64>, held_bytes: u64, staying_bytes: u64) -> Option<Finding> {
    let budget = budget_bytes?;
    if staying_bytes > budget {
        let problem = format!(
            "pinned layers and those in use take {staying_bytes} bytes, the budget is {budget}"
        );
        let advice = "unpin images (`sluice cache ls` says why layers stay), stop containers, or raise [store] budget";
        return Some(Finding::new(Severity::Warning, "store", problem).advice(advice));
    }
    let over = held_bytes.checked_sub(budget).filter(|over| *over > 0)?;
    let problem = format!("takes {over} bytes more than its budget");
    let advice = "eviction runs every minute; `sluice cache evict --unused` makes room at once";
    Some(Finding::new(Severity::Info, "store", problem).advice(advice))
}

/// What the disk's figures say, in bytes.
fn judge_disk(root: &str, free: u64, total: u64) -> Option<Finding> {
    let percent = free.saturating_mul(100).checked_div(total)?;
    if percent >= FREE_PERCENT || free >= FREE_BYTES {
        return None;
    }
    let problem = format!("its disk has {free} bytes of {total} free ({percent} %)");
    let advice = "set or lower [store] budget, or make room; a full disk turns caching off";
    Some(Finding::new(Severity::Warning, root, problem).advice(advice))
}

impl Examiner {
    pub(super) async fn budget(&self, report: Arc<Report<'_>>) {
        let cached = match self.lazy.cached().await {
            Ok(cached) => cached,
            Err(error) => return report.failed("store", error).await,
        };
        let (mut held, mut staying) = (0_u64, 0_u64);
        for layer in &cached {
            report.looks_at(layer.key.diff_id);
            held += layer.held_bytes;
            if layer.stays.is_some() {
                staying += layer.held_bytes;
            }
        }
        if let Some(finding) = judge(self.lazy.store_budget_bytes(), held, staying) {
            report.finding(finding).await;
        }
        let reserve = self.lazy.reserve().clone();
        let wanted = reserve.wanted_bytes();
        let missing = blocking(move || reserve.missing_bytes()).await;
        if missing > 0 {
            let problem =
                format!("{missing} of the {wanted} bytes of [store] reserve are not free");
            let advice = "images are not completed in the background until they are: make room, or unpin images";
            let finding = Finding::new(Severity::Warning, "store", problem).advice(advice);
            report.finding(finding).await;
        }
        let root = self.lazy.root().to_owned();
        let shown = root.display().to_string();
        let space = blocking(move || nix::sys::statvfs::statvfs(&root)).await;
        match space {
            Ok(space) => {
                let unit = space.fragment_size();
                let bytes = |blocks: u64| blocks.saturating_mul(unit);
                let (free, total) = (bytes(space.blocks_available()), bytes(space.blocks()));
                if let Some(finding) = judge_disk(&shown, free, total) {
                    report.finding(finding).await;
                }
            }
            Err(error) => report.failed(&shown, error).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_judged_by_what_must_stay() {
        let severity = |budget, held, staying| judge(budget, held, staying).map(|it| it.severity);
        assert_eq!(severity(None, 1 << 40, 1 << 40), None);
        assert_eq!(severity(Some(100), 100, 100), None);
        assert_eq!(severity(Some(100), 101, 100), Some(Severity::Info));
        assert_eq!(severity(Some(100), 101, 101), Some(Severity::Warning));
    }

    #[test]
    fn a_disk_is_full_before_the_last_byte() {
        assert_eq!(judge_disk("/r", 5, 100), None);
        assert!(judge_disk("/r", 4, 100).is_some());
        assert!(judge_disk("/r", 0, 100).is_some());
        assert_eq!(judge_disk("/r", 0, 0), None, "no disk at all");
        let large = 100 * FREE_BYTES;
        assert_eq!(judge_disk("/r", FREE_BYTES, large), None, "1 %, but enough");
        assert!(judge_disk("/r", FREE_BYTES - 1, large).is_some());
    }
}
