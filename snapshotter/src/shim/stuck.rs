// SPDX-License-Identifier: Apache-2.0
//! Stuck steps as the wire has them. Pure.

use std::time::Duration;

use sluice_fetcher::steps::Stuck;
use sluice_proto::shim as wire;

/// The worker's answer.
pub(super) fn to_wire(stuck: Vec<Stuck>) -> wire::StepsReply {
    let stuck = stuck.into_iter().map(|it| wire::StuckStep {
        id: it.id,
        step: it.step,
        whom: it.whom,
        subject: it.subject,
        stands_ms: u64::try_from(it.stands.as_millis()).unwrap_or(u64::MAX),
    });
    wire::StepsReply {
        stuck: stuck.collect(),
    }
}

/// What the worker `pid` answered.
pub(super) fn from_wire(pid: u32, reply: wire::StepsReply) -> Vec<Stuck> {
    let stuck = reply.stuck.into_iter().map(|it| Stuck {
        pid,
        id: it.id,
        step: it.step,
        whom: it.whom,
        subject: it.subject,
        stands: Duration::from_millis(it.stands_ms),
    });
    stuck.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stuck_survives_the_wire() {
        let stuck = vec![Stuck {
            pid: 7,
            id: 3,
            step: "reader".into(),
            whom: "a reader".into(),
            subject: "4096 bytes from 0 of x".into(),
            stands: Duration::from_millis(31_250),
        }];
        assert_eq!(from_wire(7, to_wire(stuck.clone())), stuck);
    }
}
