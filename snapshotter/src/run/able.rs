// SPDX-License-Identifier: Apache-2.0
//! Whether the kernel's EROFS serves mounts on this node, found out once, at the start.

use std::time::Duration;

use crate::config::{Config, MountBackend};
use crate::mount::choice::Ability;
use crate::mount::selftest;

/// How long the self-test may take; it takes milliseconds. A kernel in which it hangs gets no mounts,
/// and costs a thread.
const DEADLINE: Duration = Duration::from_secs(10);

/// Whether the kernel is to serve sealed runs. A node whose kernel cannot is served over FUSE, whatever
/// the configuration wishes: it says so in the log and in `sluice status`, and refuses nothing.
pub(super) async fn of_sealed(config: &Config) -> Ability {
    if config.mount_backend == MountBackend::Fuse {
        return Err("the configuration says fuse".into());
    }
    let devices = config.root.join("devices");
    let test = tokio::task::spawn_blocking(move || selftest::kernel_serves_sealed(&devices));
    let tested = match tokio::time::timeout(DEADLINE, test).await {
        Ok(Ok(tested)) => tested,
        Ok(Err(error)) => Err(format!("the self-test ended: {error}")),
        Err(_) => Err(format!("the self-test does not end within {DEADLINE:?}")),
    };
    match (&tested, config.mount_backend) {
        (Ok(()), _) => tracing::info!("sealed images are mounted by the kernel's EROFS"),
        (Err(reason), MountBackend::Erofs) => {
            tracing::error!("mount.backend is erofs, but images are served over FUSE: {reason}");
        }
        (Err(reason), _) => tracing::warn!("sealed images are served over FUSE: {reason}"),
    }
    tested
}
