// SPDX-License-Identifier: Apache-2.0
//! Mounts that the kernel's EROFS serves, while no shim lives.
//!
//! One whose layers are all sealed needs no process. Of another the shim answers for what is not here yet;
//! while none does, the kernel reads holes as zeros.

use std::path::Path;

use super::{Finding, Severity};

/// What is known of the layers below a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// All are sealed.
    Sealed,
    /// Some are not.
    Lazy,
    /// Nothing tells.
    Unknown,
}

/// What a mount says while no shim lives.
#[must_use]
pub fn judge(check: &str, mountpoint: &Path, layers: Completeness) -> Option<Finding> {
    let subject = mountpoint.display();
    match layers {
        Completeness::Sealed => None,
        Completeness::Lazy => {
            let problem =
                "not complete, and no process watches it: what is missing is read as ZEROS";
            let advice = "stop the containers that stand on it, start sluiced, which watches it again, and start them";
            Some(Finding::new(check, Severity::Error, subject, problem).advice(advice))
        }
        Completeness::Unknown => {
            let problem = "a mount of the kernel of which no note says whether it is complete";
            let advice = "start sluiced; it unmounts what is nobody's with `sluice doctor --fix`";
            Some(Finding::new(check, Severity::Warning, subject, problem).advice(advice))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_complete_needs_nobody() {
        let severity = |layers| judge("c", Path::new("/m"), layers).map(|it| it.severity);
        assert_eq!(severity(Completeness::Sealed), None);
        assert_eq!(severity(Completeness::Lazy), Some(Severity::Error));
        assert_eq!(severity(Completeness::Unknown), Some(Severity::Warning));
    }
}
