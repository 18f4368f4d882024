// SPDX-License-Identifier: Apache-2.0
//! Who we are at a registry.

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;

mod chain;
mod docker;
mod files;
mod kubelet;
mod program;
mod target;

pub use chain::CredentialChain;
pub use docker::DockerConfig;
pub use files::CredentialFiles;
pub use kubelet::KubeletPlugins;
pub use target::CredentialTarget;

/// A secret text. Never shown.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The secret itself; only for putting it into a request.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Secret(_) = self;
        f.write_str("[redacted]")
    }
}

/// One way to be known at a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Credential {
    /// A name and a password.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: Secret,
    },
    /// A token that the token service exchanges for access tokens (OAuth2 refresh token).
    IdentityToken(Secret),
}

/// Gives the credentials for a registry and a repository.
#[async_trait]
pub trait CredentialProvider: Send + Sync + fmt::Debug {
    /// All credentials known for `target`, best first, and none that is for another host or port; anonymous access is
    /// always tried after them. `refresh` asks to look again rather than to answer from a cache,
    /// because a registry refused what was given before.
    ///
    /// Bounded in time by the implementation; failures are logged there and give fewer credentials.
    async fn credentials(&self, target: &CredentialTarget, refresh: bool) -> Vec<Credential>;

    /// The registries (`host[:port]`) that it has credentials for by name, where it can tell: whoever
    /// looks for the port of a registry finds it here. Bounded as [`Self::credentials`].
    async fn hosts(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Always anonymous.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCredentials;

#[async_trait]
impl CredentialProvider for NoCredentials {
    async fn credentials(&self, _target: &CredentialTarget, _refresh: bool) -> Vec<Credential> {
        Vec::new()
    }
}

/// Credentials that were given beforehand.
#[derive(Clone, Debug, Default)]
pub struct StaticCredentials {
    hosts: BTreeMap<String, Vec<Credential>>,
}

impl StaticCredentials {
    /// Adds a credential for `host`, behind those added before.
    #[must_use]
    pub fn with(mut self, host: &str, credential: Credential) -> Self {
        self.hosts
            .entry(host.to_owned())
            .or_default()
            .push(credential);
        self
    }
}

#[async_trait]
impl CredentialProvider for StaticCredentials {
    async fn credentials(&self, target: &CredentialTarget, _refresh: bool) -> Vec<Credential> {
        self.hosts.get(target.host()).cloned().unwrap_or_default()
    }

    async fn hosts(&self) -> Vec<String> {
        self.hosts.keys().cloned().collect()
    }
}
