// SPDX-License-Identifier: Apache-2.0
//! Time, in one place.
//!
//! Waits and deadlines use [`now`], the runtime's monotonic clock, which tests pause and move by
//! hand. Wall time ([`unix_seconds`]) only ever labels records; nothing is decided by it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// The present moment of the monotonic clock.
pub fn now() -> Instant {
    Instant::now()
}

/// The moment `after` from now; `None` when the clock cannot say it, which means never.
pub fn moment_after(after: Duration) -> Option<Instant> {
    now().checked_add(after)
}

/// Seconds since 1970 by the wall clock, for labels; 0 when the clock stands before that.
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

/// Waits until `at`; for ever when there is no such moment.
pub async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
