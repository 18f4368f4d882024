// SPDX-License-Identifier: Apache-2.0
//! The wall clock: certificates and tokens fail when it is wrong, and evictions go in the wrong order.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Finding, Severity};

/// Name of the check.
pub const CHECK: &str = "clock";

/// 1 January 2026: this program did not exist before. A constant rather than the time of the build, so that
/// builds can be repeated byte for byte.
const RELEASED_UNIX_SECONDS: u64 = 1_767_225_600;

/// Tokens of registries live for minutes.
const SKEW: Duration = Duration::from_secs(120);

fn apart(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other)
        .unwrap_or_else(|error| error.duration())
}

/// Judges the time by itself, and by a registry's `Date` where there is one.
#[must_use]
pub fn judge(now: SystemTime, registry: Option<(&str, SystemTime)>) -> Option<Finding> {
    let advice = "set the clock (chrony, systemd-timesyncd): certificates and tokens are refused";
    let released = UNIX_EPOCH + Duration::from_secs(RELEASED_UNIX_SECONDS);
    if now < released {
        let problem = "is set before the year of this program";
        return Some(Finding::new(CHECK, Severity::Error, "clock", problem).advice(advice));
    }
    let (host, theirs) = registry?;
    let skew = apart(now, theirs);
    (skew > SKEW).then(|| {
        let problem = format!("is {} s from that of {host}", skew.as_secs());
        Finding::new(CHECK, Severity::Warning, "clock", problem).advice(advice)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_judged_both_ways() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let now = at(RELEASED_UNIX_SECONDS + 1000);
        let severity = |now, theirs: Option<u64>| {
            let theirs = theirs.map(|seconds| ("r.test", at(seconds)));
            judge(now, theirs).map(|it| it.severity)
        };
        assert_eq!(severity(at(0), None), Some(Severity::Error));
        assert_eq!(severity(now, None), None);
        assert_eq!(severity(now, Some(RELEASED_UNIX_SECONDS + 900)), None);
        for theirs in [800, 1200] {
            let theirs = RELEASED_UNIX_SECONDS + theirs;
            assert_eq!(severity(now, Some(theirs)), Some(Severity::Warning));
        }
    }
}
