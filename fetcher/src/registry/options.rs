// SPDX-License-Identifier: Apache-2.0
//! What an administrator can say about registries.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::proxies::ProxyRules;
use super::reference::{api_host, is_plain_http_default};
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

/// Where else than at registries their content may be read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MirrorOptions {
    /// Directories with a directory for each registry, and a `hosts.toml` in it; the first that has one for
    /// a registry counts. None: no file is looked at.
    pub directories: Vec<PathBuf>,
    /// Where this node's own mirror listens: what `hosts.toml` says of it is for others.
    pub own: Option<SocketAddr>,
    /// A Dragonfly daemon, which is asked for parts of blobs before all mirrors.
    pub dragonfly: Option<DragonflyOptions>,
    /// Longest wait for the head of a mirror's answer; the wait for others begins anew.
    pub patience: Duration,
    /// Longest silence inside a body of a mirror.
    pub stall: Duration,
    /// First pause after a failure of a mirror, doubled for each further one.
    pub first_pause: Duration,
    /// The longest pause: a mirror that is back is noticed within it.
    pub longest_pause: Duration,
    /// How long a mirror is not asked for what it lacks, or denies.
    pub lack_memory: Duration,
    /// How often files are looked at for changes, at most.
    pub look_every: Duration,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        MirrorOptions {
            directories: Vec::new(),
            own: None,
            dragonfly: None,
            // A mirror is near; one that takes longer is no better than the registry. Two fit into a Prepare.
            patience: Duration::from_secs(2),
            // Shorter than the scheduler's 10 s: the mirror is known to be bad when others are asked.
            stall: Duration::from_secs(5),
            first_pause: Duration::from_secs(2),
            longest_pause: Duration::from_secs(60),
            // A cache that fetches what it lacks has it soon.
            lack_memory: Duration::from_secs(30),
            look_every: Duration::from_secs(5),
        }
    }
}

/// A Dragonfly daemon (dfdaemon).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DragonflyOptions {
    /// The address of its HTTP proxy.
    pub endpoint: Url,
    /// The application that its tasks belong to; empty: none.
    pub application: String,
    /// The tag of its tasks; empty: none.
    pub tag: String,
    /// Longest wait for the head of an answer: it comes with the first piece, of 4 MiB at least.
    pub patience: Duration,
}

impl DragonflyOptions {
    /// The daemon at `endpoint`.
    pub fn new(endpoint: Url) -> Self {
        DragonflyOptions {
            endpoint,
            application: String::new(),
            tag: String::new(),
            patience: Duration::from_secs(5),
        }
    }
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
    /// Where else content may be read.
    pub mirrors: MirrorOptions,
    /// Which requests go through a proxy; by default what the environment says.
    pub proxies: ProxyRules,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        let (proxies, problems) = ProxyRules::from_environment();
        for problem in problems {
            tracing::warn!(problem, "a variable that names a proxy is not used");
        }
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
            // All requests that the scheduler runs at one origin (32 of readers, 4 of boot lists, 6 others),
            // and two for the rest: a reader that has a slot there must not queue here.
            max_in_flight: 56,
            kept_for_readers: 48,
            // Signed URLs live for minutes at least; a minute saves nearly all redirects of a burst.
            redirect_ttl: Duration::from_secs(60),
            range_memory: Duration::from_secs(600),
            manifest_cap_bytes: 4 * 1024 * 1024,
            upload_piece_bytes: 8 * 1024 * 1024,
            mirrors: MirrorOptions::default(),
            proxies,
        }
    }
}

impl RegistryOptions {
    /// The options of `host` and the name under which they were given, which may be another of the same
    /// host: `docker.io` for the host of its API, or with the scheme's own port.
    pub(crate) fn host(&self, host: &str) -> Option<(&str, &HostOptions)> {
        let same = |(name, options): &(&String, &HostOptions)| {
            let plain = options.plain_http;
            let plain = plain.unwrap_or_else(|| is_plain_http_default(name));
            without_own_port(name, plain) == without_own_port(host, plain)
        };
        let exact = self.hosts.get_key_value(host);
        exact
            .or_else(|| self.hosts.iter().find(same))
            .map(|(name, options)| (name.as_str(), options))
    }

    /// Whether requests to `host` go without TLS.
    pub fn is_plain(&self, host: &str) -> bool {
        self.host(host)
            .and_then(|(_, options)| options.plain_http)
            .unwrap_or_else(|| is_plain_http_default(host))
    }

    /// Whether `host` was explicitly configured to be plain; what a redirect away from TLS needs.
    pub fn is_configured_plain(&self, host: &str) -> bool {
        self.host(host)
            .and_then(|(_, options)| options.plain_http)
            .unwrap_or(false)
    }

    /// The options of `host`, to change.
    pub fn host_mut(&mut self, host: &str) -> &mut HostOptions {
        self.hosts.entry(host.to_owned()).or_default()
    }
}

/// Host and port of the API of `host`; without the port that the scheme has by itself.
fn without_own_port(host: &str, plain: bool) -> &str {
    let host = api_host(host);
    let own = if plain { ":80" } else { ":443" };
    host.strip_suffix(own).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_under_every_name_of_a_host() {
        let mut options = RegistryOptions::default();
        options.host_mut("docker.io").max_in_flight = Some(1);
        options.host_mut("tls.example:443").max_in_flight = Some(2);
        options.host_mut("plain.example").plain_http = Some(true);
        options.host_mut("other.example:8443").max_in_flight = Some(3);
        options.host_mut("bare.example").max_in_flight = Some(4);
        let cases = [
            ("docker.io", Some("docker.io")),
            ("registry-1.docker.io", Some("docker.io")),
            ("tls.example", Some("tls.example:443")),
            ("tls.example:443", Some("tls.example:443")),
            ("tls.example:80", None),
            ("bare.example:443", Some("bare.example")),
            ("plain.example:80", Some("plain.example")),
            ("plain.example:443", None),
            ("other.example:8443", Some("other.example:8443")),
            ("other.example", None),
            ("unknown.example", None),
        ];
        for (host, expected) in cases {
            assert_eq!(options.host(host).map(|it| it.0), expected, "{host}");
        }
    }
}
