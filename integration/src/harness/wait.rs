// SPDX-License-Identifier: Apache-2.0
//! Waiting for what comes about by itself.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

const LOOK: Duration = Duration::from_millis(100);

/// Waits until `holds`.
///
/// **Errors** it does not within the deadline; those of `holds`.
pub fn eventually(
    what: &str,
    deadline: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(
            begun.elapsed() < deadline,
            "{what}: not within {deadline:?}"
        );
        std::thread::sleep(LOOK);
    }
    Ok(())
}
