// SPDX-License-Identifier: Apache-2.0
//! What is stuck in the worker, shown and counted by the daemon: the worker has a log and no metrics.

use std::sync::Arc;
use std::time::Duration;

use sluice_fetcher::steps::Stuck;
use sluice_proto::shim as wire;
use sluice_proto::shim::envelope::Body;

use super::{ShimClient, unexpected};
use crate::mount::MountError;
use crate::shim::{STEPS_VERSION, stuck};

/// How often the worker is asked. What is stuck for less is not missed in its log.
const ASK_INTERVAL: Duration = Duration::from_secs(5);

impl ShimClient {
    /// What is stuck in the worker now. Of a worker of before [`STEPS_VERSION`] nothing is known.
    ///
    /// **Errors** [`MountError::Unanswered`] within the deadline of calls.
    pub async fn stuck(&self) -> Result<Vec<Stuck>, MountError> {
        let Some(peer) = self.peer().filter(|peer| peer.version >= STEPS_VERSION) else {
            return Ok(Vec::new());
        };
        match self.call(Body::Steps(wire::Steps {})).await? {
            Body::StepsReply(reply) => Ok(stuck::from_wire(peer.worker_pid, reply)),
            _ => Err(unexpected("")),
        }
    }

    /// Has the steps of this process show and count what is stuck in the worker, for as long as somebody polls it.
    pub async fn watch_steps(self: Arc<Self>) {
        let steps = &self.shared.options.steps;
        loop {
            match self.stuck().await {
                Ok(stuck) => steps.hear(stuck),
                // That it does not answer stands as a step of our own.
                Err(error) => {
                    tracing::debug!("ask the shim what is stuck: {error}");
                    steps.hear(Vec::new());
                }
            }
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    }
}
