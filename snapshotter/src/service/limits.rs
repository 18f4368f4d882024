// SPDX-License-Identifier: Apache-2.0
//! How long a request of containerd may take, and when it is called stuck. Pure.

use std::time::Duration;

use sluice_fetcher::steps::StepKind;

/// What reads or writes metadata alone.
const SHORT_STEP: StepKind = StepKind::new("snapshots request", Duration::from_secs(10));
/// What may fetch indexes, unpack a layer within the budget, and mount.
const MOUNT_STEP: StepKind = StepKind::new("snapshots request", Duration::from_secs(30));
/// What counts or deletes as many files as a container has made.
const WALK_STEP: StepKind = StepKind::new("snapshots request", Duration::from_secs(120));
/// The bound on that: a slow disk deletes a million files in it.
const WALK_DEADLINE: Duration = Duration::from_secs(900);

/// The bounds of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit {
    /// When it is answered in any case.
    pub(super) deadline: Duration,
    /// How it is watched.
    pub(super) step: StepKind,
}

/// The bounds of all requests.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    prepare_budget: Duration,
    rpc_deadline: Duration,
}

impl RequestLimits {
    /// From the configuration: what a Prepare may spend on the network, and what any call may take.
    #[must_use]
    pub fn new(prepare_budget: Duration, rpc_deadline: Duration) -> Self {
        Self {
            prepare_budget,
            rpc_deadline,
        }
    }

    pub(super) fn of(&self, method: &str) -> Limit {
        let rpc = self.rpc_deadline;
        let (deadline, step) = match method {
            "Stat" | "Update" | "List" | "Remove" => (rpc, SHORT_STEP),
            // The budget, the mounts, and the metadata before and after.
            "Prepare" | "View" | "Mounts" => {
                let parts = self.prepare_budget.saturating_add(rpc.saturating_mul(2));
                (parts, MOUNT_STEP)
            }
            _ => (WALK_DEADLINE.max(rpc), WALK_STEP),
        };
        Limit { deadline, step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_bounded_by_what_it_is_made_of() {
        let seconds = Duration::from_secs;
        let limits = RequestLimits::new(seconds(5), seconds(30));
        for (method, deadline) in [
            ("Stat", 30),
            ("Remove", 30),
            ("Prepare", 65),
            ("Mounts", 65),
            ("Commit", 900),
            ("Usage", 900),
            ("Cleanup", 900),
        ] {
            assert_eq!(limits.of(method).deadline, seconds(deadline), "{method}");
        }
        let never = RequestLimits::new(Duration::MAX, Duration::MAX);
        assert_eq!(never.of("Prepare").deadline, Duration::MAX);
    }
}
