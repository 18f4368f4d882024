// SPDX-License-Identifier: Apache-2.0
//! FUSE mounts that nobody serves, or that do not answer.

use super::mountinfo::FuseMount;
use super::{Finding, Severity};

/// Name of the check.
pub const CHECK: &str = "connections";

/// What the requests that wait on a connection say.
///
/// **Units** `waiting`: how many waited, each time that was looked, within `seconds`; empty when it cannot be
/// told. A connection that is merely busy is seen idle now and then; one that hangs never is.
#[must_use]
pub fn judge(
    mount: &FuseMount,
    waiting: &[u64],
    seconds: u64,
    shim_lives: bool,
) -> Option<Finding> {
    let subject = mount.mountpoint.display();
    if !shim_lives {
        let problem = "a mount that no process serves: whoever touches it hangs or fails";
        let advice = "start sluiced, which may take it over; --fix gives it up: readers get an error and it is unmounted";
        let mut finding = Finding::new(CHECK, Severity::Error, subject, problem).advice(advice);
        finding.repairable = true;
        return Some(finding);
    }
    let least = waiting.iter().copied().min().filter(|least| *least > 0)?;
    let problem = format!("{least} requests or more have waited for {seconds} s without a pause");
    let advice = format!(
        "reads of missing data wait for their registry: `sluice doctor --image` asks it. The last resort is an error for its readers: echo 1 > /sys/fs/fuse/connections/{}/abort",
        mount.connection
    );
    Some(Finding::new(CHECK, Severity::Warning, subject, problem).advice(advice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_never_pauses_hangs() {
        let mount = FuseMount {
            mountpoint: "/m".into(),
            connection: 51,
        };
        let severity = |waiting: &[u64], lives| {
            judge(&mount, waiting, 3, lives).map(|it| (it.severity, it.repairable))
        };
        assert_eq!(severity(&[], true), None);
        assert_eq!(severity(&[0, 0], true), None);
        assert_eq!(severity(&[4, 0, 9], true), None);
        assert_eq!(severity(&[4, 1, 9], true), Some((Severity::Warning, false)));
        assert_eq!(severity(&[0, 0], false), Some((Severity::Error, true)));
        assert_eq!(severity(&[], false), Some((Severity::Error, true)));
        let advice = judge(&mount, &[1], 3, true).unwrap().advice;
        assert!(advice.contains("connections/51/abort"), "{advice}");
    }
}
