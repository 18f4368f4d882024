// SPDX-License-Identifier: Apache-2.0
//! What is stuck now, here and in the shim.

use std::sync::Arc;
use std::time::Instant;

use sluice_fetcher::steps::Stuck;

use super::{Examiner, Finding, Report, Severity};

/// What a step that is stuck says.
fn judge(stuck: &Stuck) -> Finding {
    let process = match stuck.pid == std::process::id() {
        true => "sluiced",
        false => "sluice-shim",
    };
    let problem = format!(
        "{process} ({}) waits in this step for {} s, on behalf of {}",
        stuck.pid,
        stuck.stands.as_secs(),
        stuck.whom
    );
    let subject = format!("{}: {}", stuck.step, stuck.subject);
    Finding::new(Severity::Warning, subject, problem)
        .advice("docs/deadlines.md says what each step waits for, and what ends it")
}

impl Examiner {
    pub(super) async fn steps(&self, report: Arc<Report<'_>>) {
        let metrics = self.lazy.parts().layers.fetcher().metrics();
        report.looks_at("steps");
        for stuck in metrics.steps().stuck(Instant::now()) {
            report.finding(judge(&stuck)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stuck_step_is_told_of_with_its_process_and_for_whom() {
        let mut stuck = Stuck {
            pid: std::process::id(),
            id: 1,
            step: "registry body".into(),
            whom: "foreground".into(),
            subject: "bytes 0..10 from http://r".into(),
            stands: Duration::from_millis(7900),
        };
        let finding = judge(&stuck);
        assert_eq!(finding.subject, "registry body: bytes 0..10 from http://r");
        let said = &finding.problem;
        assert!(said.starts_with("sluiced (") && said.contains("for 7 s, on behalf of foreground"));
        stuck.pid = 1;
        assert!(judge(&stuck).problem.starts_with("sluice-shim (1)"));
    }
}
