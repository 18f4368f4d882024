// SPDX-License-Identifier: Apache-2.0
//! What an administrator can say about registries.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::reference::is_plain_http_default;
use crate::source::RetryPolicy;

/// Options of one host (`host[:port]` as references write it).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct HostOptions {
    /// Plain HTTP instead of TLS. `None`: plain for this machine's own addresses, TLS for others.
    pub plain_http: Option<bool>,
    /// Accept any certificate. Only ever by explicit configuration, host by host.
    pub insecure_skip_verify: bool,
    /// PEM files of certificate authorities to trust besides the system's.
    pub ca_files: Vec<PathBuf>,
    /// Most requests in flight. `None`: [`RegistryOptions::max_in_flight`].
    pub max_in_flight: Option<usize>,
}

/// Options of a [`super::RegistryClient`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RegistryOptions {
    /// Per host.
    pub hosts: BTreeMap<String, HostOptions>,
    /// The `User-Agent`.
    pub user_agent: String,
    /// Longest wait for a connection, TLS handshake included.
    pub connect_timeout: Duration,
    /// Longest wait for the head of an answer, connecting included.
    pub header_timeout: Duration,
    /// Longest wait for one of several places of a blob to answer before the next is asked. Several
    /// must fit into what a caller waits for a first byte (the scheduler: 10 s); a proxy that fetches
    /// a cold blob first is asked last the next time, and then has all the rest.
    pub place_timeout: Duration,
    /// Longest silence inside a body, either way.
    pub stall_timeout: Duration,
    /// Longest wait for a token, all attempts together.
    pub token_timeout: Duration,
    /// How failed requests are repeated.
    pub retry: RetryPolicy,
    /// Most requests in flight per host, bodies being read included.
    pub max_in_flight: usize,
    /// How many of these background requests leave free for readers and the boot list.
    pub kept_for_readers: usize,
    /// How long the target of a redirect is used again for the same blob.
    pub redirect_ttl: Duration,
    /// How long a repository that ignored a range is taken to ignore all.
    pub range_memory: Duration,
    /// Largest manifest accepted; the distribution specification asks for at least 4 MiB.
    pub manifest_cap_bytes: u64,
    /// Size of the pieces in which blobs of unknown length are uploaded; held in memory per upload.
    pub upload_piece_bytes: usize,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        RegistryOptions {
            hosts: BTreeMap::new(),
            user_agent: concat!("sluice/", env!("CARGO_PKG_VERSION")).to_owned(),
            connect_timeout: Duration::from_secs(10),
            // Registries that proxy fetch a cold blob before they answer.
            header_timeout: Duration::from_secs(30),
            place_timeout: Duration::from_secs(3),
            stall_timeout: Duration::from_secs(20),
            token_timeout: Duration::from_secs(30),
            retry: RetryPolicy::default(),
            // Enough to fill a line at 20 ms per request; few enough not to be throttled.
            max_in_flight: 16,
            kept_for_readers: 4,
            // Signed URLs live for minutes at least; a minute saves nearly all redirects of a burst.
            redirect_ttl: Duration::from_secs(60),
            range_memory: Duration::from_secs(600),
            manifest_cap_bytes: 4 * 1024 * 1024,
            upload_piece_bytes: 8 * 1024 * 1024,
        }
    }
}

impl RegistryOptions {
    /// Whether requests to `host` go without TLS.
    pub fn is_plain(&self, host: &str) -> bool {
        self.hosts
            .get(host)
            .and_then(|options| options.plain_http)
            .unwrap_or_else(|| is_plain_http_default(host))
    }

    /// Whether `host` was explicitly configured to be plain; what a redirect away from TLS needs.
    pub fn is_configured_plain(&self, host: &str) -> bool {
        self.hosts
            .get(host)
            .and_then(|options| options.plain_http)
            .unwrap_or(false)
    }

    /// The options of `host`, to change.
    pub fn host_mut(&mut self, host: &str) -> &mut HostOptions {
        self.hosts.entry(host.to_owned()).or_default()
    }
}
