// SPDX-License-Identifier: Apache-2.0
//! Whether the kernel's EROFS serves mounts on this node, found out once, at the start.

use std::path::Path;
use std::time::Duration;

use crate::config::{Config, MountBackend};
use crate::mount::choice::{Abilities, Ability};
use crate::mount::selftest;
use crate::sys::fdstore::FdStore;

/// How long the self-test may take; it takes milliseconds. A kernel in which it hangs gets no mounts,
/// and costs a thread.
const DEADLINE: Duration = Duration::from_secs(10);
const INCOMPLETE: &str = "images that are not complete";
/// What the kernel's mounts of images that are not complete cost without a service manager.
const UNKEPT: &str = "no service manager keeps descriptors: should worker, holder and daemon die at \
                      the same moment, readers of what is missing see zeros until the next daemon";

/// What the kernel is to serve. A node whose kernel cannot is served over FUSE, whatever the
/// configuration wishes: it says so in the log and in `sluice status`, and refuses nothing.
///
/// `store`: who keeps what has the kernel ask first, besides our own processes.
pub(super) async fn find_out(config: &Config, store: FdStore) -> Abilities {
    if config.mount_backend == MountBackend::Fuse {
        let no = || Err("the configuration says fuse".to_owned());
        return Abilities {
            sealed: no(),
            lazy: no(),
            over_fuse: no(),
        };
    }
    let insisted = config.mount_backend == MountBackend::Erofs;
    let sealed = tried(config, selftest::kernel_serves_sealed).await;
    say("images that are complete", &sealed, insisted);
    let lazy = match &sealed {
        Err(reason) => Err(reason.clone()),
        // Devices over FUSE start them faster, and three deaths at once cost no zeros: docs/decisions/041.
        Ok(()) if !insisted => Err(String::new()),
        Ok(()) => {
            let lazy = tried(config, selftest::kernel_asks_first).await;
            say(INCOMPLETE, &lazy, insisted);
            if lazy.is_ok() && store == FdStore::None {
                tracing::warn!("{UNKEPT}");
            }
            lazy
        }
    };
    let over_fuse = match (&sealed, &lazy) {
        (Err(reason), _) => Err(reason.clone()),
        (Ok(()), Ok(())) => Err(String::new()),
        (Ok(()), Err(_)) => {
            let over_fuse = tried(config, selftest::kernel_reads_over_fuse).await;
            match &over_fuse {
                Ok(()) => {
                    tracing::info!("{INCOMPLETE} are mounted by the kernel's EROFS, over FUSE")
                }
                Err(reason) => tracing::warn!("{INCOMPLETE} are served over FUSE: {reason}"),
            }
            over_fuse
        }
    };
    Abilities {
        sealed,
        lazy,
        over_fuse,
    }
}

async fn tried(config: &Config, test: fn(&Path) -> Ability) -> Ability {
    let devices = config.root.join("devices");
    let test = tokio::task::spawn_blocking(move || test(&devices));
    match tokio::time::timeout(DEADLINE, test).await {
        Ok(Ok(tested)) => tested,
        Ok(Err(error)) => Err(format!("the self-test ended: {error}")),
        Err(_) => Err(format!("the self-test does not end within {DEADLINE:?}")),
    }
}

fn say(what: &str, ability: &Ability, insisted: bool) {
    match ability {
        Ok(()) => tracing::info!("{what} are mounted by the kernel's EROFS"),
        Err(reason) if insisted => {
            tracing::error!(
                "mount.backend is erofs, but the kernel's EROFS alone cannot serve {what}: {reason}"
            );
        }
        Err(reason) => tracing::warn!("{what} are served over FUSE: {reason}"),
    }
}
