// SPDX-License-Identifier: Apache-2.0
//! What `sluice doctor` looks at by itself, also when no daemon runs: containerd's configuration, sockets,
//! the kernel, FUSE connections, the clock. The daemon's own state is examined by the daemon.
//!
//! Each file judges: text and numbers in, findings out. [`look`] reads files and sockets, with deadlines,
//! and repairs. Nothing ever touches a mount: a dead FUSE server hangs whoever does.

pub mod clock;
pub mod connections;
pub mod containerd;
pub mod kernel;
pub mod kernel_mounts;
pub mod look;
pub mod mountinfo;

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Works, but not as it should, or not for long.
    Warning,
    /// Something does not work.
    Error,
}

impl Severity {
    /// The word in lists.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "INFO",
            Severity::Warning => "WARNING",
            Severity::Error => "ERROR",
        }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check found it.
    pub check: String,
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub subject: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
    /// Whether `--fix` repairs it.
    pub repairable: bool,
    /// Whether it did.
    pub repaired: bool,
}

impl Finding {
    /// A finding without advice.
    #[must_use]
    pub fn new(
        check: &str,
        severity: Severity,
        subject: impl ToString,
        problem: impl ToString,
    ) -> Self {
        Self {
            check: check.to_owned(),
            severity,
            subject: subject.to_string(),
            problem: problem.to_string(),
            advice: String::new(),
            repairable: false,
            repaired: false,
        }
    }

    /// With what to do about it.
    #[must_use]
    pub fn advice(mut self, advice: impl ToString) -> Self {
        self.advice = advice.to_string();
        self
    }
}

/// A check that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Which.
    pub check: String,
    /// How many things it looked at.
    pub looked_at: u64,
}

/// The exit code: 0 nothing or only worth knowing, 1 a warning, 2 an error. What was repaired counts as
/// worth knowing.
#[must_use]
pub fn exit_code(findings: &[Finding]) -> u8 {
    let left = findings.iter().filter(|finding| !finding.repaired);
    match left.map(|finding| finding.severity).max() {
        None | Some(Severity::Info) => 0,
        Some(Severity::Warning) => 1,
        Some(Severity::Error) => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_that_is_left_is_the_exit_code() {
        let finding = |severity, repaired| Finding {
            repaired,
            ..Finding::new("c", severity, "s", "p")
        };
        use Severity::{Error, Info, Warning};
        for (findings, expected) in [
            (vec![], 0),
            (vec![finding(Info, false)], 0),
            (vec![finding(Warning, false), finding(Info, false)], 1),
            (vec![finding(Error, false), finding(Warning, false)], 2),
            (vec![finding(Error, true), finding(Warning, false)], 1),
            (vec![finding(Error, true)], 0),
        ] {
            assert_eq!(exit_code(&findings), expected, "{findings:?}");
        }
    }
}
