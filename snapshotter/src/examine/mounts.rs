// SPDX-License-Identifier: Apache-2.0
//! The kernel's mounts below the root against those that the shim serves.
//!
//! The table of mounts is asked after the kernel: a mount that comes meanwhile is in the table before it is
//! a mount, so what the kernel has and the table has not is nobody's. What the kernel lacks is asked twice,
//! for the opposite reason. No mount is touched but by its unmount.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Examiner, Finding, Report, Severity, blocking};
use crate::chain::RunKey;
use crate::mount::over_fuse;
use crate::sys::mountpoint::{self, MountLine};

/// The runs that the kernel has mounted below this directory.
fn runs_below(lines: Vec<MountLine>, directory: &Path) -> BTreeMap<PathBuf, Option<RunKey>> {
    let below = lines
        .into_iter()
        .filter(|line| line.mountpoint.parent() == Some(directory));
    below
        .map(|line| {
            let name = line.mountpoint.file_name().and_then(|name| name.to_str());
            // The one below a mount of the kernel belongs to the same run.
            let name = name.map(|name| over_fuse::run_of(name).unwrap_or(name));
            let key = name.and_then(RunKey::from_hex);
            (line.mountpoint, key)
        })
        .collect()
}

impl Examiner {
    async fn kernel_runs(&self) -> io::Result<BTreeMap<PathBuf, Option<RunKey>>> {
        let directory = self.lazy.root().join("mnt");
        blocking(move || Ok(runs_below(mountpoint::mounts()?, &directory))).await
    }

    pub(super) async fn mounts(&self, report: Arc<Report<'_>>) {
        let table = &self.lazy.parts().mounts;
        if !table.is_adopted() {
            let problem =
                "the shim has not said yet what it serves: nothing is unmounted or evicted";
            let finding = Finding::new(Severity::Warning, "shim", problem)
                .advice("look at the log of sluiced and at shim.log in its run directory");
            report.finding(finding).await;
            return;
        }
        let served = table.mounted();
        let there = match self.kernel_runs().await {
            Ok(there) => there,
            Err(error) => return report.failed("mountinfo", error).await,
        };
        let needed = match self.lazy.needed().await {
            Ok(needed) => needed,
            Err(error) => return report.failed("metadata.redb", error).await,
        };
        for (path, key) in &there {
            report.looks_at(path.display());
            if key.is_none_or(|key| !table.knows(key)) {
                let used = key.is_some_and(|key| needed.used.contains_key(&key));
                self.orphan(&report, path, used).await;
            }
        }
        let missing = served
            .into_iter()
            .filter(|run| !there.contains_key(&run.mountpoint));
        for run in missing {
            report.looks_at(run.mountpoint.display());
            let again = self.kernel_runs().await.unwrap_or_default();
            if again.contains_key(&run.mountpoint) || !table.knows(run.key) {
                continue;
            }
            let severity = match needed.used.contains_key(&run.key) {
                true => Severity::Error,
                false => Severity::Warning,
            };
            let problem = "somebody unmounted it: its containers cannot open further files";
            let finding = Finding::new(severity, run.mountpoint.display(), problem)
                .advice("restart the containers of this image; the next start mounts it again");
            report.finding(finding).await;
        }
    }

    async fn orphan(&self, report: &Report<'_>, path: &Path, used: bool) {
        let problem = "a mount that nobody serves: whoever touches it may hang";
        let finding = Finding::new(Severity::Warning, path.display(), problem);
        if used {
            let finding = Finding {
                severity: Severity::Error,
                ..finding
            };
            let advice = "stop the containers that stand on it, then use --fix";
            return report.finding(finding.advice(advice)).await;
        }
        let repaired = self.wanted.fix && {
            let path = path.to_owned();
            let detached = blocking(move || {
                let detached = mountpoint::detach(&path, true)?;
                // An empty directory; where it is not, it stays.
                let _ = std::fs::remove_dir(&path);
                io::Result::Ok(detached)
            });
            match detached.await {
                Ok(_) => true,
                Err(error) => return report.failed(&finding.subject, error).await,
            }
        };
        let finding = finding.advice("--fix unmounts it").repairable(repaired);
        report.finding(finding).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_direct_children_with_a_key() {
        let line = |path: &str| MountLine {
            id: 1,
            device: (0, 1),
            mountpoint: path.into(),
            kind: "fuse.sluice".into(),
            source: "sluice".into(),
        };
        let key = "ab".repeat(32);
        let lines = vec![
            line(&format!("/r/mnt/{key}")),
            line(&format!("/r/mnt/{key}.devices")),
            line("/r/mnt/other"),
            line(&format!("/r/mnt/{key}/inside")),
            line("/r/mnt"),
            line(&format!("/elsewhere/{key}")),
        ];
        let runs = runs_below(lines, Path::new("/r/mnt"));
        let expected = [
            (
                PathBuf::from(format!("/r/mnt/{key}")),
                RunKey::from_hex(&key),
            ),
            (
                PathBuf::from(format!("/r/mnt/{key}.devices")),
                RunKey::from_hex(&key),
            ),
            ("/r/mnt/other".into(), None),
        ];
        assert_eq!(runs, expected.into_iter().collect());
    }
}
