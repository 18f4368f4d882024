// SPDX-License-Identifier: Apache-2.0
//! Notifications of registries: what was pushed is prewarmed on the zone's supernodes.
//!
//! - `event`: what the bodies of distribution and Harbor say: pure.
//! - `server`: who may say it, over HTTP.
//!
//! A notification is a hint from somebody who knows the token. It names a repository and the digest of a
//! manifest, and only those; the image is then asked of the registry like any other, with this node's
//! credentials, if `[trust] lazy` allows the repository. A push of a blob says nothing of the image that it will
//! belong to, so it is counted and passed over: the manifest, which a push writes last, brings all layers, and
//! those that an earlier image brought are here already.
//!
//! **Bounds** a body: [`server::BODY_MAX_BYTES`]; events of one body: [`event::EVENTS_MAX`]; prewarms that run and
//! wait: those of [`crate::prewarm`]; beyond them the registry hears 503 and sends the event again.

pub mod event;
mod metrics;
mod server;

use std::net::SocketAddr;
use std::path::PathBuf;

pub use metrics::NotificationMetrics;
pub use server::{Receiver, ReceiverError};

/// What the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotificationOptions {
    /// Where registries send them.
    pub listen: SocketAddr,
    /// The file with the token that they show.
    pub token: PathBuf,
    /// Whether a node that is no supernode acts on them.
    pub prewarm: bool,
    /// Names of registries in notifications, and what this node calls them.
    pub hosts: std::collections::BTreeMap<String, String>,
}
