// SPDX-License-Identifier: Apache-2.0
//! What the daemon tells about itself: the log, and metrics and health over HTTP on loopback.

mod http;
mod metrics;

use crate::config::LogFormat;

pub use http::{Health, serve_at};
pub use metrics::{PrepareOutcome, SnapshotMetrics};

/// Starts the log, to standard error. The level was validated with the configuration.
///
/// **Errors**: if a log was started before.
pub fn start_log(
    format: LogFormat,
    level: &str,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // The gossip library warns of each datagram that makes no sense, which anybody may send.
    let level = match level {
        level if level.contains("chitchat") => level.to_owned(),
        level => format!("{level},chitchat=error"),
    };
    let filter = tracing_subscriber::EnvFilter::try_new(level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
}
