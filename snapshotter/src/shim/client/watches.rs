// SPDX-License-Identifier: Apache-2.0
//! The daemon's part in watches: it asks for them, and holds duplicates of what keeps them alive.
//!
//! A watch that nobody holds any more lets readers see holes as zeros, so two deaths at once must not
//! end it: [`super::reserve`] holds what the holder has, and with it a new shim goes on where the dead one was.

use std::time::Duration;

use sluice_proto::shim as wire;
use sluice_proto::shim::envelope::Body;
use tokio::time::Instant;

use super::{ShimClient, unexpected};
use crate::mount::{MountError, MountSpec, UnmountOutcome};
use crate::shim::WATCH_VERSION;

/// How long a worker may take to have us hold a watch. It does so before it answers, unless it has just
/// attached.
const HELD_WITHIN: Duration = Duration::from_secs(2);
/// How often we look.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

impl ShimClient {
    /// Has the devices of a run watched; when it returns, they are, and this process holds what keeps
    /// the watch alive. The same again is fine.
    pub async fn watch(&self, spec: &MountSpec) -> Result<(), MountError> {
        spec.check()?;
        let refused = |reason: String| MountError::Refused {
            key: spec.key.clone(),
            reason,
        };
        self.check_able(&spec.key)?;
        let mount = Some(spec.into());
        let watched = match self.call(Body::Watch(wire::Watch { mount })).await? {
            Body::WatchReply(reply) if reply.error.is_empty() => reply.watched.unwrap_or_default(),
            Body::WatchReply(reply) => return Err(refused(reply.error)),
            _ => return Err(unexpected(&spec.key)),
        };
        let until = Instant::now() + HELD_WITHIN;
        while !self.shared.options.reserve.holds(&watched.entry) {
            if Instant::now() > until {
                return Err(refused("the daemon does not hold its descriptors".into()));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    }

    /// Whether who serves can watch.
    fn check_able(&self, key: &str) -> Result<(), MountError> {
        let able = self
            .peer()
            .is_some_and(|peer| peer.version >= WATCH_VERSION);
        able.then_some(()).ok_or_else(|| MountError::Refused {
            key: key.to_owned(),
            reason: "no shim is there that can watch devices".into(),
        })
    }

    /// The mount of a run is gone from its place: ends the watch, unless something still uses the file
    /// system.
    pub async fn unwatch(&self, key: &str) -> Result<UnmountOutcome, MountError> {
        let unwatch = wire::Unwatch {
            key: key.to_owned(),
        };
        self.check_able(key)?;
        match self.call(Body::Unwatch(unwatch)).await? {
            Body::UnwatchReply(reply) if reply.busy => Ok(UnmountOutcome::Busy),
            Body::UnwatchReply(_) => Ok(UnmountOutcome::Done),
            _ => Err(unexpected(key)),
        }
    }

    /// The runs that are watched.
    pub async fn watched(&self) -> Result<Vec<String>, MountError> {
        if self.check_able("").is_err() {
            return Ok(Vec::new());
        }
        match self.call(Body::Watches(wire::Watches {})).await? {
            Body::WatchesReply(reply) => Ok(reply.watched.into_iter().map(|it| it.key).collect()),
            _ => Err(unexpected("")),
        }
    }
}
