// SPDX-License-Identifier: Apache-2.0
//! Whether containerd makes idmapped mounts: from its version 2 on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_client::services::v1::version_client::VersionClient;
use tokio_util::sync::CancellationToken;
use tonic::Request;

use crate::config::Config;
use crate::resolve::Containerd;

/// How long one question may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// Until it has answered once: the first container with users of its own may come as soon as containerd is there.
const UNKNOWN: Duration = Duration::from_millis(100);
/// Afterwards: it may be another version one day.
const KNOWN: Duration = Duration::from_secs(60);

/// What the configuration says, or else what containerd is found to be, as long as `stop` is not cancelled. Off until
/// it has said so. Needs a runtime.
pub(super) fn follow(config: &Config, stop: &CancellationToken) -> Arc<AtomicBool> {
    let makes = Arc::new(AtomicBool::new(config.idmapped_mounts.unwrap_or(false)));
    if config.idmapped_mounts.is_none() {
        let containerd = Containerd::new(&config.containerd_address, DEADLINE);
        let (stop, makes) = (stop.clone(), Arc::clone(&makes));
        tokio::spawn(async move {
            stop.run_until_cancelled(ask_for_ever(&containerd, &makes))
                .await;
        });
    }
    makes
}

async fn ask_for_ever(containerd: &Containerd, makes: &AtomicBool) {
    loop {
        let mut request = Request::new(());
        request.set_timeout(DEADLINE);
        let mut client = VersionClient::new(containerd.channel());
        let asked = tokio::time::timeout(DEADLINE, client.version(request)).await;
        let pause = match asked {
            Ok(Ok(answer)) => {
                let version = answer.into_inner().version;
                let can = major(&version).is_some_and(|major| major >= 2);
                if makes.swap(can, Ordering::Relaxed) != can {
                    tracing::info!(version, idmapped_mounts = can, "containerd answers");
                }
                KNOWN
            }
            Ok(Err(_)) | Err(_) => UNKNOWN,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Of `1.6.20~ds1`, `v2.1.4` and the like.
fn major(version: &str) -> Option<u32> {
    let version = version.trim_start_matches('v');
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (version, expected) in [
            ("1.6.20~ds1", Some(1)),
            ("v2.1.4", Some(2)),
            ("2.3.7+unknown", Some(2)),
            ("v10.0.0-rc.1", Some(10)),
            ("", None),
            ("unknown", None),
        ] {
            assert_eq!(major(version), expected, "{version}");
        }
    }
}
