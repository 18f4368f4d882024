// SPDX-License-Identifier: Apache-2.0
//! The shim that serves, against the one that is installed.

use std::sync::Arc;

use super::{Examiner, Finding, Report, Severity, blocking};
use crate::shim::client::ShimPeer;
use crate::sys::process;

/// What the worker says of itself, held against the installed program.
///
/// `installed` tells the program's file from others; `None`: it cannot be looked at.
fn judge(peer: Option<&ShimPeer>, installed: Option<&str>) -> Option<Finding> {
    let found = |problem: String| Finding::new(Severity::Warning, "sluice-shim", problem);
    let Some(peer) = peer else {
        let problem =
            "none is attached: reads of missing data wait, and nothing is mounted over FUSE";
        return Some(found(problem.into()).advice("look at shim.log in the run directory"));
    };
    let Some(installed) = installed else {
        let problem = "the program is not there: a shim that dies is not replaced";
        return Some(found(problem.into()).advice("install it beside sluiced"));
    };
    if peer.program == installed {
        return None;
    }
    let ours = env!("CARGO_PKG_VERSION");
    let problem = match peer.build == ours {
        true => format!(
            "process {} runs another file than is installed",
            peer.worker_pid
        ),
        false => format!(
            "process {} is {}, sluiced is {ours}",
            peer.worker_pid, peer.build
        ),
    };
    // From before it could be told, it cannot go on as another program either.
    let advice = match peer.program.is_empty() {
        true => "it is replaced when all its mounts are gone, or the node is started again",
        false => {
            "restart sluiced: the shim goes on as the installed program, and no container notices"
        }
    };
    Some(found(problem).advice(advice))
}

impl Examiner {
    pub(super) async fn shim(&self, report: Arc<Report<'_>>) {
        report.looks_at("sluice-shim");
        let (peer, binary) = (self.shim.peer(), self.shim.program().to_owned());
        let installed = blocking(move || process::identity(&binary).ok()).await;
        if let Some(finding) = judge(peer.as_ref(), installed.as_deref()) {
            report.finding(finding).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_of_another_program_is_told_of() {
        let peer = |build: &str, program: &str| ShimPeer {
            version: 4,
            build: build.into(),
            program: program.into(),
            worker_pid: 7,
            holder_pid: 8,
            mounts: 1,
        };
        let ours = env!("CARGO_PKG_VERSION");
        let told = |peer: Option<&ShimPeer>, installed| {
            let finding = judge(peer, installed)?;
            Some(format!("{} ({})", finding.problem, finding.advice))
        };
        assert_eq!(told(Some(&peer(ours, "1:2")), Some("1:2")), None);
        let other = told(Some(&peer(ours, "1:2")), Some("1:3")).unwrap();
        assert!(
            other.contains("another file") && other.contains("restart sluiced"),
            "{other}"
        );
        let older = told(Some(&peer("0.0.1", "1:2")), Some("1:3")).unwrap();
        assert!(older.contains("process 7 is 0.0.1"), "{older}");
        let oldest = told(Some(&peer("0.0.1", "")), Some("1:3")).unwrap();
        assert!(oldest.contains("when all its mounts are gone"), "{oldest}");
        assert!(
            told(Some(&peer(ours, "1:2")), None)
                .unwrap()
                .contains("not there")
        );
        assert!(
            told(None, Some("1:2"))
                .unwrap()
                .contains("none is attached")
        );
    }
}
